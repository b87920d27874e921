"""How close do a client's local steps come to what the machine can do?

    python benchmarks/roofline.py                                        # all models
    python benchmarks/roofline.py --models resnet18 --batch 20 --keep    # keeps the other models' rows

Measures the rate of large float32 matrix products and the bandwidth of a sum of large arrays, and then one step (forward,
backward, SGD) of each model in a loop. A row holds

* work: the step's floating-point operations by definition, whatever form the layers take. For image models they are those
  XLA counts in the plain program (`lax` convolutions, no loops, not compiled). It counts the body of a loop once, so for
  the LSTM they are those of its products, and for LoRA see `AdaptedModel.training_flops`;
* executed: operations that XLA counts in the compiled program of one step: more than the work where a form multiplies
  with zeros, less where it saves multiplications. It does not see into loops, nor into a library's own kernels;
* bytes that the compiled program reads and writes, by the same count. What stays in a cache counts too, so the bound by
  bandwidth is pessimistic for small models;
* achieved over attainable: work per second over the smaller of the matrix rate and (work / bytes) · bandwidth; and over
  the matrix rate alone, the figure to compare.

Writes JSON rows, and a table beside them.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from lora_step import ALPHA, RANK, TARGETS, tokens_of
from measure import write_rows

from fedjax_qp.data.examples import Examples
from fedjax_qp.federated import Batch, Model, Params
from fedjax_qp.models import classifier, models
from fedjax_qp.models.language import gguf
from fedjax_qp.models.language.adapted import pretrained

CLASSES, LEARNING_RATE = 10, 0.01
LENGTH = 128  # tokens of a sequence
WINDOW, CHARACTERS = 80, 81  # of the plays of Shakespeare
SIZES = {"mlp": (28, 1), "lenet": (32, 3), "femnist_cnn": (28, 1), "simple_cnn": (32, 3), "resnet18": (32, 3)}


class Machine(NamedTuple):
    """What was measured of the device."""

    flops: float  # a second, in large float32 matrix products
    bandwidth: float  # bytes a second


class Subject(NamedTuple):
    """One step of one client."""

    step: Callable[[PyTree, PyTree], PyTree]  # (fixed, trainable) -> trainable
    fixed: PyTree
    trainable: PyTree
    work: float  # floating-point operations


def measure_machine(repeats: int = 5) -> Machine:
    """The best of several sizes and repeats."""
    rates = []
    for size in (512, 1024, 2048):
        matrix = jax.random.normal(jax.random.key(0), (size, size))
        seconds = best_seconds(jax.jit(jnp.matmul).lower(matrix, matrix).compile(), repeats, matrix, matrix)
        rates.append(2 * size**3 / seconds)
    array = jnp.ones(2**26)
    triad = jax.jit(lambda a, b: a + 2 * b).lower(array, array).compile()
    return Machine(max(rates), 3 * array.nbytes / best_seconds(triad, repeats, array, array))


def best_seconds(function: Callable, repeats: int, *arguments: Any) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def sgd(model: Model, params: Params) -> Callable[[PyTree, PyTree], PyTree]:
    """One step of plain SGD: (frozen and batch, trainable) -> trainable."""

    def step(fixed: tuple[PyTree, Batch], trainable: PyTree) -> PyTree:
        frozen, batch = fixed

        def loss(trainable: PyTree) -> jax.Array:
            return model.loss(frozen, params._replace(trainable=trainable), batch, jax.random.key(0))[0]

        return jax.tree.map(lambda leaf, slope: leaf - LEARNING_RATE * slope, trainable, jax.grad(loss)(trainable))

    return step


def image_model(name: str, batch: int) -> Subject:
    size, channels = SIZES[name]
    shape = (size, size, channels)
    random = np.random.default_rng(0)
    pixels = jnp.asarray(random.integers(0, 256, (batch, *shape)), jnp.uint8)
    labels = jnp.asarray(random.integers(0, CLASSES, batch), jnp.int32)
    fixed = ((), Batch(Examples(pixels, labels), jnp.ones(batch, bool)))

    def model(**options: str) -> Model:
        return classifier(models.build(name, shape, CLASSES, **options), classes=CLASSES)

    params = model().init(jax.random.key(0))
    plain = model() if name == "mlp" else model(convolution="lax")
    counted = jax.jit(sgd(plain, params)).lower(fixed, params.trainable).cost_analysis()
    assert isinstance(counted, dict)
    return Subject(sgd(model(), params), fixed, params.trainable, counted["flops"])


def character_lstm(batch: int) -> Subject:
    """Predicts every character of its windows."""
    build = models.build("char_lstm", (WINDOW,), CHARACTERS, predict="every")
    model = classifier(build, mean=None, std=None, classes=CHARACTERS)
    random = np.random.default_rng(0)
    codes = jnp.asarray(random.integers(0, CHARACTERS, (batch, WINDOW)), jnp.uint8)
    labels = jnp.asarray(random.integers(0, CHARACTERS, batch), jnp.int32)
    fixed = ((), Batch(Examples(codes, labels), jnp.ones(batch, bool)))
    params = model.init(jax.random.key(0))
    # Every position goes through all matrices but the embedding, which is looked up.
    matrices = [leaf.size for leaf in jax.tree.leaves(params.trainable) if leaf.ndim == 2]
    entries = sum(matrices) - params.trainable["embedding"].size
    return Subject(sgd(model, params), fixed, params.trainable, 6.0 * entries * batch * WINDOW)


def low_rank_adapters(batch: int) -> Subject:
    """SmolLM2-135M."""
    language = pretrained(1, path=str(gguf.smollm2()), rank=RANK, alpha=ALPHA, targets=TARGETS)
    params = language.model.init(jax.random.key(0))
    fixed = (jax.device_put(language.frozen), jax.tree.map(lambda leaf: leaf[0], tokens_of(language, 1, batch, LENGTH)))
    work = language.training_flops(LENGTH) * LENGTH * batch
    return Subject(sgd(language.model, params), fixed, params.trainable, work)


# Name: what makes it, examples of a batch.
SUBJECTS: dict[str, tuple[Callable[[int], Subject], int]] = {
    **{name: (lambda batch, name=name: image_model(name, batch), 50) for name in SIZES},
    "femnist_cnn": (lambda batch: image_model("femnist_cnn", batch), 20),
    "simple_cnn": (lambda batch: image_model("simple_cnn", batch), 10),
    "char_lstm": (character_lstm, 10),
    "smollm2-lora": (low_rank_adapters, 1),
}


def measure(name: str, batch: int, machine: Machine, *, seconds: float, repeats: int) -> dict[str, Any]:
    """Counts and times one model's step; a repeat takes about `seconds`."""
    subject = SUBJECTS[name][0](batch)
    once = jax.jit(subject.step).lower(subject.fixed, subject.trainable).compile()
    counted = once.cost_analysis()
    assert isinstance(counted, dict)

    @jax.jit
    def train(fixed: PyTree, trainable: PyTree, steps: int) -> PyTree:
        return jax.lax.fori_loop(0, steps, lambda _, trainable: subject.step(fixed, trainable), trainable)

    best_seconds(train, 1, subject.fixed, subject.trainable, 1)  # compiles
    one = best_seconds(train, 2, subject.fixed, subject.trainable, 1)
    steps = max(1, round(seconds / one))
    times = [best_seconds(train, 1, subject.fixed, subject.trainable, steps) / steps for _ in range(repeats)]
    rate, intensity = subject.work / median(times), subject.work / counted["bytes accessed"]
    return {
        "benchmark": "roofline",
        "model": name,
        "batch": batch,
        "seconds": {"median": median(times), "min": min(times), "max": max(times)},
        "work": subject.work,
        "executed": counted["flops"],
        "bytes": counted["bytes accessed"],
        "rate": rate,
        "of_matrix_rate": rate / machine.flops,
        "of_attainable": rate / min(machine.flops, intensity * machine.bandwidth),
        "machine": machine._asdict(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| model | batch | ms a step | GFLOP | of them executed | GFLOP/s | of the matrix rate | of the roofline |"
    ]
    lines.append("| :-- " + "| --: " * 7 + "|")
    for row in rows:
        cells = [
            f"{1e3 * row['seconds']['median']:.3g}",
            f"{row['work'] / 1e9:.3g}",
            f"{row['executed'] / row['work']:.0%}",
            f"{row['rate'] / 1e9:.3g}",
            f"{row['of_matrix_rate']:.0%}",
            f"{row['of_attainable']:.0%}",
        ]
        lines.append(f"| {row['model']} | {row['batch']} | " + " | ".join(cells) + " |")
    machine = Machine(**rows[-1]["machine"])
    rates = f"{machine.flops / 1e9:.3g} GFLOP/s in matrix products, {machine.bandwidth / 1e9:.3g} GB/s"
    return "\n".join([*lines, "", f"The machine: {rates}."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=[*SUBJECTS], default=[*SUBJECTS])
    parser.add_argument("--batch", type=int, help="examples (sequences) of a batch; default: the model's own")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--keep", action="store_true", help="keep the rows of models that are not measured now")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/roofline.jsonl"))
    arguments = parser.parse_args()
    rows = {}
    if arguments.keep and arguments.output.exists():
        rows = {row["model"]: row for row in map(json.loads, arguments.output.read_text().splitlines())}
    machine = measure_machine()
    for name in arguments.models:
        batch = arguments.batch or SUBJECTS[name][1]
        rows[name] = measure(name, batch, machine, seconds=arguments.seconds, repeats=arguments.repeats)
        print(table([rows[name]]), flush=True)
    ordered = [rows[name] for name in SUBJECTS if name in rows]
    write_rows(ordered, arguments.output)
    arguments.output.with_suffix(".md").write_text(table(ordered))


if __name__ == "__main__":
    main()
