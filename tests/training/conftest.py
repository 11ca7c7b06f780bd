"""A tiny run on two synthetic sources; stores are prepared once."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from mmx_jax.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    MeshConfig,
    ModelConfig,
    PrepareConfig,
    RunConfig,
    ScheduleConfig,
    SchedulePhase,
    SourceConfig,
    StageConfig,
    TokenizerConfig,
)
from mmx_jax.data.prepare import prepare

VOCAB = 320
LENGTH = 32


def _write_documents(folder: Path, words: list[str], seed: int) -> None:
    """Short documents of words that follow each other more often than not, so that there is something to learn."""
    folder.mkdir()
    chance = random.Random(seed)
    for number in range(60):
        place, text = chance.randrange(len(words)), []
        for _ in range(chance.randrange(10, 120)):
            place = (place + 1) % len(words) if chance.random() < 0.8 else chance.randrange(len(words))
            text.append(words[place])
        (folder / f"{number}.txt").write_text(" ".join(text) + "\n")


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two token stores with one tokenizer."""
    root = tmp_path_factory.mktemp("stores")
    _write_documents(root / "letters", ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta"], seed=1)
    _write_documents(root / "numbers", ["one", "two", "three", "four", "five", "six", "seven", "eight"], seed=2)
    first, second = str(root / "letters_store"), str(root / "numbers_store")
    common = {"held_out_fraction": 0.2, "processes": 1}
    trained = TokenizerConfig(vocab_size=VOCAB)
    prepare(PrepareConfig(inputs=(str(root / "letters"),), output=first, tokenizer=trained, **common), progress=False)
    shared = TokenizerConfig(path=first)
    prepare(PrepareConfig(inputs=(str(root / "numbers"),), output=second, tokenizer=shared, **common), progress=False)
    return first, second


@pytest.fixture(scope="session")
def tiny(stores: tuple[str, str]) -> RunConfig:
    """A hybrid mixture of experts on two sources whose weights change, packed, with a batch ramp and a decay."""
    model = ModelConfig(
        vocab_size=VOCAB, hidden_size=16, layers=("lightning", "softmax"), num_heads=2, num_kv_heads=1, head_dim=8,
        rotary_dim=4, ffn_hidden_size=16, num_experts=4, capacity_factor=1.25, compute_dtype="float32",
    )  # fmt: skip
    tokens = 48 * 4 * LENGTH
    sources = (
        SourceConfig(name="letters", store=stores[0], weight=((0, 1.0), (tokens, 3.0))),
        SourceConfig(name="numbers", store=stores[1], weight=((0, 2.0), (tokens, 1.0))),
    )
    stage = StageConfig(
        sequence_length=LENGTH,
        data=DataConfig(sources=sources, packing="best_fit", window_rows=32),
        batch=BatchConfig(micro_batch=4, ramp=((0, 4), (tokens // 2, 8))),
        schedule=ScheduleConfig(
            warmup_steps=4,
            phases=(
                SchedulePhase(until_tokens=tokens * 3 // 4, learning_rate=1e-2),
                SchedulePhase(until_tokens=tokens, learning_rate=1e-3, shape="exponential"),
            ),
        ),
        loss_chunk=128,
    )
    return RunConfig(
        name="tiny", model=model, stages=(stage,), mesh=MeshConfig(fsdp=1),
        checkpoint=CheckpointConfig(every_steps=4, keep_last=2),
        evaluation=EvaluationConfig(batch_size=4), logging=LoggingConfig(every_steps=4),
    )  # fmt: skip


def with_stage(config: RunConfig, **changes: object) -> RunConfig:
    """The run with fields of its only stage changed."""
    return replace(config, stages=(replace(config.stages[0], **changes),))
