"""What came out of a sweep: one tidy table of every evaluation, the trials in order, and the comparison.

results.csv                a row for each (phase, trial, seed, round) in which the ranking's metric was recorded: the trial,
                           its settings under their dotted names, and every number of the record
summary.csv, summary.md    a row for each trial of the search, the best first
curves.png                 the best trial of each variant: mean over seeds, band of ± one standard deviation
space-VARIANT.png          the value over each searched field
comparison.md, .json, .png the best settings side by side, differences to the baseline paired by seed
tuned.yaml                 these settings, as `variants` of another sweep

All of them are written anew whenever the sweep ends or is interrupted. optuna-dashboard shows more of `study.log`.
"""

import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import yaml
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from fedjax_qp.console.tables import TextTable
from fedjax_qp.files import write_whole, writing
from fedjax_qp.reports import compare, personal, rendering
from fedjax_qp.reports.plots import plot_comparison, plot_metric, save
from fedjax_qp.runs import record_numbers
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.sweeps.space import COMPARISON, Sweep, fields
from fedjax_qp.sweeps.trials import Store, read_history, trial_of

_COMPLETE = (TrialState.COMPLETE,)
_COLUMNS = ["trial", "settings", "status", "rounds", "mean", "std", "reason"]


def summary(store: Store) -> pd.DataFrame:
    """The trials of the search as they stand, the best first.

    Returns:
      Columns `trial`, `settings` (the searched ones), `status` (complete, stopped, running, waiting, diverged or failed),
      `rounds` (that all seeds have done), `mean` and `std` over seeds (NaN where there is no value), `reason` (in which its
      runs ended), and the searched fields.
    """
    entries = [_entry(frozen) for study in _searched(store) for frozen in study.get_trials(deepcopy=False)]
    if not entries:
        return pd.DataFrame(columns=_COLUMNS)
    frame = pd.DataFrame(entries)
    order = ["complete", "stopped", "running", "waiting", "diverged", "failed"]
    frame["status"] = pd.Categorical(frame["status"], order, ordered=True)
    ascending = [True, store.sweep.rank.optuna_direction == "minimize"]
    return frame.sort_values(["status", "mean"], ascending=ascending, kind="stable", ignore_index=True)


def table(sweep: Sweep, trials: pd.DataFrame, *, most: int | None = None) -> TextTable:
    """The trials for the terminal, at most `most` of them.

    Args:
      trials: from `summary`.
    """
    shown = trials if most is None else trials.head(most)
    notes = [f"… and {len(trials) - len(shown)} more"] if len(shown) < len(trials) else []
    return TextTable(*_grid(sweep, shown), notes=notes, words=(0, 1, 2))


def said(settings: dict[str, Any], dimensions: Iterable[str]) -> str:
    """Some settings in a line, each by the last part of its name."""
    found = {field: settings[field] for key in dimensions for field in fields(key)}
    return ", ".join(
        f"{field.rpartition('.')[2]}={value:.4g}" if isinstance(value, float) else f"{field.rpartition('.')[2]}={value}"
        for field, value in found.items()
    )


def tidy(store: Store) -> pd.DataFrame:
    """One row for each trial, seed and evaluation; see the module docstring."""
    entries = []
    for study in store.studies():
        phase = store.phase(study.study_name)
        for trial in (trial_of(study.study_name, frozen) for frozen in study.get_trials(deepcopy=False)):
            plain = {
                key: json.dumps(one) if isinstance(one, list | dict) else one for key, one in trial.settings.items()
            }
            head = {"phase": phase.folder.name, "variant": trial.variant, "trial": trial.name, **plain}
            for seed, folder in zip(phase.seeds, phase.run_folders(trial), strict=True):
                for line in read_history(folder):
                    if record_numbers.value(line, phase.rank.metric) is not None:
                        entries.append(
                            {**head, "seed": seed, "round": line["round"], **dict(record_numbers.scalars(line))}
                        )
    return pd.DataFrame(entries)


def write_results(store: Store) -> None:
    """Writes tables and figures of what there is of the search, also in the middle of it.

    Raises:
      ConfigurationError: the disk is full.
    """
    folder, trials, frame = store.folder, summary(store), tidy(store)
    if frame.empty:
        return
    write_whole(folder / "results.csv", frame.to_csv(index=False))
    if trials.empty:
        return
    write_whole(folder / "summary.csv", trials.to_csv(index=False))
    write_whole(folder / "summary.md", _markdown(store.sweep, trials))
    best = [(one.study_name, one.best_trial) for one in _searched(store) if one.get_trials(False, _COMPLETE)]
    runs = [run for name, one in best for run in store.phase(name).run_folders(trial_of(name, one))]
    with writing(folder / "curves.png"):
        if runs:
            save(plot_metric(compare.load_runs(runs), store.sweep.rank.metric), folder / "curves.png")
        for study in _searched(store):
            _plot_space(study, store.sweep.rank.metric, folder / f"space-{study.study_name}.png")


