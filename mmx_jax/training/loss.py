"""Losses: plain functions (model, batch) -> (loss, metrics)."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mmx_jax.config import IN_ORDER, SequenceSplit, StageConfig
from mmx_jax.data import Batch
from mmx_jax.model import TextModel
from mmx_jax.model.likelihood import SeenLogits
from parallel.sharding import constrain
from parallel.stripes import arrange

Metrics = dict[str, Array]
Loss = Callable[[TextModel, Batch], tuple[Float[Array, ""], Metrics]]


def next_token_loss(
    model: TextModel, batch: Batch, *, vocab_chunk: int, num_sources: int, split: SequenceSplit = IN_ORDER
) -> tuple[Float[Array, ""], Metrics]:
    """Mean negative log-likelihood of the targets under the loss mask, plus the weighted load-balancing loss.

    Metrics: "loss" (without the balancing loss) and "aux_loss" (without its coefficient), fp32 scalars in nats;
    "source_loss" and "source_tokens" [S]: sums over the masked tokens of each source; "load" [L, E]; "dropped" and
    "lost" [L].
    """
    batch = arrange(batch, split.order)
    embeddings = model.embed(batch.tokens)
    hidden, aux, _ = model.backbone(embeddings, batch.positions, batch.segment_ids, train=True, split=split)
    with jax.named_scope("loss"):
        nll = token_losses(hidden, model.head_weight[...], batch.targets, vocab_chunk) * batch.loss_mask
        loss = nll.sum() / jnp.maximum(batch.loss_mask.sum(), 1.0)
        source = jax.nn.one_hot(batch.source_id, num_sources, dtype=jnp.float32)
        metrics = {
            "loss": loss,
            "aux_loss": aux.aux_loss,
            "source_loss": jnp.einsum("BT,BTS->S", nll, source),
            "source_tokens": jnp.einsum("BT,BTS->S", batch.loss_mask, source),
            "load": aux.load,
            "dropped": aux.dropped,
            "lost": aux.lost,
        }
    return loss + model.config.aux_loss_coefficient * aux.aux_loss, metrics


def loss_function(stage: StageConfig) -> Loss:
    """The loss that a stage names, with the stage's settings."""
    losses = {"next_token": next_token_loss}
    sources = len(stage.data.sources)
    return partial(losses[stage.loss], vocab_chunk=stage.loss_chunk, num_sources=sources, split=stage.split)


def token_losses(
    hidden: Float[Array, "B T D"], weight: Float[Array, "D V"], targets: Int[Array, "B T"], vocab_chunk: int
) -> Float[Array, "B T"]:
    """-log softmax(hidden weight)[target] of every token, fp32, `vocab_chunk` entries of the vocabulary at a time.

    Operands have the dtype of `hidden`, sums are fp32. Neither pass holds more than one chunk of logits: the backward
    computes them again from the saved log-sum-exp.
    """
    return _token_losses(hidden, weight, targets, vocab_chunk, weight.shape[1])


def vocab_chunks(weight: Float[Array, "D V"], vocab_chunk: int) -> Float[Array, "J D C"]:
    """The head weight cut into J chunks of C columns: chunk j holds the columns j, J + j, 2J + j, ...

    So every chunk keeps the split of the vocabulary over the mesh. J is the first number from V / vocab_chunk on that
    divides V; where none below twice as many does, columns of zeros fill up the last places.
    """
    D, V = weight.shape
    fewest = math.ceil(V / vocab_chunk)
    count = next((n for n in range(fewest, 2 * fewest) if V % n == 0), fewest)
    width = math.ceil(V / count)
    padded = jnp.pad(weight, ((0, 0), (0, count * width - V)))
    return constrain(padded.reshape(D, width, count).transpose(2, 0, 1), None, None, "vocab")


def _dot(spec: str, a: Array, b: Array) -> Float[Array, "..."]:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


def _chunk_logits(hidden: Array, chunk: Array, index: Array, count: int, vocab: int) -> Array:
    """fp32 logits [B, T, C] of one chunk, -inf beyond the vocabulary."""
    logits = _dot("BTD,DC->BTC", hidden, chunk)
    width = chunk.shape[1]
    if count * width == vocab:
        return logits
    return jnp.where(jnp.arange(width) * count + index < vocab, logits, -jnp.inf)


def _place(targets: Array, index: Array, count: int) -> Array:
    """Where in chunk `index` each target is, -1 for those in other chunks."""
    return jnp.where(targets % count == index, targets // count, -1)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _token_losses(hidden: Array, weight: Array, targets: Array, vocab_chunk: int, vocab: int) -> Array:
    return _token_losses_forward(hidden, weight, targets, vocab_chunk, vocab)[0]


def _token_losses_forward(
    hidden: Array, weight: Array, targets: Array, vocab_chunk: int, vocab: int
) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    chunks = vocab_chunks(weight.astype(hidden.dtype), vocab_chunk)
    count = chunks.shape[0]

    def step(seen: SeenLogits, item: tuple[Array, Array]) -> tuple[SeenLogits, None]:
        index, chunk = item
        logits = _chunk_logits(hidden, chunk, index, count, vocab)
        return seen.with_part(logits, _place(targets, index, count)), None

    items = (jnp.arange(count, dtype=jnp.int32), chunks)
    seen, _ = lax.scan(step, SeenLogits.none(targets.shape), items)
    return seen.log_sum - seen.chosen, (hidden, chunks, targets, seen.log_sum)


def _token_losses_backward(
    vocab_chunk: int, vocab: int, saved: tuple[Array, Array, Array, Array], gradient: Array
) -> tuple[Array, Array, None]:
    del vocab_chunk
    hidden, chunks, targets, log_sum = saved
    count = chunks.shape[0]

    def step(hidden_gradient: Array, item: tuple[Array, Array]) -> tuple[Array, Array]:
        index, chunk = item
        logits = _chunk_logits(hidden, chunk, index, count, vocab)
        is_target = jnp.arange(chunk.shape[1], dtype=jnp.int32) == _place(targets, index, count)[..., None]
        excess = jnp.exp(logits - log_sum[..., None]) - is_target
        excess = (excess * gradient[..., None]).astype(hidden.dtype)
        hidden_gradient += _dot("BTC,DC->BTD", excess, chunk)
        return hidden_gradient, _dot("BTD,BTC->DC", hidden, excess)

    items = (jnp.arange(count, dtype=jnp.int32), chunks)
    hidden_gradient, chunk_gradients = lax.scan(step, jnp.zeros(hidden.shape, jnp.float32), items)
    weight_gradient = chunk_gradients.transpose(1, 2, 0).reshape(hidden.shape[-1], -1)[:, :vocab]
    return hidden_gradient.astype(hidden.dtype), weight_gradient, None


_token_losses.defvjp(_token_losses_forward, _token_losses_backward)
