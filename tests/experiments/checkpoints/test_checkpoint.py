"""Checkpoints: what is restored is what was saved, or it is said why not."""

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tfm
from experiments.checkpoints import manifest
from experiments.checkpoints.checkpoint import CheckpointError, Checkpoints, state_sha256
from tfm import TrainState

OPTIMIZER = optax.adam(1e-3)
NOTES = {"data": {"position": 17, "names": ["a", "ä"]}, "loss": 0.1, "best": None}


def some_state(seed):
    rng = np.random.default_rng(seed)
    params = {
        "embedding": jnp.asarray(rng.standard_normal((5, 4)), jnp.float32),
        "layer": {"w": jnp.asarray(rng.standard_normal((4, 4)), jnp.bfloat16)},
    }
    return TrainState(jnp.int32(seed), params, OPTIMIZER.init(params), jax.random.PRNGKey(seed))


def assert_same(actual, expected):
    def same(one, other):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)

    jax.tree.map(same, actual, expected)


def steps(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def save(folder, *numbers, keep=2):
    with Checkpoints(folder, keep) as checkpoints:
        checkpoints.newest()
        for step in numbers:
            checkpoints.save(step, some_state(step), NOTES)


def found(folder, **options):
    with Checkpoints(folder, **options) as checkpoints:
        return checkpoints.newest()


def restored(folder, step):
    with Checkpoints(folder, read_only=True) as checkpoints:
        return checkpoints.restore(step, some_state(0))


def contents(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_is_restored_is_what_was_saved_bit_for_bit(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest() == (None, [])
        checkpoints.save(3, some_state(3), NOTES)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest() == (3, [])
        like = jax.eval_shape(lambda: some_state(0))
        state, notes = checkpoints.restore(3, like), checkpoints.notes(3)
        params = checkpoints.restore_params(3, like.params)
    assert isinstance(state, TrainState)
    assert_same(state, some_state(3))
    assert_same(params, some_state(3).params)
    assert notes == NOTES


def test_a_manifest_written_while_its_step_is_looked_at_is_no_damage(tmp_path, monkeypatch):
    """The first save of a trainer, seen by another process between its rename and its manifest."""
    save(tmp_path, 1)
    (tmp_path / "journal.json").unlink()
    file = tmp_path / "1" / manifest.NAME
    content = file.read_bytes()
    file.unlink()

    def too_early(path, digest):
        file.write_bytes(content)
        raise FileNotFoundError(file)

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "verify_manifest", too_early)
        assert found(tmp_path, read_only=True) == (None, [])
    assert found(tmp_path, read_only=True) == (1, [])


def test_the_newest_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 10)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [3, 10]
    assert steps(tmp_path) == [3, 10]
    assert found(tmp_path) == (10, [])
    assert_same(restored(tmp_path, 3), some_state(3))


def test_a_saved_state_may_be_donated_at_once(tmp_path):
    state = some_state(1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        jax.tree.map(lambda x: x.delete(), state)
    assert_same(restored(tmp_path, 1), some_state(1))


def test_a_step_already_saved_is_left_alone(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, some_state(1), {"first": True})
        checkpoints.save(1, some_state(1), {"first": False})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.notes(1) == {"first": True}


def test_a_save_cut_short_while_orbax_writes_leaves_nothing(tmp_path):
    save(tmp_path, 1)
    torn = tmp_path / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "1", torn)
    shutil.rmtree(torn / "notes")
    assert found(tmp_path, read_only=True) == (1, []) and torn.exists()
    assert found(tmp_path) == (1, []) and not torn.exists()
    save(tmp_path, 2)
    assert steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("before", [(), (1,)])
def test_a_step_without_a_manifest_was_never_finished(tmp_path, before):
    save(tmp_path, *before, 2)
    (tmp_path / "2" / "manifest.json").unlink()
    saved = json.loads((tmp_path / "journal.json").read_text())["saved"]
    del saved["2"]
    (tmp_path / "journal.json").write_text(json.dumps({"saved": saved}))
    last = before[0] if before else None
    # Seen from outside it may just be under way.
    assert found(tmp_path, read_only=True) == (last, []) and steps(tmp_path) == [*before, 2]
    step, (line,) = found(tmp_path)
    assert step == last and f"{tmp_path / '2'}: its save was never finished" in line
    assert steps(tmp_path) == list(before) and (tmp_path / "2.unfinished").is_dir()
    save(tmp_path, 2)
    assert found(tmp_path) == (2, [])


def test_a_step_finished_but_not_yet_in_the_journal_is_sound(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "journal.json").unlink()
    assert found(tmp_path) == (2, [])
    save(tmp_path, 3)
    assert steps(tmp_path) == [2, 3] and found(tmp_path) == (3, [])


def test_several_unfinished_steps_and_no_other_are_refused(tmp_path):
    # A process that is cut off leaves one at most, so these were whole once.
    save(tmp_path, 1, 2)
    for name in ("1/manifest.json", "2/manifest.json", "journal.json"):
        (tmp_path / name).unlink()
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="no sound checkpoint is left"):
        found(tmp_path)
    assert contents(tmp_path) == before


