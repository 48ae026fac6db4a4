"""Computes a video's memory and arithmetic before it is encoded or decoded."""

import dataclasses
import math
import numbers
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, SupportsFloat

import equinox as eqx
import jax
from jax.sharding import SingleDeviceSharding

from ._autoencoder import VAE
from ._flops import flops
from ._frames import LATENT_BATCH, SAMPLE_BATCH, frame_batches
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
    """How many are compiled."""
    flop: float | int
    """Floating-point operations for the whole clip."""
    fn: Callable = dataclasses.field(repr=False, compare=False)
    """From video to moments, or from latents to video."""


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
        """The cheapest way to `"encode"` or `"decode"` that fits the budget.

        Its `fn` returns the whole result. "Streamed" is not among the choices: it needs a loop
        that takes the pieces.

        **Raises:** `ValueError` where none fits.
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
        """Returns True if the budget is enough, or if none is known and the way compiles."""
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
    device: Any = None,
) -> Plan:
    """Compares ways to encode and decode a video: whole, streamed, in slices and in tiles.

    Compiles the steps of each way without running them, and reads peak memory and arithmetic
    off the programs; to that it adds what of the video itself is on the device. It takes as long
    as compiling does, unless JAX's persistent compilation cache has the plan from before. Ways
    are planned as they are called outside of `jax.jit`.

    "Whole" is `vae.encode` and `vae.decode` of an array on the device, "streamed" has its video
    on the host. Ways that are the same for this video, such as one slice, are left out.

    **Arguments:**

    - `vae`: a model, also one of `jax.ShapeDtypeStruct`s, from `eqx.filter_eval_shape`.
    - `shape`: of the video, `(b, t, h, w)` or `(b, t, h, w, 3)`, in frames and pixels.
    - `memory`: a budget in bytes, `math.inf` for no bound; None is what the device says it has,
        where it does.
    - `tile`, `overlap`: of tiles, in pixels, and in fractions of them as for `tiled`; by default
        diffusers', 240x360 by a sixth and a fifth.
    - `device`: what to compile for, also one of a described topology that is not there.

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
    device = jax.devices()[0] if device is None else device
    b, t, h, w = shape[:4]
    placed, latents = _placed(vae, device), vae.config.latent_frames(t)
    encoding = _Direction(
        vae.encode_step, placed.encode_step, SAMPLE_BATCH, Factor(1, cell), tile, overlap, device
    )
    decoding = _Direction(
        vae.decode_step,
        placed.decode_step,
        LATENT_BATCH,
        Factor(cell, 1),
        (tile[0] // cell, tile[1] // cell),
        overlap,
        device,
    )
    return Plan(
        _costs(encoding, _struct((b, t, h, w, vae.config.in_channels), vae, device)),
        _costs(
            decoding,
            _struct((b, latents, h // cell, w // cell, vae.config.latent_channels), vae, device),
        ),
        _limit(device) if budget is None else budget,
    )


class _Direction(NamedTuple):
    """Encoding or decoding: its step, the same in shapes on a device, and its geometry."""

    step: Callable
    placed: Callable
    size: int
    factor: Factor
    tile: tuple[int, int]
    overlap: tuple[int | float, int | float]
    device: Any


class _Program(NamedTuple):
    """A compiled step, in bytes and operations, and how often a clip calls it.

    `donated` is the part of its arguments that it writes its outputs over.
    """

    peak: float | int
    donated: int
    arguments: int
    result: int
    flop: int
    calls: int


def _costs(direction: _Direction, x: jax.ShapeDtypeStruct) -> tuple[Cost, ...]:
    b, _, *sides, _ = x.shape
    whole = framewise(direction.step, direction.size)
    tiles = tiled(whole, direction.tile, direction.overlap)
    grid = [_lengths(direction, axis, side) for axis, side in enumerate(sides)]
    clip, one = _programs(direction, x), None
    stream = streamed(direction.step, direction.size)
    # A stream that runs ahead keeps the cache that a step goes on from.
    peak = max(program.peak + program.donated + program.result for program in clip)
    costs = [
        _whole("whole", whole, clip, x),
        Cost(_STREAMED, peak, len(clip), _flop(clip), stream),
    ]
    if b > 1:
        one = _programs(direction, _cut(x, 1, *sides))
        costs.append(_whole("sliced", sliced(whole), one, x, slices=b))
    if grid == [[side] for side in sides]:
        return tuple(costs)
    largest = [max(lengths) for lengths in grid]
    piece = _programs(direction, _cut(x, b, *largest))
    costs.append(_tiles("tiled", tiles, piece, x, grid))
    if b > 1:
        piece = _programs(direction, _cut(x, 1, *largest))
        costs.append(_tiles("sliced tiled", sliced(tiles), piece, x, grid, slices=b))
    return tuple(costs)


def _whole(
    name: str, fn: Callable, programs: list[_Program], x: jax.ShapeDtypeStruct, slices: int = 1
) -> Cost:
    result = slices * _result(programs)
    return Cost(name, _peak(programs, x, result), len(programs), slices * _flop(programs), fn)


def _tiles(
    name: str,
    fn: Callable,
    programs: list[_Program],
    x: jax.ShapeDtypeStruct,
    grid: list[list[int]],
    slices: int = 1,
) -> Cost:
    area = math.prod(map(sum, grid)) / math.prod(map(max, grid))
    tile = _result(programs)
    # While tiles are blended two rows of them are kept; without overlap they are the result.
    covered = math.prod(x.shape[2:4]) / math.prod(map(max, grid))
    result = round(slices * tile * covered)
    rows = 2 * len(grid[1]) * tile
    peak = _peak(programs, x, result) + rows
    shapes = math.prod(len(set(lengths)) for lengths in grid)
    return Cost(name, peak, shapes * len(programs), slices * area * _flop(programs), fn)


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


def _programs(direction: _Direction, x: jax.ShapeDtypeStruct) -> list[_Program]:
    """The first frame batch's, and the steady ones'."""
    first, *steady = frame_batches(x.shape[1], direction.size)
    program, cache = _compiled(direction, x, first, None, 1)
    if not steady:
        return [program]
    return [program, _compiled(direction, x, direction.size, cache, len(steady))[0]]


def _compiled(
    direction: _Direction, x: jax.ShapeDtypeStruct, frames: int, cache: Any, calls: int
) -> tuple[_Program, Any]:
    weights, static = eqx.partition(direction.placed, _is_struct)
    batch = jax.ShapeDtypeStruct((x.shape[0], frames, *x.shape[2:]), x.dtype, sharding=x.sharding)
    step = lambda weights, batch, cache: eqx.combine(weights, static)(batch, cache)  # noqa: E731
    traced = jax.jit(step, donate_argnums=2).trace(weights, batch, cache)
    flop, lowered = flops(traced.jaxpr), traced.lower()
    result, cache = jax.tree.map(lambda s: _on(s, direction.device), lowered.out_info)
    size = math.prod(result.shape) * result.dtype.itemsize
    try:
        with warnings.catch_warnings():
            # On CPU, and for a cache of another shape, giving buffers away is not to be had.
            warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
            program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _Program(math.inf, 0, 0, size, flop, calls), cache
    memory: Any = program.memory_analysis()
    held = memory.argument_size_in_bytes
    peak = held + memory.temp_size_in_bytes + memory.output_size_in_bytes
    donated = memory.alias_size_in_bytes
    return _Program(peak - donated, donated, held, size, flop, calls), cache


def _placed(vae: VAE, device: Any) -> VAE:
    """The model in shapes only, on a device."""
    return jax.tree.map(lambda x: _on(x, device) if eqx.is_array(x) or _is_struct(x) else x, vae)


def _on(x: Any, device: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device))


def _is_struct(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)


def _struct(shape: tuple[int, ...], vae: VAE, device: Any) -> jax.ShapeDtypeStruct:
    return _on(jax.ShapeDtypeStruct(shape, vae.dtype), device)


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
