"""The sequence axis: LASP+ and context-parallel softmax attention give what one device gives, and gather no more."""

import functools
import importlib
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from mmx_jax.config import IN_ORDER, ConfigError, MeshConfig, ModelConfig, SequenceSplit
from mmx_jax.data import Batch
from mmx_jax.model import TextModel, parameter_spec
from mmx_jax.model.text import REMAT_POLICIES
from mmx_jax.training.loss import next_token_loss
from mmx_jax.training.state import param_sharding
from parallel import lasp
from parallel.mesh import make_mesh
from parallel.sharding import ShardingError
from parallel.stripes import arrange, partition
from tests.model.common import random_params, relative, rows

# On one worker: what one device gives is computed once for all cases.
pytestmark = pytest.mark.xdist_group("sequence")

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=64, layers=("lightning", "softmax"), num_heads=4, num_kv_heads=2, head_dim=16,
    rotary_dim=8, ffn_hidden_size=64, compute_dtype="float32",
)  # fmt: skip
LENGTH = 128
# The compiler's own optimisations are not under test, and take most of its time.
QUICK = {"xla_backend_optimization_level": 0}


@pytest.fixture(autouse=True, scope="module")
def _compile_anew():
    """A program from the cache would not print what the compiler has to say about it."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@functools.cache
def params(config):
    return random_params(config)


def packs(length):
    """Segment ids of four rows: one document; several that cross ranks; padding over whole stripes; short ones."""
    place = np.arange(length)
    several = np.searchsorted(np.array([5, 50, 51, 90]) * length // 128, place, side="right") + 1
    padded = np.where((place < 20 * length // 128) | (place > 85 * length // 128), 0, 1 + (place > 60 * length // 128))
    short = np.where((place >= 40) & (place < 47), 0, 1 + place // 3)
    return np.stack([np.ones(length), several, padded, short]).astype(np.int32)


def batch_of(length):
    tokens, positions, segment_ids = rows(CONFIG, packs(length))
    # Every token has its own weight, so that one in a wrong place does not go unseen.
    mask = np.random.default_rng(2).uniform(0.2, 1.0, tokens.shape).astype(np.float32) * (segment_ids > 0)
    return Batch(
        tokens=tokens, targets=np.roll(tokens, -1, axis=1), positions=positions, segment_ids=segment_ids,
        loss_mask=mask, source_id=np.zeros_like(tokens),
    )  # fmt: skip


def step(config, split, remat):
    """Loss and gradients of all parameters."""

    def loss(params, batch):
        model = TextModel(config, params, remat=remat)
        return next_token_loss(model, batch, vocab_chunk=64, num_sources=1, split=split)[0]

    return jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)


def devices_mesh(sizes):
    return make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


def placed(mesh, config, batch):
    specs = parameter_spec(config)
    weights = {path: jax.device_put(w, param_sharding(specs[path], mesh)) for path, w in params(config).items()}
    return weights, jax.device_put(batch, NamedSharding(mesh, partition("batch", "sequence")))


@functools.cache
def one_device(config, length):
    return jax.device_get(step(config, IN_ORDER, "none")(params(config), batch_of(length)))


def assert_equals_one_device(capfd, config, sizes, split, remat="none"):
    mesh = devices_mesh(sizes)
    expected_loss, expected = one_device(config, LENGTH)
    capfd.readouterr()
    with jax.set_mesh(mesh):
        loss, gradients = jax.device_get(step(config, split, remat)(*placed(mesh, config, batch_of(LENGTH))))
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    assert abs(loss - expected_loss) <= 1e-5 * abs(expected_loss)
    for path, gradient in expected.items():
        assert np.abs(gradient).max() > 0, path
        assert relative(gradients[path], gradient) < 1e-5, path


EXPERTS = replace(CONFIG, num_experts=8, capacity_factor=1.0)
CASES = [
    (CONFIG, {"sequence": 2}, "zigzag", "ring", "none"),
    (CONFIG, {"sequence": 4}, "zigzag", "gather", "dots"),
    (CONFIG, {"sequence": 8}, "contiguous", "gather", "layer"),
    (CONFIG, {"sequence": 8}, "zigzag", "ring", "layer"),
    (CONFIG, {"data": 2, "sequence": 2, "tensor": 2}, "zigzag", "gather", "none"),
    (CONFIG, {"data": 2, "sequence": 4}, "contiguous", "gather", "attention"),
    (EXPERTS, {"expert": 2, "sequence": 2, "tensor": 2}, "zigzag", "gather", "experts"),
]
MATRIX = [
    (config, sizes, order, exchange, remat)
    for sizes in (
        *({"sequence": n} for n in (2, 4, 8)),
        *({axis: 2, "sequence": 4} for axis in ("data", "fsdp", "expert", "tensor")),
        {"data": 4, "sequence": 2},
        {"data": 2, "sequence": 2, "tensor": 2},
        {"fsdp": 2, "sequence": 2, "tensor": 2},
    )
    for order in ("contiguous", "zigzag")
    for exchange in ("gather", "ring")
    for config, remat in ((CONFIG, "none"), (EXPERTS, "layer"))
    if (config, sizes, order, exchange, remat) not in CASES
]


def case_name(value):
    return str(value) if not isinstance(value, ModelConfig) else "experts" if value.num_experts else "dense"


@pytest.mark.parametrize(("config", "sizes", "order", "exchange", "remat"), CASES, ids=case_name)
def test_loss_and_gradients_equal_one_device(capfd, config, sizes, order, exchange, remat):
    """INV-37, INV-38, INV-39 through a hybrid model on packed rows with padding of every kind; experts drop slots."""
    assert_equals_one_device(capfd, config, sizes, SequenceSplit(order=order, exchange=exchange), remat)


@pytest.mark.full
@pytest.mark.parametrize(("config", "sizes", "order", "exchange", "remat"), MATRIX, ids=case_name)
def test_loss_and_gradients_equal_one_device_everywhere(capfd, config, sizes, order, exchange, remat):
    """The same for the whole product."""
    assert_equals_one_device(capfd, config, sizes, SequenceSplit(order=order, exchange=exchange), remat)


KINDS = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-permute")
BYTES = {"f32": 4, "s32": 4, "pred": 1, "u32": 4}


def collectives(compiled, mesh, axis):
    """(kind, bytes of the result, element types) of each collective of a program that joins places along an axis."""
    found = []
    for line in compiled.as_text().splitlines():
        match = re.search(rf"= (\(.*?\)|\S+) ({'|'.join(KINDS)})(?:-start)?\(", line)
        if match and _joins(line, mesh, axis):
            parts = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            sizes = [BYTES[dtype] * int(np.prod([int(n) for n in shape.split(",") if n])) for dtype, shape in parts]
            found.append((match[2], sum(sizes), {dtype for dtype, _ in parts}))
    return found


def _joins(line, mesh, axis):
    """Whether a collective's groups hold places that differ along the axis."""
    if match := re.search(r"replica_groups=mesh\[.*?\] \{(.*?)\}", line):
        return f"'{axis}'" in match[1]
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", line)
    assert pairs, f"groups in an unknown form: {line}"
    along = np.indices(mesh.devices.shape)[mesh.axis_names.index(axis)].ravel()
    return any(along[int(a)] != along[int(b)] for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1]))


