"""The CogVideoX video VAE as Equinox modules."""

from ._autoencoder import (
    VAE as VAE,
    Decoder as Decoder,
    Encoder as Encoder,
    crop_frames as crop_frames,
    pad_frames as pad_frames,
)
from ._config import Config as Config
from ._posterior import DiagonalGaussian as DiagonalGaussian

__version__ = "0.1.0"
