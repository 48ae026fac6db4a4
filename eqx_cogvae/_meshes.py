"""Arrays that lie on the devices of a mesh.

`jax.make_mesh` makes explicit axes by default: the type of an array then says how it is sharded,
and every operation has to say how its result is. The model leaves that to XLA, as automatic axes
do. So functions of video run on automatic axes inside, and give their results the sharding of
their video.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from ._types import is_traced

_F = TypeVar("_F", bound=Callable)
_VIDEO_RANK = 5  # (b, t, h, w, c)

split = jax.make_user_context(False)
"""True while tracing a function whose height or width is split over devices. Part of JAX's cache
key."""


def on_automatic_axes(method: _F) -> _F:
    """Decorates a method of video, or of its latents, to take arrays on explicit axes.

    Results of five axes are sharded over batch, height and width as the first argument of five
    axes is; any others are on all devices.
    """

    @functools.wraps(method)
    def run(self: Any, *args: Any, **options: Any) -> Any:
        mesh = explicit_mesh((self, args, options))
        if mesh is None:
            return method(self, *args, **options)
        spec = video_spec((args, options))
        call = lambda self, args, options: method(self, *args, **options)  # noqa: E731
        return automatically(call, (self, args, options), mesh, spec)

    return run  # pyright: ignore


def explicit_mesh(tree: PyTree) -> Any:
    """Returns the mesh that the types of arrays name explicit axes of, or None."""
    meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(tree) if eqx.is_array(x)]
    return next((m for m in (*meshes, jax.sharding.get_abstract_mesh()) if _is_explicit(m)), None)


def video_spec(tree: PyTree) -> PartitionSpec:
    """Returns how batch, height and width of the first array of five axes are sharded."""
    for x in jax.tree.leaves(tree):
        if eqx.is_array(x) and x.ndim == _VIDEO_RANK:
            batch, _, height, width, _ = jax.typeof(x).sharding.spec
            return PartitionSpec(batch, None, height, width, None)
    return PartitionSpec(*[None] * _VIDEO_RANK)


def automatically(fn: Callable, args: tuple, mesh: Any, spec: PartitionSpec) -> Any:
    """Calls `fn(*args)` with every axis of `mesh` automatic, and shards what it returns."""
    rows = any(spec[dim] is not None for dim in (2, 3))
    with split(split.value or rows):
        if is_traced(args):
            return _traced(fn, args, mesh, spec)
        return _eager(fn, args, spec)


def _traced(fn: Callable, args: tuple, mesh: Any, spec: PartitionSpec) -> Any:
    arrays, static = eqx.partition(args, eqx.is_array)
    run = lambda arrays: fn(*eqx.combine(arrays, static))  # noqa: E731
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        results = jax.eval_shape(run, structs)
    shardings = jax.tree.map(lambda x: _sharding(mesh, spec, x.shape), results)
    return jax.sharding.auto_axes(run, out_sharding=shardings)(arrays)


def _eager(fn: Callable, args: tuple, spec: PartitionSpec) -> Any:
    # The same devices hold the same parts: only the type of the mesh's axes changes.
    arrays, static = eqx.partition(args, eqx.is_array)
    placed = [x.sharding for x in jax.tree.leaves(arrays) if isinstance(x, jax.Array)]
    meshes = (s.mesh for s in placed if isinstance(s, NamedSharding))
    mesh = next((m for m in meshes if isinstance(m, Mesh)), None)
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
        axes = spec[dim]
        axes = () if axes is None else (axes if isinstance(axes, tuple) else (axes,))
        count = 1
        for axis in axes:
            count *= mesh.shape[axis]
        if shape[dim] % count:
            raise ValueError(
                f"the result's {name} of {shape[dim]} does not divide by {count}, the number of "
                f"devices that the argument is sharded over: give another {name}, or fewer devices."
            )
    return NamedSharding(mesh, spec)


def _is_explicit(mesh: Any) -> bool:
    return any(kind == AxisType.Explicit for kind in mesh.axis_types)


def varying_axes(x: Any) -> frozenset:
    """Returns the axes of a `jax.shard_map` over which `x` differs from device to device."""
    kind = getattr(jax.typeof(x), "manual_axis_type", None)
    return frozenset() if kind is None else kind.varying


def varying_as(*arrays: Array) -> tuple[Array, ...]:
    """Returns the arrays as ones that vary over all the axes that any of them varies over."""
    own = [varying_axes(x) for x in arrays]
    together = frozenset().union(*own)
    return tuple(
        lax.pcast(x, tuple(together - axes), to="varying") if together - axes else x
        for x, axes in zip(arrays, own, strict=True)
    )


def without_varying(aval: Any) -> Any:
    """Returns the type of an array on a single device of a `jax.shard_map`."""
    kind = getattr(aval, "manual_axis_type", None)
    return aval if kind is None else aval.update(manual_axis_type=type(kind)())


__all__ = [
    "automatic",
    "automatically",
    "explicit_mesh",
    "on_automatic_axes",
    "split",
    "varying_as",
    "video_spec",
    "without_varying",
]
