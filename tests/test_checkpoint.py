"""Checkpoints: diffusers' layout, the hub's, the original's, and files that are none of these."""

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import diffusers
import equinox as eqx
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from reference import decode, distance, encode, normal, quietly, reference

import eqx_cogvae as cv
from eqx_cogvae._checkpoint import (
    checkpoint as _checkpoint,
    files as _checkpoint_files,
    from_original,
    from_pretrained,
    save_pretrained,
)

# diffusers differs from itself by up to 3e-6 from one memory format to another.
EQUAL = 1e-5
CONFIG = cv.Config(
    block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, layers_per_block=1
)
DEEP = cv.Config(
    block_out_channels=(8, 16, 16, 16), norm_num_groups=4, latent_channels=4, layers_per_block=1
)
QUANT = cv.Config(
    block_out_channels=(8, 16),
    norm_num_groups=4,
    latent_channels=3,
    layers_per_block=1,
    use_quant_conv=True,
    use_post_quant_conv=True,
    latents_mean=(0.1, 0.2, 0.3),
    shift_factor=0.5,
)
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
ONE = "encoder.conv_in.conv.weight"
LEVELS = len(CONFIG.block_out_channels)


@pytest.fixture(scope="module")
def model():
    return reference(CONFIG)


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    """A checkpoint by diffusers; tests copy it before they spoil it."""
    path = tmp_path_factory.mktemp("checkpoint") / "vae"
    model.save_pretrained(path)
    return path


@pytest.fixture
def folder(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "model"))


@pytest.fixture(scope="module")
def vaes():
    """Two models of one config; arrays are never written to."""
    return [cv.VAE(CONFIG, key=jax.random.key(seed)) for seed in (0, 1)]


def named(vae):
    leaves, _ = jax.tree_util.tree_flatten_with_path(vae)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def as_stored(array):
    """Back to torch's layout, written apart from the library's own."""
    return np.einsum({5: "dhwio->oidhw", 4: "hwio->oihw", 1: "c->c"}[array.ndim], array)


def assert_holds(vae, tensors):
    """The same names, shapes and bits as a torch state dict."""
    ours = named(vae)
    assert ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        array = np.asarray(ours[name])
        assert array.dtype.name == str(tensor.dtype).removeprefix("torch.")
        stored = as_stored(array.astype(np.float32))
        np.testing.assert_array_equal(stored, tensor.float().numpy(), err_msg=name)


def rewrite(folder, change):
    """Changes the tensors of a checkpoint by `change`, in place."""
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize("config", [CONFIG, QUANT], ids=["plain", "quant_conv"])
def test_loads_what_diffusers_saves(config, tmp_path):
    model = reference(config)
    model.save_pretrained(tmp_path)
    vae = from_pretrained(tmp_path)
    assert vae.config == config
    assert_holds(vae, model.state_dict())
    video = normal((1, 9, 32, 40, 3), seed=1)
    posterior = quietly(vae.encode, video)
    mean, logvar = encode(model, video)
    assert distance(posterior.mean, mean) < EQUAL
    assert distance(posterior.logvar, logvar) < EQUAL
    assert distance(vae.decode(jnp.asarray(mean)), decode(model, mean)) < EQUAL


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"max_shard_size": "100KB"}),
        (torch.bfloat16, {}),
        (torch.float16, {}),
        (torch.float16, {"variant": "fp16"}),
        (torch.bfloat16, {"variant": "bf16", "max_shard_size": "50KB"}),
    ],
    ids=["sharded", "bfloat16", "float16", "variant", "sharded variant"],
)
@pytest.mark.parametrize("below", ["", "vae", "elsewhere"])
def test_layouts_on_disk(dtype, options, below, tmp_path):
    model = reference(CONFIG).to(dtype)
    model.save_pretrained(tmp_path / below, **options)
    files = list((tmp_path / below).iterdir())
    assert (len(files) > 3) == ("max_shard_size" in options)
    vae = from_pretrained(tmp_path, subfolder="elsewhere" if below == "elsewhere" else None)
    assert_holds(vae, model.state_dict())


@pytest.mark.parametrize("dtype", ["float16", jnp.bfloat16, np.float32])
def test_dtype_is_cast_to(dtype, folder, model):
    vae = from_pretrained(str(folder), dtype=dtype)
    assert vae.dtype == dtype
    asked = getattr(torch, jnp.dtype(dtype).name)
    assert_holds(vae, {name: tensor.to(asked) for name, tensor in model.state_dict().items()})