PURE = ModelConfig(
    vocab_size=64, hidden_size=64, layers=("lightning",), num_heads=4, num_kv_heads=4, head_dim=16, rotary_dim=8,
    ffn_hidden_size=64, compute_dtype="float32",
)  # fmt: skip


def gathered(remat, length, order="zigzag"):
    """Bytes of each all-gather of floating-point numbers along the sequence axis in a step of one lightning layer."""
    mesh = devices_mesh({"data": 2, "sequence": 4})
    with jax.set_mesh(mesh):
        traced = step(PURE, SequenceSplit(order=order), remat).lower(*placed(mesh, PURE, batch_of(length)))
    found = collectives(traced.compile(), mesh, "sequence")
    tokens = BYTES["s32"] * packs(length).size // 2
    for kind, size, _ in found:
        # What is not a sum over the mesh or a state is at most one number for each token.
        assert kind in ("all-gather", "all-reduce") or size <= tokens, (kind, size)
    return [size for kind, size, dtypes in found if kind == "all-gather" and "f32" in dtypes]


@pytest.mark.parametrize("remat", ["none", *REMAT_POLICIES])
def test_a_lightning_layer_gathers_one_state_of_each_stripe_forward_and_one_backward(remat):
    """Golden count (INV-37): two all-gathers of [8 stripes, B, N, H, H] fp32, the same at T and at 4 T."""
    states = 8 * 2 * 4 * 16 * 16 * BYTES["f32"]
    assert gathered(remat, LENGTH) == [states, states]
    assert gathered(remat, 4 * LENGTH) == [states, states]


