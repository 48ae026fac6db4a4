"""The CogVideoX video VAE as Equinox modules."""

from ._autoencoder import VAE as VAE, Decoder as Decoder, Encoder as Encoder
from ._checkpoint import (
    from_original as from_original,
    from_pretrained as from_pretrained,
    save_pretrained as save_pretrained,
)
from ._config import Config as Config
from ._frames import crop_frames as crop_frames, pad_frames as pad_frames
from ._latents import (
    Latents as Latents,
    fingerprint as fingerprint,
    load_latents as load_latents,
    save_latents as save_latents,
)
from ._plan import Cost as Cost, Plan as Plan, plan as plan
from ._posterior import DiagonalGaussian as DiagonalGaussian
from ._quantised import dequantised as dequantised, quantised as quantised
from ._transforms.framewise import framewise as framewise
from ._transforms.sharded import best_mesh as best_mesh, sharded as sharded
from ._transforms.sliced import sliced as sliced
from ._transforms.streamed import as_uint8 as as_uint8, streamed as streamed
from ._transforms.tiled import blend as blend, tiled as tiled

__version__ = "0.1.0"
