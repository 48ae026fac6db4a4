"""Any size, tile, overlap, frame batch and order of transforms: the right shape, or one error."""

import equinox as eqx
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from programs import forget_if_many
from reference import normal

import eqx_cogvae as cv

CONFIG = cv.Config(
    block_out_channels=(2, 2), norm_num_groups=2, latent_channels=2, layers_per_block=1
)
CELL = CONFIG.spatial_compression
DTYPES = ("float16", "bfloat16", "float32")

sides = st.integers(1, 9)
few_sides = st.sampled_from([1, 2, 5, 9])  # of which tiles share programs
overlaps = st.sampled_from([0, 1 / 6, 0.2, 0.25, 0.5, 0.75, 0.9, 0.99])
orders = st.permutations(["sliced", "tiled"])
tiles = st.none() | st.tuples(st.tuples(sides, sides), st.tuples(overlaps, overlaps))
edges = st.sampled_from(["clip", "shift"])


def composed(step, batch, tile, edge, sliced, order):
    """The transforms in that order, innermost first."""
    fn = cv.framewise(step, batch)
    for name in order:
        if name == "sliced" and sliced:
            fn = cv.sliced(fn)
        if name == "tiled" and tile is not None:
            fn = cv.tiled(fn, *tile, edges=edge)
    return fn


def frames_of(frames, size, step):
    """Output frames by the step alone, a batch at a time."""
    count = max(frames // size, 1)
    return sum(map(step, [frames - size * (count - 1)] + [size] * (count - 1)))


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 20), sides, sides),
    batch=st.integers(1, 9),
    tile=tiles,
    edge=edges,
    sliced=st.booleans(),
    order=orders,
    dtype=st.sampled_from(DTYPES),
    decoding=st.booleans(),
)
@hypothesis.settings(max_examples=30)
def test_shapes(shape, batch, tile, edge, sliced, order, dtype, decoding):
    """By shapes alone, without a computation."""
    vae = eqx.filter_eval_shape(lambda: cv.VAE(CONFIG, key=jax.random.key(0), dtype=dtype))
    b, t, h, w = shape
    x = jax.ShapeDtypeStruct((b, t, h, w, 2 if decoding else 3), jnp.float32)
    step = cv.VAE.decode_step if decoding else cv.VAE.encode_step
    call = lambda vae, x: composed(  # noqa: E731
        lambda x, cache: step(vae, x, cache), batch, tile, edge, sliced, order
    )(x)
    frames = frames_of(
        t, batch, (lambda n: 2 * n - n % 2) if decoding else lambda n: n // 2 + n % 2
    )
    try:
        out = eqx.filter_eval_shape(call, vae, x)
    except ValueError as error:
        assert_deserved(str(error), shape, tile, decoding)
        return
    size = (CELL * h, CELL * w, 3) if decoding else (h // CELL, w // CELL, 4)
    assert out.shape == (b, frames, *size)
    assert out.dtype == dtype


def assert_deserved(message, shape, tile, decoding):
    """One line, about a clip or tile that is too small, or a tile that does not divide."""
    least = 1 if decoding else CELL
    small = min(shape[2:]) < least or (tile and min(tile[0]) < least)
    uneven = tile and any(side % least for side in tile[0])
    still = tile and "leaves no step to the next" in message
    assert small or uneven or still, message
    assert "\n" not in message


def running_sum(x, cache):
    start = 0 if cache is None else cache
    y = start + jnp.cumsum(x, axis=1)
    return y, y[:, -1:]


@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 7), few_sides, few_sides),
    batch=st.integers(1, 4),
    tile=st.none() | st.tuples(st.tuples(few_sides, few_sides), st.tuples(overlaps, overlaps)),
    edge=edges,
    sliced=st.booleans(),
    order=orders,
    traced=st.booleans(),
)
@hypothesis.settings(max_examples=15)
def test_values_of_a_local_function(shape, batch, tile, edge, sliced, order, traced):
    """A function that sees one cell only is the same in tiles, slices and batches."""
    assert_local(shape, batch, tile, edge, sliced, order, traced)


@pytest.mark.full
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 7), sides, sides),
    batch=st.integers(1, 4),
    tile=tiles,
    edge=edges,
    sliced=st.booleans(),
    order=orders,
    traced=st.booleans(),
)
@hypothesis.settings(max_examples=100)
def test_values_of_a_local_function_at_length(shape, batch, tile, edge, sliced, order, traced):
    assert_local(shape, batch, tile, edge, sliced, order, traced)
    forget_if_many()


def assert_local(shape, batch, tile, edge, sliced, order, traced):
    x = normal((*shape, 1))
    fn = composed(running_sum, batch, tile, edge, sliced, order)
    try:
        got = (eqx.filter_jit(fn) if traced else fn)(x)
    except ValueError as error:
        assert_deserved(str(error), (*shape[:2], CELL, CELL), tile, decoding=True)
        return
    np.testing.assert_allclose(got, np.cumsum(x, axis=1), rtol=1e-5, atol=1e-5)


@given(frames=st.integers(1, 20), size=st.integers(1, 9), pieces=st.lists(st.integers(1, 20)))
@hypothesis.settings(max_examples=30)
def test_streams_are_the_whole_clip_however_they_are_cut(frames, size, pieces):
    """Or a stream of unknown length says that its end does not fill a batch."""
    x = np.arange(frames, dtype=np.float32).reshape(1, frames, 1, 1, 1)
    cuts = np.clip(np.cumsum(pieces), 0, frames).astype(int)
    feed = [piece for piece in np.split(x, cuts, axis=1) if piece.shape[1]]
    due = np.cumsum(x, axis=1)
    got = [np.asarray(piece) for piece in cv.streamed(running_sum, size)(feed)]
    np.testing.assert_allclose(np.concatenate(got, axis=1), due, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "sliced"), [("float32", False), ("bfloat16", True)])
def test_the_vae_in_one_tile_is_the_vae(sliced, dtype):
    """Values of the network itself, where a tile holds the whole picture."""
    vae = cv.VAE(CONFIG, key=jax.random.key(0), dtype=jnp.dtype(dtype))
    latents = normal((2, 3, 3, 4, 2), dtype=dtype)
    tile = ((3, 4), (0.5, 0.5))
    got = composed(vae.decode_step, 2, tile, "clip", sliced, ("sliced", "tiled"))(latents)
    due = vae.decode(latents)
    assert got.dtype == dtype
    bound = {"bfloat16": 2e-2, "float32": 1e-6}[dtype]
    got, due = np.asarray(got, np.float64), np.asarray(due, np.float64)
    assert np.linalg.norm(got - due) <= bound * np.linalg.norm(due)