def write_comparison(store: Store, trials: Sequence[int], notes: Sequence[str]) -> TextTable | None:
    """Writes the comparison of the best settings; returns its table, None where no run of it has ended.

    A run that diverged is named and counts in no mean.

    Args:
      trials: numbers in the study of the comparison.
    """
    settings, phase = store.sweep.compare, store.phase(COMPARISON)
    assert settings is not None
    known = store.study(COMPARISON).trials
    found = [trial_of(COMPARISON, known[number]) for number in trials]
    ended = [folder for one in found for folder in phase.run_folders(one) if RunFolder(folder).end.exists()]
    kept = [folder for folder in ended if not RunFolder(folder).diverged()]
    if not kept:
        return None
    added = set() if settings.rounds is None else {"rounds"}  # by the comparison, which is another one next time
    chosen = [{key: value for key, value in one.settings.items() if key not in added} for one in found]
    variants = [{"name": one.variant, "settings": own} for one, own in zip(found, chosen, strict=True)]
    write_whole(store.folder / "tuned.yaml", yaml.safe_dump({"variants": variants}, sort_keys=False))
    runs = compare.load_runs(kept)
    labels = {run.config["name"] for run in runs}
    baseline = next((one.name for one in found if one.variant == settings.baseline and one.name in labels), None)
    rows = compare.summary(runs, last=settings.last, baseline=baseline)
    diverged = ", ".join(folder.name for folder in ended if folder not in kept)
    notes = [*notes, *([f"Diverged, and in no mean: {diverged}."] if diverged else [])]
    text = rendering.to_markdown(rows) + "".join(f"- {note}\n" for note in notes)
    if personal.has_personal(runs):
        text += f"\n{personal.personal_markdown(personal.personal_summary(runs, baseline=baseline))}"
    write_whole(store.folder / "comparison.md", text)
    write_whole(store.folder / "comparison.json", rendering.to_json(rows))
    with writing(store.folder / "comparison.png"):
        plot_comparison(runs, store.folder / "comparison.png")
    return TextTable(*rendering.grid(rows), notes=[*rendering.notes(rows), *notes])


def _searched(store: Store) -> list[Study]:
    return [study for study in store.studies() if study.study_name != COMPARISON]


def _entry(frozen: FrozenTrial) -> dict[str, Any]:
    told = frozen.user_attrs
    return {
        "trial": told["name"],
        "settings": said(told["settings"], frozen.params),
        "status": told.get("status") or ("running" if frozen.intermediate_values else "waiting"),
        "rounds": told.get("rounds", frozen.last_step or 0),
        "mean": frozen.value if frozen.state in _COMPLETE else None,
        "std": told.get("std"),
        "reason": told.get("reason", ""),
        **{field: told["settings"][field] for key in frozen.params for field in fields(key)},
    }


def _grid(sweep: Sweep, trials: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table; accuracies in per cent."""
    scale, digits, unit = (100, ".2f", " (%)") if "accuracy" in sweep.rank.metric else (1, ".4g", "")
    cells = []
    for row in trials.to_dict("records"):
        mean = "–" if pd.isna(row["mean"]) else f"{scale * row['mean']:{digits}}"
        spread = "" if pd.isna(row["std"]) else f" ± {scale * row['std']:{digits}}"
        cells.append([row["trial"], row["settings"], row["status"], str(row["rounds"]), mean + spread])
    return ["trial", "settings", "status", "rounds", f"{sweep.rank.metric}, last {sweep.rank.last}{unit}"], cells


def _markdown(sweep: Sweep, trials: pd.DataFrame) -> str:
    notes = [f"- {name}: {why}" for name, why in zip(trials["trial"], trials["reason"], strict=True) if why]
    seeds = f"Mean ± sample standard deviation over the seeds {', '.join(map(str, sweep.seeds))}."
    body = rendering.markdown_lines(*_grid(sweep, trials), words=(0, 1, 2))
    return "\n".join([*body, "", seeds, *([""] if notes else []), *notes]) + "\n"


def _plot_space(study: Study, metric: str, path: Path) -> None:
    """Draws the value over each field of which complete trials have several values."""
    complete = study.get_trials(deepcopy=False, states=_COMPLETE)
    params = [key for key in (complete[0].params if complete else ()) if len({one.params[key] for one in complete}) > 1]
    if not params:
        return
    import matplotlib.pyplot as plt  # has a state of its own, which only Optuna needs

    with plt.ioff(), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.visualization.matplotlib.plot_slice(study, params=params, target_name=metric)
        save(plt.gcf(), path)
        plt.close(plt.gcf())
