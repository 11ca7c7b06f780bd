"""Which process of a run this is: told by flags, or found in what Slurm, MPI, a TPU pod or the user's environment say.

Nothing here imports JAX, and nothing but a TPU's metadata server is asked over the network.
"""

import re
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PORT = 8476
"""Port of the coordinator where nothing says another; the one after it is used too."""
PORTS = range(61000, 65000, 2)
"""Above the ports that Linux hands out by itself: a job picks one by its number, so that jobs on one host differ."""
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
METADATA_SECONDS = 5.0


class LaunchError(RuntimeError):
    """What started the processes does not say enough, or says what cannot be."""


@dataclass(frozen=True)
class Launch:
    """One process of a run of several."""

    address: str
    """host:port of process 0, where JAX coordinates; the next port is the guards'."""
    count: int
    index: int
    local_devices: tuple[int, ...] | None = None
    """GPUs of this process among those of its host; None takes all that it sees."""

    def __post_init__(self) -> None:
        host, _, port = self.address.rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 65535):
            raise LaunchError(f"coordinator address {self.address!r} must be host:port, as in node0:{PORT}")
        if not 0 <= self.index < self.count:
            raise LaunchError(f"process {self.index} of {self.count}: processes are numbered from 0 to the number - 1")

    @property
    def host(self) -> str:
        """Host of process 0."""
        return self.address.rpartition(":")[0]

    @property
    def port(self) -> int:
        """Port of JAX's coordination service."""
        return int(self.address.rpartition(":")[2])


def metadata_attribute(name: str) -> str | None:
    """An attribute of the virtual machine from its metadata server; None where there is no such server or attribute."""
    request = urllib.request.Request(METADATA + name, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=METADATA_SECONDS) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, OSError):
        return None


def on_tpu_vm(environment: Mapping[str, str]) -> bool:
    """Whether TPU chips are attached that JAX may use and whose metadata may be asked for."""
    wanted = environment.get("JAX_PLATFORMS", "tpu").split(",")
    chips = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return chips and "tpu" in wanted and "TPU_SKIP_MDS_QUERY" not in environment


def find_launch(
    environment: Mapping[str, str],
    address: str | None = None,
    count: int | None = None,
    index: int | None = None,
    attribute: Callable[[str], str | None] | None = None,
) -> Launch | None:
    """This process's place in the run, or None for a run of one process.

    Args:
      environment: environment variables.
      address: host:port of process 0; it, `count` and `index` override what is found.
      count: number of processes.
      index: number of this process.
      attribute: asks a TPU machine's metadata server; None where there is none.

    Raises:
      LaunchError: several processes, but their number, this one's number or the address of process 0 is unknown.
    """
    found = _find(environment, attribute)
    count = found.count if count is None else count
    index = found.index if index is None else index
    if address is None:
        address = found.address
    elif ":" not in address:
        address = f"{address}:{PORT}"
    if count == 1 or (count is None and address is None and index is None):
        return None
    values = {"--coordinator_address": address, "--num_processes": count, "--process_id": index}
    if missing := [name for name, value in values.items() if value is None]:
        raise LaunchError(f"{found.source} does not say {', '.join(missing)}: {_ADVICE[missing[0]]}")
    assert address is not None
    assert count is not None
    assert index is not None
    return Launch(address, count, index, _own_gpus(environment, found))


_ADVICE = {
    "--coordinator_address": "give it as HOST:PORT of process 0, the same on every process",
    "--num_processes": "give the number of processes, the same on every process",
    "--process_id": "give each process its own number, from 0 on",
}


@dataclass(frozen=True)
class _Found:
    source: str
    address: str | None = None
    count: int | None = None
    index: int | None = None
    local_index: int | None = None
    local_count: int | None = None


def _find(environment: Mapping[str, str], attribute: Callable[[str], str | None] | None) -> _Found:
    for finder in (_from_jax_variables, _from_open_mpi, _from_slurm, _from_pmi):
        found = finder(environment)
        if found is not None:
            return found
    return _from_tpu(environment, attribute or (lambda name: None)) or _Found("the environment")


def _number(environment: Mapping[str, str], *names: str) -> int | None:
    """The first of some variables that is set, as a number."""
    for name in names:
        if value := environment.get(name):
            if not value.isdecimal():
                raise LaunchError(f"the variable {name} is {value!r}, which is no number")
            return int(value)
    return None


def _job_port(*words: str) -> int:
    return PORTS[zlib.crc32(" ".join(words).encode()) % len(PORTS)]


