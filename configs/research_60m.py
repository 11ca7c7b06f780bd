"""Research size 60M: the same 50M tokens of real text for a hybrid, a pure softmax and a pure lightning model.

    apt-get install dict-gcide linux-doc-6.1
    python train.py --config configs/research_60m.py:hybrid             (or softmax, lightning)

Data: the Collaborative International Dictionary of English, the Linux kernel's documentation and Python's standard
library, about 20M tokens, each in the proportion of its size; prepared at the first start with one tokenizer of 16,384
pieces (trained on all three, hence the fourth store). The dictionary is one file: it is cut into documents of 64 KiB.
Hardware: one H100-class GPU. On an H200 about three minutes each, compilation and evaluation included; held-out bits
per byte 1.091 (hybrid), 1.082 (softmax), 1.151 (lightning): docs/results.md has them by source.
"""

from dataclasses import replace

from mmx_jax.config import (
    LIGHTNING,
    SOFTMAX,
    BatchConfig,
    CheckpointConfig,
    ConfigError,
    DataConfig,
    ModelConfig,
    PrepareConfig,
    RunConfig,
    ScheduleConfig,
    SchedulePhase,
    SourceConfig,
    StageConfig,
    TokenizerConfig,
    hybrid_layers,
)

FOLDER = "runs/data/research_60m"
TOKENS = 50_000_000
DOCUMENT_BYTES = 65_536
HELD_OUT = 0.02
LAYERS = {"hybrid": hybrid_layers(8), "softmax": (SOFTMAX,) * 8, "lightning": (LIGHTNING,) * 8}
CORPORA = {
    "gcide": ("/usr/share/dictd/gcide.dict.dz", "GPL-2.0-or-later", 11.7),
    "linux_doc": ("/usr/share/doc/linux-doc-6.1/**/*.rst.gz", "GPL-2.0-only", 7.6),
    "stdlib": ("python:stdlib", "PSF-2.0", 3.0),
}
"""Input, licence and share (millions of tokens) of each source."""


def stores() -> tuple[PrepareConfig, ...]:
    """All corpora together, for the tokenizer, then each by itself."""
    together = PrepareConfig(
        inputs=tuple(path for path, _, _ in CORPORA.values()),
        output=f"{FOLDER}/all",
        tokenizer=TokenizerConfig(vocab_size=16_384),
        license=" AND ".join(license for _, license, _ in CORPORA.values()),
        document_bytes=DOCUMENT_BYTES,
        held_out_fraction=HELD_OUT,
    )
    tokenizer = TokenizerConfig(path=together.output)
    each = (
        replace(together, inputs=(path,), output=f"{FOLDER}/{name}", tokenizer=tokenizer, license=license)
        for name, (path, license, _) in CORPORA.items()
    )
    return (together, *each)


def get_config(kind: str = "hybrid") -> RunConfig:
    """The run with one kind of attention; everything else is the same.

    Raises:
      ConfigError: for another kind.
    """
    if kind not in LAYERS:
        raise ConfigError(f"no kind {kind!r}: give one of {', '.join(LAYERS)}")
    model = ModelConfig(
        vocab_size=16_384,
        hidden_size=512,
        layers=LAYERS[kind],
        num_heads=4,
        num_kv_heads=2,
        head_dim=128,
        rotary_dim=64,
        ffn_hidden_size=320,
        num_experts=8,
        capacity_factor=1.25,
    )
    sources = tuple(
        SourceConfig(name=name, store=f"{FOLDER}/{name}", weight=((0, share),))
        for name, (_, _, share) in CORPORA.items()
    )
    stage = StageConfig(
        sequence_length=2048,
        data=DataConfig(sources=sources, prepare=stores()),
        batch=BatchConfig(micro_batch=16, ramp=((0, 16),)),
        schedule=ScheduleConfig(
            warmup_steps=100,
            phases=(
                SchedulePhase(until_tokens=TOKENS * 3 // 4, learning_rate=1e-3),
                SchedulePhase(until_tokens=TOKENS, learning_rate=5e-5, shape="exponential"),
            ),
        ),
        loss_chunk=16_384,
    )
    return RunConfig(
        name=f"research_60m_{kind}", model=model, stages=(stage,), checkpoint=CheckpointConfig(every_steps=500)
    )
