"""A function of JAX arrays as torch calls it: forwards, and backwards to any order."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import torch
from jax.sharding import Sharding
from jaxtyping import Array

from ._tensors import to_jax, to_torch


def call(fn: Callable, again: Callable, where: Sharding, x: torch.Tensor) -> torch.Tensor:
    """Calls a function of one array with a tensor.

    **Arguments:**

    - `fn`: the function, a PyTree.
    - `again`: the same function as the backward pass runs it.
    - `where`: the devices on which it runs.
    - `x`: its argument.

    **Returns:** a tensor of its own memory, which may be written to.
    """
    return _Call.apply(_Single(fn), _Single(again), where, x)[0]  # pyright: ignore


class _Call(torch.autograd.Function):
    """Calls a function from arrays to a tuple of arrays with tensors."""

    @staticmethod
    def forward(fn: Callable, again: Callable, where: Sharding, *tensors: torch.Tensor):  # pyright: ignore
        del again
        results = fn(*jax.device_put(to_jax(tensors), where))
        return tuple(map(_own, to_torch(results)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        del output
        _, ctx.again, ctx.where, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor):  # pyright: ignore
        # Where torch keeps a graph of this call, it differentiates the pullback in the same way.
        saved = ctx.saved_tensors  # torch's own checkpointing lets them be read once
        pullback, tensors = _Pullback(ctx.again, len(saved)), (*saved, *cotangents)
        return None, None, None, *_Call.apply(pullback, pullback, ctx.where, *tensors)  # pyright: ignore


class _Single(eqx.Module):
    """Gives the one result of a function as a tuple."""

    fn: Callable

    def __call__(self, x: Array) -> tuple[Array]:
        return (self.fn(x),)


class _Pullback(eqx.Module):
    """Maps the inputs of a function and the cotangents of its results to those of its inputs."""

    fn: Callable
    inputs: int = eqx.field(static=True)

    @eqx.filter_jit
    def __call__(self, *arrays: Array) -> tuple[Array, ...]:
        inputs, cotangents = arrays[: self.inputs], arrays[self.inputs :]
        return jax.vjp(self.fn, *inputs)[1](cotangents)


def _own(x: torch.Tensor) -> torch.Tensor:
    """Returns a tensor in the memory of `x` that is no view; torch lets no user write to those."""
    return x.new_empty(0).set_(x)  # pyright: ignore


__all__ = ["call"]