def _from_jax_variables(environment: Mapping[str, str]) -> _Found | None:
    """The user's own variables; they say what the flags say."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    if not any(environment.get(name) for name in names):
        return None
    address = environment.get(names[0]) or None
    if address is not None and ":" not in address:
        address = f"{address}:{PORT}"
    return _Found("the JAX_* environment", address, _number(environment, names[1]), _number(environment, names[2]))


def _from_slurm(environment: Mapping[str, str]) -> _Found | None:
    """A task of `srun`. The batch script itself is none, although it has a task number: it has no step."""
    count = _number(environment, "SLURM_STEP_NUM_TASKS")
    hosts = environment.get("SLURM_STEP_NODELIST")
    if count is None or hosts is None:
        return None
    port = _job_port(environment.get("SLURM_JOB_ID", ""), environment.get("SLURM_STEP_ID", ""))
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    local = re.match(r"\d+", tasks)  # (as in 4(x2),3; GPUs are divided only where all hosts are alike)
    return _Found(
        "Slurm",
        f"{first_host(hosts)}:{port}",
        count,
        _number(environment, "SLURM_PROCID"),
        _number(environment, "SLURM_LOCALID"),
        int(local[0]) if local else None,
    )


def first_host(hosts: str) -> str:
    """The first host of a Slurm list, as in `a[001-003,7],b2`."""
    prefix, bracket, rest = hosts.partition("[")
    if not bracket or "," in prefix:
        return hosts.partition(",")[0]
    inside, _, suffix = rest.partition("]")
    return prefix + re.split("[-,]", inside)[0] + suffix.partition(",")[0]


def _from_open_mpi(environment: Mapping[str, str]) -> _Found | None:
    """A rank of Open MPI's `mpirun`."""
    count = _number(environment, "OMPI_COMM_WORLD_SIZE")
    if count is None:
        return None
    names = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "OMPI_MCA_orte_hnp_uri")
    job = next((environment[name] for name in names if environment.get(name)), "")
    local = _number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE")
    index = _number(environment, "OMPI_COMM_WORLD_RANK")
    address = _mpi_address(environment, job, count, local)
    return _Found("Open MPI", address, count, index, _number(environment, "OMPI_COMM_WORLD_LOCAL_RANK"), local)


def _from_pmi(environment: Mapping[str, str]) -> _Found | None:
    """A rank of MPICH, Intel MPI or another launcher that speaks PMI."""
    count = _number(environment, "PMI_SIZE")
    if count is None:
        return None
    local = _number(environment, "MPI_LOCALNRANKS")
    address = _mpi_address(environment, environment.get("PMI_JOBID", ""), count, local)
    return _Found(
        "PMI", address, count, _number(environment, "PMI_RANK"), _number(environment, "MPI_LOCALRANKID"), local
    )


def _mpi_address(environment: Mapping[str, str], job: str, count: int, local: int | None) -> str | None:
    """Where rank 0 runs: here, if all ranks do; else the first host of the batch system's list, or of mpirun's own."""
    port = _job_port(job) if job else PORT
    if local == count:
        return f"localhost:{port}"
    if hosts := environment.get("SLURM_JOB_NODELIST"):
        return f"{first_host(hosts)}:{port}"
    nodes = environment.get("PBS_NODEFILE")
    if nodes and Path(nodes).is_file():
        return f"{Path(nodes).read_text().split()[0]}:{port}"
    launcher = re.search(r"tcp://([^,:]+)", environment.get("OMPI_MCA_orte_hnp_uri", ""))
    return f"{launcher[1]}:{port}" if launcher else None


def _from_tpu(environment: Mapping[str, str], attribute: Callable[[str], str | None]) -> _Found | None:
    """A host of a TPU slice, or of several slices; variables (Kubernetes) before the metadata server."""
    hosts = _tpu_hosts(environment, attribute)
    machine = dict(re.findall(r"^(\w+):\s*'?([^'\n]*)'?$", attribute("tpu-env") or "", re.MULTILINE))
    here = machine | dict(environment)
    slices, number = _number(here, "MEGASCALE_NUM_SLICES") or 1, _number(here, "MEGASCALE_SLICE_ID") or 0
    if len(hosts) * slices <= 1:
        return None
    worker = _number({"worker": environment.get("TPU_WORKER_ID") or attribute("agent-worker-number") or ""}, "worker")
    first = here.get("MEGASCALE_COORDINATOR_ADDRESS") or (hosts[0] if slices == 1 else None)
    address = f"{first.partition(':')[0]}:{PORT}" if first else None
    index = None if worker is None else number * len(hosts) + worker
    return _Found("the TPU pod", address, slices * len(hosts), index)


def _tpu_hosts(environment: Mapping[str, str], attribute: Callable[[str], str | None]) -> Sequence[str]:
    names = environment.get("TPU_WORKER_HOSTNAMES") or ""
    if not names:
        endpoints = (attribute("worker-network-endpoints") or "").split(",")
        names = ",".join(entry.split(":")[2] if entry.count(":") >= 2 else entry for entry in endpoints)
    return [name.strip() for name in names.split(",") if name.strip()]


def _own_gpus(environment: Mapping[str, str], found: _Found) -> tuple[int, ...] | None:
    """GPUs of a process that shares its host with others: an equal share of those that all of them see."""
    if found.local_index is None or (found.local_count or 1) < 2:
        return None
    assert found.local_count is not None
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return (found.local_index,)
    number = len([name for name in visible.split(",") if name])
    if number < found.local_count:  # the launcher has given each process its own
        return None
    share = number // found.local_count
    return tuple(range(found.local_index * share, (found.local_index + 1) * share))
