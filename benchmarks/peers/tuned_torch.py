"""A PyTorch loop as fast as we could make it on CPU, in three layouts; the fastest for the workload runs.

* `threads`: clients one after another, PyTorch's own threads inside each operation;
* `processes`: one process a core, each training its share of the cohort (longest client first) with one thread;
* `stacked`: the whole cohort in one `vmap`, where all clients do the same number of full batches.

In all of them: images are normalised once and stay in memory, one network is reused, weights are loaded and averaged as one
flat vector (batch norm's statistics likewise), the optimizer is PyTorch's fused one, and no loss is read before the round
ends.
"""

import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.multiprocessing as multiprocessing
from exchange import Block, Work, Workload, distance, serve
from networks import first_network, normalised
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.functional import cross_entropy

Run = Callable[[int], Block]  # runs so many rounds of the block


class Flat(NamedTuple):
    """A network whose weights and statistics are views into one vector."""

    network: nn.Module
    values: Tensor  # [P]
    parameters: int  # the first so many entries are trainable


def flatten(network: nn.Module, channels_last: bool) -> Flat:
    """Moves a network's weights into one vector; kernels keep the layout that the convolutions prefer."""
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    trainable = [*network.parameters()]
    tensors = [*trainable, *(value for value in network.buffers() if value.is_floating_point())]
    values = torch.empty(sum(tensor.numel() for tensor in tensors))
    begin = 0
    for tensor in tensors:
        view = torch.as_strided(values, tensor.shape, tensor.stride(), begin)
        view.copy_(tensor.detach())
        tensor.data = view
        begin += tensor.numel()
    return Flat(network, values, sum(tensor.numel() for tensor in trainable))


