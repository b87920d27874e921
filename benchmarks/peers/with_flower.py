"""Flower's simulation: a server app with FedAvg, client apps in Ray actors, one actor a core.

The simulation is started once; the server app waits for commands inside. Everything a user's app does in a round counts:
messages, weights as array records, averaging. Each actor keeps the normalised images, so a client only picks its batches.
The strategy samples the workload's cohorts, and its messages name the client whose work is to be done.
"""

import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from exchange import Block, Workload, read, serve
from flower_client import client_app
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from networks import first_network, moved

FOLDER = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else Path()


class Planned(FedAvg):
    """FedAvg on the workload's cohorts; it keeps the unweighted mean of the clients' losses."""

    def __init__(self, workload: Workload):
        super().__init__(fraction_evaluate=0.0)
        self.workload, self.losses = workload, []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        nodes = sorted(grid.get_node_ids())
        messages = []
        for slot, work in enumerate(self.workload.rounds[server_round - 1]):
            order = ConfigRecord({"folder": str(FOLDER), "round": server_round - 1, "slot": slot})
            content = RecordDict({"arrays": arrays, "config": order})
            messages.append(Message(content, dst_node_id=nodes[work.client], message_type=MessageType.TRAIN))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        failed = [reply.error.reason for reply in replies if reply.has_error()]
        assert len(replies) == len(self.workload.rounds[server_round - 1]) and not failed, failed
        self.losses.append(sum(reply.content["metrics"]["loss"] for reply in replies) / len(replies))
        return super().aggregate_train(server_round, replies)


server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Answers the driver from inside the simulation."""
    serve(lambda workload: prepare(workload, grid))


def prepare(workload: Workload, grid: Grid) -> tuple[Callable[[], Block], dict[str, Any]]:
    while len(list(grid.get_node_ids())) < len(workload.parts):
        time.sleep(0.1)

    def run_block() -> Block:
        network, strategy = first_network(workload), Planned(workload)
        first = ArrayRecord(network.state_dict())
        result = strategy.start(grid, first, num_rounds=len(workload.rounds))
        network.load_state_dict(result.arrays.to_torch_state_dict())
        return Block(strategy.losses, moved(network, workload))

    return run_block, {"versions": {name: version(name) for name in ("flwr", "ray", "torch")}}


if __name__ == "__main__":
    facts = read(FOLDER)
    cores = facts.settings["threads"]
    run_simulation(
        server_app,
        client_app,
        num_supernodes=len(facts.parts),
        backend_config={"init_args": {"num_cpus": cores}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