def test_mixed_dtypes_become_float32(folder):
    rewrite(folder, lambda tensors: tensors.update({ONE: tensors[ONE].bfloat16()}))
    assert {leaf.dtype.name for leaf in named(from_pretrained(folder)).values()} == {"float32"}


def test_mesh_replicates(folder):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    vae = from_pretrained(folder, mesh=mesh)
    for leaf in named(vae).values():
        assert leaf.sharding == jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    assert eqx.tree_equal(vae, from_pretrained(folder))


def test_default_configuration_has_the_names_and_shapes_of_diffusers():
    with torch.device("meta"):
        model = diffusers.AutoencoderKLCogVideoX()
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ours = named(eqx.filter_eval_shape(lambda: cv.VAE(cv.Config(), key=jax.random.key(0))))
    permuted = {3: (4, 3, 0, 1, 2), 2: (3, 2, 0, 1), -1: (0,)}
    assert len(ours) == 436
    assert sum(leaf.size for leaf in ours.values()) == 215_583_907
    assert theirs == {
        name: tuple(leaf.shape[axis] for axis in permuted[leaf.ndim - 2])
        for name, leaf in ours.items()
    }


_LOAD = """
import sys
from eqx_cogvae._checkpoint import from_pretrained
import jax

def kilobytes(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))

from_pretrained(sys.argv[1])
before = kilobytes("VmRSS")
vae = from_pretrained(sys.argv[2], dtype=sys.argv[3])
print(1024 * (kilobytes("VmHWM") - before), sum(leaf.nbytes for leaf in jax.tree.leaves(vae)))
"""
# torch maps the file, and mapped pages are not counted here: the system may drop them. Memory is
# looked at where most of it is in use: after a tensor was copied.
_LOAD_TORCH = """
import sys
from eqx_cogvae._checkpoint import checkpoint, from_original
import jax

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

real, seen = checkpoint._is_finite, []
checkpoint._is_finite = lambda array: (seen.append(anonymous()), real(array))[1]
from_original(sys.argv[1] + "/3d-vae.pt", sys.argv[1])
before = anonymous()
seen.clear()
vae = from_original(sys.argv[2] + "/3d-vae.pt", sys.argv[2], dtype=sys.argv[3])
print(max(seen) - before, sum(leaf.nbytes for leaf in jax.tree.leaves(vae)))
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(),
    reason="peak memory is read from /proc, which this system lacks",
)
@pytest.mark.parametrize(
    ("dtype", "script"),
    [
        pytest.param("float32", _LOAD, id="float32-safetensors"),
        pytest.param("bfloat16", _LOAD_TORCH, id="bfloat16-torch"),
        pytest.param("bfloat16", _LOAD, id="bfloat16-safetensors", marks=pytest.mark.full),
        pytest.param("float32", _LOAD_TORCH, id="float32-torch", marks=pytest.mark.full),
    ],
)
def test_memory_stays_within_the_weights_and_two_tensors(dtype, script, folder, tmp_path):
    config = cv.Config(block_out_channels=(192,), layers_per_block=1)
    save_pretrained(cv.VAE(config, key=jax.random.key(0)), tmp_path / "large")
    for each in (folder, tmp_path / "large") if script is _LOAD_TORCH else ():
        torch.save(safetensors.torch.load_file(each / WEIGHTS), each / "3d-vae.pt")
    root = Path(cv.__file__).parents[1]
    arguments = [sys.executable, "-c", script, folder, tmp_path / "large", dtype]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    out = subprocess.check_output(arguments, cwd=root, env=environment, text=True)
    peak, weights = map(int, out.split())
    tensor = 192 * 192 * 27 * 4
    assert weights > 6 * tensor // (1 if dtype == "float32" else 2)
    assert peak < weights + 2 * tensor


@pytest.mark.parametrize("config", [DEEP, QUANT], ids=["plain", "quant_conv"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_diffusers_loads_what_we_save(config, dtype, tmp_path):
    model = reference(config).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "theirs")
    save_pretrained(from_pretrained(tmp_path / "theirs"), tmp_path / "new" / "ours")
    assert {path.name for path in (tmp_path / "new" / "ours").iterdir()} == {"config.json", WEIGHTS}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["ours"]
    back = diffusers.AutoencoderKLCogVideoX.from_pretrained(
        tmp_path / "new" / "ours", torch_dtype=getattr(torch, dtype)
    )
    theirs = {k: v for k, v in model.config.items() if not k.startswith("_")}
    assert {k: v for k, v in back.config.items() if not k.startswith("_")} == theirs
    tensors = back.state_dict()
    assert tensors.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_saved_files_say_what_they_are(folder, tmp_path):
    vae = from_pretrained(folder)
    save_pretrained(vae, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["_class_name"] == "AutoencoderKLCogVideoX"
    assert config["_diffusers_version"]
    with safetensors.safe_open(tmp_path / "ours" / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert eqx.tree_equal(from_pretrained(tmp_path / "ours"), vae)


def test_saving_over_a_sharded_checkpoint(tmp_path, model):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    (tmp_path / "README.md").write_text("kept")
    vae = from_pretrained(tmp_path)
    vae = eqx.tree_at(lambda vae: vae.decoder.conv_out.conv.bias, vae, jnp.ones(3))
    save_pretrained(vae, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "config.json", WEIGHTS}
    assert eqx.tree_equal(from_pretrained(tmp_path), vae)


@pytest.mark.parametrize("there", [False, True], ids=["new", "existing"])
def test_a_failed_save_leaves_nothing(there, folder, tmp_path, monkeypatch):
    def fail(path, tensors, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    vae = from_pretrained(folder)
    monkeypatch.setattr(_checkpoint, "write_safetensors", fail)
    target = folder if there else tmp_path / "new" / "ours"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(OSError, match="no space left"):
        save_pretrained(vae, target)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda vae: eqx.tree_at(lambda v: v.decoder.conv_in, vae, None), r"decoder\.conv_in\."),
        (
            lambda vae: eqx.tree_at(lambda v: v.encoder.norm_out.bias, vae, jnp.zeros(3)),
            r"1 places, such as encoder\.norm_out\.bias",
        ),
    ],
)
def test_a_model_that_is_not_whole_is_not_saved(change, match, folder, tmp_path):
    with pytest.raises(ValueError, match=match):
        save_pretrained(change(from_pretrained(folder)), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_save_refuses(vaes, tmp_path):
    vae = vaes[0]
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="it is a file, name a directory"):
        save_pretrained(vae, tmp_path / "file")
    key = jax.random.key(0)
    shapes = eqx.filter_eval_shape(lambda: cv.VAE(CONFIG, key=key))
    with pytest.raises(ValueError, match=r"in \d+ places, such as decoder\.conv_in\.conv\.bias"):
        save_pretrained(shapes, tmp_path / "ours")
    vae = cv.VAE(CONFIG, key=key, pad_mode="replicate")
    with pytest.raises(ValueError, match=r"with decoder\.conv_in\.pad_mode='replicate': diff"):
        save_pretrained(vae, tmp_path / "ours")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda v: eqx.tree_at(lambda v: v.decoder, v, None), r"such as decoder\.conv_in\."),
        (lambda v: eqx.tree_at(lambda v: v.encoder, v, None), r"such as encoder\.conv_in\."),
        (lambda v: replaced(v, act_fn="relu"), r"with encoder\.mid_block\.\S+\.act_fn='relu': "),
        (lambda v: replaced(v, norm1=jnp.tanh), r"in 2 places, such as encoder\.mid_block\."),
    ],
    ids=["no decoder", "no encoder", "activation", "norm"],
)
def test_a_model_that_its_config_does_not_describe_is_not_saved(change, match, vaes, tmp_path):
    with pytest.raises(ValueError, match=match) as info:
        save_pretrained(change(vaes[0]), tmp_path / "ours")
    assert "\n" not in str(info.value)
    assert not list(tmp_path.iterdir())


def replaced(vae, **fields):
    """The model with other fields in one of its blocks."""
    at = lambda vae: vae.encoder.mid_block.resnets[0]  # noqa: E731
    block = copy.copy(at(vae))
    for name, value in fields.items():
        object.__setattr__(block, name, value)
    return eqx.tree_at(at, vae, block)


@pytest.mark.parametrize("below", ["", "sub"])
def test_saving_over_a_dangling_link(below, folder, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    match = r"cannot write \S+: \S+link is a link to \S+nowhere, which does not exist"
    with pytest.raises(FileNotFoundError, match=match):
        save_pretrained(from_pretrained(folder), link / below)
    assert sorted(tmp_path.iterdir()) == [link, folder] and link.is_symlink()
    (tmp_path / "nowhere").mkdir()
    save_pretrained(from_pretrained(folder), link / below)
    assert (tmp_path / "nowhere" / below / WEIGHTS).exists()
    assert not list(tmp_path.rglob("*.partial*"))


def test_below_a_file(vaes, tmp_path):
    (tmp_path / "file").write_text("")
    for below in ("ours", "a/ours"):
        match = rf"^cannot write \S+file/{below}: \S+file is a file, name a directory\.$"
        with pytest.raises(NotADirectoryError, match=match):
            save_pretrained(vaes[0], tmp_path / "file" / below)
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("other", ["run/b", "run/a", "run"])
def test_two_saves_into_a_new_folder(other, vaes, tmp_path, monkeypatch):
    """The second one begins and ends while the first one writes."""
    first, second = vaes
    real = _checkpoint.write_safetensors

    def write(*args):
        monkeypatch.setattr(_checkpoint, "write_safetensors", real)
        save_pretrained(second, tmp_path / other)
        real(*args)

    monkeypatch.setattr(_checkpoint, "write_safetensors", write)
    save_pretrained(first, tmp_path / "run" / "a")
    assert eqx.tree_equal(from_pretrained(tmp_path / "run" / "a"), first)
    if other != "run/a":
        assert eqx.tree_equal(from_pretrained(tmp_path / other), second)
    assert not list(tmp_path.rglob("*.partial*"))


def test_a_failed_save_leaves_the_folder_that_another_uses(vaes, tmp_path, monkeypatch):
    def fail(*_):
        (tmp_path / "run" / "theirs").write_text("")
        raise OSError("no space left")

    monkeypatch.setattr(_checkpoint, "write_safetensors", fail)
    with pytest.raises(OSError, match="no space left"):
        save_pretrained(vaes[0], tmp_path / "run" / "a")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["theirs"]


# The hub.


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A directory that stands for the hub, and what was asked of it."""
    asked = []

    def download(repo_id, filename, *, subfolder=None, **options):
        asked.append((repo_id, f"{subfolder}/{filename}" if subfolder else filename, options))
        path = tmp_path / "hub" / (subfolder or "") / filename
        if not path.is_file():
            raise EntryNotFoundError(f"404 Client Error: {filename}")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return tmp_path / "hub", asked


