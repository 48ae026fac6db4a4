"""The adapter: beside diffusers' own VAE, in its pipelines, and what crosses between the two."""

import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from reference import distance, reference

import eqx_cogvae as cv
from eqx_cogvae.diffusers import EqxAutoencoderKLCogVideoX, _memory, to_jax, to_torch

ROOT = Path(__file__).resolve().parents[1]
# Halving once, so that few programs are compiled; frames go from 9 to 5.
CONFIG = cv.Config(
    block_out_channels=(8, 8),
    layers_per_block=1,
    norm_num_groups=4,
    latent_channels=4,
    temporal_compression_ratio=2,
    sample_height=16,
    sample_width=16,
    scaling_factor=0.7,
)
FRAMES, HEIGHT, WIDTH = 5, 16, 8
# Overlapping by a half: one of the geometries whose size is right in diffusers.
TILES = (8, 8, 0.5, 0.5)
PIPELINES = ("text", "image", "video", "control")
# Tiles, slices, and how many clips.
SETTINGS = [
    (False, False, 1),
    (False, False, 2),
    (True, False, 1),
    (False, True, 2),
    (True, True, 2),
]


@pytest.fixture(scope="module")
def model():
    return reference(CONFIG)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("vae")
    model.save_pretrained(path)
    return path


@pytest.fixture
def ours(folder):
    return EqxAutoencoderKLCogVideoX.from_pretrained(folder)


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pictures(count, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, HEIGHT, WIDTH, 3), np.uint8)
    return [Image.fromarray(each) for each in pixels]


def pipeline(kind, vae):
    """With a random transformer, and without a text encoder."""
    classes = {
        "text": diffusers.CogVideoXPipeline,
        "image": diffusers.CogVideoXImageToVideoPipeline,
        "video": diffusers.CogVideoXVideoToVideoPipeline,
        "control": diffusers.CogVideoXFunControlPipeline,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=CONFIG.latent_channels * (2 if kind in ("image", "control") else 1),
            out_channels=CONFIG.latent_channels,
            time_embed_dim=2,
            text_embed_dim=8,
            num_layers=1,
            sample_width=WIDTH // 2,
            sample_height=HEIGHT // 2,
            sample_frames=FRAMES,
            temporal_compression_ratio=2,
            max_text_seq_length=4,
        )
    pipe = classes[kind](
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=transformer.eval(),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, batch=1):
    """Frames in [0, 1], (batch, frames, channels, height, width)."""
    clips = [pictures(FRAMES, seed) for seed in range(batch)]
    extra = {
        diffusers.CogVideoXPipeline: {"num_frames": FRAMES},
        diffusers.CogVideoXImageToVideoPipeline: {
            "num_frames": FRAMES,
            "image": [clip[0] for clip in clips],
        },
        diffusers.CogVideoXVideoToVideoPipeline: {"video": clips},
        diffusers.CogVideoXFunControlPipeline: {"control_video": clips},
    }
    dtype = pipe.transformer.dtype
    return pipe(
        prompt_embeds=noise(batch, 4, 8, dtype=dtype),
        negative_prompt_embeds=noise(batch, 4, 8, seed=1, dtype=dtype),
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **extra[type(pipe)],
    ).frames


def set_up(vae, tiles, slices):
    vae.enable_tiling(*TILES) if tiles else vae.disable_tiling()
    vae.enable_slicing() if slices else vae.disable_slicing()


@pytest.mark.parametrize(("tiles", "slices", "batch"), SETTINGS)
@pytest.mark.parametrize("kind", PIPELINES)
def test_pipelines_give_the_same_frames(kind, tiles, slices, batch, model, ours):
    frames = []
    for vae in (ours, model):
        set_up(vae, tiles, slices)
        frames.append(generate(pipeline(kind, vae), batch))
    assert frames[0].shape == (batch, FRAMES, 3, HEIGHT, WIDTH)
    assert (frames[0] - frames[1]).abs().max() < 1e-3


def test_a_pipeline_moves_and_casts_it(ours):
    pipe = pipeline("text", ours)
    assert pipe.to("cpu").device.type == "cpu"
    assert pipe.to(torch.bfloat16).vae.dtype == torch.bfloat16
    assert generate(pipe).dtype == torch.bfloat16


