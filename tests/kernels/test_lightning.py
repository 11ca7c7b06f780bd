"""Lightning attention against the fp64 recurrence, for every implementation that runs on the platform under test."""

import dataclasses
import itertools
import logging

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch, lightning
from pallas_kernels.lightning import chunked
from tests.kernels import cases

BF16 = ml_dtypes.bfloat16
attention = jax.jit(lightning.lightning_attention, static_argnames=("return_state", "implementation"))
chunk_state = jax.jit(lightning.chunk_state, static_argnames=("reverse", "implementation"))
RESULTS = ("o", "state", "dq", "dk", "dv", "dinitial_state")
TOKENS = ("q", "k", "v", "do", "segment_ids")
PORTABLE = ("chunked", "dense", "reference")
# The oracles compile to one step a token or to a [T, T] mask: they meet the recurrence at short lengths only.
CASES = [
    (name, length)
    for name, length in itertools.product(lightning.implementations(), cases.LENGTHS)
    if name not in ("dense", "reference") or length in (1, 65, 257)
]


def profile(name: str) -> dict:
    """The dtype and head dim in which an implementation is tested: what the accelerated ones are built for."""
    return {"dtype": np.float32, "dim": 16} if name in PORTABLE else {"dtype": BF16, "dim": 128}


def run(x: cases.Inputs, implementation: str | None = None) -> dict[str, jax.Array]:
    """Returns all results of lightning attention and its gradient."""

    @jax.jit
    def all_results(arrays: dict) -> tuple:
        y = cases.Inputs(**arrays)

        def forward(q, k, v, state):
            return lightning.lightning_attention(
                q, k, v, y.slopes, segment_ids=y.segment_ids, initial_state=state, return_state=True,
                implementation=implementation,
            )  # fmt: skip

        results, pullback = jax.vjp(forward, y.q, y.k, y.v, y.initial_state)
        return *results, *pullback((y.do, y.dstate))

    arrays = {field.name: getattr(cases.as_jax(x), field.name) for field in dataclasses.fields(x)}
    return dict(zip(RESULTS, all_results(arrays)))


def compare(actual: dict[str, jax.Array], expected: cases.Expected, dtype) -> None:
    for name in RESULTS:
        wanted = getattr(expected, name)
        for head in range(wanted.shape[2 if wanted.ndim == 4 and "state" not in name else 1]):
            part = (slice(None), head) if "state" in name else (slice(None), slice(None), head)
            error = cases.relative(np.asarray(actual[name])[part], wanted[part])
            limit = cases.bound(dtype, state=name == "state", length=expected.o.shape[1])
            assert error <= limit, f"{name}, head {head}: relative error {error:.2e} > {limit:.0e}"


@pytest.mark.parametrize(("name", "length"), CASES)
def test_plain_rows(name: str, length: int) -> None:
    """INV-06, INV-16: output, state and all gradients, with a state coming in and a gradient coming back through it."""
    x = cases.inputs(length, **profile(name))
    compare(run(x, name), cases.recurrence(x), profile(name)["dtype"])


@pytest.mark.parametrize(("name", "length"), CASES)
def test_packed_rows(name: str, length: int) -> None:
    """INV-16, INV-36: segments of any length, ids that come again, padding left, right and inside."""
    x = cases.inputs(length, batch=4, segment_ids=cases.packed(4, length), **profile(name))
    compare(run(x, name), cases.recurrence(x), profile(name)["dtype"])


@pytest.mark.parametrize("packed", [False, True])
def test_bf16(packed: bool) -> None:
    """INV-15: bf16 operands keep slopes, decay and state in fp32, within the bars of the accelerated kernels."""
    x = cases.inputs(1000, batch=3, dim=64, dtype=BF16, segment_ids=cases.packed(3, 1000) if packed else None)
    actual = run(x, "chunked")
    assert actual["state"].dtype == actual["dinitial_state"].dtype == jnp.float32
    assert actual["o"].dtype == actual["dk"].dtype == jnp.bfloat16
    compare(actual, cases.recurrence(x), BF16)


