"""Single rules of the specification, each by numbers that stand in it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import minimax_text_01
from mmx_jax.describe import count_parameters
from mmx_jax.model import Cache, TextModel, abstract_params, layer_plan, parameter_spec
from mmx_jax.model.block import Block
from mmx_jax.model.layout import packed_layout
from mmx_jax.model.lightning import LightningAttention, layer_slopes
from mmx_jax.model.moe import Experts, balance_loss, route
from mmx_jax.model.rope import inverse_frequencies, rotate, rotation
from pallas_kernels.lightning import lightning_attention
from tests.model.common import HYBRID, forward, random_params, relative, rows, tiny
from tests.model.oracle import rms, sigmoid, silu

RELEASED = minimax_text_01.get_config().model


def part(params, prefix):
    """The weights of layer 0 under a prefix, single as layers see them."""
    return {path.removeprefix(prefix): value[0, 0] for path, value in params.items() if path.startswith(prefix)}


def whole_rows(length, batch=1, positions=None, rotary_dim=4):
    """A layout of rows without padding."""
    positions = np.broadcast_to(np.arange(length) if positions is None else positions, (batch, length))
    return packed_layout(jnp.asarray(positions, jnp.int32), jnp.ones((batch, length), jnp.int32), rotary_dim, 100.0)


# Counts and constants


def test_parameters_of_the_released_model():
    """INV-01: the total and every component of model.md section 8, from shapes alone."""
    shapes = abstract_params(RELEASED)
    assert sum(int(np.prod(leaf.shape)) for leaf in shapes.values()) == 456_089_655_296
    counts = count_parameters(RELEASED)
    assert counts.total == 456_089_655_296
    assert counts.components == {
        "embedding": 1_229_193_216,
        "lightning": 70 * 251_666_432,
        "softmax": 10 * 113_246_208,
        "norm": (2 * 80 + 1) * 6144,
        "router": 80 * 32 * 6144,
        "experts": 80 * 32 * 169_869_312,
        "head": 1_229_193_216,
    }


def test_active_parameters_of_the_released_model():
    """INV-02: with both embeddings, without the input's, without both."""
    counts = count_parameters(RELEASED)
    assert counts.active_total == 48_403_306_496
    assert counts.active_without_embedding == 47_174_113_280
    assert counts.active_without_both == 45_944_920_064


def test_deepnorm_constants():
    """INV-04: alpha to the last digit, beta 1 at run time and 0.198818 as an initialisation gain, head not tied."""
    for branch in ("lightning", "softmax", "ffn"):
        assert RELEASED.alpha(branch) == 3.5565588200778455 == 160**0.25
        assert getattr(RELEASED, f"{branch}_beta") == 1.0
    assert RELEASED.weight_gain == pytest.approx(0.19881768, abs=1e-8)
    specs = parameter_spec(RELEASED)
    assert specs["embedding"].shape == (200_064, 6144)
    assert specs["head"].shape == (6144, 200_064)


def test_places_of_the_softmax_layers():
    """INV-05: exactly 7, 15, ..., 79; and the scans visit each layer once, as the kind that it is."""
    assert [i for i, kind in enumerate(RELEASED.layers) if kind == "softmax"] == list(range(7, 80, 8))
    for config in (RELEASED, tiny(), tiny(layers=HYBRID * 2 + ("lightning",) * 3), tiny(layers=("softmax",))):
        visited = [
            (section.layer(run, group, index), run.kind)
            for section in layer_plan(config)
            for group in range(section.groups)
            for run in section.runs
            for index in range(run.length)
        ]
        assert visited == list(enumerate(config.layers))


def test_no_shared_expert_and_no_bias():
    """INV-26, INV-30: the parameter table has neither."""
    assert not [
        path for path in parameter_spec(RELEASED) if "shared" in path or "bias" in path or "coefficient" in path
    ]


def test_embedding_scale_is_one():
    """INV-30: rows of the embedding, bit for bit."""
    config = tiny()
    params = random_params(config)
    tokens = jnp.array([[3, 0, 49]])
    np.testing.assert_array_equal(TextModel(config, params).embed(tokens)[0], params["embedding"][tokens[0]])


def test_the_gradient_of_a_frequent_token_is_summed_in_fp32():
    """A bf16 sum would stall: above 256 it no longer takes a 1."""
    config = tiny(compute_dtype="bfloat16")
    params = random_params(config)
    tokens = jnp.zeros((2, 1024), jnp.int32)

    def total(embedding):
        return TextModel(config, params | {"embedding": embedding}).embed(tokens).astype(jnp.float32).sum()

    gradient = jax.grad(total)(params["embedding"])
    assert (gradient[0] == tokens.size).all()
    assert not gradient[1:].any()


