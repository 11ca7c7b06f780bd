"""The one mesh: named axes that exist from the first day, each of any size."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "expert", "sequence", "tensor")


class MeshError(ValueError):
    """Mesh sizes that do not fit the devices."""


def resolve_sizes(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    """Fills the axis of size -1 so that the product of all sizes is `devices`.

    Raises:
      MeshError: for unknown axes, or sizes whose product is not the number of devices.
    """
    if unknown := sorted(set(sizes) - set(AXES)):
        raise MeshError(f"unknown mesh axes {unknown}; the axes are {', '.join(AXES)}")
    full = {axis: sizes.get(axis, 1) for axis in AXES}
    given = math.prod(size for size in full.values() if size != -1)
    for axis, size in full.items():
        if size == -1:
            if devices % given:
                raise MeshError(f"mesh axis {axis!r} cannot be filled: {devices} devices are no multiple of {given}")
            full[axis] = devices // given
    if math.prod(full.values()) != devices:
        raise MeshError(f"mesh {full} needs {math.prod(full.values())} devices, there are {devices}")
    return full


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the mesh over all devices (or those given), in the order of `AXES`.

    Args:
      sizes: devices per axis; missing axes have size 1, one may be -1 and takes the devices that are left.
      devices: devices to use; None uses all.

    Raises:
      MeshError: as `resolve_sizes`.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = resolve_sizes(sizes, len(devices))
    if devices == jax.devices() and devices[0].platform != "cpu":
        return jax.make_mesh(tuple(shape.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return Mesh(np.array(devices).reshape(tuple(shape.values())), AXES, axis_types=(AxisType.Auto,) * len(AXES))
