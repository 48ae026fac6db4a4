"""The plan against what running takes: programs, bytes of the compiled steps, arithmetic."""

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import distance, normal

import eqx_cogvae as cv
from eqx_cogvae import _flops, _plan
from eqx_cogvae._lowering import choose
from eqx_cogvae._lowering.choose import Thresholds

CONFIG = cv.Config(
    block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=3
)
SHAPE = (2, 17, 8, 16)
# Three along the width, the last one cut short.
TILE, OVERLAP = (8, 8), (0, 0.25)


@pytest.fixture(scope="module")
def vae():
    return cv.VAE(CONFIG, key=jax.random.key(0))


@pytest.fixture(scope="module")
def plan(vae):
    return cv.plan(vae, SHAPE, memory=2**40, tile=TILE, overlap=OVERLAP)


@pytest.fixture(scope="module")
def longer(vae):
    return cv.plan(vae, (2, 33, 8, 16), tile=(8, 16))


@pytest.fixture
def room(monkeypatch):
    """Sets the largest side of arrays that the compiler finds room for; others it refuses."""
    trace, largest = _plan.traced_step, SimpleNamespace(side=0)

    def compiled(lowered):
        if max(lowered.out_info[0].shape) > largest.side:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 17G of 16G hbm")
        return lowered.compile()

    def traced(*args):
        lower = trace(*args).lower
        return SimpleNamespace(jaxpr=trace(*args).jaxpr, lower=lambda: lowered(lower()))

    def lowered(real):
        return SimpleNamespace(out_info=real.out_info, compile=lambda: compiled(real))

    monkeypatch.setattr(_plan, "traced_step", traced)
    return largest


def named(costs):
    return {cost.name: cost for cost in costs}


def size(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_every_way_is_there_and_decodes(vae, plan):
    ways = ["whole", "streamed", "sliced", "tiled", "sliced tiled"]
    assert list(named(plan.encode)) == list(named(plan.decode)) == ways
    latents = normal((2, 9, 4, 8, 3))
    costs = named(plan.decode)
    due = vae.decode(latents)
    assert distance(costs["whole"].fn(latents), due) < 1e-6
    assert distance(costs["sliced"].fn(latents), due) < 1e-6
    pieces = list(costs["streamed"].fn(latents))
    np.testing.assert_array_equal(jnp.concatenate(pieces, axis=1), due)
    tiles = cv.tiled(cv.framewise(vae.decode_step, 2), (4, 4), OVERLAP)(latents)
    assert distance(costs["tiled"].fn(latents), tiles) < 1e-6
    assert distance(costs["sliced tiled"].fn(latents), tiles) < 1e-6


def test_programs_are_those_that_running_compiles(vae, room):
    """A step is traced once for each of its programs: here one of zeros, of the step's shapes."""
    room.side = 0
    plan = cv.plan(vae, (2, 17, 12, 16), tile=TILE, overlap=(0.25, 0.25))
    video, latents = normal((2, 17, 12, 16, 3)), normal((2, 9, 6, 8, 3))
    for step, frames, x, tile, costs in (
        (vae.encode_step, 8, video, TILE, plan.encode),
        (vae.decode_step, 2, latents, (4, 4), plan.decode),
    ):
        tiled = lambda fn, tile=tile: cv.tiled(fn, tile, (0.25, 0.25))  # noqa: E731
        for name, wrap in (
            ("whole", lambda fn: fn),
            ("sliced", cv.sliced),
            ("tiled", tiled),
            ("sliced tiled", lambda fn, tiled=tiled: cv.sliced(tiled(fn))),
        ):
            traced = []

            def noted(x, cache, step=step, traced=traced):
                traced.append(x.shape)
                shapes = eqx.filter_eval_shape(step, x, cache)
                return jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), shapes)

            wrap(cv.framewise(noted, frames))(x)
            # Tiles first look at how a very large one is enlarged.
            compiled = [shape for shape in traced if max(shape) <= 16]
            assert named(costs)[name].programs == len(compiled), name


