"""Previews of what a pipeline is generating, step by step."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import video
from .._autoencoder import VAE
from .._files import check_writable
from ..preview import Preview
from ..video._write import CONTAINERS

_STRIP = ".png"


class PreviewCallback:
    """Decodes a pipeline's latents between two steps, and writes them as pictures.

    Give it to a CogVideoX pipeline as `callback_on_step_end`. It changes nothing in what is
    generated. Latents are as noisy as the step leaves them: the first pictures show noise.

    !!! Example

        ```py
        tiny = preview.load("taecvx.safetensors")
        pipe(prompt, callback_on_step_end=PreviewCallback(tiny, "step{step:03d}.png", every=5))
        ```

    **Arguments:**

    - `preview`: the tiny autoencoder, from `eqx_cogvae.preview.load`; or a `VAE`, which is slower
        and shows what the pipeline would return.
    - `path`: the name of the files, with `{step}` for the number of the step, from 0 on: a `.png`
        is a film strip, with a row for each clip; `.mp4`, `.mov` and `.mkv` are a video, with the
        clips of a batch side by side. Steps of an earlier run are replaced.
    - `every`: writes after every so many steps, and after the last.
    - `frames`: how many frames a film strip has.
    - `fps`: frames a second of a video.

    **Raises:** `ValueError` for a `path` without a step or of another kind, and for an `every`
    below 1; `FileNotFoundError` where there is no such folder.
    """

    def __init__(
        self,
        preview: Preview | VAE,
        path: str | os.PathLike,
        *,
        every: int = 1,
        frames: int = 8,
        fps: float | int = 8,
    ):
        self._preview, self._path = preview, os.fspath(path)
        self._every, self._frames, self._fps = every, frames, fps
        kinds = (_STRIP, *CONTAINERS)
        if Path(self._path).suffix.lower() not in kinds:
            raise ValueError(f"`path` must end in one of {', '.join(kinds)}, got {self._path!r}.")
        if self._named(0) == self._named(1):
            raise ValueError(
                f"`path` must have a place for the number of the step, such as "
                f"'step{{step:03d}}.png', got {self._path!r}."
            )
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"`every` must be a whole number of at least 1 step, got {every!r}.")
        check_writable(self._named(0))

    def __call__(
        self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        """Writes the pictures of a step, if it is one of those to write.

        **Arguments:**

        - `pipe`: the pipeline, which calls this.
        - `step`: number of the step, from 0 on.
        - `timestep`: not used.
        - `tensors`: the pipeline's tensors, with its `latents`.

        **Returns:** `tensors`, unchanged.
        """
        del timestep
        if (step + 1) % self._every == 0 or step + 1 == pipe.num_timesteps:
            self._write(step, self._decoded(pipe, tensors["latents"]))
        return tensors

    def _decoded(self, pipe: Any, latents: torch.Tensor) -> np.ndarray:
        # Pipelines have frames before channels: (b, t, c, h, w).
        array = latents.detach().float().cpu().permute(0, 1, 3, 4, 2).contiguous().numpy()
        # CogVideoX 1.5 fills an odd count up in front to an even one, and drops that in the end.
        if getattr(pipe.transformer.config, "patch_size_t", None) and array.shape[1] % 2 == 0:
            array = array[:, 1:]
        frames = self._preview.decode(array / pipe.vae.config.scaling_factor)
        # A VAE leaves [-1, 1] where latents are noisy; pipelines clip its frames as well.
        return np.clip(np.asarray(frames, np.float32), -1, 1)

    def _write(self, step: int, clips: np.ndarray) -> None:
        path = self._named(step)
        if Path(path).suffix.lower() == _STRIP:
            video.filmstrip(*clips, n=self._frames, path=path)
        else:
            video.write(path, np.concatenate(clips, axis=2), fps=self._fps)

    def _named(self, step: int) -> str:
        try:
            return self._path.format(step=step)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"`path` may have {{step}} between braces and nothing else, got {self._path!r}."
            ) from error


__all__ = ["PreviewCallback"]
