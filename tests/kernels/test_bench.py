"""The benchmark's arithmetic and plumbing, on a platform whose times mean nothing."""

import json
import sys

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.bench import __main__, ceilings, decode, lightning, norm_gate, peers, timing


def test_table_relates_times_to_ceilings_and_peers() -> None:
    """GB/s and TFLOP/s follow from bytes, operations and milliseconds; ratios from our time of the same case."""
    rows = [
        timing.Row("R fwd", "ours", ms=0.5, bytes=10**9, flops=1e11, errors={"o": 2e-3}),
        timing.Row("R fwd", "jla", ms=1.0, bytes=10**9),
        timing.Row("R fwd", "fla", note="not installed"),
    ]
    header, ours, jla, fla = timing.table(rows, copy_gbps=2500.0, matmul_tflops=800.0).splitlines()
    assert header.split()[0] == "case"
    assert ours.split()[3:] == ["0.5000", "2000", "80.0", "200.0", "25.0", "1.00", "o", "2.0e-03"]
    assert jla.split()[3:] == ["1.0000", "1000", "40.0", "2.00"]
    assert fla.split()[-2:] == ["not", "installed"]


def test_milliseconds_counts_one_call() -> None:
    """Twice the work takes longer; the queue's fixed cost drops out, so no time is negative."""
    x = jnp.ones((400, 400))
    once, often = jax.jit(lambda x: x @ x), jax.jit(lambda x: jax.lax.fori_loop(0, 30, lambda _, y: (x @ y) / 400, x))
    assert 0 < timing.milliseconds(once, [(x,)], repeats=3) < timing.milliseconds(often, [(x,)], repeats=3)


def test_a_case_yields_ours_and_every_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward rows carry times and errors; a peer that is missing or fails leaves a row that says so."""
    monkeypatch.setattr(lightning, "CASES", (lightning.Case("small", 1, 100, 2, segments=3),))
    monkeypatch.setattr(lightning, "CACHE_BYTES", 0)
    monkeypatch.setattr(timing.milliseconds, "__defaults__", None)
    monkeypatch.setattr(timing.milliseconds, "__kwdefaults__", {"repeats": 1})
    monkeypatch.setattr(peers, "available", lambda name: name == "fla")
    rows = lightning.run(["jla", "fla"], ["small"])
    assert [(row.case, row.implementation) for row in rows] == [
        ("small fwd", "ours"),
        ("small fwd+bwd", "ours"),
        *[(f"small {what}", name) for name in ("jla", "fla") for what in ("fwd", "fwd+bwd")],
    ]
    assert all(row.ms is not None for row in rows[:2])
    assert set(rows[1].errors) == {"o", "state", "dq", "dk", "dv"}
    assert max(rows[1].errors.values()) < 1e-2
    assert rows[2].note == "not installed"
    assert rows[4].note.startswith("failed: ")
    assert lightning.run([], ["no such case"]) == []


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One short repeat of each measurement."""
    monkeypatch.setattr(timing.milliseconds, "__defaults__", None)
    monkeypatch.setattr(timing.milliseconds, "__kwdefaults__", {"repeats": 1})
    monkeypatch.setattr(norm_gate, "CASES", (norm_gate.Case("small", 1, 32, 1),))
    monkeypatch.setattr(norm_gate, "CACHE_BYTES", 0)
    monkeypatch.setattr(decode, "CASES", (decode.Case("small", 2, 2, heads=1, slots=True),))
    monkeypatch.setattr(decode, "REPEATS", 1)
    monkeypatch.setattr(decode, "STEPS", 4)


def test_norm_gate_rows(once: None, capfd: pytest.CaptureFixture[str]) -> None:
    """Both directions with errors, the XLA form beside ours; a missing peer says so; every row is shown as it comes."""
    rows = norm_gate.run(["xla", "fla"], [])
    assert [(row.case, row.implementation) for row in rows] == [
        (f"small {what}", name) for name in ("ours", "xla", "fla") for what in ("fwd", "fwd+bwd")
    ]
    assert [row.bytes for row in rows[:2]] == [3 * 2 * 32 * 128, 8 * 2 * 32 * 128]
    assert set(rows[1].errors) == {"y", "dx", "dgate", "dweight"}
    assert 0 < max(rows[1].errors.values()) < 1e-2
    assert all(row.ms is not None for row in rows[:4])
    assert rows[4].note == "not installed"
    assert capfd.readouterr().err.count("small fwd") == 6
    assert norm_gate.run([], ["no such case"]) == []


def test_decode_rows(once: None) -> None:
    """A step's time, its errors and its bytes: the states in and out, four vectors a head."""
    ours, xla, missing = decode.run(["xla", "fla_graph"], ["small"])
    assert ours.bytes == 2 * (2 * 4 * 128 * 128 + 4 * 2 * 128)
    assert ours.ms is not None
    assert xla.ms is not None
    assert max(ours.errors.values()) < 3e-3
    assert missing.note == "not installed"
    assert decode.run([], ["no such case"]) == []


def test_operations_and_peers_are_checked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """--help lists what there is; an unknown operation or peer ends the command before anything is measured."""
    monkeypatch.setattr(sys, "argv", ["bench", "--help"])
    with pytest.raises(SystemExit):
        __main__.main()
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("lightning", "softmax", "norm_gate", "decode", "grouped_matmul"))
    monkeypatch.setattr(sys, "argv", ["bench", "sorting"])
    with pytest.raises(SystemExit):
        __main__.main()
    monkeypatch.setattr(sys, "argv", ["bench", "decode", "--peers", "xla,jla"])
    assert __main__.main() == 2
    assert "decode knows xla, fla, fla_graph" in capsys.readouterr().err


def test_command_needs_a_gpu_and_writes_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path
) -> None:
    """Without a GPU the command refuses; with one it prints the table and writes what it measured."""
    path = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["bench", "lightning", "--json", str(path)])
    if jax.default_backend() != "gpu":
        assert __main__.main() == 1
        assert "need a GPU" in capsys.readouterr().err
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(ceilings, "copy_gbps", lambda: 3000.0)
    monkeypatch.setattr(ceilings, "matmul_tflops", lambda: 700.0)
    monkeypatch.setattr(lightning, "run", lambda peers, only: [timing.Row("R fwd", "ours", ms=0.2, bytes=5 * 10**8)])
    assert __main__.main() == 0
    assert "R fwd" in capsys.readouterr().out
    assert json.loads(path.read_text())["rows"][0]["ms"] == 0.2
