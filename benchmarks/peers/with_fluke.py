"""fluke: its server, clients, channel and averaging, on the workload's cohorts and batches.

Local training is fluke's own `Client.fit`; a client's data set hands out the batches of the workload. fluke imports
torchvision for networks and data sets that are not used here; an empty stand-in takes its place.
"""

import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch
from exchange import Block, Work, Workload, serve
from networks import first_network, moved, normalised
from torch import Tensor, nn


def without_torchvision() -> None:
    """PyTorch's CPU build and torchvision's ordinary one do not go together, so the environment has none."""
    import torchmetrics  # noqa: F401  (looks for torchvision itself, and must not find the stand-in)

    whole, models, data = (ModuleType(f"torchvision{name}") for name in ("", ".models", ".datasets"))
    for network in ("resnet18", "resnet34", "resnet50"):
        setattr(models, network, None)
    whole.models, whole.datasets = models, data
    sys.modules.update({module.__name__: module for module in (whole, models, data)})


without_torchvision()

from fluke import FlukeENV  # noqa: E402
from fluke.client import Client  # noqa: E402
from fluke.config import OptimizerConfigurator  # noqa: E402
from fluke.data import FastDataLoader  # noqa: E402
from fluke.server import Server  # noqa: E402


class Planned(FastDataLoader):
    """A client's batches; every pass is an epoch."""

    def __init__(self, images: Tensor, labels: Tensor, epochs: int, classes: int):
        super().__init__(torch.zeros(1), num_labels=classes)
        self.images, self.labels, self.epochs = images, labels, epochs

    def begin(self, work: Work) -> None:
        self.work, self.epoch, self.size = work, 0, work.size
        self.per_epoch = -(-len(work.batches) // self.epochs)

    def __len__(self) -> int:
        return self.per_epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        begin = self.epoch * self.per_epoch
        self.epoch += 1
        for batch in self.work.batches[begin : begin + self.per_epoch]:
            indices = torch.from_numpy(batch)
            yield self.images[indices], self.labels[indices]


class Losses:
    """An observer that keeps the training losses."""

    def __init__(self):
        self.found = []

    def end_fit(self, round: int, client_id: int, model: nn.Module, loss: float) -> None:
        self.found.append(loss)


def prepare(workload: Workload) -> tuple[Callable[[], Block], dict[str, Any]]:
    settings = workload.settings
    torch.set_num_threads(settings["threads"])
    FlukeENV().set_device("cpu")
    images, labels = normalised(workload.images), torch.from_numpy(workload.labels)
    epochs = settings["config"]["local"]["epochs"]
    optimizer = OptimizerConfigurator(
        {"name": torch.optim.SGD, "lr": settings["learning_rate"], "momentum": settings["momentum"]},
        {"name": "StepLR", "step_size": 10**6},
    )

    def federation() -> tuple[Server, list[Client]]:
        clients = []
        for index in range(len(workload.parts)):
            data = Planned(images, labels, epochs, settings["classes"])
            client = Client(index, data, None, optimizer, nn.CrossEntropyLoss(), local_epochs=epochs, persistency=False)
            clients.append(client)
        server = Server(first_network(workload), None, clients, weighted=True)
        for client in clients:
            client.set_channel(server.channel)
        return server, clients

    def run_block() -> Block:
        server, clients = federation()
        losses = []
        for number, cohort in enumerate(workload.rounds, start=1):
            observer, eligible = Losses(), [clients[work.client] for work in cohort]
            server.broadcast_model(eligible)
            for client, work in zip(eligible, cohort, strict=True):
                client.attach(observer)
                client.train_set.begin(work)
                client.local_update(number)
                client.detach(observer)
            server.aggregate(eligible, server.receive_client_models(eligible, state_dict=False))
            losses.append(sum(observer.found) / len(observer.found))
        return Block(losses, moved(server.model, workload))

    return run_block, {"versions": {name: version(name) for name in ("fluke-fl", "torch")}}


if __name__ == "__main__":
    serve(prepare)
