"""Seconds of a device by kind of kernel, from the profilers of JAX and of torch."""

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

KINDS = ("convolution", "product", "norm", "copy", "other")
# The first that fits. Kernels that Inductor fuses are named after all that they do, and compute
# no convolution: they come first. cuDNN's are named after the tiles of their algorithm.
_RULES = (
    ("norm", r"triton_(red|per)_"),
    ("norm", r"triton_\w*(var_mean|native_group_norm)"),
    ("convolution", r"triton_(tem|mm)\w*conv"),
    ("copy", r"triton_poi_fused_(clone|cat|copy|constant_pad|_to_copy)\w*"),
    ("other", r"triton_"),
    ("copy", r"memcpy|memset|transpose|copy|nchwToNhwc|nhwcToNchw|CatArray|concatenate|pad_"),
    ("convolution", r"conv|fprop|dgrad|wgrad|winograd|xmma|cudnn"),
    ("product", r"gemm|gemv|cublas|nvjet|cutlass|\bdot"),
    ("norm", r"norm|reduce|Moments|Welford"),
)
_COMPILED = tuple((kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in _RULES)
_DEVICE_PLANE, _HOST_PLANE = re.compile(r"^/device:(GPU|TPU)"), "/host:CPU"


def kind_of(name: str) -> str:
    """Returns one of `KINDS` for the name of a kernel."""
    return next((kind for kind, pattern in _COMPILED if pattern.search(name)), "other")


def by_kind(kernels: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Returns the seconds of each kind, of kernels by their name and seconds."""
    seconds: Counter = Counter()
    for name, each in kernels:
        seconds[kind_of(name)] += each
    return {kind: seconds[kind] for kind in KINDS}


def profiled_by_jax(call: Callable[[], Any]) -> list[tuple[str, float]]:
    """Runs a call that waits for its result; returns the kernels, and the seconds of each."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        (path,) = Path(folder).rglob("*.xplane.pb")
        return _kernels(jax.profiler.ProfileData.from_file(str(path)))


def _kernels(data: Any) -> list[tuple[str, float]]:
    """Returns the events of streams, or on a CPU those of XLA's own operations."""
    planes = [plane for plane in data.planes if _DEVICE_PLANE.match(plane.name)]
    lines = [line for plane in planes for line in plane.lines if "Stream" in line.name]
    if not planes:
        lines = [line for plane in data.planes if plane.name == _HOST_PLANE for line in plane.lines]
    totals: Counter = Counter()
    for line in lines:
        for event in line.events:
            # On a CPU a second event marks an operation's end.
            is_operation = ("hlo_op", event.name) in list(event.stats)
            if planes or is_operation:
                totals[event.name] += event.duration_ns / 1e9
    return totals.most_common()


def profiled_by_torch(call: Callable[[], Any]) -> list[tuple[str, float]]:
    """Runs a call that waits for its result; returns the kernels, and the seconds of each."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    kind = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[kind]) as profiler:
        call()
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    totals = {each.key: getattr(each, own) / 1e6 for each in profiler.key_averages()}
    return sorted(totals.items(), key=lambda item: -item[1])


__all__ = ["KINDS", "by_kind", "kind_of", "profiled_by_jax", "profiled_by_torch"]