@pytest.mark.parametrize(
    ("below", "options", "files"),
    [
        ("vae", {}, ["vae/config.json", f"vae/{INDEX}", f"vae/{WEIGHTS}"]),
        ("", {}, ["vae/config.json", "config.json", INDEX, WEIGHTS]),
        ("vae", {"variant": "fp16"}, None),
        ("vae", {"max_shard_size": "400KB"}, None),
    ],
    ids=["vae", "root", "variant", "sharded"],
)
def test_hub(below, options, files, hub, model):
    path, asked = hub
    model.save_pretrained(path / below, **options)
    given = {"revision": "main", "token": "t", "cache_dir": "/cache", "local_files_only": False}
    vae = from_pretrained("someone/some-model", **given)
    assert_holds(vae, model.state_dict())
    assert all(name == "someone/some-model" and rest == given for name, _, rest in asked)
    names = [name for _, name, _ in asked]
    assert files is None or names == files
    assert "max_shard_size" not in options or f"vae/{WEIGHTS}" not in names


def test_hub_subfolder(hub, model):
    path, asked = hub
    model.save_pretrained(path / "other")
    from_pretrained("someone/some-model", subfolder="other")
    assert {name.partition("/")[0] for _, name, _ in asked} == {"other"}


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ([], r"the hub did not give vae/config\.json or config\.json \(404"),
        (["vae/config.json"], rf"did not give vae/{WEIGHTS} or vae/{INDEX} \(404"),
        (["config.json"], rf"did not give {WEIGHTS} or {INDEX} \(404"),
    ],
)
def test_hub_without_the_files(files, match, hub, written):
    for name in files:
        (hub[0] / name).parent.mkdir(parents=True)
        shutil.copy(written / "config.json", hub[0] / name)
    with pytest.raises(OSError, match=match):
        from_pretrained("someone/some-model")


