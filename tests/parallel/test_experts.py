"""The global router's queue and the transport of routed rows, against plain numpy loops over all tokens."""

from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from parallel.experts import expert_capacity, mix_experts
from parallel.mesh import make_mesh
from parallel.sharding import DEFAULT_RULES, ShardingError

B, T, D, E, F, K = 8, 16, 8, 8, 8, 2
# On one worker: what one device gives is computed once for all cases.
pytestmark = pytest.mark.xdist_group("experts")

SHARE = Fraction("1.0") * K / E


class Case(NamedTuple):
    """Tokens, routes and weights, as numpy arrays."""

    x: np.ndarray
    expert: np.ndarray
    weight: np.ndarray
    weights: tuple[np.ndarray, np.ndarray, np.ndarray]


def _case() -> Case:
    """Skewed routes: the first experts are wanted most, a ninth of the tokens is padding."""
    noise = np.random.default_rng(11)
    wishes = noise.random((B, T, E)) - 0.12 * np.arange(E)
    expert = np.argsort(-wishes, axis=-1)[..., :K].astype(np.int32)
    expert[noise.random((B, T)) < 1 / 9] = E
    weight = noise.uniform(0.2, 0.8, (B, T, K)).astype(np.float32)
    x, *weights = (
        noise.standard_normal(shape).astype(np.float32) for shape in ((B, T, D), (E, D, F), (E, D, F), (E, F, D))
    )
    return Case(x, expert, weight, tuple(weights))


CASE = _case()
REAL = jnp.int32((CASE.expert[..., 0] < E).sum())


