"""What is restored is bitwise what was saved, whatever happened to the process, the buffers or the files meanwhile."""

import hashlib
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_qp.federated import FederatedState, Params
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs.checkpoint import Checkpoints


class Server(NamedTuple):
    params: Params
    optimizer: Any
    history: Any


def make_state(round: int, *, width: int = 3) -> FederatedState:
    """A state with every kind of leaf there is; all of them depend on the round."""
    key = jax.random.fold_in(jax.random.key(0), round)
    weights = {
        "convolution/kernel.0": jax.random.normal(key, (4, width)),
        "odd [name]'\" é": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-45, round], jnp.float32),
        "list": [jnp.arange(width, dtype=jnp.bfloat16) * round, jnp.float16(round)],
    }
    optimizer = optax.chain(optax.clip(1.0), optax.adam(1e-3)).init(weights)
    history = (jnp.zeros((0, 4)), jnp.zeros((5, 0), jnp.int32), jnp.array([True, round % 2 == 0]), jnp.uint32(round))
    memory = {"control": jnp.full((6, 2, width), round, jnp.float32), "seen": jnp.arange(6) + round, "none": ()}
    return FederatedState(jnp.int32(round), Server(Params(weights, ()), optimizer, history), memory)


def check_equal(actual: FederatedState | None, expected: FederatedState) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for found, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert isinstance(found, np.ndarray)
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert found.tobytes() == np.asarray(wanted).tobytes()


def fill(folder: Path, rounds: list[int], *, keep: int = 3) -> None:
    with Checkpoints(folder, keep=keep) as checkpoints:
        for round in rounds:
            checkpoints.save(make_state(round), accuracy=round / 100)


@pytest.fixture(scope="module")
def three_rounds(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    fill(folder, [1, 2, 3])
    return folder


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("abstract", [False, True], ids=["arrays", "shapes"])
def test_a_new_process_would_restore_the_state_bitwise(tmp_path, abstract):
    state = make_state(7)
    with Checkpoints(tmp_path / "new" / "folder", keep=1) as checkpoints:
        assert checkpoints.restore(state) is None
        assert checkpoints.restore_best(state) is None
        checkpoints.save(state, accuracy=None)
    like = jax.eval_shape(lambda: make_state(0)) if abstract else make_state(0)
    with Checkpoints(tmp_path / "new" / "folder", keep=1) as checkpoints:
        check_equal(checkpoints.restore(like), state)
        assert checkpoints.restore_best(like) is None


def test_a_sharded_state_is_restored_whole(tmp_path):
    sharding = jax.NamedSharding(jax.make_mesh((4,), ("clients",)), jax.P("clients"))
    rows = jax.device_put(jnp.arange(32.0).reshape(8, 4), sharding)
    state = FederatedState(jnp.int32(1), (), rows)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state, accuracy=None)
        like = FederatedState(state.round, (), jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=sharding))
        check_equal(checkpoints.restore(like), state)


def test_the_newest_and_the_best_are_kept(tmp_path):
    accuracies = {10: 0.2, 20: 0.9, 30: None, 40: 0.9, 50: float("nan"), 60: 0.3, 70: None}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for round, accuracy in accuracies.items():
            checkpoints.save(make_state(round), accuracy=accuracy)
        assert checkpoints.rounds() == [20, 60, 70]
        check_equal(checkpoints.restore(make_state(0)), make_state(70))
        check_equal(checkpoints.restore_best(make_state(0)), make_state(20))
    with Checkpoints(tmp_path, keep=1) as checkpoints:  # opened again, the accuracies of the past still count
        checkpoints.save(make_state(80), accuracy=0.95)
        assert checkpoints.rounds() == [80]
    assert [path.name for path in tmp_path.iterdir()] == ["80"]


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "flipped bit": lambda folder: flip_a_bit(largest_file(folder)),
    "truncated": lambda folder: os.truncate(largest_file(folder), 10),
    "zeroed": lambda folder: largest_file(folder).write_bytes(bytes(largest_file(folder).stat().st_size)),
    "file removed": lambda folder: largest_file(folder).unlink(),
    "no arrays": lambda folder: shutil.rmtree(folder / "state"),
    "facts changed": lambda folder: (folder / "facts.json").write_text('{"accuracy": 1.0, "empty": {}}'),
    "facts removed": lambda folder: (folder / "facts.json").unlink(),
    "digests garbled": lambda folder: (folder / "digests.json").write_bytes(b"\xff\xfe[1"),
    "digests of another form": lambda folder: (folder / "digests.json").write_text("[1]"),
    "digests of no file": lambda folder: (folder / "digests.json").write_text("{}"),
    "digests of one file": lambda folder: (folder / "digests.json").write_text(
        json.dumps({"facts.json": hashlib.blake2b((folder / "facts.json").read_bytes()).hexdigest()})
    ),
    "empty": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(three_rounds, tmp_path, capfd, damage):
    folder = copy_of(three_rounds, tmp_path)
    damage(folder / "3")
    with Checkpoints(folder, keep=3) as checkpoints:
        with pytest.warns(UserWarning, match=rf"round 3 in {folder / '3'} "):
            check_equal(checkpoints.restore(make_state(0)), make_state(2))
        with pytest.warns(UserWarning, match="round 3 "):
            check_equal(checkpoints.restore_best(make_state(0)), make_state(2))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("index", range(26))