def test_a_pipeline_offloads_it(ours):
    pipe = pipeline("video", ours)
    due = generate(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert pipe.vae._hf_hook is not None
    torch.testing.assert_close(generate(pipe), due)


def test_a_saved_pipeline_is_diffusers_own(ours, model, tmp_path):
    pipe = pipeline("text", model)
    pipe.vae = ours
    due = generate(pipe)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKLCogVideoX"]

    load = diffusers.CogVideoXPipeline.from_pretrained
    loaded = load(tmp_path, text_encoder=None, tokenizer=None)
    assert type(loaded.vae) is diffusers.AutoencoderKLCogVideoX
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.vae.state_dict()[name], tensor)
    again = EqxAutoencoderKLCogVideoX.from_pretrained(tmp_path, subfolder="vae")
    swapped = load(tmp_path, text_encoder=None, tokenizer=None, vae=again)
    for each in (loaded, swapped, diffusers.CogVideoXPipeline.from_pipe(pipe, vae=pipe.vae)):
        each.set_progress_bar_config(disable=True)
        assert (generate(each) - due).abs().max() < 1e-3


def test_surface(model, ours):
    assert isinstance(ours, torch.nn.Module) and isinstance(ours, type(model))
    assert repr(ours) == "EqxAutoencoderKLCogVideoX()"
    for name in CONFIG.to_dict():
        due = model.config[name]
        assert ours.config[name] == getattr(ours.config, name)
        assert ours.config[name] == (list(due) if isinstance(due, tuple) else due)
    fresh = type(model)(**CONFIG.to_dict())
    names = [name for name in vars(fresh) if name.startswith(("tile_", "use_", "num_"))]
    assert len(names) == 10
    assert {n: getattr(ours, n) for n in names} == {n: getattr(fresh, n) for n in names}
    assert ours.eval() is ours.train() is ours.requires_grad_(False) is ours.to("cpu") is ours
    assert (ours.dtype, ours.device) == (torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("return_dict", [True, False])
def test_calls(return_dict, model, ours):
    set_up(model, False, False)
    x = noise(1, 3, 17, 8, 8)
    with torch.no_grad():
        pairs = [
            [vae.encode(x, return_dict=return_dict) for vae in (ours, model)],
            [vae.decode(noise(1, 4, 5, 4, 4), return_dict=return_dict) for vae in (ours, model)],
            [vae(x, return_dict=return_dict) for vae in (ours, model)],
            [vae(x, True, return_dict, torch.Generator().manual_seed(1)) for vae in (ours, model)],
        ]
    for got, due in pairs:
        assert type(got) is type(due) and len(got) == len(due) == 1
        if isinstance(due[0], torch.Tensor):
            assert distance(got[0], due[0]) < 1e-5
        else:
            assert type(got[0]) is type(due[0])
            assert distance(got[0].mean, due[0].mean) < 1e-5
            draws = [p.sample(torch.Generator().manual_seed(2)) for p in (got[0], due[0])]
            assert distance(*draws) < 1e-5


def test_an_overlap_of_zero_is_honoured(ours):
    ours.enable_tiling(8, 8, 0.0, 0.0)
    z = noise(1, 4, 3, 8, 4)
    halves = [ours.decode(each).sample for each in z.split(4, dim=3)]
    assert torch.equal(ours.decode(z).sample, torch.cat(halves, dim=3))


GEOMETRIES = {
    (9, 8): "tile of 9 is not a multiple of 2, .* give 8 or 10",
    (8, 8, 0.9): "overlaps by 0.9 leaves no step to the next",
    (8, 8, 1.0): r"must lie in \[0, 1\), got \(1.0",
    (0, 8): "whole numbers of at least 1",
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_tiles_that_cannot_work(geometry, ours):
    with pytest.raises(ValueError, match=GEOMETRIES[geometry]):
        ours.enable_tiling(*geometry)
    assert not ours.use_tiling and ours.tile_sample_min_height == 8


def gradients(call, *inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(call(*inputs), inputs)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_decoding_are_those_of_diffusers(checkpointing, model, ours):
    set_up(model, False, False)
    if checkpointing:
        ours.enable_gradient_checkpointing()
    z = noise(1, 4, 5 if checkpointing else 3, 4, 4)
    grads = [gradients(lambda z, v=v: v.decode(z).sample.pow(2).sum(), z) for v in (ours, model)]
    assert distance(grads[0][0], grads[1][0]) < 1e-4


def test_gradients_of_encoding_are_those_of_diffusers(model, ours):
    set_up(model, False, False)
    x = noise(1, 3, 5, 8, 8)
    grads = [gradients(lambda x, v=v: v.encode(x).latent_dist.kl().sum(), x) for v in (ours, model)]
    assert distance(grads[0][0], grads[1][0]) < 1e-4


def test_gradients_through_slices(model, ours):
    set_up(model, False, True), set_up(ours, False, True)
    z = noise(2, 4, 1, 4, 4)
    grads = [gradients(lambda z, v=v: v.decode(z).sample.pow(2).sum(), z) for v in (ours, model)]
    assert distance(grads[0][0], grads[1][0]) < 1e-4


def test_checkpointing_is_of_the_step(ours):
    z = jnp.zeros((1, 5, 4, 4, 4))
    for enable in (False, True):
        if enable:
            ours.enable_gradient_checkpointing()
        _, again = ours._functions(ours.vae.decode_step, 2, (4, 4))
        assert ("remat" in str(jax.make_jaxpr(again)(z))) == enable


def test_no_gradient_where_none_is_asked_for(ours):
    z = noise(1, 4, 3, 4, 4)
    assert not ours.decode(z).sample.requires_grad
    with torch.inference_mode():
        assert ours.decode(z * 2).sample.isfinite().all()
    z.requires_grad_()
    with torch.no_grad():
        assert not ours.decode(z).sample.requires_grad
    (once,) = torch.autograd.grad(ours.decode(z).sample.pow(2).sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        once.sum().backward()


def test_a_second_call_compiles_nothing(ours):
    compiled = []

    def listen(event, *_, **__):
        compiled.extend([event] * ("backend_compile" in event))

    jax.monitoring.register_event_duration_secs_listener(listen)

    def call():
        for each in (True, False):
            set_up(ours, each, True)
            ours.decode(noise(2, 4, 3, 8, 4))
        gradients(lambda z: ours.decode(z).sample.pow(2).sum(), noise(2, 4, 1, 4, 4))

    call()
    jax.jit(lambda x: x + 1)(0.0)
    assert compiled
    compiled.clear()
    call()
    jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


def test_threads(ours):
    inputs = [noise(1, 4, 3, 4, 4, seed=seed) for seed in range(4)]
    due = [ours.decode(z).sample for z in inputs]
    results = {}

    def work(i):
        results[i] = [ours.decode(inputs[i]).sample for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for step in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            step(thread)
    assert all(torch.equal(y, due[i]) for i in results for y in results[i])
    assert sorted(results) == [0, 1, 2, 3]


def test_one_copy_of_the_weights(model, ours):
    state, due = ours.state_dict(prefix="vae."), model.state_dict()
    assert state.keys() == {f"vae.{name}" for name in due}
    assert all(torch.equal(state[f"vae.{name}"], due[name]) for name in due)
    held = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(ours.vae)}
    assert {tensor.data_ptr() for tensor in state.values()} == held
    assert sum(parameter.numel() for parameter in ours.parameters()) == 0
    with pytest.raises(NotImplementedError, match="make another one, by `from_pretrained`"):
        ours.load_state_dict(due)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "to"])
def test_casts(cast, ours):
    old = jax.tree.leaves(ours.vae)
    getattr(ours, cast)(*((torch.float16,) if cast == "to" else ()))
    dtype = torch.bfloat16 if cast == "bfloat16" else torch.float16
    assert ours.dtype == dtype == next(ours.parameters()).dtype
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(ours.vae)} == {str(dtype)[6:]}
    np.testing.assert_array_equal(jax.tree.leaves(ours.vae)[0], old[0].astype(str(dtype)[6:]))
    assert ours.decode(noise(1, 4, 1, 2, 2)).sample.dtype == dtype


def test_the_dtype_of_a_checkpoint_is_diffusers(model, tmp_path):
    type(model)(**CONFIG.to_dict()).to(torch.bfloat16).save_pretrained(tmp_path)
    for options in ({}, {"torch_dtype": torch.float16}):
        classes = (type(model), EqxAutoencoderKLCogVideoX)
        loaded = [each.from_pretrained(tmp_path, **options) for each in classes]
        assert loaded[0].dtype == loaded[1].dtype


def test_the_arguments_that_scripts_give(ours, folder, tmp_path):
    load = EqxAutoencoderKLCogVideoX.from_pretrained
    options = {"torch_dtype": None, "low_cpu_mem_usage": False, "use_safetensors": True}
    assert load(folder, **options).dtype == torch.float32
    ours.save_pretrained(tmp_path, safe_serialization=True)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in folder.iterdir()}
    with pytest.raises(ValueError, match="read from safetensors alone"):
        load(folder, use_safetensors=False)
    with pytest.raises(ValueError, match="safetensors alone, not as a pickle"):
        ours.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(TypeError, match="takes no 'variant'; it takes torch_dtype, mesh"):
        load(folder, variant="fp16")


