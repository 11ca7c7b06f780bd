"""What an implementation of lightning attention offers to `api.py`, and in which form it receives its arguments.

An implementation is a module (or any object) with the attributes of `Implementation`. It is differentiated by nobody:
`api.py` wraps `forward` and `backward` of whichever implementation is chosen in one `jax.custom_vjp`.

Arguments are checked and normalised before they arrive:

- `q`, `k`, `v`, `do` have one shape [B, T, N, H] and one floating dtype. T may be any positive number.
- `slopes` is [N] fp32, positive: one token decays a state by exp(-slope). Slopes are constants without a gradient.
- `segment_ids` is None (every token real, one segment) or [B, T] int32 in *canonical* form: 0 is padding; the real
  tokens of a row are numbered 1, 1, .., 2, 2, .., never decreasing, without gaps. Padding may lie anywhere, also inside
  a segment: it adds nothing, decays nothing, and its output and gradients are 0. Only segment 1 sees `initial_state`.
  The age of key j seen from query i is the difference of `cumsum(segment_ids != 0)` at i and j.
  An implementation with a function `describe` receives instead what that makes of the caller's own segment ids.
- States are [B, N, H, H] fp32, indexed (key dim, value dim), convention (a): the newest token has weight 1.
  None stands for zeros, for `initial_state` as for `dstate` (the gradient arriving at the returned state).
"""

from typing import Literal, Protocol

import jax
from jaxtyping import Array, DTypeLike, Float, Int

Operation = Literal["forward", "backward", "chunk_state", "decode_step"]
OPERATIONS: tuple[Operation, ...] = ("forward", "backward", "chunk_state", "decode_step")

Heads = Float[Array, "B T N H"]
Token = Float[Array, "B N H"]
Slopes = Float[Array, " N"]
SegmentIds = Int[Array, "B T"]
State = Float[Array, "B N H H"]


class Implementation(Protocol):
    """The functions by which `api.py` reaches one implementation.

    One may also have `forward_saving`, called like `forward` where gradients will be taken. It returns a third result,
    an array that `backward` then receives as `saved`, or None.

    And one may have `describe`, which takes segment ids [B, T] as the caller gave them: any integers, of which those
    below 1 are padding, and a real token whose id differs from that of the row's previous real token starts a segment.
    What it returns, one array, takes the place of the canonical ids in `forward`, `backward` and `chunk_state`;
    `backward` may be given what `describe` returned before `forward`.
    """

    def supports(
        self, operation: Operation, shape: tuple[int, int, int, int], dtype: DTypeLike, *, packed: bool
    ) -> str | None:
        """Says why a call cannot run here, or None when it can.

        Called while tracing, on every call; must be cheap and must not touch the device beyond reading its kind.

        Args:
            operation: which of the functions below is meant.
            shape: (B, T, N, H) of q; T is 1 for `decode_step`.
            dtype: that of q, k and v.
            packed: whether segment ids (for `decode_step`: slots) are given.
        """
        ...

    def forward(
        self,
        q: Heads,
        k: Heads,
        v: Heads,
        slopes: Slopes,
        segment_ids: SegmentIds | None,
        initial_state: State | None,
    ) -> tuple[Heads, State]:
        """Returns the output (dtype of q) and the fp32 state after each row's last real token."""
        ...

    def backward(
        self,
        q: Heads,
        k: Heads,
        v: Heads,
        slopes: Slopes,
        segment_ids: SegmentIds | None,
        initial_state: State | None,
        do: Heads,
        dstate: State | None,
    ) -> tuple[Heads, Heads, Heads, State]:
        """Returns dq, dk, dv (dtype of q) and the fp32 gradient of the initial state, also when that is None."""
        ...

    def chunk_state(self, k: Heads, v: Heads, slopes: Slopes, segment_ids: SegmentIds | None, reverse: bool) -> State:
        """Returns the fp32 state that these tokens alone leave behind (transmission is computed by `api.py`).

        Forward: sum over the last segment of exp(-slope * real tokens after j) * k_j v_j^T.
        Reverse, called with (q, do): the gradient that these tokens alone send to the incoming state, the sum over
        segment 1 of exp(-slope * real tokens up to and including i) * q_i do_i^T.
        """
        ...

    def decode_step(
        self, q: Token, k: Token, v: Token, state: jax.Array, slopes: Slopes, slots: Int[Array, " B"] | None
    ) -> tuple[Token, jax.Array]:
        """Advances one token per row; `state` [B or pool, N, H, H] is updated in place where the caller donates it."""
        ...