class Trainer:
    """Trains clients one after another and adds their models up."""

    def __init__(self, workload: Workload, images: Tensor):
        self.settings, self.rounds, self.images = workload.settings, workload.rounds, images
        self.labels = torch.from_numpy(workload.labels)
        channels_last = images.dim() == 4 and images.is_contiguous(memory_format=torch.channels_last)
        self.flat = flatten(first_network(workload), channels_last)

    def train(self, work: Work, first: Tensor, total: Tensor, weight: float) -> Tensor:
        """Trains one client from `first`, adds `weight` times its model to `total`; returns its mean loss."""
        settings, network = self.settings, self.flat.network
        self.flat.values.copy_(first)
        optimizer = torch.optim.SGD(
            network.parameters(), lr=settings["learning_rate"], momentum=settings["momentum"], fused=True
        )
        loss_sum = torch.zeros(())
        for batch in work.batches:
            indices = torch.from_numpy(batch)
            loss = cross_entropy(network(self.images[indices]), self.labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.detach()
        total.add_(self.flat.values, alpha=weight)
        return loss_sum / len(work.batches)


def shares(cohort: list[Work]) -> list[float]:
    """The clients' weights in the average."""
    total = sum(work.size for work in cohort)
    return [work.size / total for work in cohort]


def in_threads(workload: Workload, images: Tensor) -> Run:
    """Clients one after another in this process."""
    torch.set_num_threads(workload.settings["threads"])
    trainer = Trainer(workload, images)
    first = trainer.flat.values.clone()

    def run(rounds: int) -> Block:
        model, losses = first.clone(), []
        for cohort in workload.rounds[:rounds]:
            total = torch.zeros_like(model)
            pairs = zip(cohort, shares(cohort), strict=True)
            losses.append(torch.stack([trainer.train(work, model, total, share) for work, share in pairs]).mean())
            model = total
        return Block(torch.stack(losses).tolist(), _norm(model, first, trainer.flat.parameters))

    return run


def in_processes(workload: Workload, images: Tensor) -> Run:
    """A process for each core; models go through shared memory, commands through pipes."""
    trainer = Trainer(workload, images)
    first = trainer.flat.values.clone()
    number = workload.settings["threads"]
    model, totals = torch.zeros_like(first).share_memory_(), torch.zeros(number, len(first)).share_memory_()
    context = multiprocessing.get_context("fork")
    pipes = []
    for worker in range(number):
        here, there = context.Pipe()
        context.Process(target=_work, args=(there, trainer, model, totals[worker]), daemon=True).start()
        pipes.append(here)

    def run(rounds: int) -> Block:
        model.copy_(first)
        losses = []
        for round, cohort in enumerate(workload.rounds[:rounds]):
            for pipe, slots in zip(pipes, _divided(cohort, number), strict=True):
                pipe.send((round, slots))
            losses.append(sum(pipe.recv() for pipe in pipes) / len(cohort))
            torch.sum(totals, 0, out=model)
        return Block(losses, _norm(model, first, trainer.flat.parameters))

    return run


def _work(pipe: Connection, trainer: Trainer, model: Tensor, total: Tensor) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            round, slots = pipe.recv()
        except EOFError:
            return
        cohort, weights = trainer.rounds[round], shares(trainer.rounds[round])
        total.zero_()
        losses = [trainer.train(cohort[slot], model, total, weights[slot]) for slot in slots]
        pipe.send(float(torch.stack(losses).sum()) if losses else 0.0)


def _divided(cohort: list[Work], number: int) -> list[list[int]]:
    """Longest client first to the process with the least work."""
    slots: list[list[int]] = [[] for _ in range(number)]
    load = [0] * number
    for slot in sorted(range(len(cohort)), key=lambda slot: -len(cohort[slot].batches)):
        least = load.index(min(load))
        slots[least].append(slot)
        load[least] += len(cohort[slot].batches)
    return slots


def stacked(workload: Workload, images: Tensor) -> Run:
    """The cohort as one batch of networks."""
    settings = workload.settings
    torch.set_num_threads(settings["threads"])
    network, labels = first_network(workload), torch.from_numpy(workload.labels)
    first = {name: value.detach().clone() for name, value in network.named_parameters()}

    def loss(params: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(functional_call(network, params, (inputs,)), targets)

    gradient = vmap(grad_and_value(loss))
    orders = [torch.from_numpy(np.stack([np.stack(work.batches) for work in cohort])) for cohort in workload.rounds]

    def run(rounds: int) -> Block:
        model, losses = first, []
        for order, cohort in list(zip(orders, workload.rounds, strict=True))[:rounds]:
            params = {name: value.expand(len(cohort), *value.shape).clone() for name, value in model.items()}
            speed = {name: torch.zeros_like(value) for name, value in params.items()}
            values = torch.zeros(len(cohort))
            for step in range(order.shape[1]):
                gradients, value = gradient(params, images[order[:, step]], labels[order[:, step]])
                values += value
                for name, change in gradients.items():
                    if settings["momentum"]:
                        change = speed[name].mul_(settings["momentum"]).add_(change)
                    params[name].sub_(change, alpha=settings["learning_rate"])
            weights = torch.tensor(shares(cohort))
            model = {name: torch.tensordot(weights, value, 1) for name, value in params.items()}
            losses.append((values / order.shape[1]).mean())
        return Block(torch.stack(losses).tolist(), _moved(model, workload))

    return run


def _moved(model: dict[str, Tensor], workload: Workload) -> float:
    return distance({name: value.numpy() for name, value in model.items()}, workload.initial)


def _norm(model: Tensor, first: Tensor, parameters: int) -> float:
    return float((model - first)[:parameters].norm())


def can_be_stacked(workload: Workload) -> bool:
    """All clients of a round do the same number of full batches, and the network keeps no statistics."""
    batch_size = workload.settings["batch_size"]
    steps = {(len(work.batches), len(batch)) for cohort in workload.rounds for work in cohort for batch in work.batches}
    return len(steps) == 1 and steps.pop()[1] == batch_size and workload.settings["model"] != "resnet18"


def prepare(workload: Workload) -> tuple[Callable[[], Block], dict[str, Any]]:
    """Times every layout on the workload's block (at most the first rounds of it) and keeps the fastest."""
    plain = normalised(workload.images)
    convolutional = workload.settings["model"] != "mlp"
    images = (
        {"": plain, "-channels-last": plain.to(memory_format=torch.channels_last)} if convolutional else {"": plain}
    )
    # Processes first: a fork after this process has used its threads would inherit their locks.
    candidates = {f"processes{name}": (in_processes, value) for name, value in images.items()}
    candidates |= {f"threads{name}": (in_threads, value) for name, value in images.items()}
    if can_be_stacked(workload):
        candidates["stacked"] = (stacked, plain)
    runs = {name: make(workload, value) for name, (make, value) in candidates.items()}
    rounds = workload.settings["trial_rounds"]
    seconds = {name: _time(partial(run, rounds)) for name, run in runs.items()}
    best = min(seconds, key=lambda name: seconds[name])
    facts = {"layout": best, "layout_seconds": seconds, "versions": {"torch": torch.__version__}}
    return partial(runs[best], len(workload.rounds)), facts


def _time(run: Callable[[], Block]) -> float:
    """Seconds of the second of two trials."""
    run()
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    serve(prepare)
