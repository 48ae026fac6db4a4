"""Accelerators that are not there, to compile for.

TPUs need `pip install "jax[tpu]==<the jax in use>"`, an H200 needs `"jax[cuda13]==<...>"`.
"""

import jax
from jax.experimental import topologies

_H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  device_memory_size: 150754820096
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
device_description_str: "NVIDIA H200"
"""


def devices(name: str) -> list[jax.Device]:
    """`v4:2x2x1`, `v5e:2x2`, `v5p:2x2x1`, `v6e:2x2`; one `h200`; `cpu`, simulated ones.

    XLA measures which of cuDNN's algorithms is fastest where there is a GPU, and gives each its
    workspace: without one, memory is what the arrays need.
    """
    if name == "cpu":
        return jax.devices("cpu")
    if name == "h200":
        shape = {"topology_name": "1x1x1", "topology": "1x1x1", "target_config": _H200}
        return topologies.get_topology_desc(platform="cuda", **shape).devices
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


__all__ = ["devices"]
