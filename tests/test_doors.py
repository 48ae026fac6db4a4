"""What JAX and Equinox offer works: forward mode, export, layers of one's own, halves."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax import export
from reference import SHALLOW, distance, from_torch, normal, pair, to_torch

import eqx_cogvae as cv
from eqx_cogvae import _layers, _resnet, training
from eqx_cogvae._lowering import choose
from eqx_cogvae._lowering.choose import Thresholds

LATENTS, VIDEO = (1, 3, 8, 8, 3), (1, 9, 16, 16, 3)
CHUNKED = Thresholds(chunk_elements=1, band_elements=1)
SIZES = pytest.mark.parametrize("limits", [Thresholds(), CHUNKED], ids=["small", "large"])


def directions(*both):
    """Each of two at one of the sizes, and at the other among the long tests."""
    limits = {"small": Thresholds(), "large": CHUNKED}
    return [
        pytest.param(
            each,
            limits[size],
            marks=() if size == due else pytest.mark.full,
            id=f"{each}-{size}",
        )
        for each, due in zip(both, limits, strict=True)
        for size in limits
    ]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return pair(SHALLOW, tmp_path_factory.mktemp("doors"))


@pytest.fixture(scope="module")
def vae(both):
    return both.vae


def close(got, due, within=1e-5):
    for each, expected in zip(*map(jax.tree.leaves, (got, due)), strict=True):
        assert distance(each, expected) < within


# Forward mode.


@pytest.mark.parametrize(("what", "limits"), directions("encode", "decode"))
def test_a_directional_derivative_is_torchs(what, limits, both):
    """Of whole clips, in two batches."""
    shape = LATENTS if what == "decode" else VIDEO
    shape = (1, shape[1] + (2 if what == "decode" else 8), *shape[2:])
    x, tangent = normal(shape).clip(-1, 1), normal(shape, 1)
    fn = both.vae.decode if what == "decode" else lambda x: both.vae.encode(x).mean

    def theirs(x):
        if what == "decode":
            return both.model.decode(x).sample
        return both.model.encode(x).latent_dist.mean

    with warnings.catch_warnings():
        # torch compiles its own rules for forward mode by a way that it deprecates.
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
        due = torch.func.jvp(theirs, (to_torch(x),), (to_torch(tangent),))[1]
    with choose.thresholds(limits):
        _, got = eqx.filter_jit(lambda x, t: jax.jvp(fn, (x,), (t,)))(x, tangent)
    assert distance(got, from_torch(due)) < 1e-4


@pytest.mark.parametrize(("step", "limits"), directions("decode_step", "encode_step"))
def test_forward_mode_of_steps_by_weights_and_cache(step, limits, vae):
    """Agrees with reverse mode: <c, J t> is <J^T c, t>."""
    x = normal(LATENTS if step == "decode_step" else VIDEO)
    _, cache = getattr(vae, step)(x)
    arrays, static = eqx.partition(vae, eqx.is_inexact_array)
    given = (arrays, x[:, :2], cache)
    tangents = jax.tree.map(lambda a: normal(a.shape, 3), given)

    def run(arrays, x, cache):
        return getattr(eqx.combine(arrays, static), step)(x, cache)

    @jax.jit
    def products(given, tangents):
        y, forward = jax.jvp(run, given, tangents)
        cotangents = jax.tree.map(jnp.sin, y)
        back = jax.vjp(run, *given)[1](cotangents)
        dot = lambda a, b: sum(map(jnp.vdot, *map(jax.tree.leaves, (a, b))))  # noqa: E731
        return dot(cotangents, forward), dot(back, tangents)

    with choose.thresholds(limits):
        forward, reverse = products(given, tangents)
    assert abs(forward - reverse) < 1e-4 * abs(reverse)


def test_jacobians_and_linear_maps(vae):
    small = normal((1, 1, 2, 2, 3))
    fn = lambda z: vae.decode_step(z)[0]  # noqa: E731
    forward, reverse = jax.jacfwd(fn)(small), jax.jacrev(fn)(small)
    close(forward, reverse)
    _, linear = jax.linearize(fn, small)
    directions = jnp.eye(small.size).reshape(-1, *small.shape)
    columns = jax.vmap(linear)(directions)
    close(jnp.moveaxis(columns, 0, -1).reshape(forward.shape), forward)


FIRST_LAYERS = {
    "first block": lambda decoder, z: decoder.mid_block.resnets[0](
        decoder.conv_in(z)[0], latents=z
    )[0],
    "decoder": lambda decoder, z: decoder(z)[0],
}


@pytest.mark.parametrize("layers", ["first block", pytest.param("decoder", marks=pytest.mark.full)])
def test_hessians(layers, vae):
    """Forward over reverse and reverse over reverse, of the decoder's first layers or of all."""
    small = normal((1, 1, 2, 2, 3))
    loss = lambda z: jnp.sum(jnp.sin(FIRST_LAYERS[layers](vae.decoder, z)))  # noqa: E731
    hessian = jax.jit(jax.hessian(loss))(small)
    close(hessian, jax.jit(jax.jacrev(jax.grad(loss)))(small), 1e-4)
    flat = hessian.reshape(small.size, small.size)
    close(flat, flat.T, 1e-4)


