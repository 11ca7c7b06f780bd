"""A run: a model, a mesh, and a list of stages."""

from dataclasses import dataclass

from mmx_jax.config.checks import at_least, fail, one_of, positive, seed_fits
from mmx_jax.config.data import DataConfig
from mmx_jax.config.model import ModelConfig

MESH_AXES = ("data", "fsdp", "expert", "sequence", "tensor")
KEEP = ("params", "optimizer", "step", "data")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each named mesh axis; one of them may be -1 and takes the devices that are left."""

    data: int = 1
    """Replicas of parameters and optimizer state."""
    fsdp: int = -1
    """Shards of parameters and optimizer state; also splits the batch."""
    expert: int = 1
    """Shards of the expert dimension; also splits the batch and dense parameters."""
    sequence: int = 1
    """Shards of the sequence (context parallelism)."""
    tensor: int = 1
    """Shards of heads and of the FFN hidden width."""

    def __post_init__(self) -> None:
        for axis in MESH_AXES:
            if (size := getattr(self, axis)) < 1 and size != -1:
                fail(self, axis, "must be at least 1, or -1 for the devices that are left")
        if sum(getattr(self, axis) == -1 for axis in MESH_AXES) > 1:
            fail(self, "fsdp", "only one mesh axis may be -1")


@dataclass(frozen=True, kw_only=True)
class SchedulePhase:
    """One piece of the learning-rate curve; it starts where the piece before it ends."""

    until_tokens: int
    """Tokens of the stage at which the phase ends."""
    learning_rate: float
    """Learning rate at the end of the phase."""
    shape: str = "constant"
    """"constant" jumps to the rate at the start; "linear", "exponential" and "cosine" move to it in tokens."""

    def __post_init__(self) -> None:
        at_least(self, 1, "until_tokens")
        one_of(self, "shape", ("constant", "linear", "exponential", "cosine"))
        if self.learning_rate or self.shape == "exponential":  # (zero is a rate too, but nothing decays to it so)
            positive(self, "learning_rate")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate as a function of steps (warm-up) and of tokens (everything after)."""

    phases: tuple[SchedulePhase, ...]
    """Pieces in token order; the last one ends the stage."""
    warmup_steps: int = 500
    """Steps of linear warm-up, from 1/warmup_steps of the rate to the whole rate; a factor on the curve."""

    def __post_init__(self) -> None:
        ends = [phase.until_tokens for phase in self.phases]
        if not ends or ends != sorted(set(ends)):
            fail(self, "phases", "needs phases with until_tokens increasing")
        if self.phases[0].shape != "constant":
            fail(self, "phases", "the first phase must be 'constant'; warm-up is `warmup_steps`")
        at_least(self, 0, "warmup_steps")

    @property
    def tokens(self) -> int:
        """Token budget of the stage."""
        return self.phases[-1].until_tokens


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Sequences a step; a step is one or more micro-batches of one shape."""

    micro_batch: int
    """Sequences of one micro-batch, over all devices."""
    ramp: tuple[tuple[int, int], ...]
    """Points (tokens of the stage, sequences a step): from so many tokens on, so many sequences."""

    def __post_init__(self) -> None:
        at_least(self, 1, "micro_batch")
        starts = [tokens for tokens, _ in self.ramp]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            fail(self, "ramp", "needs points (tokens, sequences) with tokens increasing from 0")
        for _, sequences in self.ramp:
            if sequences < self.micro_batch or sequences % self.micro_batch:
                fail(self, "ramp", f"{sequences} sequences are no multiple of micro_batch = {self.micro_batch}")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with parameter groups (report §4.2; what it does not say: recipe §14)."""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Applied to the parameters whose spec is in the "decay" group: all matrices, no norms."""
    clip_norm: float | None = 1.0
    """Global gradient norm from which gradients are scaled down; None never clips."""
    moment_dtype: str = "float32"
    """Dtype of both moments."""
    max_skipped_steps: int = 10
    """Consecutive non-finite updates that are skipped before the run stops."""

    def __post_init__(self) -> None:
        for field in ("b1", "b2"):
            if not 0 <= getattr(self, field) < 1:
                fail(self, field, "must be in [0, 1)")
        at_least(self, 0, "weight_decay", "max_skipped_steps")
        positive(self, "eps", "clip_norm")
        one_of(self, "moment_dtype", ("float32", "bfloat16"))


@dataclass(frozen=True, kw_only=True)
class TrainableGroup:
    """Which parameters learn, and how fast; the first group whose pattern matches a parameter's path decides."""

    pattern: str = "*"
    """Shell pattern over parameter paths."""
    learning_rate_factor: float = 1.0
    """Factor on the learning rate; 0 freezes, and frozen parameters have no moments."""

    def __post_init__(self) -> None:
        at_least(self, 0, "learning_rate_factor")


