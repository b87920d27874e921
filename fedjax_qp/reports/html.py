"""One HTML file that shows a run, or several side by side; it opens without a server and holds all it needs.

What comes from a run folder is text, never markup: the template escapes everything. Figures are drawn anew from the records.
"""

import base64
import math
import os
import re
import shlex
import statistics
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import jinja2
import yaml
from markupsafe import Markup
from matplotlib.figure import Figure

from fedjax_qp import config as configuration
from fedjax_qp.experiment import defaults
from fedjax_qp.files import JsonFile
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.reports import compare, rendering
from fedjax_qp.reports.compare import Run
from fedjax_qp.reports.personal import has_personal, personal_grid, personal_summary, quantity
from fedjax_qp.reports.plots import plot_comparison, plot_run
from fedjax_qp.runs import record_numbers, watched
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.runs.times import Time
from fedjax_qp.settings import strict

_FALLEN = 0.05  # of accuracy below the best: worth a warning

# Matplotlib's fixed colours that must follow the page's: text and lines, paper, grid, band, and greys of minor lines.
_THEMED = {
    "#000000": "currentColor",
    "#ffffff": "none",
    "#e6e6e6": "var(--rule)",
    "#d9d9d9": "var(--band)",
    "#cccccc": "var(--rule)",
    "#808080": "var(--soft)",
    "#666666": "var(--soft)",
}


class Setting(NamedTuple):
    """One line of the configuration."""

    name: str
    value: str
    default: str | None  # None where there is none
    changed: bool


class Fact(NamedTuple):
    """A number to be seen first."""

    label: str
    value: str
    detail: str = ""


class Page(NamedTuple):
    """What the report says of one run."""

    title: str
    folder: str
    state: str
    facts: list[Fact]
    warnings: list[str]
    settings: dict[str, list[Setting]]  # by group
    configuration: str  # as YAML
    environment: list[tuple[str, str]]
    partition: str | None  # a data URL
    curves: Markup | None
    final: list[tuple[str, str, str]]  # name, last value, its round
    timing: list[tuple[str, str]]
    commands: list[str]
    links: list[tuple[str, str]]  # text, address


def write_report(
    folders: list[Path], output: Path, *, last: int = 10, target: float | None = None, baseline: str | None = None
) -> None:
    """Writes the report of one run, or of a comparison.

    Args:
      folders: run folders.
      output: HTML file.
      last: number of last evaluations that a comparison's accuracies are averaged over.
      target: accuracy (0 to 1) for the rounds to reach it.
      baseline: label of the method that paired differences are taken to.

    Raises:
      ConfigurationError: a folder is not a run folder, or a comparison's argument is out of range.
    """
    runs = compare.load_runs(folders)
    values: dict[str, Any] = {"version": version("fedjax_qp")}
    if len(runs) == 1:
        (page,) = values["pages"] = [run_page(runs[0], output)]
        values |= {"title": page.title, "comparison": None}
    else:
        values["comparison"] = comparison(runs, last=last, target=target, baseline=baseline)
        values["pages"] = [run_page(run, output, figures=False) for run in runs]
        values["title"] = f"{len(values['comparison']['cells'])} methods, {len(runs)} runs"
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedjax_qp.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(environment.get_template("report.html").render(values), encoding="utf-8")


# --- several runs -----------------------------------------------------------------------------------------------------


def comparison(runs: list[Run], *, last: int, target: float | None, baseline: str | None) -> dict[str, Any]:
    """The parts of a page that compares runs."""
    rows = compare.summary(runs, last=last, target=target, baseline=baseline)
    headings, cells = rendering.grid(rows)
    found = {
        "headings": headings,
        "cells": cells,
        "warnings": rendering.notes(rows),
        "curves": _drawn(lambda path: plot_comparison(runs, path), "comparison"),
        "personal": None,
        "last": last,
        "command": shlex.join(
            ["fedjax-qp", "report", *(str(run.folder) for run in runs), "--last", str(last)]
            + (["--baseline", baseline] if baseline else [])
            + (["--target", str(target)] if target else [])
        ),
    }
    if has_personal(runs):
        personal = personal_summary(runs, baseline=baseline)
        headings, cells = personal_grid(personal)
        found["personal"] = {
            "quantity": quantity(personal),
            "difference": "per cent above the baseline" if personal[0].language else "points above the baseline",
            "headings": headings,
            "cells": cells,
        }
    return found


# --- one run ----------------------------------------------------------------------------------------------------------


