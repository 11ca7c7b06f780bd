"""Research size 20M: a hybrid mixture of experts that trains on one GPU in minutes, on a strong CPU overnight.

    python train.py --config configs/research_20m.py
    python train.py --config configs/research_20m.py:lightning          (or softmax: the same sizes, other attention)

Data: Python's own standard library with 8,192 pieces, prepared at the first start; about 8 epochs of it.
Hardware: one GPU with 16 GiB. Wall time and held-out bits per byte: not measured.
"""

from mmx_jax.config import (
    LIGHTNING,
    SOFTMAX,
    BatchConfig,
    ConfigError,
    DataConfig,
    ModelConfig,
    PrepareConfig,
    RunConfig,
    ScheduleConfig,
    SchedulePhase,
    SourceConfig,
    StageConfig,
    TokenizerConfig,
    hybrid_layers,
)

STORE = "runs/data/stdlib_8k"
TOKENS = 25_000_000
LAYERS = {"hybrid": hybrid_layers(8), "softmax": (SOFTMAX,) * 8, "lightning": (LIGHTNING,) * 8}


def get_config(kind: str = "hybrid") -> RunConfig:
    """The run with one kind of attention.

    Raises:
      ConfigError: for another kind.
    """
    if kind not in LAYERS:
        raise ConfigError(f"no kind {kind!r}: give one of {', '.join(LAYERS)}")
    model = ModelConfig(
        vocab_size=8192,
        hidden_size=256,
        layers=LAYERS[kind],
        num_heads=2,
        num_kv_heads=1,
        head_dim=128,
        rotary_dim=64,
        ffn_hidden_size=256,
        num_experts=8,
        capacity_factor=1.25,
    )
    corpus = PrepareConfig(
        inputs=("python:stdlib",), output=STORE, tokenizer=TokenizerConfig(vocab_size=8192), license="PSF-2.0"
    )
    stage = StageConfig(
        sequence_length=1024,
        data=DataConfig(sources=(SourceConfig(name="stdlib", store=STORE),), prepare=(corpus,)),
        batch=BatchConfig(micro_batch=16, ramp=((0, 16),)),
        schedule=ScheduleConfig(
            warmup_steps=100,
            phases=(
                SchedulePhase(until_tokens=TOKENS * 3 // 4, learning_rate=2e-3),
                SchedulePhase(until_tokens=TOKENS, learning_rate=1e-4, shape="exponential"),
            ),
        ),
        loss_chunk=8192,
    )
    return RunConfig(name=f"research_20m_{kind}", model=model, stages=(stage,))
