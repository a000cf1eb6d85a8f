"""Starting a run over several processes: which of them this one is, and JAX between them."""

import atexit
import ctypes
import dataclasses
import importlib.util
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.peers import Peers
from experiments.wire import PeerError

METADATA = "the metadata of a TPU's machine"


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """Which process of how many this is. Without flags: what Slurm, Open MPI, Kubernetes or the
    TPU's environment tell, or a process alone."""

    coordinator: str | None = None
    """HOST:PORT of process 0, the same in every process."""
    process_id: int | None = None
    """The number of this process, from 0."""
    num_processes: int | None = None
    """How many there are; 1, given alone, makes one of what the environment tells."""
    connect_timeout: int = 300
    """Seconds in which the processes must find each other."""
    stall_timeout: int = 600
    """Seconds without a sign of life, or without a step, after which a process is given up."""

    def __post_init__(self) -> None:
        for name in ("connect_timeout", "stall_timeout"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 second, not {getattr(self, name)}")
        if self.num_processes is not None and self.num_processes < 1:
            raise ValueError(f"num_processes must be at least 1, not {self.num_processes}")
        names = ("coordinator", "process_id", "num_processes")
        missing = [name for name in names if getattr(self, name) is None]
        if len(missing) == 3 or (self.num_processes == 1 and len(missing) == 2):
            return
        if missing:
            raise ValueError(f"{', '.join(names)} go together: {' and '.join(missing)} missing")
        host_and_port(self.coordinator)
        if not 0 <= self.process_id < self.num_processes:
            raise ValueError(
                f"process_id must be from 0 to {self.num_processes - 1}, below num_processes, "
                f"not {self.process_id}"
            )


class Place(NamedTuple):
    """Where this process stands in a cluster."""

    host: str
    port: int
    rank: int
    count: int
    local_devices: Sequence[int] | None = None
    """The devices of this machine that are this process's own; None: all."""


def host_and_port(address: str) -> tuple[str, int]:
    """`node1:1234` or `[::1]:1234` in two; ValueError where it is neither."""
    host, colon, port = address.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not bare or (bare == host and ":" in host):
        raise ValueError(f"coordinator must be HOST:PORT, not {address!r}")
    if not (port.isascii() and port.isdecimal() and 1 <= int(port) <= 65535):
        raise ValueError(f"coordinator must have a port from 1 to 65535, not {address!r}")
    return bare, int(port)


def environment_tells() -> str | None:
    """The cluster of more than one process that the environment shows, by its name."""
    tells = os.environ

    def many(name: str) -> bool:
        return tells.get(name, "").isdecimal() and int(tells[name]) > 1

    # A batch script has no step of its own, and is one process however many tasks it may start.
    if many("SLURM_NTASKS") and {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= tells.keys():
        return "Slurm"
    if many("OMPI_COMM_WORLD_SIZE") and "OMPI_MCA_orte_hnp_uri" in tells:
        return "Open MPI"
    hosts = tells.get("TPU_PROCESS_ADDRESSES") or tells.get("TPU_WORKER_HOSTNAMES", "")
    if "," in hosts or many("MEGASCALE_NUM_SLICES"):
        return "Cloud TPU"
    # Where no variable says it, the machine of a TPU has a server that knows.
    served = not hosts and "TPU_SKIP_MDS_QUERY" not in tells
    if served and importlib.util.find_spec("libtpu"):
        from jax._src import cloud_tpu_init

        if cloud_tpu_init.running_in_cloud_tpu_vm:
            return METADATA
    # JAX asks the Kubernetes API how many there are, through the package `kubernetes`.
    indexed = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= tells.keys()
    return "Kubernetes" if indexed else None


def _shares_its_machine() -> bool:
    """Whether other processes of the run are on this machine, as Slurm and Open MPI tell."""
    tells = os.environ
    told = tells.get("SLURM_STEP_TASKS_PER_NODE", tells.get("OMPI_COMM_WORLD_LOCAL_SIZE", ""))
    return any(int(tasks) > 1 for tasks in re.findall(r"(?:^|,)(\d+)", told))  # 2(x3),1


def place_of(config: ClusterConfig) -> Place | None:
    """Where this process stands; None where it is alone.

    Raises PeerError where the environment shows a cluster that JAX cannot make out.
    """
    if config.num_processes is not None:
        if config.num_processes == 1:
            return None
        address = host_and_port(config.coordinator)
        return Place(*address, config.process_id, config.num_processes)
    if (cluster := environment_tells()) is None:
        return None
    from jax._src.clusters import ClusterEnv

    try:
        told = ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None,
            config.connect_timeout,
        )  # fmt: skip
        if None in told[:3]:
            raise ValueError("it does not say which process this is")
        # JAX gives each task of Slurm and Open MPI one device, alone on its machine or not.
        devices = told[3] if _shares_its_machine() else None
        place = Place(*host_and_port(told[0]), told[2], told[1], devices)
    except Exception as error:  # whatever the cluster's own interface has to say
        if cluster == METADATA:  # not there in a notebook of somebody's, on one machine
            return None
        why = " ".join(str(error).split())
        raise PeerError(
            f"the environment tells of a cluster ({cluster}) that JAX cannot make out ({why}): "
            "give --coordinator, --process-id and --num-processes, or --num-processes 1"
        ) from None
    return place if place.count > 1 else None


def start(config: ClusterConfig) -> Peers:
    """Waits for the other processes, and starts JAX between them; before any computation.

    Our own meeting comes first: where it fails it says why, while JAX would abort the process.

    Raises PeerError where they do not find each other within `connect_timeout` seconds.
    """
    place = place_of(config)
    if place is None:
        return Peers()
    peers = Peers.connect(
        place.host, place.port, place.rank, place.count,
        config.connect_timeout, config.stall_timeout,
    )  # fmt: skip
    try:
        _start_jax(place, peers, config)
    except Exception as error:
        peers.fail(error)
        raise
    return peers


_kept: list[Any] = []


def _start_jax(place: Place, peers: Peers, config: ClusterConfig) -> None:
    """`jax.distributed.initialize`, so that it leaves to us when and how a process ends."""
    import jax
    from jax._src import distributed

    # Ours is the handler of SIGTERM, and the agreement on the step to stop at.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_check_proxy_envs", False)  # no need to warn: see _past_proxies
    port = peers.from_first(_free_port() if peers.is_first else None)
    near = port if peers.is_first else _lifeline(place.host, port, config.connect_timeout)
    _past_proxies()
    try:
        jax.distributed.initialize(
            f"127.0.0.1:{near}", place.count, place.rank, place.local_devices,
            cluster_detection_method="deactivate",
            coordinator_bind_address=f"[::]:{port}",
            # JAX aborts at this one too. A process that cannot come fails by itself before.
            initialization_timeout=2 * config.connect_timeout + 60,
            # And at this one. All that it could notice, the watchers notice before.
            heartbeat_timeout_seconds=4 * config.stall_timeout + 300,
            shutdown_timeout_seconds=5,
        )  # fmt: skip
    except RuntimeError as error:
        if "RPC server" not in str(error):
            raise
        raise PeerError(f"JAX's coordinator cannot listen at port {port}: try again") from None
    distributed.global_state.coordinator_address = f"{place.host}:{port}"
    _never_shut_down(distributed.global_state)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _lifeline(host: str, port: int, timeout: float) -> int:
    """The port on this machine through which JAX's coordinator is reached (see lifeline.py).

    Raises PeerError where the coordinator does not listen within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise PeerError(
                    f"JAX's coordinator could not be reached at {host}:{port} within {timeout:g} s "
                    f"({error.strerror or error}): check that all ports between the machines of "
                    "a run are open"
                ) from None
            time.sleep(0.1)
    program = Path(__file__).with_name("lifeline.py")
    # A number, not a file that Python would close: only the end of this process shall end it.
    reading, _ = os.pipe()
    line = subprocess.Popen(
        [sys.executable, "-I", "-S", str(program), host, str(port)],
        stdin=reading, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    os.close(reading)
    _kept.append(line)
    return int(line.stdout.readline())


def _past_proxies() -> None:
    """Keeps gRPC from going to this very machine through a proxy for the web."""
    name = "no_grpc_proxy" if "no_grpc_proxy" in os.environ else "no_proxy"
    os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1"]))


def _never_shut_down(state: Any) -> None:
    """Keeps JAX from waiting for the others when this process ends.

    Its shutdown is a barrier, and a process that comes alone aborts there with a C++ stack trace.
    Ours is `Peers.close`; what JAX has open, the system closes.
    """
    for held in (state.client, state.service):
        if held is not None:  # its destructor would shut down as well, so it gets none
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(held))

    def forget() -> None:
        state.client = state.service = None

    atexit.register(forget)  # JAX's own was registered before, and so comes after
