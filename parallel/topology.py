"""Accelerators that need not be there: real slice shapes, what a chip can do, and devices to compile for."""

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

GIB, GB, TERA = 2**30, 1e9, 1e12
MOST_SLICES = 64
"""Slices of one topology at most; describing more devices takes minutes."""


class TopologyError(ValueError):
    """A slice that does not exist, or that cannot be compiled for here."""


@dataclass(frozen=True)
class Chip:
    """What one chip can do, by its vendor's figures."""

    platform: str
    """Name of the platform in JAX."""
    shapes: tuple[str, ...]
    """Slices that can be had, smallest first."""
    hbm_bytes: int
    peak_flops: float
    """Dense bf16, FLOP/s."""
    hbm_bandwidth: float
    """Bytes/s."""
    ici_bandwidth: float
    """Bytes/s that a chip can send over all its links to other chips of the slice; it receives as much."""
    dcn_bandwidth: float
    """Bytes/s to other slices."""
    compute_capability: float | None = None
    target: str | None = None
    """What a compiler without its own tables is told about the chip: XLA's `GpuTargetConfigProto` as text."""


_H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 1 patch: 1 }
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  clock_rate_ghz: 1.98
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
}
"""

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16", "16x16x24")
CHIPS: dict[str, Chip] = {
    "v5e": Chip("tpu", _FLAT, 16 * GIB, 197 * TERA, 819 * GB, 200 * GB, 3.1 * GB),
    "v5p": Chip("tpu", _CUBES, 95 * GIB, 459 * TERA, 2765 * GB, 600 * GB, 6.25 * GB),
    "v6e": Chip("tpu", _FLAT, 32 * GIB, 918 * TERA, 1640 * GB, 400 * GB, 12.5 * GB),
    "h100": Chip("gpu", ("1", "2", "4", "8"), 80 * 10**9, 989 * TERA, 3350 * GB, 450 * GB, 50 * GB, 9.0, _H100),
}
"""Published figures (Cloud TPU's system pages, NVIDIA's H100 SXM data sheet); of bidirectional ones the half."""


@dataclass(frozen=True)
class Topology:
    """Some equal slices of one kind of chip."""

    kind: str
    shape: tuple[int, ...]
    """Chips along each wired axis of a slice."""
    slices: int = 1

    @property
    def chip(self) -> Chip:
        """What its chips can do."""
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.shape) * self.slices

    def __str__(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}" + (f"*{self.slices}" if self.slices > 1 else "")

    def devices(self) -> Sequence[jax.Device]:
        """Devices that programs can be compiled for and that run nothing; ask in one process at a time (libtpu).

        Raises:
          TopologyError: no compiler for the platform is installed.
        """
        if self.chip.target is not None:
            return self._gpus(self.chip.target)
        options: dict[str, Any] = {"num_slices": self.slices} if self.slices > 1 else {}
        if self.shape == (1, 1):
            options["chips_per_host_bounds"] = (1, 1, 1)
        name = f"{self.kind}:{'x'.join(map(str, self.shape))}"
        try:
            return topologies.get_topology_desc(name, platform="tpu", **options).devices
        except (RuntimeError, NotImplementedError) as error:
            raise TopologyError(f"{self}: the TPU compiler (libtpu) gives no such devices: {error}") from error

    def _gpus(self, target: str) -> Sequence[jax.Device]:
        """The GPUs of one host, all wired to all; to compile for them `ptxas` must be installed (nvidia-cuda-nvcc)."""
        hosts = f"1x1x{self.chips}"
        try:
            return topologies.get_topology_desc(hosts, platform="cuda", topology=hosts, target_config=target).devices
        except (RuntimeError, NotImplementedError) as error:
            raise TopologyError(
                f"{self}: the GPU compiler (jax-cuda13-plugin, in the extras `cuda` and `dev`) gives no such devices: "
                f"{error}"
            ) from error


def parse_topology(text: str) -> Topology:
    """Reads "kind:shape" or "kind:shape*slices", as in v5p:16x16x16 and v6e:16x16*2.

    Raises:
      TopologyError: an unknown kind or shape; the message names those that are near.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?", text)
    if not match:
        raise TopologyError(
            f"topology {text!r} must read kind:shape or kind:shape*slices, as in v5p:4x4x4, v6e:16x16*2"
        )
    kind, shape, slices = match[1], match[2], int(match[3] or 1)
    if kind not in CHIPS:
        near = difflib.get_close_matches(kind, CHIPS, n=1, cutoff=0)
        raise TopologyError(
            f"topology {text!r}: no chip {kind!r}, did you mean {near[0]}? Known are {', '.join(CHIPS)}"
        )
    sizes = tuple(map(int, shape.split("x")))
    if shape not in CHIPS[kind].shapes:
        raise TopologyError(f"topology {text!r}: {kind} has no slice of shape {shape}; near are {_near(kind, sizes)}")
    if not 1 <= slices <= MOST_SLICES:
        raise TopologyError(f"topology {text!r}: needs at least one slice, and at most {MOST_SLICES}")
    if slices > 1 and CHIPS[kind].platform != "tpu":
        raise TopologyError(f"topology {text!r}: several slices are for TPUs; {kind} stands for one host")
    return Topology(kind, sizes, slices)


def _near(kind: str, sizes: tuple[int, ...]) -> str:
    """The three shapes whose number of chips is nearest, smallest first."""

    def distance(shape: str) -> float:
        return abs(math.log(_chips(shape) / max(math.prod(sizes), 1)))

    return ", ".join(sorted(sorted(CHIPS[kind].shapes, key=distance)[:3], key=_chips))


def _chips(shape: str) -> int:
    return math.prod(map(int, shape.split("x")))
