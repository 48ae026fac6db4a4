"""The numbers that define a CogVideoX VAE, under diffusers' names."""

import dataclasses
import difflib
import math
import reprlib
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array

from ._frames import LATENT_BATCH, SAMPLE_BATCH, frame_batches

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
}
"""Activations by the names that diffusers gives them."""
# Beyond any network that fits a device, and where no size of an array overflows.
_WIDEST = 2**16
_DEEPEST = 12
_LARGEST = 2**31 - 1

# Keys of published configs that diffusers' class does not know either: sizes that were trained
# on, an attention that this network has not, and what other libraries write down.
_HARMLESS = {
    *("sample_size", "sample_frames", "mid_block_add_attention"),
    *("dtype", "torch_dtype", "architectures", "model_type", "transformers_version"),
}

_PRESETS: dict[str, dict[str, Any]] = {
    "cogvideox-2b": {},
    "cogvideox-5b": {"scaling_factor": 0.7},
    "cogvideox1.5-5b": {"scaling_factor": 0.7, "invert_scale_latents": True},
    "tiny": {
        "block_out_channels": (16, 32, 32, 56),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "sample_height": 128,
        "sample_width": 192,
        "scaling_factor": 0.2729,
    },
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Hyperparameters of a `VAE`, with the fields and defaults of diffusers' own class.

    **Arguments:**

    - `in_channels`, `out_channels`: channels of video.
    - `down_block_types`, `up_block_types`: diffusers' names of blocks; if left out they follow
        the length of `block_out_channels`.
    - `block_out_channels`: the width of each level, from full resolution down. Each level but
        the last halves height and width.
    - `latent_channels`: channels of latents; the encoder returns twice as many, means and log
        variances.
    - `layers_per_block`: resnets in each block of the encoder; the decoder has one more.
    - `act_fn`: `"silu"`, `"swish"`, `"mish"`, `"gelu"` or `"relu"`.
    - `norm_eps`, `norm_num_groups`: epsilon and number of groups of the group norms; the number
        divides every width.
    - `temporal_compression_ratio`: frames per latent frame, a power of two.
    - `sample_height`, `sample_width`: size in pixels of the videos that were trained on. The
        network takes any size; `EqxAutoencoderKLCogVideoX` makes its tiles half as large.
    - `scaling_factor`, `shift_factor`, `latents_mean`, `latents_std`, `invert_scale_latents`: the
        diffusion model's units, for `VAE.scale_latents`. The network does not use them.
        `latents_mean` and `latents_std` have an entry for each latent channel.
    - `force_upcast`: kept for diffusers, and without effect.
    - `use_quant_conv`, `use_post_quant_conv`: True if a 1x1x1 convolution follows the encoder, or
        precedes the decoder.

    **Raises:** `ValueError` for a number that makes no network.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] | None = None
    up_block_types: tuple[str, ...] | None = None
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    latent_channels: int = 16
    layers_per_block: int = 3
    act_fn: str = "silu"
    norm_eps: int | float = 1e-6
    norm_num_groups: int = 32
    temporal_compression_ratio: int | float = 4
    sample_height: int = 480
    sample_width: int = 720
    scaling_factor: int | float = 1.15258426
    shift_factor: int | float | None = None
    latents_mean: tuple[int | float, ...] | None = None
    latents_std: tuple[int | float, ...] | None = None
    force_upcast: bool | float = True
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False
    invert_scale_latents: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if isinstance(getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(getattr(self, field.name)))
        _check_integers(self)
        blocks = len(self.block_out_channels)
        for name, kind in (("down", "CogVideoXDownBlock3D"), ("up", "CogVideoXUpBlock3D")):
            field, due = f"{name}_block_types", (kind,) * blocks
            if getattr(self, field) is None:
                object.__setattr__(self, field, due)
            elif getattr(self, field) != due:
                raise ValueError(
                    f"`{field}` must be {blocks} times {kind!r}, one for each of "
                    f"`block_out_channels`, got {shown(getattr(self, field))}."
                )
        _check_numbers(self)
        _check_switches(self)
        _check_statistics(self)

    @property
    def spatial_compression(self) -> int:
        """Pixels per latent cell, along height and along width."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def temporal_levels(self) -> int:
        """Base-2 logarithm of `temporal_compression_ratio`."""
        return int(math.log2(self.temporal_compression_ratio))

    @property
    def temporal_compression(self) -> int:
        """Sample frames per latent frame in a steady frame batch.

        Each level but the last halves the frame count at most once.
        """
        return 2 ** min(self.temporal_levels, len(self.block_out_channels) - 1)

    def latent_frames(self, t: int) -> int:
        """Returns how many latent frames a clip encodes to.

        **Arguments:**

        - `t`: number of sample frames.

        **Returns:** number of latent frames, for frame batches of 8.
        """
        return sum(map(self._down, frame_batches(t, SAMPLE_BATCH)))

    def sample_frames(self, t: int, first: int | None = None) -> int:
        """Returns how many sample frames a clip decodes to.

        **Arguments:**

        - `t`: number of latent frames.
        - `first`: number of latent frames in the first batch, as in `framewise`; None lets it
            take the remainder.

        **Returns:** number of sample frames, for frame batches of 2.
        """
        if first is None:
            return sum(map(self._up, frame_batches(t, LATENT_BATCH)))
        begun = min(first, t)
        return self._up(begun) + (t - begun) * self.temporal_compression

    def _down(self, t: int) -> int:
        for _ in range(int(math.log2(self.temporal_compression))):
            t = t // 2 + t % 2
        return t

    def _up(self, t: int) -> int:
        for _ in range(int(math.log2(self.temporal_compression))):
            t = 2 * t - t % 2
        return t

    def __eq__(self, other: object) -> bool:
        # 1 and 1.0 are told apart: a cache of JAX's or our own would give one model the other's
        # config. Dataclasses derive the hash from the fields, which agrees.
        return self is other or (isinstance(other, Config) and repr(self) == repr(other))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Config":
        """Returns the config in the contents of a diffusers `config.json`.

        **Arguments:**

        - `fields`: keys and values. Keys that begin with `_` are diffusers' own. Keys that change
            nothing in this network, such as `sample_size`, are ignored with a warning.

        **Returns:** the config.

        **Raises:** `ValueError` for another unknown key, or another model's configuration.
        """
        config, ignored = read_fields(fields)
        if ignored:
            warnings.warn(ignored, stacklevel=2)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Returns every field, ready for JSON.

        **Returns:** keys and values that `Config.from_dict` reads back.
        """
        fields = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    @classmethod
    def preset(cls, name: str) -> "Config":
        """Returns the configuration of a published checkpoint.

        **Arguments:**

        - `name`: `"CogVideoX-2b"`, `"CogVideoX-5b"`, `"CogVideoX1.5-5B"`, or `"tiny"`, the
            architecture of the embedded weights. Case and an owner before a slash are ignored.

        **Returns:** the config.

        **Raises:** `ValueError` for another name.
        """
        key = name.rsplit("/", 1)[-1].lower()
        if key not in _PRESETS:
            raise ValueError(f"no preset {name!r}, there are {', '.join(_PRESETS)}.")
        return cls(**_PRESETS[key])


