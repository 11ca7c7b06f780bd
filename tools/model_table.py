"""Writes docs/models.md: one row for every configuration, counted from the parameter table.

python tools/model_table.py
"""

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mmx_jax.config import LIGHTNING, SOFTMAX, RunConfig  # noqa: E402
from mmx_jax.describe import count_parameters  # noqa: E402

DOCUMENT = ROOT / "docs" / "models.md"
HEAD = """# Models

Every file in `configs/`, counted from the parameter table of the code. `python tools/model_table.py` writes this page
and a test compares it. `python -m mmx_jax.describe --config <config>` says more about one: components, memory, FLOPs.

L layers (lightning + softmax), D model width, N query heads, K key/value heads of softmax layers, H head dim, E experts
(and how many a token meets; 0 is a dense FFN), F hidden width of an expert or of the FFN, V vocabulary. Active
parameters are those that one token meets, without the input embedding; in brackets without the head too.

| config | L | D | N | K | H | E | F | V | total | active |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def runs() -> list[tuple[str, RunConfig]]:
    """Every configuration with its command-line name, files with arguments once for each of their VARIANTS."""
    found = []
    for path in sorted((ROOT / "configs").glob("*.py")):
        module = importlib.import_module(f"configs.{path.stem}")
        if not hasattr(module, "get_config"):
            continue
        for variant in getattr(module, "VARIANTS", (None,)):
            run = module.get_config() if variant is None else module.get_config(variant)
            found.append((f"configs/{path.name}" + (f":{variant}" if variant else ""), run))
    return sorted(found, key=lambda item: count_parameters(item[1].model).total)


def readable(count: int) -> str:
    """Millions or billions, three or four figures."""
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def row(name: str, run: RunConfig) -> str:
    """One line of the table."""
    c, counts = run.model, count_parameters(run.model)
    lightning, softmax = c.layers.count(LIGHTNING), c.layers.count(SOFTMAX)
    experts = f"{c.num_experts} ({c.experts_per_token})" if c.num_experts else "0"
    active = f"{readable(counts.active_without_embedding)} ({readable(counts.active_without_both)})"
    layers = f"{c.num_layers} ({lightning}+{softmax})"
    shape = (f"{c.hidden_size:,}", c.num_heads, c.num_kv_heads, c.head_dim, experts, f"{c.ffn_hidden_size:,}")
    cells = (f"`{name}`", layers, *shape, f"{c.vocab_size:,}", readable(counts.total), active)
    return f"| {' | '.join(map(str, cells))} |"


def page() -> str:
    """The whole document."""
    return HEAD + "\n".join(row(name, run) for name, run in runs()) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(page())
    print(f"wrote {DOCUMENT.relative_to(ROOT)}")
