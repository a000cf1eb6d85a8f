"""Joins a run of several processes: finds this process's number and starts JAX's runtime."""

import dataclasses
import importlib.util
import os
import re
import socket
import threading
from pathlib import Path
from typing import Any

import jax

from experiments.distributed.processes import ProcessError, Processes

TPU_MACHINE = "the machine of a TPU"


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
    heartbeat_timeout: int = 60
    """Seconds without a sign of life after which a process is given up; below stall_timeout."""
    stall_timeout: int = 600
    """Seconds without a step after which a process prints where it stands, and ends."""

    def __post_init__(self) -> None:
        for name in ("connect_timeout", "heartbeat_timeout", "stall_timeout"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 second, not {getattr(self, name)}")
        if self.heartbeat_timeout >= self.stall_timeout:
            raise ValueError(
                f"heartbeat_timeout={self.heartbeat_timeout} must be below "
                f"stall_timeout={self.stall_timeout}"
            )
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


def host_and_port(address: str) -> tuple[str, int]:
    """Splits `node1:1234` or `[::1]:1234`; ValueError where the text has neither form."""
    host, colon, port = address.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not bare or (bare == host and ":" in host):
        raise ValueError(f"coordinator must be HOST:PORT, not {address!r}")
    if not (port.isascii() and port.isdecimal() and 1 <= int(port) <= 65535):
        raise ValueError(f"coordinator must have a port from 1 to 65535, not {address!r}")
    return bare, int(port)


def environment_tells() -> str | None:
    """The name of the cluster that the environment variables show, if it has several processes."""
    tells = os.environ

    def many(name: str) -> bool:
        return tells.get(name, "").isdecimal() and int(tells[name]) > 1

    # A Slurm batch script outside `srun` has no step, and is a single process.
    if many("SLURM_NTASKS") and {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= tells.keys():
        return "Slurm"
    if many("OMPI_COMM_WORLD_SIZE") and "OMPI_MCA_orte_hnp_uri" in tells:
        return "Open MPI"
    hosts = tells.get("TPU_PROCESS_ADDRESSES") or tells.get("TPU_WORKER_HOSTNAMES", "")
    if "," in hosts or many("MEGASCALE_NUM_SLICES"):
        return "Cloud TPU"
    # Without variables a TPU machine asks its metadata server. On other machines JAX has set the
    # variable that skips the query.
    served = not hosts and "TPU_SKIP_MDS_QUERY" not in tells
    if served and importlib.util.find_spec("libtpu"):
        return TPU_MACHINE
    # JAX gets the number of processes from the Kubernetes API, through the package `kubernetes`.
    indexed = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= tells.keys()
    return "Kubernetes" if indexed else None


def _shares_its_machine() -> bool:
    """Whether Slurm or Open MPI runs several of the processes on this machine."""
    tells = os.environ
    tasks_per_node = tells.get(
        "SLURM_STEP_TASKS_PER_NODE", tells.get("OMPI_COMM_WORLD_LOCAL_SIZE", "")
    )
    return any(int(tasks) > 1 for tasks in re.findall(r"(?:^|,)(\d+)", tasks_per_node))  # 2(x3),1


def _where(config: ClusterConfig) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`; None where there is a single process.

    Without flags JAX reads the environment. It would give each task of Slurm and Open MPI one
    device, even a task alone on its machine; an empty list gives it all devices.
    """
    if config.num_processes == 1:
        return None
    if config.num_processes is None:
        if environment_tells() is None:
            return None
        return {"local_device_ids": None if _shares_its_machine() else []}
    host, port = host_and_port(config.coordinator)
    if config.process_id == 0:
        _check_free(port)
    # The coordinator is never behind a web proxy; excluded, JAX need not warn about proxies.
    name = "no_grpc_proxy" if "no_grpc_proxy" in os.environ else "no_proxy"
    os.environ[name] = ",".join(filter(None, [os.environ.get(name), host]))
    jax.config.update("jax_check_proxy_envs", False)
    return {
        "coordinator_address": config.coordinator,
        "num_processes": config.num_processes,
        "process_id": config.process_id,
        "local_device_ids": [],
    }


def _check_free(port: int) -> None:
    """Raises ProcessError where `port` is taken: JAX's coordinator would crash silently."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise ProcessError(
            f"process 0 cannot listen at port {port} ({error.strerror}): name another with "
            "--coordinator, the same in every process"
        ) from None


def start(config: ClusterConfig, folder: Path) -> Processes:
    """Starts JAX's distributed runtime, once all processes are there; before any computation.

    folder: the run folder, which all processes see.

    Raises ProcessError where the environment shows a cluster that JAX does not understand. After
    the connect time-out the process exits with code 2 and one line, since JAX would abort with a
    C++ stack trace.
    """
    where = _where(config)
    if where is None:
        return Processes(folder)
    # `StopSignal` handles SIGTERM, and the processes agree on the step to stop at.
    jax.config.update("jax_enable_preemption_service", False)
    giving_up = threading.Timer(config.connect_timeout, _give_up, [config])
    giving_up.daemon = True
    giving_up.start()
    try:
        jax.distributed.initialize(
            **where,
            initialization_timeout=2 * config.connect_timeout + 60,  # `_give_up` comes first
            heartbeat_timeout_seconds=config.heartbeat_timeout,
            shutdown_timeout_seconds=config.stall_timeout,
        )
    except Exception as error:  # any error of the cluster's own interface
        why = " ".join(str(error).split())
        if config.coordinator is not None:
            raise ProcessError(f"JAX cannot start at {config.coordinator}: {why}") from None
        cluster = environment_tells()
        if cluster == TPU_MACHINE:  # no metadata server: one machine, a notebook
            return Processes(folder)
        raise ProcessError(
            f"the environment tells of a cluster ({cluster}) that JAX cannot make out ({why}): "
            "give --coordinator, --process-id and --num-processes, or --num-processes 1"
        ) from None
    finally:
        giving_up.cancel()
    return Processes(folder, config.stall_timeout)


def _give_up(config: ClusterConfig) -> None:
    place = f"at {config.coordinator} " if config.coordinator else ""
    missing = "the others" if config.process_id == 0 else "process 0 and the others"
    seconds = f"{config.connect_timeout} s (--connect-timeout)"
    line = (
        f"error: waited {seconds} for {missing} {place}in vain: "
        "check that each process was started, with the same coordinator and number of processes, "
        "and that its port is open\n"
    )
    os.write(2, line.encode())
    os._exit(2)
