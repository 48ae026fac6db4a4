"""One function over many devices: batch, height and width of video over the axes of a mesh."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree, Shaped

from .._meshes import Split, automatic, explicit_mesh, split, with_automatic_axes
from .._types import is_traced
from .base import Transform

# Video is (b, t, h, w, c), and time is never cut: a causal convolution walks along it.
_DIMS = {"batch": 0, "height": 2, "width": 3}
_RANK = 5
# XLA's partitioner, which divides what a user's own layers convolve, does so wrongly where two
# devices hold one row, or column, each and the mesh has another axis: measured with JAX 0.10.2.
_LEAST = {"batch": 1, "height": 2, "width": 2}
# Enlarged by so much, a side shows fn's factor with nothing lost to rounding.
_PROBE = 64


class Sharded(Transform):
    """See `sharded`."""

    fn: Callable
    mesh: Mesh = eqx.field(static=True)
    batch: str | None = eqx.field(static=True)
    height: str | None = eqx.field(static=True)
    width: str | None = eqx.field(static=True)

    def __check_init__(self):
        used = [axis for axis, _ in self._cuts().values()]
        if not used or len(set(used)) < len(used):
            raise ValueError(
                "`batch`, `height` and `width` must name one axis of the mesh or more, each once, "
                f"got {self.batch!r}, {self.height!r}, {self.width!r}; {self._axes()}."
            )

    def __call__(self, *args: PyTree[Shaped[Array, "..."]]) -> PyTree[Shaped[Array, "..."]]:
        self._check(args, "")
        cut = Split(**{name: among for name, (_, among) in self._cuts().items()})
        with split(split.value.further(cut)):
            explicit = explicit_mesh((args, self))
            if explicit is None:
                return self._called(args)
            called = lambda self, args: self._called(args)  # noqa: E731
            return with_automatic_axes(called, (self, args), explicit, self._spec(explicit))

    def _spec(self, mesh: Any) -> PartitionSpec:
        """Returns how results are cut, by axes that an explicit mesh around the call has too."""
        axes = (self.batch, self.height, self.width)
        batch, height, width = (axis if axis in mesh.axis_names else None for axis in axes)
        return PartitionSpec(batch, None, height, width, None)

    def _called(self, args: PyTree) -> PyTree:
        if is_traced((self, args)):
            return self._constrained(args)
        if not isinstance(self.fn, Transform):
            return _jitted(self, self._placed(args))
        # Only for what it raises; the trace is cached.
        eqx.filter_eval_shape(_jitted, self, args)
        return self._placed(self.fn(*self._placed(args)))

    def _constrained(self, args: PyTree) -> PyTree:
        args = jax.tree.map(lambda x: self._on_video(lax.with_sharding_constraint, x), args)
        results = self.fn(*args)
        self._check(results, "the result's ", args)
        return jax.tree.map(lambda x: self._on_video(lax.with_sharding_constraint, x), results)

    def _placed(self, tree: PyTree) -> PyTree:
        whole = NamedSharding(self.mesh, PartitionSpec())
        tree = jax.tree.map(lambda x: self._on_video(jax.device_put, x), tree)
        return jax.tree.map(lambda x: x if x.ndim == _RANK else jax.device_put(x, whole), tree)

    def _on_video(self, place: Callable, x: Array) -> Array:
        if x.ndim != _RANK:
            return x
        spec = PartitionSpec(self.batch, None, self.height, self.width, None)
        return place(x, NamedSharding(self.mesh, spec))

    def _cuts(self) -> dict[str, tuple[str, int]]:
        """Returns the mesh axis that each side is cut over, and its number of devices."""
        named = {name: getattr(self, name) for name in _DIMS}
        for name, axis in named.items():
            if axis is not None and axis not in self.mesh.axis_names:
                raise ValueError(
                    f"`{name}` names no axis of the mesh, got {axis!r}; {self._axes()}."
                )
        return {k: (axis, self.mesh.shape[axis]) for k, axis in named.items() if axis is not None}

    def _axes(self) -> str:
        return f"its axes are {', '.join(map(repr, self.mesh.axis_names))}"

    def _check(self, tree: PyTree, whose: str, args: PyTree | None = None) -> None:
        """Raises for a side that does not divide: of the arguments, or of results of `args`."""
        shapes = {x.shape for x in jax.tree.leaves(tree) if x.ndim == _RANK}
        for shape, (name, (axis, among)) in itertools.product(shapes, self._cuts().items()):
            size = shape[_DIMS[name]]
            if _divides(name, size, among):
                continue
            unit = among if args is None else among * self._compression(name, args)
            given = size if args is None else _video(args).shape[_DIMS[name]]
            low = max(given // unit, _LEAST[name]) * unit
            raise ValueError(
                f"{whose}{name} of {size} does not divide among the {among} devices of the mesh "
                f"axis {axis!r} into parts of at least {_LEAST[name]}: give a {name} of {low} or "
                f"{low + unit}."
            )

    def _compression(self, name: str, args: PyTree) -> int:
        """Returns how many cells along a side make one of the result's, from shapes alone."""
        dim = _DIMS[name]

        def probe(x: Array) -> jax.ShapeDtypeStruct:
            shape = list(x.shape)
            if x.ndim == _RANK:
                shape[dim] *= _PROBE
            return jax.ShapeDtypeStruct(shape, x.dtype)

        results = eqx.filter_eval_shape(self.fn, *jax.tree.map(probe, args))
        smallest = min(x.shape[dim] for x in jax.tree.leaves(results) if x.ndim == _RANK)
        return max(_video(args).shape[dim] * _PROBE // max(smallest, 1), 1)


def sharded(
    fn: Callable,
    mesh: Mesh,
    *,
    batch: str | None = None,
    height: str | None = None,
    width: str | None = None,
) -> Sharded:
    """Returns a function that runs `fn` on all devices of a mesh.

    It equals `fn` itself, to rounding. Devices exchange the rows and columns that convolutions see
    across an edge, and the moments of norms. The memory of activations on a device falls with the
    number of devices.

    Arrays of five axes, BTHWC, in the arguments and the results are cut into equal parts, of two
    rows and two columns or more. The weights in `fn` are copied to every device once, by this
    call; a model from `from_pretrained(..., mesh=mesh)` is there already. Cut height and width
    here, and not by placing arrays alone: the layers then know of it, and leave out what would
    gather whole frames.

    Put it around the whole function, `sharded(framewise(vae.decode_step, 2), mesh, ...)`, and
    inside of `tiled` and `sliced`. While tracing it only constrains shardings: the arguments of
    the program must then be on the mesh, or not be committed to a device.

    !!! Example

        ```python
        mesh = cv.best_mesh(latents.shape)
        axes = {"batch": "batch", "height": "height", "width": "width"}
        video = cv.sharded(cv.framewise(vae.decode_step, 2), mesh, **axes)(latents)
        ```

    **Arguments:**

    - `fn`: a function of PyTrees of arrays, such as a step or `framewise` of one.
    - `mesh`: the devices. See `best_mesh`.
    - `batch`, `height`, `width`: the axis of the mesh that each is cut over, or None.

    **Returns:** a function with the arguments and results of `fn`, itself a PyTree. Results stay
    cut.

    **Raises:** `ValueError` for axes that the mesh lacks, and, when called, for a side of an
    argument or a result that does not divide; it names sizes that do.
    """
    # A mesh of explicit axes would have every operation of `fn` say how it is cut.
    mesh = automatic(mesh)
    weights, rest = eqx.partition(fn, eqx.is_array)
    if not is_traced(weights):
        weights = jax.device_put(weights, NamedSharding(mesh, PartitionSpec()))
    return Sharded(eqx.combine(weights, rest), mesh, batch, height, width)


def best_mesh(shape: Sequence[int], devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh of devices whose axes divide the sides of a clip.

    The batch is cut first, as far as it divides, since its parts exchange nothing. Then height and
    width are cut so that the edges between the parts are shortest; of equal edges, height is cut
    before width.

    **Arguments:**

    - `shape`: of BTHWC latents. A mesh that divides them divides the video as well.
    - `devices`: all that JAX has, by default.

    **Returns:** a mesh with axes "batch", "height" and "width".

    **Raises:** `ValueError` if no mesh of these devices divides the sides; it names counts of
    devices that do.
    """
    devices = jax.devices() if devices is None else devices
    if len(shape) != _RANK:
        raise ValueError(f"`shape` must be of BTHWC, five axes, got {tuple(shape)}.")
    sides = {name: shape[dim] for name, dim in _DIMS.items()}
    if not (ways := _divisions(sides, len(devices))):
        fewer = [n for n in range(1, len(devices)) if _divisions(sides, n)]
        raise ValueError(
            f"no mesh of {len(devices)} devices divides {sides}: "
            f"give a number of `devices` that does, one of {fewer}."
        )
    height, width = sides["height"], sides["width"]
    best = min(ways, key=lambda way: (-way[0], height / way[1] + width / way[2], -way[1]))
    auto = (AxisType.Auto,) * len(best)
    return jax.make_mesh(best, tuple(_DIMS), auto, devices=devices)


@eqx.filter_jit
def _jitted(fn: Sharded, args: Any) -> Any:
    return fn(*args)


def _video(args: PyTree) -> Array:
    return next(x for x in jax.tree.leaves(args) if x.ndim == _RANK)


def _divides(name: str, size: int, among: int) -> bool:
    return among == 1 or (size % among == 0 and size // among >= _LEAST[name])


def _divisions(sides: dict[str, int], count: int) -> list[tuple[int, ...]]:
    """Every way to cut the sides evenly that makes so many parts."""
    choices = [[n for n in range(1, count + 1) if _divides(*side, n)] for side in sides.items()]
    return [way for way in itertools.product(*choices) if math.prod(way) == count]


__all__ = ["best_mesh", "sharded"]
