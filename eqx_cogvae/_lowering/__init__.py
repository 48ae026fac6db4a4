"""Runs each operation of the model on each platform, and large arrays in little memory.

- `conv`: convolutions as JAX primitives; `frames`, `tpu`, `cpu`, `winograd`: their lowerings.
- `choose`: which lowering, and which chunks, for which sizes.
- `parts`: frames that devices share, as clips with the pixels of their neighbours.
- `moments`: the mean and the variance that a group norm needs.
- `affine`: the map that a norm applies.
- `units`, `blocks`: a norm, an activation and a convolution, and blocks of them.
- `chunked`, `loops`, `resized`: these, and what changes the size of frames, on large arrays.
"""

from .affine import Affine as Affine, nearest as nearest, repeat_frames as repeat_frames
from .blocks import (
    normalised as normalised,
    normed_conv as normed_conv,
    offers as offers,
    residual_block as residual_block,
    scheduled as scheduled,
)
from .choose import Geometry as Geometry
from .conv import (
    causal_conv as causal_conv,
    pointwise_conv as pointwise_conv,
    valid_conv as valid_conv,
)
from .moments import moments as moments
from .resized import frame_conv as frame_conv
from .units import Taps as Taps