# Lightning attention


@pytest.mark.parametrize(
    ("layer", "head", "slope"),
    [(0, 0, 0.91701321), (0, 31, 0.06250062), (0, 63, 0.00390629), (1, 0, 0.90540557), (1, 63, 0.00385684),
     (8, 31, 0.05617151), (40, 0, 0.45270737), (40, 63, 0.00192844), (77, 0, 0.02322446), (77, 63, 0.0000989315),
     (78, 0, 0.01161682), (78, 31, 0.000791764), (78, 63, 0.0000494853)],
)  # fmt: skip
def test_slopes_of_the_released_model(layer, head, slope):
    """INV-09: the table of model.md 4.3, by the index over all 80 layers."""
    assert layer_slopes(64, 80)[layer, head] == pytest.approx(slope, rel=2e-6)


def test_no_decay_rounds_to_one():
    """INV-15: fp32 slopes, decays below 1 everywhere; bf16 would lose 406 of them, 43 in layer 78 alone."""
    lightning = [i for i, kind in enumerate(RELEASED.layers) if kind == "lightning"]
    slopes = jnp.asarray(layer_slopes(64, 80)[lightning])
    assert slopes.dtype == jnp.float32
    assert (jnp.exp(-slopes) < 1).all()
    lost = np.asarray(jnp.exp(-slopes.astype(jnp.bfloat16)).astype(jnp.bfloat16) == 1)
    assert (lost.sum(), lost[lightning.index(78)].sum()) == (406, 43)


def test_states_stay_fp32_under_bf16():
    """INV-15: 600 decode steps add up in the last layer, which hardly decays; a bf16 state would stop at 256."""
    config = tiny(layers=("lightning", "lightning"))
    params = random_params(config)
    tokens, positions, segments = rows(config, np.ones((1, 600)))
    tokens = np.zeros_like(tokens)
    *_, exact = forward(config, params, tokens, positions, segments, Cache.init(config, 1, 1))
    half = dataclasses.replace(config, compute_dtype="bfloat16")
    cache = Cache.init(half, 1, 1)
    for t in range(600):
        *_, cache = forward(half, params, tokens[:, :1], positions[:, t : t + 1], segments[:, :1], cache)
    assert {state.dtype for state in cache.states.values()} == {jnp.dtype("float32")}
    assert relative(cache.states["0/0"][-1], exact.states["0/0"][-1]) < 0.05


def test_mixing_is_linear_in_q_k_and_v():
    """INV-10: no scale, no softmax, no denominator; INV-07: the first output is (q k) v whatever the slope."""
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 50, 4, 8)) for i in range(3))
    slopes = jnp.asarray(layer_slopes(4, 8)[3])
    base = lightning_attention(q, k, v, slopes)
    for scaled in ((2 * q, k, v), (q, 2 * k, v), (q, k, 2 * v)):
        assert relative(lightning_attention(*scaled, slopes), 2 * base) < 1e-6
    first = jnp.einsum("nh,nh->n", q[0, 0], k[0, 0])[:, None] * v[0, 0]
    assert relative(base[0, 0], first) < 1e-5


def lightning_layer(config, params, slopes):
    attention = LightningAttention(config, part(params, "layers/0/0/attention/"))
    return jax.jit(lambda x, layout: attention(x, slopes, layout)[0])


def test_heads_may_be_permuted_as_whole_groups():
    """INV-12: heads of the fused weight together with gate, norm, output and slopes; without the slopes it is seen."""
    config = tiny()
    params = random_params(config)
    x, order = jax.random.normal(jax.random.key(0), (1, 20, 24)), np.array([2, 0, 3, 1])
    heads = {"qkv": 3, "gate": 3, "norm": 2, "out": 2}
    moved = params | {
        f"layers/0/0/attention/{name}": jnp.take(params[f"layers/0/0/attention/{name}"], order, axis=axis)
        for name, axis in heads.items()
    }
    slopes = jnp.asarray(layer_slopes(4, 8)[0])
    plain = lightning_layer(config, params, slopes)(x, whole_rows(20))
    assert relative(lightning_layer(config, moved, slopes[order])(x, whole_rows(20)), plain) < 1e-5
    assert relative(lightning_layer(config, moved, slopes)(x, whole_rows(20)), plain) > 1e-2


