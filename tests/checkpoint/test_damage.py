"""Damage of every kind is noticed, named by array, chunk and file, and passed over in favour of the last good step."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmx_jax.checkpoint import CheckpointDamagedError, CheckpointMismatchError, CheckpointStore

ABSTRACT = {
    "params": {name: jax.ShapeDtypeStruct((16, 32), jnp.float32) for name in ("embedding", "scan/0/moe/up")},
    "optimizer": {"mu": jax.ShapeDtypeStruct((16, 32), jnp.bfloat16), "count": jax.ShapeDtypeStruct((), jnp.int32)},
}


def state(step: int) -> dict:
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("fsdp",)), P("fsdp"))
    random_values = np.random.default_rng(step).standard_normal((3, 16, 32)).astype(np.float32)
    embedding, up, _ = jax.device_put(list(random_values), [sharding] * 3)
    moments = jnp.zeros((16, 32), jnp.bfloat16)  # all zero: a missing chunk must not pass for one
    return {
        "params": {"embedding": embedding, "scan/0/moe/up": up},
        "optimizer": {"mu": moments, "count": jnp.int32(step)},
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 10, 20 and 30."""
    folder = tmp_path_factory.mktemp("saved")
    with CheckpointStore(folder) as store:
        for step in (10, 20, 30):
            store.save(step, state(step), {"tokens": step * 1000})
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_fifty_single_bit_flips_are_noticed(folder: Path) -> None:
    """Must show 4: each flip in a saved array is noticed by restore and by verify, and the file is named."""
    store = CheckpointStore(folder)
    source = random.Random(50)
    files = sorted((folder / "00000030/arrays").glob("*/*"))
    assert len(files) == 4 + 8 + 8 + 1 + 1
    for _ in range(50):
        file = source.choice(files)
        bit = source.randrange(8 * file.stat().st_size)
        flip(file, bit)
        with pytest.raises(CheckpointDamagedError, match=rf"step 30 .*{file.parent.name}/{file.name}"):
            store.restore(ABSTRACT, 30)
        assert [problem.file for problem in store.verify(30)] == [file]
        flip(file, bit)
    assert store.verify(30) == []
    assert int(store.restore(ABSTRACT).tree["optimizer"]["count"]) == 30


def _truncate(step: Path) -> str:
    file = step / "arrays/params.scan.0.moe.up/c.3.0"
    with open(file, "r+b") as opened:
        opened.truncate(100)
    return r"array 'params/scan/0/moe/up', chunk \(3, 0\), .*c\.3\.0"


def _flip_a_bit(step: Path) -> str:
    flip(step / "arrays/params.embedding/c.7.0", 1001)
    return r"array 'params/embedding', chunk \(7, 0\), .*params\.embedding/c\.7\.0: CRC-32"


def _exchange(step: Path) -> str:
    array = step / "arrays/params.embedding"
    (array / "c.0.0").rename(array / "kept")
    (array / "c.1.0").rename(array / "c.0.0")
    (array / "kept").rename(array / "c.1.0")
    return r"array 'params/embedding', chunk \([01], 0\), .*CRC-32"


def _remove(name: str, says: str) -> Callable[[Path], str]:
    def damage(step: Path) -> str:
        (step / name).unlink()
        return says

    return damage


def _flip_in(name: str, says: str) -> Callable[[Path], str]:
    def damage(step: Path) -> str:
        flip(step / name, 8 * ((step / name).stat().st_size // 2) + 3)
        return says

    return damage


def _half_written(step: Path) -> str:
    """A folder with a final name that a copy by hand left half-way."""
    shutil.rmtree(step / "arrays/optimizer.mu")
    (step / "checksums.json").unlink()
    return r"checksums\.json: is missing"


def _folder_of_another_step(step: Path) -> str:
    shutil.rmtree(step)
    shutil.copytree(step.parent / "00000010", step)
    return r"metadata\.json: holds step 10, but the folder says 00000030"


DAMAGES = {
    "bit flipped": _flip_a_bit,
    "truncated": _truncate,
    "chunks exchanged": _exchange,
    "chunk of zeros missing": _remove("arrays/optimizer.mu/c.0.0", r"array 'optimizer/mu', chunk \(0, 0\), .*missing"),
    "scalar missing": _remove("arrays/optimizer.count/c", r"array 'optimizer/count', chunk \(\), .*missing"),
    "zarr.json missing": _remove(
        "arrays/params.embedding/zarr.json", r"array 'params/embedding', .*zarr\.json.*missing"
    ),
    "zarr.json changed": _flip_in(
        "arrays/params.embedding/zarr.json", r"array 'params/embedding', .*zarr\.json: CRC-32"
    ),
    "checksums missing": _remove("checksums.json", r"checksums\.json: is missing"),
    "checksums changed": _flip_in("checksums.json", r"checksums\.json: cannot be read"),
    "metadata missing": _remove("metadata.json", r"metadata\.json: is missing"),
    "metadata changed": _flip_in("metadata.json", r"metadata\.json: "),
    "half-written": _half_written,
    "another step": _folder_of_another_step,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_step_is_named_and_passed_over(
    folder: Path, damage: Callable[[Path], str], caplog: pytest.LogCaptureFixture
) -> None:
    says = damage(folder / "00000030")
    with CheckpointStore(folder) as store:
        assert any(problem for problem in store.verify(30))
        with pytest.raises(CheckpointDamagedError, match=rf"checkpoint step 30 in .*{says}"):
            store.restore(ABSTRACT, 30)
        caplog.clear()
        restored = store.restore(ABSTRACT)
        assert (restored.step, restored.metadata) == (20, {"tokens": 20000})
        expected = state(20)["params"]["embedding"]
        assert np.array_equal(np.asarray(restored.tree["params"]["embedding"]), np.asarray(expected))
        (record,) = [r for r in caplog.records if r.levelname == "ERROR"]
        assert "step 30" in record.getMessage()
        assert "trying the step before it" in record.getMessage()
        store.save(30, state(30), {"tokens": 30000})
        assert store.restore(ABSTRACT).step == 30, "a damaged step may be saved again"


def test_every_step_damaged(folder: Path) -> None:
    for step in (10, 20, 30):
        flip(folder / f"{step:08d}/arrays/params.embedding/c.0.0", 5)
    with pytest.raises(CheckpointDamagedError, match="step 10 "):
        CheckpointStore(folder).restore(ABSTRACT)


def test_another_configuration_is_no_damage(folder: Path) -> None:
    """A wrong config must not quietly go back to an older step."""
    wrong = {"params": {"embedding": jax.ShapeDtypeStruct((16, 33), jnp.float32)}}
    with pytest.raises(CheckpointMismatchError, match="step 30 "):
        CheckpointStore(folder).restore(wrong)
