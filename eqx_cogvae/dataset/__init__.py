"""Datasets: videos to latents, and latents back to videos.

A run may be killed at any moment and started again: it loses no finished clip, and does only what
is missing. It needs `eqx_cogvae[video]`; `engine="ray"` needs `eqx_cogvae[ray]`.

```py
vae = cv.from_pretrained("zai-org/CogVideoX-2b", dtype=jnp.bfloat16)
settings = dataset.Settings(frames=49, sizes=((480, 720),), fps=8)
print(dataset.encode(vae, "videos", "latents", settings))
```
"""

from ._encode import noise_key as noise_key
from ._latents_source import Example as Example, LatentsSource as LatentsSource
from ._run import (
    Progress as Progress,
    Summary as Summary,
    decode as decode,
    encode as encode,
)
from ._settings import Settings as Settings

__all__ = [
    "Example",
    "LatentsSource",
    "Progress",
    "Settings",
    "Summary",
    "decode",
    "encode",
    "noise_key",
]
