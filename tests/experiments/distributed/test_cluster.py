"""Which process of how many this is, and how several find each other."""

import contextlib
import faulthandler
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import pytest

from experiments.distributed import cluster
from experiments.distributed.cluster import ClusterConfig, start
from experiments.errors import UserError

ALL = {"local_device_ids": []}  # no device is singled out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"coordinator": "a:1"}, "process_id and num_processes missing"),
        ({"process_id": 1, "num_processes": 2}, "coordinator missing"),
        ({"coordinator": "host"}, "HOST:PORT"),
        ({"coordinator": ":12"}, "HOST:PORT"),
        ({"coordinator": "::1:12"}, "HOST:PORT"),
        ({"coordinator": "a:0"}, "port from 1 to 65535"),
        ({"coordinator": "a:65536"}, "port from 1 to 65535"),
        ({"coordinator": "a:b"}, "port from 1 to 65535"),
        ({"process_id": 2}, "process_id must be from 0 to 1"),
        ({"process_id": -1}, "process_id must be from 0 to 1"),
        ({"num_processes": 0}, "num_processes must be at least 1"),
        ({"connect_timeout": 0}, "connect_timeout must be at least 1 second"),
        ({"stall_timeout": -1}, "stall_timeout must be at least 1 second"),
        ({"heartbeat_timeout": 600}, "heartbeat_timeout=600 must be below stall_timeout=600"),
    ],
)
def test_bad_flags_are_named(flags, told):
    whole = {"coordinator": "a:1", "process_id": 0, "num_processes": 2}
    with pytest.raises(ValueError, match=told):
        ClusterConfig(**(flags if "missing" in told else whole | flags))


def test_flags_say_where_this_process_stands(monkeypatch):
    monkeypatch.setenv("no_proxy", "web.org")
    monkeypatch.delenv("no_grpc_proxy", raising=False)
    for address, host in (("[::1]:90", "::1"), ("node-1.a:90", "node-1.a")):
        monkeypatch.setenv("no_proxy", "web.org")
        told = cluster._where(ClusterConfig(address, 1, 2))
        assert told == ALL | {
            "coordinator_address": address,
            "process_id": 1,
            "num_processes": 2,
        }
        assert os.environ["no_proxy"] == f"web.org,{host}"
    assert cluster._where(ClusterConfig("a:90", 0, 1)) is None
    assert cluster._where(ClusterConfig()) is None


SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}  # fmt: skip
OMPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
}  # fmt: skip


@pytest.mark.parametrize(
    ("tells", "shared", "single"),
    [
        (SLURM, {"SLURM_STEP_TASKS_PER_NODE": "2,1"}, {"SLURM_NTASKS": "1"}),
        (OMPI, {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, {"OMPI_COMM_WORLD_SIZE": "1"}),
    ],
)
def test_a_process_alone_on_its_machine_has_all_devices_of_it(tells, shared, single, monkeypatch):
    """JAX would give it one; where it shares the machine, that is right."""
    for variable, value in tells.items():
        monkeypatch.setenv(variable, value)
    assert cluster._where(ClusterConfig()) == ALL
    assert cluster._where(ClusterConfig(num_processes=1)) is None
    with monkeypatch.context() as patch:
        for variable, value in shared.items():
            patch.setenv(variable, value)
        assert cluster._where(ClusterConfig()) == {"local_device_ids": None}
    for variable, value in single.items():
        monkeypatch.setenv(variable, value)
    assert cluster._where(ClusterConfig()) is None


def test_a_tpu_is_known_by_its_hosts_or_by_its_machine(monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "alone")
    assert cluster.environment_tells() is None
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    assert cluster.environment_tells() == "Cloud TPU"
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES")
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: name == "libtpu")
    assert cluster.environment_tells() is None  # JAX has seen that there is no TPU
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
    assert cluster.environment_tells() == cluster.TPU_MACHINE


def _raises(**where):
    raise RuntimeError("no\nserver")


def test_a_cluster_that_cannot_be_made_out_is_an_error_and_not_a_run_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(jax.distributed, "initialize", _raises)
    for variable, value in SLURM.items():
        monkeypatch.setenv(variable, value)
    told = r"a cluster \(Slurm\) that JAX cannot make out \(no server\): give --coordinator"
    with pytest.raises(UserError, match=told):
        start(ClusterConfig(), tmp_path)


def test_a_tpu_that_nobody_serves_is_one_machine(monkeypatch, tmp_path):
    """Such as that of a notebook of somebody's."""
    monkeypatch.setattr(jax.distributed, "initialize", _raises)
    monkeypatch.setattr(cluster, "environment_tells", lambda: cluster.TPU_MACHINE)
    assert start(ClusterConfig(), tmp_path).count == 1


def test_a_port_that_is_taken_is_named(tmp_path):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"process 0 cannot listen at port {port} .*in use"):
            start(ClusterConfig(f"localhost:{port}", 0, 2), tmp_path)


