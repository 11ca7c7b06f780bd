"""A run goes on where it was on another number of devices, split another way: 8, then 4, then 2."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from mmx_jax.checkpoint import CheckpointDamagedError, CheckpointStore
from mmx_jax.config import BatchConfig, ExpertTransport, MeshConfig, RunConfig
from mmx_jax.data import Batch
from mmx_jax.training.checkpoints import CHECKPOINTS_FOLDER, metadata_of, state_tree
from mmx_jax.training.run import open_session
from mmx_jax.training.session import Session
from mmx_jax.training.stages import first_start, resume
from parallel.mesh import make_mesh

ROWS, RATE = 8, np.float32(1e-2)
ONE_ROUND = ExpertTransport(block_factor=8.0)
SIZES = ({"fsdp": 2, "expert": 2, "tensor": 2}, {"expert": 2, "data": 2}, {"tensor": 2})


def _on(config: RunConfig, sizes: dict[str, int]) -> tuple[RunConfig, jax.sharding.Mesh]:
    count = int(np.prod(list(sizes.values())))
    return replace(config, mesh=MeshConfig(**({"fsdp": 1} | sizes))), make_mesh(sizes, jax.devices()[:count])


def _update(session: Session) -> tuple[Batch, float]:
    """One update; returns the global batch that it read, and its loss."""
    batch = session.feed.next(1)
    with jax.set_mesh(session.mesh):
        session.state, metrics = session.train_step(session.state, batch, np.int32(1), RATE)
    step = session.progress.step + 1
    session.progress = replace(session.progress, step=step, update=step, row=session.progress.row + ROWS)
    return jax.tree.map(np.array, batch), float(metrics["loss"])


def _save(store: CheckpointStore, session: Session) -> dict:
    tree = state_tree(session.state)
    store.save(session.progress.update, tree, metadata_of(session) | {"finished": False, "before_decay": False})
    store.wait()
    return jax.tree.map(np.array, tree)


def _bytes(tree: object) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_a_run_goes_on_on_other_meshes(tiny: RunConfig, tmp_path: Path) -> None:
    """Every bit of the state comes back, the next global batch is the same, and so is what the update makes of it."""
    stage = replace(tiny.stages[0], batch=BatchConfig(micro_batch=ROWS, ramp=((0, ROWS),)), transport=ONE_ROUND)
    config = replace(tiny, stages=(stage,))
    with CheckpointStore(tmp_path / CHECKPOINTS_FOLDER, keep_last=9) as store:
        store.open_for_writing()
        first, mesh = _on(config, SIZES[0])
        session = open_session(first, mesh, tmp_path, first_start(first, mesh))
        _update(session)
        for sizes in SIZES[1:]:
            saved = _save(store, session)
            assert store.verify(session.progress.update) == []
            expected_batch, expected_loss = _update(session)
            session.feed.close()
            other, mesh = _on(config, sizes)
            start = resume(other, mesh, store, reported=False)
            assert start is not None
            assert _bytes(state_tree(start.state)) == _bytes(saved)
            assert {leaf.sharding.mesh.size for leaf in jax.tree.leaves(start.state.params)} == {mesh.size}
            session = open_session(other, mesh, tmp_path, start)
            batch, loss = _update(session)
            assert _bytes(batch) == _bytes(expected_batch)
            assert loss == pytest.approx(expected_loss, rel=1e-5)
        session.feed.close()
        newest = store.steps()[-1]
        file = max((store.folder / f"{newest:08d}" / "arrays").rglob("c.*"), key=lambda path: path.stat().st_size)
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(CheckpointDamagedError, match=file.name):
            store.restore(state_tree(session.state), newest)
