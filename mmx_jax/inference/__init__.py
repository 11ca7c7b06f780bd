"""Inference: prefill, decode, sampling, and a command that continues prompts."""

from mmx_jax.inference.generator import Generator, inference_params
from mmx_jax.inference.sampling import GREEDY, SamplingConfig

__all__ = ["GREEDY", "Generator", "SamplingConfig", "inference_params"]
