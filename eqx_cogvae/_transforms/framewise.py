"""Makes a function of a whole clip from a function of one frame batch."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree, Shaped

from .._frames import frame_batches
from .._types import is_traced
from .base import Step, Transform, check_batch_size, continued, cut, jitted_step, join


class Framewise(Transform):
    """See `framewise`."""

    step: Step
    size: int = eqx.field(static=True)
    first: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_batch_size(self.size, self.first)

    def __call__(self, x: Shaped[Array, "b t *rest"]) -> PyTree[Shaped[Array, "b ..."]]:
        if x.ndim < 2 or not x.shape[1]:
            raise ValueError(f"expected (batch, frames, ...) with a frame or more, got {x.shape}.")
        if is_traced((self, x)):
            return self._scanned(x)
        results, cache, start = [], None, 0
        for size in frame_batches(x.shape[1], self.size, self.first):
            result, cache = jitted_step((self.step, cut(x, start, start + size)), cache)
            cache = self._continued(cache)
            results.append(result)
            start += size
        return join(results, axis=1)

    def _scanned(self, x: Array) -> PyTree[Array]:
        first, *steady = frame_batches(x.shape[1], self.size, self.first)
        full = steady.count(self.size) * self.size
        result, cache = self._step(x[:, :first], None)
        results = [result]
        if full:
            batches = x[:, first : first + full]
            batches = batches.reshape(x.shape[0], -1, self.size, *x.shape[2:])

            def body(cache, frames):
                result, cache = self._step(frames, cache)
                return cache, result

            cache, stacked = lax.scan(body, cache, jnp.moveaxis(batches, 1, 0))
            results.append(jax.tree.map(_flatten_batches, stacked))
        if first + full < x.shape[1]:
            results.append(self._step(x[:, first + full :], cache)[0])
        return join(results, axis=1)

    def _step(self, frames: Array, cache: PyTree) -> tuple[PyTree[Array], PyTree]:
        result, cache = self.step(frames, cache)
        return result, self._continued(cache)

    def _continued(self, cache: PyTree) -> PyTree:
        return cache if self.first is None else continued(cache)


def framewise(step: Step, size: int, *, first: int | None = None) -> Framewise:
    """Returns a function of a whole clip that calls a step on one frame batch after another.

    The clip's axis 1 is cut into batches of `size`. By default the first one takes the remainder:
    49 frames by 8 are 9, 8, 8, 8, 8, 8. With `first=1` it takes one frame, and the last batch
    takes what is left: 12 latents by 2 are 1, 2, 2, 2, 2, 2, 1. Each batch gets the cache that
    the batch before it returned.

    The result equals that of `streamed` with the same arguments bit for bit. Without `first` it
    equals diffusers at the same frame batch size. With `first=1` it equals CogVideoX-Fun, which
    decodes `t` latents to `4 (t - 1) + 1` frames for even `t` too.

    Outside of a trace two programs are compiled, whatever the length of the clip: one for the
    first batch, which has no cache, and one for the steady ones. Another remainder, frame size or
    dtype compiles anew. While tracing, the steady batches are one `lax.scan`; a `jax.jit` around
    it compiles anew for each length. `eqx.filter_checkpoint(step)` bounds the memory of
    gradients.

    **Arguments:**

    - `step`: `(frames, cache) -> (result, cache)`, such as `vae.decode_step`. Results are PyTrees
        of arrays `(b, t', ...)`.
    - `size`: frames in a batch.
    - `first`: frames in the first batch; None lets it take the remainder.

    **Returns:** `(b, t, ...) -> (b, t'', ...)`, itself a PyTree.

    **Raises:** `ValueError` for a `size` or a `first` below 1, or a clip without frames.
    """
    return Framewise(step, size, first)


def _flatten_batches(x: Array) -> Array:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


__all__ = ["framewise"]
