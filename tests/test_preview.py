"""The tiny autoencoder: against torch, frame by frame, in every composition; and its files."""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from reference import distance, normal

import eqx_cogvae as cv
from eqx_cogvae import preview
from eqx_cogvae._flops import flops

# The published architecture: what each numbered entry of the two lists of layers is.
ENCODER = [
    *("conv", "relu"),
    *("pool 2", "halve", "memory", "memory", "memory"),
    *("pool 2", "halve", "memory", "memory", "memory"),
    *("pool 1", "halve", "memory", "memory", "memory"),
    "conv",
]
DECODER = [
    *("clamp", "conv", "relu"),
    *("memory", "memory", "memory", "double", "grow 1", "conv"),
    *("memory", "memory", "memory", "double", "grow 2", "conv"),
    *("memory", "memory", "memory", "double", "grow 2", "conv"),
    *("relu", "conv"),
]
# Of the file's tensors: kernels (out, in, height, width) of the layers that have one.
WIDTHS = {"encoder": (3, 64, 64, 64, 16), "decoder": (16, 256, 128, 64, 3)}


def convolution(tensors, name, x, **options):
    return F.conv2d(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), **options)


def memory_block(tensors, name, x, before):
    y = torch.cat([x, before], 1)
    for part in (0, 2, 4):
        y = convolution(tensors, f"{name}.conv.{part}", y, padding=1)
        y = F.relu(y) if part < 4 else y
    return F.relu(y + x)


def run(tensors, half, frames):
    """Sends one frame (b, c, h, w) after another through the layers; returns what comes out."""
    layers = {"encoder": ENCODER, "decoder": DECODER}[half]
    waiting, before, results = {}, {}, []

    def send(x, i):
        if i == len(layers):
            results.append(x)
            return
        name = f"{half}.{i}"
        kind, _, count = layers[i].partition(" ")
        if kind == "pool":
            waiting.setdefault(i, []).append(x)
            if len(waiting[i]) == int(count):
                send(convolution(tensors, f"{name}.conv", torch.cat(waiting.pop(i), 1)), i + 1)
        elif kind == "grow":
            for frame in convolution(tensors, f"{name}.conv", x).chunk(int(count), 1):
                send(frame, i + 1)
        elif kind == "memory":
            y = memory_block(tensors, name, x, before.get(i, torch.zeros_like(x)))
            before[i] = x
            send(y, i + 1)
        else:
            plain = {
                "conv": lambda: convolution(tensors, name, x, padding=1),
                "halve": lambda: convolution(tensors, name, x, padding=1, stride=2),
                "relu": lambda: F.relu(x),
                "clamp": lambda: 3 * torch.tanh(x / 3),
                "double": lambda: F.interpolate(x, scale_factor=2, mode="nearest"),
            }
            send(plain[kind](), i + 1)

    for frame in frames:
        send(frame, 0)
    return results


def to_frames(x):
    return [torch.from_numpy(np.array(x[:, i])).permute(0, 3, 1, 2) for i in range(x.shape[1])]


def to_clip(frames):
    return torch.stack(frames, 1).permute(0, 1, 3, 4, 2).numpy()


def pictures(frames, count):
    """As published: an odd count of latents loses the first three frames, an even one none."""
    return 2 * np.clip(frames[:, 3 * (count % 2) : 4 * count], 0, 1) - 1


def encoded(tensors, video):
    """As published: the last frame is repeated up to a multiple of four."""
    frames = to_frames((video + 1) / 2)
    frames += [frames[-1]] * (-len(frames) % 4)
    return to_clip(run(tensors, "encoder", frames))


def shapes():
    """Name and shape of every tensor of the published file."""
    for half, layers in (("encoder", ENCODER), ("decoder", DECODER)):
        widths, level = WIDTHS[half], 0
        for i, layer in enumerate(layers):
            kind, _, count = layer.partition(" ")
            name, width = f"{half}.{i}", widths[level]
            if kind == "memory":
                for part, wide in ((0, 2), (2, 1), (4, 1)):
                    yield f"{name}.conv.{part}.weight", (width, wide * width, 3, 3)
                    yield f"{name}.conv.{part}.bias", (width,)
            elif kind == "pool":
                yield f"{name}.conv.weight", (width, int(count) * width, 1, 1)
            elif kind == "grow":
                yield f"{name}.conv.weight", (int(count) * width, width, 1, 1)
            elif kind == "halve":
                yield f"{name}.weight", (width, width, 3, 3)
            elif kind == "conv":
                # The decoder's third level keeps its width, on the way to the last layer.
                last = i + 1 == len(layers)
                stays = half == "decoder" and level == 3 and not last
                other = (
                    width if stays else widths[level + 1 if half == "decoder" or not last else -1]
                )
                level += not stays
                yield f"{name}.weight", (other, width, 3, 3)
                if layers[i - 1] in ("clamp", "relu") or half == "encoder":
                    yield f"{name}.bias", (other,)