def test_peaks_hold_what_must_be_there(vae, plan, longer):
    """Weights, cache, and the whole result twice over as it is joined; a stream's is constant."""
    latents, video = 4 * 2 * 9 * 4 * 8 * 3, 4 * 2 * 17 * 8 * 16 * 3
    _, cache = eqx.filter_eval_shape(
        lambda z: vae.decode_step(z), jax.ShapeDtypeStruct((2, 2, 4, 8, 3), jnp.float32)
    )
    costs = named(plan.decode)
    weights = size(eqx.filter(vae, eqx.is_array))
    assert costs["whole"].peak > weights + size(cache) + latents + video
    assert costs["streamed"].peak > weights + size(cache)
    assert costs["streamed"].peak < costs["whole"].peak
    assert costs["streamed"].peak == named(longer.decode)["streamed"].peak
    assert costs["sliced"].peak < costs["whole"].peak
    assert costs["sliced tiled"].peak < costs["tiled"].peak


def test_peaks_follow_the_compiled_step(vae):
    """Arguments, temporaries and outputs of the worse of both programs, by the compiler's word."""
    params, static = eqx.partition(vae, eqx.is_array)
    step = jax.jit(lambda p, z, c: eqx.combine(p, static).decode_step(z, c))
    first = step.lower(params, jnp.zeros((1, 3, 4, 4, 3)), None)
    cache, first = first.out_info[1], first.compile().memory_analysis()
    steady = step.lower(params, jnp.zeros((1, 2, 4, 4, 3)), cache).compile().memory_analysis()
    peaks = [
        m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes
        for m in (first, steady)
    ]
    result = 4 * 5 * 8 * 8 * 3
    streamed = named(cv.plan(vae, (1, 9, 8, 8)).decode)["streamed"]
    assert streamed.peak <= max(peaks) + result
    assert streamed.peak > 0.6 * max(peaks)


@pytest.mark.parametrize("frames", [3, 2])
def test_arithmetic_is_that_of_the_compiler(frames, vae):
    """Also where frames pass one by one, in a loop, of which XLA counts one pass."""
    params, static = eqx.partition(vae, eqx.is_array)
    z = jnp.zeros((1, frames, 16, 16, 3))

    def traced():
        return jax.jit(lambda p, z: eqx.combine(p, static).decoder(z)).trace(params, z)

    # As on a GPU, where no convolution takes fewer multiplications than it has.
    with choose.as_if_on("gpu"):
        whole = traced()
    count = _flops.flops(whole.jaxpr)
    # The compiler counts sums and norms as well, which weigh in so small a model, and not what
    # is the same for copies of a frame. What meets the zeros around a frame it leaves out too.
    assert 0.8 < count / whole.lower().compile().cost_analysis()["flops"] < 1.02
    with choose.thresholds(Thresholds(chunk_elements=1, band_elements=1)):
        in_loops = traced()
    assert "scan" in str(in_loops.jaxpr)
    assert _flops.flops(in_loops.jaxpr) == count


def test_arithmetic_of_a_gradient():
    """Three times the forward pass's, as torch's counter has it too."""
    from eqx_cogvae._lowering import conv

    args = jnp.ones((2, 4, 6, 7, 3)), jnp.ones((3, 3, 3, 3, 5)), jnp.ones(5)
    forward = lambda *args: conv.valid_conv(*args, conv.Geometry())  # noqa: E731
    back = jax.grad(lambda *args: jnp.sum(jnp.square(forward(*args))), (0, 1))
    counts = [_flops.flops(jax.make_jaxpr(fn)(*args)) for fn in (forward, back)]
    assert counts == [2 * 27 * 3 * 5 * 2 * 2 * 6 * 7, 3 * counts[0]]


def test_arithmetic_grows_with_the_video(plan, longer):
    decode = named(plan.decode)
    assert decode["sliced"].flop == decode["whole"].flop
    # Starts at 0, 3 and 6 along the width of 8 cells: 4 + 4 + 2 cells of tiles.
    assert decode["tiled"].flop / decode["whole"].flop == pytest.approx(10 / 8, rel=0.1)
    ratio = named(longer.decode)["whole"].flop / decode["whole"].flop
    assert ratio == pytest.approx(33 / 17, rel=0.1)