def test_hub_offline(tmp_path):
    with pytest.raises(OSError, match="there is no directory 'someone/none', and the hub") as info:
        from_pretrained("someone/none", cache_dir=tmp_path, local_files_only=True)
    assert "\n" not in str(info.value)


def test_an_unreachable_hub_is_asked_once(monkeypatch):
    asked = []

    def fail(repo_id, filename, *, local_files_only, **options):
        asked.append(local_files_only)
        raise LocalEntryNotFoundError("cannot reach it")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(OSError, match=r"\(cannot reach it\): check the name"):
        from_pretrained("someone/none")
    assert asked == [False, True]


def test_hub_errors_are_one_line(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("connection reset\nby peer")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(OSError, match=r"did not give it \(connection reset\): check the name"):
        from_pretrained("someone/none")


def test_tiny_is_a_name(folder, monkeypatch):
    monkeypatch.setattr(_checkpoint_files, "_EMBEDDED", folder.parent)
    with pytest.raises(FileNotFoundError, match="embedded weights 'tiny' are missing from"):
        from_pretrained("tiny")
    folder.rename(folder.parent / "tiny")
    assert from_pretrained("tiny").config == CONFIG


# Files that will not do.


def truncate(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def configured(**fields):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def indexed(content):
    return lambda folder: (folder / INDEX).write_text(content)


def renamed(name):
    return lambda folder: (folder / WEIGHTS).rename(folder / name)


def pickled(folder):
    torch.save({"a": torch.zeros(2)}, folder / WEIGHTS)


def variants(folder):
    shutil.copy(folder / WEIGHTS, folder / "diffusion_pytorch_model.fp16.safetensors")
    renamed("diffusion_pytorch_model.bf16.safetensors")(folder)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (truncate, r"safetensors is not a complete safetensors file .*: copy or download"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b""), "not a complete safetensors file"),
        (pickled, r"is a pickle, which may run code .*load it with `from_original`"),
        (renamed("diffusion_pytorch_model.bin"), r"model\.bin is a pickle.*safe_serialization"),
        (renamed("other.safetensors"), f"there is no {WEIGHTS} in .*download it too"),
        (variants, "holds the variants bf16, fp16, and no .*leave one there"),
        (indexed("{"), "index.json is not JSON"),
        (indexed("[]"), "must hold a JSON object, got a list"),
        (indexed('{"weight_map": {"a": "../b.safetensors"}}'), "to files beside it"),
        (indexed('{"weight_map": {"a": "b.safetensors"}}'), "names b.safetensors, which is not"),
        (configured(block_channels=[8]), "did you mean 'block_out_channels'"),
        (configured(_class_name="AutoencoderKL"), "expected .*CogVideoX, got a 'AutoencoderKL'"),
        (configured(norm_num_groups=3), "in .*config.json: `norm_num_groups`=3 must divide"),
        (configured(latents_mean=7), "config.json holds a value of a wrong type"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda folder: (folder / "config.json").unlink(), r"no config\.json in .* or .*vae: give"),
    ],
)
def test_bad_checkpoints(spoil, match, folder):
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=match) as info:
        from_pretrained(folder)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("none", FileNotFoundError, "there is no directory .*none: give one"),
        ("a/b/none", FileNotFoundError, "there is no directory .*none: give one"),
        ("3d-vae.pt", ValueError, "3d-vae.pt is a pickle, .*load it with `from_original`"),
        (f"model/{WEIGHTS}", ValueError, "is a file: pass its `config=`, such as 'CogVideoX-2b'"),
        (".", FileNotFoundError, r"no config\.json.*; `from_original` reads 3d-vae\.pt"),
    ],
)
def test_bad_paths(name, error, match, folder):
    (folder.parent / "3d-vae.pt").write_bytes(b"")
    with pytest.raises(error, match=match):
        from_pretrained(folder.parent / name)