def _kept(cells: list[list[tuple[int, int]]]) -> np.ndarray:
    """Which slots are kept when the tokens of each cell, in this order, share the capacity."""
    kept = np.zeros((B, T, K), bool)
    for cell in cells:
        real = sum(CASE.expert[token][0] < E for token in cell)
        capacity = -(-SHARE.numerator * int(real) // SHARE.denominator)
        taken = [0] * E
        for token in cell:
            for slot in range(K):
                expert = CASE.expert[token][slot]
                if expert < E and taken[expert] < capacity:
                    taken[expert] += 1
                    kept[token][slot] = True
    return kept


def _sum(kept: np.ndarray) -> np.ndarray:
    """Each token's kept experts, in float64."""
    out = np.zeros((B, T, D))
    gate, up, down = (w.astype(np.float64) for w in CASE.weights)
    for b, t, slot in np.argwhere(kept):
        e, x = CASE.expert[b, t, slot], CASE.x[b, t].astype(np.float64)
        hidden = x @ gate[e]
        out[b, t] += CASE.weight[b, t, slot] * ((hidden / (1 + np.exp(-hidden)) * (x @ up[e])) @ down[e])
    return out


ALL = [[(b, t) for b in range(B) for t in range(T)]]


def _zigzag(ranks: int) -> np.ndarray:
    """Natural place of each token when rank r holds the stripes r and 2 ranks - 1 - r."""
    stripes = np.arange(T).reshape(2 * ranks, -1)
    return np.concatenate([stripes[[rank, 2 * ranks - 1 - rank]].reshape(-1) for rank in range(ranks)])


def _mix(sizes: dict[str, int], place: np.ndarray | None = None, **settings: object) -> tuple[np.ndarray, float, float]:
    """The sum on a mesh, with the tokens of rows moved to `place`, and the dropped and lost shares."""
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    place = np.arange(T) if place is None else place
    tokens = NamedSharding(mesh, PartitionSpec(DEFAULT_RULES.batch, DEFAULT_RULES.sequence))
    with jax.set_mesh(mesh):
        moved = [jax.device_put(array[:, place], tokens) for array in (CASE.x, CASE.expert, CASE.weight)]
        mixed = jax.jit(lambda *arrays: mix_experts(*arrays, **settings))(*moved, CASE.weights, REAL)
    out = np.empty_like(mixed.out)
    out[:, place] = mixed.out
    return out, float(mixed.dropped), float(mixed.lost)


MESHES = (
    {"expert": 8}, {"tensor": 4}, {"data": 2, "fsdp": 2, "expert": 2}, {"expert": 2, "sequence": 4},
    {"fsdp": 2, "expert": 2, "tensor": 2},
)  # fmt: skip


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_kept_slots_are_the_first_ones_of_the_whole_batch_on_every_mesh(sizes: dict[str, int]) -> None:
    kept = _kept(ALL)
    chosen = int((CASE.expert < E).sum())
    assert 0.1 < 1 - kept.sum() / chosen < 0.5, "the test must drop"
    out, dropped, lost = _mix(sizes, share=SHARE)
    np.testing.assert_allclose(out, _sum(kept), rtol=1e-4, atol=1e-5)
    assert (dropped, lost) == (pytest.approx(1 - kept.sum() / chosen, abs=1e-6), 0)


def test_capacity_goes_by_natural_order_when_the_sequence_is_split_in_zigzag() -> None:
    expected = _sum(_kept(ALL))
    out, _, _ = _mix({"sequence": 2, "expert": 2}, _zigzag(2), share=SHARE, order="zigzag")
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    unaware, _, _ = _mix({"sequence": 2, "expert": 2}, _zigzag(2), share=SHARE)
    assert np.abs(unaware - expected).max() > 0.1, "the order must matter"


def test_shard_scope_is_capacity_by_device() -> None:
    """The ablation: each device's tokens share their own capacity, so that more is dropped in all."""
    cells = [[(b, t) for b in (2 * shard, 2 * shard + 1) for t in range(T)] for shard in range(4)]
    kept, chosen = _kept(cells), int((CASE.expert < E).sum())
    out, dropped, _ = _mix({"data": 2, "expert": 2}, share=SHARE, scope="shard")
    np.testing.assert_allclose(out, _sum(kept), rtol=1e-4, atol=1e-5)
    assert dropped == pytest.approx(1 - kept.sum() / chosen, abs=1e-6)
    assert not np.array_equal(kept, _kept(ALL))


@pytest.mark.parametrize("sizes", [{"expert": 8}, {"data": 2, "expert": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("settings", [{"block_factor": 0.5}, {"token_groups": 4}], ids=str)
def test_dropless_transport_loses_nothing(sizes: dict[str, int], settings: dict[str, object]) -> None:
    """Blocks that are too small for what waits take several rounds; groups of tokens travel by themselves (INV-23)."""
    out, dropped, lost = _mix(sizes, share=None, **settings)
    np.testing.assert_allclose(out, _sum(CASE.expert < E), rtol=1e-4, atol=1e-5)
    assert (dropped, lost) == (0, 0)


def test_rows_without_a_place_are_counted() -> None:
    """One round of blocks of 8 rows: from each device, an expert gets its first 8 slots."""
    waiting = np.zeros((4, E), int)
    found = np.zeros((B, T, K), bool)
    for b, t, slot in np.argwhere(CASE.expert < E):
        shard, expert = b // 2, CASE.expert[b, t, slot]
        found[b, t, slot] = waiting[shard, expert] < 8
        waiting[shard, expert] += 1
    expected = np.maximum(waiting - 8, 0).sum() / waiting.sum()
    assert expected > 0.1, "the test must lose rows"
    out, dropped, lost = _mix({"expert": 4}, share=Fraction(8), block_factor=0.1, max_rounds=1)
    assert (dropped, lost) == (0, pytest.approx(expected, abs=1e-6))
    np.testing.assert_allclose(out, _sum(found), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [{"expert": 4}, {"data": 2, "expert": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_rows_beyond_a_bucket_are_counted(sizes: dict[str, int], groups: int) -> None:
    """Of each token group, an expert multiplies its first rows in the order of the shards that send them."""
    shards, rows = sizes["expert"], B // (sizes.get("data", 1) * sizes["expert"])
    each = rows * T // groups
    bucket = -(-3 * each * K * shards // (4 * E) // 8) * 8
    arrived, found = {}, np.zeros((B, T, K), bool)
    for b, t, slot in np.argwhere(CASE.expert < E):
        queue = (b // (rows * shards), (b % rows * T + t) // each, CASE.expert[b, t, slot])
        arrived[queue] = arrived.get(queue, 0) + 1
        found[b, t, slot] = arrived[queue] <= bucket
    expected = 1 - found.sum() / (CASE.expert < E).sum()
    assert expected > 0.05, "the test must lose rows"
    settings = {"share": Fraction(8), "block_factor": 8.0, "max_rounds": 1, "token_groups": groups}
    out, dropped, lost = _mix(sizes, bucket_factor=0.75, **settings)
    assert (dropped, lost) == (0, pytest.approx(expected, abs=1e-6))
    np.testing.assert_allclose(out, _sum(found), rtol=1e-4, atol=1e-5)
    assert 8 * -(-3 * each * K * shards // E // 8) < shards * each, "smaller than the blocks"
    out, _, lost = _mix(sizes, bucket_factor=3.0, **settings)
    assert lost == 0
    np.testing.assert_allclose(out, _sum(CASE.expert < E), rtol=1e-4, atol=1e-5)


def test_buckets_lose_for_good() -> None:
    """No further round brings what is beyond a bucket."""
    with pytest.raises(ValueError, match=r"bucket_factor = 1\.0 .* needs max_rounds = 1"):
        _mix({"expert": 2}, share=SHARE, bucket_factor=1.0)


def test_several_rounds_have_the_gradient_of_one() -> None:
    def gradient(**settings: object) -> list[np.ndarray]:
        mesh = make_mesh({"expert": 4, "tensor": 2})

        def loss(x: jax.Array, weight: jax.Array, weights: tuple[jax.Array, ...]) -> jax.Array:
            mixed = mix_experts(x, jnp.asarray(CASE.expert), weight, weights, REAL, share=SHARE, **settings)
            return jnp.sin(mixed.out).sum()

        with jax.set_mesh(mesh):
            gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(CASE.x, CASE.weight, CASE.weights)
        return [np.asarray(leaf) for leaf in jax.tree.leaves(gradients)]

    for several, one in zip(gradient(block_factor=0.1), gradient(block_factor=8.0), strict=True):
        np.testing.assert_allclose(several, one, rtol=1e-4, atol=1e-5)


def test_capacity_is_exact_beyond_int32() -> None:
    share = Fraction("1.2345") * 2 / 32
    for tokens in (1, 8191, 16_777_216, 134_217_728):
        exact = -(-share.numerator * tokens // share.denominator)
        assert int(expert_capacity(share, jnp.int32(tokens))) == exact


@pytest.mark.parametrize(
    ("sizes", "settings", "message"),
    [
        ({"expert": 8}, {"token_groups": 3}, "16 tokens of a device do not divide by token_groups = 3"),
        ({"tensor": 8}, {"x": (8, 16, 12)}, r"model width is 12, .* 8 shards of mesh axes \('tensor',\)"),
        (
            {"data": 8},
            {"x": (4, 16, 8)},
            r"rows of the batch is 4, .* 8 shards of mesh axes \('data', 'fsdp', 'expert'",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes: dict[str, int], settings: dict, message: str) -> None:
    shape = settings.pop("x", (B, T, D))
    mesh = make_mesh(sizes)
    x, expert = jnp.zeros(shape), jnp.zeros((*shape[:2], K), jnp.int32)
    weights = (jnp.zeros((E, shape[2], F)),) * 2 + (jnp.zeros((E, F, shape[2])),)
    with jax.set_mesh(mesh), pytest.raises(ShardingError, match=message):
        jax.eval_shape(lambda: mix_experts(x, expert, expert * 1.0, weights, REAL, share=None, **settings))