def test_the_cheapest_that_fits(plan):
    assert plan.best("decode").name == "whole"
    costs = named(plan.decode)
    # Not the whole, which needs more, nor tiles, which compute more, nor pieces of the result.
    budget = _plan.Plan(plan.encode, plan.decode, costs["whole"].peak - 1)
    assert budget.fits(costs["streamed"])
    assert budget.best("decode").name == "sliced"
    with pytest.raises(ValueError, match=r'"encode" or "decode", got \'dec\''):
        plan.best("dec")
    tight = _plan.Plan(plan.encode, plan.decode, costs["sliced tiled"].peak)
    assert tight.best("decode").name == "sliced tiled"
    none = _plan.Plan(plan.encode, plan.decode, 1000)
    with pytest.raises(ValueError, match=r"no way to decode.*sliced tiled needs the least.*`tile`"):
        none.best("decode")


def test_the_table(plan):
    text = str(plan)
    assert "decode, sliced tiled" in text
    assert text.count("cheapest that fits") == 2
    assert "memory: 1.02e+03 GiB" in text
    poor = str(_plan.Plan(plan.encode, plan.decode, 1000))
    assert poor.count("does not fit") == 10


def test_one_small_clip_has_two_ways(vae):
    assert [c.name for c in cv.plan(vae, (1, 1, 8, 8, 3)).encode] == ["whole", "streamed"]


def test_a_model_without_weights(vae):
    blank = eqx.filter_eval_shape(cv.VAE, CONFIG, key=jax.random.key(0))
    assert cv.plan(blank, (1, 9, 8, 8)) == cv.plan(vae, (1, 9, 8, 8))


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((9, 16, 16), {}, r"\(batch, frames, height, width\).*got \(9, 16, 16\)"),
        ((1, 9, 1, 16), {}, "2x2 pixels or more"),
        ((1, 9, 16, 16), {"tile": (9, 8)}, r"multiples of 2 pixels, got \(9, 8\)"),
    ],
)
def test_bad_plans(shape, options, message, vae):
    with pytest.raises(ValueError, match=message):
        cv.plan(vae, shape, **options)


@pytest.mark.parametrize("memory", [math.inf, np.float64(np.inf), 2.5e9, np.int64(2**40)])
def test_budgets(memory, vae):
    plan = cv.plan(vae, (1, 9, 8, 8), memory=memory)
    assert plan.memory == (memory if np.isinf(memory) else int(memory))
    assert all(map(plan.fits, plan.decode))
    assert str(plan).endswith("memory: no bound") == bool(np.isinf(memory))


def test_bad_budgets(unchecked, vae):
    for memory in (math.nan, 0, -1.0, -math.inf):
        with pytest.raises(
            ValueError, match=r"`memory` must be above 0 bytes.*got (nan|0|-1.0|-i)"
        ):
            cv.plan(vae, (1, 9, 8, 8), memory=memory)
    for memory in ("16 GB", True, 1j):
        with pytest.raises(TypeError, match=r"`memory` must be in bytes.*got ('16|True|1j)"):
            cv.plan(vae, (1, 9, 8, 8), memory=memory)


def test_what_the_compiler_finds_no_room_for_does_not_fit(vae, room):
    """A device that is too small says so when its program is compiled."""
    room.side = 8
    tight = cv.plan(vae, (1, 5, 8, 12), tile=(8, 8), overlap=(0, 0.5))
    assert named(tight.decode)["whole"].peak == float("inf")
    assert tight.best("decode").name == "tiled"
    assert "decode, whole            too much" in str(tight)


def test_on_a_topology_that_is_not_there_nothing_says_how_much_there_is():
    class Device:
        def memory_stats(self):
            raise NotImplementedError

    assert _plan._limit(Device()) is None


