"""What a configuration is and costs, without making a single weight.

    python -m mmx_jax.describe --config configs/minimax_text_01.py
    python -m mmx_jax.describe --config configs/research_60m.py --config.model.num_experts=8 --lengths 8192,65536
    python -m mmx_jax.describe --config configs/minimax_text_01.py --json

Parameters by component with those active per token, bytes of weights, optimizer and caches, FLOPs per token by length.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

from absl import flags
from rich.console import Console
from rich.table import Table

from mmx_jax.config import LIGHTNING, SOFTMAX, ConfigError, ModelConfig, RunConfig, hybrid_layers
from mmx_jax.config.command_line import fail_with
from mmx_jax.config.overrides import run_with_config
from mmx_jax.flops import (
    PUBLISHED_KINDS,
    TRAINING_FACTOR,
    forward_flops,
    published_training_flops_per_token,
    training_flops_per_token,
)
from mmx_jax.model import parameter_spec
from mmx_jax.model.trainable import check_trainable

COMPONENTS = ("embedding", LIGHTNING, SOFTMAX, "norm", "router", "experts", "ffn", "head")
LENGTHS = (8192, 32_768, 131_072, 1_048_576)
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class Parameters:
    """Parameter counts (INV-01, INV-02)."""

    components: dict[str, int]
    """All parameters by component, in the order of the forward pass."""
    active: dict[str, int]
    """Those that one token meets."""

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.components.values())

    @property
    def active_total(self) -> int:
        """Active per token, input embedding and head included."""
        return sum(self.active.values())

    @property
    def active_without_embedding(self) -> int:
        """Active per token, head included."""
        return self.active_total - self.active["embedding"]

    @property
    def active_without_both(self) -> int:
        """Active per token, neither input embedding nor head: the figure that is advertised."""
        return self.active_without_embedding - self.active["head"]


def count_parameters(config: ModelConfig) -> Parameters:
    """Counts from the parameter spec; of the experts a token meets `experts_per_token` of E."""
    counts: Counter[str] = Counter()
    for spec in parameter_spec(config).values():
        counts[spec.component] += spec.size
    components = {name: counts.pop(name) for name in COMPONENTS if name in counts}
    if counts:
        raise AssertionError(f"components without a row: {sorted(counts)}")
    active = dict(components)
    if config.num_experts:
        active["experts"] = components["experts"] * config.experts_per_token // config.num_experts
    return Parameters(components, active)


def state_bytes(config: ModelConfig) -> int:
    """fp32 lightning state of one sequence, whatever its length (INV-32)."""
    return config.layers.count(LIGHTNING) * config.num_heads * config.head_dim**2 * BYTES["float32"]


def key_value_bytes(config: ModelConfig, dtype: str = "bfloat16") -> int:
    """Cached keys and values of one token (INV-32)."""
    return config.layers.count(SOFTMAX) * 2 * config.num_kv_heads * config.head_dim * BYTES[dtype]


def variants(config: ModelConfig) -> dict[str, ModelConfig]:
    """The same model with all layers softmax, all lightning, and one softmax layer in eight."""
    count = config.num_layers
    layers = {"softmax": (SOFTMAX,) * count, "lightning": (LIGHTNING,) * count, "hybrid": hybrid_layers(count)}
    return {kind: replace(config, layers=layers[kind]) for kind in PUBLISHED_KINDS}


def description(run: RunConfig, lengths: tuple[int, ...] = LENGTHS) -> dict[str, Any]:
    """Everything that the command prints, as JSON values; sizes in bytes, costs in FLOPs per token."""
    config, optimizer = run.model, run.stages[0].optimizer
    parameters = count_parameters(config)
    flops = {}
    for length in lengths:
        exact = {kind: training_flops_per_token(model, length) for kind, model in variants(config).items()}
        published = {
            kind: published_training_flops_per_token(
                kind, num_layers=config.num_layers, hidden_size=config.hidden_size, num_heads=config.num_heads,
                sequence_length=length,
            )
            for kind in PUBLISHED_KINDS
        }  # fmt: skip
        forward = forward_flops(config, length)
        flops[str(length)] = {
            "forward": forward.total,
            "forward_by_component": asdict(forward),
            "training": TRAINING_FACTOR * forward.total,
            "decode": forward_flops(config, length, decode=True).total,
            "training_as": exact,
            "report_formula": published,
        }
    return {
        "name": run.name,
        "shape": {
            "L": config.num_layers, "D": config.hidden_size, "N": config.num_heads, "K": config.num_kv_heads,
            "H": config.head_dim, "E": config.num_experts, "F": config.ffn_hidden_size, "V": config.vocab_size,
            "experts_per_token": config.experts_per_token if config.num_experts else None,
            "lightning_layers": config.layers.count(LIGHTNING),
            "softmax_layers": [i for i, kind in enumerate(config.layers) if kind == SOFTMAX],
        },
        "parameters": {
            "components": parameters.components,
            "active_components": parameters.active,
            "total": parameters.total,
            "active": parameters.active_total,
            "active_without_embedding": parameters.active_without_embedding,
            "active_without_embedding_and_head": parameters.active_without_both,
        },
        "bytes": {
            "weights": {dtype: parameters.total * size for dtype, size in BYTES.items()},
            "training": {
                "master_weights": parameters.total * BYTES["float32"],
                "moments": 2 * parameters.total * BYTES[optimizer.moment_dtype],
                "gradients": parameters.total * BYTES["float32"],
            },
            "lightning_state_per_sequence": state_bytes(config),
            "key_values_per_token": key_value_bytes(config),
            "cache_per_sequence": {str(n): state_bytes(config) + n * key_value_bytes(config) for n in lengths},
        },
        "flops_per_token": flops,
    }  # fmt: skip


def readable_bytes(count: float | int) -> str:
    """Bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" or count == int(count) else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB" if count < 1024 else f"{count / 1024:,.1f} PiB"