@pytest.mark.parametrize(
    "transform",
    [
        lambda vae: cv.sliced(
            cv.tiled(cv.framewise(vae.decode_step, 2), (4, 4), (0.5, 0.5), edges="shift")
        ),
        lambda vae: cv.framewise(
            eqx.filter_checkpoint(training.rematerialised(vae).decode_step), 2
        ),
    ],
    ids=["sliced and tiled", "checkpointed and rematerialised"],
)
def test_forward_mode_of_transforms(transform, vae):
    z, tangent = normal(LATENTS), normal(LATENTS, 1)
    fn = transform(vae)
    _, got = eqx.filter_jit(lambda z, t: jax.jvp(fn, (z,), (t,)))(z, tangent)
    step = 1e-2
    near = [fn(z + sign * step * tangent) for sign in (1, -1)]
    assert distance(got, (near[0] - near[1]) / (2 * step)) < 5e-3


# Export.


def exported(fn, *args):
    """The function after a round trip through a file's bytes; results are leaves in order."""
    leaves, structure = jax.tree.flatten((fn, args))
    held = [eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves]

    def run(*arrays):
        rest = iter(arrays)
        filled = (next(rest) if is_held else leaf for is_held, leaf in zip(held, leaves))  # noqa: B905
        fn, args = jax.tree.unflatten(structure, filled)
        return jax.tree.leaves(fn(*args))

    given = [leaf for is_held, leaf in zip(held, leaves, strict=True) if is_held]
    made = export.export(jax.jit(run), platforms=("cpu", "cuda", "tpu"))(*given)
    read = export.deserialize(made.serialize())
    assert read.platforms == ("cpu", "cuda", "tpu")
    weights = jax.tree.leaves(eqx.filter(fn, eqx.is_array))
    return lambda *args: jax.jit(read.call)(*weights, *jax.tree.leaves(args))


def test_steps_are_exported_for_three_platforms(vae):
    z, x = normal(LATENTS), normal(VIDEO)
    for step, given in ((vae.decode_step, z), (vae.encode_step, x)):
        due = step(given)
        close(exported(step, given)(given), due)
        cache = due[1]
        steady = given[:, 1:]
        later = exported(step, steady, cache)
        close(later(steady, cache), step(steady, cache))


@pytest.mark.parametrize(
    "symbols",
    [
        "b, 3, h, w",
        *(pytest.param(some, marks=pytest.mark.full) for some in ("b, 3, 8, 8", "1, 3, h, w")),
    ],
)
def test_symbolic_batch_and_size_of_latents(symbols, vae):
    shape = (*export.symbolic_shape(symbols), 3)
    fn = exported(vae.decode, jax.ShapeDtypeStruct(shape, jnp.float32))
    z = normal((2 if "b" in symbols else 1, 3, *((6, 4) if "h" in symbols else (8, 8)), 3))
    close(fn(z), vae.decode(z))


def test_symbolic_batch_and_size_of_video(vae):
    b, h, w = export.symbolic_shape("b, h, w")
    struct = jax.ShapeDtypeStruct((b, 9, 2 * h, 2 * w, 3), jnp.float32)
    fn = exported(lambda x: vae.encode(x).mean, struct)
    x = normal((2, 9, 12, 8, 3)).clip(-1, 1)
    close(fn(x), vae.encode(x).mean)


# Layers of one's own.


class LowRank(eqx.Module):
    """A causal convolution with a pointwise one of low rank beside it, and its signature."""

    conv: eqx.Module
    down: jax.Array
    up: jax.Array

    def __init__(self, conv, key, rank=2):
        i, o = conv.conv.weight.shape[3:]
        self.conv = conv
        self.down = jax.random.normal(key, (i, rank)) / i
        self.up = jax.random.normal(key, (rank, o))

    def __call__(self, x, cache=None):
        y, cache = self.conv(x, cache)
        return y + x @ self.down @ self.up, cache


class Scaled(eqx.Module):
    """A norm of one's own: no `affine`, no weights of a known name."""

    factor: jax.Array

    def __call__(self, x, latents=None):
        moment = jnp.sqrt(jnp.mean(jnp.square(x), axis=(1, 2, 3), keepdims=True) + 1e-6)
        return x / moment * self.factor.astype(x.dtype)


