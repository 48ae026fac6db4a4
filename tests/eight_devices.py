"""sharded and best_mesh where JAX has eight devices; `test_sharding.py` runs this file."""

import contextlib
import re

import equinox as eqx
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from reference import distance, normal, thinned

import eqx_cogvae as cv
from eqx_cogvae import _layers, _meshes, _resnet, training
from eqx_cogvae._lowering import choose
from eqx_cogvae._lowering.choose import Thresholds
from eqx_cogvae.training import _trainer

CONFIG = cv.Config(
    block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=3
)
CELL = CONFIG.spatial_compression
# How many devices cut batch, height and width.
MESHES = {
    "2x1": (1, 2, 1),
    "2x2": (1, 2, 2),
    "1x4": (1, 1, 4),
    "8": (1, 8, 1),
    "2 of 2x2": (2, 2, 2),
}
# Batch, height and width of latents that all of them divide, down to two rows a device.
LATENTS = (2, 16, 12)
AXES = {"batch": "batch", "height": "height", "width": "width"}


def mesh_of(sizes):
    count = int(np.prod(sizes))
    return Mesh(np.array(jax.devices()[:count]).reshape(sizes), tuple(AXES))


@pytest.fixture(scope="module")
def vae():
    """Every kind of layer is in it; as nearly all of the time is compiling, few of each are."""
    return thinned(cv.VAE(CONFIG, key=jax.random.key(0)))


@pytest.fixture(scope="module")
def one_level():
    """A model for trainers, to which one layer is as good as another."""
    config = cv.Config(
        block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, latent_channels=3
    )
    return thinned(cv.VAE(config, key=jax.random.key(0)))


def clip(what, latents, frames, seed=0):
    """Latents to decode, or video to encode, of so many frames."""
    batch, height, width = latents
    if what == "decode":
        return normal((batch, frames, height, width, CONFIG.latent_channels), seed)
    return normal((batch, frames, height * CELL, width * CELL, CONFIG.in_channels), seed)


def gathered(program):
    """The sizes of what a compiled program gathers or moves from all devices to all."""
    pattern = r"= \(?\w+\[([\d,]*)\][^=]*? (?:all-gather|all-to-all)(?:-start)?\("
    return re.findall(pattern, program.compiled.as_text())


def check(program, args, due):
    assert gathered(program) == []
    got = program(*args)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(due), strict=True):
        assert distance(ours, theirs) < 1e-5
    return got


# Rows alone one way, and batch, height and width at once the other.
STEPS = [("decode", "8"), ("encode", "2 of 2x2")]
FRAMES = {"decode": (3, 2), "encode": (9, 8)}


@pytest.mark.parametrize(
    ("what", "name"),
    [
        pytest.param(what, name, marks=() if (what, name) in STEPS else pytest.mark.full)
        for what in FRAMES
        for name in MESHES
    ],
)
def test_steps_are_exact_and_gather_nothing(what, name, vae):
    """First batch and steady one, results and caches."""
    step = getattr(vae, f"{what}_step")
    cut = cv.sharded(step, mesh_of(MESHES[name]), **AXES)
    first, steady = (clip(what, LATENTS, count, count) for count in FRAMES[what])
    spec = PartitionSpec("batch", None, "height", "width", None)

    on_mesh = cut._placed(first)
    program = eqx.filter_jit(cut).lower(on_mesh).compile()
    due, past = step(first)
    result, cache = check(program, (on_mesh,), (due, past))
    assert result.sharding.is_equivalent_to(NamedSharding(cut.mesh, spec), result.ndim)

    on_mesh = cut._placed((steady, cache))
    program = eqx.filter_jit(cut).lower(*on_mesh).compile()
    check(program, on_mesh, step(steady, past))


# Sizes at which every convolution has fewer multiplications, and every array is chunked.
WINOGRAD = Thresholds(winograd_min_channels=1, winograd_min_pixels=0, winograd_min_work=0)
CHUNKED = Thresholds(chunk_elements=1, band_elements=1, huge_frame_pixels=1)


def test_wide_convolutions_gather_nothing():
    """Which on one device line up the pixels of rows and columns."""
    with choose.thresholds(WINOGRAD):
        check_wide_convolutions()