def test_a_step_before_the_newest_is_refused(tmp_path):
    save(tmp_path, 5)
    with pytest.raises(CheckpointError, match="4: not saved: 5 is there"):
        save(tmp_path, 4)
    assert found(tmp_path) == (5, [])


def test_steps_set_aside_are_kept_under_another_name(tmp_path):
    save(tmp_path, 1, 2, 3, keep=3)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.newest()
        checkpoints.set_aside(1, "undone")
        assert (checkpoints.steps, checkpoints.last_saved, steps(tmp_path)) == ([1], None, [1])
        checkpoints.save(2, some_state(7), NOTES)
    assert_same(restored(tmp_path, 2), some_state(7))
    assert {p.name for p in tmp_path.glob("*.undone")} == {"2.undone", "3.undone"}


def test_an_unreadable_journal_costs_no_step(tmp_path):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, some_state(step), {})
        checkpoints.wait()
        (tmp_path / "journal.json").write_text("{")
        checkpoints.save(4, some_state(4), {})
    assert steps(tmp_path) == [1, 2, 3, 4] and found(tmp_path) == (4, [])


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def zero_page(path):
    content = path.read_bytes()
    path.write_bytes(bytes(min(len(content), 4096)) + content[4096:])


DAMAGES = {
    "one bit": lambda path: flip(path, len(path.read_bytes()) // 2),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: path.write_bytes(b""),
    "zeroed page": zero_page,
    "deleted": lambda path: path.unlink(),
    "a link": lambda path: (path.rename(path.with_suffix(".x")), path.symlink_to("/etc/passwd")),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_every_damage_to_every_file_is_noticed_and_the_step_before_serves(tmp_path, kind):
    """C6: each file of the newest step in turn, its manifest among them."""
    save(tmp_path / "sound", 1, 2)
    names = [p.relative_to(tmp_path / "sound") for p in contents(tmp_path / "sound" / "2")]
    assert len(names) > 8
    for number, name in enumerate(names):
        if (tmp_path / "sound" / name).stat().st_size == 0 and kind != "deleted":
            continue  # nothing in it to damage
        folder = shutil.copytree(tmp_path / "sound", tmp_path / str(number))
        DAMAGES[kind](folder / name)
        step, lines = found(folder)
        assert step == 1, name
        assert len(lines) == 1 and lines[0].startswith(f"{folder / '2'}: damaged"), lines
        if kind != "a link":
            assert name.name in lines[0]
        assert_same(restored(folder, 1), some_state(1))
        assert (folder / "2.damaged").is_dir()
        assert found(folder) == (1, [])


def test_an_emptied_or_deleted_step_that_was_saved_is_damaged(tmp_path):
    for name in ("emptied", "deleted"):
        save(tmp_path / name, 1, 2)
        shutil.rmtree(tmp_path / name / "2")
        if name == "emptied":
            (tmp_path / name / "2").mkdir()
        step, (line,) = found(tmp_path / name)
        assert step == 1 and "2: damaged, left out: manifest.json: missing" in line


def test_an_empty_folder_with_a_step_s_name_was_never_finished(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "2").mkdir()
    assert found(tmp_path)[0] == 1


def test_a_damaged_journal_is_named_and_the_manifests_serve(tmp_path):
    save(tmp_path, 1, 2)
    flip(tmp_path / "journal.json", 3)
    step, (line,) = found(tmp_path)
    assert step == 2 and f"{tmp_path / 'journal.json'}: damaged" in line


def test_of_several_damaged_steps_all_are_set_aside(tmp_path):
    save(tmp_path, 1, 2, 3, keep=3)
    for step in ("2", "3"):
        flip(tmp_path / step / "manifest.json", 20)
    step, lines = found(tmp_path, keep=3)
    assert step == 1 and len(lines) == 2
    assert {p.name for p in tmp_path.glob("*.damaged")} == {"2.damaged", "3.damaged"}


def test_what_cannot_be_read_just_now_is_not_damaged(tmp_path, monkeypatch):
    save(tmp_path, 1, 2)
    before = contents(tmp_path)

    def refuse(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "sha256", refuse)
        with pytest.raises(CheckpointError, match=r"2: Input/output error"):
            found(tmp_path)
    assert contents(tmp_path) == before and found(tmp_path) == (2, [])


def test_a_step_that_a_trainer_lets_go_while_it_is_looked_at_is_not_damaged(tmp_path, monkeypatch):
    save(tmp_path, 1)
    verify, looks = manifest.verify_manifest, []

    def look(path, expected):
        looks.append(path.name)
        if len(looks) == 1:
            save(tmp_path, 2, keep=1)
        return verify(path, expected)

    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        monkeypatch.setattr(manifest, "verify_manifest", look)
        assert checkpoints.newest() == (2, [])


@pytest.mark.parametrize("content", ["[" * 200_000, '{"saved": 3}', '{"saved": {"a": 1}}', "[]"])
def test_a_journal_of_another_form_is_named_and_the_manifests_serve(tmp_path, content):
    save(tmp_path, 1)
    (tmp_path / "journal.json").write_text(content)
    step, (line,) = found(tmp_path)
    assert step == 1 and f"{tmp_path / 'journal.json'}: damaged" in line


def test_a_linked_leftover_goes_and_what_it_leads_to_stays(tmp_path):
    save(tmp_path / "run", 1)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("kept")
    link = tmp_path / "run" / "2.orbax-checkpoint-tmp"
    link.symlink_to(tmp_path / "elsewhere")
    save(tmp_path / "run", 2)
    assert not link.is_symlink() and (tmp_path / "elsewhere" / "file").read_text() == "kept"
    assert found(tmp_path / "run") == (2, [])


def test_all_damaged_is_refused_and_nothing_is_touched(tmp_path):
    save(tmp_path, 1, 2)
    for step in ("1", "2"):
        flip(tmp_path / step / "manifest.json", 20)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"no sound checkpoint is left in .*2: .*1: "):
        found(tmp_path)
    assert contents(tmp_path) == before
    (tmp_path / "journal.json").write_text("{")
    shutil.rmtree(tmp_path / "1")
    shutil.rmtree(tmp_path / "2")
    with pytest.raises(CheckpointError, match=r"no sound checkpoint is left in .*journal.json"):
        found(tmp_path)


def test_names_in_a_manifest_lead_nowhere(tmp_path):
    save(tmp_path, 1, 2)
    file = tmp_path / "2" / "manifest.json"
    content = json.loads(file.read_text())
    content["files"] |= {"../../secret": [1, "0"], "/etc/passwd": [1, "0"]}
    file.write_text(json.dumps(content))
    (tmp_path / "journal.json").unlink()  # which would have told the manifest from another
    step, (line,) = found(tmp_path)
    assert step == 1 and "../../secret: missing (and 1 more)" in line


def test_a_linked_step_is_not_followed(tmp_path):
    save(tmp_path / "run", 1)
    save(tmp_path / "elsewhere", 2)
    (tmp_path / "run" / "2").symlink_to(tmp_path / "elsewhere" / "2")
    step, (line,) = found(tmp_path / "run")
    assert step == 1 and "2: a link, which is not followed" in line
    assert found(tmp_path / "elsewhere") == (2, [])


def other(state, **params):
    return state.replace(params=state.params | params)


OTHERS = {
    "params/embedding: float32[5,4] -> float32[5,8]": lambda s: other(
        s, embedding=jnp.ones((5, 8))
    ),
    "params/embedding: float32[5,4] -> bfloat16[5,4]": lambda s: other(
        s, embedding=jnp.ones((5, 4), jnp.bfloat16)
    ),
    "params/more: None -> float32[1]": lambda s: other(s, more=jnp.ones(1)),
    "params/layer/w: bfloat16[4,4] -> None": lambda s: s.replace(
        params={"embedding": s.params["embedding"]}
    ),
    "rest/opt_state/": lambda s: s.replace(opt_state=optax.sgd(0.1, 0.9).init(s.params)),
    "rest/key: uint32[2] -> uint32[4]": lambda s: s.replace(
        key=jax.random.key_data(jax.random.key(0, impl="rbg"))
    ),
}


@pytest.mark.parametrize("told", OTHERS)
def test_another_state_is_refused_by_name(tmp_path, told):
    """C7, as far as arrays tell."""
    save(tmp_path, 1)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError) as refused:
            checkpoints.restore(1, OTHERS[told](some_state(1)))
        assert told in str(refused.value) and str(tmp_path / "1") in str(refused.value)
        assert_same(checkpoints.restore(1, some_state(0)), some_state(1))