def test_joint_norm_and_its_epsilon():
    """INV-13: one statistic over all heads, eps 1e-6, before the gate, whose logits come from the layer's input."""
    config = tiny()
    params = random_params(config)
    w = {name: np.asarray(value, np.float64) for name, value in part(params, "layers/0/0/attention/").items()}
    attention = LightningAttention(config, part(params, "layers/0/0/attention/"))
    mixed = 1e-3 * np.asarray(jax.random.normal(jax.random.key(0), (1, 5, 4, 8)), np.float64)
    x = np.asarray(jax.random.normal(jax.random.key(1), (1, 5, 24)), np.float64)
    gate = sigmoid(x @ w["gate"].reshape(24, 32))

    def expected(mixed, eps):
        return (rms(mixed.reshape(1, 5, 32), w["norm"].reshape(32), eps) * gate) @ w["out"].reshape(32, 24)

    got = attention.finish(jnp.asarray(mixed, jnp.float32), jnp.asarray(x, jnp.float32))
    assert relative(got, expected(mixed, 1e-6)) < 1e-5
    assert relative(got, expected(mixed, 1e-5)) > 1e-2
    louder = mixed.copy()
    louder[:, :, 0] *= 100
    got = attention.finish(jnp.asarray(louder, jnp.float32), jnp.asarray(x, jnp.float32))
    assert relative(got, expected(louder, 1e-6)) < 1e-5


def test_positions_mean_nothing_to_lightning_layers():
    """INV-14: replacing all positions changes no bit."""
    config = tiny()
    layer = lightning_layer(config, random_params(config), jnp.asarray(layer_slopes(4, 8)[0]))
    x = jax.random.normal(jax.random.key(0), (1, 20, 24))
    np.testing.assert_array_equal(
        layer(x, whole_rows(20)), layer(x, whole_rows(20, positions=np.arange(20)[::-1] + 1000))
    )


# Softmax attention


def test_rotary_frequencies():
    """INV-18: 32 frequencies from 1 to 1e7^(-62/64); dims 64 to 127 pass through."""
    frequencies = inverse_frequencies(64, 1e7)
    assert len(frequencies) == 32
    assert frequencies[0] == 1.0
    assert frequencies[-1] == pytest.approx(1.654817e-7, rel=1e-6)
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 128))
    turned = rotate(x, rotation(jnp.array([[0, 5, 10_000_000]]), 64, 1e7))
    np.testing.assert_array_equal(turned[..., 64:], x[..., 64:])
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])
    assert (jnp.abs(turned[:, 1, :, :64] - x[:, 1, :, :64]).max(axis=(0, 1)) > 0).sum() > 60


def test_scores_depend_on_differences_of_positions():
    """INV-20: shifting all positions changes nothing, replacing them does."""
    config = tiny(layers=("softmax",), rope_base=100.0)
    params = random_params(config)
    tokens, positions, segments = rows(config, np.ones((1, 40)))
    plain, *_ = forward(config, params, tokens, positions, segments)
    shifted, *_ = forward(config, params, tokens, positions + 1000, segments)
    doubled, *_ = forward(config, params, tokens, 2 * positions, segments)
    assert relative(shifted, plain) < 1e-3
    assert relative(doubled, plain) > 1e-2


# Experts


def test_routing_weights():
    """INV-22: two experts, the softmax over the two largest logits, in fp32 even from bf16 input."""
    x = jax.random.normal(jax.random.key(0), (50, 24), jnp.bfloat16)
    router = jax.random.normal(jax.random.key(1), (24, 6))
    routing = route(x, router, 2, jnp.ones(50, bool))
    logits = np.asarray(x, np.float64) @ np.asarray(router, np.float64)
    best = np.argsort(-logits, axis=1)[:, :2]
    top = np.take_along_axis(logits, best, axis=1)
    weight = np.exp(top - top.max(axis=1, keepdims=True))
    np.testing.assert_array_equal(routing.expert, best)
    assert routing.weight.dtype == jnp.float32
    np.testing.assert_allclose(routing.weight, weight / weight.sum(axis=1, keepdims=True), atol=1e-6)
    assert (routing.weight > 0).all()


def expert_layer(config):
    params = part(random_params(config), "layers/0/0/ffn/")
    layer = Experts(config, params)
    return params, jax.jit(lambda x, real: layer(x, real, real.sum(), train=False)[0])


