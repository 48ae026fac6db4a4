"""The adapter: beside diffusers' own VAE, in its pipelines, and what crosses between the two."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import accelerate
import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from PIL import Image
from reference import distance, reference

import eqx_cogvae as cv
from eqx_cogvae.diffusers import EqxAutoencoderKLCogVideoX, _memory, _running, to_jax, to_torch

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
# Tiles, slices, and how many clips.
SETTINGS = [
    (False, False, 1),
    (False, False, 2),
    (True, False, 1),
    (False, True, 2),
    (True, True, 2),
]
# Each setting in some pipeline, each pipeline with tiles and without; the others in the long run.
PAIRS = {"text": (1, 2), "image": (0, 4), "video": (3, 2), "control": (0, 4)}


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


@pytest.mark.parametrize(
    ("kind", "tiles", "slices", "batch"),
    [
        pytest.param(kind, *setting, marks=() if i in PAIRS[kind] else pytest.mark.full)
        for kind in PAIRS
        for i, setting in enumerate(SETTINGS)
    ],
)
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
    count = sum(parameter.numel() for parameter in model.parameters())
    due = f"EqxAutoencoderKLCogVideoX({count:,} parameters, torch.float32, device='cpu')"
    assert repr(ours) == due and issubclass(EqxAutoencoderKLCogVideoX, type(model))
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
        _, again = ours._functions(ours.vae.decode_step, (2, None), None)
        assert ("remat" in str(jax.make_jaxpr(again)(z))) == enable


def test_no_gradient_where_none_is_asked_for(ours):
    z = noise(1, 4, 3, 4, 4)
    assert not ours.decode(z).sample.requires_grad
    with torch.inference_mode():
        assert ours.decode(z * 2).sample.isfinite().all()
    z.requires_grad_()
    with torch.no_grad():
        assert not ours.decode(z).sample.requires_grad


def test_gradients_of_gradients(tmp_path):
    """The penalty on a gradient, by the latents, of a decoder as small as there can be."""
    config = cv.Config(
        block_out_channels=(4,), layers_per_block=1, norm_num_groups=2, latent_channels=2
    )
    model = reference(config)
    model.save_pretrained(tmp_path)
    ours = EqxAutoencoderKLCogVideoX.from_pretrained(tmp_path)
    z = noise(1, 2, 1, 2, 2)

    def penalty(vae):
        x = z.clone().requires_grad_()
        (once,) = torch.autograd.grad(vae.decode(x).sample.pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(once.pow(2).sum(), x)[0]

    assert distance(penalty(ours), penalty(model)) < 1e-4
    got, due = (
        torch.func.grad(lambda x, v=v: v.decode(x).sample.pow(2).sum())(z) for v in (ours, model)
    )
    assert distance(got, due.detach()) < 1e-4


def test_results_may_be_written_to(model, ours):
    set_up(model, False, False)
    z = noise(1, 4, 3, 4, 4)
    grads = [
        gradients(lambda z, v=v: v.decode(z).sample.clamp_(-0.1, 0.1).pow_(2).sum(), z)
        for v in (ours, model)
    ]
    assert distance(grads[0][0], grads[1][0]) < 1e-4
    with torch.no_grad():
        due = ours.decode(z).sample
        ours.decode(z).sample.zero_()
        assert torch.equal(ours.decode(z).sample, due)


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


def test_the_dtype_that_is_asked_for(folder):
    load = EqxAutoencoderKLCogVideoX.from_pretrained
    assert load(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load(folder, dtype=torch.float16, torch_dtype=torch.bfloat16).dtype == torch.float16
    for name in ("auto", "bfloat16"):
        assert diffusers.AutoencoderKLCogVideoX.from_pretrained(folder, torch_dtype=name).dtype == (
            torch.float32
        )
        with pytest.warns(UserWarning, match=f"'{name}' is no torch.dtype.*torch.float32") as heard:
            assert load(folder, torch_dtype=name).dtype == torch.float32
        assert [Path(each.filename).name for each in heard] == [Path(__file__).name]


@pytest.mark.parametrize("place", ["cpu", torch.device("cpu"), "auto", "balanced", {"": "cpu"}])
def test_the_device_that_is_asked_for(place, folder):
    loaded = EqxAutoencoderKLCogVideoX.from_pretrained(folder, device_map=place)
    assert loaded.device == torch.device("cpu")


def test_fields_of_the_config_that_are_asked_for(folder, tmp_path):
    load = EqxAutoencoderKLCogVideoX.from_pretrained
    loaded, faults = load(folder, scaling_factor=2.5, output_loading_info=True)
    assert loaded.config.scaling_factor == loaded.vae.config.scaling_factor == 2.5
    due = diffusers.AutoencoderKLCogVideoX.from_pretrained(folder, output_loading_info=True)[1]
    assert faults.keys() == due.keys() and not any(faults.values())
    loaded.save_pretrained(tmp_path)
    assert diffusers.AutoencoderKLCogVideoX.from_pretrained(tmp_path).config.scaling_factor == 2.5
    with pytest.raises(ValueError, match=r"`latent_channels` shapes the network.* from 4 to 16"):
        load(folder, latent_channels=16)


NO_ARGUMENTS = {
    "variant": ("fp16", FileNotFoundError, r"no diffusion_pytorch_model\.fp16\.safetensors in "),
    "quantization_config": ({"load_in_8bit": True}, ValueError, "`torch_dtype=torch.bfloat16`"),
    "parallel_config": ("tp", ValueError, "`mesh=`"),
    "max_memory": ({0: "1GB"}, ValueError, "`device_map=`"),
    "offload_folder": ("there", ValueError, "stay in memory"),
    "ignore_mismatched_sizes": (True, ValueError, "config that belongs"),
    "force_download": (True, ValueError, "`cache_dir`"),
    "proxies": ({"http": "there"}, ValueError, "HTTPS_PROXY"),
    "use_flashpack": (True, ValueError, "as safetensors"),
    "device_map": ({"encoder": 0, "decoder": "cpu"}, ValueError, "name one device"),
    "torch_dtype": (torch.float8_e4m3fn, ValueError, "weights are of .*got torch.float8_e4m3fn"),
    "nonsense": (1, TypeError, "takes no 'nonsense'; it takes torch_dtype, dtype, mesh"),
}


@pytest.mark.parametrize("name", NO_ARGUMENTS)
def test_arguments_that_cannot_be_had(name, folder):
    value, kind, message = NO_ARGUMENTS[name]
    load = EqxAutoencoderKLCogVideoX.from_pretrained
    with pytest.raises(kind, match=message) as raised:
        load(folder, **{name: value})
    assert "\n" not in str(raised.value)
    if name in ("max_memory", "proxies", "quantization_config", "offload_folder"):
        assert load(folder, **{name: None}).dtype == torch.float32


def test_one_file(folder, tmp_path, ours):
    weights, config = folder / "diffusion_pytorch_model.safetensors", folder / "config.json"
    z = noise(1, 4, 1, 2, 2)
    due = ours.decode(z).sample
    load = EqxAutoencoderKLCogVideoX
    assert torch.equal(load.from_single_file(weights, config=config).decode(z).sample, due)
    assert torch.equal(load.from_pretrained(weights, config=config).decode(z).sample, due)
    (tmp_path / "vae").mkdir()
    shutil.copy(config, tmp_path / "vae")
    shutil.copy(weights, tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    ours.to(torch.bfloat16).save_pretrained(tmp_path / "vae")
    for options in ({}, {"subfolder": "vae"}):
        loaded = load.from_pretrained(tmp_path, variant="fp16", **options)
        assert torch.equal(loaded.decode(z).sample, due)
    with pytest.raises(TypeError, match=r"takes a path.*`safetensors\.torch\.save_file`"):
        load.from_single_file(ours.state_dict())
    with pytest.raises(TypeError, match="takes no 'subfolder'; it takes config, torch_dtype"):
        load.from_single_file(weights, subfolder="vae")


def test_saving_as_one_of_many_processes(ours, tmp_path):
    ours.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match=r"`variant='fp16'` cannot be had: .*rename it"):
        ours.save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(ValueError, match="`use_flashpack` cannot be had"):
        ours.save_pretrained(tmp_path, use_flashpack=True)


OFFLOADS = {
    "sequential": lambda vae, place: accelerate.cpu_offload(vae, torch.device("cpu")),
    "buffers too": lambda vae, place: accelerate.cpu_offload(vae, offload_buffers=True),
    "disk": lambda vae, place: accelerate.disk_offload(vae, place, torch.device("cpu")),
    "model": lambda vae, place: accelerate.cpu_offload_with_hook(vae, torch.device("cpu")),
    "groups of leaves": lambda vae, place: vae.enable_group_offload(
        torch.device("cpu"), offload_type="leaf_level"
    ),
    "groups of blocks": lambda vae, place: vae.enable_group_offload(
        torch.device("cpu"), num_blocks_per_group=1
    ),
    "groups from outside": lambda vae, place: diffusers.hooks.apply_group_offloading(
        vae, torch.device("cpu"), offload_type="leaf_level"
    ),
}


@pytest.mark.parametrize("kind", OFFLOADS)
def test_offloaded_by_accelerate_and_diffusers(kind, ours, tmp_path):
    z, x = noise(1, 4, 3, 4, 4), noise(1, 3, 5, 8, 8)
    due = ours.decode(z).sample, ours(x).sample
    names = ours.state_dict().keys()
    OFFLOADS[kind](ours, tmp_path)
    for _ in range(2):
        assert torch.equal(ours.decode(z).sample, due[0])
        assert torch.equal(ours(x).sample, due[1])
    assert ours.device == torch.device("cpu") and ours.state_dict().keys() == names
    accelerate.hooks.remove_hook_from_module(ours, recurse=True)
    assert torch.equal(ours.to(torch.float32).decode(z).sample, due[0])


@pytest.mark.parametrize("kind", ["sequential", "group"])
def test_a_pipeline_offloads_it_in_parts(kind, ours):
    pipe = pipeline("video", ours)
    due = generate(pipe)
    if kind == "sequential":
        # Accelerate offloads a torch module from the CPU to the CPU once, and then fails.
        pipe._exclude_from_cpu_offload = ["transformer"]
        pipe.enable_sequential_cpu_offload(device="cpu")
        assert pipe.vae._hf_hook is not None
    else:
        pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    torch.testing.assert_close(generate(pipe), due)


def test_offloading_to_disk_by_groups_cannot_be_had(ours, tmp_path):
    with pytest.raises(ValueError, match=r"stay in memory, halve them by `\.to\(torch.bfloat16"):
        ours.enable_group_offload(torch.device("cpu"), offload_to_disk_path=str(tmp_path))


def test_torch_compile_leaves_it_to_xla(ours):
    z, x = noise(1, 4, 3, 4, 4), noise(1, 3, 5, 8, 8)
    decoded, encoded, both = ours.decode(z).sample, ours.encode(x).latent_dist.mean, ours(x).sample
    options = {"backend": "aot_eager"}
    assert torch.equal(torch.compile(ours.decode, **options)(z).sample, decoded)
    assert torch.equal(torch.compile(ours.encode, **options)(x).latent_dist.mean, encoded)
    assert torch.equal(torch.compile(ours, **options)(x).sample, both)

    @torch.compile(**options)
    def around(z):
        return ours.decode(2 * z).sample + 1

    assert torch.equal(around(z / 2), decoded + 1)
    x.requires_grad_()
    torch.compile(ours, **options)(x).sample.sum().backward()
    assert x.grad.isfinite().all()
    ours.compile(**options)
    assert torch.equal(ours(x).sample, both)


class _Encoded(torch.utils.data.Dataset):
    """A data set that encodes what it gives, in a worker."""

    def __init__(self, vae):
        self.vae = vae

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.vae.encode(noise(1, 3, 5, 8, 8)).latent_dist.mean


class _Arrays(_Encoded):
    def __getitem__(self, index):
        return np.asarray(to_jax(noise(3)))


@pytest.mark.filterwarnings("ignore:.*fork.*")
@pytest.mark.parametrize("kind", [_Encoded, _Arrays])
def test_a_forked_worker_says_spawn(kind, ours):
    load = torch.utils.data.DataLoader(
        kind(ours), num_workers=1, multiprocessing_context="fork", timeout=120
    )
    with pytest.raises(RuntimeError, match=r"forked copy \d+: start workers by spawn"):
        next(iter(load))


def test_a_spawned_worker_encodes(ours, monkeypatch):
    # The programs of this process serve the other.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    due = ours.encode(noise(1, 3, 5, 8, 8)).latent_dist.mean
    load = torch.utils.data.DataLoader(
        _Encoded(ours), num_workers=1, multiprocessing_context="spawn", timeout=600, batch_size=None
    )
    assert distance(next(iter(load)), due) < 1e-6


def test_pickled(ours):
    copy = pickle.loads(pickle.dumps(ours))
    z = noise(1, 4, 1, 2, 2)
    assert type(copy) is EqxAutoencoderKLCogVideoX
    assert torch.equal(copy.decode(z).sample, ours.decode(z).sample)


THINGS = {
    "numpy": (np.zeros((1, 4, 1, 2, 2)), "a NumPy array: `torch.from_numpy` makes a tensor"),
    "jax": (jnp.zeros((1, 1, 2, 2, 4)), r"a JAX array: `eqx_cogvae\.diffusers\.to_torch` turns"),
    "none": (None, "builtins's NoneType"),
    "list": ([[0.0]], "builtins's list"),
    "output": (
        AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(torch.zeros(1, 8, 1, 2, 2))),
        r"AutoencoderKLOutput: take a sample, as `encode\(x\)\.latent_dist\.sample",
    ),
    "decoded": (DecoderOutput(sample=torch.zeros(1)), "DecoderOutput: take its `.sample`"),
}


@pytest.mark.parametrize("thing", THINGS)
def test_what_is_no_tensor(thing, ours, unchecked):
    value, message = THINGS[thing]
    for call in (ours.decode, ours.encode, ours.tiled_decode, ours):
        with pytest.raises(TypeError, match=f"expected a torch tensor .batch.*got .*{message}"):
            call(value)


def test_what_will_not_come_back_warns_at_the_callers_line(ours, monkeypatch):
    monkeypatch.setattr(_running, "call", lambda fn, again, where, x: torch.zeros(1, 8, 3, 4, 4))
    for call, message in [
        (lambda: ours.encode(noise(1, 3, 6, 8, 8)), r"6 frames come back as 5.*are 5 and 9 \(4k"),
        (lambda: ours.encode(noise(1, 3, 5, 9, 8)), "frames of 9x8 come back as 8x8"),
        (lambda: ours.decode(noise(1, 4, 4, 4, 4)), "4 latent frames come back as 8.*5 and 9"),
        (lambda: ours(noise(1, 3, 5, 8, 9)), "frames of 8x9 come back as 8x8"),
    ]:
        with pytest.warns(UserWarning, match=message) as heard:
            call()
        assert [Path(each.filename).name for each in heard] == [Path(__file__).name]
    monkeypatch.setattr(_running, "call", lambda fn, again, where, x: torch.zeros(1, 3, 8, 16, 8))
    pipe = pipeline("text", ours)
    with pytest.warns(UserWarning, match="4 latent frames come back as 8.*`num_frames=5`") as heard:
        pipe(
            prompt_embeds=noise(1, 4, 8),
            negative_prompt_embeds=noise(1, 4, 8),
            height=HEIGHT,
            width=WIDTH,
            num_frames=7,
            num_inference_steps=1,
            output_type="pt",
        )
    assert [Path(each.filename).name for each in heard] == [Path(__file__).name]


def test_bad_calls(ours):
    z = noise(1, 4, 3, 4, 4)
    for call, message in [
        (lambda: ours.decode(z[:, :3]), r"4 channels, frames, height, width\), got shape \(1, 3,"),
        (lambda: ours.encode(z), r"3 channels, frames, height, width\), got shape \(1, 4,"),
        (lambda: ours.decode(z.movedim(1, -1)), r"use `x\.movedim\(-1, 1\)`"),
        (lambda: ours.encode(noise(1, 3, 9, 1, 16)), r"2x2 in height.*got shape \(1, 3, 9, 1, 16"),
        (lambda: ours.decode(z[:, :, :0]), r"one frame and 1x1.*got shape \(1, 4, 0, 4, 4\)"),
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


LAZY = {
    "negative": torch.tensor([1 + 2j, -0.5j]).conj().imag,
    "conjugate": torch.tensor([1 + 2j, 3 - 4j]).conj(),
    "negative video": torch.complex(X, X).conj().imag,
    "negated view": torch.tensor([1 + 2j, -0.5j]).conj().imag[1:],
}


@pytest.mark.parametrize("kind", LAZY)
def test_what_is_still_to_be_negated_or_conjugated(kind):
    x = LAZY[kind]
    assert x.is_neg() or x.is_conj()
    due = torch.clone(x).resolve_neg().resolve_conj().numpy()
    np.testing.assert_array_equal(to_jax(x), np.moveaxis(due, 1, -1) if x.ndim == 5 else due)
    assert to_jax(LAZY["negative"]).tolist() == [-2.0, 0.5]


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
        (to_jax, torch.eye(2).to_sparse(), r"no torch.sparse_coo .* dense one, as `\.to_dense"),
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


def test_torchs_own_checkpointing(ours):
    z = noise(1, 4, 3, 4, 4).requires_grad_()
    run = lambda z: ours.decode(z).sample  # noqa: E731
    (due,) = torch.autograd.grad(run(z).square().sum(), [z])
    kept = torch.utils.checkpoint.checkpoint(run, z, use_reentrant=False)
    (got,) = torch.autograd.grad(kept.square().sum(), [z])
    torch.testing.assert_close(got, due)