def test_pickled(ours):
    copy = pickle.loads(pickle.dumps(ours))
    z = noise(1, 4, 1, 2, 2)
    assert type(copy) is EqxAutoencoderKLCogVideoX
    assert torch.equal(copy.decode(z).sample, ours.decode(z).sample)


def test_bad_calls(ours):
    z = noise(1, 4, 3, 4, 4)
    for call, message in [
        (lambda: ours.decode(z[:, :3]), r"4 channels, frames, height, width\), got shape \(1, 3,"),
        (lambda: ours.encode(z), r"3 channels, frames, height, width\), got shape \(1, 4,"),
        (lambda: ours.decode(z.to("meta")), "tensor on meta, and the weights are on cpu: move"),
        (lambda: ours.decode(z.double()), "float64, and JAX has 64 bits off: cast it to 32"),
        (lambda: ours.to("meta"), "JAX cannot reach torch's device meta, it has cpu:0"),
        (lambda: ours.double(), "float64, and JAX has 64 bits off"),
        (lambda: ours.to(torch.float8_e5m2), "weights are of .* got torch.float8_e5m2"),
    ]:
        with pytest.raises(ValueError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)
    assert ours.dtype == torch.float32 and ours.device.type == "cpu"


# Conversions.

BITS = {
    torch.float16: np.arange(2**16, dtype=np.uint16),
    torch.bfloat16: np.arange(2**16, dtype=np.uint16),
    torch.float8_e4m3fn: np.arange(2**8, dtype=np.uint8),
    torch.float8_e5m2: np.arange(2**8, dtype=np.uint8),
    torch.float32: np.random.default_rng(0).integers(0, 2**32, 2**16, np.uint32),
    torch.float64: np.random.default_rng(0).integers(0, 2**64, 2**16, np.uint64),
}