def readable_flops(count: float | int) -> str:
    """FLOPs with a decimal unit."""
    for unit in ("", "K", "M", "G"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}FLOP"
        count /= 1000
    return f"{count:.3g} TFLOP" if count < 1000 else f"{count / 1000:.3g} PFLOP"


def _parameter_table(facts: dict[str, Any]) -> Table:
    counts = facts["parameters"]
    table = Table(title="Parameters", title_justify="left")
    for name, justify in (("component", "left"), ("total", "right"), ("share", "right"), ("active a token", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name, count in counts["components"].items():
        active = counts["active_components"][name]
        table.add_row(name, f"{count:,}", f"{count / counts['total']:.1%}", f"{active:,}")
    table.add_section()
    table.add_row("all", f"{counts['total']:,}", "100%", f"{counts['active']:,}", style="bold")
    table.add_row("without input embedding", "", "", f"{counts['active_without_embedding']:,}")
    table.add_row("without embedding and head", "", "", f"{counts['active_without_embedding_and_head']:,}")
    return table


def _memory_table(facts: dict[str, Any]) -> Table:
    sizes = facts["bytes"]
    table = Table(title="Memory", title_justify="left")
    table.add_column("what")
    table.add_column("bytes", justify="right")
    table.add_column("", justify="right")
    rows = [(f"weights, {dtype}", size) for dtype, size in sizes["weights"].items()]
    training = sizes["training"]
    rows += [(f"training, {name.replace('_', ' ')}", size) for name, size in training.items()]
    rows += [("training, all three", sum(training.values()))]
    rows += [("lightning state a sequence, fp32, any length", sizes["lightning_state_per_sequence"])]
    rows += [("keys and values a token, bf16", sizes["key_values_per_token"])]
    rows += [(f"cache of a sequence of {int(n):,}", size) for n, size in sizes["cache_per_sequence"].items()]
    for name, size in rows:
        table.add_row(name, f"{size:,}", readable_bytes(size))
    return table


def _cost_table(facts: dict[str, Any]) -> Table:
    table = Table(title="FLOPs per token by sequence length, as configured", title_justify="left")
    for name in ("length", "forward", "attention pairs", "training", "decode at the end"):
        table.add_column(name, justify="right")
    for length, figures in facts["flops_per_token"].items():
        parts = figures["forward_by_component"]
        pairs = (parts["lightning_mixing"] + parts["softmax_mixing"]) / figures["forward"]
        costs = (figures["forward"], figures["training"], figures["decode"])
        forward, training, decode = map(readable_flops, costs)
        table.add_row(f"{int(length):,}", forward, f"{pairs:.1%}", training, decode)
    return table


def _kinds_table(facts: dict[str, Any], key: str, title: str, caption: str) -> Table:
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for name in ("length", *PUBLISHED_KINDS):
        table.add_column(name, justify="right")
    for length, figures in facts["flops_per_token"].items():
        costs, base = figures[key], figures[key]["softmax"]
        cells = (f"{readable_flops(costs[kind])} ({costs[kind] / base:.2f})" for kind in PUBLISHED_KINDS)
        table.add_row(f"{int(length):,}", *cells)
    return table


def _flops_tables(facts: dict[str, Any]) -> list[Table]:
    return [
        _cost_table(facts),
        _kinds_table(
            facts, "training_as", "Training FLOPs per token, by kind of attention (over softmax)",
            "This shape, counted: causal pairs, the experts a token meets, the head.",
        ),
        _kinds_table(
            facts, "report_formula", "The same by the report's formulas",
            "Its dense study models of this L, D and N: FFN of 8D/3, low-rank gate,\nno head, all pairs.",
        ),
    ]  # fmt: skip


def print_description(facts: dict[str, Any], console: Console) -> None:
    """Writes the tables."""
    shape = facts["shape"]
    softmax = shape["softmax_layers"]
    where = f" at {', '.join(map(str, softmax))}" if 0 < len(softmax) < shape["L"] else ""
    experts = f"{shape['E']} experts, {shape['experts_per_token']} a token" if shape["E"] else "dense FFN"
    console.print(f"[bold]{facts['name']}[/]: {shape['L']} layers = {shape['lightning_layers']} lightning + "
                  f"{len(softmax)} softmax{where}; {experts}")  # fmt: skip
    console.print("  ".join(f"{letter} {shape[letter]:,}" for letter in "DNKHEFV"), highlight=False)
    for table in (_parameter_table(facts), _memory_table(facts), *_flops_tables(facts)):
        console.print()
        console.print(table)


def define_flags(values: flags.FlagValues) -> None:
    """Adds the flags of this command."""
    flags.DEFINE_list("lengths", [str(n) for n in LENGTHS], "Sequence lengths to cost.", flag_values=values)
    flags.DEFINE_bool("json", False, "Print JSON instead of tables.", flag_values=values)


def main(run: RunConfig) -> None:
    """Describes one configuration."""
    try:
        lengths = tuple(int(text) for text in flags.FLAGS.lengths)
        if not lengths or min(lengths) < 1:
            raise ValueError
    except ValueError:
        fail_with(
            ValueError(f"--lengths={','.join(flags.FLAGS.lengths)}: must be positive whole numbers, as in 8192,65536")
        )
    try:
        check_trainable(run)
    except ConfigError as error:
        fail_with(error)
    facts = description(run, lengths)
    if flags.FLAGS.json:
        print(json.dumps(facts, indent=1))
    else:
        print_description(facts, Console())


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    run_with_config(main)
