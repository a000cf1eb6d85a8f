"""Several processes of one run: they meet, watch each other, and say who it was."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jax.errors import JaxRuntimeError
from peering import STALL

from experiments import cluster
from experiments.checkpoints.checkpoint import CheckpointError
from experiments.cluster import ClusterConfig
from experiments.errors import UserError, exit_code, may_pass
from experiments.peers import Peers

PROGRAM = Path(__file__).parents[1] / "peering.py"
GO_ON = "the same command goes on from the newest checkpoint"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def processes(*plans, port=None, ranks=None, count=None, env=None):
    """One process for each plan, killed at the end."""
    port = port or free_port()
    started = []
    try:
        for rank, plan in zip(ranks or range(len(plans)), plans, strict=True):
            arguments = [str(rank), str(count or len(plans)), str(port), plan]
            started.append(
                subprocess.Popen(
                    [sys.executable, str(PROGRAM), *arguments],
                    env=os.environ | (env or {}),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )  # fmt: skip
            )
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def ends(process, timeout=20):
    """(exit code, standard output, standard error) of a process that ends by itself."""
    out, error = process.communicate(timeout=timeout)
    return process.returncode, out, error


def here(*started):
    """Waits until each has come to its `stop_here()`, or printed that it has."""
    for process in started:
        line = process.stdout.readline()
        assert line == "here\n", line + process.stderr.read()


def name(rank, process):
    return f"process {rank} ({socket.gethostname()}, pid {process.pid})"


def died(rank, process):
    line = f"{name(rank, process)} died: its connection closed without a goodbye; {GO_ON}"
    return 75, "", f"error: {line}\n"


MEET = "peers.meet('config', {'d_model': 512, 'adam': {'beta': [0.9, 0.98]}}); peers.close()"


def test_processes_that_bring_the_same_meet_and_leave():
    shared = "print(peers.from_first({'rank': rank, 'pair': (1, 2)}), peers.rank, peers.count)"
    plan = f"{MEET.replace('peers.close()', shared)}; peers.close(); peers.close()"
    with processes(plan, plan, plan) as started:
        for rank, process in enumerate(started):
            assert ends(process) == (0, f"{{'rank': 0, 'pair': [1, 2]}} {rank} 3\n", "")


def test_every_process_names_the_one_that_brings_something_else_and_the_fields():
    other = MEET.replace("512", "256").replace("0.98", "0.99")
    # Each goes on to report its own error, as a training would: nobody is left to hear it.
    plans = [
        f"try:\n    {plan}\nexcept Exception as error:\n    peers.fail(error); raise"
        for plan in (MEET, MEET, other)
    ]
    with processes(*plans) as started:
        expected = (
            f"error: {name(2, started[2])} differs from process 0 in config (process 0 -> it): "
            "adam.beta: [0.9, 0.98] -> [0.9, 0.99]; d_model: 512 -> 256\n"
        )
        for process in started:
            assert ends(process) == (2, "", expected)


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        ("meet('data', 'ab12')", "data (process 0 -> it): 'cd34' -> 'ab12'"),
        ("meet('words', 1)", "what it does: it is at 'words', process 0 at 'data'"),
    ],
)
def test_a_meeting_also_tells_plain_values_and_occasions_apart(theirs, told):
    with processes("peers.meet('data', 'cd34')", f"peers.{theirs}") as started:
        line = f"error: {name(1, started[1])} differs from process 0 in {told}\n"
        for process in started:
            assert ends(process) == (2, "", line)


@pytest.mark.slow
def test_a_meeting_waits_for_a_process_that_is_slow():
    waits = f"peers.begin_watch(); {MEET}"
    slow = f"for step in range({(STALL + 3) * 5}):\n    peers.tick(step); time.sleep(0.2)\n{MEET}"
    with processes(waits, waits, f"peers.begin_watch()\n{slow}") as started:
        for process in started:
            assert ends(process) == (0, "", "")


def test_a_meeting_with_a_process_that_has_said_goodbye_ends():
    with processes("peers.close()", "time.sleep(1); peers.meet('config', 1)") as started:
        line = f"{name(0, started[0])} had nothing left to do when others waited to meet for config"
        assert ends(started[1]) == (2, "", f"error: {line}\n")
        assert ends(started[0]) == (0, "", "")


@pytest.mark.parametrize("killed", [0, 1, 2])
def test_all_others_name_a_process_that_is_killed(killed):
    with processes(*["stop_here()"] * 3) as started:
        here(*started)
        started[killed].kill()
        began = time.monotonic()
        for rank, process in enumerate(started):
            if rank != killed:
                assert ends(process) == died(killed, started[killed])
        assert time.monotonic() - began < 3


@pytest.mark.slow
def test_a_child_of_a_killed_process_does_not_keep_its_connection():
    forks = "if os.fork() == 0:\n    time.sleep(5); os._exit(0)\nstop_here()"
    with processes("stop_here()", forks) as started:
        here(*started)
        started[1].kill()
        began = time.monotonic()
        assert ends(started[0]) == died(1, started[1])
        assert time.monotonic() - began < 3
        # The child holds the pipes of its parent.
        started[1].stdout.close()
        started[1].stderr.close()
        started.pop().wait()


def test_an_exit_without_a_goodbye_counts_as_a_death():
    with processes("peers.meet('a'); time.sleep(60)", "peers.meet('a'); sys.exit(3)") as started:
        assert ends(started[0]) == died(1, started[1])


@pytest.mark.slow
@pytest.mark.parametrize("silent", [0, 1])
def test_all_others_name_a_process_that_is_silent(silent):
    with processes(*["stop_here()"] * 3) as started:
        here(*started)
        began = time.monotonic()
        started[silent].send_signal(signal.SIGSTOP)
        for rank, process in enumerate(started):
            if rank != silent:
                code, _, error = ends(process)
                told = rf"error: {re.escape(name(silent, started[silent]))} has not been heard of "
                assert code == 75 and re.fullmatch(rf"{told}for \d+ s; {GO_ON}\n", error), error
        assert STALL - 1 < time.monotonic() - began < STALL + 7


TICKS = """
peers.begin_watch()
for step in range({}):
    peers.tick(step + 1); time.sleep(0.05)