@dataclass(frozen=True, kw_only=True)
class ExpertTransport:
    """How routed rows travel to experts on other devices; does not change what is computed unless rows are lost."""

    block_factor: float = 1.5
    """Rows of an all-to-all block over the rows that it carries when the routing is balanced."""
    max_rounds: int | None = None
    """All-to-alls per token group at most; rows that still wait then are lost and counted. None loses none."""
    bucket_factor: float | None = None
    """With a capacity and one round: rows that an expert multiplies over those that it gets when the routing is
    balanced. What arrives is laid together, without the empty rows of blocks; rows beyond are lost and counted. None
    multiplies whole blocks, and so does a factor that blocks do not exceed."""
    token_groups: int = 1
    """Parts of a device's tokens that travel one after the other; the matmuls of one can hide the travel of another."""

    def __post_init__(self) -> None:
        at_least(self, 1, "max_rounds", "token_groups")
        positive(self, "block_factor", "bucket_factor")
        if self.bucket_factor is not None and self.max_rounds != 1:
            fail(self, "bucket_factor", "loses rows for good: needs max_rounds = 1, or must be None")


LOSSLESS = ExpertTransport()
"""The transport of every model that is not told another."""


@dataclass(frozen=True, kw_only=True)
class SequenceSplit:
    """How rows are split over the mesh's sequence axis (docs/sequence_parallelism.md); changes no result."""

    order: str = "zigzag"
    """"zigzag" gives each rank an early and a late stripe of a row, the same work for all; "contiguous" gives one."""
    exchange: str = "gather"
    """What softmax layers do for keys and values: "gather" all of them, or pass them around a "ring" (less memory)."""

    def __post_init__(self) -> None:
        one_of(self, "order", ("contiguous", "zigzag"))
        one_of(self, "exchange", ("gather", "ring"))

    def stripes(self, ranks: int) -> int:
        """Into how many equal stripes a row is cut; its length is a multiple."""
        return ranks * (2 if self.order == "zigzag" else 1) if ranks > 1 else 1