def test_routing_drops_nothing_at_inference():
    """INV-23: a token's output does not know the others; permuted tokens permute outputs; one expert takes all."""
    _, layer = expert_layer(tiny(capacity_factor=0.5))
    x, every = jax.random.normal(jax.random.key(0), (1, 30, 24)), jnp.ones((1, 30), bool)
    plain = layer(x, every)
    order = np.random.default_rng(0).permutation(30)
    assert relative(layer(x[:, order], every), plain[:, order]) < 1e-5
    # All tokens equal: both their experts get all 30 of them.
    same = layer(jnp.broadcast_to(x[:, :1], x.shape), every)
    assert relative(same, jnp.broadcast_to(plain[:, :1], same.shape)) < 1e-5
    padded = layer(x, every.at[0, 10:].set(False))
    assert relative(padded[:, :10], plain[:, :10]) < 1e-5
    assert not padded[:, 10:].any()


def test_an_expert_is_a_swiglu():
    """INV-24: down(silu(gate x) * up x) with one expert for all tokens; gate and up exchanged is seen."""
    config = tiny(num_experts=1, experts_per_token=1)
    params, layer = expert_layer(config)
    w = {name: np.asarray(value[0], np.float64) for name, value in params.items() if name != "router"}
    x = np.asarray(jax.random.normal(jax.random.key(0), (1, 9, 24)), np.float64)
    got = layer(jnp.asarray(x, jnp.float32), jnp.ones((1, 9), bool))
    assert relative(got, (silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]) < 1e-5
    assert relative(got, (silu(x @ w["up"]) * (x @ w["gate"])) @ w["down"]) > 1e-2


@pytest.mark.parametrize("layers", [1, 3])
def test_balance_losses_at_perfect_balance(layers):
    """INV-25: "hub" is 2 whatever the layers; "report" is 2 / E^2 a layer."""
    E = 8
    fraction, probability = jnp.full((layers, E), 2 / E), jnp.full((layers, E), 1 / E)
    assert balance_loss(fraction, probability, "hub") == pytest.approx(2.0)
    assert balance_loss(fraction, probability, "report") == pytest.approx(layers * 2 / E**2)
    skewed = jnp.zeros((layers, E)).at[:, :2].set(1.0)
    for form in ("hub", "report"):
        assert balance_loss(skewed, skewed / 2, form) > 3 * balance_loss(fraction, probability, form)


# Block


def block_of(config, params):
    slopes = jnp.asarray(layer_slopes(4, 8)[0])
    block = Block(config, "lightning", part(params, "layers/0/0/"))
    return jax.jit(lambda x: block(x, slopes, whole_rows(x.shape[1]), (), train=False)[0])


def test_the_residual_is_the_normed_input():
    """INV-27: a layer's input may be scaled by any positive factor; in pre-norm form it may not."""
    config = tiny(norm_eps=1e-12)
    params = random_params(config)
    x = jax.random.normal(jax.random.key(0), (1, 10, 24))
    layer = block_of(config, params)
    for factor in (0.01, 7.0, 1e4):
        assert relative(layer(factor * x), layer(x)) < 1e-4
    prenorm = block_of(dataclasses.replace(config, norm="prenorm"), params)
    assert relative(prenorm(7 * x), prenorm(x)) > 1e-1


def test_a_layer_without_branches():
    """INV-28: alpha rms(alpha rms(x)) when attention and experts give zero."""
    config = tiny()
    params = random_params(config)
    for name in ("attention/out", "ffn/down"):
        params[f"layers/0/0/{name}"] = jnp.zeros_like(params[f"layers/0/0/{name}"])
    x = np.asarray(jax.random.normal(jax.random.key(0), (1, 10, 24)), np.float64)
    first, second = (
        np.asarray(params[f"layers/0/0/{name}"][0, 0], np.float64) for name in ("attention_norm", "ffn_norm")
    )
    alpha = 16**0.25
    expected = alpha * rms(alpha * rms(x, first, 1e-5), second, 1e-5)
    assert relative(block_of(config, params)(jnp.asarray(x, jnp.float32)), expected) < 1e-5


# Compile time


def test_the_program_does_not_grow_with_depth():
    """Two groups of eight layers and eight of them lower to programs of about the same size, gradient included."""

    def size(groups):
        config = tiny(layers=HYBRID * groups)
        params = abstract_params(config)
        ints = jax.ShapeDtypeStruct((2, 16), jnp.int32)

        def loss(params, tokens, positions, segments):
            model = TextModel(config, params, remat="layer")
            hidden, aux, _ = model.backbone(model.embed(tokens), positions, segments, train=True)
            return model.head(hidden).sum() + aux.aux_loss

        return len(jax.jit(jax.grad(loss)).lower(params, ints, ints, ints).as_text())

    assert size(8) < 1.1 * size(2)