@pytest.fixture(scope="module")
def tensors():
    """Random, and so scaled that pictures have contrast and few pixels are cut off."""
    generator = torch.Generator().manual_seed(0)
    held = {}
    for name, shape in shapes():
        noise = torch.randn(shape, generator=generator)
        fan_in = np.prod(shape[1:])
        held[name] = noise * 0.05 if len(shape) == 1 else noise * (1.4 / fan_in) ** 0.5
    held["decoder.22.weight"] *= 0.2
    held["decoder.22.bias"] += 0.5
    return held


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Tiny convolutions take longest where many threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def latents():
    return 2 * normal((1, 13, 1, 2, 16))


@pytest.fixture(scope="module")
def frames(latents, tensors):
    """What torch makes of all latents. No frame depends on a later latent."""
    return to_clip(run(tensors, "decoder", to_frames(latents)))


@pytest.fixture(scope="module")
def path(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("preview") / "taecvx.safetensors"
    safetensors.torch.save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def tiny(path):
    return preview.load(path)


def joined(stream):
    return np.concatenate([np.asarray(piece) for piece in stream], axis=1)


def test_the_published_counts_of_parameters(tiny):
    """9.84 and 1.47 million, as published."""
    count = lambda half: sum(leaf.size for leaf in jax.tree.leaves(half))  # noqa: E731
    assert (count(tiny.decoder), count(tiny.encoder)) == (9_844_611, 1_470_928)


def test_a_fiftieth_of_the_arithmetic():
    """The publisher's figure is 51, for a long clip; nothing is compiled."""
    z = jax.ShapeDtypeStruct((1, 13, 8, 12, 16), jnp.float32)
    key = jax.random.key(0)
    counts = []
    for make in (lambda: cv.VAE(cv.Config(), key=key), lambda: preview.Preview(key=key)):
        step = eqx.filter_eval_shape(make).decode_step
        traced = eqx.filter_make_jaxpr(lambda step, z: cv.framewise(step, 2)(z))(step, z)
        counts.append(flops(traced[0]))
    assert counts[0] / counts[1] == pytest.approx(51, rel=0.03)


@pytest.mark.parametrize(
    "count",
    [pytest.param(n, marks=() if n in (1, 2, 3, 4, 7) else pytest.mark.full) for n in range(1, 14)],
)
def test_decoding_equals_torch(count, tiny, latents, frames):
    due = pictures(frames, count)
    assert due.shape[1] == (4 * count if count % 2 == 0 else 4 * count - 3)
    assert np.mean(np.abs(due) == 1) < 0.5 < 10 * due.std()
    got = np.asarray(tiny.decode(latents[:, :count]))
    assert distance(got, due) < 1e-5
    stream = cv.streamed(tiny.decode_step, 2, ahead=False)(latents[:, :count])
    np.testing.assert_array_equal(joined(stream), got)


@pytest.mark.parametrize(
    "count",
    [pytest.param(n, marks=() if n < 6 or n == 13 else pytest.mark.full) for n in range(1, 14)],
)
def test_encoding_equals_torch(count, tiny, tensors):
    video = np.tanh(np.asarray(normal((1, count, 8, 16, 3), count)))
    due = encoded(tensors, video)
    assert due.shape == (1, -(-count // 4), 1, 2, 16)
    feed = (video[:, i] for i in range(count))
    got = joined(cv.streamed(tiny.encode_step, 4, first=4)(feed))
    assert distance(got, due) < 1e-5
    if count in (3, 13):
        assert distance(tiny.encode(video), due) < 1e-5


def test_a_latent_alone_first_gives_one_frame(tiny, latents, frames):
    """With `first=1` the first batch is odd also where the count is even."""
    due = 2 * np.clip(frames[:, 3:16], 0, 1) - 1
    assert distance(cv.framewise(tiny.decode_step, 2, first=1)(latents[:, :4]), due) < 1e-5


def test_every_transform_applies(tiny, latents):
    clips = jnp.concatenate([latents[:, :2], latents[:, 5:7]])
    due = tiny.decode(clips)
    whole = cv.framewise(tiny.decode_step, 2)
    mesh = cv.best_mesh(clips.shape, jax.devices()[:1])
    for fn in (
        eqx.filter_jit(whole),
        cv.sliced(whole),
        cv.sharded(whole, mesh, batch="batch"),
        cv.tiled(whole, (1, 2), (0, 0)),
    ):
        assert distance(fn(clips), due) < 1e-6


def test_only_the_last_batch_is_padded(tiny):
    """The VAE's own batches, of which the first takes the remainder."""
    with pytest.raises(ValueError, match=r"batch of 9 frames was padded.*`framewise\(preview\.enc"):
        cv.framewise(tiny.encode_step, 8)(jnp.zeros((1, 17, 8, 8, 3)))


@pytest.mark.parametrize(
    ("call", "shape", "message"),
    [
        ("decode", (1, 1, 2, 2, 4), "latents must be BTHWC with 16 channels"),
        ("decode", (1, 16, 1, 2, 2), "looks like BCTHW"),
        ("encode", (1, 1, 16, 16, 4), "drop an alpha channel"),
        ("encode", (1, 1, 4, 16, 3), "8x8 in height and width"),
    ],
)
def test_wrong_shapes(call, shape, message, tiny, unchecked):
    with pytest.raises(ValueError, match=message):
        getattr(tiny, call)(jnp.zeros(shape))


def test_pixel_values_are_refused(tiny):
    with pytest.raises(ValueError, match=r"must lie in \[-1, 1\]"):
        tiny.encode(np.full((1, 4, 16, 16, 3), 255.0, np.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_both_kinds_of_file_in_their_own_dtype(dtype, tensors, tmp_path):
    held = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    torch.save(held, tmp_path / "taecvx.pth")
    safetensors.torch.save_file(held, tmp_path / "taecvx.safetensors")
    one, other = (preview.load(tmp_path / f"taecvx.{kind}") for kind in ("pth", "safetensors"))
    assert one.dtype == other.dtype == str(dtype).removeprefix("torch.")
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
    assert preview.load(tmp_path / "taecvx.pth", dtype=jnp.float32).dtype == jnp.float32


def zeros(*shape, dtype=torch.float16):
    """One number in the file, for the whole tensor."""
    return torch.zeros((), dtype=dtype).expand(shape)


def changed(remove=None, **tensors):
    held = {name: zeros(*shape) for name, shape in shapes() if name != remove}
    return held | {name.replace("_", "."): tensor for name, tensor in tensors.items()}


WRONG = {
    "another model's names": (
        lambda: {"conv": zeros(3)},
        r"lacks \d+ tensors.*has besides 1.*conv",
    ),
    "one tensor missing": (lambda: changed("decoder.1.bias"), r"lacks 1 tensors, .*decoder\.1\.b"),
    "one more": (lambda: changed(x=zeros(1)), "has besides 1 tensors, such as x"),
    "another model's channels": (
        lambda: changed(decoder_1_weight=zeros(256, 32, 3, 3)),
        r"decoder\.1\.weight is float16 of \(256, 32, 3, 3\).*must be floating, for 256 channels",
    ),
    "whole numbers": (
        lambda: changed(decoder_1_bias=zeros(256, dtype=torch.int32)),
        r"decoder\.1\.bias is int32",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_tensors_are_one_error(wrong, tmp_path):
    make, message = WRONG[wrong]
    path = tmp_path / "a.pth"
    torch.save(make(), path)
    with pytest.raises(ValueError, match=message) as caught:
        preview.load(path)
    assert str(path) in str(caught.value) and "taecvx" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights", "half", "a list"])
def test_wrong_files_are_one_error(content, kind, path, tmp_path):
    wrong = tmp_path / f"a.{kind}"
    if content == "half":
        content = path.read_bytes()[: path.stat().st_size // 2]
    if content == "a list":
        torch.save([1, 2], wrong)
    else:
        wrong.write_bytes(content)
    with pytest.raises(ValueError, match=r"is not a file of weights \(.*give taecvx") as caught:
        preview.load(wrong)
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*: download taecvx"):
        preview.load(tmp_path / "taecvx.pth")
    with pytest.raises(IsADirectoryError, match="is a directory, name taecvx"):
        preview.load(tmp_path)


def test_a_pth_without_torch(tmp_path, monkeypatch):
    torch.save(changed(), tmp_path / "taecvx.pth")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"torch, which is missing: .*\.safetensors"):
        preview.load(tmp_path / "taecvx.pth")
