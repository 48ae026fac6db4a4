"""Every public name of diffusers' class: it does the same here, or says in one line what to do."""

import contextlib
import copy
import json
import warnings
from pathlib import Path
from unittest import mock

import diffusers
import pytest
import torch
from reference import distance, reference

import eqx_cogvae as cv
from eqx_cogvae.diffusers import EqxAutoencoderKLCogVideoX

# As in test_diffusers.py, whose programs are compiled already.
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
CPU = torch.device("cpu")


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latents():
    return noise(1, 4, 3, 4, 4)


def after(call, see):
    """What is to be seen of a model after a call."""

    def use(vae, folder):
        call(vae)
        return see(vae)

    return use


def tiles(name, *shape):
    def use(vae, folder):
        vae.enable_tiling(8, 8, 0.5, 0.5)
        result = getattr(vae, name)(noise(*shape))
        return getattr(result, "sample", result)

    return use


def fields(config):
    """The config's own fields, as JSON has them."""
    return json.loads(json.dumps({name: config[name] for name in CONFIG.to_dict()}))


def uploaded(vae, folder):
    """The files that are sent to the hub."""
    names = "create_repo", "load_or_create_model_card", "populate_model_card", "upload_folder"
    with contextlib.ExitStack() as stack:
        patch = lambda name: stack.enter_context(mock.patch(f"diffusers.utils.hub_utils.{name}"))  # noqa: E731
        upload = [patch(name) for name in names][-1]
        upload.side_effect = lambda folder_path, **_: {p.name for p in Path(folder_path).iterdir()}
        return vae.push_to_hub("someone/vae")


def saved(vae, folder):
    vae.save_pretrained(folder / "saved")
    return {path.name for path in (folder / "saved").iterdir()}


def config_saved(vae, folder):
    vae.save_config(folder / "config")
    return fields(json.loads((folder / "config" / "config.json").read_text()))


def json_file(vae, folder):
    vae.to_json_file(folder / "fields.json")
    return fields(json.loads((folder / "fields.json").read_text()))


