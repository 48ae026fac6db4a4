"""Tiles against diffusers where its size is right, and the right size everywhere."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st
from programs import forget_if_many
from reference import SHALLOW, decode, distance, encode, normal, pair

import eqx_cogvae as cv
from eqx_cogvae._transforms import tiled as _tiles

CELL = SHALLOW.spatial_compression


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return pair(SHALLOW, tmp_path_factory.mktemp("vae"))


def tile_diffusers(model, size, overlap):
    """Tiles of `size` latent cells, of which the samples are `CELL` times as many."""
    model.enable_tiling(size[0] * CELL, size[1] * CELL, *overlap)
    model.tile_latent_min_height, model.tile_latent_min_width = size


OVERLAPS = (1 / 6, 1 / 5, 1 / 4, 1 / 3, 1 / 2, 2 / 3)


def diffusers_is_right(size, overlap):
    """Whether its stride is its crop, in decoding and in encoding: it rounds them apart."""
    decodes = int(size * (1 - overlap)) * CELL == size * CELL - int(size * CELL * overlap)
    encodes = int(size * CELL * (1 - overlap)) == (size - int(size * overlap)) * CELL
    return decodes and encodes


# enable_tiling takes an overlap of 0.0 for none given, so there is none here.
RIGHT = [(s, f) for s in range(2, 9) for f in OVERLAPS if diffusers_is_right(s, f)]


def assert_tiles_agree(models, axes, grid):
    vae, model = models
    size, overlap = zip(*axes, strict=True)
    tile_diffusers(model, size, overlap)
    try:
        latents = normal((1, 3, *grid, 3))
        ours = cv.tiled(cv.framewise(vae.decode_step, 2), size, overlap)(latents)
        assert distance(ours, decode(model, latents)) < 1e-5
        video = normal((1, 9, grid[0] * CELL, grid[1] * CELL, 3))
        pixels = (size[0] * CELL, size[1] * CELL)
        ours = cv.tiled(cv.framewise(vae.encode_step, 8), pixels, overlap)(video)
        assert distance(cv.DiagonalGaussian.from_moments(ours).mean, encode(model, video)[0]) < 1e-5
    finally:
        model.disable_tiling()


axes = st.tuples(st.sampled_from(RIGHT), st.sampled_from(RIGHT))
grids = st.tuples(st.integers(2, 15), st.integers(2, 15))


@pytest.mark.parametrize(
    ("axes", "grid"),
    [
        (((4, 1 / 4), (3, 1 / 3)), (7, 7)),
        pytest.param(((6, 1 / 2), (5, 1 / 5)), (9, 5), marks=pytest.mark.full),
    ],
)
def test_equals_diffusers(axes, grid, models):
    """Tiles of different overlaps, with a narrow one at the end, and one column of them."""
    assert set(axes) <= set(RIGHT)
    assert_tiles_agree(models, axes, grid)


@pytest.mark.full
@given(axes=axes, grid=grids)
@settings(max_examples=60)
def test_equals_diffusers_at_length(axes, grid, models):
    assert_tiles_agree(models, axes, grid)
    forget_if_many()


def test_the_default_tiles_are_right_in_diffusers():
    assert (8, 1 / 4) in RIGHT
    assert diffusers_is_right(30, 1 / 6)
    assert diffusers_is_right(45, 1 / 5)


def test_neighbours_are_blended_already(models):
    """With tiles that overlap by half, a corner is blended twice: one less is seen."""
    vae, model = models
    size, overlap = (4, 4), (0.5, 0.5)
    tile_diffusers(model, size, overlap)
    latents = normal((1, 3, 8, 8, 3))
    due = decode(model, latents)
    model.disable_tiling()
    fn = cv.framewise(vae.decode_step, 2)
    assert distance(cv.tiled(fn, size, overlap)(latents), due) < 1e-5
    starts = range(0, 8, 2)
    tiles = {(i, j): fn(latents[:, :, i : i + 4, j : j + 4]) for i in starts for j in starts}
    unblended = jnp.concatenate(
        [
            jnp.concatenate([blended_once(tiles, i, j)[:, :, :4, :4] for j in starts], 3)
            for i in starts
        ],
        2,
    )
    assert distance(unblended, due) > 1e-2


def blended_once(tiles, i, j):
    tile = tiles[i, j]
    tile = cv.blend(tiles[i - 2, j], tile, 4, 2) if i else tile
    return cv.blend(tiles[i, j - 2], tile, 4, 3) if j else tile


def nearest(x):
    return jnp.repeat(jnp.repeat(x, 4, axis=2), 4, axis=3)


def pooled(x):
    b, t, h, w, c = x.shape
    x = x[:, :, : h // 4 * 4, : w // 4 * 4]
    return x.reshape(b, t, h // 4, 4, w // 4, 4, c).mean((3, 5))


geometries = given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    overlap=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
    grid=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    edges=st.sampled_from(["clip", "shift"]),
)


@geometries
@settings(max_examples=5)
def test_local_functions_come_back_whole(size, overlap, grid, edges):
    assert_local_functions_come_back_whole(size, overlap, grid, edges)


@pytest.mark.full
@geometries
@settings(max_examples=60)
def test_local_functions_come_back_whole_at_length(size, overlap, grid, edges):
    assert_local_functions_come_back_whole(size, overlap, grid, edges)
    forget_if_many()


def assert_local_functions_come_back_whole(size, overlap, grid, edges):
    """Of a function that sees one cell, tiles are the function itself, at any geometry."""
    for fn, unit in ((nearest, 1), (pooled, 4)):
        tile = tuple(side * unit for side in size)
        if any(np.floor(round(s * (1 - f), 6)) < 1 for s, f in zip(size, overlap, strict=True)):
            continue
        x = normal((1, 1, *(side * unit + unit // 2 for side in grid), 2))
        got = cv.tiled(fn, tile, overlap, edges=edges)(x)
        np.testing.assert_allclose(got, fn(x), rtol=1e-5, atol=1e-6)


@given(
    side=st.integers(1, 200),
    size=st.integers(1, 40),
    overlap=st.floats(0, 0.99),
    up=st.sampled_from([1, 2, 8]),
    edges=st.sampled_from(["clip", "shift"]),
)
def test_spans_cover_the_axis_once(side, size, overlap, up, edges):
    for factor, unit in ((_tiles.Factor(up, 1), 1), (_tiles.Factor(1, up), up)):
        assume(size * (1 - overlap) >= 1)
        spans = _tiles.spans(side * unit, size * unit, overlap, factor, edges)
        assert sum(span.keep for span in spans) == factor(side * unit)
        assert all(span.stop - span.start <= size * unit for span in spans)
        assert all(span.start % unit == 0 for span in spans)
        if edges == "shift":
            assert len({span.stop - span.start for span in spans}) == 1
            assert spans[-1].stop == side * unit


@pytest.mark.parametrize("edges", ["clip", "shift"])
def test_traced_and_eager_agree(edges, models):
    vae, _ = models
    latents = normal((1, 3, 7, 8, 3))
    fn = cv.tiled(cv.framewise(vae.decode_step, 2), (4, 4), (0.25, 0.5), edges=edges)
    assert distance(eqx.filter_jit(fn)(latents), fn(latents)) < 1e-6


@pytest.mark.parametrize(("edges", "programs"), [("clip", 4), ("shift", 1)])
def test_tiles_of_a_shape_share_a_body(edges, programs):
    traces = []

    def counted(x):
        traces.append(x.shape)
        return nearest(x)

    x = normal((1, 2, 11, 11, 2))
    fn = cv.tiled(counted, (4, 4), (0.25, 0.25), edges=edges)
    for run in (fn, jax.jit(fn)):
        traces.clear()
        run(x)
        assert len(set(traces[1:])) == programs  # the first infers the factor
        assert len(traces[1:]) == programs


def test_smaller_than_a_tile_is_not_tiled(models):
    vae, _ = models
    latents = normal((1, 3, 4, 5, 3))
    fn = cv.tiled(vae.decode, (4, 5), (0.25, 0.2))
    np.testing.assert_array_equal(fn(latents), vae.decode(latents))


def test_posteriors_are_blended_leaf_by_leaf(models):
    vae, _ = models
    video = normal((1, 9, 8, 12, 3))
    geometry = (8, 8), (0.5, 0.5)
    whole = cv.tiled(vae.encode, *geometry, edges="shift")(video)
    moments = cv.tiled(cv.framewise(vae.encode_step, 8), *geometry, edges="shift")(video)
    np.testing.assert_array_equal(whole.mean, cv.DiagonalGaussian.from_moments(moments).mean)


@pytest.mark.parametrize("axis", [2, 3, -3])
def test_blend_is_a_linear_ramp(axis):
    before, after = jnp.zeros((1, 1, 6, 6, 1)), jnp.ones((1, 1, 6, 6, 1))
    got = jnp.moveaxis(cv.blend(before, after, 4, axis), axis, 0).reshape(6, -1)
    np.testing.assert_array_equal(got[:, 0], [0, 0.25, 0.5, 0.75, 1, 1])
    assert (got == got[:, :1]).all()


def test_blend_takes_the_end_of_what_came_before():
    before, after = jnp.arange(5.0), jnp.full(3, 10.0)
    np.testing.assert_allclose(cv.blend(before, after, 2, 0), [3, 7, 10])
    np.testing.assert_allclose(cv.blend(before, after, 9, 0), cv.blend(before, after, 3, 0))
    np.testing.assert_array_equal(cv.blend(before, after, 0, 0), after)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        cv.blend(before, after, -1, 0)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int16, jnp.bfloat16, jnp.float16])
def test_blend_rounds_to_the_nearest(dtype):
    before, after = (jnp.asarray(x, dtype) for x in ([255, 200, 9, 4], [255, 3, 100, 7]))
    ramp = np.arange(4) / 4
    due = np.asarray(before, np.float64) * (1 - ramp) + np.asarray(after, np.float64) * ramp
    np.testing.assert_array_equal(
        cv.blend(before, after, 4, 0),
        jnp.asarray(due).astype(dtype) if jnp.issubdtype(dtype, jnp.floating) else np.rint(due),
    )


@pytest.mark.parametrize("traced", [False, True])
def test_seams_of_pixels_do_not_darken(traced):
    """White stays white where the ramp's two weights add up to a little less than one."""
    step = cv.as_uint8(lambda x, cache: (x, cache))
    fn = cv.tiled(cv.framewise(step, 2), (50, 50), (0.5, 0.5))
    x = jnp.ones((1, 2, 60, 60, 3))
    assert (np.asarray(eqx.filter_jit(fn)(x) if traced else fn(x)) == 255).all()


