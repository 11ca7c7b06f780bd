"""The one table of parameters: shape, axes, initialiser, group and checkpoint names of every weight.

Sharding, initialisation, optimizer masks, conversion and `describe` read it. Paths look like
`layers/0/1/attention/qkv`: section, run (see `plan`), block part. Weights of a run are stacked as
[groups, run length, ...].
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import jax
import jax.numpy as jnp

from mmx_jax.config import LIGHTNING, ModelConfig
from mmx_jax.model.plan import LayerRun, Section, layer_plan

STACK_AXES = 2


@dataclass(frozen=True)
class Initializer:
    """Xavier (normal) with a gain, or ones.

    `gain` is one factor, or one factor for each index of dimension `gain_dim` (counted without the stacked axes):
    the fused qkv weight has DeepNorm's gain on its value part only (recipe §14).
    """

    kind: str
    fan_in: int = 0
    fan_out: int = 0
    gain: float | tuple[float, ...] = 1.0
    gain_dim: int | None = None


@dataclass(frozen=True)
class CheckpointNames:
    """Names of the tensors in the released checkpoint that make up one parameter.

    `template` has the fields {layer} and {expert}. `dims` gives, for each dimension of a stored tensor, the dimensions
    of our slice (stacked axes and the expert axis removed) that are merged into it, in order.
    """

    template: str
    dims: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ParamSpec:
    """Everything that is known about one parameter before it has values."""

    path: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    """Logical axis of each dimension (parallel/sharding.py)."""
    init: Initializer
    group: str
    """Weight-decay group: "decay" or "no_decay"."""
    names: CheckpointNames | None
    """None where the released architecture has no such weight (low-rank gate, dense FFN)."""
    layers: tuple[tuple[int, ...], ...] = ()
    """Global layer index by [group][index in run]; empty for weights outside the layers."""
    component: str = "embedding"
    """Row of the parameter table: embedding, head, norm, lightning, softmax, router, experts or ffn."""
    dtype: str = "float32"

    @property
    def size(self) -> int:
        """Number of values."""
        size = 1
        for dim in self.shape:
            size *= dim
        return size

    def checkpoint_slices(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """Index of each slice of the parameter, with the name of the tensor that it is (INV-03)."""
        if self.names is None:
            return
        if not self.layers:
            yield (), self.names.template
            return
        experts = range(self.shape[STACK_AXES]) if "experts" in self.axes[: STACK_AXES + 1] else (None,)
        groups = product(range(self.shape[0]), range(self.shape[1]), experts)
        for group, index, expert in groups:
            position = (group, index) if expert is None else (group, index, expert)
            yield position, self.names.template.format(layer=self.layers[group][index], expert=expert)


class _Table:
    """Collects the specs of one model."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.specs: dict[str, ParamSpec] = {}

    def add(self, path: str, shape: tuple[int, ...], axes: tuple[str | None, ...], **other: object) -> None:
        self.specs[path] = ParamSpec(path, shape, axes, **other)  # type: ignore[arg-type]

    def layer(self, run: "_StackedRun", part: str, shape: tuple[int, ...], axes: tuple[str | None, ...],
              init: Initializer, name: str | None, dims: tuple[tuple[int, ...], ...] = (), *,
              component: str, group: str = "decay") -> None:  # fmt: skip
        """Adds a weight of the layers of one run; `shape` and `axes` are those of a single layer."""
        names = CheckpointNames(f"model.layers.{{layer}}.{name}.weight", dims) if name else None
        self.add(f"{run.path}/{part}", (*run.stack, *shape), (None, None, *axes), init=init, group=group, names=names,
                 layers=run.layers, component=component)  # fmt: skip


@dataclass(frozen=True)
class _StackedRun:
    path: str
    stack: tuple[int, int]
    layers: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, section_index: int, section: Section, run_index: int, run: LayerRun) -> "_StackedRun":
        layers = tuple(tuple(section.layer(run, g, i) for i in range(run.length)) for g in range(section.groups))
        return cls(f"layers/{section_index}/{run_index}", (section.groups, run.length), layers)


def _ones() -> Initializer:
    return Initializer("ones")