def check_wide_convolutions():
    conv = _layers.CausalConv3d(8, 8, key=jax.random.key(0))
    x, mesh = normal((2, 3, 16, 12, 8)), mesh_of(MESHES["2x2"])
    cut = cv.sharded(lambda x: conv(x)[0], mesh, **AXES)
    on_mesh = cut._placed(x)
    plain = eqx.filter_jit(lambda x: conv(x)[0]).lower(on_mesh).compile()
    assert gathered(plain) != [], "nothing to avoid"
    check(eqx.filter_jit(cut).lower(on_mesh).compile(), (on_mesh,), conv(x)[0])

    def gradient(fn):
        return eqx.filter_jit(jax.grad(lambda x: jnp.sum(jnp.square(fn(x)))))

    # The backward pass is traced when `sharded` has returned; within `jit` the forward pass too.
    due = gradient(lambda x: conv(x)[0])(x)
    for fn in (cut, eqx.filter_jit(cut)):
        check(gradient(fn).lower(on_mesh).compile(), (on_mesh,), due)


@pytest.mark.parametrize("limits", [Thresholds(), WINOGRAD, CHUNKED], ids=["", "wide", "large"])
def test_within_shard_map(limits, vae):
    """Where arrays differ from device to device by their type."""
    decoder = vae.decoder
    mesh, spec = Mesh(np.array(jax.devices()[:2]), ("batch",)), PartitionSpec("batch")
    z = clip("decode", (2, 8, 6), 3)
    plain = lambda decoder, z: jnp.sum(jnp.square(decoder(z)[0]), axis=(1, 2, 3, 4))  # noqa: E731
    options = {"mesh": mesh, "in_specs": (PartitionSpec(), spec), "out_specs": spec}
    arrays, static = eqx.partition(decoder, eqx.is_array)
    run = jax.shard_map(lambda arrays, z: plain(eqx.combine(arrays, static), z), **options)

    def gradients(fn):
        loss = lambda arrays, z: jnp.sum(fn(arrays, z))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(arrays, z)

    due = gradients(lambda arrays, z: plain(eqx.combine(arrays, static), z))
    with choose.thresholds(limits):
        got = gradients(run)
    # Weights are on all devices; the gradients of each device are added up.
    for each, expected in zip(*map(jax.tree.leaves, (got, due)), strict=True):
        assert distance(each, expected) < 1e-5


def test_a_gather_would_be_seen():
    mesh = mesh_of((1, 2, 1))
    rows = jax.device_put(jnp.ones(4), NamedSharding(mesh, PartitionSpec("height")))
    whole = NamedSharding(mesh, PartitionSpec())
    program = eqx.filter_jit(lambda x: jax.lax.with_sharding_constraint(x + 1, whole)).lower(rows)
    assert gathered(program.compile()) == ["4"]


@pytest.mark.parametrize("name", [pytest.param("2x2", marks=pytest.mark.full), "8"])
def test_what_a_device_holds_falls_with_their_number(name, vae):
    mesh, latents = mesh_of(MESHES[name]), clip("decode", (1, 32, 32), 3)

    def temporaries(step):
        compiled = eqx.filter_jit(step).lower(latents).compile().compiled
        return compiled.memory_analysis().temp_size_in_bytes

    share = temporaries(cv.sharded(vae.decode_step, mesh, **AXES)) / temporaries(vae.decode_step)
    # Each part has the rows and columns of its neighbours besides its own.
    # Measured on one device and on eight: 5.5 and 1.04 MB.
    assert share < 1.6 / mesh.size


def test_whole_clips(vae):
    mesh, latents = mesh_of((1, 2, 2)), clip("decode", (1, 4, 6), 7)
    due = vae.decode(latents)
    fn = cv.sharded(cv.framewise(vae.decode_step, 2), mesh, **AXES)
    for each in (fn, eqx.filter_jit(fn), cv.sharded(vae.decode, mesh, **AXES)):
        got = each(latents)
        assert distance(got, due) < 1e-5
        assert len({str(shard.index) for shard in got.addressable_shards}) == mesh.size
    video = clip("encode", (1, 4, 6), 9)
    posterior = cv.sharded(vae.encode, mesh, **AXES)(video)
    assert distance(posterior.mean, vae.encode(video).mean) < 1e-5


