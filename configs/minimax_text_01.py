"""MiniMax-Text-01, 456B parameters (45.9B active): the released shape, trained as the report says.

    python -m mmx_jax.describe --config configs/minimax_text_01.py
    python train.py --config configs/minimax_text_01.py --compile_only --topology v5p:16x16x16
    python train.py --config configs/minimax_text_01.py:v5p_2048 --compile_only --topology v5p:8x16x16
    python train.py --config configs/minimax_text_01.py:v5p_128 --compile_only --topology v5p:4x4x8
    python train.py --config configs/minimax_text_01.py:v6e_512 --compile_only --topology v6e:16x16*2
    python train.py --config configs/minimax_text_01.py:context_1m --compile_only --topology v5p:8x8x16
    python train.py --config configs/minimax_text_01.py --config.stages.0.data.sources.0.store=/path/to/store

Hardware by kind; the report used 1,500 to 2,500 H800:

    v5p_4096    a TPU v5p slice of 4,096 chips, mesh fsdp 64 x expert 32 x sequence 2: the default
    v5p_2048    fsdp 64 x expert 32
    v5p_128     the smallest v5p slice that holds it: fsdp 2 x expert 32 x tensor 2, 32 micro-batches
    v6e_512     two slices of 256 chips with 32 GiB each, moments in bf16
    context_1m  rows of 1,048,576 tokens on 1,024 v5p chips: expert 32 x sequence 32

11.4T tokens in about 140,000 steps. Nobody expects this to be typed lightly: it is here so that the same code is
described, compiled ahead of time and checked at its full size (docs/scaling.md has memory and estimates).

From the report: shape, Xavier with the DeepNorm gain, AdamW (0.9, 0.95), weight decay 0.1, rows of 8,192, the batch of
16M / 32M / 64M / 128M tokens, 500 steps of warm-up, the learning rate 2e-4 / 1.3e-4 / exponentially to 3e-5, the
load-balancing coefficient 0.01. Not published, so ours: capacity factor 1.25, clip 1.0, AdamW's eps, the mesh, and how
rows reach their experts: in one round, which may lose a few of them (`lost_rate`; docs/scaling.md, "Which blocks").

The RoPE base is 10,000, as in pre-training; context extension raises it to 5e6 and 1e7, and the RELEASED weights need
1e7 (`--config.model.rope_base=1e7`). "context_1m" is a step of that extension; its stage is meant to go on from weights
(`--config.stages.0.init_from=...`). Its batch and budget are ours.
"""

from collections.abc import Callable
from dataclasses import replace

from mmx_jax.config import (
    BatchConfig,
    CheckpointConfig,
    CompilerConfig,
    ConfigError,
    DataConfig,
    ExpertTransport,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    SchedulePhase,
    SourceConfig,
    StageConfig,
    hybrid_layers,
)

BILLION = 10**9
TRILLION = 10**12
SPARSE_CORES = (
    *CompilerConfig().tpu,
    *(
        (f"xla_tpu_enable_sparse_core_collective_offload_{kind}", "true")
        for kind in ("all_gather", "2d_all_gather", "3d_all_gather", "reduce_scatter", "all_reduce")
    ),
    ("xla_tpu_enable_sparse_core_offload_queuing_in_lhs", "true"),
    ("xla_tpu_sparse_core_offload_queuing_overlap_limit", "8"),
    ("xla_tpu_enable_ici_ag_pipelining", "true"),
    ("xla_tpu_sparse_core_all_gather_latency_multiplier", "4"),
)
"""The chip's SparseCores gather weights and add up gradients while the rest of it computes (docs/scaling.md): several
gathers are underway at once, a layer's weights come while the layer before it computes, and early."""


