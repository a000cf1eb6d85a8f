"""I and S of docs/reliability.md: lines and files that mean no good."""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from killing import finish, write_words

from experiments.checkpoints import manifest
from experiments.checkpoints.checkpoint import CheckpointError, Checkpoints
from experiments.checkpoints.run_folder import RunFolder
from experiments.checkpoints.safetensors_io import import_params
from experiments.claims import ledger
from experiments.data import pronunciations
from experiments.errors import UserError
from experiments.inference.saved import load
from tfm.training import param_shapes

pytestmark = pytest.mark.usefixtures("compiled_once")
LINES = 100_000
NASTY = [
    b"", b"\r", b"\xef\xbb\xbfab", b"a\x00b", b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"a\rb",
    b"a\xe2\x80\xa8b", b"a\xc2\x85b", b"a\x0bb", b"a\x0cb", b"a\x1cb", b"\xf4\x90\x80\x80",
    b"'" * 50, "İ".encode(), "ﬃ".encode(), "e\u0301".encode(), b"\x1b[31mred", b"%s%n", b"-h",
    b"../../etc/passwd",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    finish(folder / "run", 20, write_words(folder))
    return folder / "run"


def fuzzed(rng: random.Random) -> bytes:
    """One line: mostly words, else something out of the list, random bytes, or very long."""
    kind = rng.random()
    if kind < 0.5:
        return "".join(rng.choices("abcdeABCDE", k=rng.randint(1, 13))).encode()
    if kind < 0.7:
        return rng.choice(NASTY)
    if kind < 0.9999:
        return rng.randbytes(rng.randint(0, 40)).replace(b"\n", b"")
    return rng.choice([b"a", b"\xff", b"\xe2\x80\xa8"]) * rng.choice(
        [4095, 4096, 350_000, 1_000_000]
    )


def predict(run: Path, lines: list[bytes], folder: Path) -> tuple[list[bytes], list[str], int]:
    """(output lines, error lines, most resident bytes) of the real command."""
    (folder / "in").write_bytes(b"".join(line + b"\n" for line in lines))
    command = [sys.executable, "-m", "experiments.run", "predict", "--run", str(run)]
    with (
        (folder / "in").open("rb") as source,
        (folder / "out").open("wb") as out,
        (folder / "err").open("wb") as err,
    ):
        process = subprocess.Popen(
            command, cwd=Path(__file__).parents[2], stdin=source, stdout=out, stderr=err
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    errors = (folder / "err").read_bytes().decode("utf-8", "backslashreplace")
    assert process.returncode == 0 and "Traceback" not in errors
    output = (folder / "out").read_bytes().split(b"\n")
    assert output.pop() == b""
    return output, errors.split("\n"), usage.ru_maxrss


@pytest.mark.slow
def test_fuzzed_lines_come_out_one_for_one_in_flat_memory(finished, tmp_path):
    rng = random.Random(0)
    lines = [fuzzed(rng) for _ in range(LINES)]
    first, _, memory_of_few = predict(finished, lines[: LINES // 10], tmp_path)
    output, errors, memory = predict(finished, lines, tmp_path)
    assert len(output) == LINES
    assert output[: LINES // 10] == first
    assert memory < 1.1 * memory_of_few
    refused = [e for e in errors if e.startswith("line ") and "no end within" not in e]
    told = {int(e.split(" ")[1].rstrip(":")) for e in refused}
    # The model may say nothing at all to a word, so an empty answer need not be an error.
    assert all(not output[number - 1] for number in told)
    letters = set(b"abcdeABCDE")
    words = [
        i for i, line in enumerate(lines, 1) if 0 < len(line) < 12 and letters.issuperset(line)
    ]
    assert len(words) > LINES // 3 and not told.intersection(words)
    nasty = [i for i, line in enumerate(lines, 1) if is_nasty(line)]
    assert told.issuperset(nasty) and len(nasty) > LINES // 4


def is_nasty(line: bytes) -> bool:
    """Longer than the model reads, or with what the model has no letter for."""
    try:
        stripped = line.decode().strip().lower()
    except UnicodeDecodeError:
        return True
    return len(stripped) >= 12 or not set("abcde").issuperset(stripped)


@pytest.mark.slow
def test_a_reader_that_leaves_ends_predict_quietly_and_a_deaf_log_costs_no_line(finished, tmp_path):
    (tmp_path / "in").write_bytes(b"ab\n?\n" * 30_000)
    command = f"{sys.executable} -m experiments.run predict --run {finished} < {tmp_path / 'in'}"

    def shell(line: str) -> subprocess.CompletedProcess:
        options = {"cwd": Path(__file__).parents[2], "shell": True, "executable": "/bin/bash"}
        return subprocess.run(f"set -o pipefail; {line}", capture_output=True, **options)

    cut = shell(f"{command} 2> {tmp_path / 'err'} | head -n 1")
    assert cut.returncode == 0 and cut.stdout.count(b"\n") == 1
    told = [e for e in (tmp_path / "err").read_bytes().splitlines() if b"no end within" not in e]
    assert all(line.endswith(b": '?': unknown character '?'") for line in told)
    deaf = shell(f"{command} 2>&1 > {tmp_path / 'out'} | head -n 1")
    assert deaf.returncode == 0 and deaf.stdout == b"line 2: '?': unknown character '?'\n"
    assert (tmp_path / "out").read_bytes().count(b"\n") == 60_000


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


READ_ALL = """
import sys
import jax
from experiments.inference.saved import load
from experiments.checkpoints.checkpoint import CheckpointError, Checkpoints
refused, run, *folders = 0, *sys.argv[1:]
like = load(run).params
for folder in folders:
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert checkpoints.newest() == (20, [])
        for read in (checkpoints.notes, lambda step: checkpoints.restore_params(step, like)):
            try:
                read(20)
            except CheckpointError:
                refused += 1
print(refused)
"""


@pytest.mark.slow
def test_no_file_of_a_run_is_unpickled(finished, tmp_path):
    """Every file of a run folder in turn is a pickle; then, what else the project reads."""
    canary = tmp_path / "canary"
    bait = pickle.dumps(Canary(canary))
    pickle.loads(bait)
    assert canary.exists()
    canary.unlink()
    names = [p.relative_to(finished) for p in sorted(finished.rglob("*")) if p.is_file()]
    assert {Path("config.json"), Path("checkpoints/journal.json")} < set(names) and len(names) > 15
    for number, name in enumerate(names):
        run = shutil.copytree(finished, tmp_path / str(number))
        (run / name).write_bytes(bait)
        try:
            load(run)(["ab"])
            RunFolder(run).lines()
            for other in ("results.json", "resumed_from.json"):
                RunFolder(run).read(other)
        except UserError as error:
            assert name.name in str(error)
        else:  # a damaged step has one before it, and the rest is not read
            assert name.suffix != ".json" or name.parts[0] in ("checkpoints", "best"), name
    model = load(finished)
    like = param_shapes(model.model.config)
    newest = finished / "checkpoints" / "20"
    for number, name in enumerate(p for p in sorted(newest.rglob("*")) if p.is_file()):
        # Behind a manifest that fits the bait, Orbax itself gets it to read.
        step = shutil.copytree(newest, tmp_path / f"fitting-{number}" / "20")
        facts = json.loads((step / manifest.NAME).read_text())["facts"]
        (step / name.relative_to(newest)).write_bytes(bait)
        (step / manifest.NAME).unlink()
        manifest.write_manifest(step, facts)
    # In a process of its own, since Orbax leaves half-done reads behind that complain at any time.
    folders = sorted(map(str, tmp_path.glob("fitting-*")))
    command = [sys.executable, "-c", READ_ALL, str(finished), *folders]
    read = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert read.returncode == 0 and int(read.stdout) >= 5  # it did read what it was given
    for extension in ("safetensors", "tsv", "txt", "dict", "json", "jsonl", "pkl", "npz", "npy"):
        file = tmp_path / f"bait.{extension}"
        file.write_bytes(bait)
        for read in (
            lambda file: import_params(file, like),
            pronunciations.read_lexicon, ledger.read_records,
        ):  # fmt: skip
            with pytest.raises(ValueError, match=str(file)):
                read(file)
    assert not canary.exists()


def test_a_ledger_s_figure_leads_nowhere_else(tmp_path):
    for name, figure in (
        ("scaling", "../../etc/passwd"), ("scaling", "/etc/passwd"), ("../x", "figures/../x.svg"),
    ):  # fmt: skip
        (tmp_path / "claims.json").write_text(json.dumps([{"id": name, "figure": figure}]))
        with pytest.raises(ledger.ClaimsError, match=r"claims.json: not a ledger of claims"):
            ledger.read_records(tmp_path / "claims.json")


def test_links_inside_a_run_folder_are_not_followed(tmp_path):
    (tmp_path / "elsewhere.json").write_text("{}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(UserError, match=r"run/config.json: a link, which is not followed"):
        RunFolder(tmp_path / "run").read("config.json")
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path)
    with (
        Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match=r"checkpoints: a link, which is not followed"),
    ):
        checkpoints.newest()