def test_other_transforms_around_it(vae):
    mesh, latents = mesh_of((1, 2, 2)), clip("decode", (2, 4, 8), 3)
    whole = cv.framewise(vae.decode_step, 2)
    cut = cv.sharded(whole, mesh, height="height", width="width")
    step = cv.sharded(vae.decode_step, mesh, height="height", width="width")
    pairs = [
        (cv.sliced(cv.tiled(cut, (4, 4), (0, 0))), cv.tiled(whole, (4, 4), (0, 0))),
        (cv.framewise(step, 2), whole),
    ]
    for ours, plain in pairs:
        assert distance(ours(latents), plain(latents)) < 1e-5


def test_gradients(vae):
    mesh, latents = mesh_of((1, 2, 2)), clip("decode", (1, 4, 6), 3)

    @eqx.filter_jit
    def gradients(fn, latents):
        return jax.grad(lambda z: jnp.sum(fn(z) ** 2))(latents)

    whole = cv.framewise(vae.decode_step, 2)
    cut = cv.sharded(whole, mesh, **AXES)
    assert distance(gradients(cut, latents), gradients(whole, latents)) < 1e-5


def test_gradients_of_a_norm_gather_nothing():
    norm, mesh = _layers.SpatialNorm(8, 3, 4, key=jax.random.key(0)), mesh_of((2, 2, 2))
    x, z = normal((2, 3, 16, 24, 8)), normal((2, 2, 4, 6, 3), 1)
    cut = cv.sharded(lambda x, z: norm(x, z), mesh, **AXES)

    def gradients(fn):
        return eqx.filter_jit(jax.grad(lambda args: jnp.sum(jnp.square(fn(*args) + args[0]))))

    due = gradients(norm)((x, z))
    on_mesh = cut._placed((x, z))
    check(gradients(cut).lower(on_mesh).compile(), (on_mesh,), due)


def test_moments_of_all_devices_are_exchanged_at_once():
    norm, mesh = _layers.GroupNorm(8, 4, 1e-6), mesh_of((2, 2, 2))
    x = normal((2, 3, 16, 24, 8))
    cut = cv.sharded(lambda x: norm(x), mesh, **AXES)
    program = eqx.filter_jit(cut).lower(cut._placed(x)).compile()
    check(program, (cut._placed(x),), norm(x))
    exchanges = re.findall(r" (all-[a-z]+|collective-[a-z]+)\(", program.compiled.as_text())
    assert exchanges == ["all-reduce"]


@pytest.mark.parametrize("kind", ["causal", "down", "up"])
def test_convolutions_exchange_their_edges_once(kind):
    """Two parts are in a row, and two in a column: both of a pair send at once."""
    key, mesh = jax.random.key(0), mesh_of((2, 2, 2))
    layer = {
        "causal": lambda: _layers.CausalConv3d(8, 8, key=key),
        "down": lambda: _layers.Downsample(8, True, key=key),
        "up": lambda: _layers.Upsample(8, True, key=key),
    }[kind]()
    x = normal((2, 3, 16, 12, 8))
    cut = cv.sharded(lambda x: layer(x), mesh, **AXES)
    program = eqx.filter_jit(cut).lower(cut._placed(x)).compile()
    check(program, (cut._placed(x),), layer(x))
    exchanges = re.findall(r" (all-[a-z]+|collective-[a-z]+)\(", program.compiled.as_text())
    assert exchanges == ["collective-permute"] * 2


def test_a_mapped_function_gathers_nothing():
    """The clips of a `vmap` join those of the batch, which devices share."""
    layer, mesh = _layers.CausalConv3d(8, 8, key=jax.random.key(0)), mesh_of((2, 2, 2))
    x = normal((3, 2, 3, 16, 12, 8))
    spec = NamedSharding(mesh, PartitionSpec(None, "batch", None, "height", "width"))
    cut = cv.sharded(lambda x: layer(x)[0], mesh, **AXES)
    args = (jax.device_put(x, spec),)
    check(eqx.filter_jit(jax.vmap(cut)).lower(*args).compile(), args, jax.vmap(layer)(x)[0])