stop_here()
"""


@pytest.mark.slow
def test_the_process_with_the_fewest_ticks_is_the_one_that_stands():
    with processes(TICKS.format(11), TICKS.format(10), TICKS.format(11)) as started:
        here(*started)
        began = time.monotonic()
        for process in started:
            code, _, error = ends(process)
            told = f"error: {re.escape(name(1, started[1]))} has stood at step 10 for "
            assert code == 75 and re.fullmatch(rf"{told}\d+ s; {GO_ON}\n", error), error
        assert STALL < time.monotonic() - began < STALL + 6


@pytest.mark.slow
def test_processes_that_all_stand_at_one_step_say_so():
    with processes(*[TICKS.format(3)] * 2) as started:
        for process in started:
            code, _, error = ends(process)
            told = "error: all 2 processes have stood at step 3 for "
            assert code == 75 and re.fullmatch(rf"{told}\d+ s; {GO_ON}\n", error), error


@pytest.mark.slow
def test_standing_is_no_stall_outside_of_a_watched_section_nor_beside_one_who_is():
    watched = f"with peers.watching():\n    peers.tick(7); time.sleep({STALL + 3})\npeers.close()"
    with processes(f"time.sleep({STALL + 4}); peers.close()", watched) as started:
        for process in started:
            assert ends(process) == (0, "", "")


@pytest.mark.slow
@pytest.mark.parametrize("slow", [0, 1])
def test_who_waits_for_one_that_compiles_has_not_stood_when_that_is_done(slow):
    waits = f"with peers.watching():\n    peers.tick(1); time.sleep({STALL + 4})\npeers.close()"
    compiles = f"""
with peers.watching():
    with peers.unwatched():
        time.sleep({STALL + 3})
    peers.tick(1); peers.tick(2); time.sleep(1)
peers.close()
"""
    plans = [waits, waits]
    plans[slow] = compiles
    with processes(*plans) as started:
        for process in started:
            assert ends(process) == (0, "", "")


@pytest.mark.slow
def test_a_process_that_gets_on_is_watched_for_as_long_as_it_likes():
    steps = f"""
with peers.watching():
    for step in range({(STALL + 3) * 5}):
        peers.tick(step); time.sleep(0.2)
peers.close()
"""
    with processes(steps, steps) as started:
        for process in started:
            assert ends(process) == (0, "", "")


@pytest.mark.slow
def test_a_process_that_was_stopped_itself_accuses_nobody():
    patient = (
        "from experiments.peers import Peers\npeers = Peers.connect('127.0.0.1', port, 1, 2)\n"
    )
    steps = """
