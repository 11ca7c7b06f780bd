"""What the model is: shapes, layer kinds and the options of the published ablations."""

from dataclasses import dataclass

from mmx_jax.config.checks import at_least, divides, fail, one_of, positive

LIGHTNING = "lightning"
SOFTMAX = "softmax"


def hybrid_layers(num_layers: int, period: int = 8) -> tuple[str, ...]:
    """Layer kinds with softmax attention in every `period`-th layer (the last one of a shorter list), else lightning.

    The released model is `hybrid_layers(80)`: softmax at 7, 15, ..., 79 (INV-05).
    """
    period = min(period, num_layers)
    return tuple(SOFTMAX if (i + 1) % period == 0 else LIGHTNING for i in range(num_layers))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A MiniMax-01 shaped text model. Letters are the project's alphabet of dimensions (README)."""

    vocab_size: int
    """V: rows of the embedding and of the head."""
    hidden_size: int
    """D: model width."""
    layers: tuple[str, ...]
    """L layer kinds, each "lightning" or "softmax", in order."""
    num_heads: int
    """N: query heads of both kinds; lightning layers have as many key/value heads."""
    num_kv_heads: int
    """K: key/value heads of softmax layers."""
    head_dim: int
    """H."""
    rotary_dim: int
    """How many leading dims of a softmax head are rotated (even, at most H; 0 rotates none)."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies; a training stage may override it."""
    ffn_hidden_size: int
    """F: hidden width of one expert, or of the only FFN when `num_experts` is 0."""
    num_experts: int = 0
    """E: experts per layer; 0 is a dense SwiGLU FFN."""
    experts_per_token: int = 2
    """How many experts each token is sent to."""
    capacity_factor: float | None = None
    """Expert capacity in training is ceil(factor * experts_per_token * real tokens / E); None drops nothing."""
    capacity_scope: str = "global"
    """Whose tokens share an expert's capacity: "global" the whole micro-batch's (the report's global router), "shard"
    those of each device (the ablation: what is dropped then depends on the mesh)."""
    aux_loss: str = "report"
    """Load-balancing loss: "report" is (1/E) sum f m (GShard), "hub" is E sum f P over all layers' tokens (Mixtral)."""
    aux_loss_coefficient: float = 0.01
    """Weight of the load-balancing loss: 0.01 for "report" (pre-training), 0.001 for "hub" (released config)."""
    norm: str = "deepnorm"
    """"deepnorm": the residual is the normed input times alpha; "prenorm": the residual is the input itself."""
    lightning_alpha: float | None = None
    """Residual factor of lightning attention; None is (2L)^(1/4) for "deepnorm" and 1 for "prenorm"."""
    softmax_alpha: float | None = None
    """Residual factor of softmax attention; None as above."""
    ffn_alpha: float | None = None
    """Residual factor of the FFN; None as above."""
    lightning_beta: float = 1.0
    """Factor of the lightning branch at run time (the published 0.1988 is an initialisation gain: `init_gain`)."""
    softmax_beta: float = 1.0
    """Factor of the softmax branch at run time."""
    ffn_beta: float = 1.0
    """Factor of the FFN branch at run time."""
    init_gain: float | None = None
    """Xavier gain of value, output and FFN weights; None is (8L)^(-1/4) for "deepnorm" and 1 for "prenorm"."""
    norm_eps: float = 1e-5
    """Epsilon of the block norms and of the final norm."""
    lightning_norm_eps: float = 1e-6
    """Epsilon of the joint norm inside lightning attention (INV-13)."""
    gate_rank: int | None = None
    """Rank of the lightning output gate; None is the released full-rank gate."""
    trained_vocab_size: int | None = None
    """Ids from here on have no trained row and are never sampled (INV-41); None means all are trained."""
    end_of_text_id: int | None = None
    """Generation stops at this id (INV-42), and it ends each training document."""
    compute_dtype: str = "bfloat16"
    """Dot policy of the matmuls: "bfloat16" (fp32 accumulation) or "float32"."""

    def __post_init__(self) -> None:
        at_least(self, 1, "vocab_size", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_hidden_size")
        at_least(self, 1, "experts_per_token", "gate_rank", "trained_vocab_size")
        at_least(self, 0, "num_experts", "rotary_dim", "aux_loss_coefficient", "end_of_text_id")
        at_least(self, 0, "lightning_beta", "softmax_beta", "ffn_beta")
        positive(self, "lightning_alpha", "softmax_alpha", "ffn_alpha", "init_gain", "norm_eps", "lightning_norm_eps")
        positive(self, "capacity_factor")  # (None is dropless routing)
        positive(self, "rope_base", above=1.0)
        if not self.layers:
            fail(self, "layers", "needs at least one layer")
        if unknown := sorted(set(self.layers) - {LIGHTNING, SOFTMAX}):
            fail(self, "layers", f"holds {unknown}; every layer must be {LIGHTNING!r} or {SOFTMAX!r}")
        divides(self, "num_kv_heads", "num_heads")
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            fail(self, "rotary_dim", f"must be even and at most head_dim = {self.head_dim}")
        if self.num_experts and self.experts_per_token > self.num_experts:
            fail(self, "experts_per_token", f"must be at most num_experts = {self.num_experts}")
        for field in ("trained_vocab_size", "end_of_text_id"):
            if (value := getattr(self, field)) is not None and value > self.vocab_size - (field == "end_of_text_id"):
                fail(self, field, f"must fit in vocab_size = {self.vocab_size}")
        one_of(self, "norm", ("deepnorm", "prenorm"))
        one_of(self, "capacity_scope", ("global", "shard"))
        one_of(self, "aux_loss", ("report", "hub"))
        one_of(self, "compute_dtype", ("bfloat16", "float32"))

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    def alpha(self, branch: str) -> float:
        """Residual factor of branch "lightning", "softmax" or "ffn" (INV-04)."""
        given = getattr(self, f"{branch}_alpha")
        if given is not None:
            return given
        return (2 * self.num_layers) ** 0.25 if self.norm == "deepnorm" else 1.0

    @property
    def weight_gain(self) -> float:
        """Xavier gain of value, output and FFN weights (DeepNorm's beta; report §4.2, INV-04)."""
        if self.init_gain is not None:
            return self.init_gain
        return (8 * self.num_layers) ** -0.25 if self.norm == "deepnorm" else 1.0