@pytest.mark.parametrize("chunk", [1, 7, 32, 64, 128, 256, 600])
def test_chunk_length_changes_nothing(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """INV-06: every chunk length, and blocks of two chunks, agree with the recurrence to fp64 rounding."""
    monkeypatch.setattr(chunked, "chunk_length", lambda length: chunk)
    monkeypatch.setattr(chunked, "BLOCK_BYTES", 8 * 3 * 4 * (chunk * chunk + 8 * 8))
    with jax.enable_x64(True):
        x = cases.inputs(517, batch=3, dim=8, dtype=np.float64, segment_ids=cases.packed(3, 517))
        compare(run(x, "chunked"), cases.recurrence(x), np.float64)


@pytest.mark.parametrize("name", lightning.implementations())
def test_one_token_has_weight_one(name: str) -> None:
    """INV-07: with one token and no state o = (q.k) v, whatever the slope."""
    x = cases.as_jax(cases.inputs(1, slopes=(0.917, 5e-5), **profile(name)))
    o = attention(x.q, x.k, x.v, x.slopes, implementation=name)
    wide = [np.asarray(a, np.float64) for a in (x.q, x.k, x.v)]
    expected = np.sum(wide[0] * wide[1], axis=-1, keepdims=True) * wide[2]
    assert cases.relative(o, expected) <= cases.bound(profile(name)["dtype"])


@pytest.mark.parametrize("operand", [0, 1, 2])
def test_no_scale_and_no_denominator(operand: int) -> None:
    """INV-10: the output is linear in each of q, k and v: a power of two passes through exactly."""
    x = cases.as_jax(cases.inputs(100))
    tokens = [x.q, x.k, x.v]
    o = attention(*tokens, x.slopes)
    tokens[operand] = 4 * tokens[operand]
    np.testing.assert_array_equal(attention(*tokens, x.slopes), 4 * o)


@pytest.mark.parametrize("name", lightning.implementations())
def test_causality(name: str) -> None:
    """INV-17: a changed token changes no output before it."""
    length, changed = 200, 130
    x = cases.as_jax(cases.inputs(length, batch=1, **profile(name)))
    later = jnp.arange(length)[:, None, None] >= changed
    tokens = [jnp.where(later, a[:, ::-1], a) for a in (x.q, x.k, x.v)]
    before = attention(x.q, x.k, x.v, x.slopes, implementation=name)
    after = attention(*tokens, x.slopes, implementation=name)
    np.testing.assert_array_equal(before[:, :changed], after[:, :changed])
    assert not np.array_equal(before[:, changed], after[:, changed])


@pytest.mark.parametrize("multiple", [1, 256])
def test_a_pack_equals_its_samples(multiple: int) -> None:
    """INV-36: samples of 1, 255, 256 and 257 tokens packed equal the samples alone, forward and gradient."""
    lengths = (255, 1, 257, 256)
    row = cases.segments(lengths, multiple=multiple)
    x = cases.inputs(row.shape[1], batch=1, segment_ids=row)
    zero = np.zeros_like(x.initial_state)
    pack = run(dataclasses.replace(x, initial_state=zero, dstate=zero))
    for index in range(len(lengths)):
        part = np.flatnonzero(row[0] == index + 1)
        sample = dataclasses.replace(
            x,
            initial_state=zero,
            dstate=zero,
            segment_ids=None,
            **{n: getattr(x, n)[:, part] for n in ("q", "k", "v", "do")},
        )
        alone = cases.recurrence(sample)
        for name in ("o", "dq", "dk", "dv"):
            assert cases.relative(np.asarray(pack[name])[:, part], getattr(alone, name)) <= cases.bound(np.float32)
    padding = row[0] == 0
    for name in ("o", "dq", "dk", "dv"):
        assert not np.any(np.asarray(pack[name])[:, padding])


def test_rows_of_padding_pass_everything_on() -> None:
    """INV-34: a row without real tokens hands on its state and its gradient untouched, and gives zeros."""
    x = cases.inputs(70, segment_ids=np.zeros((2, 70), np.int32))
    actual = run(x)
    np.testing.assert_array_equal(actual["state"], x.initial_state)
    np.testing.assert_array_equal(actual["dinitial_state"], x.dstate)
    for name in ("o", "dq", "dk", "dv"):
        assert not np.any(actual[name])


@pytest.mark.parametrize("name", lightning.implementations())
@pytest.mark.parametrize("packed", [False, True])
def test_chunk_state(name: str, packed: bool) -> None:
    """INV-08, INV-37: the state of tokens alone, its mirror on (q, do), and what passes through, of convention (a)."""
    length = 257
    ids = cases.packed(4, length) if packed else None
    x = cases.inputs(length, batch=4, segment_ids=ids, **profile(name))
    zero = np.zeros_like(x.initial_state)
    alone = cases.recurrence(dataclasses.replace(x, initial_state=zero, dstate=zero))
    y = cases.as_jax(x)
    kwargs = {"segment_ids": y.segment_ids, "implementation": name}
    state, transmission = chunk_state(y.k, y.v, y.slopes, **kwargs)
    dstate, same = chunk_state(y.q, y.do, y.slopes, reverse=True, **kwargs)
    dtype = profile(name)["dtype"]
    assert cases.relative(state, alone.state) <= cases.bound(dtype, state=True)
    assert cases.relative(dstate, alone.dinitial_state) <= cases.bound(dtype)
    np.testing.assert_array_equal(transmission, same)
    with_state = cases.recurrence(dataclasses.replace(x, dstate=zero))
    passed = np.asarray(transmission, np.float64)[..., None, None] * x.initial_state
    np.testing.assert_allclose(passed, with_state.state - alone.state, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("widths", [(128, 128), (1, 100, 30, 125)])
@pytest.mark.parametrize("packed", [False, True])
def test_pieces_of_a_row_equal_the_row(widths: tuple[int, ...], packed: bool) -> None:
    """INV-37, INV-38: LASP+'s formula over chunk_state, border_ids and continuations, unequal pieces, both directions.

    The states entering the pieces and the gradients leaving them are combined by hand, in the two loops of `joined`.
    """
    length = sum(widths)
    ids = cases.packed(4, length) if packed else np.ones((4, length), np.int32)
    pieces = [slice(a, b) for a, b in itertools.pairwise(np.cumsum((0, *widths)))]
    with jax.enable_x64(True):
        x = cases.inputs(length, batch=4, dim=8, dtype=np.float64, segment_ids=ids)
        actual = jax.jit(joined, static_argnums=0)(tuple((p.start, p.stop) for p in pieces), vars(cases.as_jax(x)))
    expected = cases.recurrence(x)
    for name in RESULTS:
        assert cases.relative(actual[name], getattr(expected, name)) <= 1e-11, name


def joined(pieces: tuple[tuple[int, int], ...], arrays: dict) -> dict[str, jax.Array]:
    """Computes a row piece by piece, as ranks of LASP+ would."""
    y = cases.Inputs(**arrays)
    cut = [cases.Inputs(**{n: a[:, i:j] if n in TOKENS else a for n, a in arrays.items()}) for i, j in pieces]
    first, last = zip(*(lightning.border_ids(p.segment_ids) for p in cut))
    goes_on = lightning.continuations(jnp.stack(first), jnp.stack(last)).astype(y.q.dtype)[..., None, None, None]

    state, entering = y.initial_state, []
    for p, c in zip(cut, goes_on):
        entering.append(c * state)
        own, kept = lightning.chunk_state(p.k, p.v, p.slopes, segment_ids=p.segment_ids)
        state = own + kept[..., None, None] * entering[-1]
    dstate, parts = y.dstate, []
    for p, c, before in reversed(list(zip(cut, goes_on, entering))):
        given = {"segment_ids": p.segment_ids, "initial_state": before}
        o = lightning.lightning_attention(p.q, p.k, p.v, p.slopes, **given)
        gradients = lightning.lightning_backward(p.q, p.k, p.v, p.slopes, p.do, dstate, **given)[:3]
        parts.append((o, *gradients))
        own, kept = lightning.chunk_state(p.q, p.do, p.slopes, segment_ids=p.segment_ids, reverse=True)
        dstate = c * (own + kept[..., None, None] * dstate)
    tokens = (jnp.concatenate(side[::-1], axis=1) for side in zip(*parts))
    return dict(zip(RESULTS, (next(tokens), state, *tokens, dstate)))


def check_halves(length: int, slopes: tuple[float, ...] = cases.SLOPES) -> None:
    """Asserts that a row equals its two halves chained by the state, forward and gradient."""
    x = cases.inputs(length, batch=1, slopes=slopes)
    whole = run(x)
    front, back = (
        dataclasses.replace(x, **{n: getattr(x, n)[:, part] for n in ("q", "k", "v", "do")})
        for part in (slice(None, length // 2), slice(length // 2, None))
    )
    state = run(front)["state"]
    second = run(dataclasses.replace(back, initial_state=np.asarray(state)))
    first = run(dataclasses.replace(front, dstate=np.asarray(second["dinitial_state"])))
    joined = {n: np.concatenate([first[n], second[n]], axis=1) for n in ("o", "dq", "dk", "dv")}
    joined |= {"state": second["state"], "dinitial_state": first["dinitial_state"]}
    for name in RESULTS:
        assert cases.relative(joined[name], np.asarray(whole[name], np.float64)) <= 2e-6, name


def test_halves() -> None:
    """INV-31: the state handed on is the one that the second half needs, and its gradient comes back."""
    check_halves(4096)


@pytest.mark.full
def test_halves_of_a_million_tokens() -> None:
    """INV-31, INV-50: one call of 1,048,576 tokens equals two of 524,288."""
    check_halves(1 << 20, (0.917, 5e-5))


def test_memory_is_linear_in_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-50: with blocks in sequence temporaries grow with T alone; a [T, T] array would grow 16-fold here."""
    monkeypatch.setattr(chunked, "BLOCK_BYTES", 1 << 18)

    def temporaries(length: int) -> int:
        x = cases.as_jax(cases.inputs(length, batch=1))

        def loss(q, k, v):
            return jnp.sum(lightning.lightning_attention(q, k, v, x.slopes) ** 2)

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x.q, x.k, x.v).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(16384) < 4.2 * temporaries(4096)


@pytest.mark.parametrize("segment_ids", [None, cases.segments((150, 150))])
def test_large_slopes_stay_finite(segment_ids: np.ndarray | None) -> None:
    """No exponential of a positive number: slopes at which exp(+slope * C) overflows hundreds of times over."""
    x = cases.inputs(300, batch=1, slopes=(30.0, 200.0), segment_ids=segment_ids)
    actual, expected = run(x), cases.recurrence(x)
    for name in ("o", "state", "dq", "dk", "dv"):
        assert cases.relative(actual[name], getattr(expected, name)) <= cases.bound(np.float32), name


def test_slopes_are_constants() -> None:
    """Slopes receive a zero gradient."""
    x = cases.as_jax(cases.inputs(40))
    gradient = jax.grad(lambda s: jnp.sum(attention(x.q, x.k, x.v, s)))(x.slopes)
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_slopes_reach_every_implementation_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slopes of another dtype lose nothing more than they had lost: kernels multiply them by ages up to T."""
    x, seen, forward = cases.as_jax(cases.inputs(40, dtype=BF16)), [], chunked.forward

    def recorded(q, k, v, slopes, *others):
        seen.append(slopes.dtype)
        return forward(q, k, v, slopes, *others)

    monkeypatch.setattr(chunked, "forward", recorded)
    lightning.lightning_attention(x.q, x.k, x.v, x.slopes.astype(jnp.bfloat16), implementation="chunked")
    assert seen == [jnp.float32]


def test_inside_shard_map() -> None:
    """Batch and heads split over a mesh, replication checked: the same numbers as on one device."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = cases.inputs(100, batch=2, segment_ids=cases.packed(2, 100))
    y = cases.as_jax(x)

    def gradients(q, k, v, slopes, ids, do):
        o, pullback = jax.vjp(lambda *x: lightning.lightning_attention(*x, slopes, segment_ids=ids), q, k, v)
        return o, *pullback(do)

    tokens, specs = P("data", None, "tensor"), (P("tensor"), P("data"))
    sharded = jax.shard_map(gradients, mesh=mesh, in_specs=(*(tokens,) * 3, *specs, tokens), out_specs=(tokens,) * 4)
    arguments = (y.q, y.k, y.v, y.slopes, y.segment_ids, y.do)
    for actual, expected in zip(jax.jit(sharded)(*arguments), jax.jit(gradients)(*arguments)):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_canonical_segment_ids() -> None:
    """INV-36: ids are renumbered by appearance, also when an id comes again; padding does not end a segment."""
    ids = jnp.asarray([[0, 5, 5, 0, 5, 2, 5, 0], [0, 0, 0, 0, 0, 0, 0, 9]])
    expected = [[0, 1, 1, 0, 1, 2, 3, 0], [0, 0, 0, 0, 0, 0, 0, 1]]
    np.testing.assert_array_equal(lightning.canonical_segment_ids(ids), expected)
    first, last = lightning.border_ids(ids)
    np.testing.assert_array_equal(first, [5, 9])
    np.testing.assert_array_equal(last, [5, 9])


def test_dispatch_fails_closed(caplog: pytest.LogCaptureFixture) -> None:
    """What no accelerated implementation supports runs the chunked form and says so once."""
    x = cases.as_jax(cases.inputs(9, dim=12))
    with caplog.at_level(logging.WARNING), dispatch.target("gpu", 9.0):
        for _ in range(2):
            o = attention(x.q, x.k, x.v, x.slopes)
    assert len([r for r in caplog.records if "mosaic_gpu" in r.message]) == 1
    expected = attention(x.q, x.k, x.v, x.slopes, implementation="reference")
    np.testing.assert_allclose(o, expected, rtol=1e-5, atol=1e-6)


def test_errors_name_what_is_wrong() -> None:
    """Wrong shapes, dtypes and names raise with the argument's name and what would be right."""
    x = cases.as_jax(cases.inputs(9))
    wrong = [
        ("no implementation named 'cuda'; there are", {"implementation": "cuda"}),
        ("'mosaic_tpu' cannot run this call", {"implementation": "mosaic_tpu"}),
        ("v must be like q, float32", {"v": x.v.astype(jnp.bfloat16)}),
        (r"slopes must be \[N\] = \[4\], got \[3\]", {"slopes": x.slopes[:3]}),
        (r"segment_ids must be integers \[B, T\] = \[2, 9\]", {"segment_ids": jnp.ones((2, 8), jnp.int32)}),
        (r"segment_ids must be integers \[B, T\] = \[2, 9\], got float32", {"segment_ids": jnp.ones((2, 9))}),
        (r"initial_state must be \[B, N, H, H\]", {"initial_state": x.initial_state[:1]}),
        (r"float32.*, got bfloat16\[2, 4, 16, 16\]", {"initial_state": x.initial_state.astype(jnp.bfloat16)}),
        (r"q must be \[B, T, N, H\], got \[9, 4, 16\]", {"q": x.q[0]}),
        ("q must be bfloat16, float32 or float64, got float16", {"q": x.q.astype(jnp.float16)}),
    ]
    for message, arguments in wrong:
        arguments = {"q": x.q, "k": x.k, "v": x.v, "slopes": x.slopes} | arguments
        with cases.annotations_unchecked(), pytest.raises(ValueError, match=message):
            lightning.lightning_attention(**arguments)
    token = (x.q[:, 0], x.k[:, 0], x.v[:, 0])
    with pytest.raises(ValueError, match="state must be"):
        lightning.decode_step(*token, x.initial_state[:1], x.slopes)
    with (
        cases.annotations_unchecked(),
        pytest.raises(ValueError, match=r"slots must be integers \[B\] = \[2\], got float32"),
    ):
        lightning.decode_step(*token, x.initial_state, x.slopes, slots=jnp.zeros(2))
    with cases.annotations_unchecked(), pytest.raises(ValueError, match=r"state must be .*, got bfloat16"):
        lightning.decode_step(*token, x.initial_state.astype(jnp.bfloat16), x.slopes)
    # Rows that are too many would broadcast and give a gradient that belongs to nothing.
    dstate = jnp.concatenate([x.dstate, x.dstate])
    with (
        cases.annotations_unchecked(),
        pytest.raises(ValueError, match=r"dstate must be .*, got float32\[4, 4, 16, 16\]"),
    ):
        lightning.lightning_backward(x.q, x.k, x.v, x.slopes, x.do, dstate)


@pytest.mark.parametrize("shape", [(0, 9, 4, 16), (2, 0, 4, 16), (2, 9, 0, 16)])
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_in_nothing_out(shape: tuple[int, ...], packed: bool) -> None:
    """Without rows, tokens or heads outputs are empty and a state passes as it came, also where there are kernels."""
    tokens, state = jnp.ones(shape, jnp.bfloat16), jnp.full((shape[0], shape[2], 16, 16), 3.0)
    ids = jnp.ones(shape[:2], jnp.int32) if packed else None

    def forward(q: jax.Array, state: jax.Array) -> tuple:
        return lightning.lightning_attention(
            q, q, q, jnp.ones(shape[2]), segment_ids=ids, initial_state=state, return_state=True
        )

    with dispatch.target("gpu", 9.0):
        (o, leaving), pullback = jax.vjp(forward, tokens, state)
        dq, dstate = pullback((o, leaving))
        alone, transmission = lightning.chunk_state(tokens, tokens, jnp.ones(shape[2]), segment_ids=ids)
    assert o.shape == dq.shape == shape
    assert leaving.shape == dstate.shape == alone.shape == state.shape
    if shape[1] == 0:
        np.testing.assert_array_equal(leaving, state)
        np.testing.assert_array_equal(dstate, state)
        np.testing.assert_array_equal(alone, 0 * state)
        np.testing.assert_array_equal(transmission, np.ones(transmission.shape))