@pytest.mark.parametrize(
    ("dtype", "match"),
    [("int8", "must be one of .*got int8"), ("bf", "got bf"), ("float64", "jax_enable_x64")],
)
def test_bad_dtypes(dtype, match, folder):
    with pytest.raises(ValueError, match=match):
        from_pretrained(folder, dtype=dtype)


def test_every_fault_is_named_at_once(folder):
    def change(tensors):
        tensors["stranger"] = torch.zeros(1)
        del tensors["encoder.conv_in.conv.bias"]
        tensors[ONE] = tensors[ONE][:, :2].contiguous()
        tensors["decoder.conv_out.conv.bias"][1] = float("nan")
        tensors["decoder.conv_in.conv.bias"][0] = float("inf")
        tensors["encoder.conv_out.conv.bias"] = torch.zeros(8, dtype=torch.int32)

    rewrite(folder, change)
    with pytest.raises(ValueError, match="do not fit the model") as info:
        from_pretrained(folder)
    message = str(info.value)
    for part in (
        "1 missing: encoder.conv_in.conv.bias;",
        "1 unexpected: stranger;",
        f"1 misshapen: {ONE} [8, 2, 3, 3, 3] for [8, 3, 3, 3, 3];",
        "2 not finite: ",
        "decoder.conv_in.conv.bias",
        "decoder.conv_out.conv.bias",
        "1 not floating: encoder.conv_out.conv.bias of int32;",
        "give the config that belongs to these weights.",
    ):
        assert part in message
    assert "\n" not in message


