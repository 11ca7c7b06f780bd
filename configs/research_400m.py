"""Research size 400M.

    python -m mmx_jax.data.prepare --inputs /path/to/text --output runs/data/corpus --vocab_size 32768
    python train.py --config configs/research_400m.py

Hybrid mixture of experts, 16 layers as [7 lightning + 1 softmax] x 2.
Data: a token store of your own, 8B tokens.
Hardware: one GPU with 80 GiB. Wall time and result: not measured.
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

TOKENS = 8_000_000_000


def get_config() -> RunConfig:
    """The run."""
    model = ModelConfig(
        vocab_size=32_768,
        hidden_size=1024,
        layers=hybrid_layers(16),
        num_heads=8,
        num_kv_heads=2,
        head_dim=128,
        rotary_dim=64,
        ffn_hidden_size=640,
        num_experts=8,
        capacity_factor=1.25,
    )
    stage = StageConfig(
        sequence_length=4096,
        data=DataConfig(sources=(SourceConfig(name="corpus", store="runs/data/corpus"),)),
        batch=BatchConfig(micro_batch=32, ramp=((0, 128),)),
        schedule=ScheduleConfig(
            warmup_steps=500,
            phases=(
                SchedulePhase(until_tokens=TOKENS * 9 // 10, learning_rate=6e-4),
                SchedulePhase(until_tokens=TOKENS, learning_rate=3e-5, shape="exponential"),
            ),
        ),
        remat="attention",
        loss_chunk=4096,
    )
    return RunConfig(name="research_400m", model=model, stages=(stage,))