HOOKED = ("forward", "forward_pre", "full_backward", "full_backward_pre", "backward")
HOOKED += ("load_state_dict_pre", "load_state_dict_post", "state_dict_pre", "state_dict_post")
# How a name is used; those that are not here are looked at.
USES = {
    "blend_h": lambda v, _: v.blend_h(noise(1, 2, 1, 4, 4), noise(1, 2, 1, 4, 4, seed=1), 2),
    "blend_v": lambda v, _: v.blend_v(noise(1, 2, 1, 4, 4), noise(1, 2, 1, 4, 4, seed=1), 2),
    "compile_repeated_blocks": lambda v, _: v.compile_repeated_blocks(),
    "config": lambda v, _: fields(v.config),
    "decode": lambda v, _: v.decode(latents()).sample,
    "dequantize": lambda v, _: v.dequantize(),
    "enable_gradient_checkpointing": after(
        lambda v: v.enable_gradient_checkpointing(), lambda v: v.is_gradient_checkpointing
    ),
    "disable_gradient_checkpointing": after(
        lambda v: v.disable_gradient_checkpointing(), lambda v: v.is_gradient_checkpointing
    ),
    "enable_group_offload": after(
        lambda v: v.enable_group_offload(CPU, offload_type="leaf_level"),
        lambda v: v.decode(latents()).sample,
    ),
    "enable_layerwise_casting": lambda v, _: v.enable_layerwise_casting(),
    "enable_parallelism": lambda v, _: v.enable_parallelism(config=None),
    "encode": lambda v, _: v.encode(noise(1, 3, 5, 8, 8)).latent_dist.mean,
    "forward": lambda v, _: v.forward(noise(1, 3, 5, 8, 8)).sample,
    "extract_init_dict": lambda v, _: v.extract_init_dict({"latent_channels": 4, "more": 1}),
    "from_config": lambda v, _: (
        v.from_config(CONFIG.to_dict(), scaling_factor=3.0).config.scaling_factor
    ),
    "from_pretrained": lambda v, folder: v.from_pretrained(folder).state_dict().keys(),
    "from_single_file": lambda v, folder: v.from_single_file(folder / "nothing.pt"),
    "get_config_dict": lambda v, folder: v.get_config_dict(folder),
    "get_memory_footprint": lambda v, _: v.get_memory_footprint(),
    "load_config": lambda v, folder: v.load_config(folder),
    "num_parameters": lambda v, _: v.num_parameters(),
    "push_to_hub": uploaded,
    "register_for_auto_class": lambda v, _: v.register_for_auto_class(),
    "register_to_config": after(
        lambda v: v.register_to_config(scaling_factor=2.0), lambda v: v.config.scaling_factor
    ),
    "save_config": config_saved,
    "save_pretrained": saved,
    "set_attention_backend": lambda v, _: v.set_attention_backend("native"),
    "set_use_memory_efficient_attention_xformers": (
        lambda v, _: v.set_use_memory_efficient_attention_xformers(True)
    ),
    "set_use_npu_flash_attention": lambda v, _: v.set_use_npu_flash_attention(True),
    "set_use_xla_flash_attention": lambda v, _: v.set_use_xla_flash_attention(True),
    "tiled_decode": tiles("tiled_decode", 1, 4, 3, 8, 4),
    "tiled_encode": tiles("tiled_encode", 1, 3, 5, 16, 8),
    "to_json_file": json_file,
    "to_json_string": lambda v, _: fields(json.loads(v.to_json_string())),
    # Those of torch's modules.
    "add_module": after(lambda v: v.add_module("more", torch.nn.Linear(1, 1)), lambda v: v.more),
    "register_module": after(
        lambda v: v.register_module("more", torch.nn.Linear(1, 1)), lambda v: v.more
    ),
    "apply": lambda v, _: v.apply(lambda module: None) is v,
    "get_buffer": lambda v, _: v.get_buffer("encoder"),
    "get_parameter": lambda v, _: v.get_parameter("encoder.conv_in.conv.weight"),
    "get_submodule": lambda v, _: v.get_submodule("encoder.conv_in"),
    "load_state_dict": lambda v, _: v.load_state_dict({}),
    "named_parameters": lambda v, _: {p.dtype for _, p in v.named_parameters()},
    "parameters": lambda v, _: {(p.dtype, p.device) for p in v.parameters()},
    "register_buffer": after(lambda v: v.register_buffer("more", noise(1)), lambda v: v.more),
    "register_parameter": after(
        lambda v: v.register_parameter("more", torch.nn.Parameter(noise(1))), lambda v: v.more
    ),
    "requires_grad_": lambda v, _: v.requires_grad_(False) is v,
    "set_extra_state": lambda v, _: v.set_extra_state(None),
    "set_submodule": after(
        lambda v: (
            v.add_module("more", torch.nn.Identity()),
            v.set_submodule("more", torch.nn.Linear(1, 1)),
        ),
        lambda v: type(v.more),
    ),
    "share_memory": lambda v, _: v.share_memory(),
    "state_dict": lambda v, _: v.state_dict()["decoder.conv_out.conv.weight"],
    "to": lambda v, _: v.to(torch.bfloat16, non_blocking=True).dtype,
    "to_empty": lambda v, _: v.to_empty(device="cpu").dtype,
    "type": lambda v, _: v.type(torch.float16).dtype,
    **{
        f"register_{name}_hook": lambda v, _, n=name: type(
            getattr(v, f"register_{n}_hook")(lambda *args: None)
        )
        for name in HOOKED
    },
    **{
        name: lambda v, _, n=name: getattr(v, n)().dtype
        for name in ("bfloat16", "half", "float", "double", "cpu", "cuda", "ipu", "xpu", "mtia")
    },
    **{name: lambda v, _, n=name: getattr(v, n)() is v for name in ("eval", "train")},
    **{
        name: lambda v, _, n=name: getattr(v, n)()
        for name in ("compile", "extra_repr", "get_extra_state", "zero_grad")
    },
    **{
        name: lambda v, _, n=name: type(getattr(v, n)())
        for name in ("buffers", "children", "modules", "named_buffers", "named_children")
    },
    "named_modules": lambda v, _: type(v.named_modules()),
    **{
        f"{verb}_{what}": after(
            lambda v, n=f"{verb}_{what}": getattr(v, n)(), lambda v, w=what: getattr(v, f"use_{w}")
        )
        for verb in ("enable", "disable")
        for what in ("tiling", "slicing")
    },
    **{
        f"{verb}_{what}": lambda v, _, n=f"{verb}_{what}": getattr(v, n)()
        for verb in ("enable", "disable")
        for what in (
            "npu_flash_attention",
            "xla_flash_attention",
            "xformers_memory_efficient_attention",
        )
    },
    "reset_attention_backend": lambda v, _: v.reset_attention_backend(),
}
# What says in one line what to do instead.
REFUSED = {
    "compile_repeated_blocks": "XLA compiles all of it at the first call: call `encode`",
    "decoder": r"`decoder` is no torch module here.*`\.vae\.decoder`.*`state_dict\(\)`",
    "encoder": r"`encoder` is no torch module here.*`\.vae\.encoder`.*`state_dict\(\)`",
    "get_submodule": r"`encoder` is no torch module here.*`\.vae\.encoder`.*`state_dict\(\)`",
    "dequantize": r"`eqx_cogvae\.dequantised\(vae\)`.* `\.to\(torch\.float32\)`",
    "double": r"JAX has 64 bits off: cast it to 32",
    "enable_layerwise_casting": r"cast all weights by `\.to\(torch\.bfloat16\)`",
    "enable_parallelism": "give `mesh=` to the adapter",
    "from_single_file": r"there is no checkpoint at .*nothing\.pt: give a 3d-vae\.pt",
    "load_state_dict": "make another one, by `from_pretrained`",
    "share_memory": "load them in each one",
}
MODULE = {name for name in dir(torch.nn.Module()) if not name.startswith("_")}


