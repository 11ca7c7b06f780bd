"""Research size 1.4B.

    python -m mmx_jax.data.prepare --inputs /path/to/text --output runs/data/corpus --vocab_size 32768
    python train.py --config configs/research_1p4b.py

Hybrid mixture of experts of exactly the shape that peers were measured with: 16 layers as [7 lightning + 1 softmax]
x 2, width 1024, 16 heads of 128, 2 key/value heads, 16 experts of 1536 with top-2, 32,768 pieces.
Data: a token store of your own, 28B tokens.
Hardware: one GPU with 80 GiB holds it; a node trains it. Wall time and result: not measured.
"""

from mmx_jax.config import (
    BatchConfig,
    DataConfig,
    ModelConfig,
    RunConfig,
    ScheduleConfig,
    SchedulePhase,
    SourceConfig,
    StageConfig,
    hybrid_layers,
)

TOKENS = 28_000_000_000


def get_config() -> RunConfig:
    """The run."""
    model = ModelConfig(
        vocab_size=32_768,
        hidden_size=1024,
        layers=hybrid_layers(16),
        num_heads=16,
        num_kv_heads=2,
        head_dim=128,
        rotary_dim=64,
        ffn_hidden_size=1536,
        num_experts=16,
        capacity_factor=1.25,
    )
    stage = StageConfig(
        sequence_length=4096,
        data=DataConfig(sources=(SourceConfig(name="corpus", store="runs/data/corpus"),)),
        batch=BatchConfig(micro_batch=16, ramp=((0, 128), (2_000_000_000, 256))),
        schedule=ScheduleConfig(
            warmup_steps=500,
            phases=(
                SchedulePhase(until_tokens=TOKENS * 9 // 10, learning_rate=3e-4),
                SchedulePhase(until_tokens=TOKENS, learning_rate=3e-5, shape="exponential"),
            ),
        ),
        remat="layer",
        loss_chunk=4096,
    )
    return RunConfig(name="research_1p4b", model=model, stages=(stage,))
