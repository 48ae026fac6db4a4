"""From a function of one frame batch to a function of a whole clip."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree, Shaped

from .._frames import frame_batches
from .._types import is_traced
from .base import Step, Transform, check_batch_size, cut, jitted_step, join


class Framewise(Transform):
    """See `framewise`."""

    step: Step
    size: int = eqx.field(static=True)

    def __check_init__(self):
        check_batch_size(self.size)

    def __call__(self, x: Shaped[Array, "b t *rest"]) -> PyTree[Shaped[Array, "b ..."]]:
        if x.ndim < 2 or not x.shape[1]:
            raise ValueError(f"expected (batch, frames, ...) with a frame or more, got {x.shape}.")
        if is_traced((self, x)):
            return self._scanned(x)
        sizes = frame_batches(x.shape[1], self.size)
        results, cache, start = [], None, 0
        for size in sizes:
            result, cache = jitted_step((self.step, cut(x, start, start + size)), cache)
            results.append(result)
            start += size
        return join(results, axis=1)

    def _scanned(self, x: Array) -> PyTree[Array]:
        first, *steady = frame_batches(x.shape[1], self.size)
        result, cache = self.step(x[:, :first], None)
        if not steady:
            return result
        batches = x[:, first:].reshape(x.shape[0], -1, self.size, *x.shape[2:])

        def body(cache, frames):
            result, cache = self.step(frames, cache)
            return cache, result

        _, results = lax.scan(body, cache, jnp.moveaxis(batches, 1, 0))
        return join([result, jax.tree.map(_flatten_batches, results)], axis=1)


def framewise(step: Step, size: int) -> Framewise:
    """A function of a whole clip from a function of one frame batch.

    The clip's axis 1 is cut into batches of `size`, of which the first takes the remainder: 49
    frames by 8 are 9, 8, 8, 8, 8, 8. Each is handed the cache that the one before it returned.
    Equals diffusers at the same frame batch size, and `streamed` bit for bit.

    Outside of a trace two programs are compiled, one for the first batch (no cache) and one for
    the steady ones, whatever the length of the clip; another remainder, frame size or dtype
    compiles anew. While tracing, the steady batches are one `lax.scan`; a `jax.jit` around it
    compiles anew for each length. `eqx.filter_checkpoint(step)` bounds the memory of gradients.

    **Arguments:**

    - `step`: `(frames, cache) -> (result, cache)`, such as `vae.decode_step`. Results are PyTrees
        of arrays `(b, t', ...)`.
    - `size`: frames in a batch.

    **Returns:** `(b, t, ...) -> (b, t'', ...)`, itself a PyTree.

    **Raises:** `ValueError` for a `size` below 1 or a clip without frames.
    """
    return Framewise(step, size)


def _flatten_batches(x: Array) -> Array:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


__all__ = ["framewise"]
