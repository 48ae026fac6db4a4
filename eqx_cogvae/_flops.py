"""The arithmetic of a traced program: of its convolutions and matrix products, loops included.

XLA's own count takes one pass of a loop for all of them.
"""

import math
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr


def flops(jaxpr: ClosedJaxpr | Jaxpr, platform: str) -> int:
    """Multiplications and additions, by the branches taken on `platform`."""
    if isinstance(jaxpr, ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    return sum(_of_equation(equation, platform) for equation in jaxpr.eqns)


def _of_equation(equation: Any, platform: str) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "conv_general_dilated":
        return _of_convolution(equation)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        taps = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        return 2 * taps * _size(equation.outvars[0])
    if name == "cond":
        return _of_branches(params, platform)
    inner = sum(flops(part, platform) for part in _jaxprs(params))
    return inner * params["length"] if name == "scan" else inner


def _of_convolution(equation: Any) -> int:
    kernel = equation.invars[1].aval.shape
    out_axis = equation.params["dimension_numbers"].rhs_spec[0]
    return 2 * math.prod(kernel) // kernel[out_axis] * _size(equation.outvars[0])


def _of_branches(params: dict[str, Any], platform: str) -> int:
    counts = [flops(branch, platform) for branch in params["branches"]]
    platforms = params.get("branches_platforms") or ()
    called = {"gpu": {"cuda", "rocm"}}.get(platform, {platform})  # devices of both are "gpu"
    for count, names in zip(counts, platforms, strict=False):
        if names is None or called & set(names):
            return count
    return max(counts)


def _jaxprs(params: dict[str, Any]) -> list[ClosedJaxpr | Jaxpr]:
    # Of a derivative's rules only the function itself runs.
    return [value for value in params.values() if isinstance(value, ClosedJaxpr | Jaxpr)]


def _size(variable: Any) -> int:
    return math.prod(variable.aval.shape)


__all__ = ["flops"]
