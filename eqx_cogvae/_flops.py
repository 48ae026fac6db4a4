"""Counts the arithmetic of a traced program: convolutions and matrix products, loops included.

XLA's own count takes one pass of a loop for all of them.
"""

import math
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr

from ._lowering.conv import flops as of_convolution


def flops(jaxpr: ClosedJaxpr | Jaxpr) -> int:
    """Returns how many multiplications and additions a program does, convolutions directly."""
    if isinstance(jaxpr, ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    shapes = [variable.aval.shape for variable in equation.invars]
    if name.startswith("eqx_cogvae_"):
        return of_convolution(name, *shapes, result=equation.outvars[0].aval.shape)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        taps = math.prod(shapes[0][axis] for axis in contracted)
        return 2 * taps * math.prod(equation.outvars[0].aval.shape)
    if name == "cond":
        return max(map(flops, params["branches"]))
    inner = sum(map(flops, _jaxprs(params)))
    return inner * params["length"] if name == "scan" else inner


def _jaxprs(params: dict[str, Any]) -> list[ClosedJaxpr | Jaxpr]:
    # Of a derivative's rules only the function itself runs.
    return [value for value in params.values() if isinstance(value, ClosedJaxpr | Jaxpr)]


__all__ = ["flops"]
