"""What can go wrong when weights come in or go out; each message names the file, the tensor and what would be right."""

from pathlib import Path


class ConvertError(Exception):
    """Base of every conversion error."""


class WeightsFileError(ConvertError):
    """A weight file, an index or a folder of them that cannot be read as what it claims to be."""

    def __init__(self, path: Path, reason: str):
        self.path = path
        super().__init__(f"{path}: {reason}")


class WeightsMismatchError(ConvertError):
    """Tensors that are not those of the model: missing, unexpected, of another shape or dtype, or not finite."""

    def __init__(self, where: Path | str, differences: list[str]):
        self.differences = differences
        shown = "".join(f"\n  {line}" for line in differences[:8])
        more = f"\n  and {len(differences) - 8} more" if len(differences) > 8 else ""
        super().__init__(f"{where}: the tensors are not those of the model:{shown}{more}")


class ConfigSchemaError(ConvertError):
    """A config.json that lacks a key, holds a value that cannot be right, or describes another architecture."""

    def __init__(self, where: Path | str, key: str, reason: str):
        self.key = key
        super().__init__(f"{where}: {key}: {reason}")
