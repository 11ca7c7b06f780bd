"""How an operation finds the implementation that runs it: by platform, shape and dtype, or by name.

Dispatch fails closed: an accelerated implementation is chosen only for calls that it says it supports; every other call
runs the operation's portable XLA form, and the log says so once for each reason.
"""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Iterator, Sequence

import jax

_LOG = logging.getLogger(__name__)
_TARGET: contextvars.ContextVar[tuple[str, float | None] | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def target(platform: str, compute_capability: float | None = None) -> Iterator[None]:
    """Makes calls traced inside choose implementations as on `platform`, to lower ahead of time without its hardware.

    Args:
        platform: "cpu", "gpu" or "tpu".
        compute_capability: of the NVIDIA GPU meant, such as 9.0.
    """
    token = _TARGET.set((platform, compute_capability))
    try:
        yield
    finally:
        _TARGET.reset(token)


def platform() -> str:
    """Names the platform that calls traced now will run on: "cpu", "gpu" or "tpu"."""
    chosen = _TARGET.get()
    return chosen[0] if chosen else jax.default_backend()


def compute_capability() -> float | None:
    """Returns the compute capability of the GPU that calls traced now will run on, None when it is no NVIDIA GPU."""
    chosen = _TARGET.get()
    if chosen:
        return chosen[1]
    capability = getattr(jax.devices()[0], "compute_capability", None)
    return float(capability) if capability is not None else None


def choose(
    operation: str,
    candidates: Sequence[str],
    obstacle: Callable[[str], str | None],
    *,
    fallback: str,
    forced: str | None,
    known: Sequence[str],
) -> str:
    """Picks the first candidate without an obstacle, else the fallback.

    Args:
        operation: what is being called, for messages.
        candidates: names to try on this platform, best first.
        obstacle: says why a named implementation cannot run this call; None when it can.
        fallback: the name that runs everything.
        forced: a name that must be used, or None.
        known: every name that may be forced.

    Raises:
        ValueError: the forced name is unknown or cannot run the call.
    """
    if forced is not None:
        if forced not in known:
            raise ValueError(f"{operation}: no implementation named {forced!r}; there are {', '.join(known)}")
        reason = obstacle(forced)
        if reason:
            raise ValueError(f"{operation}: implementation {forced!r} cannot run this call: {reason}")
        return forced
    refusals = []
    chosen = fallback
    for name in candidates:
        reason = obstacle(name)
        if reason is None:
            chosen = name
            break
        refusals.append(f"not {name}: {reason}")
    if refusals:
        _say_once(f"{operation} runs as {chosen}, {'; '.join(refusals)}")
    return chosen


@functools.cache
def _say_once(message: str) -> None:
    _LOG.warning(message)