def test_long_lists_of_faults_are_cut(folder):
    configured(layers_per_block=2)(folder)
    with pytest.raises(ValueError, match=r"\d\d missing: (\S+, ){7}\S+ and \d+ more; .*config"):
        from_pretrained(folder)


def test_overflow_is_named(folder):
    rewrite(folder, lambda tensors: tensors[ONE].view(-1)[0].fill_(1e6))
    with pytest.raises(ValueError, match=f"1 not finite: {ONE}; .*a wider dtype if float16"):
        from_pretrained(folder, dtype="float16")
    assert from_pretrained(folder, dtype="bfloat16").dtype == jnp.bfloat16


def test_a_tensor_in_two_shards(tmp_path, model):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("*-of-*.safetensors"))
    tensors = [safetensors.torch.load_file(shard) for shard in shards[:2]]
    safetensors.torch.save_file(tensors[0] | tensors[1], shards[1], {"format": "pt"})
    with pytest.raises(ValueError, match="again: copy or download all shards"):
        from_pretrained(tmp_path)


# One file, and the names that such files have.


PREFIXES = ("", "vae.", "first_stage_model.")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("names", ["diffusers", "original"])
@pytest.mark.parametrize("load", [from_pretrained, from_original])
def test_one_file(load, names, prefix, model, tmp_path):
    tensors = model.state_dict()
    held = to_original(tensors, LEVELS) if names == "original" else tensors
    held = {prefix + name: tensor.bfloat16() for name, tensor in held.items()}
    if prefix:
        held["model.diffusion_model.weight"] = torch.zeros(3)
    held[prefix + "loss.discriminator.weight"] = torch.zeros(3)
    path = tmp_path / "cogvideox_vae_bf16.safetensors"
    safetensors.torch.save_file(held, path)
    vae = load(path, config=CONFIG)
    assert vae.config == CONFIG
    assert_holds(vae, {name: tensor.bfloat16() for name, tensor in tensors.items()})


def test_one_file_takes_a_config_in_any_form(folder, tmp_path, monkeypatch):
    weights = tmp_path / "w.safetensors"
    shutil.copy(folder / WEIGHTS, weights)
    for config in (folder / "config.json", str(folder)):
        assert from_pretrained(weights, config=config).config == CONFIG
    tiny = Path(cv.__file__).parent / "tiny"
    monkeypatch.chdir(folder.parent)
    folder.rename("tiny")  # of which a preset has the name
    assert from_pretrained(weights, config="./tiny").config == CONFIG
    assert from_pretrained(tiny / WEIGHTS, config="tiny").config == cv.Config.preset("tiny")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({}, ValueError, r"w\.safetensors is a file: pass its `config=`"),
        ({"config": CONFIG, "subfolder": "vae"}, ValueError, "and no `subfolder`"),
        ({"config": "CogVideoX-3b"}, ValueError, "`config` 'CogVideoX-3b' is no file, and no pre"),
        ({"config": Path("none.json")}, FileNotFoundError, "none.json"),
        ({"config": {}}, TypeError, "`config` must be a Config, .* got a dict"),
        ({"config": "CogVideoX-2b"}, ValueError, "do not fit .*; give the config that belongs"),
    ],
)
def test_one_file_without_its_config(options, error, match, folder, tmp_path, unchecked):
    shutil.copy(folder / WEIGHTS, tmp_path / "w.safetensors")
    with pytest.raises(error, match=match) as info:
        from_pretrained(tmp_path / "w.safetensors", **options)
    assert "\n" not in str(info.value)


def test_a_config_goes_before_that_of_a_directory(folder, hub):
    given = dataclasses.replace(CONFIG, scaling_factor=0.7)
    assert from_pretrained(folder, config=given).config == given
    (folder / "config.json").unlink()
    assert from_pretrained(folder, config=given).config == given
    shutil.copytree(folder, hub[0])
    assert from_pretrained("someone/some-model", config=given).config == given
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=f"there is no {WEIGHTS} in .*model, nor an"):
        from_pretrained(folder, config=given)


def test_a_directory_with_the_names_of_the_original_and_a_loss(folder, model):
    tensors = to_original(model.state_dict(), LEVELS) | {"loss.logvar": torch.zeros(1)}
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    assert_holds(from_pretrained(folder), model.state_dict())