def test_flags_that_jax_cannot_start_with_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(jax.distributed, "initialize", _raises)
    with pytest.raises(UserError, match="JAX cannot start at node:9: no server"):
        start(ClusterConfig("node:9", 1, 2), tmp_path)


def test_a_process_alone_waits_for_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *_, **__: pytest.fail("armed"))
    processes = start(ClusterConfig(), tmp_path)
    assert processes.is_first and processes.count == 1
    assert processes.from_first({"a": (1, 2)}, slow=True) == {"a": [1, 2]}  # as JSON has it
    processes.check_equal("the run", {"a": 1})
    processes.watch()
    processes.unwatch()
    with pytest.raises(OSError, match="full"), processes.ending_together():
        raise OSError("full")
    assert not list(tmp_path.iterdir())


_PROGRAM = """
import sys, time
from pathlib import Path
from experiments.distributed.cluster import ClusterConfig, start
from experiments.errors import UserError
import jax, jax.numpy as jnp
rank, port, folder, timeout = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
flags = (f"127.0.0.1:{port}", rank, 2) if port != "0" else ()
processes = start(ClusterConfig(*flags, connect_timeout=timeout), folder)
with processes.ending_together():
"""


@contextlib.contextmanager
def pair(bodies, folder, port=None, timeout=30, env=({}, {})):
    """Processes of the bodies, killed at the end; a body of None is not started."""
    if port is None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    processes = []
    for i, (body, own) in enumerate(zip(bodies, env, strict=True)):
        if body is not None:
            program = _PROGRAM + textwrap.indent(textwrap.dedent(body), "    ")
            arguments = [str(i), str(port), str(folder), str(timeout)]
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", program, *arguments], text=True,
                    cwd=Path(__file__).parents[3], env=os.environ | own,
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                )
            )  # fmt: skip
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def ends(process):
    """(exit code, the last line of standard output, standard error)"""
    out, error = process.communicate(timeout=60)
    return process.returncode, (out.splitlines() or [""])[-1], error


@pytest.mark.slow
def test_what_process_0_says_arrives_however_late_and_all_leave_with_0(tmp_path):
    """Past a proxy for the web, and a word of an earlier sitting."""
    (tmp_path / ".arrived").write_text("earlier 9")
    body = """
    said = [processes.from_first(x * (1 + 5 * processes.is_first)) for x in ("é", [])]
    processes.is_first and time.sleep(3)
    said.append(processes.from_first({"first": processes.is_first}, slow=True))
    said.append(processes.from_first(jax.process_index(), slow=True))
    print(said, processes.count)
"""
    env = {"http_proxy": "http://127.0.0.1:9"}
    with pair([body, body], tmp_path, env=(env, env)) as both:
        for process in both:
            code, out, error = ends(process)
            assert (code, error) == (0, ""), error
            assert out == "['éééééé', [], {'first': True}, 0] 2"
    assert not (tmp_path / ".arrived").exists()


@pytest.mark.slow
def test_all_name_what_one_brings_otherwise(tmp_path):
    body = 'processes.check_equal("the run", {"a": {"b": jax.process_index()}, "c": "é"})'
    with pair([body, body], tmp_path) as both:
        for process in both:
            code, _, error = ends(process)
            told = "process 1 differs from process 0 in the run (process 0 -> it): a.b: 0 -> 1"
            assert (code, error) == (2, f"error: {told}\n")


@pytest.mark.slow
@pytest.mark.parametrize("tasks", ["1(x2)", "2"])
def test_under_slurm_a_process_has_eight_devices_unless_it_shares_them(tasks, tmp_path):
    """The devices of the CPU know nothing of it, so what JAX says of those of CUDA is looked at."""
    body = 'print(jax.local_device_count(), jax.config.values["jax_cuda_visible_devices"])'
    own = [
        SLURM
        | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_STEP_TASKS_PER_NODE": tasks}
        | {"JAX_NUM_CPU_DEVICES": "8", "SLURM_JOB_ID": str(os.getpid())}
        for i in (0, 1)
    ]
    with pair([body, body], tmp_path, port=0, env=own) as both:
        for number, process in enumerate(both):
            code, out, error = ends(process)
            assert code == 0, error
            assert out == f"8 {'all' if '(' in tasks else number}"


@pytest.mark.slow
@pytest.mark.parametrize(("there", "whom"), [(0, "the others"), (1, "process 0 and the others")])
def test_whoever_is_not_there_is_told_in_one_line(there, whom, tmp_path):
    bodies = [None, None]
    bodies[there] = "pass"
    with pair(bodies, tmp_path, timeout=2) as (process,):
        code, _, error = ends(process)
    assert code == 2
    assert error.startswith(f"error: waited 2 s (--connect-timeout) for {whom} at 127.0.0.1:")
    assert error.count("\n") == 1
