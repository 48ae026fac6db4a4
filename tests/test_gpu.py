"""On a GPU: the numbers of diffusers there, and memory that torch and JAX share.

python -m pytest tests/test_gpu.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import distance, reference

import eqx_cogvae as cv
from eqx_cogvae.diffusers import EqxAutoencoderKLCogVideoX, to_jax, to_torch

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "gpu" or not torch.cuda.is_available(),
    reason="needs an NVIDIA GPU that both JAX and torch reach",
)

CONFIG = cv.Config(
    block_out_channels=(16, 32, 32, 64), layers_per_block=1, norm_num_groups=8, latent_channels=16
)
FRAMES, HEIGHT, WIDTH = 17, 64, 96


@pytest.fixture(scope="module")
def model():
    return reference(CONFIG).to("cuda")


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("vae")
    model.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def full_precision():
    """Products of float32 in float32: both libraries else round what they multiply to TF32.

    Not by the context manager: torch's backward passes run in a thread of their own.
    """
    before = torch.backends.cudnn.allow_tf32, jax.config.jax_default_matmul_precision
    torch.backends.cudnn.allow_tf32 = False
    jax.config.update("jax_default_matmul_precision", "highest")
    yield
    torch.backends.cudnn.allow_tf32 = before[0]
    jax.config.update("jax_default_matmul_precision", before[1])


def noise(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def clip(dtype=torch.float32):
    return noise(1, 3, FRAMES, HEIGHT, WIDTH, dtype=dtype).clamp(-1, 1)


def latents(dtype=torch.float32):
    return noise(1, 16, 5, HEIGHT // 8, WIDTH // 8, dtype=dtype)


def apart(got, due):
    return distance(got.detach().cpu().float(), due.detach().cpu().float())


def calls(vae, dtype=torch.float32):
    with torch.no_grad():
        return vae.encode(clip(dtype)).latent_dist.mean, vae.decode(latents(dtype)).sample


def test_numbers(folder, model):
    vae = EqxAutoencoderKLCogVideoX.from_pretrained(folder)
    assert vae.device == torch.device("cuda", 0)
    for got, due in zip(calls(vae), calls(model), strict=True):
        assert got.device == due.device
        assert apart(got, due) < 1e-5


def test_numbers_in_half_precision(folder, model):
    vae = EqxAutoencoderKLCogVideoX.from_pretrained(folder, torch_dtype=torch.bfloat16)
    half = type(model).from_pretrained(folder, torch_dtype=torch.bfloat16).to("cuda").eval()
    both = zip(calls(vae, torch.bfloat16), calls(half, torch.bfloat16), calls(model), strict=True)
    for got, theirs, exact in both:
        assert apart(got, exact) < 1.5 * apart(theirs, exact)


def test_gradients(folder, model):
    vae, grads = EqxAutoencoderKLCogVideoX.from_pretrained(folder), []
    for each in (vae, model):
        z = latents().requires_grad_()
        grads += torch.autograd.grad(each.decode(z).sample.pow(2).sum(), z)
    assert apart(*grads) < 1e-4


def test_memory_is_shared():
    x = noise(1, 3, 2, 8, 8).to(memory_format=torch.channels_last_3d)
    y = to_jax(x)
    assert y.unsafe_buffer_pointer() == x.data_ptr()
    back = to_torch(y)
    assert back.data_ptr() == x.data_ptr() and torch.equal(back, x)


def test_torch_waits_for_jax_and_jax_for_torch():
    """Each runs ahead of its GPU: what crosses must be computed before it is read."""
    w = noise(2048, 2048) / 90  # small enough for a turn to forget what rounding did before it

    @jax.jit
    def slow(x, w):
        return jax.lax.fori_loop(0, 200, lambda _, y: jnp.tanh(x + y @ w), x)

    for seed in range(1, 6):
        x = y = noise(2048, 2048, seed=seed)
        for _ in range(50):
            y = torch.tanh(x + y @ w)
        got = to_torch(slow(to_jax(y), to_jax(w))) * 2
        due = jax.device_get(slow(jnp.asarray(y.cpu().numpy()), to_jax(w))) * 2
        assert distance(got.cpu(), due) < 1e-5


def test_it_moves_between_devices(folder):
    vae = EqxAutoencoderKLCogVideoX.from_pretrained(folder)
    due = calls(vae)[1]
    cpu = vae.to("cpu")
    assert cpu.device == torch.device("cpu")
    with torch.no_grad():
        got = cpu.decode(latents().cpu()).sample
    assert apart(got, due) < 1e-4
    with pytest.raises(ValueError, match="move one of them"):
        vae.decode(latents())
    assert apart(calls(vae.to("cuda"))[1], due) < 1e-6


def test_streamed_is_the_whole(folder):
    vae = cv.from_pretrained(folder)
    z = jax.random.normal(jax.random.key(0), (1, 5, HEIGHT // 8, WIDTH // 8, 16))
    pieces = [jax.device_get(piece) for piece in cv.streamed(vae.decode_step, 2)(z)]
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), vae.decode(z))


def test_weights_in_8_bits(folder):
    small = cv.quantised(cv.from_pretrained(folder), "float8_e4m3fn")
    z = jax.random.normal(jax.random.key(0), (1, 3, HEIGHT // 8, WIDTH // 8, 16))
    assert distance(small.decode(z), cv.dequantised(small).decode(z)) < 1e-5
