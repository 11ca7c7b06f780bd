"""How much of the collectives' time hides behind computing, read from a profiler trace of NVIDIA GPUs.

`jax.profiler` records for every GPU a plane of streams, and on each stream the kernels with their times. A collective
is a kernel of NCCL's; it is hidden while any other kernel runs on the same GPU, and exposed otherwise. A collective's
time begins when its kernel does, so the wait for a GPU that comes later counts as the collective's.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jax.profiler import ProfileData

_GPU = re.compile(r"/device:GPU:\d+")
_STREAM = re.compile(r"Stream #")
_COPY = re.compile(r"memcpy|memset", re.IGNORECASE)
_COLLECTIVE = re.compile(r"nccl", re.IGNORECASE)
_KIND = re.compile(r"(AllGather|ReduceScatter|AllReduce|SendRecv|Broadcast|AllToAll|Reduce)", re.IGNORECASE)
NANOSECONDS = 1e-9

Interval = tuple[float, float]
"""Begin and end of something, in nanoseconds."""


class ProfileError(ValueError):
    """A trace that does not say what the GPUs did."""


@dataclass(frozen=True)
class Kernel:
    """One kernel on one GPU."""

    name: str
    begin: float
    end: float

    @property
    def collective(self) -> str | None:
        """What NCCL does in it, such as "AllGather"; None for a kernel that computes."""
        if not _COLLECTIVE.search(self.name):
            return None
        kind = _KIND.search(self.name)
        return kind[1] if kind else self.name


@dataclass(frozen=True)
class Overlap:
    """What one GPU did between its first and its last kernel, in seconds."""

    span: float
    computing: float
    """Time in which a kernel other than a collective ran."""
    collective: float
    """Time in which a collective ran."""
    hidden: float
    """Time in which both ran."""
    by_kind: dict[str, float]
    """Time of the collectives by kind; where two run at once both count."""

    @property
    def hidden_share(self) -> float:
        """Share of the collectives' time that is hidden; 1 without collectives."""
        return self.hidden / self.collective if self.collective else 1.0

    @property
    def exposed(self) -> float:
        """Seconds in which a collective ran and nothing was computed."""
        return self.collective - self.hidden

    @property
    def idle(self) -> float:
        """Seconds in which no kernel ran."""
        return self.span - self.computing - self.exposed


def read_overlap(folder: Path) -> dict[str, Overlap]:
    """What each GPU did, by the name of its plane, in the one trace that `jax.profiler` left under a folder.

    Raises:
      ProfileError: no trace or several, or one without GPUs.
    """
    files = sorted(folder.rglob("*.xplane.pb"))
    if len(files) != 1:
        raise ProfileError(f"{folder}: needs one trace (*.xplane.pb), found {len(files)}")
    found = overlaps(ProfileData.from_file(str(files[0])))
    if not found:
        raise ProfileError(f"{files[0]}: no kernel of a GPU is in the trace")
    return found


def overlaps(profile: ProfileData) -> dict[str, Overlap]:
    """What each GPU did, by the name of its plane; GPUs without kernels are left out."""
    planes = {plane.name: list(_kernels(plane)) for plane in profile.planes if _GPU.fullmatch(plane.name)}
    return {name: overlap(kernels) for name, kernels in sorted(planes.items()) if kernels}


def _kernels(plane: object) -> Iterable[Kernel]:
    for line in plane.lines:  # type: ignore[attr-defined]
        if not _STREAM.match(line.name):
            continue
        for event in line.events:
            if not _COPY.match(event.name):
                yield Kernel(event.name, event.start_ns, event.start_ns + event.duration_ns)


def overlap(kernels: Iterable[Kernel]) -> Overlap:
    """Sums up the kernels of one GPU, at least one."""
    computing: list[Interval] = []
    collective: list[Interval] = []
    by_kind: dict[str, float] = {}
    for kernel in kernels:
        kind = kernel.collective
        (computing if kind is None else collective).append((kernel.begin, kernel.end))
        if kind is not None:
            by_kind[kind] = by_kind.get(kind, 0.0) + (kernel.end - kernel.begin) * NANOSECONDS
    either = computing + collective
    computed, communicated = covered(computing), covered(collective)
    return Overlap(
        span=(max(end for _, end in either) - min(begin for begin, _ in either)) * NANOSECONDS,
        computing=computed * NANOSECONDS,
        collective=communicated * NANOSECONDS,
        hidden=(computed + communicated - covered(either)) * NANOSECONDS,
        by_kind=by_kind,
    )


def covered(intervals: Iterable[Interval]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
