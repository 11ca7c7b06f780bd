"""A run's folder as training leaves it: a token store, and a checkpoint of a small model."""

from mmx_jax.checkpoint import CheckpointStore
from mmx_jax.config import (
    BatchConfig,
    DataConfig,
    PrepareConfig,
    RunConfig,
    ScheduleConfig,
    SchedulePhase,
    SourceConfig,
    StageConfig,
    TokenizerConfig,
    to_dict,
)
from mmx_jax.data import TokenStore
from mmx_jax.data.prepare import prepare
from tests.model.common import random_params, tiny

SENTENCES = ("The cache keeps a state for each head.", "Grüße aus Köln, 東京!", "def f(x):\n\treturn x + 1")


def make_store(folder, documents=40):
    """Prepares a store of short documents, half of them held out."""
    texts = folder / "texts"
    texts.mkdir(parents=True)
    for i in range(documents):
        body = "\n".join(SENTENCES[(i * j) % 3] + f" {i * j}" for j in range(1, 2 + i % 7))
        (texts / f"{i:03d}.txt").write_text(body)
    tokenizer = TokenizerConfig(vocab_size=330)
    prepare(
        PrepareConfig(
            inputs=(str(texts),), output=str(folder / "store"), tokenizer=tokenizer, held_out_fraction=0.5, processes=1
        ),
        progress=False,
    )
    return folder / "store"


def make_run(folder):
    """Writes a store and a workdir with one checkpoint; returns (workdir, configuration, parameters)."""
    store = make_store(folder)
    vocab_size = TokenStore(store).manifest.tokenizer["vocab_size"]
    run = RunConfig(
        name="small",
        model=tiny(layers=("lightning", "softmax"), vocab_size=vocab_size + 6),
        stages=(
            StageConfig(
                sequence_length=32,
                rope_base=500.0,
                data=DataConfig(sources=(SourceConfig(name="texts", store=str(store)),)),
                batch=BatchConfig(micro_batch=2, ramp=((0, 2),)),
                schedule=ScheduleConfig(phases=(SchedulePhase(until_tokens=64, learning_rate=1e-3),)),
            ),
        ),
    )
    params = random_params(run.model)
    metadata = {"config": to_dict(run), "progress": {"stage": "pretrain", "tokens": 64}}
    with CheckpointStore(folder / "work" / "checkpoints") as checkpoints:
        checkpoints.save(12, {"params": params, "optimizer": {}}, metadata)
        checkpoints.wait()
    return folder / "work", run, params
