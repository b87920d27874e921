"""Every registered method with options, on the small federations of the contract, for the tests of everything that trains."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp

from fedjax_qp.algorithms import algorithms
from fedjax_qp.contract.federations import Federation, images, language
from fedjax_qp.federated import Algorithm


class Case(NamedTuple):
    """A method with its options, and the federation it is tested on."""

    name: str
    options: Mapping[str, Any] = MappingProxyType({})
    language: bool = False


SPARSE = {"warm_up": 1, "prunings": 2, "score_batches": 1}

# Every registered algorithm appears at least once; `test_contract` checks that.
CASES = {
    "fedavg": Case("fedavg"),
    "fedavg-uniform": Case("fedavg", {"weighting": "uniform"}),
    "fedprox": Case("fedprox", {"proximal": 0.1}),
    "fedavgm": Case("fedavgm", {"momentum": 0.5}),
    "fedacg": Case("fedacg", {"proximal": 0.1}),
    "fedadam": Case("fedadam"),
    "fedyogi": Case("fedyogi"),
    "fedmut": Case("fedmut", {"alpha": 2.0}),
    "fedqp-nearest": Case("fedqp", {"form": "nearest", "margin": 0.2, "max_drift": 0.9}),
    "fedqp-box": Case("fedqp", {"form": "box", "margin": 0.2}),
    "fedqp-joint": Case("fedqp", {"form": "joint"}),
    "fedqp-clients": Case("fedqp", {"form": "references", "references": "clients", "references_kept": 4}),
    "fedqp-history": Case("fedqp", {"form": "references", "references": "history", "references_kept": 2}),
    "fedqp-shifted": Case("fedqp", {"form": "nearest", "use": "shifted"}),
    "fedqp-drift": Case("fedqp", {"form": "nearest", "use": "drift"}),
    "ditto": Case("ditto", {"proximal": 0.5}),
    "scaffold": Case("scaffold"),
    "feddyn": Case("feddyn", {"alpha": 0.1}),
    "moon": Case("moon"),
    "clustered_sampling": Case("clustered_sampling"),
    "fedgen": Case("fedgen", {"generator_steps": 2, "generated": 6, "noise": 4, "hidden": 8}),
    "fedsam": Case("fedsam", {"radius": 0.1, "adaptive": True}),
    "fedit": Case("fedit", {"personal_mix": 0.5, "local_after": 1, "proximal": 0.1}, language=True),
    "local_lora": Case("local_lora", language=True),
    "ffa_lora": Case("ffa_lora", language=True),
    "fedsa_lora": Case("fedsa_lora", language=True),
    "perfit": Case("perfit", SPARSE, language=True),
    "perfit-grouped": Case(
        "perfit",
        {**SPARSE, "levels": (0.75, 1.5), "grouped": True, "personal_mix": 0.5, "search_every": 2, "search": "random"},
        language=True,
    ),
    "hetlora": Case("hetlora", language=True),
    "flexlora": Case("flexlora", language=True),
    "flora": Case("flora", language=True),
}
MUTATING = {"fedmut", "fedqp"}


def federation_of(case: str) -> Federation:
    name, options, of_language = CASES[case]
    return language(algorithms.resolve(name, dict(options)).get("expansion", 1)) if of_language else images()


def small_algorithm(case: str) -> Algorithm:
    federation = federation_of(case)
    return algorithms.build(CASES[case].name, federation.model, federation.optimizer, **CASES[case].options)


def counting() -> Algorithm:
    """A toy with client memory: every client counts its rounds and its steps; the server counts reports."""

    def finish(shared, carry, client):
        memory = {"rounds": client.memory["rounds"] + 1, "steps": client.memory["steps"] + carry}
        return jnp.ones(()), memory, {"client/loss": carry}

    return Algorithm(
        init_server=lambda params, clients: (params, jnp.zeros(())),
        init_client=lambda params: {"rounds": jnp.zeros(()), "steps": jnp.zeros(())},
        dispatch=lambda server, cohort, key: ((), (), {}),
        start=lambda shared, own, memory, key: jnp.zeros(()),
        step=lambda frozen, shared, carry, batch, key: carry + 1,
        finish=finish,
        combine=lambda server, total, key: ((server[0], server[1] + total), {}),
        serve=lambda server, memory: server[0],
    )