def get_config(kind: str = "v5p_4096") -> RunConfig:
    """The run of the report's pre-training stage, or of a stage with rows of a million tokens, on one kind of hardware.

    Raises:
      ConfigError: for another kind.
    """
    kinds: dict[str, Callable[[RunConfig], RunConfig]] = {
        "v5p_4096": lambda run: replace(run, compiler=CompilerConfig(tpu=SPARSE_CORES)),
        "v5p_2048": _v5p_2048,
        "v5p_128": _v5p_128,
        "v6e_512": _v6e_512,
        "context_1m": _context_1m,
    }
    if kind not in kinds:
        raise ConfigError(f"no kind {kind!r}: give one of {', '.join(kinds)}")
    return kinds[kind](pretraining())


def _v5p_2048(run: RunConfig) -> RunConfig:
    stage, compiler = replace(run.stages[0], remat="dots"), CompilerConfig(tpu=SPARSE_CORES)
    return replace(run, stages=(stage,), mesh=MeshConfig(fsdp=-1, expert=32), compiler=compiler)


def _v5p_128(run: RunConfig) -> RunConfig:
    batch = replace(run.stages[0].batch, micro_batch=64)
    stage = replace(run.stages[0], remat="layer", batch=batch)
    return replace(run, stages=(stage,), mesh=MeshConfig(fsdp=-1, expert=32, tensor=2))


def _v6e_512(run: RunConfig) -> RunConfig:
    batch = replace(run.stages[0].batch, micro_batch=256)
    stage = replace(run.stages[0], remat="layer", batch=batch, optimizer=OptimizerConfig(moment_dtype="bfloat16"))
    return replace(run, stages=(stage,), mesh=MeshConfig(fsdp=-1, expert=32, tensor=2))


def _context_1m(run: RunConfig) -> RunConfig:
    stage = replace(
        run.stages[0],
        name="context_1m",
        sequence_length=1_048_576,
        rope_base=1e7,
        batch=BatchConfig(micro_batch=32, ramp=((0, 32),)),
        schedule=ScheduleConfig(phases=(SchedulePhase(until_tokens=10 * BILLION, learning_rate=3e-5),)),
        remat="layer",
    )
    return replace(run, stages=(stage,), mesh=MeshConfig(fsdp=-1, expert=32, sequence=32))


def pretraining() -> RunConfig:
    """The run on 4,096 chips."""
    model = ModelConfig(
        vocab_size=200_064,
        hidden_size=6144,
        layers=hybrid_layers(80),
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        rotary_dim=64,
        rope_base=10_000.0,
        ffn_hidden_size=9216,
        num_experts=32,
        experts_per_token=2,
        capacity_factor=1.25,
        aux_loss="report",
        aux_loss_coefficient=0.01,
        trained_vocab_size=200_026,
        end_of_text_id=200_020,
    )
    stage = StageConfig(
        sequence_length=8192,
        data=DataConfig(sources=(SourceConfig(name="pretrain", store="data/pretrain"),), packing="best_fit"),
        batch=BatchConfig(
            micro_batch=2048,
            ramp=((0, 2048), (69 * BILLION, 4096), (790 * BILLION, 8192), (4700 * BILLION, 16_384)),
        ),
        schedule=ScheduleConfig(
            warmup_steps=500,
            phases=(
                SchedulePhase(until_tokens=72 * TRILLION // 10, learning_rate=2e-4),
                SchedulePhase(until_tokens=104 * TRILLION // 10, learning_rate=1.3e-4),
                SchedulePhase(until_tokens=114 * TRILLION // 10, learning_rate=3e-5, shape="exponential"),
            ),
        ),
        remat="experts",
        transport=ExpertTransport(block_factor=2.0, max_rounds=1, bucket_factor=1.25, token_groups=4),
    )
    return RunConfig(
        name="minimax_text_01",
        model=model,
        stages=(stage,),
        mesh=MeshConfig(fsdp=-1, expert=32, sequence=2),
        checkpoint=CheckpointConfig(every_steps=500, keep_last=3, keep_every_steps=10_000),
    )
