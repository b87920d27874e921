"""Classification of images, or of windows of text by the character that follows."""

import jax
import numpy as np

from fedjax_qp.config import Config
from fedjax_qp.data import Dataset, Examples, hold_out, label_counts, match, own_counts
from fedjax_qp.engine import cut_client_tests, cut_test_set
from fedjax_qp.federated import Model
from fedjax_qp.models import classifier, models
from fedjax_qp.precision import in_precision
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.streams import Stream, generator
from fedjax_qp.tasks.task import Task


def classification_task(config: Config, dataset: Dataset, parts: list[np.ndarray]) -> Task:
    """The task of classifying labelled inputs; every client is judged by its mixture of the classes.

    With `partition.test` clients have tests of their own besides.
    """
    build = models[config.model.name](dataset.train.inputs.shape[1:], dataset.classes, **config.model.options)
    model = classifier(build, mean=dataset.mean, std=dataset.std, classes=dataset.classes)
    return prediction_task(config, dataset, dataset, parts, model)


def prediction_task(
    config: Config, dataset: Dataset, in_classes: Dataset, parts: list[np.ndarray], model: Model
) -> Task:
    """The task of predicting what belongs to an input, with a model that is given.

    Args:
      in_classes: the same examples with one class each, by which partitions and tests are counted.
    """
    parts, tests = _client_tests(config, in_classes, parts)
    counts = label_counts(parts, np.asarray(in_classes.train.labels), in_classes.classes)
    return Task(
        model=model._replace(evaluate=in_precision(model.evaluate, config.precision)),
        frozen=(),
        train=dataset.train,
        test=cut_test_set(dataset.test, config.evaluation.batch_size),
        personal=None
        if tests is None
        else cut_client_tests(tests, config.evaluation.batch_size, remedy=_smaller_tests(config)),
        parts=parts,
        sizes=[len(part) for part in parts],
        counts=counts,
        class_names=in_classes.class_names,
        shares=counts / counts.sum(1, keepdims=True),
        dataset=dataset,
        notes=(*dataset.notes, *_untested(tests)),
    )


def _client_tests(
    config: Config, dataset: Dataset, parts: list[np.ndarray]
) -> tuple[list[np.ndarray], list[Examples] | None]:
    """What each client is trained on, and what it is tested on, if on anything of its own; see `data.client_tests`."""
    kind, numbers = config.partition.options["test"], generator(config.seed, Stream.HELD_OUT)
    if kind == "common":
        return parts, None
    if kind == "own":
        source = dataset.train
        parts, tests = hold_out(parts, numbers, test=own_counts(parts, config.partition.options["test_share"]))
    else:
        source = dataset.test
        counts = label_counts(parts, np.asarray(dataset.train.labels), dataset.classes)
        tests = match(counts, np.asarray(source.labels), numbers)
    if not any(map(len, tests)):
        raise ConfigurationError(
            f"partition.test = {kind!r} leaves every client without tests: none of them trains on a class of the test set. "
            "Choose own, or common."
        )
    return parts, [jax.tree.map(lambda leaf, test=test: np.asarray(leaf)[test], source) for test in tests]


def _smaller_tests(config: Config) -> str:
    even, options = "a partition into more even clients", config.partition.options
    if options["test"] == "own":
        return f"lower partition.test_share = {options['test_share']:g}, or choose {even}, or partition.test = matched"
    return f"choose {even}, or partition.test = common"


def _untested(tests: list[Examples] | None) -> list[str]:
    clients = [client for client, examples in enumerate(tests or []) if not len(examples.labels)]
    if not clients:
        return []
    return [
        f"{len(clients)} clients have no tests of their own (the first is {clients[0]}): personal results leave them out"
    ]