def test_no_flipped_bit_goes_unnoticed(three_rounds, tmp_path, index):
    """Every file has its turn, at a place drawn from the index."""
    folder = copy_of(three_rounds, tmp_path)
    files = sorted(path for path in (folder / "3").rglob("*") if path.is_file())
    file = files[index % len(files)]
    data = bytearray(file.read_bytes())
    place = int(np.random.default_rng(index).integers(8 * len(data)))
    data[place // 8] ^= 1 << place % 8
    file.write_bytes(data)
    with Checkpoints(folder, keep=3) as checkpoints, pytest.warns(UserWarning, match="round 3 "):
        check_equal(checkpoints.restore(make_state(0)), make_state(2))


def test_a_run_that_fell_back_saves_the_damaged_rounds_again(three_rounds, tmp_path):
    folder = copy_of(three_rounds, tmp_path)
    largest_file(folder / "2").unlink()
    largest_file(folder / "3").unlink()
    with Checkpoints(folder, keep=3) as checkpoints, pytest.warns(UserWarning, match="round [23] ") as caught:
        check_equal(checkpoints.restore(make_state(0)), make_state(1))
    assert len(caught) == 2
    with Checkpoints(folder, keep=3) as checkpoints:
        checkpoints.save(make_state(2), accuracy=0.5)
        assert checkpoints.rounds() == [1, 2]
        checkpoints.save(make_state(3), accuracy=0.4)
        check_equal(checkpoints.restore(make_state(0)), make_state(3))


def test_intact_later_rounds_are_never_overwritten_by_earlier_ones(three_rounds, tmp_path):
    folder = copy_of(three_rounds, tmp_path)
    with Checkpoints(folder, keep=3) as checkpoints:
        with pytest.raises(ConfigurationError, match=r"later rounds \[3\]"):
            checkpoints.save(make_state(2), accuracy=0.5)
        checkpoints.save(make_state(3), accuracy=0.5)  # the same round is replaced
        assert checkpoints.rounds() == [1, 2, 3]


def test_nothing_readable_is_an_error_rather_than_a_fresh_start(three_rounds, tmp_path):
    folder = copy_of(three_rounds, tmp_path)
    for round in (1, 2, 3):
        (folder / f"{round}" / "digests.json").unlink()
    with Checkpoints(folder, keep=3) as checkpoints:
        for restore in (checkpoints.restore, checkpoints.restore_best):
            with pytest.warns(UserWarning), pytest.raises(ConfigurationError, match=r"damaged \(rounds \[1, 2, 3\]\)"):
                restore(make_state(0))


def test_a_state_of_another_form_is_refused_by_the_names_that_differ(three_rounds):
    state = make_state(0)
    wider, fewer = make_state(0, width=5), state._replace(clients={"seen": state.clients["seen"]})
    more = state._replace(server=state.server._replace(history=(*state.server.history, jnp.zeros(2))))
    other = state._replace(round=jnp.float32(0))
    with Checkpoints(three_rounds, keep=3) as checkpoints:
        for like, message in [
            (wider, r"kernel\.0'\] is float32\[4, 3\], not float32\[4, 5\]"),
            (fewer, r"1 places: \.clients\['control'\] is float32\[6, 2, 3\], not absent"),
            (more, r"1 places: \.server\.history\[4\] is absent, not float32\[2\]"),
            (other, r"1 places: \.round is int32\[\], not float32\[\]"),
        ]:
            with pytest.raises(ConfigurationError, match=message):
                checkpoints.restore(like)


def test_the_buffers_may_be_donated_as_soon_as_save_returns(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 1, tree), donate_argnums=0)
    big = {f"{index}": jnp.full((256, 256), index, jnp.float32) for index in range(16)}
    expected = FederatedState(jnp.int32(1), jax.tree.map(np.array, big), ())
    jax.block_until_ready(overwrite(jax.tree.map(jnp.array, big)))  # compiled before, so that it runs at once
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(FederatedState(jnp.int32(1), big, ()), accuracy=None)
        jax.block_until_ready(overwrite(big))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(big))
        check_equal(checkpoints.restore(expected), expected)


def test_numpy_states_may_be_changed_as_soon_as_save_returns(tmp_path):
    values = np.arange(1e5)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(FederatedState(np.int32(1), values, ()), accuracy=None)
        values[:] = -1
        state = FederatedState(np.zeros((), np.int32), values, ())
        np.testing.assert_array_equal(checkpoints.restore(state).server, np.arange(1e5))


