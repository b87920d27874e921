"""A plain PyTorch loop, written as federated learning research code usually is.

A dataset that transforms one image at a time, a DataLoader for each client, a deep copy of the global model, a list of the
clients' state dicts, averaged entry by entry. The loader gets the workload's batches instead of its own shuffle.
"""

import copy
from typing import Any

import torch
from exchange import Block, Work, Workload, serve
from networks import first_network, moved
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class Images(Dataset):
    """The training images; what torchvision's ToTensor and Normalize do, without the detour over PIL."""

    def __init__(self, workload: Workload):
        self.images, self.labels = workload.images, workload.labels
        channels = workload.images.shape[-1]
        self.mean = torch.full((channels, 1, 1), 0.5)
        self.std = torch.full((channels, 1, 1), 0.5)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.from_numpy(self.images[index]).permute(2, 0, 1).contiguous().float().div(255)
        return image.sub_(self.mean).div_(self.std), int(self.labels[index])


def train_client(network: nn.Module, dataset: Images, work: Work, settings: dict[str, Any]) -> float:
    """Trains a client's own copy; returns the mean loss of its batches."""
    loader = DataLoader(dataset, batch_sampler=[batch.tolist() for batch in work.batches])
    optimizer = torch.optim.SGD(network.parameters(), lr=settings["learning_rate"], momentum=settings["momentum"])
    objective = nn.CrossEntropyLoss()
    network.train()
    losses = []
    for images, labels in loader:
        optimizer.zero_grad()
        loss = objective(network(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def average(states: list[dict[str, Tensor]], sizes: list[int]) -> dict[str, Tensor]:
    """The mean of the clients' models, weighted by their numbers of examples."""
    result = copy.deepcopy(states[0])
    for name in result:
        result[name] = sum(state[name] * (size / sum(sizes)) for state, size in zip(states, sizes, strict=True))
    return result


def prepare(workload: Workload) -> tuple[Any, dict[str, Any]]:
    torch.set_num_threads(workload.settings["threads"])
    dataset, first = Images(workload), first_network(workload)

    def run_block() -> Block:
        network, losses = copy.deepcopy(first), []
        for cohort in workload.rounds:
            states, local_losses = [], []
            for work in cohort:
                local = copy.deepcopy(network)
                local_losses.append(train_client(local, dataset, work, workload.settings))
                states.append(copy.deepcopy(local.state_dict()))
            network.load_state_dict(average(states, [work.size for work in cohort]))
            losses.append(sum(local_losses) / len(local_losses))
        return Block(losses, moved(network, workload))

    return run_block, {"versions": {"torch": torch.__version__}}


if __name__ == "__main__":
    serve(prepare)