@pytest.mark.parametrize(
    ("frames", "sizes", "edges"),
    [
        pytest.param(3, (2, 2, 2), 2, id="bands"),
        pytest.param(5, (2, 2, 2), 4, id="first apart"),
        pytest.param(5, (2, 4, 1), 2, id="frames"),
    ],
)
def test_chunks_exchange_their_edges_before_the_loop(frames, sizes, edges):
    """So many for each convolution, and one for each norm."""
    options = {"groups": 4, "eps": 1e-6, "act_fn": "silu", "latents": 3, "pad_mode": "first"}
    block = _resnet.ResnetBlock(8, 8, **options, key=jax.random.key(0))
    x, z, mesh = normal((4, frames, 16, 24, 8)), normal((4, 3, 8, 6, 3), 1), mesh_of(sizes)
    cut = cv.sharded(lambda x, z, cache: block(x, cache, latents=z), mesh, **AXES)
    _, cache = block(x, latents=z)
    on_mesh = cut._placed((x, z, cache))
    with choose.thresholds(CHUNKED):
        program = eqx.filter_jit(cut).lower(*on_mesh).compile()
    check(program, on_mesh, block(x, cache, latents=z))
    *loops, outside = program.compiled.as_text().split("ENTRY ")
    pattern = r" (all-[a-z]+|collective-[a-z]+)\("
    assert re.findall(pattern, "".join(loops)) == []
    found = re.findall(pattern, outside)
    assert sorted(found) == ["all-reduce"] * 2 + ["collective-permute"] * 2 * edges


@pytest.mark.parametrize(
    ("platform", "sizes", "large"),
    [
        ("tpu", (2, 2, 2), False),
        ("gpu", (2, 2, 2), True),
        ("tpu", (2, 1, 2), True),
        pytest.param("tpu", (2, 2, 2), True, marks=pytest.mark.full),
    ],
)
def test_other_platforms_lowering(platform, sizes, large, vae):
    """What GPU and TPU run: taps as channels, which XLA pads by itself, or chunks of parts."""
    mesh, latents = mesh_of(sizes), clip("decode", (2, 4, 6), 3)
    cut = cv.sharded(vae.decoder, mesh, **AXES)
    with choose.thresholds(CHUNKED if large else Thresholds()), choose.as_if_on(platform):
        program = eqx.filter_jit(cut).lower(cut._placed(latents)).compile()
    check(program, (cut._placed(latents),), vae.decode_step(latents))


def test_weights_are_copied_once(vae):
    cut = cv.sharded(vae.decode_step, mesh_of((1, 2, 1)), height="height")
    again = cv.sharded(cut.fn, mesh_of((1, 2, 1)), height="height")
    arrays = [jax.tree.leaves(eqx.filter(fn, eqx.is_array)) for fn in (cut, again)]
    for first, second in zip(*arrays, strict=True):
        copies = [[part.data for part in leaf.addressable_shards] for leaf in (first, second)]
        pointers = [[copy.unsafe_buffer_pointer() for copy in each] for each in copies]
        assert len(set(pointers[0])) == 2 and pointers[0] == pointers[1]


def test_explicit_axes(vae):
    latents = clip("decode", (1, 4, 6), 3)
    mesh = jax.make_mesh((8, 1), ("a", "b"), (AxisType.Explicit,) * 2)
    mesh = Mesh(mesh.devices.reshape(4, 2), ("a", "b"), (AxisType.Explicit,) * 2)
    cut = cv.sharded(vae.decode, mesh, height="b")
    assert distance(cut(latents), vae.decode(latents)) < 1e-5


