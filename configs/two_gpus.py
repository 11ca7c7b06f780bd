"""How the training step scales from one GPU to two, `short` or `long` rows (docs/scaling.md, "Two GPUs").

    python -m mmx_jax.training.scaling --config configs/two_gpus.py --axes fsdp,expert,tensor
    python -m mmx_jax.training.scaling --config configs/two_gpus.py:long --axes sequence

Rows are random tokens; no data is needed. Hardware: two H200, of which one alone must hold the step. No token is
dropped, so that the loss of a step is that of its rows, whatever the mesh.

short: 1.9B parameters, 0.8B a token, 8 layers as [7 lightning + 1 softmax], width 2048, 16 heads of 128, 8 experts of
4096; 16 rows of 8,192 tokens on each GPU.
long: width 1024, 4 heads of 128, 8 experts of 2048; one row of 1,048,576 tokens (262,144 with
--config.stages.0.sequence_length=262144), of whose arithmetic the one softmax layer takes most, as in the released
model at this length.
"""

from mmx_jax.config import (
    BatchConfig,
    CompilerConfig,
    ConfigError,
    DataConfig,
    ExpertTransport,
    ModelConfig,
    RunConfig,
    ScheduleConfig,
    SchedulePhase,
    SourceConfig,
    StageConfig,
    hybrid_layers,
)

MODELS = {
    "short": ModelConfig(
        vocab_size=32_768, hidden_size=2048, layers=hybrid_layers(8), num_heads=16, num_kv_heads=4, head_dim=128,
        rotary_dim=64, ffn_hidden_size=4096, num_experts=8,
    ),
    "long": ModelConfig(
        vocab_size=32_768, hidden_size=1024, layers=hybrid_layers(8), num_heads=4, num_kv_heads=1, head_dim=128,
        rotary_dim=64, ffn_hidden_size=2048, num_experts=8,
    ),
}  # fmt: skip
ROWS = {"short": (16, 8192), "long": (1, 1_048_576)}
"""Rows of one device, and their tokens."""
QUICK_TO_COMPILE = CompilerConfig(gpu=(("xla_gpu_autotune_level", "0"), ("xla_gpu_enable_triton_gemm", "false")))
"""cuBLAS for all matrix products, by its own choice of algorithm: trying all others takes minutes of a GPU."""
LOSS_CHUNK = {"short": 4096, "long": 1024}


def get_config(size: str = "short") -> RunConfig:
    """The run whose step is measured.

    Raises:
      ConfigError: for another size than "short" and "long".
    """
    if size not in MODELS:
        raise ConfigError(f"no size {size!r}: give one of {', '.join(MODELS)}")
    rows, tokens = ROWS[size]
    stage = StageConfig(
        sequence_length=tokens,
        data=DataConfig(sources=(SourceConfig(name="random", store="none"),)),
        batch=BatchConfig(micro_batch=rows, ramp=((0, rows),)),
        schedule=ScheduleConfig(warmup_steps=0, phases=(SchedulePhase(until_tokens=10**9, learning_rate=1e-4),)),
        remat="layer",
        transport=ExpertTransport(block_factor=1.25),
        loss_chunk=LOSS_CHUNK[size],
    )
    return RunConfig(name=f"two_gpus_{size}", model=MODELS[size], stages=(stage,), compiler=QUICK_TO_COMPILE)