@pytest.fixture(scope="module")
def theirs():
    return reference(CONFIG)


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("vae")
    theirs.save_pretrained(path)
    return path


def public(model):
    names = {*dir(diffusers.AutoencoderKLCogVideoX), *dir(model)}
    return sorted(name for name in names if not name.startswith("_"))


def outcome(use, model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' own, of what is deprecated
        try:
            return use(model, folder), None
        except Exception as error:
            return None, error


def assert_same(got, due, name):
    if isinstance(due, torch.Tensor):
        assert got.dtype == due.dtype and distance(got.detach(), due.detach()) < 1e-5, name
    elif callable(due) and not isinstance(due, type | torch.nn.Module):
        assert callable(got), f"{name}: say in the table how it is used"
        assert name in MODULE, f"{name}: say in the table how it is used"
    elif isinstance(due, torch.nn.Module):
        assert isinstance(got, torch.nn.Module), name
    else:
        assert got == due, name


def test_every_public_name(theirs, folder, tmp_path, monkeypatch):
    for owner in (diffusers.AutoencoderKLCogVideoX, EqxAutoencoderKLCogVideoX):
        monkeypatch.setattr(owner, "_auto_class", None)
    names = public(theirs)
    assert len(names) > 100
    loaded = EqxAutoencoderKLCogVideoX.from_pretrained(folder)
    for name in names:
        # A use may change the model, and looking at a name does not.
        ours, other = loaded, theirs
        if name in USES:
            ours, other = EqxAutoencoderKLCogVideoX(loaded.vae), copy.deepcopy(theirs)
        use = USES.get(name, lambda v, _, name=name: getattr(v, name))
        got, error = outcome(use, ours, folder)
        if name in REFUSED:
            with pytest.raises(Exception, match=REFUSED[name]):
                raise error or AssertionError(f"{name} does not raise")
            assert "\n" not in str(error), name
            continue
        due, their_error = outcome(use, other, folder)
        if their_error is not None:
            # What the machine or the class itself lacks, such as a GPU or a buffer of that name.
            assert type(error) is type(their_error), (name, error, their_error)
            continue
        assert error is None, (name, error)
        assert_same(got, due, name)
