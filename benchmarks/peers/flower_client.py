"""The client app of `with_flower`, in a module of its own so that Ray's actors can import it."""

from functools import cache
from pathlib import Path

import torch
from exchange import Workload, read
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from networks import first_network, normalised
from torch.nn.functional import cross_entropy


@cache
def at_hand(folder: str) -> tuple[Workload, torch.nn.Module, torch.Tensor, torch.Tensor]:
    """What an actor keeps between messages."""
    workload = read(Path(folder))
    torch.set_num_threads(1)
    return workload, first_network(workload), normalised(workload.images), torch.from_numpy(workload.labels)


client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """A client's local training."""
    config = message.content["config"]
    workload, network, images, labels = at_hand(str(config["folder"]))
    settings, work = workload.settings, workload.rounds[config["round"]][config["slot"]]
    network.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(network.parameters(), lr=settings["learning_rate"], momentum=settings["momentum"])
    total = 0.0
    for batch in work.batches:
        indices = torch.from_numpy(batch)
        optimizer.zero_grad()
        loss = cross_entropy(network(images[indices]), labels[indices])
        loss.backward()
        optimizer.step()
        total += loss.item()
    metrics = MetricRecord({"loss": total / len(work.batches), "num-examples": work.size})
    content = RecordDict({"arrays": ArrayRecord(network.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)