def run_page(run: Run, output: Path, *, figures: bool = True) -> Page:
    """Gathers what there is of a run.

    Args:
      output: the file that will link to the run's.
      figures: whether they are wanted.
    """
    folder = RunFolder(run.folder)
    environment, unreadable = _read(folder.environment)
    times, damaged = folder.times.read()
    curves = None
    if figures and run.records:
        # Without a title: the page has one of its own.
        curves = _drawn(lambda path: plot_run(run.records, path, watched=run.watched), "run")
    return Page(
        title=f"{run.config['name']}, seed {run.config.get('seed', 0)}",
        folder=str(run.folder),
        state=_state(run),
        facts=_facts(run, times),
        warnings=[*run_warnings(run, environment), *unreadable, *([damaged] if damaged else [])],
        settings=_settings(run),
        configuration=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
        environment=_environment(environment),
        partition=_image(folder.partition_figure) if figures else None,
        curves=curves,
        final=_final(run.records),
        timing=_timing(run, times),
        commands=_commands(run, environment),
        links=_links(folder, output),
    )


def run_warnings(run: Run, environment: dict[str, Any] | None = None) -> list[str]:
    """What a reader of a run's numbers must know."""
    found, lines = [], run.records
    folder = RunFolder(run.folder)
    failure, unreadable = _read(folder.failure)
    found += unreadable
    if folder.diverged():
        found.append(f"The run diverged. {failure.get('message', '')}".strip())
    elif compare.unfinished(run) is not None:
        found.append(f"Unfinished: {_done(run)} of {run.config['rounds']} rounds.")
    if (lack := compare.incomplete(run)) is not None:
        found.append(f"Incomplete: the run {lack}.")
    if (broken := record_numbers.nonfinite_tests(lines)) is not None:
        found.append(f"{broken[0].upper()}{broken[1:]}")
    advice = [said for watch in run.watched if (said := watched.warning(watch, lines)) is not None]
    found += [f"{said[0].upper()}{said[1:]}" for said in advice]
    missing = [line["round"] for line in lines if line.get("train_loss") is None]
    if missing:
        found.append(
            f"No training loss in {len(missing)} rounds (the first is {missing[0]}): nobody reported, or it broke."
        )
    evaluations = _with_rounds(run, "test_accuracy")
    if evaluations and max(evaluations)[0] - evaluations[-1][0] > _FALLEN:
        best, at = max(evaluations)
        found.append(
            f"The last accuracy is {100 * (best - evaluations[-1][0]):.1f} points below the best (round {at})."
        )
    if str((environment or {}).get("commit") or "").endswith("-dirty"):
        found.append("Computed from a checkout with local changes, so its commit does not reproduce the run.")
    return found


def _with_rounds(run: Run, name: str) -> list[tuple[float, int]]:
    """The finite values of a recorded number, each with its round."""
    found = [(record_numbers.value(line, name), line["round"]) for line in run.records]
    return [(value, at) for value, at in found if value is not None and math.isfinite(value)]


def _numbers(run: Run, name: str) -> list[float]:
    return [value for value, _ in _with_rounds(run, name)]


def _done(run: Run) -> int:
    return run.records[-1]["round"] if run.records else 0


def _state(run: Run) -> str:
    folder = RunFolder(run.folder)
    reason = "diverged" if folder.diverged() else (folder.end.read() or {}).get("reason")
    if reason is None:
        reason = "finished" if _done(run) >= run.config.get("rounds", 0) else "unfinished"
    return f"{reason}, {_done(run)} of {run.config.get('rounds', '?')} rounds"


def _facts(run: Run, times: list[Time]) -> list[Fact]:
    facts = []
    for key, label in (("personal", "aggregated"), ("tuned", "tuned")):  # of language models it is the headline
        if values := compare.series(run, f"{key}/perplexity/mean"):
            shown = f"{values[-1]:.2f}" if math.isfinite(values[-1]) else "not finite"
            facts.append(Fact(f"Perplexity, {label}", shown, "mean over clients"))
    if evaluations := _with_rounds(run, "test_accuracy"):
        (final, at), (best, best_at) = evaluations[-1], max(evaluations)
        facts += [
            Fact("Test accuracy", f"{100 * final:.2f} %", f"round {at}"),
            Fact("Best", f"{100 * best:.2f} %", f"round {best_at}"),
        ]
    if deciles := _numbers(run, "client_accuracy/q10"):
        facts.append(Fact("Worst tenth of clients", f"{100 * deciles[-1]:.2f} %", "10 % quantile, label mixtures"))
    for key, label in (("personal", "aggregated"), ("tuned", "tuned")):
        values = _numbers(run, f"{key}/accuracy/mean")
        if values and not compare.series(run, f"{key}/perplexity/mean"):
            facts.append(
                Fact(f"Personal accuracy, {label}", f"{100 * values[-1]:.2f} %", "mean over clients, own tests")
            )
    for watch in compare.shown_watches([run]):
        if values := _numbers(run, watch.metric):
            facts.append(Fact(watch.label.capitalize(), f"{statistics.fmean(values):.2f}", "mean over rounds"))
    if times:
        facts.append(Fact("Time", _duration(sum(time.seconds for time in times)), "compilation included"))
    return facts