def test_keys_that_change_nothing(folder):
    due = from_pretrained(folder)
    configured(sample_size=256, mid_block_add_attention=True)(folder)
    with pytest.warns(UserWarning, match=r"in .*config\.json: .* are ignored: .*sample_size=256\."):
        assert eqx.tree_equal(from_pretrained(folder), due)
    fields = json.loads((folder / "config.json").read_text())
    with pytest.warns(UserWarning, match="change nothing here, and are ignored"):
        assert cv.Config.from_dict(fields) == CONFIG
    configured(num_mid_resnets=3)(folder)
    with pytest.raises(ValueError, match="unknown config key 'num_mid_resnets'"):
        from_pretrained(folder)


@pytest.mark.parametrize("small", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_weights_of_8_bits(kind, dtype, small, folder, model, tmp_path):
    tensors = {k: v.to(small) if v.ndim == 5 else v for k, v in model.state_dict().items()}
    due = {k: v.to(getattr(torch, dtype)) for k, v in tensors.items()}
    if kind == "torch":
        torch.save(tensors, tmp_path / "3d-vae.pt")
        assert_holds(from_original(tmp_path / "3d-vae.pt", CONFIG, dtype=dtype), due)
        return
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    assert_holds(from_pretrained(folder, dtype=dtype), due)


def test_weights_of_8_bits_need_a_dtype_and_torch(folder, monkeypatch):
    small = torch.float8_e4m3fn
    rewrite(folder, lambda tensors: tensors.update({ONE: tensors[ONE].to(small)}))
    with pytest.raises(ValueError, match=r"safetensors holds float8_e4m3fn weights, .* `dtype=`"):
        from_pretrained(folder)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"holds float8_e4m3fn weights, .*eqx_cogvae\[diffusers"):
        from_pretrained(folder, dtype="bfloat16")


def test_equal_numbers_of_two_types_are_not_mixed_up(folder):
    """JAX's caches and ours go by `==`, and 1 == 1.0 == True."""
    found = {}
    for factor in (1, 1.0, 1):
        configured(scaling_factor=factor)(folder)
        vae = from_pretrained(folder)
        jitted = eqx.filter_jit(lambda vae: vae)(vae)
        for config in (vae.config, jitted.config):
            assert repr(config.scaling_factor) == repr(factor)
        found[repr(vae.config)] = hash(vae.config)
    assert len(found) == 2


# The original format.


def to_original(tensors, blocks):
    """The names of zai-org's checkpoints, by their own construction."""
    result = OrderedDict()
    for name, tensor in tensors.items():
        parts = name.split(".")
        if parts[1] == "down_blocks":
            parts[1] = "down"
        elif parts[1] == "up_blocks":
            parts[1:3] = ["up", str(blocks - 1 - int(parts[2]))]
        elif parts[1] == "mid_block":
            parts[1:4] = ["mid", f"block_{int(parts[3]) + 1}"]
        words = {"resnets": "block", "conv_shortcut": "nin_shortcut"}
        parts = [words.get(part, part) for part in parts]
        name = ".".join(parts)
        name = name.replace(".downsamplers.0.", ".downsample.")
        result[name.replace(".upsamplers.0.", ".upsample.")] = tensor
    return result


def strided(tensors):
    """Each tensor with other strides, some of them parts of one larger storage."""
    result = OrderedDict()
    for name, tensor in tensors.items():
        if tensor.ndim > 1:
            result[name] = tensor.transpose(0, 1).contiguous().transpose(0, 1)
        else:
            result[name] = torch.cat([tensor, tensor])[len(tensor) :]
    return result


@pytest.mark.parametrize(
    "dress",
    [
        lambda tensors: tensors,
        strided,
        lambda tensors: {k: v.bfloat16() for k, v in strided(tensors).items()},
        lambda tensors: {"state_dict": tensors, "global_step": 7, "steps": torch.arange(3)},
        lambda tensors: {"module": {f"first_stage_model.{k}": v for k, v in tensors.items()}},
        lambda tensors: tensors | {"loss.discriminator.weight": torch.zeros(2), "loss.n": 3},
        lambda tensors: {k: torch.nn.Parameter(v) for k, v in tensors.items()},
    ],
    ids=["plain", "strided", "bfloat16", "state_dict", "module", "loss", "parameters"],
)
def test_original(dress, model, tmp_path):
    assert list(to_original({"decoder.up_blocks.0.upsamplers.0.conv.bias": 0}, 4)) == [
        "decoder.up.3.upsample.conv.bias"
    ]
    tree = dress(to_original(model.state_dict(), LEVELS))
    torch.save(tree, tmp_path / "3d-vae.pt")
    vae = from_original(tmp_path / "3d-vae.pt", CONFIG)
    dtype = torch.bfloat16 if vae.dtype == jnp.bfloat16 else torch.float32
    assert_holds(vae, {k: v.to(dtype) for k, v in model.state_dict().items()})


