"""Exports the adapters of an instruction-tuning run as PEFT folders, and samples answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_qp.data.text.instructions import Record, check_characters
from fedjax_qp.data.text.templates import tokenise
from fedjax_qp.experiment import Experiment
from fedjax_qp.federated import FederatedState, Params
from fedjax_qp.models.language.adapted import AdaptedModel
from fedjax_qp.models.language.generation import generate
from fedjax_qp.models.language.peft import export_adapter
from fedjax_qp.registry import ConfigurationError

View = Literal["aggregated", "tuned"]


def language_of(experiment: Experiment) -> AdaptedModel:
    """The language model of a run.

    Raises:
      ConfigurationError: the run trains something else.
    """
    if experiment.task.language is None:
        raise ConfigurationError(
            f"the run {experiment.config.name!r} trains {experiment.config.model.name!r}, which has no adapters: give the "
            "folder of an instruction-tuning run."
        )
    return experiment.task.language


def client_params(experiment: Experiment, state: FederatedState, client: int | None, view: View) -> Params:
    """The adapters of one client, or the server's with client None.

    Raises:
      ConfigurationError: there is no such client, or the method keeps no tuned adapters.
    """
    clients = len(experiment.task.parts)
    if client is None:
        return experiment.algorithm.serve(state.server, ())
    if not 0 <= client < clients:
        raise ConfigurationError(f"client = {client} must be 0 to {clients - 1}.")
    chosen = experiment.algorithm.serve if view == "aggregated" else experiment.algorithm.tuned
    if chosen is None:
        raise ConfigurationError(
            f"{experiment.config.algorithm.name} keeps no adapters as the clients left them: choose view = 'aggregated'."
        )
    return chosen(state.server, jax.tree.map(lambda leaf: leaf[client], state.clients))


def export_clients(experiment: Experiment, state: FederatedState, folder: Path, view: View) -> list[Path]:
    """Writes one PEFT folder for each client, `client_<k>`; returns them.

    Raises:
      ConfigurationError: the method also changed the base (FLoRA), which an adapter cannot hold.
    """
    language = language_of(experiment)
    written = []
    for client in range(len(experiment.task.parts)):
        params = client_params(experiment, state, client, view)
        if jax.tree.leaves(params.statistics):
            raise ConfigurationError(
                f"{experiment.config.algorithm.name} merges its updates into the base model: an adapter alone is not its "
                "result. Choose another method."
            )
        target = folder / f"client_{client}"
        export_adapter(
            target,
            params.trainable,
            config=language.config,
            rank=language.rank,
            alpha=language.alpha,
            targets=tuple(params.trainable),
            base_model_name=str(language.folder),
            masks=params.masks,
        )
        written.append(target)
    return written


def answer(
    language: AdaptedModel, params: Params, instructions: Sequence[str], *, template: str, new_tokens: int = 64
) -> list[str]:
    """The likeliest answers to some instructions, cut at `new_tokens` tokens.

    Args:
      params: adapters and masks; `Params((), ())` for the base alone.
      template: as in training, see `fedjax_qp.data.text.templates`.

    Raises:
      ConfigurationError: there is no instruction, it is no proper text, or the model has no row for one of its tokens.
    """
    if not instructions or not all(instruction.strip() for instruction in instructions):
        raise ConfigurationError(f"questions = {list(instructions)} must be at least one, and none of them empty.")
    for instruction in instructions:
        check_characters(instruction, "a question")
    tokenizer = language.tokenizer
    records = [Record(instruction, "", "", "") for instruction in instructions]
    vocabulary = language.config.vocabulary
    prompts = [prompt for prompt, _ in tokenise(records, tokenizer, template, vocabulary=vocabulary)]
    lengths = np.array([len(prompt) for prompt in prompts])
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    written = generate(
        language.config,
        language.frozen,
        params,
        jnp.asarray(tokens),
        lengths=jnp.asarray(lengths),
        new_tokens=new_tokens,
        stop=tokenizer.eos_token_id,
        scale=language.scale,
    )
    return [text.strip() for text in tokenizer.batch_decode(np.asarray(written), skip_special_tokens=True)]
