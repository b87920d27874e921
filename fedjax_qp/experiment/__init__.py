"""From a configuration to the objects of a run. Everything that can be wrong with a run is found here, before any compute."""

from fedjax_qp.experiment.advice import advice
from fedjax_qp.experiment.assembly import Experiment, build, check
from fedjax_qp.experiment.methods import declared, differing_settings, local_optimizer, method, traced_settings
from fedjax_qp.experiment.parts import defaults, is_whole_number, of_language_model, registries, resolve
from fedjax_qp.experiment.start import first_state, start_engine

__all__ = [
    "Experiment",
    "advice",
    "build",
    "check",
    "declared",
    "defaults",
    "differing_settings",
    "first_state",
    "is_whole_number",
    "local_optimizer",
    "method",
    "of_language_model",
    "registries",
    "resolve",
    "start_engine",
    "traced_settings",
]
