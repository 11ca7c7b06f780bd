"""Counts what a conversion of a model would touch, without allocating a weight."""

from dataclasses import dataclass
from pathlib import Path

from mmx_jax.config import ModelConfig
from mmx_jax.convert.errors import ConvertError
from mmx_jax.convert.hf_config import check_model
from mmx_jax.convert.loading import differences_from_file
from mmx_jax.convert.names import expected_tensors, names_sha256, tensor_map
from mmx_jax.convert.source import SourceFolder
from mmx_jax.model import parameter_spec


@dataclass(frozen=True)
class Check:
    """What the checkpoint-name column of a model covers (INV-03)."""

    tensors: int
    """Tensors that the parameter spec names."""
    expected: int
    """Tensors of the published table for this shape, counted without the spec."""
    parameters: int
    """Elements of these tensors."""
    spec_parameters: int
    """Elements of all parameters."""
    names_sha256: str
    stored_bytes: int | None = None
    """Bytes of the tensors in a source folder whose names, shapes and dtypes agree; None without one."""
    differences: tuple[str, ...] = ()
    """Where the configuration computes something else than the folder's config.json says."""

    @property
    def complete(self) -> bool:
        """Whether nothing is left over on either side, and a folder's config.json agrees."""
        return self._bijection and not self.differences

    @property
    def _bijection(self) -> bool:
        return self.tensors == self.expected and self.parameters == self.spec_parameters

    def lines(self) -> list[str]:
        """For the shell."""
        verdict = "every one exactly once" if self._bijection else "NOT a bijection"
        out = [
            f"keys        {self.tensors:,} of {self.expected:,}, sha256 of the sorted names {self.names_sha256}",
            f"parameters  {self.parameters:,} of {self.spec_parameters:,}: {verdict}",
        ]
        for label, size in (("bf16", 2), ("fp32", 4)):
            nbytes = self.parameters * size
            out.append(f"{label}        {nbytes:,} bytes = {nbytes / 1e9:,.2f} GB = {nbytes / 2**30:,.1f} GiB")
        if self.stored_bytes is not None:
            out.append(f"source      {self.stored_bytes:,} bytes; names, shapes and dtypes agree")
        return out + [f"config.json {line}" for line in self.differences]


def check_conversion(config: ModelConfig | None, source: str | Path | None = None) -> Check:
    """Proves that names and parameters match one to one, and optionally that a folder holds exactly them.

    Args:
      config: the model; None takes the one of `source`.
      source: folder of published weights; only headers are read. Its config.json is held against `config`.

    Raises: ConvertError and its kinds.
    """
    if config is not None:
        check_model(config, "the configuration")
    folder = None if source is None else SourceFolder(source, config)
    if config is None:
        if folder is None:
            raise ConvertError("nothing to check: needs a configuration, a folder, or both")
        config = folder.config
    differences = () if folder is None else tuple(differences_from_file(config, folder.path))
    tensors = tensor_map(config)
    elements = {name: _elements(tensor.shape) for name, tensor in tensors.items()}
    stored = None
    if folder is not None:
        stored = sum(elements[name] * folder.dtype(name).itemsize for name in tensors)
    return Check(
        tensors=len(tensors),
        expected=expected_tensors(config),
        parameters=sum(elements.values()),
        spec_parameters=sum(spec.size for spec in parameter_spec(config).values()),
        names_sha256=names_sha256(tensors),
        stored_bytes=stored,
        differences=differences,
    )


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
