"""The report's scaling study: six sizes in three kinds of attention, `<size>,<kind>`.

    python train.py --config configs/scaling_study.py:410m,hybrid
    python -m mmx_jax.describe --config configs/scaling_study.py:7b,lightning

Sizes 70m, 160m, 410m, 1b, 3b, 7b; kinds softmax, lightning, hybrid. Hardware: one H100-class GPU to 410m, a node above.
The study's numbers to compare with are the fits of recipe §2.2: at 1 PFLOP/s-day, losses of 3.709, 3.539 and 3.480.

As published: layers, width, FFN, a dense SwiGLU, a low-rank output gate of rank D/N, rows of 8,192, 480 of them (about
4M tokens) a step, a constant learning rate of 3e-4, weight decay 0.1, 300B tokens, 100,280 pieces.

Where we deviate, and why:
- 1b has 12 heads of 128 instead of 16 of 96 (kernels want 128), and an FFN of 4,096 = 8D/3 instead of 5,632: these give
  the published 906.2M and 918.6M parameters; 16 heads and 5,632 do not.
- 410m,lightning has 25 layers, as published; the hybrid, whose depth is not, has the softmax model's 26.
- The hybrid has softmax attention in every 8th layer; 70m, which has no 8th layer, ends in softmax.
- Softmax models rotate whole heads (LLaMA's RoPE), hybrids half of each (the released model's); as many key/value heads
  as query heads in both. All kinds are pre-norm, so that attention is the only difference.
"""

from dataclasses import dataclass

from mmx_jax.config import (
    LIGHTNING,
    SOFTMAX,
    BatchConfig,
    ConfigError,
    DataConfig,
    ModelConfig,
    RunConfig,
    ScheduleConfig,
    SchedulePhase,
    SourceConfig,
    StageConfig,
)


@dataclass(frozen=True)
class Shape:
    """One row of the study's table; heads have 128 dims."""

    layers: int
    width: int
    heads: int
    ffn: int


SHAPES = {
    "70m": Shape(6, 512, 4, 1536),
    "160m": Shape(12, 768, 6, 2048),
    "410m": Shape(26, 1024, 8, 2816),
    "1b": Shape(32, 1536, 12, 4096),
    "3b": Shape(35, 2560, 20, 6912),
    "7b": Shape(32, 4096, 32, 11_008),
}
KINDS = (SOFTMAX, LIGHTNING, "hybrid")
VARIANTS = tuple(f"{size},{kind}" for size in SHAPES for kind in KINDS)
HEAD_DIM = 128


def layer_kinds(size: str, kind: str) -> tuple[str, ...]:
    """The list of layers of one model of the study."""
    depth = SHAPES[size].layers
    if kind == "hybrid":
        softmax = set(range(7, depth, 8)) or {depth - 1}
        return tuple(SOFTMAX if i in softmax else LIGHTNING for i in range(depth))
    return (kind,) * (25 if (size, kind) == ("410m", LIGHTNING) else depth)


def get_config(variant: str = "410m,hybrid") -> RunConfig:
    """The run of one size and kind.

    Raises:
      ConfigError: for another variant than `<size>,<kind>`.
    """
    if variant not in VARIANTS:
        raise ConfigError(f"no variant {variant!r}: give <size>,<kind> of {', '.join(SHAPES)} and {', '.join(KINDS)}")
    size, kind = variant.split(",")
    shape = SHAPES[size]
    model = ModelConfig(
        vocab_size=100_280,
        hidden_size=shape.width,
        layers=layer_kinds(size, kind),
        num_heads=shape.heads,
        num_kv_heads=shape.heads,
        head_dim=HEAD_DIM,
        rotary_dim=HEAD_DIM if kind == SOFTMAX else HEAD_DIM // 2,
        ffn_hidden_size=shape.ffn,
        norm="prenorm",
        gate_rank=shape.width // shape.heads,
    )
    stage = StageConfig(
        sequence_length=8192,
        data=DataConfig(sources=(SourceConfig(name="pretrain", store="data/pretrain"),)),
        batch=BatchConfig(micro_batch=32, ramp=((0, 480),)),
        schedule=ScheduleConfig(phases=(SchedulePhase(until_tokens=300 * 10**9, learning_rate=3e-4),)),
        remat="attention",
    )
    return RunConfig(name=f"scaling_{size}_{kind}", model=model, stages=(stage,))