ERRORS = {
    "no axis": ({}, "decode", (1, 4, 6), r"name one axis of the mesh or more.*'batch', 'height'"),
    "unknown": ({"height": "h"}, "decode", (1, 4, 6), r"`height` names no axis of the mesh.*'h'"),
    "twice": ({"height": "width", "width": "width"}, "decode", (1, 4, 6), "each once, got None"),
    "batch": (AXES, "decode", (3, 4, 6), "batch of 3 .* 2 devices .*: give a batch of 2 or 4"),
    "height": (AXES, "decode", (2, 5, 6), "height of 5 .*at least 2: give a height of 4 or 6"),
    # Here XLA would be wrong.
    "one row": (AXES, "decode", (2, 2, 6), "height of 2 .*at least 2: give a height of 4 or 6"),
    "result": (
        {"width": "width"},
        "encode",
        (1, 4, 7),
        "the result's width of 7 .*: give a width of 12 or 16",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("whole", [False, True])
def test_what_does_not_divide(name, whole, vae):
    axes, what, latents, message = ERRORS[name]
    step = getattr(vae, f"{what}_step")
    with pytest.raises(ValueError, match=message):
        cv.sharded(cv.framewise(step, 2) if whole else step, mesh_of((2, 2, 2)), **axes)(
            clip(what, latents, 3)
        )


parts = st.sampled_from([(1, 1, 2), (1, 2, 1), (1, 2, 2), (2, 1, 2), (2, 2, 2), (1, 1, 8)])


@given(
    sizes=parts,
    latents=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    frames=st.integers(1, 5),
    names=st.permutations([*AXES, None]),
    at_once=st.integers(1, 3),
    traced=st.booleans(),
)
@hypothesis.settings(max_examples=12, deadline=None)
def test_any_shape_on_any_mesh(sizes, latents, frames, names, at_once, traced):
    """The same as on one device, or one line that names sizes that would do."""
    x = normal((latents[0], frames, *latents[1:], 1))
    axes = {name: axis for name, axis in zip(AXES, names, strict=False) if axis}
    fn = cv.sharded(cv.framewise(sum_of_crosses, at_once), mesh_of(sizes), **axes)
    try:
        got = (eqx.filter_jit(fn) if traced else fn)(x)
    except ValueError as error:
        assert_deserved(str(error), sizes, latents, axes)
        return
    assert got.shape == x.shape
    due, _ = sum_of_crosses(x, None)
    np.testing.assert_allclose(got, due, rtol=1e-5, atol=1e-5)


def assert_deserved(message, sizes, latents, axes):
    """One line, about a side that the devices it is cut over do not divide."""
    among = dict(zip(AXES, sizes, strict=True))
    sides = dict(zip(AXES, latents, strict=True))
    cuts = [(sides[name], among[axis]) for name, axis in axes.items()]
    assert any(n > 1 and (side % n or side < 2 * n) for side, n in cuts), message
    assert "give a " in message and "\n" not in message


def sum_of_crosses(x, cache):
    """Each pixel with its neighbours, and all frames before."""
    rows = jnp.pad(x, [(0, 0), (0, 0), (1, 1), (0, 0), (0, 0)])
    columns = jnp.pad(x, [(0, 0), (0, 0), (0, 0), (1, 1), (0, 0)])
    cross = x + rows[:, :, :-2] - rows[:, :, 2:] + columns[:, :, :, :-2] - columns[:, :, :, 2:]
    y = (0 if cache is None else cache) + jnp.cumsum(cross, axis=1)
    return y, y[:, -1:]


BEST = {
    (1, 13, 60, 90, 16): (1, 4, 2),
    (2, 13, 60, 90, 16): (2, 2, 2),
    (8, 3, 4, 4, 16): (8, 1, 1),
    (3, 3, 64, 64, 4): (1, 4, 2),
    (1, 3, 16, 64, 4): (1, 2, 4),
    (4, 3, 5, 4, 4): (4, 1, 2),
}


@pytest.mark.parametrize("shape", BEST)
def test_best_mesh(shape):
    mesh = cv.best_mesh(shape)
    assert mesh.axis_names == tuple(AXES)
    assert tuple(mesh.shape.values()) == BEST[shape]
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_no_mesh():
    with pytest.raises(ValueError, match=r"8 devices divides .*'height': 15.* of \[1, 3, 5\]"):
        cv.best_mesh((1, 3, 15, 9, 4))
    with pytest.raises(ValueError, match="must be of BTHWC, five axes"):
        cv.best_mesh((3, 15, 9, 4))
    assert cv.best_mesh((1, 3, 15, 9, 4), jax.devices()[:3]).shape["width"] == 1


def test_the_adapter_runs_on_a_mesh(vae):
    import torch

    from eqx_cogvae.diffusers import EqxAutoencoderKLCogVideoX

    latents = torch.randn(1, 3, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    results = []
    for mesh in (None, mesh_of((1, 2, 2))):
        z = latents.clone().requires_grad_()
        y = EqxAutoencoderKLCogVideoX(vae, mesh=mesh).decode(z).sample
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), z)))
    assert all(distance(got, due) < 1e-5 for got, due in zip(*results, strict=True))
    rows = EqxAutoencoderKLCogVideoX(vae, mesh=Mesh(np.array(jax.devices()[:2]), ("height",)))
    assert distance(rows.decode(latents).sample, results[0][0]) < 1e-5
    with pytest.raises(ValueError, match="weights are on a mesh and stay there"):
        rows.to("meta")


