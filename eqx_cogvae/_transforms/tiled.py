"""Overlapping, blended tiles of a function of video."""

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, SupportsFloat, SupportsIndex

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree, Shaped

from .._meshes import on_automatic_axes
from .._types import is_traced
from .base import Transform, call, cut, join
from .progress import progress_bar

EDGES = ("clip", "shift")
# Video is (b, t, h, w, c).
_HEIGHT, _WIDTH = 2, 3
# Enlarged by so much, a tile shows fn's factor with nothing lost to rounding.
_PROBE = 64


@eqx.filter_jit
def blend(
    before: Shaped[Array, "..."], after: Shaped[Array, "..."], extent: int, axis: int
) -> Shaped[Array, "..."]:
    """Fades the first `extent` entries of `after` in over the last `extent` of `before`.

    The i-th entry along `axis` is `before * (1 - i / extent) + after * (i / extent)`, rounded to
    the nearest if the arrays hold whole numbers.

    **Arguments:**

    - `before`, `after`: neighbouring tiles, of equal sizes along all other axes.
    - `extent`: number of entries that overlap; at most those of either array are used.
    - `axis`: the axis along which they are neighbours.

    **Returns:** `after`, with its first entries blended.

    **Raises:** `ValueError` for a negative extent.
    """
    if extent < 0:
        raise ValueError(f"`extent` must be at least 0, got {extent}.")
    extent = min(extent, before.shape[axis], after.shape[axis])
    if extent == 0:
        return after
    shape = [1] * after.ndim
    shape[axis] = extent
    tail = lax.slice_in_dim(before, before.shape[axis] - extent, None, axis=axis)
    head = lax.slice_in_dim(after, 0, extent, axis=axis)
    dtype = jnp.float64 if after.dtype == jnp.float64 else jnp.float32
    ramp = (jnp.arange(extent, dtype=jnp.float32) / extent).reshape(shape).astype(dtype)
    mixed = tail.astype(dtype) * (1 - ramp) + head.astype(dtype) * ramp
    if jnp.issubdtype(after.dtype, jnp.integer):
        mixed = jnp.rint(mixed)
    rest = lax.slice_in_dim(after, extent, None, axis=axis)
    return jnp.concatenate([mixed.astype(after.dtype), rest], axis)


class Span(NamedTuple):
    """The part of one axis that a tile covers: `start:stop` of the input.

    Of its output the first `lead` cells are blended with the tile before it, and the first
    `keep` are kept.
    """

    start: int
    stop: int
    lead: int
    keep: int


class Factor(NamedTuple):
    """The change of a side by `fn`: output cells = input cells * up // down."""

    up: int
    down: int

    def __call__(self, cells: int) -> int:
        return cells * self.up // self.down


class Tiled(Transform):
    """See `tiled`."""

    fn: Callable
    size: tuple[int, int] = eqx.field(static=True)
    overlap: tuple[int | float, int | float] = eqx.field(static=True)
    edges: str = eqx.field(static=True)
    progress: bool = eqx.field(static=True)

    def __check_init__(self):
        for side in self.size:
            if isinstance(side, bool) or not isinstance(side, int) or side < 1:
                raise ValueError(
                    f"`size` must be two whole numbers of at least 1, got {self.size}: "
                    "decode with (30, 45), encode with (240, 360)."
                )
        for fraction in self.overlap:
            if not 0 <= fraction < 1:
                raise ValueError(
                    f"`overlap` must lie in [0, 1), got {self.overlap}: the usual is (1/6, 1/5)."
                )
        if self.edges not in EDGES:
            raise ValueError(f'`edges` must be "clip" or "shift", got {self.edges!r}.')

    @on_automatic_axes
    def __call__(self, x: Shaped[Array, "b t h w c"]) -> PyTree[Shaped[Array, "b t2 h2 w2 c2"]]:
        height, width = x.shape[_HEIGHT : _WIDTH + 1]
        if height <= self.size[0] and width <= self.size[1]:
            return call(self.fn, x)
        down, across = self._factors(x)
        rows = spans(height, self.size[0], self.overlap[0], down, self.edges)
        columns = spans(width, self.size[1], self.overlap[1], across, self.edges)
        places = list(itertools.product(rows, columns))
        if is_traced((self, x)):
            tiles = self._mapped(x, places)
            return _assembled(rows, columns, lambda place: tiles[place])
        bar = progress_bar(len(places), "tile", show=self.progress)

        def tile(place):
            bar.update()
            return call(self.fn, _cut(x, place))

        result = _assembled(rows, columns, tile)
        bar.close()
        return result

    def _factors(self, x: Array) -> tuple[Factor, Factor]:
        """Evaluates shapes only, at a multiple of the tile."""
        probe = [_PROBE * side for side in self.size]
        shape = (*x.shape[:_HEIGHT], *probe, *x.shape[_WIDTH + 1 :])
        out = eqx.filter_eval_shape(self.fn, jax.ShapeDtypeStruct(shape, x.dtype))
        sides = {leaf.shape[_HEIGHT : _WIDTH + 1] for leaf in jax.tree.leaves(out)}
        if len(sides) != 1:
            raise ValueError(f"`fn` must return arrays of one height and width, got {sides}.")
        pairs = zip(self.size, probe, sides.pop(), strict=True)
        return tuple(_factor(*pair) for pair in pairs)  # pyright: ignore

    def _mapped(self, x: Array, places: list[tuple[Span, Span]]) -> dict[Any, PyTree[Array]]:
        """One compiled body for all tiles of a shape."""
        tiles = {}
        shape = lambda place: tuple(span.stop - span.start for span in place)  # noqa: E731
        for _, group in itertools.groupby(sorted(places, key=shape), shape):
            group = list(group)
            if len(group) == 1:
                tiles[group[0]] = self.fn(_cut(x, group[0]))
                continue
            results = lax.map(self.fn, jnp.stack([_cut(x, place) for place in group]))
            for i, place in enumerate(group):
                tiles[place] = jax.tree.map(lambda a, i=i: a[i], results)
        return tiles