def _add_lightning(table: _Table, run: _StackedRun) -> None:
    c = table.config
    D, N, H = c.hidden_size, c.num_heads, c.head_dim
    gain = c.weight_gain
    table.layer(run, "attention/qkv", (D, N, 3, H), ("embed", "heads", None, None),
                Initializer("xavier", D, N * H, (1.0, 1.0, gain), gain_dim=2), "self_attn.qkv_proj", ((1, 2, 3), (0,)),
                component=LIGHTNING)  # fmt: skip
    if c.gate_rank is None:
        table.layer(run, "attention/gate", (D, N, H), ("embed", "heads", None), Initializer("xavier", D, N * H),
                    "self_attn.output_gate", ((1, 2), (0,)), component=LIGHTNING)  # fmt: skip
    else:
        table.layer(run, "attention/gate_down", (D, c.gate_rank), ("embed", "gate_rank"),
                    Initializer("xavier", D, c.gate_rank), None, component=LIGHTNING)  # fmt: skip
        table.layer(run, "attention/gate_up", (c.gate_rank, N, H), ("gate_rank", "heads", None),
                    Initializer("xavier", c.gate_rank, N * H), None, component=LIGHTNING)  # fmt: skip
    table.layer(run, "attention/norm", (N, H), ("heads", None), _ones(), "self_attn.norm", ((0, 1),),
                component=LIGHTNING, group="no_decay")  # fmt: skip
    table.layer(run, "attention/out", (N, H, D), ("heads", None, "embed"), Initializer("xavier", N * H, D, gain),
                "self_attn.out_proj", ((2,), (0, 1)), component=LIGHTNING)  # fmt: skip


def _add_softmax(table: _Table, run: _StackedRun) -> None:
    c = table.config
    D, H = c.hidden_size, c.head_dim
    parts = (("query", c.num_heads, "heads", "q", 1.0), ("key", c.num_kv_heads, "kv_heads", "k", 1.0),
             ("value", c.num_kv_heads, "kv_heads", "v", c.weight_gain))  # fmt: skip
    for part, heads, axis, letter, gain in parts:
        table.layer(run, f"attention/{part}", (D, heads, H), ("embed", axis, None),
                    Initializer("xavier", D, heads * H, gain), f"self_attn.{letter}_proj", ((1, 2), (0,)),
                    component="softmax")  # fmt: skip
    table.layer(run, "attention/out", (c.num_heads, H, D), ("heads", None, "embed"),
                Initializer("xavier", c.num_heads * H, D, c.weight_gain), "self_attn.o_proj", ((2,), (0, 1)),
                component="softmax")  # fmt: skip


def _add_ffn(table: _Table, run: _StackedRun) -> None:
    c = table.config
    D, F, E = c.hidden_size, c.ffn_hidden_size, c.num_experts
    weights = (("gate", (D, F), "w1"), ("up", (D, F), "w3"), ("down", (F, D), "w2"))
    if not E:
        for part, shape, _ in weights:
            axes = ("ffn", "embed") if part == "down" else ("embed", "ffn")
            table.layer(run, f"ffn/{part}", shape, axes, Initializer("xavier", *shape, c.weight_gain), None,
                        component="ffn")  # fmt: skip
        return
    table.layer(run, "ffn/router", (D, E), (None, None), Initializer("xavier", D, E), "block_sparse_moe.gate",
                ((1,), (0,)), component="router")  # fmt: skip
    for part, shape, letter in weights:
        inner = ("expert_ffn", "expert_embed") if part == "down" else ("expert_embed", "expert_ffn")
        table.layer(run, f"ffn/{part}", (E, *shape), ("experts", *inner), Initializer("xavier", *shape, c.weight_gain),
                    f"block_sparse_moe.experts.{{expert}}.{letter}", ((1,), (0,)), component="experts")  # fmt: skip


def parameter_spec(config: ModelConfig) -> dict[str, ParamSpec]:
    """Specs of all parameters by path, in the order of the forward pass."""
    table = _Table(config)
    V, D = config.vocab_size, config.hidden_size
    table.add("embedding", (V, D), ("vocab", "embed"), init=Initializer("xavier", V, D), group="decay",
              names=CheckpointNames("model.embed_tokens.weight", ((0,), (1,))))  # fmt: skip
    for s, section in enumerate(layer_plan(config)):
        for r, layer_run in enumerate(section.runs):
            run = _StackedRun.of(s, section, r, layer_run)
            for part, name in (("attention_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")):
                table.layer(run, part, (D,), (None,), _ones(), name, ((0,),), component="norm", group="no_decay")
            (_add_lightning if layer_run.kind == LIGHTNING else _add_softmax)(table, run)
            _add_ffn(table, run)
    table.add("final_norm", (D,), (None,), init=_ones(), group="no_decay", component="norm",
              names=CheckpointNames("model.norm.weight", ((0,),)))  # fmt: skip
    table.add("head", (D, V), ("embed", "vocab"), init=Initializer("xavier", D, V), group="decay", component="head",
              names=CheckpointNames("lm_head.weight", ((1,), (0,))))  # fmt: skip
    return table.specs


def abstract_params(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of all parameters, without values."""
    return {
        path: jax.ShapeDtypeStruct(spec.shape, jnp.dtype(spec.dtype)) for path, spec in parameter_spec(config).items()
    }