def test_the_adapter_tiles_on_a_mesh(vae):
    """Equal tiles, each cut among the devices; what does not divide is heard at once."""
    import torch

    from eqx_cogvae.diffusers import EqxAutoencoderKLCogVideoX, to_torch

    latents = normal((1, 3, 10, 12, 3))
    ours = EqxAutoencoderKLCogVideoX(vae, mesh=mesh_of((1, 2, 2)))
    ours.enable_tiling(16, 16, 0.25, 0.5)
    whole = cv.framewise(vae.decode_step, 2)
    due = cv.tiled(whole, (8, 8), (0.25, 0.5), edges="shift")(latents)
    got = ours.decode(to_torch(latents)).sample
    assert distance(got.permute(0, 2, 3, 4, 1), due) < 1e-5
    assert torch.is_tensor(got)
    with pytest.raises(ValueError, match=r"tile height of 18 does not divide.*2 devices.*give 16"):
        ours.enable_tiling(18, 16)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_over_a_batch_is_exact_and_shared(accumulate, one_level):
    """A loss without noise, for parts to see the same as the whole."""

    def loss(vae, clips, key):
        del key
        return training.l2(vae(clips), clips), {}

    clips, key = jnp.tanh(normal((8, 3, 8, 8, 3))), jax.random.key(0)
    results, temporaries = [], []
    for mesh in (None, mesh_of((4, 1, 1))):
        trainer = training.Trainer(optax.sgd(0.1), loss, mesh=mesh, accumulate=accumulate)
        state = trainer.init(one_level)
        program = _trainer._update.lower((trainer, clips, key), state).compile()
        temporaries.append(program.compiled.memory_analysis().temp_size_in_bytes)
        results.append(trainer.step(state, clips, key))
    (alone, one), (spread, four) = results
    assert distance(four["loss"], one["loss"]) < 1e-5
    moved = [
        np.concatenate([np.ravel(a - b) for a, b in zip(*map(jax.tree.leaves, pair), strict=True)])
        for pair in ((alone.model, one_level), (jax.device_get(spread.model), one_level))
    ]
    assert distance(*moved) < 1e-4
    assert temporaries[1] < 0.4 * temporaries[0]


def test_training_against_a_discriminator_over_a_batch_is_exact(one_level):
    """The adaptive weight is that of all clips, wherever they are."""
    clips, key = jnp.tanh(normal((4, 3, 8, 8, 3))), jax.random.key(0)
    judge = training.Discriminator(width=2, levels=1, key=key)
    adversarial = training.Adversarial(optax.sgd(0.1))
    results = []
    for mesh in (None, mesh_of((4, 1, 1))):
        trainer = training.Trainer(optax.sgd(0.1), mesh=mesh, adversarial=adversarial)
        results.append(trainer.step(trainer.init(one_level, judge), clips, key))
    (alone, one), (spread, four) = results
    for name, due in one.items():
        assert abs(four[name] - due) < 1e-5 * max(abs(due), 1), name
    for got, due in zip(*map(jax.tree.leaves, (spread, alone)), strict=True):
        assert distance(got, due) < 1e-5


def test_a_trainer_says_how_many_devices_share_the_batch(vae):
    """Chunks go by what one of them holds."""
    seen = []

    def loss(vae, clips, key):
        del key
        seen.append(_meshes.split.value)
        return jnp.mean(vae.encoder.conv_in.conv.bias) * jnp.mean(clips), {}

    trainer = training.Trainer(optax.sgd(0.1), loss, mesh=mesh_of((4, 1, 1)))
    trainer.step(trainer.init(vae), jnp.zeros((4, 1, 8, 8, 3)), jax.random.key(0))
    assert set(seen) == {_meshes.Split(batch=4)}


def test_a_state_comes_back_to_its_mesh(vae, tmp_path):
    trainer = training.Trainer(optax.adam(1e-3), mesh=mesh_of((4, 1, 1)))
    state = trainer.init(jax.tree.map(lambda x: x + 1 if eqx.is_array(x) else x, vae))
    training.save_state(tmp_path / "state", state)
    again = training.load_state(tmp_path / "state", trainer.init(vae))
    for got, due in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        assert got.sharding == due.sharding
        np.testing.assert_array_equal(got, due)


# Meshes whose axes are explicit, as `jax.make_mesh` makes them by default: an array's type then
# says how it is sharded.

