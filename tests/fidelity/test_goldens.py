"""The model against transformers' own code, made fair (model.md 15.2); goldens from tests/oracle/generate.py."""

import dataclasses
import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx_jax.config import LIGHTNING
from mmx_jax.convert import load_safetensors, parse_config
from mmx_jax.convert.names import tensor_map
from mmx_jax.inference import Generator
from mmx_jax.model import Cache, TextModel, layer_plan, moe, parameter_spec
from mmx_jax.model.block import Block
from mmx_jax.model.layout import packed_layout
from mmx_jax.model.lightning import layer_slopes
from mmx_jax.model.norm import rms_norm
from tests.fidelity.common import tiny_weights, write_folder
from tests.oracle.weights import CASES, FULL_GRADIENTS, PROJECTIONS, direction, tokens_and_mask

GOLDENS = Path(__file__).parents[1] / "oracle" / "goldens"
TOLERANCE = 1e-4
EVERY_CASE = pytest.mark.parametrize("name", CASES)


@dataclasses.dataclass(frozen=True)
class Case:
    config: object
    params: dict
    tokens: jnp.ndarray
    real: np.ndarray
    positions: jnp.ndarray
    golden: dict


@functools.cache
def case(name):
    """Weights read by our own loader from a folder that the safetensors library wrote."""
    about = CASES[name]
    config = dataclasses.replace(parse_config(about["config"]), compute_dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        tensors = tiny_weights(config, about["seed"])
        params = load_safetensors(write_folder(Path(folder), about["config"], tensors, shards=2), config)
    tokens, real = tokens_and_mask(about)
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32)
    with np.load(GOLDENS / f"{name}.npz") as file:
        golden = dict(file)
    return Case(config, params, jnp.asarray(tokens, jnp.int32), real.astype(np.int32), jnp.asarray(positions), golden)


def relative(ours, theirs, real=None):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if real is not None:
        ours, theirs = ours[real != 0], theirs[real != 0]
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@functools.partial(jax.jit, static_argnames="config")
def prefilled(config, params, tokens, segments):
    """The cache after one prefill of all tokens."""
    model = TextModel(config, params)
    cache = Cache.init(config, *tokens.shape, "float32")
    return model.backbone(model.embed(tokens), cache.positions(segments), segments, cache)[2]


@functools.cache
def results(name):
    """(loss, (logits, hidden), gradients) of a case."""
    c = case(name)

    @jax.jit
    def compute(params, tokens, positions, real):
        def loss(params):
            model = TextModel(c.config, params)
            hidden, _, _ = model.backbone(model.embed(tokens), positions, real)
            logits = model.head(hidden)
            targets = jnp.roll(tokens, -1, axis=1)[..., None]
            losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets, axis=-1)[..., 0]
            weight = (real * jnp.roll(real, -1, axis=1)).at[:, -1].set(0)
            return (losses * weight).sum() / weight.sum(), (logits, hidden)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, outputs), grads = compute(c.params, c.tokens, c.positions, jnp.asarray(c.real))
    return loss, outputs, {path: np.asarray(value) for path, value in grads.items()}


@EVERY_CASE
def test_logits(name):
    c = case(name)
    _, (logits, hidden), _ = results(name)
    assert relative(logits, c.golden["logits"], c.real) < TOLERANCE
    assert relative(hidden, c.golden["hidden"][-1], c.real) < TOLERANCE


@EVERY_CASE
def test_lightning_states(name):
    """State after prefill in convention (a), every lightning layer in order (INV-08, INV-34)."""
    c = case(name)
    cache = prefilled(c.config, c.params, c.tokens, jnp.asarray(c.real))
    golden = c.golden["states"]
    number = 0
    for s, section in enumerate(layer_plan(c.config)):
        for group in range(section.groups):
            for r, run in enumerate(section.runs):
                if run.kind != LIGHTNING:
                    continue
                for state in cache.states[f"{s}/{r}"][group]:
                    assert relative(state, golden[number]) < TOLERANCE
                    number += 1
    assert number == len(golden) == c.config.layers.count(LIGHTNING)


