"""Drop rates by capacity: against a loop over slots, against training's own count, and as a task."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from mmx_jax.config import ConfigError
from mmx_jax.data import TokenStore, held_out_batches
from mmx_jax.evaluation import EvalModel, find_tasks
from mmx_jax.evaluation.routing import Routing, dropped_slots
from mmx_jax.model import TextModel
from tests.inference.trained import make_run
from tests.model.common import random_params, tiny


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25])
def test_dropped_slots_are_those_that_come_too_late(factor, shards):
    """A loop that gives out places one by one."""
    noise = np.random.default_rng(0)
    slots, tokens = noise.integers(0, 9, (4, 2, 3)), np.array([13, 11, 0, 12])
    expected = 0
    for part in np.arange(4).reshape(shards, -1):
        capacity = -(-int(factor * 100) * 2 * int(tokens[part].sum()) // 300)
        for layer in range(2):
            for expert in range(3):
                free = capacity
                for _ in range(slots[part, layer, expert].sum()):
                    expected, free = (expected, free - 1) if free else (expected + 1, 0)
    assert dropped_slots(slots, tokens, factor, 2, shards) == expected


def test_the_task_counts_what_training_drops(tmp_path):
    """The global figure of the first layer's rows is the drop rate that training reports; local ones are no lower."""
    _, config, params = make_run(tmp_path)
    model = dataclasses.replace(config.model, capacity_factor=1.0)
    task = Routing.from_config(config, config.stages[-1])
    task = dataclasses.replace(task, batch_size=4, max_tokens=None, capacity_factors=(1.0,))
    result = task.run(EvalModel(model, params))
    rates = result.groups["capacity 1.0"]
    assert set(rates) == {"global", "local_2", "local_4"}
    assert 0 < rates["global"] <= rates["local_2"] <= rates["local_4"] < 1
    (_, folder), text = task.stores[0], TextModel(model, params)
    batch = next(iter(held_out_batches(TokenStore(folder, split="held_out"), task.sequence_length, 4, None)))
    tokens, positions, segment_ids = map(jnp.asarray, (batch.tokens, batch.positions, batch.segment_ids))
    _, aux, _ = text.backbone(text.embed(tokens), positions, segment_ids, train=True)
    (slots, tokens), *_ = task._counts(EvalModel(model, params), folder)
    own = dropped_slots(slots[:, :1], tokens, 1.0, model.experts_per_token, 1) / slots[:, :1].sum()
    assert own == pytest.approx(float(aux.dropped[0]), abs=1e-6)


def test_a_model_without_experts_is_refused():
    config = tiny(num_experts=0)
    (task,) = find_tasks("routing")
    with pytest.raises(ConfigError, match="has no experts"):
        task(stores=(), sequence_length=8).run(EvalModel(config, random_params(config)))
