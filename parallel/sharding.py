"""Logical axes of arrays, and the mesh axes they are split over."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from parallel.mesh import AXES

MeshAxes = tuple[str, ...]
AnyMesh = Mesh | AbstractMesh
"""A mesh of devices, or its sizes alone, which tell the shapes of shards."""


class ShardingError(ValueError):
    """A logical axis without a rule, two dimensions on one mesh axis, or a size that does not divide."""


SHARED_WHEN_FEWER = ("kv_heads",)
"""Logical axes that are not split when there are fewer entries than shards: every device then holds all of them."""


@dataclass(frozen=True)
class Rules:
    """Which mesh axes split which logical axis; one field per logical axis, an empty tuple replicates."""

    batch: MeshAxes = ("data", "fsdp", "expert")
    sequence: MeshAxes = ("sequence",)
    vocab: MeshAxes = ("tensor",)
    embed: MeshAxes = ("fsdp", "expert")
    heads: MeshAxes = ("tensor",)
    kv_heads: MeshAxes = ("tensor",)
    gate_rank: MeshAxes = ()
    ffn: MeshAxes = ("tensor",)
    experts: MeshAxes = ("expert",)
    expert_embed: MeshAxes = ("fsdp", "sequence")
    expert_ffn: MeshAxes = ("tensor",)

    def __post_init__(self) -> None:
        for field in fields(self):
            if unknown := sorted(set(getattr(self, field.name)) - set(AXES)):
                raise ShardingError(f"rule {field.name!r} names mesh axes {unknown}; the axes are {', '.join(AXES)}")

    def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
        """Partition of an array whose dimensions carry the logical names `axes` (None is never split).

        Raises:
          ShardingError: for a name without a rule, or a mesh axis used by two dimensions.
        """
        known = {field.name for field in fields(self)}
        taken: dict[str, str] = {}
        entries: list[MeshAxes | None] = []
        for name in axes:
            if name is None:
                entries.append(None)
                continue
            if name not in known:
                raise ShardingError(f"no rule for logical axis {name!r}; rules exist for {', '.join(sorted(known))}")
            for mesh_axis in getattr(self, name):
                if mesh_axis in taken:
                    raise ShardingError(
                        f"logical axes {taken[mesh_axis]!r} and {name!r} of {tuple(axes)} both use mesh axis "
                        f"{mesh_axis!r}"
                    )
                taken[mesh_axis] = name
            entries.append(getattr(self, name) or None)
        return PartitionSpec(*entries)

    def sharding(self, mesh: AnyMesh, axes: Sequence[str | None], shape: Sequence[int], name: str) -> NamedSharding:
        """Sharding on `mesh` of the array called `name`.

        Raises:
          ShardingError: as `spec`, and when a dimension does not divide by its mesh axes; the message names them.
        """
        self.spec(axes)
        split: list[str | None] = list(axes)
        for dim, logical in enumerate(axes):
            mesh_axes = getattr(self, logical) if logical else ()
            ways = math.prod(mesh.shape[mesh_axis] for mesh_axis in mesh_axes)
            if logical in SHARED_WHEN_FEWER and shape[dim] < ways:
                split[dim] = None
            elif shape[dim] % ways:
                raise ShardingError(
                    f"{name}: dimension {dim} ({logical}) has size {shape[dim]}, which does not divide by the {ways} "
                    f"shards of mesh axes {mesh_axes}"
                )
        return NamedSharding(mesh, self.spec(split))


DEFAULT_RULES = Rules()


def constrain(x: Array, *axes: str | None, rules: Rules = DEFAULT_RULES) -> Array:
    """Asks the compiler to split `x` as `axes` say on the mesh in use (`jax.set_mesh`); without a mesh returns `x`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, rules.spec(axes))