@EVERY_CASE
def test_hidden_states_and_router_choices_by_layer(name, monkeypatch):
    """Each layer alone on the output of the layer before; the experts chosen are those of the oracle (INV-22)."""
    c = case(name)
    seen = []
    real_route = moe.route
    monkeypatch.setattr(moe, "route", lambda *args: seen.append(real_route(*args)) or seen[-1])

    @functools.partial(jax.jit, static_argnames="kind")
    def block(kind, params, x, slopes, layout):
        x, _, _ = Block(c.config, kind, params)(x, slopes, layout, (), train=False)
        return x, seen[-1].expert

    layout = packed_layout(c.positions, jnp.asarray(c.real), c.config.rotary_dim, c.config.rope_base)
    slopes = jnp.asarray(layer_slopes(c.config.num_heads, c.config.num_layers))
    x = TextModel(c.config, c.params).embed(c.tokens)
    assert relative(x, c.golden["hidden"][0], c.real) < TOLERANCE
    chosen = []
    for layer, kind in enumerate(c.config.layers):
        x, expert = block(kind, layer_params(c, layer), x, slopes[layer], layout)
        chosen.append(expert)
        last = layer == c.config.num_layers - 1
        ours = rms_norm(x, c.params["final_norm"], c.config.norm_eps) if last else x
        assert relative(ours, c.golden["hidden"][layer + 1], c.real) < TOLERANCE, f"layer {layer}"
    for layer, expert in enumerate(chosen):
        logits = np.sort(c.golden["router_logits"][layer], axis=-1)
        k = c.config.experts_per_token
        clear = (logits[..., -k] - logits[..., -k - 1] > 1e-4) & (c.real != 0)
        assert clear.sum() > 0.95 * c.real.sum()
        ours = np.sort(np.asarray(expert).reshape(*c.real.shape, k), axis=-1)
        theirs = np.sort(c.golden["router"][layer], axis=-1)
        np.testing.assert_array_equal(ours[clear], theirs[clear])


def layer_params(c, layer):
    """Weights of one layer, without its stacked axes."""
    out = {}
    for path, spec in parameter_spec(c.config).items():
        for group, members in enumerate(spec.layers):
            if layer in members:
                out[path.split("/", 3)[3]] = jnp.asarray(np.asarray(c.params[path])[group, members.index(layer)])
    return out


@EVERY_CASE
def test_greedy_tokens(name):
    """32 tokens by prefill and decode equal the oracle's full forward passes (INV-31)."""
    c = case(name)
    first = CASES[name]["left_padding"][0]
    generator = Generator(c.config, c.params, slots=1, prefill_chunk=32, kv_dtype="float32")
    (ours,) = generator.generate([np.asarray(c.tokens)[0, first:].tolist()], max_new_tokens=32)
    assert ours == c.golden["greedy"].tolist()


@EVERY_CASE
def test_gradients(name):
    """Every gradient element for one case; norm and 16 random projections of every tensor for the others (INV-16)."""
    c = case(name)
    loss, _, grads = results(name)
    assert relative(loss, c.golden["loss"]) < TOLERANCE
    seen = 0
    for key, tensor in tensor_map(c.config).items():
        ours = tensor.to_stored(grads[tensor.path][tensor.index])
        theirs = c.golden[f"grad/{key}"]
        seen += 1
        if name == FULL_GRADIENTS:
            assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max() + 1e-9, key
            continue
        wide = ours.astype(np.float64)
        dots = [(wide * direction(key, ours.shape, n)).sum() for n in range(PROJECTIONS)]
        # A projection on a random direction is about as large as the norm.
        assert np.abs(np.array([np.linalg.norm(wide), *dots]) - theirs).max() <= TOLERANCE * theirs[0] + 1e-9, key
    assert seen == sum(key.startswith("grad/") for key in c.golden)