# Two processes that share a folder of compiled programs. The second one notes how many programs
# each call finds there, and the names of those that it adds.
ONE_LEVEL = cv.Config(
    block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, latent_channels=3
)
MODEL = f"""
import json, os, sys
import equinox as eqx
import jax
import eqx_cogvae as cv
vae = cv.VAE(cv.Config(**{ONE_LEVEL.to_dict()}), key=jax.random.key(0))
"""
PLANNING = """
plan = cv.plan(vae, (1, 17, 8, 12), tile=(8, 8), overlap=(0, 0))
plan.decode[-1].compile()
"""
CALLING = """
found, said = [], {}
note = lambda event, **_: found.append(event) if event.endswith("/cache_hits") else None
jax.monitoring.register_event_listener(note)
x = jax.numpy.zeros((1, 17, 8, 12, 3))
for step, size in ((vae.encode_step, 8), (vae.decode_step, 2)):
    whole = cv.framewise(step, size)
    for name, call in {
        "whole": whole,
        "tiled": cv.tiled(whole, (8, 8), (0, 0)),
        "streamed": lambda x: list(cv.streamed(step, size)(x)),
    }.items():
        kept, before = set(os.listdir(sys.argv[1])), len(found)
        jax.block_until_ready(call(x))
        added = [each.partition("-")[0] for each in set(os.listdir(sys.argv[1])) - kept]
        said[f"{size}, {name}"] = len(found) - before, sorted(set(added))
print(json.dumps(said))
"""
# The programs that cut and join arrays.
SMALL = {"jit_blend", "jit_concatenate", "jit_slice", "jit_unstack"}


def test_after_a_plan_the_first_call_compiles_nothing(tmp_path):
    """But for what cuts and joins arrays; a plan alone leaves out tiles that an edge cuts."""
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    for code in (PLANNING, CALLING):
        command = [sys.executable, "-c", MODEL + code, str(tmp_path)]
        said = subprocess.check_output(command, env=os.environ | settings)
    said = json.loads(said)
    step = {"jit__frame_batch"}
    assert {name: step & set(added) for name, (_, added) in said.items()} == {
        "8, whole": set(),
        "8, tiled": step,
        "8, streamed": set(),
        "2, whole": set(),
        "2, tiled": set(),
        "2, streamed": set(),
    }
    for name, (found, added) in said.items():
        assert set(added) <= SMALL | step
        # A stream shares its first program with the whole.
        assert found >= (2 if "whole" in name else 1 if "streamed" in name else 0), name
    # A clip's two programs of whole tiles are those of no other way; so are two of cut ones.
    assert said["2, tiled"][0] == 4


@pytest.mark.parametrize("put", [True, False])
def test_planned_programs_are_those_of_arrays_put_on_a_device_or_on_none(put, vae, monkeypatch):
    """JAX takes the two for different arguments; nothing is compiled."""
    lowered = []

    class Noted(Exception):
        pass

    def note(*args):
        lowered.append(trace(*args).lower())
        if len(lowered) == 2:
            raise Noted
        return SimpleNamespace(jaxpr=trace(*args).jaxpr, lower=lambda: Uncompiled())

    class Uncompiled:
        out_info = property(lambda self: lowered[0].out_info)

        def compile(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    device = jax.devices()[0] if put else None
    place = lambda x: jax.device_put(x, device) if eqx.is_array(x) else x  # noqa: E731
    model, x = jax.tree.map(place, vae), place(jnp.ones((1, 17, 8, 12, 3)))
    trace = _plan.traced_step
    monkeypatch.setattr(_plan, "traced_step", note)
    with pytest.raises(Noted):
        cv.plan(model, x.shape, device=device)
    shapes = jax.eval_shape(lambda x: vae.encode_step(x)[1], x[:, :9])
    cache = jax.tree.map(lambda x: place(jnp.ones(x.shape)), shapes)
    for program, *args in ((lowered[0], x[:, :9], None), (lowered[1], x[:, :8], cache)):
        assert program.as_text() == trace((model.encode_step, args[0]), args[1]).lower().as_text()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_dtype_of_what_is_given(dtype, vae, monkeypatch):
    """The model's own by default; its weights keep theirs."""

    class Noted(Exception):
        pass

    def note(step_and_frames, *_):
        step, frames = step_and_frames
        raise Noted(f"{jax.tree.leaves(step)[0].dtype}, {frames.dtype}")

    monkeypatch.setattr(_plan, "traced_step", note)
    with pytest.raises(Noted, match=f"^float32, {dtype or 'float32'}$"):
        cv.plan(vae, (1, 9, 8, 8), dtype=dtype)