IN_ORDER = SequenceSplit(order="contiguous")
"""The split of rows that nobody rearranged."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of a run: what is trained, on what, for how long, starting from what."""

    name: str = "pretrain"
    """Name in folders and logs; stages of a run have different names."""
    kind: str = "pretrain"
    """What the stage does; decides the data pipeline and the default loss."""
    sequence_length: int
    """T: tokens of a row."""
    data: DataConfig
    batch: BatchConfig
    schedule: ScheduleConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    trainable: tuple[TrainableGroup, ...] = (TrainableGroup(),)
    loss: str = "next_token"
    """Name of a function (model, batch) -> (loss, metrics)."""
    rope_base: float | None = None
    """Base of the rotary frequencies in this stage; None is the model's."""
    init_from: str | None = None
    """Checkpoints of another run, or a folder of published safetensors (keep=("params",)); None is the stage before."""
    keep: tuple[str, ...] = KEEP
    """What is taken over: any of params, optimizer, step, data of the stage before; of `init_from` params at least."""
    other_tokenizer: bool = False
    """Allows rows of another tokenizer than the one that the parameters taken over were trained with."""
    remat: str = "none"
    """What the backward pass finds of a layer, from least to most: "layer" (its input), "attention" (the output of
    attention, too), "dots" (the results of dense weights), "experts" (those of experts, too, and rows that travelled),
    "none" (everything). What is missing is computed again; softmax attention never is."""
    transport: ExpertTransport = LOSSLESS
    """How routed rows travel on a mesh."""
    split: SequenceSplit = SequenceSplit()
    """How rows lie on a mesh whose sequence axis is larger than 1."""
    loss_chunk: int = 32_768
    """Tokens times vocabulary are never held whole: the loss runs over chunks of so many vocabulary entries."""

    def __post_init__(self) -> None:
        at_least(self, 1, "sequence_length", "loss_chunk")
        one_of(self, "kind", ("pretrain",))
        one_of(self, "loss", ("next_token",))
        one_of(self, "remat", ("none", "attention", "layer", "dots", "experts"))
        if unknown := sorted(set(self.keep) - set(KEEP)):
            fail(self, "keep", f"holds {unknown}; allowed are {', '.join(KEEP)}")
        if not self.trainable:
            fail(self, "trainable", "needs at least one group")
        if self.init_from is not None and "params" not in self.keep:
            fail(self, "keep", f"must hold 'params': init_from = {self.init_from!r} is there to take them from")
        positive(self, "rope_base", above=1.0)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run saves and what it keeps."""

    every_steps: int = 1000
    """Steps between saves; the last step and the start of the final decay are saved in any case."""
    keep_last: int = 3
    """Newest checkpoints kept; those at `keep_every_steps` and before the final decay are kept beside them."""
    keep_every_steps: int | None = None

    def __post_init__(self) -> None:
        at_least(self, 1, "every_steps", "keep_last", "keep_every_steps")


@dataclass(frozen=True, kw_only=True)
class CompilerConfig:
    """Options of XLA for the training step, by platform; they change no result beyond rounding."""

    tpu: tuple[tuple[str, str], ...] = (("xla_tpu_enable_async_all_to_all", "true"),)
    """(name, value) pairs on TPU. The default lets tokens travel to their experts while others are multiplied."""
    gpu: tuple[tuple[str, str], ...] = ()
    """(name, value) pairs on GPUs."""

    def __post_init__(self) -> None:
        for field in ("tpu", "gpu"):
            names = [name for name, _ in getattr(self, field)]
            if wrong := [name for name in names if not name.startswith("xla_")]:
                fail(self, field, f"options of XLA begin with 'xla_', got {wrong}")
            if len(names) != len(set(names)):
                fail(self, field, "names an option twice")

    def options(self, platform: str) -> dict[str, str | bool] | None:
        """Options for the devices of a platform, by `jax.Device.platform`; None if it has none here."""
        if platform == "gpu":  # (where XLA does not read "true")
            return {name: {"true": True, "false": False}.get(value, value) for name, value in self.gpu}
        return dict(self.tpu) if platform == "tpu" else None


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out evaluation during and after training."""

    every_steps: int | None = None
    """Steps between evaluations; None evaluates only at the end."""
    max_tokens: int | None = 1_000_000
    """Held-out tokens per source that are scored; None scores all."""
    batch_size: int = 8
    """Rows of an evaluation batch."""

    def __post_init__(self) -> None:
        at_least(self, 1, "every_steps", "max_tokens", "batch_size")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What a run writes beside checkpoints."""

    every_steps: int = 10
    """Steps between console lines and TensorBoard points; metrics.jsonl has every step."""
    profile_steps: tuple[int, int] | None = None
    """First and last step of a profiler trace."""

    def __post_init__(self) -> None:
        at_least(self, 1, "every_steps")
        if self.profile_steps is not None and not 1 <= self.profile_steps[0] <= self.profile_steps[1]:
            fail(self, "profile_steps", "must be (first, last) with 1 <= first <= last")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What a finished run prints: held-out loss always; the rest for demonstrations."""

    baselines: bool = False
    """Unigram and bigram tables and `xz -9` on the same held-out text."""
    prompts: tuple[str, ...] = ()
    """Prompts to continue; on a command line one with a comma is quoted twice: --config.report.prompts="'a, b'"."""
    max_new_tokens: int = 120
    """Tokens of each continuation."""
    continue_finished: bool = False
    """Started again after its end, the run goes on from the checkpoint before the decay for one more budget."""
    next_commands: tuple[str, ...] = ()
    """Lines printed at the very end; {workdir} stands for the run's folder, other braces are doubled."""

    def __post_init__(self) -> None:
        at_least(self, 1, "max_new_tokens")
        for line in self.next_commands:
            try:
                line.format(workdir="")
            except (ValueError, LookupError, AttributeError) as error:
                fail(self, "next_commands", f"{line!r}: only {{workdir}} may stand in braces ({error!r})")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run; stored with it."""

    name: str
    model: ModelConfig
    stages: tuple[StageConfig, ...]
    mesh: MeshConfig = MeshConfig()
    compiler: CompilerConfig = CompilerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    report: ReportConfig = ReportConfig()
    seed: int = 0
    """Seed of the initialisation."""
    workdir: str | None = None
    """Folder of checkpoints, metrics and plots; None is runs/<name>. The flag --workdir overrides it."""

    def __post_init__(self) -> None:
        seed_fits(self)
        if not self.stages:
            fail(self, "stages", "needs at least one stage")
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            fail(self, "stages", f"names must differ, got {names}")
        for stage in self.stages:
            stripes = stage.split.stripes(self.mesh.sequence)
            if stage.sequence_length % stripes:
                fail(stage, "sequence_length", f"must be a multiple of the {stripes} stripes that rows are split into")
