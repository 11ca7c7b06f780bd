"""The one mesh: named axes that exist from the first day, each of any size."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "expert", "sequence", "tensor")


class MeshError(ValueError):
    """Mesh sizes that do not fit the devices."""


def resolve_sizes(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    """Fills the axis of size -1 so that the product of all sizes is `devices`.

    Raises:
      MeshError: for unknown axes, sizes that are none, or whose product is not the number of devices.
    """
    if unknown := sorted(set(sizes) - set(AXES)):
        raise MeshError(f"unknown mesh axes {unknown}; the axes are {', '.join(AXES)}")
    full = {axis: sizes.get(axis, 1) for axis in AXES}
    if wrong := {axis: size for axis, size in full.items() if size < 1 and size != -1}:
        raise MeshError(f"mesh axes {wrong}: a size is at least 1, or -1 for the devices that are left")
    if len(open_axes := [axis for axis, size in full.items() if size == -1]) > 1:
        raise MeshError(f"mesh axes {', '.join(open_axes)}: only one may be -1")
    given = math.prod(size for size in full.values() if size != -1)
    for axis, size in full.items():
        if size == -1:
            if devices % given:
                fixed = ", ".join(f"{name} {size}" for name, size in full.items() if size not in (1, -1))
                raise MeshError(
                    f"mesh axis {axis!r} cannot be filled: {devices} devices are no multiple of {given} ({fixed})"
                )
            full[axis] = devices // given
    if math.prod(full.values()) != devices:
        raise MeshError(f"mesh {full} needs {math.prod(full.values())} devices, there are {devices}")
    return full


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the mesh over all devices (or those given), in the order of `AXES`.

    Neighbours on an axis are neighbours in the wiring of a slice, as far as the sizes allow; slices are crossed by the
    axes data and fsdp alone.

    Args:
      sizes: devices per axis; missing axes have size 1, one may be -1 and takes the devices that are left.
      devices: devices to use; None uses all.

    Raises:
      MeshError: as `resolve_sizes`; or data times fsdp do not divide by the number of slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = resolve_sizes(sizes, len(devices))
    return Mesh(_arranged(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(shape: Mapping[str, int], devices: list[jax.Device]) -> np.ndarray:
    """Which device stands where in a mesh of this shape."""
    if devices[0].platform == "cpu":
        return np.array(devices).reshape(tuple(shape.values()))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    across = _across_slices(shape, slices)
    inside = [size // across[axis] for axis, size in shape.items()]
    if slices == 1:
        arrange = partial(mesh_utils.create_device_mesh, inside, devices)
    else:
        arrange = partial(mesh_utils.create_hybrid_device_mesh, inside, list(across.values()), devices)
    try:
        return arrange()
    except NotImplementedError:  # no product of the slice's own axes gives these sizes: its axes are cut as well
        return arrange(allow_split_physical_axes=True)


def _across_slices(shape: Mapping[str, int], slices: int) -> dict[str, int]:
    """How many ways each axis goes across slices: as many as it can for data, the rest for fsdp."""
    across, left = dict.fromkeys(shape, 1), slices
    for axis in ("data", "fsdp"):
        across[axis] = math.gcd(shape[axis], left)
        left //= across[axis]
    if left > 1:
        raise MeshError(
            f"mesh {dict(shape)} on {slices} slices: data times fsdp must be a multiple of {slices}, for the other "
            "axes do not cross slices"
        )
    return across