def read_fields(fields: Mapping[str, Any]) -> tuple[Config, str]:
    """Returns the config in a `config.json`, and a warning of the keys that were ignored."""
    model = fields.get("_class_name", "AutoencoderKLCogVideoX")
    if model not in ("AutoencoderKLCogVideoX", "EqxAutoencoderKLCogVideoX"):
        raise ValueError(f"expected the config of an AutoencoderKLCogVideoX, got a {shown(model)}.")
    known = [field.name for field in dataclasses.fields(Config)]
    own = {key: value for key, value in fields.items() if not key.startswith("_")}
    unknown = own.keys() - set(known)
    for key in sorted(unknown - _HARMLESS):
        near = difflib.get_close_matches(key, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
        raise ValueError(f"unknown config key {shown(key)}: {hint}")
    ignored = ", ".join(f"{key}={shown(own[key])}" for key in sorted(unknown))
    given: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in own.items() if key in known
    }
    warning = "the config has keys that change nothing here, and are ignored"
    return Config(**given), f"{warning}: {ignored}." if ignored else ""


def shown(value: Any) -> str:
    """The value as code, cut where it is long: a message stays a line."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)


def _check_integers(config: Config) -> None:
    widths = config.block_out_channels
    if not isinstance(widths, tuple) or not 1 <= len(widths) <= _DEEPEST:
        raise ValueError(
            f"`block_out_channels` must be a tuple of widths, at most {_DEEPEST}, "
            f"got {shown(widths)}."
        )
    channels = ("in_channels", "out_channels", "latent_channels", "norm_num_groups")
    others = ("layers_per_block", "sample_height", "sample_width")
    named = [("block_out_channels", width, _WIDEST) for width in widths]
    named += [(name, getattr(config, name), _WIDEST) for name in channels]
    named += [(name, getattr(config, name), _LARGEST) for name in others]
    for name, value, most in named:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ValueError(
                f"`{name}` must hold whole numbers from 1 to {most}, got {shown(value)}."
            )


def _check_numbers(config: Config) -> None:
    groups = config.norm_num_groups
    if uneven := [width for width in config.block_out_channels if width % groups]:
        raise ValueError(
            f"`norm_num_groups`={groups} must divide every one of `block_out_channels`, "
            f"and does not divide {uneven[0]}."
        )
    if config.act_fn not in ACTIVATIONS:
        raise ValueError(
            f"`act_fn` must be one of {', '.join(ACTIVATIONS)}, got {shown(config.act_fn)}."
        )
    for name in ("norm_eps", "temporal_compression_ratio", "scaling_factor"):
        value = getattr(config, name)
        if not _is_number(value) or value <= 0:
            raise ValueError(f"`{name}` must be a positive number, got {shown(value)}.")
    if config.temporal_compression_ratio < 1:
        raise ValueError(
            "`temporal_compression_ratio` must be at least 1, "
            f"got {config.temporal_compression_ratio}."
        )


def _check_switches(config: Config) -> None:
    for name in ("use_quant_conv", "use_post_quant_conv", "invert_scale_latents", "force_upcast"):
        value = getattr(config, name)
        # diffusers declares this one a number, and gives it a truth value.
        if not isinstance(value, bool) and not (name == "force_upcast" and _is_number(value)):
            raise ValueError(f"`{name}` must be True or False, got {shown(value)}.")


def _check_statistics(config: Config) -> None:
    """The numbers that `VAE.scale_latents` uses."""
    if config.shift_factor is not None and not _is_number(config.shift_factor):
        raise ValueError(
            f"`shift_factor` must be a finite number or None, got {shown(config.shift_factor)}."
        )
    for name in ("latents_mean", "latents_std"):
        values = getattr(config, name)
        if values is None:
            continue
        if not isinstance(values, tuple) or not all(map(_is_number, values)):
            raise ValueError(f"`{name}` must be finite numbers or None, got {shown(values)}.")
        if len(values) != config.latent_channels:
            raise ValueError(
                f"`{name}` must have {config.latent_channels} entries, one per latent channel, "
                f"got {len(values)}."
            )
        if name == "latents_std" and min(values) <= 0:
            raise ValueError(f"`latents_std` must be positive, got {shown(values)}.")


def _is_number(value: Any) -> bool:
    """Returns True for a number that is finite, as a float too."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


__all__ = ["ACTIVATIONS", "Config", "read_fields", "shown"]
