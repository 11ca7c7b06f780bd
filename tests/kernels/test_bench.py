"""The benchmark's arithmetic and plumbing, on a platform whose times mean nothing."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.bench import __main__, ceilings, common, decode, lightning, norm_gate, plot, timing


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


def fail(*_: object, **__: object) -> float:
    raise RuntimeError("out of registers\nand more")


def test_a_case_yields_ours_and_every_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward rows carry times and errors; a peer that is missing or fails leaves a row that says so."""
    monkeypatch.setattr(lightning, "CASES", (lightning.Case("small", 1, 100, 2, segments=3, checked=True),))
    monkeypatch.setattr(common, "CACHE_BYTES", 0)
    monkeypatch.setattr(lightning, "SHORT", 0)
    monkeypatch.setattr(timing.milliseconds, "__defaults__", None)
    monkeypatch.setattr(timing.milliseconds, "__kwdefaults__", {"repeats": 1})
    # "json" stands for a peer that is installed, and fails.
    monkeypatch.setitem(lightning.ATTEND, "json", fail)
    monkeypatch.setitem(lightning.ATTEND, "no_such_module", lightning.ATTEND["ours"])
    rows = list(lightning.run(["no_such_module", "json"], ["small"]))
    assert [(row.case, row.implementation) for row in rows] == [
        ("small fwd", "ours"),
        ("small fwd+bwd", "ours"),
        *[(f"small {what}", name) for name in ("no_such_module", "json") for what in ("fwd", "fwd+bwd")],
    ]
    assert all(row.ms is not None for row in rows[:2])
    assert set(rows[1].errors) == {"o", "state", "dq", "dk", "dv"}
    assert max(rows[1].errors.values()) < 1e-2
    assert rows[1].flops == 3.5 * 100 * 2 * (2 * 64 * 128 + 4 * 128**2)
    assert "20 of 20 repeats bit-identical" in rows[1].note
    assert "work space" in rows[0].note
    assert rows[2].note == "not installed"
    assert rows[4].note == "failed: RuntimeError: out of registers"
    assert list(lightning.run([], ["no such case"])) == []
    monkeypatch.setattr(lightning, "AHEAD", 1)
    monkeypatch.setattr(lightning, "SHORT", 16 * 128)
    monkeypatch.setattr(lightning, "TOGETHER", 3)
    tiny = tuple(lightning.Case(f"tiny {i}", 1, 16, 1 + i % 2, backward=False) for i in range(4))
    monkeypatch.setattr(lightning, "CASES", tiny)
    rows = list(lightning.run([], []))
    assert [row.case for row in rows if row.ms] == [f"tiny {i} fwd" for i in range(4)]
    assert ["3 calls a program" in row.note for row in rows] == [True, False, True, False]
    monkeypatch.setattr(lightning, "milliseconds", lambda *_: 6.0)
    assert [row.ms for row in lightning.run([], [])] == [2, 6, 2, 6]


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One short repeat of each measurement."""
    monkeypatch.setattr(timing.milliseconds, "__defaults__", None)
    monkeypatch.setattr(timing.milliseconds, "__kwdefaults__", {"repeats": 1})
    monkeypatch.setattr(norm_gate, "CASES", (norm_gate.Case("small", 1, 32, 1),))
    monkeypatch.setattr(common, "CACHE_BYTES", 0)
    monkeypatch.setattr(decode, "CASES", (decode.Case("small", 2, 2, heads=1, slots=True),))
    monkeypatch.setattr(decode, "REPEATS", 1)
    monkeypatch.setattr(decode, "STEPS", 4)


def test_norm_gate_rows(once: None) -> None:
    """Both directions with errors, the XLA form beside ours; a missing peer says so."""
    rows = list(norm_gate.run(["xla", "fla"], []))
    assert [(row.case, row.implementation) for row in rows] == [
        (f"small {what}", name) for name in ("ours", "xla", "fla") for what in ("fwd", "fwd+bwd")
    ]
    assert [row.bytes for row in rows[:2]] == [3 * 2 * 32 * 128, 8 * 2 * 32 * 128]
    assert set(rows[1].errors) == {"y", "dx", "dgate", "dweight"}
    assert 0 < max(rows[1].errors.values()) < 1e-2
    assert all(row.ms is not None for row in rows[:4])
    assert rows[4].note == "not installed"
    assert list(norm_gate.run([], ["no such case"])) == []


def test_decode_rows(once: None) -> None:
    """A step's time, its errors and its bytes: the states in and out, four vectors a head."""
    ours, xla, missing = decode.run(["xla", "fla_graph"], ["small"])
    assert ours.bytes == 2 * (2 * 4 * 128 * 128 + 4 * 2 * 128)
    assert ours.ms is not None
    assert xla.ms is not None
    assert max(ours.errors.values()) < 3e-3
    assert missing.note == "not installed"
    assert list(decode.run([], ["no such case"])) == []