def test_original_module_with_its_metadata(model, tmp_path):
    tensors = model.state_dict()
    renamed = to_original(tensors, LEVELS)
    renamed._metadata = tensors._metadata
    torch.save(renamed, tmp_path / "3d-vae.pt")
    assert_holds(from_original(tmp_path / "3d-vae.pt", CONFIG), tensors)


def test_original_in_safetensors(model, tmp_path):
    path = tmp_path / "3d-vae.safetensors"
    safetensors.torch.save_file(to_original(model.state_dict(), LEVELS), path)
    vae = from_original(path, CONFIG, dtype="float16")
    assert_holds(vae, {name: tensor.half() for name, tensor in model.state_dict().items()})


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_is_never_executed(legacy, tmp_path):
    path, trace = tmp_path / "3d-vae.pt", tmp_path / "trace"
    torch.save({"a": Malicious(trace)}, path, _use_new_zipfile_serialization=not legacy)
    match = "since torch 1.6" if legacy else r"refuses .*3d-vae.pt .*(posix|nt)\.system"
    with pytest.raises(ValueError, match=match) as info:
        from_original(path)
    assert "\n" not in str(info.value)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([1, 2], "holds a value of type list, not named tensors"),
        ({"a": 7}, "'a' in .*3d-vae.pt is of type int, not a tensor: save the state"),
        ({"a": torch.zeros(2)}, r"3d-vae\.pt do not fit the model; \d+ missing: .*; 1 unexp.*: a;"),
        ({ONE: torch.zeros(2).to_sparse()}, f"1 not floating: {ONE} of torch.sparse_coo float32;"),
        ({ONE: torch.zeros(8, 2, 3, 3, 3)}, r"misshapen: .* \[8, 2, 3, 3, 3\] for \[8, 3, 3, 3,"),
        (
            torch.nn.Linear(2, 2),
            r"refuses .*Unsupported global: GLOBAL torch\.nn\S+ was not [^.]*,",
        ),
    ],
    ids=["list", "number", "names", "sparse", "shape", "module"],
)
def test_torch_files_without_a_state_dict(content, match, tmp_path):
    torch.save(content, tmp_path / "3d-vae.pt")
    with pytest.raises(ValueError, match=match) as info:
        from_original(tmp_path / "3d-vae.pt", CONFIG)
    assert "\n" not in str(info.value)


def test_files_that_torch_never_wrote(tmp_path):
    path = tmp_path / "3d-vae.pt"
    torch.save({"a": torch.zeros(2)}, path)
    for content in (path.read_bytes()[:300], b"hello", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"3d-vae\.pt is not a whole file of `torch\.save`"):
            from_original(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello", "")
    with pytest.raises(ValueError, match=r"torch refuses to read .*3d-vae\.pt"):
        from_original(path)
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    path.rename(tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w\.safetensors is a pickle of torch before 1\.6"):
        from_original(tmp_path / "w.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*3d-vae\.pt"):
        from_original(path)
    with pytest.raises(IsADirectoryError, match="name the file in it"):
        from_original(tmp_path)


def test_without_torch(model, tmp_path, monkeypatch):
    torch.save(model.state_dict(), tmp_path / "3d-vae.pt")
    monkeypatch.setitem(sys.modules, "torch", None)
    match = r"3d-vae\.pt is a file of torch's.*: pip install \"eqx_cogvae\[diffusers\]\"\."
    with pytest.raises(ImportError, match=match):
        from_original(tmp_path / "3d-vae.pt", CONFIG)


def test_original_faults_go_by_the_names_in_the_file(model, tmp_path):
    tensors = to_original(model.state_dict(), LEVELS)
    del tensors["decoder.up.1.block.0.conv1.conv.weight"]
    tensors["encoder.mid.block_1.norm1.bias"] = torch.full((16,), float("nan"))
    torch.save(tensors, tmp_path / "3d-vae.pt")
    with pytest.raises(ValueError, match=r"1 missing: decoder\.up\.1\.block.*; 1 not .*block_1"):
        from_original(tmp_path / "3d-vae.pt", CONFIG)