def _settings(run: Run) -> dict[str, list[Setting]]:
    """The configuration by group, each value beside its default."""
    groups: dict[str, list[Setting]] = {}
    known = configuration.flat(defaults(run.config))
    for name, value in configuration.flat(run.config).items():
        group, _, key = name.rpartition(".")
        shown, default = _plain(value), _plain(known[name]) if name in known else None
        groups.setdefault(group, []).append(Setting(key, shown, default, default is not None and shown != default))
    return groups


def _plain(value: Any) -> str:
    """A value as one writes it in YAML."""
    return (
        yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True, width=10**6)
        .removesuffix("\n...\n")
        .strip()
    )


def _environment(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    found = dict(found or {})
    packages = found.pop("packages", {})
    packages = packages if isinstance(packages, dict) else {}
    rows = [(name, str(value)) for name, value in found.items() if value is not None]
    return rows + [(name, str(value)) for name, value in packages.items()]


def _final(lines: list[dict]) -> list[tuple[str, str, str]]:
    """The last value of every number that was recorded."""
    last: dict[str, tuple[float, int]] = {}
    for line in lines:
        last |= {name: (value, line["round"]) for name, value in record_numbers.scalars(line)}
    return [(name, f"{value:.6g}", str(at)) for name, (value, at) in sorted(last.items())]


def _timing(run: Run, times: list[Time]) -> list[tuple[str, str]]:
    if not times:
        return []
    steady = [time.seconds / time.rounds for time in times if not time.first]
    rows = [("in all", _duration(sum(time.seconds for time in times)))]
    if steady:
        rows.append(("a round, median of chunks", f"{statistics.median(steady):.3g} s"))
        first = [time.seconds - time.rounds * statistics.median(steady) for time in times if time.first]
        rows.append(("start and compilation, about", _duration(max(0.0, sum(first)))))
    rows.append(("processes", str(sum(time.first for time in times))))
    program = RunFolder(run.folder).program()
    if program is not None and program.runs > 1:
        rows.append(("shared", f"{program.runs} runs in one program: times are those of all"))
    return rows


def _commands(run: Run, environment: dict[str, Any] | None) -> list[str]:
    """What computes the run again."""
    commit = (environment or {}).get("commit")
    again = shlex.join(["fedjax-qp", "run", str(RunFolder(run.folder).config_file), "folder=again"])
    return ([f"git checkout {shlex.quote(commit.removesuffix('-dirty'))}"] if isinstance(commit, str) else []) + [again]


def _links(folder: RunFolder, output: Path) -> list[tuple[str, str]]:
    """The run's own files, relative to the report."""
    written = [folder.report, folder.config_file, folder.records_file, folder.environment.path]
    drawn = [folder.figure, folder.partition_figure, folder.tensorboard]
    found = [path for path in [*written, *drawn] if path.exists() and path != output]
    relative = [os.path.relpath(path.resolve(), output.resolve().parent) for path in found]
    return [(path.name, quote(Path(address).as_posix())) for path, address in zip(found, relative, strict=True)]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _read(file: JsonFile) -> tuple[dict[str, Any], list[str]]:
    """What a small file of a run holds, and a sentence where it is damaged; nothing where it is absent."""
    if not file.exists():
        return {}, []
    try:
        found = strict.load_json(strict.read_text(file.path), str(file.path))
    except ConfigurationError as error:
        return {}, [f"Left out: {error}"]
    return (found, []) if isinstance(found, dict) else ({}, [f"Left out: {file.path} holds no mapping."])


# --- figures ----------------------------------------------------------------------------------------------------------


def _drawn(draw: Callable[[Path], Figure], prefix: str) -> Markup:
    """A figure as SVG inside the page, in the page's colours; its ids begin with `prefix`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figure.svg"
        draw(path)
        svg = path.read_text(encoding="utf-8")
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub("|".join(_THEMED), lambda found: _THEMED[found[0]], svg)
    size = re.search(r'<svg[^>]*?width="([\d.]+)pt"', svg)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[\d.]+pt"([^>]*?) (?:width|height)="[\d.]+pt"', r"\1\2", svg, count=1)
    width = f"{float(size[1]) * 4 / 3:.0f}px" if size else "100%"
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="curves" style="max-width: {width}"', 1))


def _image(file: Path) -> str | None:
    """An image file as a data URL."""
    if not file.is_file():
        return None
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
