"""From a configuration to the objects of a run. Everything that can be wrong with a run is found here, before any compute."""

from fedjax_qp.experiment.advice import advice
from fedjax_qp.experiment.assembly import Experiment, build, check
from fedjax_qp.experiment.methods import declared, differing_settings, local_optimizer, method, traced_settings
from fedjax_qp.experiment.parts import REGISTRIES, defaults, is_whole_number, kind_of, resolve
from fedjax_qp.experiment.start import first_state, start_engine

__all__ = [
    "REGISTRIES",
    "Experiment",
    "advice",
    "build",
    "check",
    "declared",
    "defaults",
    "differing_settings",
    "first_state",
    "is_whole_number",
    "kind_of",
    "local_optimizer",
    "method",
    "resolve",
    "start_engine",
    "traced_settings",
]
