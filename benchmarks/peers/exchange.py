"""What every peer reads and how it answers. Needs numpy alone, so that it runs in every environment.

A workload is a folder: `settings.json`; `data.npz` (images, labels, the clients' parts); `plan.npz` (per round the cohort,
per client its batches); `initial.npz` (the first model, named and shaped as PyTorch names and shapes it). All sides train
the same clients on the same examples in the same batches and from the same model, so that their losses must agree.

A side is a process. It says when it is ready (a JSON line with facts about itself), runs the same block of rounds from the
first model at every command `block`, and says how long that took and what the losses were.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PADDING = -1  # in a batch: no example


class Work(NamedTuple):
    """What one client does in one round."""

    client: int
    size: int  # training examples of the client, its weight in the average
    batches: list[np.ndarray]  # indices into the training images; the last may be short


class Workload(NamedTuple):
    """A folder as it was read."""

    settings: dict[str, Any]
    images: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # int64 [N]
    parts: list[np.ndarray]  # per client the indices of its examples
    rounds: list[list[Work]]
    initial: dict[str, np.ndarray]


class Block(NamedTuple):
    """What a side found for one block of rounds."""

    losses: list[float]  # per round, the mean over clients of the mean over their batches
    distance: float  # norm of the difference between the last model and the first, trainable arrays alone
    seconds: float | None = None  # of the rounds, where a command does more than them (see `with_flower`)


def ragged(arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Arrays of different lengths as one flat array and where each begins and ends."""
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])])
    return np.concatenate(arrays), offsets


def apart(flat: np.ndarray, offsets: np.ndarray) -> list[np.ndarray]:
    """The inverse of `ragged`."""
    return [flat[begin:end] for begin, end in zip(offsets[:-1], offsets[1:], strict=True)]


def distance(now: dict[str, np.ndarray], first: dict[str, np.ndarray]) -> float:
    """Norm of the difference of two models, over the arrays of `now`."""
    return float(np.sqrt(sum(float(((value - first[name]) ** 2).sum()) for name, value in now.items())))


def write(folder: Path, workload: Workload, batch_size: int) -> None:
    """Writes a workload's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(workload.settings, indent=1))
    parts, part_offsets = ragged(workload.parts)
    np.savez(
        folder / "data.npz", images=workload.images, labels=workload.labels, parts=parts, part_offsets=part_offsets
    )
    works = [work for cohort in workload.rounds for work in cohort]
    padded = [np.stack([_padded(batch, batch_size) for batch in work.batches]) for work in works]
    batches, batch_offsets = ragged(padded)
    np.savez(
        folder / "plan.npz",
        clients=np.array([[work.client for work in cohort] for cohort in workload.rounds]),
        sizes=np.array([[work.size for work in cohort] for cohort in workload.rounds]),
        batches=batches,
        batch_offsets=batch_offsets,
    )
    np.savez(folder / "initial.npz", allow_pickle=False, **workload.initial)


def read(folder: Path) -> Workload:
    """Reads what `write` wrote."""
    data, plan, initial = (np.load(folder / f"{name}.npz") for name in ("data", "plan", "initial"))
    per_client = [
        [batch[batch != PADDING] for batch in batches] for batches in apart(plan["batches"], plan["batch_offsets"])
    ]
    cohort, cohorts = plan["clients"].shape[1], plan["clients"]
    rounds = [
        [
            Work(int(client), int(size), per_client[number * cohort + slot])
            for slot, (client, size) in enumerate(zip(clients, sizes, strict=True))
        ]
        for number, (clients, sizes) in enumerate(zip(cohorts, plan["sizes"], strict=True))
    ]
    return Workload(
        json.loads((folder / "settings.json").read_text()),
        data["images"],
        data["labels"].astype(np.int64),
        apart(data["parts"], data["part_offsets"]),
        rounds,
        {name: initial[name] for name in initial.files},
    )


def _padded(batch: np.ndarray, size: int) -> np.ndarray:
    return np.pad(batch, (0, size - len(batch)), constant_values=PADDING)


# A side makes, from the workload, a function that trains one block and the facts it wants to report of itself.
Prepare = Callable[[Workload], tuple[Callable[[], Block], dict[str, Any]]]


def serve(prepare: Prepare, folder: Path | None = None) -> None:
    """Answers commands until the input ends.

    The folder is the first argument of the command line. Times are those of a whole block: whatever a side does for a
    round (choosing batches, copying models, averaging, bookkeeping) counts; what happens before `ready` does not, nor
    does the first block, in which programs are compiled and workers started.
    """
    answers = _private_output()
    started = time.perf_counter()
    workload = read(Path(sys.argv[1]) if folder is None else folder)
    read_seconds = time.perf_counter() - started
    run_block, facts = prepare(workload)
    run_block()
    total = time.perf_counter() - started
    _answer(answers, {"read_seconds": read_seconds, "startup_seconds": total, **facts})
    for command in sys.stdin:
        if command.strip() != "block":
            break
        started = time.perf_counter()
        block = run_block()
        around = time.perf_counter() - started
        _answer(answers, block._replace(seconds=around if block.seconds is None else block.seconds)._asdict())


def _private_output() -> int:
    """Keeps the pipe to the driver for answers; whatever libraries print goes to the error stream."""
    private = os.dup(1)
    os.dup2(2, 1)
    return private


def _answer(output: int, values: dict[str, Any]) -> None:
    os.write(output, (json.dumps(values) + "\n").encode())