@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("rank", [1, 5])
def test_every_bit_survives(dtype, rank):
    """All patterns of 16 bits or less, NaNs too; a sample of the wider ones."""
    bits = BITS[dtype] if rank == 1 else BITS[dtype].reshape(1, 2, 4, 4, -1)
    x = torch.from_numpy(bits).view(dtype)
    with jax.enable_x64(dtype == torch.float64):
        array = to_jax(x)
        assert str(array.dtype) == str(dtype)[6:]
        due = bits if rank == 1 else np.moveaxis(bits, 1, -1)
        np.testing.assert_array_equal(np.asarray(array).view(bits.dtype), due)
        back = to_torch(array)
    assert back.dtype == dtype
    np.testing.assert_array_equal(back.contiguous().view(torch.from_numpy(bits).dtype), bits)


X = noise(2, 4, 3, 4, 6)
LAYOUTS = {
    # The tensor, and whether it shares its memory with the array.
    "channels last": (X.to(memory_format=torch.channels_last_3d), True),
    "contiguous": (X, False),
    "one frame of many": (X.to(memory_format=torch.channels_last_3d)[1:], True),
    "permuted": (X.transpose(3, 4), False),
    "strided": (X[:, ::2, :, ::2], False),
    "expanded": (X[:1].expand(3, -1, -1, -1, -1), False),
    "flipped": (X.flip(2), False),
    "misaligned": (noise(9)[1:], False),
    "vector": (noise(9), True),
    "matrix": (noise(4, 6), True),
    "transposed": (noise(4, 6).t(), False),
    "empty": (noise(0, 3), None),
    "scalar": (noise(), True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    x, shared = LAYOUTS[layout]
    array = to_jax(x)
    due = np.moveaxis(x.numpy(), 1, -1) if x.ndim == 5 else x.numpy()
    np.testing.assert_array_equal(array, due)
    if shared is not None:
        assert (array.unsafe_buffer_pointer() == x.data_ptr()) == shared
    back = to_torch(array)
    assert torch.equal(back, x)
    if shared is not None:
        assert back.data_ptr() == array.unsafe_buffer_pointer()


def test_trees():
    x = noise(1, 3, 2, 4, 5, dtype=torch.bfloat16).requires_grad_()
    tree = {"video": x, "rest": (torch.arange(3, dtype=torch.int32), None, "name", 2.0)}
    arrays = to_jax(tree)
    assert arrays["video"].shape == (1, 2, 4, 5, 3) and arrays["video"].dtype == jnp.bfloat16
    assert arrays["rest"][1:] == (None, "name", 2.0)
    back = to_torch(arrays)
    assert torch.equal(back["video"], x) and not back["video"].requires_grad
    assert torch.equal(back["rest"][0], tree["rest"][0])


@pytest.mark.parametrize(
    ("convert", "thing", "message"),
    [
        (to_jax, torch.zeros(2, dtype=torch.float64), "float64, and JAX has 64 bits off: cast"),
        (to_jax, torch.zeros(2, dtype=torch.int64), "int64, and JAX has 64 bits off: cast"),
        (to_jax, torch.empty(2, dtype=torch.bits8), "JAX has no torch.bits8: cast the tensor"),
        (to_jax, torch.zeros(2, device="meta"), "cannot reach torch's device meta, it has"),
        (to_torch, jnp.zeros(2, jnp.float8_e3m4), "torch has no dtype float8_e3m4: cast"),
    ],
)
def test_what_the_other_side_lacks(convert, thing, message):
    with pytest.raises(ValueError, match=message):
        convert(thing)


# What importing it does.


def python(code):
    environment = {k: v for k, v in os.environ.items() if k != _memory._PREALLOCATE}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    return (done.stdout + done.stderr).strip().splitlines()


@pytest.mark.parametrize("missing", ["torch", "diffusers"])
def test_what_is_missing_is_named(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; import eqx_cogvae.diffusers"
    last = python(code)[-1]
    assert last.startswith("ImportError: the adapter needs torch and diffusers")
    assert "pip install 'eqx_cogvae[diffusers]'" in last


def test_jax_takes_gpu_memory_as_it_needs_it():
    code = f"""
import os, jax
from eqx_cogvae import diffusers
print(os.environ[{_memory._PREALLOCATE!r}])
for value in ("true", None):
    os.environ.pop({_memory._PREALLOCATE!r})
    if value is not None:
        os.environ[{_memory._PREALLOCATE!r}] = value
    else:
        jax.devices()  # on a CPU there is nothing to say then
    diffusers._leave_memory_to_torch()
    print(os.environ.get({_memory._PREALLOCATE!r}))
"""
    assert python(code) == ["false", "true", "None"]


def test_a_gpu_that_jax_has_taken(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.delenv(_memory._PREALLOCATE, raising=False)
    jax.devices()
    with pytest.warns(UserWarning, match=r"from torch: set XLA_PYTHON_CLIENT_PREALLOCATE=false"):
        _memory.leave_memory_to_torch()
    monkeypatch.setenv(_memory._PREALLOCATE, "true")
    _memory.leave_memory_to_torch()
