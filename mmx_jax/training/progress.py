"""Where a run is: the Python values that, with parameters and optimizer, make a run resumable."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from mmx_jax.training.errors import CheckpointRefusedError


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Counters of a run after some updates."""

    stage: str
    """Name of the stage."""
    round: int = 1
    """Which budget of the stage this is; 2 and more continue a finished run."""
    step: int = 0
    """Updates behind the parameters that the warm-up counts."""
    tokens: int = 0
    """Tokens of the stage behind the parameters."""
    row: int = 0
    """Next row of the stage's global stream of rows: the whole data position."""
    update: int = 0
    """Updates done in this workdir, over stages and rounds; checkpoints are numbered by it. It never goes back."""
    skipped: int = 0
    """Updates that were skipped because something was not finite."""
    skipped_in_a_row: int = 0

    def after(self, sequences: int, sequence_length: int) -> "Progress":
        """Progress after one more update on so many rows."""
        return replace(
            self,
            step=self.step + 1,
            update=self.update + 1,
            tokens=self.tokens + sequences * sequence_length,
            row=self.row + sequences,
        )

    def counting(self, finite: bool) -> "Progress":
        """Progress that knows whether the last update was applied."""
        if finite:
            return replace(self, skipped_in_a_row=0)
        return replace(self, skipped=self.skipped + 1, skipped_in_a_row=self.skipped_in_a_row + 1)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Progress":
        """What `to_dict` made.

        Raises:
          CheckpointRefusedError: when it was made by something else.
        """
        names = {field.name for field in fields(cls)}
        if set(data) != names:
            raise CheckpointRefusedError(f"a checkpoint's progress has the fields {sorted(data)}, not {sorted(names)}")
        return cls(**data)