class Halved(eqx.Module):
    """A resnet block of one's own."""

    block: eqx.Module

    def __call__(self, x, cache=None, *, latents=None):
        y, cache = self.block(x, cache, latents=latents)
        return y / 2, cache


def is_conv(node):
    return type(node).__name__ == "CausalConv3d" and node.conv.weight.shape[0] > 1


def with_low_rank(vae):
    wrap = lambda node: LowRank(node, jax.random.key(9)) if is_conv(node) else node  # noqa: E731
    return jax.tree.map(wrap, vae, is_leaf=is_conv)


def merged(vae):
    """The same function, as weights of plain convolutions."""
    is_ours = lambda node: isinstance(node, LowRank)  # noqa: E731

    def plain(node):
        if not is_ours(node):
            return node
        kernel = node.conv.conv.weight
        taps, rows, columns = kernel.shape[:3]
        kernel = kernel.at[taps - 1, rows // 2, columns // 2].add(node.down @ node.up)
        return eqx.tree_at(lambda conv: conv.conv.weight, node.conv, kernel)

    return jax.tree.map(plain, vae, is_leaf=is_ours)


def with_own_norms(vae):
    replaced = vae.encoder.down_blocks[0].resnets[0].norm1, vae.decoder.norm_out
    own = [Scaled(jnp.asarray(2.0)) for _ in replaced]
    where = lambda v: (v.encoder.down_blocks[0].resnets[0].norm1, v.decoder.norm_out)  # noqa: E731
    return eqx.tree_at(where, vae, own)


def with_own_block(vae):
    where = lambda v: (v.encoder.mid_block.resnets[0], v.decoder.up_blocks[0].resnets[0])  # noqa: E731
    return eqx.tree_at(where, vae, replace_fn=Halved)


def results(vae):
    z, x = normal(LATENTS), normal(VIDEO).clip(-1, 1)
    first, cache = vae.decode_step(z)
    return first, vae.decode_step(z[:, :2], cache)[0], vae.encode(x).mean


@SIZES
def test_low_rank_beside_every_convolution(limits, vae):
    own = with_low_rank(vae)
    due = results(merged(own))
    with choose.thresholds(limits):
        close(results(own), due)
    assert distance(due[0], vae.decode_step(normal(LATENTS))[0]) > 1e-2


class Sloped(eqx.Module):
    """An activation with a weight."""

    slope: jax.Array

    def __call__(self, x):
        return jnp.maximum(x, self.slope.astype(x.dtype) * x)


class OwnActivation(_resnet.ResnetBlock):
    """The model's block with an activation of one's own."""

    act: Sloped

    def __init__(self, block, act):
        vars(self).update({**vars(block), "act": act})

    @property
    def activation(self):
        return self.act


def with_own_activation(vae):
    where = lambda v: v.decoder.up_blocks[0].resnets[0]  # noqa: E731
    return eqx.tree_at(where, vae, replace_fn=lambda b: OwnActivation(b, Sloped(jnp.array(0.2))))


def with_own_inner_norm(vae):
    """Within the norm whose scale and shift come from the latents."""
    where = lambda v: v.decoder.norm_out.norm_layer  # noqa: E731
    return eqx.tree_at(where, vae, Scaled(jnp.asarray(2.0)))


def test_an_activations_own_weights_have_gradients(vae):
    """In chunks too, whose derivative is a rule of its own."""
    block = with_own_activation(vae).decoder.up_blocks[0].resnets[0]
    x, z = normal((*LATENTS[:-1], 8)), normal(LATENTS)

    def by_slope(slope):
        own = eqx.tree_at(lambda block: block.act.slope, block, slope)
        return jnp.sum(jnp.square(own(x, latents=z)[0]))

    due = jax.grad(by_slope)(jnp.array(0.2))
    assert abs(due) > 1
    with choose.thresholds(CHUNKED):
        close(jax.grad(by_slope)(jnp.array(0.2)), due)


WRONG = {
    "channels": (lambda conv: conv(jnp.ones((1, 2, 4, 4, 5))), "5 channels do not fit a kernel"),
    "cache": (
        lambda conv: conv(jnp.ones((1, 2, 4, 4, 3)), jnp.ones((1, 1, 4, 4, 3))),
        "needs a cache of 2 frames, got 1",
    ),
    "dtype": (
        lambda conv: conv(jnp.ones((1, 2, 4, 4, 3), jnp.bfloat16)),
        "of one dtype, got bfloat16, float32, float32",
    ),
    "pointwise": (lambda conv: conv.conv(jnp.ones((1, 2, 4, 4, 3))), "is not pointwise"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_layer_says_what_does_not_fit(name, unchecked):
    call, message = WRONG[name]
    conv = _layers.CausalConv3d(3, 8, key=jax.random.key(0))
    with pytest.raises((TypeError, ValueError), match=message):
        eqx.filter_eval_shape(lambda: call(conv))


@pytest.mark.parametrize(
    "replacements",
    [(with_own_norms, with_own_activation), (with_own_inner_norm, with_own_block)],
    ids=["norms and activation", "inner norm and block"],
)
def test_norms_and_blocks_of_ones_own(replacements, vae):
    """In chunks as at once, which is what other layers were changed by, each of them."""
    own, z = vae, normal(LATENTS)
    for replace in replacements:
        before, own = own, replace(own)
        assert distance(own.decode_step(z)[0], before.decode_step(z)[0]) > 1e-2
    due = results(own)
    with choose.thresholds(CHUNKED):
        close(results(own), due)


def test_training_and_plans_take_replaced_layers(vae):
    own = with_own_block(with_own_norms(with_low_rank(vae)))
    z = normal(LATENTS)
    wrapped = training.rematerialised(own)
    close(wrapped.decode_step(z)[0], own.decode_step(z)[0])
    kept = [
        len(
            jax.tree.leaves(
                jax.eval_shape(lambda z, v=v: jax.vjp(lambda z: v.decoder(z)[0], z)[1], z)  # pyright: ignore
            )
        )
        for v in (own, wrapped)
    ]
    assert kept[1] < kept[0], "nothing is computed again"
    assert cv.plan(own, (1, 1, 8, 8, 3)).best("decode").flop > 0


def test_a_trainer_takes_replaced_layers(vae):
    own = with_low_rank(vae)
    loss = lambda vae, clips, key: (jnp.mean(jnp.square(vae.encode(clips).mean)), {})  # noqa: E731
    trainer = training.Trainer(optax.sgd(1e-2), loss, rematerialise=True)
    state = trainer.init(own)
    clips = normal((1, 1, 8, 8, 3)).clip(-1, 1)
    before = own.encoder.conv_in.down
    state, metrics = trainer.step(state, clips, jax.random.key(0))
    assert np.isfinite(metrics["loss"])
    assert distance(state.model.encoder.conv_in.down, before) > 0


# Halves.


def test_halves_of_two_dtypes(vae):
    half = lambda x: x.astype(jnp.bfloat16) if eqx.is_array(x) else x  # noqa: E731
    mixed = eqx.tree_at(lambda v: v.encoder, vae, jax.tree.map(half, vae.encoder))
    x, z = normal(VIDEO).clip(-1, 1), normal(LATENTS)
    assert mixed.encode(x).mean.dtype == jnp.bfloat16
    assert mixed.decode(z).dtype == mixed.dtype == jnp.float32
    np.testing.assert_array_equal(mixed.decode(z), vae.decode(z))
    assert distance(mixed.encode(x).mean.astype(jnp.float32), vae.encode(x).mean) < 3e-2


def test_one_half_alone(vae):
    x, z = normal(VIDEO).clip(-1, 1), normal(LATENTS)
    encoder = eqx.tree_at(lambda v: v.decoder, vae, None)
    np.testing.assert_array_equal(encoder.encode(x).mean, vae.encode(x).mean)
    assert encoder.dtype == jnp.float32
    with pytest.raises(ValueError, match="the model has no decoder"):
        encoder.decode(z)
    decoder = eqx.tree_at(lambda v: v.encoder, vae, None)
    np.testing.assert_array_equal(decoder.decode(z), vae.decode(z))
    with pytest.raises(ValueError, match="the model has no encoder"):
        decoder.encode(x)


@pytest.mark.parametrize(
    "call",
    [
        lambda vae, z: jax.jit(vae.decode)(z),
        lambda vae, z: jax.jit(vae.decode_step)(z),
        lambda vae, z: jax.jit(vae)(z),
        lambda vae, z: jax.checkpoint(vae.decode_step)(z),
        lambda vae, z: jax.jit(cv.framewise(vae.decode_step, 2))(z),
    ],
)
def test_what_takes_no_arrays_in_a_function_names_what_does(call, vae):
    with pytest.raises(TypeError, match=r"use `eqx\.filter_jit`, or `eqx\.filter_checkpoint`"):
        call(vae, normal(LATENTS))


def test_what_does_take_them(vae):
    z = normal(LATENTS)
    close(eqx.filter_jit(vae.decode)(z), vae.decode(z))
    close(eqx.filter_checkpoint(vae.decode_step)(z)[0], vae.decode_step(z)[0])


def test_warnings_point_at_the_callers_line(vae):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vae.encode(normal((1, 6, 16, 16, 3)).clip(-1, 1))
    assert caught
    assert {each.filename for each in caught} == {__file__}