def test_the_count_sees_a_second_gather(monkeypatch):
    """A policy that forgets the entering states gathers them again, and the golden count notices."""
    monkeypatch.setitem(REMAT_POLICIES, "layer", jax.checkpoint_policies.nothing_saveable)
    assert len(gathered("layer", LENGTH)) == 3


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_zigzag_gives_each_rank_an_early_and_a_late_stripe(ranks):
    """Rank r holds the stripes r and 2P - 1 - r, for odd and even P, of every array of the batch."""
    mesh = devices_mesh({"sequence": ranks})
    stripes = [w for r in range(ranks) for w in (r, 2 * ranks - 1 - r)]
    ints = np.arange(2 * 6 * ranks, dtype=np.int32).reshape(2, -1)
    with jax.set_mesh(mesh):
        tree = jax.jit(lambda x: arrange(x, "zigzag"))({"a": ints, "b": ints * 0.5})
    expected = ints.reshape(2, 2 * ranks, 3)[:, stripes].reshape(2, -1)
    np.testing.assert_array_equal(tree["a"], expected)
    np.testing.assert_array_equal(tree["b"], expected * 0.5)
    assert arrange(ints, "zigzag") is ints


def test_rows_that_do_not_divide_are_named():
    with jax.set_mesh(devices_mesh({"sequence": 8})):
        with pytest.raises(ShardingError, match=r"rows of 24 tokens do not divide into 16 stripes.*'sequence' has 8"):
            arrange(np.zeros((1, 24)), "zigzag")
        model = TextModel(PURE, params(PURE))
        ids = jnp.ones((1, 20), jnp.int32)
        with pytest.raises(ShardingError, match=r"rows of 20 tokens do not divide into 8 stripes"):
            model.backbone(jnp.zeros((1, 20, 64)), ids, ids)


def test_configurations_that_cannot_be_split_are_refused():
    """At the start, with the key and what would be right; one rank needs no stripes."""
    with pytest.raises(ConfigError, match=r"order = 'striped': must be one of 'contiguous', 'zigzag'"):
        SequenceSplit(order="striped")
    with pytest.raises(ConfigError, match=r"exchange = 'none': must be one of 'gather', 'ring'"):
        SequenceSplit(exchange="none")
    run = importlib.import_module("configs.research_20m").get_config()
    odd = replace(run.stages[0], sequence_length=8 * 5)
    with pytest.raises(ConfigError, match=r"sequence_length = 40: must be a multiple of the 16 stripes"):
        replace(run, stages=(odd,), mesh=MeshConfig(sequence=8))
    contiguous = replace(odd, split=IN_ORDER)
    assert replace(run, stages=(contiguous,), mesh=MeshConfig(sequence=8)).stages == (contiguous,)
    assert replace(run, stages=(odd,), mesh=MeshConfig(sequence=1)).stages == (odd,)


def walked_age(ids, end, start):
    """Real tokens from place `end` to place `start` of a row if a state survives the way, else -1: token by token."""
    before = [i for i in ids[:end] if i]
    age = 0
    for i in ids[end:start]:
        if i and i != before[-1]:
            return -1
        age += i > 0
    return age


def test_states_pass_where_the_recurrence_carries_them():
    """INV-38 against a walk over the tokens: the ages of states on random rows of documents and padding."""
    rng = np.random.default_rng(0)
    stripes, tokens = 6, 4
    stripe_ages, passing = jax.jit(lasp.stripe_ages), 0
    for _ in range(200):
        changes = rng.random(stripes * tokens) < rng.choice([0.03, 0.15, 0.5])
        ids = (1 + np.cumsum(changes)) * (rng.random(stripes * tokens) > rng.choice([0.0, 0.2, 0.8]))
        ids[rng.integers(24) :] *= rng.integers(2)
        ages = np.asarray(stripe_ages(jnp.asarray(ids.reshape(1, stripes, tokens), jnp.int32)))[0]
        for w in range(stripes):
            own = [i for i in ids[w * tokens : (w + 1) * tokens] if i]
            for j in range(stripes):
                held = [i for i in ids[j * tokens : (j + 1) * tokens] if i]
                if j >= w:
                    assert ages[w, j] == -1
                elif own and held:
                    age = walked_age(ids, (j + 1) * tokens, w * tokens)
                    age = age if own[0] == [i for i in ids[: w * tokens] if i][-1] else -1
                    assert ages[w, j] == age, (ids, w, j)
                    passing += age > 0
    assert passing > 100


def test_a_prefix_without_decay_is_noticed(monkeypatch):
    """INV-37: states that do not age on their way change the gradients by much more than the tolerance."""
    mesh = devices_mesh({"sequence": 4})
    ages = lasp.stripe_ages
    monkeypatch.setattr(lasp, "stripe_ages", lambda ids: jnp.minimum(ages(ids), 0))
    _, expected = one_device(CONFIG, LENGTH)
    with jax.set_mesh(mesh):
        _, gradients = step(CONFIG, SequenceSplit(), "none")(*placed(mesh, CONFIG, batch_of(LENGTH)))
    assert relative(gradients["layers/0/0/attention/qkv"], expected["layers/0/0/attention/qkv"]) > 1e-3
