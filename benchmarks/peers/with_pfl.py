"""pfl (pfl-research): its algorithm, backend, model and local training, on the workload's cohorts and batches.

One process and PyTorch's own threads, as its documentation runs it on one machine. Images are normalised tensors in memory.
A user's data set hands out the batches of the workload instead of cutting them itself; evaluation on users is off. pfl
averages parameters only: with batch norm the running statistics, which training does not read, stay the last user's.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from exchange import Block, Work, Workload, serve
from networks import first_network, moved, normalised
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.model.pytorch import PyTorchModel
from pfl.version import __version__
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Planned(Dataset):
    """One user in one round; every call of `iter` is an epoch."""

    def __init__(self, images: Tensor, labels: Tensor, work: Work, epochs: int):
        super().__init__((images, labels), user_id=str(work.client))
        self.images, self.labels, self.work = images, labels, work
        self.per_epoch, self.epoch = -(-len(work.batches) // epochs), 0

    def __len__(self) -> int:
        return self.work.size

    def iter(self, batch_size: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        begin = self.epoch * self.per_epoch
        self.epoch += 1
        for batch in self.work.batches[begin : begin + self.per_epoch]:
            indices = torch.from_numpy(batch)
            yield self.images[indices], self.labels[indices]


class WithLoss(nn.Module):
    """A network as pfl wants it; remembers the losses that it was trained with."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.found = network, []

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        value = cross_entropy(self.network(images), labels)
        self.found.append(value.detach().clone())  # pfl scales the loss in place
        return value

    def metrics(self, images: Tensor, labels: Tensor) -> dict:
        raise AssertionError("nothing is evaluated")


class TrainingOnly(FederatedAveraging):
    """Federated averaging that evaluates no user, not even in the first round."""

    def get_next_central_contexts(self, *arguments: Any, **options: Any) -> tuple:
        contexts, model, metrics = super().get_next_central_contexts(*arguments, **options)
        if contexts is not None:
            for context in contexts:
                object.__setattr__(context, "do_evaluation", False)
        return contexts, model, metrics


def prepare(workload: Workload) -> tuple[Callable[[], Block], dict[str, Any]]:
    settings = workload.settings
    torch.set_num_threads(settings["threads"])
    images, labels = normalised(workload.images), torch.from_numpy(workload.labels)
    epochs = settings["config"]["local"]["epochs"]
    works = [work for cohort in workload.rounds for work in cohort]
    cohort = len(workload.rounds[0])
    numbers = NNAlgorithmParams(
        central_num_iterations=len(workload.rounds),
        evaluation_frequency=1,
        train_cohort_size=cohort,
        val_cohort_size=None,
    )
    training = NNTrainHyperParams(
        local_num_epochs=epochs,
        local_learning_rate=settings["learning_rate"],
        local_batch_size=settings["batch_size"],
    )

    def run_block() -> Block:
        network = WithLoss(first_network(workload))
        optimizer = partial(torch.optim.SGD, momentum=settings["momentum"])
        model = PyTorchModel(network, optimizer, torch.optim.SGD(network.parameters(), 1.0))
        order = iter(range(len(works)))
        users = FederatedDataset(lambda number: Planned(images, labels, works[number], epochs), lambda: next(order))
        backend = SimulatedBackend(users, users, postprocessors=[WeightByDatapoints()])
        TrainingOnly().run(numbers, backend, model, training, NNEvalHyperParams(settings["batch_size"]))
        return Block(_losses(network.found, workload), moved(network.network, workload))

    return run_block, {"versions": {"pfl": __version__, "torch": torch.__version__}}


def _losses(found: list[Tensor], workload: Workload) -> list[float]:
    """Means over batches, then over clients."""
    values = iter(torch.stack(found).tolist())
    of_clients = [
        [sum(next(values) for _ in work.batches) / len(work.batches) for work in cohort] for cohort in workload.rounds
    ]
    return [sum(cohort) / len(cohort) for cohort in of_clients]


if __name__ == "__main__":
    serve(prepare)