print("here", flush=True)
with peers.watching():
    for step in range(12):
        peers.tick(step)
        begun = time.process_time()
        while rank == 0 and time.process_time() < begun + 0.6:  # which stands still as it does
            pass
        time.sleep(0.6 * rank)
peers.close()
"""
    with processes(steps, patient + steps) as started:
        here(*started)
        time.sleep(1)  # a beat has told of the tick
        started[0].send_signal(signal.SIGSTOP)
        time.sleep(STALL + 3)
        started[0].send_signal(signal.SIGCONT)
        for process in started:
            assert ends(process) == (0, "", "")


@pytest.mark.parametrize(
    ("failing", "error", "told", "code"),
    [
        (0, "OSError('no\\nspace')", "no space", 1),
        (1, "OSError('no\\nspace')", "no space", 1),
        (0, "SystemExit(143)", "it was told to stop", 143),
    ],
)
def test_all_others_tell_the_error_that_a_process_ends_with(failing, error, told, code):
    plans = ["stop_here()"] * 3
    plans[failing] = f"peers.fail({error}); sys.exit(2)"
    with processes(*plans) as started:
        assert ends(started[failing]) == (2, "", "")
        failed = time.monotonic()
        for rank, process in enumerate(started):
            if rank != failing:
                line = f"error: {name(failing, started[failing])} ended: {told}\n"
                assert ends(process) == (code, "here\n", line)
        assert time.monotonic() - failed < 4


def test_the_code_of_an_error_says_whether_to_try_again():
    told = {
        UserError("no such file"): 2, CheckpointError("damaged"): 2, SystemExit(143): 143,
        SystemExit("why"): 1, KeyboardInterrupt(): 130, ZeroDivisionError(): 1,
        JaxRuntimeError("INTERNAL: connection reset"): 1,
    }  # fmt: skip
    assert [exit_code(error) for error in told] == list(told.values())
    passing = [error for error in told if may_pass(error)]
    assert [str(error) for error in passing] == ["INTERNAL: connection reset"]
    assert not may_pass(JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"))


@pytest.mark.slow
def test_an_error_that_a_death_explains_does_not_hide_the_death():
    fails = "peers.fail(OSError('no collective')); sys.exit(2)"
    reacts = f"time.sleep(1); print('here', flush=True); {fails}"
    with processes("stop_here()", reacts, "stop_here()") as started:
        here(started[0], started[2], started[1])
        time.sleep(0.3)  # process 0 hears of the error first
        started[2].kill()
        assert ends(started[0]) == died(2, started[2])
        assert ends(started[1]) == died(2, started[2])


@pytest.mark.slow
def test_an_early_leaver_who_says_goodbye_is_not_taken_for_dead():
    late = f"time.sleep({STALL + 1}); peers.close()"
    for plans in ([late, "peers.close()", "peers.close()"], ["peers.close()", late, late]):
        with processes(*plans) as started:
            for process in started:
                assert ends(process) == (0, "", "")


def test_a_process_alone_waits_for_nobody(monkeypatch):
    for tells in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(tells, raising=False)
    peers = cluster.start(ClusterConfig())
    assert (peers.rank, peers.count, peers.is_first) == (0, 1, True)
    assert isinstance(peers, Peers) and peers.from_first((1, 2)) == [1, 2]
    peers.meet("config", {})
    with peers.watching():
        peers.tick(1)
    peers.fail(UserError("nobody hears it"))
    peers.close()


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
    ],
)
def test_bad_flags_are_named(flags, told):
    whole = {"coordinator": "a:1", "process_id": 0, "num_processes": 2}
    with pytest.raises(ValueError, match=told):
        ClusterConfig(**(flags if "missing" in told else whole | flags))


def test_flags_say_where_this_process_stands():
    whole = {"process_id": 1, "num_processes": 2}
    assert cluster.place_of(ClusterConfig("[::1]:90", **whole)) == ("::1", 90, 1, 2, None)
    assert cluster.place_of(ClusterConfig("node-1.a:90", **whole)) == ("node-1.a", 90, 1, 2, None)
    assert cluster.place_of(ClusterConfig("a:90", 0, 1)) is None


SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[3-4]", "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}  # fmt: skip
OMPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip


def test_the_environment_of_a_cluster_says_where_this_process_stands(monkeypatch):
    for tells in (SLURM, OMPI):
        with monkeypatch.context() as patch:
            for variable, value in tells.items():
                patch.setenv(variable, value)
            place = cluster.place_of(ClusterConfig())
            if tells is SLURM:
                assert place == ("node3", 61447, 1, 2, None)  # all devices of its machine
                patch.setenv("SLURM_STEP_TASKS_PER_NODE", "2,1")
                assert cluster.place_of(ClusterConfig()).local_devices == [0]
            else:
                assert (place.host, place[2:]) == ("10.96.0.1", (3, 4, [1]))
            assert cluster.place_of(ClusterConfig(num_processes=1)) is None
            patch.setenv("SLURM_NTASKS", "1")
            patch.setenv("OMPI_COMM_WORLD_SIZE", "1")
            assert cluster.place_of(ClusterConfig()) is None
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "alone")
    assert cluster.environment_tells() is None
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    assert cluster.environment_tells() == "Cloud TPU"


def test_the_machine_of_a_tpu_is_asked_for_what_no_variable_says(monkeypatch):
    from jax._src import cloud_tpu_init
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: name == "libtpu")
    assert cluster.place_of(ClusterConfig()) is None
    for module in (cloud_tpu_init, cloud_tpu_cluster):
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
    told = {
        "agent-worker-number": "1",
        "tpu-env": "",
        "worker-network-endpoints": "10.0.0.8,10.0.0.9",
    }
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (told[key], 200))
    assert cluster.place_of(ClusterConfig()) == ("10.0.0.8", 8482, 1, 2, None)
    told["worker-network-endpoints"] = "10.0.0.8"
    assert cluster.place_of(ClusterConfig()) is None
    told.clear()
    assert cluster.place_of(ClusterConfig()) is None


def test_a_cluster_that_cannot_be_made_out_is_an_error_and_not_a_run_alone(monkeypatch):
    for variable, value in SLURM.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.delenv("SLURM_JOB_ID")
    with pytest.raises(UserError, match="tells of a cluster .Slurm. that JAX cannot make out"):
        cluster.place_of(ClusterConfig())


def test_a_coordinator_that_nobody_is_at_is_named():
    port = free_port()
    began = time.monotonic()
    with pytest.raises(UserError) as raised:
        Peers.connect("127.0.0.1", port, 1, 2, connect_timeout=1)
    assert 0.9 < time.monotonic() - began < 3
    told = str(raised.value)
    assert told.startswith(
        f"no process 0 could be reached at 127.0.0.1:{port} within 1 s (Connection refused): check"
    )


def test_process_0_says_how_long_it_has_waited_and_for_whom():
    port = free_port()
    with pytest.raises(UserError) as raised:
        Peers.connect("127.0.0.1", port, 0, 3, connect_timeout=1)
    assert f"waited 1 s at port {port} for 2 others, and 0 came; missing: 1, 2" in str(raised.value)
    with socket.create_server(("", port)), pytest.raises(UserError, match=f"at port {port}: Addr"):
        Peers.connect("127.0.0.1", port, 0, 3, connect_timeout=1)


def test_a_program_that_is_no_process_0_is_told_apart():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with subprocess.Popen(
            [sys.executable, str(PROGRAM), "1", "2", str(port), "0"],
            stderr=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n")
                assert ends(process)[2].startswith(f"error: 127.0.0.1:{port} answers, but not as")


def test_strangers_are_left_alone_and_wrong_numbers_refused():
    port = free_port()
    with processes(MEET, port=port, ranks=[0], count=2):
        deadline = time.monotonic() + 10
        while True:
            with contextlib.suppress(OSError):
                stranger = socket.create_connection(("127.0.0.1", port))
                break
            assert time.monotonic() < deadline
        with stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert stranger.recv(1) == b""
        with pytest.raises(UserError, match="it was told of 3 processes, and process 0 of 2"):
            Peers.connect("127.0.0.1", port, 1, 3, connect_timeout=5)
        with pytest.raises(UserError, match="there is no such number among 2 processes"):
            Peers.connect("127.0.0.1", port, 2, 2, connect_timeout=5)
        with processes(MEET, port=port, ranks=[1], count=2) as (second,):
            assert ends(second) == (0, "", "")


WITH_JAX = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from experiments.cluster import ClusterConfig, start
def heard(*_): print("heard", flush=True)
signal.signal(signal.SIGTERM, heard)
peers = start(ClusterConfig(f"127.0.0.1:{port}", rank, count, 30, 5))
mesh = Mesh(np.array(jax.devices()), "x")
shards = NamedSharding(mesh, PartitionSpec("x"))
ones = jax.make_array_from_callback((mesh.size,), shards, lambda index: np.ones(1))
total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))
assert total(ones) == jax.device_count() == peers.count * jax.local_device_count()
assert (jax.process_index(), jax.process_count()) == (peers.rank, peers.count) == (rank, 2)
print("here", flush=True)
"""