def tiled(
    fn: Callable,
    size: tuple[SupportsIndex, SupportsIndex],
    overlap: tuple[SupportsFloat, SupportsFloat],
    *,
    edges: str = "clip",
    progress: bool = False,
) -> Tiled:
    """Returns a function that calls `fn` on overlapping tiles and blends them linearly.

    It only approximates `fn`, because a tile does not see beyond its edges. With `edges="clip"` it
    equals diffusers' tiled encode and decode, if those return video of the right size. As there,
    tiles are cut only if the video exceeds `size`. Each tile is blended with the tile above it,
    then with the tile to its left, and both of those are blended already.

    While tracing, tiles of equal shape share one compiled body under `lax.map`: the program needs
    the memory of one tile, of all tiles' results before they are blended, and of the output.
    Outside of a trace every tile is a call of a compiled program, and two rows of results are
    kept.

    **Arguments:**

    - `fn`: `(b, t, h, w, c) -> (b, t', h', w', c')`, such as `framewise(vae.decode_step, 2)`; a
        PyTree of such arrays may come back. Its factor of enlarging or shrinking is inferred.
    - `size`: height and width of a tile, in cells of `fn`'s input.
    - `overlap`: fractions of the tile's height and width, in [0, 1). The stride is rounded down
        to a whole number of cells, on both sides of `fn`; ramp and crop follow from it.
    - `edges`: `"clip"` cuts the last tiles short; `"shift"` moves them inward, so that all are
        of one shape.
    - `progress`: True shows a bar, if not tracing.

    **Returns:** a function of `x`, itself a PyTree, whose result has the size of `fn(x)`.

    **Raises:** `ValueError` for a size or overlap that leaves no tile, and, when called, for a
    tile that is no multiple of what `fn` compresses by.
    """
    (height, width), (down, across) = size, overlap
    sides = (_plain(height), _plain(width))
    return Tiled(fn, sides, (_plain(down), _plain(across)), edges, progress)


def _plain(number: Any) -> Any:
    """Returns a number of any library as Python's own; what is none as it is."""
    if type(number) in (int, float, bool):
        return number
    for convert in (operator.index, float):
        try:
            return convert(number)
        except (TypeError, ValueError):
            continue
    return number


def spans(
    side: int, size: int, overlap: int | float, factor: Factor, edges: str
) -> tuple[Span, ...]:
    """The tiles along an axis of `side` input cells."""
    down = factor.down
    # 30 * (1 - 0.9) is a little below 3.
    stride = math.floor(round(size * (1 - overlap), 6)) // down * down
    if stride < 1:
        raise ValueError(
            f"a tile of {size} that overlaps by {overlap:g} leaves no step to the next: give an "
            f"overlap of at most {1 - down / size:g}, or a larger tile."
        )
    if edges == "clip":
        starts = [start for start in range(0, side, stride) if side - start >= down] or [0]
    else:
        last = max(side - size, 0) // down * down
        starts = [*range(0, last, stride), last]
    stops = [min(start + size, side) for start in starts]
    leads = [0, *(factor(stop - start) for stop, start in zip(stops, starts[1:], strict=False))]
    ends = [*starts[1:], side]
    keeps = [factor(end - start) for end, start in zip(ends, starts, strict=True)]
    return tuple(map(Span, starts, stops, leads, keeps))


def _factor(size: int, probe: int, out: int) -> Factor:
    divisor = math.gcd(probe, out) or 1
    factor = Factor(out // divisor, probe // divisor)
    if out and 1 in factor and size % factor.down == 0:
        return factor
    down = max(round(probe / max(out, 1)), 1)
    low = max(size // down, 1) * down
    raise ValueError(
        f"a tile of {size} is not a multiple of {down}, by which `fn` compresses: "
        f"give {low} or {low + down}."
    )


def _assembled(
    rows: Sequence[Span], columns: Sequence[Span], tile: Callable[[tuple[Span, Span]], PyTree]
) -> PyTree[Array]:
    """Blends and crops tiles, asked for row by row; keeps no more than two rows of them."""
    done, above = [], []
    for row in rows:
        line = []
        for column in columns:
            piece = tile((row, column))
            if above:
                piece = _blended(above[len(line)], piece, row.lead, _HEIGHT)
            if line:
                piece = _blended(line[-1], piece, column.lead, _WIDTH)
            line.append(piece)
        kept = [_cropped(p, row.keep, c.keep) for p, c in zip(line, columns, strict=True)]
        done.append(join(kept, _WIDTH))
        above = line
    return join(done, _HEIGHT)


def _blended(before: PyTree, after: PyTree, extent: int, axis: int) -> PyTree:
    return jax.tree.map(lambda a, b: blend(a, b, extent, axis), before, after)


def _cropped(tree: PyTree[Array], height: int, width: int) -> PyTree[Array]:
    return jax.tree.map(lambda x: cut(cut(x, 0, height, _HEIGHT), 0, width, _WIDTH), tree)


def _cut(x: Array, place: tuple[Span, Span]) -> Array:
    row, column = place
    return cut(cut(x, row.start, row.stop, _HEIGHT), column.start, column.stop, _WIDTH)


__all__ = ["Factor", "Span", "blend", "spans", "tiled"]
