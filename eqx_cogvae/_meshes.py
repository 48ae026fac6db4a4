"""Runs functions of video on arrays that are sharded over a mesh.

`jax.make_mesh` makes explicit axes by default. The type of an array on them includes its sharding,
and some operations need to be told the sharding of their result. The model runs on automatic axes
instead, where XLA chooses shardings, and its results get the sharding of the video.
"""

import contextlib
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from ._types import is_traced

_F = TypeVar("_F", bound=Callable)
_VIDEO_RANK = 5  # (b, t, h, w, c)


class Split(NamedTuple):
    """The numbers of devices that batch, height and width of video are split over."""

    batch: int = 1
    height: int = 1
    width: int = 1

    @property
    def devices(self) -> int:
        """Number of devices that share a video."""
        return self.batch * self.height * self.width

    @property
    def within_frames(self) -> bool:
        """True if height or width is split."""
        return self.height * self.width > 1

    def further(self, other: "Split") -> "Split":
        """Returns the split of a video that both splits apply to."""
        return Split(*map(max, self, other))


split = jax.make_user_context(Split())
"""The split of the video that functions are traced for.

`sharded` sets it, and arrays on explicit axes do. A placement on automatic axes is not noticed. It
is part of JAX's cache key.
"""


def on_automatic_axes(method: _F) -> _F:
    """Decorates a method of video, or of its latents, to take arrays on explicit axes.

    Results of rank 5 are sharded over batch, height and width as the method's first argument is.
    All other results are replicated.
    """
    first = list(inspect.signature(method).parameters)[1]

    @functools.wraps(method)
    def run(self: Any, *args: Any, **options: Any) -> Any:
        video_first = (args or options.get(first), args, options, self)
        mesh = explicit_mesh(video_first)
        if mesh is None:
            return method(self, *args, **options)
        spec = video_spec(video_first)
        call = lambda self, args, options: method(self, *args, **options)  # noqa: E731
        return with_automatic_axes(call, (self, args, options), mesh, spec)

    return run  # pyright: ignore


def explicit_mesh(tree: PyTree) -> Any:
    """Returns the mesh with explicit axes that an array names first, or the context, or None."""
    meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(tree) if eqx.is_array(x)]
    return next((m for m in (*meshes, jax.sharding.get_abstract_mesh()) if _is_explicit(m)), None)


def video_spec(tree: PyTree) -> PartitionSpec:
    """Returns how batch, height and width of the first array of rank 5 are sharded."""
    for x in jax.tree.leaves(tree):
        if eqx.is_array(x) and x.ndim == _VIDEO_RANK:
            batch, _, height, width, _ = jax.typeof(x).sharding.spec
            return PartitionSpec(batch, None, height, width, None)
    return PartitionSpec(*[None] * _VIDEO_RANK)


def with_automatic_axes(fn: Callable, args: tuple, mesh: Any, spec: PartitionSpec) -> Any:
    """Calls `fn(*args)` with every axis of `mesh` automatic, and shards what it returns."""
    counts = Split(*(_devices(mesh, spec[dim]) for dim in (0, 2, 3)))
    with split(split.value.further(counts)):
        # Arrays that a traced function closes over are concrete; what is made while tracing is not.
        if is_traced((args, jnp.zeros(()))):
            return _traced(fn, args, mesh, spec)
        return _eager(fn, args, mesh, spec)


def _traced(fn: Callable, args: tuple, mesh: Any, spec: PartitionSpec) -> Any:
    arrays, static = eqx.partition(args, eqx.is_array)
    run = lambda arrays: fn(*eqx.combine(arrays, static))  # noqa: E731
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        results = jax.eval_shape(run, structs)
    shardings = jax.tree.map(lambda x: _sharding(mesh, spec, x.shape), results)
    return jax.sharding.auto_axes(run, out_sharding=shardings)(arrays)


def _eager(fn: Callable, args: tuple, named: Any, spec: PartitionSpec) -> Any:
    # Every device keeps its part; only the type of the mesh's axes changes.
    arrays, static = eqx.partition(args, eqx.is_array)
    placed = [x.sharding for x in jax.tree.leaves(arrays) if isinstance(x, jax.Array)]
    meshes = [s.mesh for s in placed if isinstance(s, NamedSharding) and isinstance(s.mesh, Mesh)]
    # Weights may lie on another mesh than the video, whose mesh the results are for.
    mesh = next((m for m in meshes if named in (m, m.abstract_mesh)), next(iter(meshes), None))
    arrays = jax.tree.map(_made_automatic, arrays)
    context = contextlib.nullcontext() if mesh is None else jax.set_mesh(automatic(mesh))
    with context:
        results = fn(*eqx.combine(arrays, static))
    if mesh is None:
        return results
    return jax.tree.map(lambda x: jax.device_put(x, _sharding(mesh, spec, x.shape)), results)


def automatic(mesh: Mesh) -> Mesh:
    """Returns the mesh with automatic axes."""
    return Mesh(mesh.devices, mesh.axis_names)


def _made_automatic(x: Array) -> Array:
    place = getattr(x, "sharding", None)
    if not isinstance(place, NamedSharding) or not isinstance(place.mesh, Mesh):
        return x
    if not _is_explicit(place.mesh):
        return x
    return jax.device_put(x, NamedSharding(automatic(place.mesh), place.spec))


def _sharding(mesh: Any, spec: PartitionSpec, shape: tuple[Any, ...]) -> NamedSharding:
    if len(shape) != _VIDEO_RANK:
        return NamedSharding(mesh, PartitionSpec(*[None] * len(shape)))
    for dim, name in ((0, "batch"), (2, "height"), (3, "width")):
        count = _devices(mesh, spec[dim])
        if shape[dim] % count:
            raise ValueError(
                f"the result's {name} of {shape[dim]} does not divide among the {count} devices "
                f"that the argument's {name} is sharded over: shard over fewer devices, or give "
                f"a {name} whose result divides."
            )
    return NamedSharding(mesh, spec)


def _devices(mesh: Any, axes: Any) -> int:
    """Returns the number of devices that an entry of a `PartitionSpec` shards an axis over."""
    names = () if axes is None else (axes if isinstance(axes, tuple) else (axes,))
    return math.prod(mesh.shape[name] for name in names)


def _is_explicit(mesh: Any) -> bool:
    return any(kind == AxisType.Explicit for kind in mesh.axis_types)


def varying_axes(x: Any) -> frozenset:
    """Returns the axes of a `jax.shard_map` over which `x` varies."""
    kind = getattr(jax.typeof(x), "manual_axis_type", None)
    return frozenset() if kind is None else kind.varying


def varying_as(*arrays: Array) -> tuple[Array, ...]:
    """Casts the arrays to vary over the union of their axes in a `jax.shard_map`."""
    own = [varying_axes(x) for x in arrays]
    together = frozenset().union(*own)
    return tuple(
        lax.pcast(x, tuple(together - axes), to="varying") if together - axes else x
        for x, axes in zip(arrays, own, strict=True)
    )


def without_varying(aval: Any) -> Any:
    """Returns the type without the axes that it varies over in a `jax.shard_map`."""
    kind = getattr(aval, "manual_axis_type", None)
    return aval if kind is None else aval.update(manual_axis_type=type(kind)())


__all__ = [
    "Split",
    "automatic",
    "explicit_mesh",
    "on_automatic_axes",
    "split",
    "varying_as",
    "video_spec",
    "with_automatic_axes",
    "without_varying",
]
