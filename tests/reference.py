"""diffusers' VAE beside ours: the same weights, arrays in and out in our layout."""

import warnings
from typing import NamedTuple

import diffusers
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch

import eqx_cogvae as cv

# The one that tests share where depth is not the point, so that they share programs as well.
SHALLOW = cv.Config(
    block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=3
)


def reference(config, seed=0):
    """A diffusers model with random weights; norms too, which torch starts at one and zero."""
    fields = config.to_dict()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = diffusers.AutoencoderKLCogVideoX(**fields).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.empty_like(parameter).normal_(generator=generator)
            if "norm" in name and parameter.ndim == 1:
                start = 1.0 if name.endswith("weight") else 0.0
                parameter.copy_(start + 0.2 * noise)
    return model


class Pair(NamedTuple):
    """Ours and diffusers', with the same weights."""

    vae: cv.VAE
    model: diffusers.AutoencoderKLCogVideoX

    def __repr__(self):
        return "Pair(...)"  # hypothesis prints arguments, and a model is 600 kB of text


def pair(config, path, *, seed=0, dtype=None, model=None):
    """Ours and diffusers', by way of a checkpoint that diffusers writes."""
    model = reference(config, seed) if model is None else model
    model.save_pretrained(path)
    return Pair(cv.from_pretrained(path, dtype=dtype), model)


def to_torch(x):
    """BTHWC to a BCTHW tensor."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


def from_torch(x):
    """BCTHW to a BTHWC array of float32."""
    return np.moveaxis(x.detach().float().numpy(), 1, -1)


def encode(model, video):
    """The means and log variances of diffusers."""
    with torch.no_grad():
        posterior = model.encode(to_torch(video).to(model.dtype)).latent_dist
    return from_torch(posterior.mean), from_torch(posterior.logvar)


def decode(model, latents):
    """diffusers' decoded video."""
    with torch.no_grad():
        return from_torch(model.decode(to_torch(latents).to(model.dtype)).sample)


def quietly(fn, *args):
    """Calls `fn` where its advice on frame counts, sizes and ranges is beside the point."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*nearest good counts")
        warnings.filterwarnings("ignore", message=r"frames of \d+x\d+ come back as")
        warnings.filterwarnings("ignore", message=r"video must lie in \[-1, 1\], and all values")
        return fn(*args)


def thinned(vae):
    """Returns the model with one residual block in each block, which compiles in half the time."""
    is_block = lambda node: hasattr(node, "resnets")  # noqa: E731

    def thin(node):
        if not is_block(node):
            return node
        return eqx.tree_at(lambda block: block.resnets, node, node.resnets[:1])

    return jax.tree.map(thin, vae, is_leaf=is_block)


def normal(shape, seed=0, dtype=jnp.float32):
    """Gaussian noise."""
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def distance(got, due):
    """Relative, in L2."""
    got, due = np.asarray(got, np.float64), np.asarray(due, np.float64)
    assert got.shape == due.shape, (got.shape, due.shape)
    return np.linalg.norm(got - due) / np.linalg.norm(due)
