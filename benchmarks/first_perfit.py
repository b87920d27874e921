"""The main job of `make run-perfit`: PerFIT against FedIT, tuning SmolLM2-135M on real instructions; a table and answers.

One seed, few records, nothing tuned: it shows that and how the methods run, not which one is better. Runs that are already
finished are kept and interrupted ones are continued, so a second call only compares.
"""

import argparse
import time
from pathlib import Path

import jax
from first_look import finished_or_run
from rich.console import Console
from rich.markup import escape

from fedjax_qp.engine.evaluation import evaluate
from fedjax_qp.federated import Params
from fedjax_qp.files import keep_programs
from fedjax_qp.reports import compare as comparison
from fedjax_qp.reports.personal import personal_summary, personal_table
from fedjax_qp.runs.export import answer, client_params, language_of
from fedjax_qp.runs.run import restore

FOLDER = "runs/first-perfit"
METHODS = {"FedIT": ["algorithm=fedit"], "PerFIT": []}
QUESTIONS = ("Describe the taste of a lemon.", "Give three tips for staying healthy.")


def show_answers(folder: Path, console: Console) -> None:
    """The base's perplexity, and answers of the base and of one client's model."""
    experiment, state = restore(folder)
    language, template = language_of(experiment), experiment.config.text.template
    nobody = Params((), ())
    sums = jax.jit(lambda frozen, test: evaluate(language.model, frozen, nobody, test, None))(
        language.frozen, experiment.task.test
    )
    perplexity = float(jax.numpy.exp(sums["loss"] / sums["count"].sum()))
    console.print(f"the base model before tuning: perplexity {perplexity:.2f} on the common test set")
    before = answer(language, nobody, QUESTIONS, template=template)
    after = answer(language, client_params(experiment, state, 0, "aggregated"), QUESTIONS, template=template)
    for question, first, second in zip(QUESTIONS, before, after, strict=True):
        console.print(
            f"\n[bold]{question}[/bold]\n[dim]before:[/dim] {escape(first)}\n[dim]client 0:[/dim] {escape(second)}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/alpaca_smollm2.yaml"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="settings to change in all runs, such as rounds=10")
    arguments = parser.parse_args()
    keep_programs()
    console = Console()
    started = time.perf_counter()
    folders = {
        label: finished_or_run(
            arguments.config, label, FOLDER, [*arguments.overrides, *method, f"seed={arguments.seed}"], console
        )
        for label, method in METHODS.items()
    }
    runs = comparison.load_runs(folders.values())
    console.print(personal_table(personal_summary(runs, baseline="FedIT")))
    show_answers(folders["PerFIT"], console)
    console.print(f"\n{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
