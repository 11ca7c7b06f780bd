"""Other people's lightning attention behind one signature, for those that are installed."""

import concurrent.futures
import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from pallas_kernels.bench.timing import torch_milliseconds

Inputs = Sequence[Sequence[jax.Array]]
"""Sets of q, k, v and, for gradients, do [B, T, N, H]."""

LIGHTNING = ("jla", "fla")
"""jax-linear-attention (Mosaic GPU) and flash-linear-attention (Triton, through torch); each is a module's name."""


def jla(q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """jax-linear-attention's output for log decays of every token [B, T, N]."""
    from jla.ops import linear_attention

    o, _ = linear_attention("simple_gla", q, k, v, g=log_decay, scale=1.0, segment_ids=segment_ids, impl="mosaic_gpu")
    return o


def fla(inputs: Inputs, slopes: jax.Array, segment_ids: jax.Array | None, *, backward: bool) -> float:
    """Returns milliseconds of flash-linear-attention's forward, or forward and backward, with the same constant decay.

    Args:
        inputs: sets of q, k, v, do, bf16 [B, T, N, H].
        slopes: [N] fp32.
        segment_ids: [B, T] int32, or None.
        backward: also take the gradients of q, k and v.

    Raises:
        NotImplementedError: it has no such form.
    """
    import torch
    from fla.ops.simple_gla import chunk_simple_gla

    def tensor(x: jax.Array) -> Any:
        return torch.utils.dlpack.from_dlpack(x)

    gamma = -tensor(slopes).clone()
    boundaries = None
    if segment_ids is not None:
        if segment_ids.shape[0] != 1:
            raise NotImplementedError("fla takes packed rows one at a time")
        ids = np.asarray(segment_ids[0])
        starts = np.flatnonzero(np.diff(ids, prepend=ids[0] - 1))
        boundaries = torch.tensor([*starts, len(ids)], dtype=torch.int32, device="cuda")
    sets = [[tensor(x).clone().requires_grad_(i < 3 and backward) for i, x in enumerate(s)] for s in inputs]

    def call(q: Any, k: Any, v: Any, do: Any) -> None:
        o, _ = chunk_simple_gla(q, k, v, g_gamma=gamma, scale=1.0, cu_seqlens=boundaries)
        if backward:
            torch.autograd.grad(o, (q, k, v), do)

    with configurations_compiled_together():
        return torch_milliseconds(call, sets)


@contextlib.contextmanager
def configurations_compiled_together() -> Iterator[None]:
    """Makes Triton's autotuner compile all configurations of a kernel at once, on every core, before it times them.

    One after another the 300 or so of fla take minutes. Which one is chosen does not change.
    """
    from triton.runtime import autotuner
    from triton.runtime._async_compile import AsyncCompileMode

    original = autotuner.Autotuner._bench
    compiled: set[tuple[int, ...]] = set()

    def bench(self: Any, *args: Any, config: Any, **meta: Any) -> Any:
        # The arguments are the same objects for every configuration of one search.
        search = (id(self), *map(id, args))
        if search not in compiled:
            compiled.add(search)
            with AsyncCompileMode(executor, ignore_errors=True):
                for other in self.prune_configs(meta):
                    self.fn.run(*args, **{**meta, **other.all_kwargs(), "warmup": True})
        return original(self, *args, config=config, **meta)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as executor:
        autotuner.Autotuner._bench = bench
        try:
            yield
        finally:
            autotuner.Autotuner._bench = original
