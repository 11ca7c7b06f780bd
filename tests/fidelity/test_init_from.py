"""A training stage that starts from published weights: straight from safetensors, or from an imported checkpoint."""

import jax
import ml_dtypes
import numpy as np
import pytest

from mmx_jax.config import (
    BatchConfig,
    ConfigError,
    DataConfig,
    RunConfig,
    ScheduleConfig,
    SchedulePhase,
    SourceConfig,
    StageConfig,
)
from mmx_jax.convert import WeightsFileError, import_weights
from mmx_jax.convert.names import tensor_map
from mmx_jax.convert.source import read_config
from mmx_jax.training.stages import first_start
from parallel.mesh import make_mesh
from tests.fidelity.common import tiny_folder


def run_from(model, folder, keep=("params",)):
    stage = StageConfig(
        sequence_length=16,
        data=DataConfig(sources=(SourceConfig(name="text", store="nowhere"),)),
        batch=BatchConfig(micro_batch=8, ramp=((0, 8),)),
        schedule=ScheduleConfig(phases=(SchedulePhase(until_tokens=128, learning_rate=1e-3),), warmup_steps=0),
        init_from=str(folder),
        keep=keep,
    )
    return RunConfig(name="continued", model=model, stages=(stage,))


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 2, "expert": 2, "tensor": 2}])
def test_a_stage_starts_from_safetensors_on_any_mesh(tmp_path, sizes):
    """Every tensor arrives in the shards of its parameter, the optimizer is fresh, nothing else is taken over."""
    folder, tensors = tiny_folder(tmp_path / "hub", vocab_size=64)
    model = read_config(folder)
    start = first_start(run_from(model, folder), make_mesh(sizes))
    assert str(folder) in start.reason
    assert start.progress.tokens == start.progress.step == 0
    for name, tensor in tensor_map(model).items():
        parameter = start.state.params[tensor.path]
        assert parameter.dtype == np.float32
        np.testing.assert_array_equal(
            tensor.to_stored(np.asarray(parameter)[tensor.index]), tensors[name], err_msg=name
        )
    moments = [leaf for leaf in jax.tree.leaves(start.state.optimizer) if leaf.ndim]
    assert moments
    assert not any(np.asarray(leaf).any() for leaf in moments)


def test_a_stage_starts_from_an_imported_checkpoint(tmp_path):
    """Weights imported as bf16 become fp32 master weights of the same values."""
    folder, tensors = tiny_folder(tmp_path / "hub", dtype=ml_dtypes.bfloat16)
    model = read_config(folder)
    import_weights(folder, tmp_path / "imported", progress=False)
    start = first_start(run_from(model, tmp_path / "imported"), make_mesh({"data": 8}))
    for name, tensor in tensor_map(model).items():
        parameter = np.asarray(start.state.params[tensor.path])
        assert parameter.dtype == np.float32
        np.testing.assert_array_equal(tensor.to_stored(parameter[tensor.index]), tensors[name].astype(np.float32))


def test_what_safetensors_cannot_give_is_refused(tmp_path):
    folder, _ = tiny_folder(tmp_path / "hub", vocab_size=64)
    model = read_config(folder)
    mesh = make_mesh({"data": 8})
    with pytest.raises(ConfigError, match=r"hold parameters only: keep must be \('params',\)"):
        first_start(run_from(model, folder, keep=("params", "optimizer")), mesh)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(WeightsFileError, match=r"model-00002-of-00003\.safetensors"):
        first_start(run_from(model, folder), mesh)