def test_other_random_bits_are_refused(tmp_path):
    save(tmp_path, 1)
    with (
        jax.threefry_partitionable(False),
        pytest.raises(CheckpointError, match="threefry_partitionable: True -> False"),
    ):
        restored(tmp_path, 1)


def test_damage_after_the_search_is_refused_too(tmp_path):
    save(tmp_path, 1)
    flip(tmp_path / "1" / "manifest.json", 20)
    with pytest.raises(CheckpointError, match="1: damaged: manifest.json"):
        restored(tmp_path, 1)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=f"{tmp_path}/file/checkpoints: Not a directory"):
        save(tmp_path / "file" / "checkpoints", 1)


FULL_DISK = """
    import resource, signal, sys
    import jax
    import jax.numpy as jnp
    from experiments.checkpoints.checkpoint import CheckpointError, Checkpoints
    from tfm.training import TrainState

    def state(step):
        key = jax.random.PRNGKey(step)
        return TrainState(jnp.int32(step), {"w": jax.random.normal(key, (512, 512))}, (), key)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(sys.argv[1]) as checkpoints:
        checkpoints.save(1, state(1), {})
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            checkpoints.save(2, state(2), {})
            checkpoints.wait()
        except CheckpointError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        print(checkpoints.last_saved)
        checkpoints.save(3, state(3), {})
        checkpoints.wait()
        print(checkpoints.last_saved)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        checkpoints.save(4, state(4), {})
"""


