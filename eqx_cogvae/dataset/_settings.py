"""Settings of an encoding."""

import dataclasses
import operator
from typing import Any

from .. import video
from .._frames import SAMPLE_BATCH
from .._latents import check_layout

KINDS = ("mode", "sample", "posterior")
TAILS = ("drop", "shorten", "pad")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Says what becomes of a video.

    Together with the weights and the video's bytes it decides every result.

    !!! Example

        ```python
        >>> from eqx_cogvae import dataset
        >>> dataset.Settings(frames=17, sizes=((480, 720), (720, 480)), fps=8).tail
        'drop'

        ```

    **Arguments:**

    - `frames`: frames of a clip, 8k + 1. A longer video is cut into clips that follow on each
        other. None takes each video whole, in constant memory, its last frame repeated up to
        8k + 1.
    - `sizes`: (height, width) in pixels, multiples of 8. A video is cropped about its centre and
        resized to the one of the nearest aspect ratio. Without any, its own size is cut down to
        multiples of 8; each size that occurs compiles two programs.
    - `fps`: frames a second that are picked out of the video; None takes all. A video with fewer
        has some of them repeated, and `encode` warns of it.
    - `latents`: `"mode"`; `"sample"`, drawn with a seed of its own for each clip, which depends
        on the video, the settings and the weights and on nothing else; or `"posterior"`, the mean
        as `latents` and beside it `logvar`.
    - `seed`: a number that changes the samples of all clips.
    - `layout`: `"BTHWC"`, or `"BCTHW"` as torch has it.
    - `tail`: the use of frames at a video's end that are too few for a clip: `"drop"`;
        `"shorten"` to the last 8k + 1; `"pad"`, with the last frame, to the next 8k + 1.

    **Raises:** `ValueError` for values outside of these.
    """

    frames: int | None = 49
    sizes: tuple[tuple[int, int], ...] = ()
    fps: float | int | None = None
    latents: str = "mode"
    seed: int = 0
    layout: str = "BTHWC"
    tail: str = "drop"

    def __post_init__(self):
        if self.frames is not None and (self.frames < 1 or self.frames % SAMPLE_BATCH != 1):
            low = max(self.frames - 1, 0) // SAMPLE_BATCH * SAMPLE_BATCH + 1
            raise ValueError(
                f"`frames` must be 8k + 1, got {self.frames}: "
                f"the nearest are {low} and {low + SAMPLE_BATCH}."
            )
        if any(not isinstance(s, tuple | list) or len(s) != 2 or min(s) < 1 for s in self.sizes):
            raise ValueError(f"`sizes` must be of (height, width) in pixels, got {self.sizes}.")
        if self.fps is not None:
            video.check_rate(self.fps)
        for name, value, allowed in (
            ("latents", self.latents, KINDS),
            ("tail", self.tail, TAILS),
        ):
            if value not in allowed:
                raise ValueError(f"`{name}` is one of {', '.join(allowed)}, got {value!r}.")
        check_layout(self.layout)

    def identity(self) -> dict[str, Any]:
        """Returns the fields that make a difference to results.

        **Returns:** keys and values, as JSON has them.
        """
        fields = dataclasses.asdict(self)
        if self.latents == "sample":
            fields["seed"] = operator.index(self.seed)
        else:
            del fields["seed"]
        if self.frames is None:
            del fields["tail"]
        else:
            fields["frames"] = operator.index(self.frames)
        fields["sizes"] = [[operator.index(side) for side in size] for size in self.sizes]
        return fields | {"fps": None if self.fps is None else float(self.fps)}


__all__ = ["KINDS", "TAILS", "Settings"]
