"""Quickstart: a small hybrid mixture of experts on Python's own standard library.

    make quickstart            (or: python train.py --config configs/quickstart.py)

Hardware: two CPU cores; 0.9 million tokens, a third of the corpus, at 3,400 to 3,600 tokens a second: 257 s (3,000 a
second without the Makefile's memory settings). Result on 310 KB of held-out sources: 1.734 bits per byte, beside
`xz -9` 1.783, bigrams 1.976 and unigrams 2.724. Called again, the run goes on from the checkpoint before the decay,
for one more budget.

From trials of a million tokens: 8,192 pieces came to 1.738 where 2,048 came to 1.820, and slow second moments (b2 0.99)
to 1.738 where 0.95 came to 1.777, for most pieces are rare.
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
    TrainableGroup,
    hybrid_layers,
)

STORE = "runs/data/stdlib"
TOKENS = 900_000


def get_config() -> RunConfig:
    """The run."""
    model = ModelConfig(
        vocab_size=8192,
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
        tokenizer=TokenizerConfig(vocab_size=8192),
        license="PSF-2.0",
    )
    stage = StageConfig(
        sequence_length=256,
        data=DataConfig(sources=(SourceConfig(name="stdlib", store=STORE),), prepare=(corpus,), window_rows=16_384),
        batch=BatchConfig(micro_batch=4, ramp=((0, 4),)),
        schedule=ScheduleConfig(
            warmup_steps=50,
            phases=(
                SchedulePhase(until_tokens=TOKENS * 4 // 10, learning_rate=3e-3),
                SchedulePhase(until_tokens=TOKENS, learning_rate=6e-5, shape="linear"),
            ),
        ),
        optimizer=OptimizerConfig(b2=0.99),
        trainable=(TrainableGroup(pattern="embedding", learning_rate_factor=4.0), TrainableGroup()),
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
                "try next:",
                "  make quickstart                                   # trains on, for one more budget",
                "  python -m mmx_jax.inference.generate --checkpoint {workdir} --prompt 'import '",
                "  python eval.py --checkpoint {workdir}",
                "  python -m mmx_jax.describe --config configs/quickstart.py",
                "  tensorboard --logdir {workdir}/tensorboard        # pip install tensorboard",
            ),
        ),
    )