def python(code, *arguments):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_full_disk_is_told_in_one_line_and_the_next_save_works(tmp_path):
    """C5, with a limit on the size of a file in the place of a full disk."""
    finished = python(FULL_DISK, tmp_path)
    line, last, end = finished.stdout.splitlines()
    assert line == f"{tmp_path}/2: not saved: File too large"
    assert (last, end) == ("1", "3")
    # The last save failed as well, and nobody waited for it: leaving raises.
    assert finished.returncode == 1
    assert f"CheckpointError: {tmp_path}/4: not saved: File too large" in finished.stderr
    assert found(tmp_path) == (3, []) and steps(tmp_path) == [1, 3]


LEAVING = """
    import sys
    from tests.experiments.checkpoints.test_checkpoint import NOTES, Checkpoints, some_state

    def run():
        with Checkpoints(sys.argv[1]) as checkpoints:
            checkpoints.save(7, some_state(7), NOTES)
            {leave}
    run()
"""


@pytest.mark.parametrize(
    ("leave", "code"), [("return", 0), ("raise RuntimeError", 1), ("sys.exit(5)", 5)]
)
def test_leaving_right_after_save_commits_it(tmp_path, leave, code):
    """C4."""
    assert python(LEAVING.format(leave=leave), tmp_path).returncode == code
    assert found(tmp_path) == (7, [])
    assert_same(restored(tmp_path, 7), some_state(7))


def test_the_hash_of_a_state_tells_every_part_of_it():
    state = some_state(1)
    changed = {
        "params": other(state, embedding=state.params["embedding"].at[0, 0].add(1e-6)),
        "dtype": other(state, embedding=state.params["embedding"].astype(jnp.float16)),
        "shape": other(state, embedding=state.params["embedding"].reshape(4, 5)),
        "key": state.replace(key=jax.random.PRNGKey(2)),
        "step": state.replace(step=jnp.int32(2)),
        "moments": state.replace(opt_state=jax.tree.map(lambda x: x + 1, state.opt_state)),
    }
    hashes = [state_sha256(state, {"next": 1}), state_sha256(state, {"next": 2})]
    hashes += [state_sha256(changed_state, {"next": 1}) for changed_state in changed.values()]
    assert len(set(hashes)) == len(hashes) == 8
    for key in (1, 2):  # typed keys, with which training goes on as with raw ones
        typed, raw = (state.replace(key=make(key)) for make in (jax.random.key, jax.random.PRNGKey))
        assert state_sha256(typed, {"next": 1}) == state_sha256(raw, {"next": 1})
    assert state_sha256(jax.device_get(some_state(1)), {"next": 1}) == hashes[0]


def test_the_average_of_trees_is_the_mean_of_each_leaf():
    trees = [some_state(seed).params for seed in range(3)]
    mean = tfm.average(trees)
    for name, leaf in {"embedding": mean["embedding"], "w": mean["layer"]["w"]}.items():
        leaves = [t[name] if name in t else t["layer"][name] for t in trees]
        expected = np.mean([np.asarray(x, np.float64) for x in leaves], axis=0)
        assert leaf.dtype == leaves[0].dtype
        error = 1e-6 if leaf.dtype == jnp.float32 else 1e-2
        np.testing.assert_allclose(np.asarray(leaf, np.float64), expected, atol=error)


def test_the_average_of_nothing_or_of_unlike_trees_is_refused():
    with pytest.raises(ValueError, match="no average"):
        tfm.average([])
    with pytest.raises(AssertionError):
        tfm.average([{"w": jnp.zeros(2)}, {"w": jnp.zeros(3)}])