@pytest.mark.parametrize("kind", [np.int64, np.uint8, jnp.int32])
def test_sizes_may_be_numbers_of_any_library(kind):
    fn = cv.tiled(nearest, (kind(4), kind(6)), (np.float32(0.25), np.float64(0.5)))
    assert fn.size == (4, 6) and {type(side) for side in fn.size} == {int}
    assert fn.overlap == (0.25, 0.5)
    x = normal((1, 1, 8, 9, 2))
    np.testing.assert_allclose(fn(x), nearest(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "overlap", "options", "message"),
    [
        ((np.int64(0), 4), (0, 0), {}, r"whole numbers of at least 1, got \(0, 4\)"),
        ((0, 4), (0, 0), {}, r"whole numbers of at least 1, got \(0, 4\)"),
        ((4, 4), (1.0, 0), {}, r"must lie in \[0, 1\), got \(1.0, 0\)"),
        ((4, 4), (-0.1, 0), {}, r"must lie in \[0, 1\)"),
        ((4, 4), (0, 0), {"edges": "wrap"}, '"clip" or "shift", got \'wrap\''),
    ],
)
def test_bad_geometry(size, overlap, options, message):
    with pytest.raises(ValueError, match=message):
        cv.tiled(nearest, size, overlap, **options)


@pytest.mark.parametrize(
    ("fn", "size", "overlap", "message"),
    [
        (pooled, 3, 0.0, "a tile of 3 is not a multiple of 4.*give 4 or 8"),
        (pooled, 10, 0.0, "a tile of 10 is not a multiple of 4.*give 8 or 12"),
        (pooled, 8, 0.6, "a tile of 8 that overlaps by 0.6 leaves no step.*at most 0.5"),
        (nearest, 4, 0.9, "a tile of 4 that overlaps by 0.9 leaves no step.*at most 0.75"),
    ],
)
def test_bad_tiles_for_the_function(fn, size, overlap, message):
    with pytest.raises(ValueError, match=message):
        cv.tiled(fn, (size, size), (overlap, overlap))(normal((1, 1, 20, 20, 1)))
