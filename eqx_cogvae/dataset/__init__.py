"""Whole datasets: videos to latents, and latents back to videos.

A run may be killed at any moment and started again: it loses no finished clip, and does only what
is missing. Needs `eqx_cogvae[video]`; `engine="ray"` needs `eqx_cogvae[ray]`.

```py
vae = cv.from_pretrained("zai-org/CogVideoX-2b", dtype=jnp.bfloat16)
settings = dataset.Settings(frames=49, sizes=((480, 720),), fps=8)
print(dataset.encode(vae, "videos", "latents", settings))
```
"""

from ._latents_source import Example as Example, LatentsSource as LatentsSource
from ._run import (
    Progress as Progress,
    Settings as Settings,
    Summary as Summary,
    decode as decode,
    encode as encode,
)
