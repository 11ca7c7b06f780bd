"""Experiment configuration: frozen dataclasses that check themselves on construction; no JAX arrays, no I/O."""

from mmx_jax.config.checks import ConfigError
from mmx_jax.config.data import DataConfig, PrepareConfig, SourceConfig, TokenizerConfig
from mmx_jax.config.model import LIGHTNING, SOFTMAX, ModelConfig, hybrid_layers
from mmx_jax.config.run import (
    IN_ORDER,
    KEEP,
    LOSSLESS,
    MESH_AXES,
    BatchConfig,
    CheckpointConfig,
    EvaluationConfig,
    ExpertTransport,
    LoggingConfig,
    MeshConfig,
    OptimizerConfig,
    ReportConfig,
    RunConfig,
    ScheduleConfig,
    SchedulePhase,
    SequenceSplit,
    StageConfig,
    TrainableGroup,
)
from mmx_jax.config.serialize import first_difference, from_dict, to_dict

__all__ = [
    "IN_ORDER",
    "KEEP",
    "LIGHTNING",
    "LOSSLESS",
    "MESH_AXES",
    "SOFTMAX",
    "BatchConfig",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "ExpertTransport",
    "LoggingConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PrepareConfig",
    "ReportConfig",
    "RunConfig",
    "ScheduleConfig",
    "SchedulePhase",
    "SequenceSplit",
    "SourceConfig",
    "StageConfig",
    "TokenizerConfig",
    "TrainableGroup",
    "first_difference",
    "from_dict",
    "hybrid_layers",
    "to_dict",
]