def here_with_jax(*started):
    """As `here`, after the line that Gloo prints on standard output."""
    for process in started:
        line = process.stdout.readline()
        assert line.startswith("[Gloo]"), line + process.stderr.read()
    here(*started)


@pytest.mark.slow
def test_jax_computes_over_two_processes_and_leaves_signals_to_python():
    plan = WITH_JAX + "signal.pause(); print(total(ones)); peers.close()"
    # A proxy for the web is nothing to go to this very machine through.
    with processes(plan, plan, env={"http_proxy": "http://127.0.0.1:9"}) as started:
        here_with_jax(*started)
        time.sleep(0.5)
        for process in started:
            process.send_signal(signal.SIGTERM)
        for process in started:
            assert ends(process, 60) == (0, "heard\n2.0\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("waits", ["", "in a collective"])
def test_no_abort_of_jax_hides_which_process_was_killed(killed, waits):
    sums = """
time.sleep(1)
try:
    total(ones)
except Exception as error:
    peers.fail(error); raise
"""
    plans = [WITH_JAX + (sums if waits else "") + "time.sleep(60)"] * 2
    plans[killed] = WITH_JAX + "time.sleep(60)"
    with processes(*plans) as started:
        here_with_jax(*started)
        time.sleep(1.5 if waits else 0)
        began = time.monotonic()
        started[killed].kill()
        assert ends(started[1 - killed]) == died(killed, started[killed])
        assert time.monotonic() - began < 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failing", "error", "code"),
    [(0, "OSError", 1), (1, "OSError", 1), (1, "jax.errors.JaxRuntimeError", 75)],
)
def test_a_process_with_an_error_of_its_own_ends_with_its_own_code(failing, error, code):
    """And the other with that one, or with 75 where the same command may succeed later."""
    plans = [WITH_JAX + "total(ones)"] * 2
    plans[failing] = WITH_JAX + f"peers.fail({error}('no space')); sys.exit(2)"
    with processes(*plans) as started:
        here_with_jax(*started)
        assert ends(started[failing]) == (2, "", "")
        line = f"error: {name(failing, started[failing])} ended: no space\n"
        assert ends(started[1 - failing]) == (code, "", line)


