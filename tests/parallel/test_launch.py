"""What a process finds out about its run from the variables of each launcher, and how processes meet."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from parallel.distributed import make_cpu_devices_exact
from parallel.launch import PORT, PORTS, Launch, LaunchError, find_launch, first_host
from parallel.links import Member, meet

SRUN = {
    "SLURM_JOB_ID": "4242", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "gpu[012-013],b7",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_PROCID": "11", "SLURM_LOCALID": "3",
}  # fmt: skip
MPIRUN = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip


def _found(environment: dict[str, str], **given: object) -> Launch:
    launch = find_launch(environment, **given)
    assert launch is not None
    return launch


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("node1", "node1"), ("a,b", "a"), ("n[001-016,20],m", "n001"), ("n[7,9]", "n7"), ("r[1-2]-ib", "r1-ib"),
     ("login,n[1-3]", "login")],
)  # fmt: skip
def test_first_host_of_a_slurm_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def test_slurm() -> None:
    """A task of srun is a process, with the GPU of its number where tasks share a host; the batch script is none."""
    launch = _found(SRUN)
    assert (launch.host, launch.count, launch.index) == ("gpu012", 16, 11)
    assert launch.port in PORTS
    assert launch.local_devices == (3,)
    assert _found(SRUN | {"CUDA_VISIBLE_DEVICES": "0"}).local_devices is None
    sixteen = ",".join(map(str, range(16)))
    assert _found(SRUN | {"CUDA_VISIBLE_DEVICES": sixteen}).local_devices == (6, 7)
    assert _found(SRUN | {"SLURM_STEP_TASKS_PER_NODE": "1(x16)", "SLURM_LOCALID": "0"}).local_devices is None
    assert _found(SRUN | {"SLURM_STEP_ID": "1"}).port != launch.port, "two steps of a job do not meet"
    batch = {"SLURM_JOB_ID": "4242", "SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "gpu[012-013]"}
    assert find_launch(batch) is None
    assert find_launch(SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None


def test_mpi(tmp_path: Path) -> None:
    """Ranks on one host meet there; on several, at the first host of the batch system or of mpirun, or where told."""
    with pytest.raises(LaunchError, match="Open MPI does not say --coordinator_address: give it as HOST:PORT"):
        find_launch(MPIRUN)
    assert _found(MPIRUN, address="a1:7000") == Launch("a1:7000", 4, 2, (0,))
    assert _found(MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}).address == f"localhost:{PORT}"
    (tmp_path / "nodes").write_text("c1\nc1\nc2\n")
    assert _found(MPIRUN | {"PBS_NODEFILE": str(tmp_path / "nodes")}).address == f"c1:{PORT}"
    orte = _found(MPIRUN | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"})
    assert orte.host == "10.96.0.1"
    pmi = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1"}
    assert _found(pmi) == Launch(f"localhost:{PORT}", 2, 1, (1,))


def test_tpu_pod() -> None:
    """Variables of Kubernetes, or the metadata of the machine; slices one after another; one host is no pod."""
    pod = {"TPU_WORKER_HOSTNAMES": "t0,t1,t2,t3", "TPU_WORKER_ID": "2"}
    assert _found(pod) == Launch(f"t0:{PORT}", 4, 2)
    slices = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "s0:8080"}
    assert _found(pod | slices) == Launch(f"s0:{PORT}", 8, 6)
    machine = {
        "worker-network-endpoints": "x:1:10.0.0.5,x:2:10.0.0.6", "agent-worker-number": "1",
        "tpu-env": "ACCELERATOR_TYPE: 'v5p-16'\nTYPE: 'V5P'\n",
    }  # fmt: skip
    assert _found({}, attribute=machine.get) == Launch(f"10.0.0.5:{PORT}", 2, 1)
    assert find_launch({"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    with pytest.raises(LaunchError, match="the TPU pod does not say --process_id"):
        find_launch({"TPU_WORKER_HOSTNAMES": "t0,t1"})


def test_plain_hosts() -> None:
    """Flags alone, variables alone, flags over anything else; whatever is missing is named."""
    variables = {"JAX_COORDINATOR_ADDRESS": "h0", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "1"}
    assert _found(variables) == Launch(f"h0:{PORT}", 3, 1)
    assert _found({}, address="h0", count=3, index=1) == Launch(f"h0:{PORT}", 3, 1)
    assert _found(SRUN, address="other:1234", index=0) == Launch("other:1234", 16, 0, (3,))
    assert find_launch(SRUN, count=1) is None
    assert find_launch({}) is None
    for given, words in (
        ({"address": "h0:1"}, "does not say --num_processes, --process_id"),
        ({"address": "h0:1", "count": 2}, "does not say --process_id: give each process its own number"),
        ({"count": 2, "index": 0}, "does not say --coordinator_address"),
        ({"address": "h0:1", "count": 2, "index": 2}, "process 2 of 2: processes are numbered from 0"),
        ({"address": "h0:http", "count": 2, "index": 0}, "'h0:http' must be host:port"),
    ):
        with pytest.raises(LaunchError, match=words):
            find_launch({}, **given)
    # Processes that each know their number and not how many they are must not train one by one in one folder.
    for there, missing in (
        (("JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID"), "--num_processes"),
        (("JAX_PROCESS_ID",), "--coordinator_address, --num_processes"),
        (("JAX_NUM_PROCESSES", "JAX_COORDINATOR_ADDRESS"), "--process_id"),
    ):
        with pytest.raises(LaunchError, match=rf"the JAX_\* environment does not say {missing}:"):
            find_launch({name: variables[name] for name in there})
    with pytest.raises(LaunchError, match="JAX_PROCESS_ID is 'one', which is no number"):
        find_launch(variables | {"JAX_PROCESS_ID": "one"})


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def _attempt(launch: Launch, seconds: float) -> object:
    """What `meet` gives or raises."""
    try:
        return meet(launch, Member(launch.index, "here", 100 + launch.index), float(seconds))
    except LaunchError as error:
        return error


def _say_hello_of_another_kind(port: int) -> None:
    for _ in range(100):
        try:
            with socket.create_connection(("localhost", port), timeout=5) as connection:
                connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
                return
        except ConnectionRefusedError:
            time.sleep(0.05)
    raise TimeoutError("process 0 did not listen")


def test_processes_meet() -> None:
    """Process 0 knows all, the others know it; a stranger on the port is turned away."""
    port = _free_port()
    first, *others = (Launch(f"localhost:{port}", 3, index) for index in range(3))
    with ThreadPoolExecutor(3) as pool:
        waiting = pool.submit(_attempt, first, 20)
        _say_hello_of_another_kind(port + 1)
        results = list(pool.map(lambda launch: _attempt(launch, 20), others))
        links, members = waiting.result()
    assert sorted(links) == [1, 2]
    assert members[2] == Member(2, "here", 102)
    assert results[0][1] == {0: members[0], 1: members[1]}
    for found in (links, *(found for found, _ in results)):
        for link in found.values():
            link.socket.close()


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ([(3, 0), (3, 1)], "after 1 s 2 of 3 processes are there; missing: 2"),
        ([(2, 1)], "process 0 does not answer at localhost:"),
        ([(3, 0), (3, 1), (3, 1)], r"process 1 \(host here, pid 101\) and process 1 .* have one number"),
        ([(3, 0), (2, 1)], r"process 1 \(host here, pid 101\) was told of 2 processes, process 0 of 3"),
    ],
)
def test_processes_that_do_not_fit_say_so(places: list[tuple[int, int]], words: str) -> None:
    address = f"localhost:{_free_port()}"
    with ThreadPoolExecutor(len(places)) as pool:
        results = list(pool.map(lambda place: _attempt(Launch(address, *place), 1), places))
    assert all(isinstance(result, LaunchError) for result in results), results
    with pytest.raises(LaunchError, match=words):
        raise results[0]


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ({}, None),
        ({"XLA_FLAGS": "--xla_dump_to=x"}, "--xla_dump_to=x"),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}, "--xla_force_host_platform_device_count=1"),
        (
            {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
            "--xla_force_host_platform_device_count=8 --xla_cpu_experimental_ynn_fusion_type=",
        ),
        ({"JAX_NUM_CPU_DEVICES": "2"}, "--xla_cpu_experimental_ynn_fusion_type="),
        (
            {"JAX_NUM_CPU_DEVICES": "2", "XLA_FLAGS": "--xla_cpu_experimental_ynn_fusion_type=3"},
            "--xla_cpu_experimental_ynn_fusion_type=3",
        ),
    ],
)
def test_several_cpu_devices_compute_without_ynn(given: dict[str, str], flags: str | None) -> None:
    """Its first products on several devices of a process may be wrong; one device keeps it, and so does who asks."""
    make_cpu_devices_exact(given)
    assert given.get("XLA_FLAGS") == flags
