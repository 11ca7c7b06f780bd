"""Quickstart: a small hybrid mixture of experts on Python's own standard library.

make quickstart            (or: python train.py --config configs/quickstart.py)
"""

from mmx_jax.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PrepareConfig,
    ReportConfig,
    RunConfig,
    ScheduleConfig,
    SchedulePhase,
    SourceConfig,
    StageConfig,
    TokenizerConfig,
    hybrid_layers,
)

STORE = "runs/data/stdlib"
TOKENS = 800_000


def get_config() -> RunConfig:
    """The run."""
    model = ModelConfig(
        vocab_size=4096,
        hidden_size=128,
        layers=hybrid_layers(8),
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        rotary_dim=16,
        ffn_hidden_size=256,
        num_experts=4,
        experts_per_token=2,
        compute_dtype="float32",
    )
    corpus = PrepareConfig(
        inputs=("python:stdlib",),
        output=STORE,
        tokenizer=TokenizerConfig(vocab_size=4096),
        license="PSF-2.0",
    )
    stage = StageConfig(
        sequence_length=256,
        data=DataConfig(sources=(SourceConfig(name="stdlib", store=STORE),), prepare=(corpus,)),
        batch=BatchConfig(micro_batch=8, ramp=((0, 8),)),
        schedule=ScheduleConfig(
            warmup_steps=50,
            phases=(
                SchedulePhase(until_tokens=TOKENS * 6 // 10, learning_rate=3e-3),
                SchedulePhase(until_tokens=TOKENS, learning_rate=6e-5, shape="linear"),
            ),
        ),
        optimizer=OptimizerConfig(),
        loss_chunk=4096,
    )
    return RunConfig(
        name="quickstart",
        model=model,
        stages=(stage,),
        checkpoint=CheckpointConfig(every_steps=50),
        report=ReportConfig(
            baselines=True,
            prompts=("def read_lines(path):\n",),
            continue_finished=True,
            next_commands=(
                "next:",
                "  make quickstart                                           trains on, for one more budget",
                '  python -m mmx_jax.inference.generate {workdir} --prompt "import "',
                "  python -m mmx_jax.describe --config configs/quickstart.py",
            ),
        ),
    )