@pytest.mark.slow
@pytest.mark.parametrize("early", [0, 1])
def test_jax_lets_a_process_leave_before_the_other(early):
    plans = [WITH_JAX + "time.sleep(8); peers.close(); time.sleep(1)"] * 2
    plans[early] = WITH_JAX + "peers.close()"
    with processes(*plans) as started:
        for process in started:
            code, _, error = ends(process)
            assert (code, error) == (0, "")


@pytest.mark.slow
def test_a_crash_keeps_its_own_traceback_and_code():
    with processes(WITH_JAX + "1 / 0", WITH_JAX + "time.sleep(60)") as started:
        code, _, error = ends(started[0])
        assert code == 1 and error.endswith("ZeroDivisionError: division by zero\n")
        code, _, error = ends(started[1])
        assert (code, error) == (died(0, started[0])[0], died(0, started[0])[2])


@pytest.mark.slow
def test_the_real_start_names_a_coordinator_that_nobody_is_at():
    plan = WITH_JAX.replace("30, 5", "2, 5")
    with processes(plan, ranks=[1], count=2) as (process,):
        code, out, error = ends(process)
        assert (code, out) == (2, "") and error.count("\n") == 1
        assert error.startswith("error: no process 0 could be reached at 127.0.0.1:")
        assert "within 2 s" in error
    with processes(plan, ranks=[0], count=2) as (process,):
        code, out, error = ends(process)
        assert (code, out) == (2, "") and error.count("\n") == 1
        assert error.startswith("error: process 0 has waited 2 s at port ")
