"""Computes a video's memory and arithmetic before it is encoded or decoded."""

import dataclasses
import itertools
import math
import numbers
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, SupportsFloat

import equinox as eqx
import jax
from jax.sharding import Sharding, SingleDeviceSharding

from ._autoencoder import VAE
from ._flops import flops
from ._frames import LATENT_BATCH, SAMPLE_BATCH, frame_batches
from ._transforms.base import traced_step
from ._transforms.framewise import framewise
from ._transforms.sliced import sliced
from ._transforms.streamed import streamed
from ._transforms.tiled import Factor, spans, tiled

_TILE = (240, 360)
_OVERLAP = (1 / 6, 1 / 5)
_STREAMED = "streamed"


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one way to encode or decode a video.

    `peak` is bytes on the device at the worst moment: weights, cache, temporaries, and what of
    the video is held there; infinite, where the compiler itself found no room. `programs` are
    compiled, `flop` is the arithmetic of convolutions and matrix products. `fn` is the way
    itself: from video to moments, or from latents to video; for "streamed" to an iterator over
    pieces of them.
    """

    name: str
    """`"whole"`, `"streamed"`, `"sliced"`, `"tiled"` or `"sliced tiled"`."""
    peak: float | int
    """Bytes."""
    programs: int
    """Number of programs that are compiled."""
    flop: float | int
    """Floating-point operations for the whole clip."""
    fn: Callable = dataclasses.field(repr=False, compare=False)
    """From video to moments, or from latents to video."""
    _rest: Callable[[], Any] = dataclasses.field(default=tuple, repr=False, compare=False)

    def compile(self) -> None:
        """Compiles the programs that `plan` has not compiled: those of tiles that an edge cuts.

        With JAX's persistent compilation cache on, `fn` then finds the programs of all its steps
        there, in this process and in later ones, for videos of the planned shape and dtype.
        """
        self._rest()


@dataclasses.dataclass(frozen=True)
class Plan:
    """The costs of all ways to encode and decode a video; print it for a table."""

    encode: tuple[Cost, ...]
    """A `Cost` for each way to encode."""
    decode: tuple[Cost, ...]
    """A `Cost` for each way to decode."""
    memory: float | int | None
    """The budget in bytes, infinite for no bound; None where neither caller nor device told."""

    def best(self, direction: str) -> Cost:
        """Returns the cheapest way that fits the budget.

        Its `fn` returns the whole result. "Streamed" is not among the choices: it needs a loop
        that takes the pieces.

        **Arguments:**

        - `direction`: `"encode"` or `"decode"`.

        **Returns:** the `Cost` of the way.

        **Raises:** `ValueError` if none fits, or for another direction.
        """
        if direction not in ("encode", "decode"):
            raise ValueError(f'`direction` must be "encode" or "decode", got {direction!r}.')
        costs = self.encode if direction == "encode" else self.decode
        costs = [cost for cost in costs if cost.name != _STREAMED]
        fitting = [cost for cost in costs if self.fits(cost)]
        if not fitting:
            least = min(costs, key=lambda cost: cost.peak)
            raise ValueError(
                f"no way to {direction} this video fits {_gib(self.memory)}; {least.name} needs "
                f"the least, {_gib(least.peak)}: give a smaller `tile`, a bfloat16 model, or "
                "spread it over devices."
            )
        return min(fitting, key=lambda cost: cost.flop)

    def fits(self, cost: Cost) -> bool:
        """Says if a way fits the budget.

        **Arguments:**

        - `cost`: one of the plan's.

        **Returns:** True if the budget is enough, or if none is known and the way compiles.
        """
        return cost.peak < math.inf and (self.memory is None or cost.peak <= self.memory)

    def __str__(self) -> str:
        lines = [f"{'':22}{'peak':>11}{'programs':>10}{'TFLOP':>10}"]
        for direction, costs in (("encode", self.encode), ("decode", self.decode)):
            whole = [cost for cost in costs if cost.name != _STREAMED]
            best = self.best(direction) if any(map(self.fits, whole)) else None
            for cost in costs:
                mark = "  cheapest that fits" if cost is best else ""
                mark = mark if self.fits(cost) else "  does not fit"
                lines.append(
                    f"{direction + ', ' + cost.name:22}{_gib(cost.peak):>11}{cost.programs:10}"
                    f"{cost.flop / 1e12:10.3g}{mark}"
                )
        memory = "no bound" if self.memory == math.inf else _gib(self.memory)
        return "\n".join([*lines, f"memory: {memory}"])


def plan(
    vae: VAE,
    shape: tuple[int, ...],
    *,
    memory: SupportsFloat | None = None,
    tile: tuple[int, int] = _TILE,
    overlap: tuple[int | float, int | float] = _OVERLAP,
    dtype: Any = None,
    device: Any = None,
) -> Plan:
    """Compares ways to encode and decode a video: whole, streamed, in slices and in tiles.

    Compiles the steps of each way without running them, and reads peak memory and arithmetic
    off the programs; to that it adds what of the video itself is on the device. It takes as long
    as compiling does, unless JAX's persistent compilation cache has the plan from before. Ways
    are planned as they are called outside of `jax.jit`.

    These are the programs that a call runs. With the persistent cache on, the first call of
    `vae.encode`, of `vae.decode` or of any way's `fn`, for a video of this shape and dtype, reads
    its steps from there; `plan.best("decode").compile()` adds those of tiles that an edge cuts. A
    server fills the cache with a plan for each of its shapes, before it starts:

    !!! Example

        ```python
        for shape in ((1, 9, 16, 24), (1, 17, 16, 24)):
            plan = cv.plan(vae, shape)
            for direction in ("encode", "decode"):
                plan.best(direction).compile()
        ```

    "Whole" is `vae.encode` and `vae.decode` of an array on the device, "streamed" has its video
    on the host. Ways that are the same for this video, such as one slice, are left out.

    **Arguments:**

    - `vae`: a model, also one of `jax.ShapeDtypeStruct`s, from `eqx.filter_eval_shape`.
    - `shape`: of the video, `(b, t, h, w)` or `(b, t, h, w, 3)`, in frames and pixels.
    - `memory`: a budget in bytes, `math.inf` for no bound; None is what the device says it has,
        where it does.
    - `tile`, `overlap`: of tiles, in pixels, and in fractions of them as for `tiled`; by default
        diffusers', 240x360 by a sixth and a fifth.
    - `dtype`: of the video that is encoded, and of the latents that are decoded; None is the
        model's.
    - `device`: what to compile for, with everything put on it; also one of a described topology
        that is not there. None is where the model is.

    **Returns:** a `Plan`: print it, or decode with `plan.best("decode").fn(latents)`.

    **Raises:** `ValueError` for a shape that is none, a tile as `tiled` has it, or a budget that is
    not above 0; `TypeError` for a budget that is no number.
    """
    cell = vae.config.spatial_compression
    if len(shape) not in (4, 5) or min(shape) < 1 or min(shape[2:4]) < cell:
        raise ValueError(
            f"`shape` must be (batch, frames, height, width), with {cell}x{cell} pixels or more, "
            f"got {shape}."
        )
    if shape[4:] not in ((), (vae.config.in_channels,)):
        raise ValueError(
            f"`shape` must be of a video of {vae.config.in_channels} channels, got {shape}."
        )
    budget = None if memory is None else _budget(memory)
    if min(tile) < cell or any(side % cell for side in tile):
        raise ValueError(f"`tile` must be in multiples of {cell} pixels, got {tile}.")
    b, t, h, w = shape[:4]
    place = None if device is None else SingleDeviceSharding(device)
    placed, latents = _placed(vae, place), vae.config.latent_frames(t)
    # What a program gives is on the device that its weights were put on, if they were.
    caches = next((x.sharding for x in jax.tree.leaves(placed) if _is_struct(x)), None)
    home = jax.devices()[0] if caches is None else min(caches.device_set, key=lambda d: d.id)
    given = lambda *shape: jax.ShapeDtypeStruct(  # noqa: E731
        shape, vae.dtype if dtype is None else dtype, sharding=place
    )
    encoding = _Direction(
        vae.encode_step, placed.encode_step, SAMPLE_BATCH, Factor(1, cell), tile, overlap, caches
    )
    cells = (tile[0] // cell, tile[1] // cell)
    decoding = _Direction(
        vae.decode_step, placed.decode_step, LATENT_BATCH, Factor(cell, 1), cells, overlap, caches
    )
    return Plan(
        _costs(encoding, given(b, t, h, w, vae.config.in_channels)),
        _costs(decoding, given(b, latents, h // cell, w // cell, vae.config.latent_channels)),
        _limit(home if device is None else device) if budget is None else budget,
    )


class _Direction(NamedTuple):
    """Encoding or decoding: its step, the same in shapes alone, and its geometry."""

    step: Callable
    placed: Callable
    size: int
    factor: Factor
    tile: tuple[int, int]
    overlap: tuple[int | float, int | float]
    caches: Sharding | None


class _Program(NamedTuple):
    """A compiled step, in bytes and operations, and how often a clip calls it."""

    peak: float | int
    arguments: int
    result: int
    flop: int
    calls: int


def _costs(direction: _Direction, x: jax.ShapeDtypeStruct) -> tuple[Cost, ...]:
    b, _, *sides, _ = x.shape
    whole = framewise(direction.step, direction.size)
    tiles = tiled(whole, direction.tile, direction.overlap)
    grid = [_lengths(direction, axis, side) for axis, side in enumerate(sides)]
    clip = _programs(direction, x)
    # A stream of an array keeps the cache that a batch goes on from, and copies a result to the
    # host while the next one is computed.
    peak = max(program.peak + program.result for program in _programs(direction, x, ahead=True))
    stream = streamed(direction.step, direction.size)
    costs = [
        _whole("whole", whole, clip, x),
        Cost(_STREAMED, peak, len(clip), _flop(clip), stream),
    ]
    if b > 1:
        one = _programs(direction, _cut(x, 1, *sides))
        costs.append(_whole("sliced", sliced(whole), one, x, slices=b))
    if grid == [[side] for side in sides]:
        return tuple(costs)
    costs.append(_tiles("tiled", tiles, direction, x, grid))
    if b > 1:
        costs.append(_tiles("sliced tiled", sliced(tiles), direction, x, grid, slices=b))
    return tuple(costs)


def _whole(
    name: str, fn: Callable, programs: list[_Program], x: jax.ShapeDtypeStruct, slices: int = 1
) -> Cost:
    result = slices * _result(programs)
    return Cost(name, _peak(programs, x, result), len(programs), slices * _flop(programs), fn)


def _tiles(
    name: str,
    fn: Callable,
    direction: _Direction,
    x: jax.ShapeDtypeStruct,
    grid: list[list[int]],
    slices: int = 1,
) -> Cost:
    shapes = [_cut(x, x.shape[0] // slices, *each) for each in itertools.product(*map(set, grid))]
    largest = max(shapes, key=lambda shape: math.prod(shape.shape))
    programs = _programs(direction, largest)
    area = math.prod(map(sum, grid)) / math.prod(map(max, grid))
    tile = _result(programs)
    # While tiles are blended two rows of them are kept; without overlap they are the result.
    covered = math.prod(x.shape[2:4]) / math.prod(map(max, grid))
    result = round(slices * tile * covered)
    rows = 2 * len(grid[1]) * tile
    peak = _peak(programs, x, result) + rows
    count, flop = len(shapes) * len(programs), slices * area * _flop(programs)
    rest = lambda: [_programs(direction, shape) for shape in shapes]  # noqa: E731
    return Cost(name, peak, count, flop, fn, rest)


def _peak(programs: list[_Program], x: jax.ShapeDtypeStruct, result: int) -> float | int:
    """Returns the peak of steps whose results wait on the device and are joined there."""
    running = max(program.peak for program in programs) + result
    joining = min(program.arguments for program in programs) + 2 * result
    return max(running, joining) + math.prod(x.shape) * x.dtype.itemsize


def _result(programs: list[_Program]) -> int:
    return sum(program.calls * program.result for program in programs)


def _flop(programs: list[_Program]) -> int:
    return sum(program.calls * program.flop for program in programs)


def _lengths(direction: _Direction, axis: int, side: int) -> list[int]:
    """Returns the lengths of the tiles along height or width."""
    tile, overlap = direction.tile[axis], direction.overlap[axis]
    if side <= tile:
        return [side]
    return [s.stop - s.start for s in spans(side, tile, overlap, direction.factor, "clip")]


def _programs(
    direction: _Direction, x: jax.ShapeDtypeStruct, *, ahead: bool = False
) -> list[_Program]:
    """Compiles the first frame batch's program, and the steady ones', which may run ahead."""
    first, *steady = frame_batches(x.shape[1], direction.size)
    program, cache = _compiled(direction, x, first, None, 1)
    if not steady:
        return [program]
    calls = len(steady)
    return [program, _compiled(direction, x, direction.size, cache, calls, ahead=ahead)[0]]


def _compiled(
    direction: _Direction,
    x: jax.ShapeDtypeStruct,
    frames: int,
    cache: Any,
    calls: int,
    *,
    ahead: bool = False,
) -> tuple[_Program, Any]:
    batch = jax.ShapeDtypeStruct((x.shape[0], frames, *x.shape[2:]), x.dtype, sharding=x.sharding)
    traced = traced_step((direction.placed, batch), cache, ahead)
    with warnings.catch_warnings():
        # On CPU, and for a cache of another shape, giving buffers away is not to be had.
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        flop, lowered = flops(traced.jaxpr), traced.lower()
        result, cache = jax.tree.map(lambda x: _struct(x, direction.caches), lowered.out_info)
        size = math.prod(result.shape) * result.dtype.itemsize
        try:
            program = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return _Program(math.inf, 0, size, flop, calls), cache
    memory: Any = program.memory_analysis()
    held = memory.argument_size_in_bytes
    peak = held + memory.temp_size_in_bytes + memory.output_size_in_bytes
    # Outputs are written over the cache that a program is given for good.
    return _Program(peak - memory.alias_size_in_bytes, held, size, flop, calls), cache


def _placed(vae: VAE, place: Sharding | None) -> VAE:
    """Returns the model in shapes alone; without a place, each is on the device it was put on."""

    def placed(x: Any) -> Any:
        if not eqx.is_array(x) and not _is_struct(x):
            return x
        # An array that was put on no device is another argument to a program than one that was.
        own = x.sharding if isinstance(x, jax.Array) and x.committed else None
        alone = own is not None and len(own.device_set) == 1
        return _struct(x, own if place is None and alone else place)

    return jax.tree.map(placed, vae)


def _struct(x: Any, place: Sharding | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def _is_struct(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)


def _cut(x: jax.ShapeDtypeStruct, batch: int, height: int, width: int) -> jax.ShapeDtypeStruct:
    shape = (batch, x.shape[1], height, width, x.shape[-1])
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)


def _budget(memory: Any) -> float | int:
    """Returns a budget in whole bytes, or infinity."""
    if isinstance(memory, bool) or not isinstance(memory, numbers.Real):
        raise TypeError(f"`memory` must be in bytes, such as 16 * 2**30, got {memory!r}.")
    size = float(memory)
    if not size > 0:
        raise ValueError(f"`memory` must be above 0 bytes, such as 16 * 2**30, got {memory}.")
    return size if size == math.inf else int(size)


def _limit(device: Any) -> int | None:
    """Returns the device's memory in bytes, or None; a device that is not there tells nothing."""
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except (AttributeError, NotImplementedError, RuntimeError):
        return None


def _gib(size: float | int | None) -> str:
    if size == math.inf:
        return "too much"
    return "not known" if size is None else f"{size / 2**30:.3g} GiB"


__all__ = ["Cost", "Plan", "plan"]