SPECS = [
    ("x",),
    (None, None, "x"),
    (None, None, None, "x"),
    ("x", None, "y"),
    (None, None, "x", "y"),
]


def spec_of(spec):
    return PartitionSpec(*spec, *[None] * (5 - len(spec)))


def explicit(what, spec, frames, mesh):
    return jax.device_put(clip(what, (2, 8, 8), frames), NamedSharding(mesh, spec_of(spec)))


def within(mesh):
    return jax.set_mesh(mesh)


def without(mesh):
    return contextlib.nullcontext()


# Every sharding in one of both contexts, eagerly or not, and the others in the long run.
@pytest.mark.parametrize(
    ("spec", "context", "jitted"),
    [
        pytest.param(
            *(spec, context, jitted),
            marks=() if (i % 2 == j and (i // 2 + j) % 2 == jitted) else pytest.mark.full,
        )
        for i, spec in enumerate(SPECS)
        for j, context in enumerate((within, without))
        for jitted in (False, True)
    ],
    ids=str,
)
def test_arrays_on_explicit_axes(spec, context, jitted, vae):
    """Results are sharded as the input is, and equal to those of one device."""
    mesh = jax.make_mesh((2, 2), ("x", "y"))
    due = vae.decode(clip("decode", (2, 8, 8), 3))
    with context(mesh):
        fn = eqx.filter_jit(vae.decode) if jitted else vae.decode
        got = fn(explicit("decode", spec, 3, mesh))
    assert jax.typeof(got).sharding.spec == spec_of(spec)
    assert distance(got, due) < 1e-5


def test_encoding_on_explicit_axes(vae):
    mesh, spec = jax.make_mesh((2, 2), ("x", "y")), ("x", None, "y")
    due = vae.encode(clip("encode", (2, 8, 8), 9))
    posterior = vae.encode(explicit("encode", spec, 9, mesh))
    for got, expected in ((posterior.mean, due.mean), (posterior.mode(), due.mode())):
        assert jax.typeof(got).sharding.spec == spec_of(spec)
        assert distance(got, expected) < 1e-5
    key = jax.random.key(0)
    assert distance(posterior.sample(key), due.sample(key)) < 1e-5


@pytest.mark.parametrize(
    "transform",
    [
        lambda vae: cv.sliced(cv.framewise(vae.decode_step, 2)),
        lambda vae: cv.tiled(cv.framewise(vae.decode_step, 2), (5, 8), (0.4, 0.0), edges="shift"),
        lambda vae: lambda z: jnp.concatenate(list(cv.streamed(vae.decode_step, 2)(z)), axis=1),
    ],
    ids=["sliced", "tiled", "streamed"],
)
def test_transforms_on_explicit_axes(transform, vae):
    mesh, spec = jax.make_mesh((2, 2), ("x", "y")), ("x", None, "y")
    due = transform(vae)(clip("decode", (2, 8, 8), 3))
    latents, fn = explicit("decode", spec, 3, mesh), transform(vae)
    calls = [fn] if not isinstance(fn, eqx.Module) else [fn, eqx.filter_jit(fn)]
    for each in calls:
        got = each(latents)
        assert jax.typeof(got).sharding.spec == spec_of(spec)
        assert distance(got, due) < 1e-5


def test_gradients_on_explicit_axes(vae):
    """JAX itself differentiates such arrays only within `jax.set_mesh`."""
    mesh, spec = jax.make_mesh((2, 2), ("x", "y")), ("x", None, "y")
    loss = lambda z: jnp.sum(jnp.sin(vae.decode_step(z)[0]))  # noqa: E731
    due = jax.grad(loss)(clip("decode", (2, 8, 8), 3))
    with jax.set_mesh(mesh):
        got = jax.grad(loss)(explicit("decode", spec, 3, mesh))
    assert jax.typeof(got).sharding.spec == spec_of(spec)
    assert distance(got, due) < 1e-5


def test_steps_on_explicit_axes_gather_nothing(vae):
    mesh, spec = jax.make_mesh((2, 2), ("x", "y")), (None, None, "x", "y")
    latents = explicit("decode", spec, 3, mesh)
    _, cache = vae.decode_step(latents)
    for args in ((latents,), (latents[:, :2], cache)):
        program = eqx.filter_jit(vae.decode_step).lower(*args).compile()
        check(program, args, vae.decode_step(*map(on_one_device, args)))


def on_one_device(tree):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), tree)


