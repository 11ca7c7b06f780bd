"""What a model costs: matmul FLOPs per token as built, the published estimates beside them, and device peaks.

One multiply-add is two FLOPs. Counted are matrix products that the mathematics needs: causal pairs only, the experts a
token is sent to, no recomputation, no element-wise work. So figures are the numerator of an MFU, not a trace's sum.
"""

from dataclasses import dataclass

from mmx_jax.config import LIGHTNING, ModelConfig

NOMINAL_CHUNK = 64
"""C at which lightning attention is counted; kernels may use another, which changes their work and not this figure."""

TRAINING_FACTOR = 3
"""Forward and backward over forward: each product has two more in the backward pass, lightning's included."""

PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("A100", 312e12),
    ("TPU v6", 918e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v4", 275e12),
)
"""Dense bf16 peak by a part of JAX's device kind; the first entry that matches counts."""


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 peak of one device, FLOP/s, by `jax.Device.device_kind`; None for a CPU or an unknown device."""
    kind = device_kind.lower()
    return next((peak for part, peak in PEAK_FLOPS if part.lower() in kind), None)


def causal_pairs(length: int, chunk: int) -> int:
    """(query, key) pairs with key <= query inside chunks of `chunk` tokens, over `length` tokens, ragged tail included.

    Raises:
      ValueError: if a length is not positive.
    """
    if length < 1 or chunk < 1:
        raise ValueError(f"length and chunk must be positive, got {length} and {chunk}")
    full, tail = divmod(length, chunk)
    return full * (chunk * (chunk + 1) // 2) + tail * (tail + 1) // 2


@dataclass(frozen=True)
class ForwardFlops:
    """Forward FLOPs per token by component, each a mean over the tokens of one sequence."""

    lightning_projections: float
    """qkv, output gate and output projection of all lightning layers."""
    lightning_mixing: float
    """Pairs inside chunks, and the state read and written by every token."""
    softmax_projections: float
    softmax_mixing: float
    """Scores and weighted values over all earlier tokens: the part that grows with the length."""
    router: float
    ffn: float
    """The experts that a token is sent to, or the dense FFN."""
    head: float

    @property
    def total(self) -> float:
        """Sum over the components."""
        return sum(vars(self).values())


def forward_flops(
    config: ModelConfig, sequence_length: int, *, chunk: int = NOMINAL_CHUNK, decode: bool = False
) -> ForwardFlops:
    """Forward FLOPs per token of the model as built, averaged over a sequence of `sequence_length` tokens.

    Args:
      config: the model.
      sequence_length: tokens of one document; packed documents cost less than one of their joint length.
      chunk: C of lightning attention.
      decode: cost of the ONE token after `sequence_length - 1` cached ones instead (lightning by the recurrence).

    Raises:
      ValueError: if a length is not positive.
    """
    D, N, K, H, F = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, config.ffn_hidden_size
    lightning = sum(kind == LIGHTNING for kind in config.layers)
    softmax = config.num_layers - lightning
    rank = config.gate_rank
    gate = 2 * D * N * H if rank is None else 2 * rank * (D + N * H)
    seen = float(sequence_length) if decode else causal_pairs(sequence_length, sequence_length) / sequence_length
    within = 0.0 if decode else causal_pairs(sequence_length, chunk) / sequence_length
    return ForwardFlops(
        lightning_projections=float(lightning * (2 * D * 3 * N * H + gate + 2 * N * H * D)),
        lightning_mixing=lightning * N * (4 * H * within + 4 * H * H),
        softmax_projections=float(softmax * (2 * D * (N + 2 * K) * H + 2 * N * H * D)),
        softmax_mixing=softmax * 4 * N * H * seen,
        router=float(config.num_layers * 2 * D * config.num_experts),
        ffn=float(config.num_layers * 3 * 2 * D * F * (config.experts_per_token if config.num_experts else 1)),
        head=float(2 * D * config.vocab_size),
    )


def training_flops_per_token(config: ModelConfig, sequence_length: int, *, chunk: int = NOMINAL_CHUNK) -> float:
    """FLOPs of forward and backward per token: the figure to multiply with tokens/s for an MFU.

    Raises:
      ValueError: if a length is not positive.
    """
    return TRAINING_FACTOR * forward_flops(config, sequence_length, chunk=chunk).total


PUBLISHED_KINDS = ("softmax", "lightning", "hybrid")


def published_training_flops_per_token(
    kind: str, *, num_layers: int, hidden_size: int, num_heads: int, sequence_length: int
) -> float:
    """The report's estimate (Table 1, recipe §1.2): FFN width 8d/3, d = N H, gate rank and block d/N, no head, no
    causal halving.

    Args:
      kind: "softmax", "lightning" or "hybrid" (one softmax layer in eight).

    Raises:
      ValueError: for another kind.
    """
    d, h, n = hidden_size, num_heads, sequence_length
    if kind not in PUBLISHED_KINDS:
        raise ValueError(f"published formulas are for {', '.join(PUBLISHED_KINDS)}, not {kind!r}")
    mixing = {"softmax": n / (6 * d), "lightning": 1 / (2 * h), "hybrid": n / (48 * d) + 7 / (16 * h)}[kind]
    return 72 * num_layers * d * d * (1 + mixing + 5 / (18 * d))


def published_parameters(kind: str, *, num_layers: int, hidden_size: int, num_heads: int) -> float:
    """The report's parameter estimate without embeddings (Table 1, recipe §1.2), low-rank gate.

    Raises:
      ValueError: for another kind than "softmax", "lightning" or "hybrid".
    """
    if kind not in PUBLISHED_KINDS:
        raise ValueError(f"published formulas are for {', '.join(PUBLISHED_KINDS)}, not {kind!r}")
    gate = {"softmax": 0.0, "lightning": 2.0, "hybrid": 7 / 4}[kind]
    return num_layers * hidden_size**2 * (12 + gate / num_heads)