# Children of one process, forked before JAX starts its threads, so that the imports are paid for once.
PROGRAM = """
import itertools, os, signal, sys, time
from pathlib import Path
import numpy as np
from fedjax_qp.runs.checkpoint import Checkpoints
from fedjax_qp.federated import FederatedState

def save_rounds(folder, rounds, after_save=lambda round: None):
    checkpoints = Checkpoints(folder, keep=2)
    for round in rounds:
        state = FederatedState(np.int32(round), {"weights": np.full((300, 100), round, np.float32)}, ())
        checkpoints.save(state, accuracy=round / 1000)
        after_save(round)

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
for kill in range(kills):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        save_rounds(folder / str(kill), itertools.count(1), lambda round: os.write(writer, b"."))
    for _ in range(4):
        os.read(reader, 1)
    time.sleep(0.009 * kill)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
save_rounds(folder / "not closed", [1, 2, 3])
"""


def small_state(round: int) -> FederatedState:
    return FederatedState(np.zeros((), np.int32) + round, {"weights": np.full((300, 100), round, np.float32)}, ())


def test_killed_and_careless_processes_leave_folders_to_resume_from(tmp_path):
    """Kills come at different moments of saving; the careless process exits with its last save under way."""
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    arguments = [sys.executable, "-W", "error", "-c", PROGRAM, str(tmp_path), "8"]
    process = subprocess.run(
        arguments, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=120
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    folders = list(tmp_path.iterdir())
    assert len(folders) == 9
    for folder in folders:
        with Checkpoints(folder, keep=2) as checkpoints:
            last = checkpoints.rounds()[-1]
            assert last >= 2
            check_equal(checkpoints.restore(small_state(0)), small_state(last))
            check_equal(checkpoints.restore_best(small_state(0)), small_state(last))
            checkpoints.save(small_state(last + 1), accuracy=0.5)
        assert {path.name for path in folder.iterdir()} == {f"{last}", f"{last + 1}"}, "leftovers of the killed process"


def test_a_folder_that_cannot_be_written_is_an_error_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigurationError, match=rf"written to {folder}: .* Choose a folder"):
            Checkpoints(folder, keep=2)
    with pytest.raises(ConfigurationError, match="keep = 0"):
        Checkpoints(tmp_path / "new", keep=0)


def test_a_save_that_fails_in_the_background_is_reported_by_the_next_call(tmp_path):
    checkpoints = Checkpoints(tmp_path / "folder", keep=2)
    (tmp_path / "folder" / "1.partial").write_text("in the way")
    checkpoints.save(make_state(1), accuracy=None)
    with pytest.raises(ConfigurationError, match=r"could not save a checkpoint in .*folder: .* Check that the folder"):
        checkpoints.close()


def test_a_disk_that_is_full_gives_one_line_and_keeps_what_was_saved(tmp_path, capfd, caplog):
    """Orbax's tracebacks stay out of the terminal."""
    fill(tmp_path, [1], keep=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    checkpoints = Checkpoints(tmp_path, keep=2)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # no file may grow beyond 100 bytes
        checkpoints.save(make_state(2), accuracy=None)
        with pytest.raises(
            ConfigurationError, match="could not save a checkpoint in .* space left, then resume"
        ) as error:
            checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "") and not caplog.records
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        check_equal(checkpoints.restore(make_state(0)), make_state(1))


def test_what_orbax_says_of_a_failure_is_kept_in_a_file(tmp_path, monkeypatch, capfd, caplog):
    def fail(*_, **__):
        logging.getLogger("absl").error("a long traceback")
        raise OSError("no space")

    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    checkpoints.save(make_state(1), accuracy=None)
    checkpoints.wait()
    assert not (tmp_path / "checkpoints.log").exists()
    monkeypatch.setattr(checkpoints._checkpointer, "save", fail)
    checkpoints.save(make_state(2), accuracy=None)
    with pytest.raises(ConfigurationError, match="no space"):
        checkpoints.close()
    assert "ERROR a long traceback" in (tmp_path / "checkpoints.log").read_text()
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_a_logger_that_was_disabled_stays_so(tmp_path, monkeypatch):
    logger = logging.getLogger("absl")
    monkeypatch.setattr(logger, "disabled", True)
    fill(tmp_path, [1, 2], keep=2)
    assert logger.disabled and not logger.filters


def test_a_run_that_goes_back_removes_what_came_later(three_rounds, tmp_path):
    folder = copy_of(three_rounds, tmp_path)
    with Checkpoints(folder, keep=3) as checkpoints:
        checkpoints.discard_after(1)
        assert checkpoints.rounds() == [1]
        check_equal(checkpoints.restore(make_state(0)), make_state(1))


def test_ordinary_use_is_silent_and_leaves_no_threads(tmp_path, capfd, caplog):
    before = set(threading.enumerate())
    with caplog.at_level("WARNING"):
        fill(tmp_path, [1, 2, 3], keep=2)
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            checkpoints.restore(make_state(0))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert set(threading.enumerate()) <= before