@pytest.mark.parametrize("how", ["replicated", "sharded"])
def test_weights_on_explicit_axes(how, vae):
    """Copied to every device, or cut along their widest channels."""
    mesh, spec = jax.make_mesh((2, 2), ("x", "y")), ("x",)

    def placed(x):
        cut = how == "sharded" and x.ndim and x.shape[-1] % 2 == 0
        spec = PartitionSpec(*[None] * (x.ndim - 1), "x") if cut else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    due = vae.decode(clip("decode", (2, 8, 8), 3))
    arrays, static = eqx.partition(vae, eqx.is_array)
    on_mesh = eqx.combine(jax.tree.map(placed, arrays), static)
    got = on_mesh.decode(explicit("decode", spec, 3, mesh))
    assert distance(got, due) < 1e-5


def test_sharded_within_an_explicit_mesh(vae):
    mesh, latents = jax.make_mesh((2, 2), ("height", "width")), clip("decode", (1, 8, 8), 3)
    due = vae.decode(latents)
    with jax.set_mesh(mesh):
        axes = {"height": "height", "width": "width"}
        best = cv.best_mesh((1, 4, 8, 8, 3), devices=jax.devices()[:4])
        for fn in (cv.sharded(vae.decode, mesh, **axes), cv.sharded(vae.decode, best, **axes)):
            got = fn(jnp.asarray(np.asarray(latents)))
            assert distance(got, due) < 1e-5
            assert len({str(shard.index) for shard in got.addressable_shards}) == 4


def test_a_size_that_does_not_divide_on_explicit_axes(vae):
    mesh = jax.make_mesh((4,), ("x",))
    video = jax.device_put(
        clip("encode", (1, 6, 4), 9), NamedSharding(mesh, spec_of((None, None, "x")))
    )
    with pytest.raises(ValueError, match="height of 6 does not divide among the 4 devices"):
        vae.encode(video)


def on_mesh(x, mesh, *spec):
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))


def test_results_lie_on_the_mesh_of_the_video(vae):
    """Also where weights lie on another one, and where a function is closed over its latents."""
    mesh, other = jax.make_mesh((2, 2), ("x", "y")), jax.make_mesh((4,), ("data",))
    arrays, static = eqx.partition(vae, eqx.is_array)
    elsewhere = eqx.combine(jax.tree.map(lambda x: on_mesh(x, other), arrays), static)
    latents = explicit("decode", ("x", None, "y"), 3, mesh)
    due = vae.decode(clip("decode", (2, 8, 8), 3))
    weights_elsewhere = cv.sliced(elsewhere.decode_step)(latents)[0]
    cut = cv.sharded(cv.sliced(vae.decode), mesh, batch="x", height="y")(latents)
    with jax.set_mesh(mesh):  # else JAX compiles for one device, as no argument names more
        closed_over = jax.jit(lambda: cv.sliced(vae.decode)(latents))()
    for got in (weights_elsewhere, cut, closed_over):
        assert jax.typeof(got).sharding == jax.typeof(latents).sharding
        assert distance(got, due) < 1e-5


def test_the_video_decides_whatever_the_order_of_arguments(vae):
    mesh = jax.make_mesh((2, 2), ("x", "y"))
    latents = explicit("decode", ("x", None, "y"), 2, mesh)
    _, cache = vae.decode_step(clip("decode", (2, 8, 8), 3))
    replicated = jax.tree.map(lambda x: on_mesh(x, mesh), cache)
    got, _ = vae.decode_step(cache=replicated, latents=latents)
    assert jax.typeof(got).sharding.spec == spec_of(("x", None, "y"))


def test_an_axis_of_one_device_splits_nothing():
    mesh, seen = jax.make_mesh((4, 1), ("x", "y")), []
    x = on_mesh(jnp.ones((4, 1, 4, 4, 1)), mesh, "x")
    for spec in (("x", None, "y"), ("y", None, "x")):
        fn = lambda x: (seen.append(_meshes.split.value), x)[1]  # noqa: E731
        _meshes.with_automatic_axes(fn, (x,), mesh, spec_of(spec))
    assert seen == [_meshes.Split(batch=4), _meshes.Split(height=4)]
    assert [split.within_frames for split in seen] == [False, True]
