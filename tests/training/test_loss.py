"""The chunked loss against logits that exist, and against optax."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmx_jax.config import RunConfig
from mmx_jax.data import Batch
from mmx_jax.model import TextModel, init_params
from mmx_jax.training.loss import next_token_loss, token_losses, vocab_chunks

B, T, D, V = 2, 5, 8, 42


def _inputs(dtype: str = "float32") -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (B, T, D)).astype(dtype)
    return hidden, jax.random.normal(keys[1], (D, V)), jax.random.randint(keys[2], (B, T), 0, V, jnp.int32)


def _dense(hidden: jax.Array, weight: jax.Array, targets: jax.Array) -> jax.Array:
    logits = jnp.einsum("btd,dv->btv", hidden, weight, precision="highest")
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


@pytest.mark.parametrize("chunk", [1, 5, 10, 14, 21, 41, 42, 100])
def test_losses_and_gradients_do_not_depend_on_the_chunk(chunk: int) -> None:
    """Vocabulary chunks that divide V, that do not, and one for all (recipe: 200K-vocabulary logits never exist)."""
    hidden, weight, targets = _inputs()
    scale = jnp.linspace(-1.0, 2.0, B * T).reshape(B, T)

    def weighted(function, *arguments):
        return (function(*arguments) * scale).sum()

    expected, expected_gradients = jax.value_and_grad(lambda h, w: weighted(_dense, h, w, targets), (0, 1))(
        hidden, weight
    )
    found, gradients = jax.jit(jax.value_and_grad(lambda h, w: weighted(token_losses, h, w, targets, chunk), (0, 1)))(
        hidden, weight
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for one, other in zip(gradients, expected_gradients):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_bf16_operands_accumulate_in_fp32() -> None:
    """Training head: products of bf16 operands, sums and results in fp32; the weight's gradient is not rounded."""
    hidden, weight, targets = _inputs("bfloat16")
    rounded = weight.astype(jnp.bfloat16).astype(jnp.float32)
    losses = token_losses(hidden, weight, targets, 14)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, _dense(hidden.astype(jnp.float32), rounded, targets), rtol=1e-5)
    gradient = jax.grad(lambda w: token_losses(hidden, w, targets, 14).sum())(weight)
    assert gradient.dtype == jnp.float32
    assert not np.array_equal(gradient, gradient.astype(jnp.bfloat16).astype(jnp.float32))


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets = _inputs()
    losses = token_losses(1e3 * hidden, weight, targets, 10)
    np.testing.assert_allclose(losses, _dense(1e3 * hidden, weight, targets), rtol=1e-5, atol=1e-2)
    assert np.isfinite(losses).all()


def test_logits_of_the_whole_vocabulary_never_exist() -> None:
    """Neither pass holds an array as large as all logits, forward or backward."""
    hidden, weight, targets = _inputs()
    grown = jnp.tile(hidden, (1, 64, 1)), weight, jnp.tile(targets, (1, 64))
    gradient = jax.grad(lambda h, w: token_losses(h, w, grown[2], 7).sum(), (0, 1))
    sizes = _array_sizes(jax.make_jaxpr(gradient)(*grown[:2]).jaxpr)
    assert max(sizes) < grown[2].size * V
    assert grown[2].size * 7 in sizes, "the walk must have seen the chunks of logits"


def _array_sizes(jaxpr: jax.extend.core.Jaxpr) -> set[int]:
    sizes = set()
    for equation in jaxpr.eqns:
        sizes |= {int(np.prod(v.aval.shape)) for v in equation.outvars}
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                sizes |= _array_sizes(inner)
            elif hasattr(inner, "jaxpr"):
                sizes |= _array_sizes(inner.jaxpr)
    return sizes


def test_chunks_hold_every_column_once() -> None:
    _, weight, _ = _inputs()
    for chunk in (1, 4, 5, 41, 42):
        chunks = vocab_chunks(weight, chunk)
        count, _, width = chunks.shape
        assert width <= max(chunk, 1) * 2
        back = np.asarray(chunks).transpose(1, 2, 0).reshape(D, -1)
        np.testing.assert_array_equal(back[:, :V], weight)
        assert not back[:, V:].any()
        assert count * width >= V


def test_the_mask_the_balancing_loss_and_the_sources(tiny: RunConfig) -> None:
    """The loss is the mean over masked tokens plus the weighted auxiliary loss (INV-25); sources add up to it."""
    config = tiny.model
    params = jax.jit(lambda key: init_params(config, key))(jax.random.key(1))
    random = np.random.default_rng(0)
    shape = (2, 16)
    batch = Batch(
        tokens=random.integers(0, config.vocab_size, shape).astype(np.int32),
        targets=random.integers(0, config.vocab_size, shape).astype(np.int32),
        positions=np.broadcast_to(np.arange(16, dtype=np.int32), shape).copy(),
        segment_ids=np.ones(shape, np.int32),
        loss_mask=random.integers(0, 2, shape).astype(np.float32),
        source_id=np.array([[0] * 16, [1] * 16], np.int32),
    )
    batch = jax.tree.map(jnp.asarray, batch)

    @jax.jit
    def losses(batch: Batch) -> tuple:
        return next_token_loss(TextModel(config, params), batch, vocab_chunk=100, num_sources=2)

    @jax.jit
    def forward(batch: Batch) -> tuple:
        model = TextModel(config, params)
        return model.backbone(model.embed(batch.tokens), batch.positions, batch.segment_ids, train=True)[:2]

    loss, metrics = losses(batch)
    hidden, aux = forward(batch)
    masked = _dense(hidden, params["head"], batch.targets) * batch.loss_mask
    mean = masked.sum() / batch.loss_mask.sum()
    np.testing.assert_allclose(metrics["loss"], mean, rtol=1e-5)
    np.testing.assert_allclose(loss, mean + config.aux_loss_coefficient * aux.aux_loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["source_loss"], masked.sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(metrics["source_tokens"], batch.loss_mask.sum(axis=1))
    empty = replace(batch, loss_mask=jnp.zeros(shape, jnp.float32))
    assert float(losses(empty)[1]["loss"]) == 0.0