def test_operations_and_peers_are_checked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """--help lists what there is; an unknown operation or peer ends the command before anything is measured."""
    monkeypatch.setattr(sys, "argv", ["bench", "--help"])
    with pytest.raises(SystemExit):
        __main__.main()
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("lightning", "softmax", "norm_gate", "decode", "grouped_matmul", "plot"))
    monkeypatch.setattr(sys, "argv", ["bench", "sorting"])
    with pytest.raises(SystemExit):
        __main__.main()
    monkeypatch.setattr(sys, "argv", ["bench", "decode", "--peers", "xla,jla"])
    assert __main__.main() == 2
    assert "decode knows xla, fla, fla_graph" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["bench", "lightning", "--only", "R:,nosuch"])
    assert __main__.main() == 2
    shown = capsys.readouterr().err
    assert "no case of lightning has nosuch in its name; there are R: " in shown


def test_files_are_checked_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A --json that cannot be written and a file that cannot be plotted end with their name and code 2."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(ceilings, "copy_gbps", fail)
    missing = tmp_path / "none" / "rows.json"
    monkeypatch.setattr(sys, "argv", ["bench", "lightning", "--json", str(missing)])
    assert __main__.main() == 2
    assert f"--json {missing}: cannot be written" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["bench", "plot", str(missing), "--output", str(tmp_path / "a.png")])
    assert __main__.main() == 2
    assert str(missing) in capsys.readouterr().err


def test_command_needs_a_gpu_and_writes_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Without a GPU the command refuses; with one it prints the table and has written what a stopped run measured."""
    path = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["bench", "lightning", "--json", str(path)])
    if jax.default_backend() != "gpu":
        assert __main__.main() == 1
        assert "need a GPU" in capsys.readouterr().err
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(ceilings, "copy_gbps", lambda: 3000.0)
    monkeypatch.setattr(ceilings, "matmul_tflops", lambda: 700.0)
    rows = [timing.Row("R fwd", "ours", ms=0.2, bytes=5 * 10**8), timing.Row("R fwd", "jla", ms=0.3)]
    monkeypatch.setattr(lightning, "run", lambda peers, only: iter(rows))
    assert __main__.main() == 0
    shown = capsys.readouterr()
    assert "R fwd" in shown.out
    assert shown.err.count("R fwd") == 2
    assert [row["ms"] for row in json.loads(path.read_text())["rows"]] == [0.2, 0.3]

    def interrupted(peers: list[str], only: list[str]) -> Iterator[timing.Row]:
        yield rows[1]
        raise KeyboardInterrupt

    monkeypatch.setattr(lightning, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        __main__.main()
    assert [row["ms"] for row in json.loads(path.read_text())["rows"]] == [0.3]


def test_plot_draws_every_line(tmp_path: Path) -> None:
    """Lengths by heads, pass and whose, a later file's time in place of an earlier one's; other rows are left out."""

    def written(name: str, **rows: float | None) -> Path:
        records = [{"case": case, "implementation": "ours", "ms": ms} for case, ms in rows.items()]
        (tmp_path / name).write_text(json.dumps({"rows": records}))
        return tmp_path / name

    first = {"R: B1 T8192 N64 fwd": 0.2, "B1 T32768 N64 fwd": 0.9, "B1 T8192 N8 fwd+bwd": 0.3, "B4 T8192 N64 fwd": 0.8}
    files = [
        written("a.json", **first),
        written("b.json", **{"B1 T32768 N64 fwd": 0.8, "B1 T32768 N64 packed 16 fwd": 1.0, "B1 T8192 N16 fwd": None}),
    ]
    assert plot.read(files) == {(64, "fwd", "ours"): {8192: 0.2, 32768: 0.8}, (8, "fwd+bwd", "ours"): {8192: 0.3}}
    plot.draw(files, tmp_path / "times.png")
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no rows named like"):
        plot.draw([written("c.json")], tmp_path / "none.png")
