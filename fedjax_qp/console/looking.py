"""The commands that look at runs: compare, report, inspect."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from fedjax_qp.console.options import UNSET, Instruments, Output, Plugins, Runs, load_plugins, writing
from fedjax_qp.instruments.settings import Settings
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs.folder import RunFolder


def compare(
    runs: Runs,
    *,
    last: int = 10,
    target: Annotated[float | None, UNSET] = None,
    baseline: Annotated[str | None, UNSET] = None,
    output: Path = Path("comparison"),
) -> int:
    """Compares runs: a table and a figure with the spread over seeds.

    Args:
      runs: run folders; runs that differ in nothing but the seed are one method.
      last: number of last evaluations that an accuracy is averaged over.
      target: reports the rounds to reach this accuracy.
      baseline: name of the method that paired differences are taken to.
      output: files are written to this path with the endings .md, .json and .png.
    """
    _check_comparison(runs, last, target)
    from fedjax_qp.reports import compare as comparison
    from fedjax_qp.reports import rendering
    from fedjax_qp.reports.personal import (
        has_personal,
        personal_json,
        personal_markdown,
        personal_summary,
        personal_table,
    )
    from fedjax_qp.reports.plots import plot_comparison

    loaded = comparison.load_runs(list(runs))
    rows = comparison.summary(loaded, last=last, target=target, baseline=baseline)
    console = Console()
    console.print(rendering.table(rows))
    files = {ending: output.with_name(f"{output.name}.{ending}") for ending in ("md", "json", "png")}
    with writing(output):
        files["md"].write_text(rendering.to_markdown(rows))
        files["json"].write_text(rendering.to_json(rows))
        plot_comparison(loaded, files["png"])
    console.print(f"figure: {files['png']}", markup=False)
    if has_personal(loaded):
        personal = personal_summary(loaded, baseline=baseline)
        console.print(personal_table(personal))
        with writing(output):
            output.with_name(f"{output.name}-clients.md").write_text(personal_markdown(personal))
            output.with_name(f"{output.name}-clients.json").write_text(personal_json(personal))
    return 0


def _check_comparison(runs: Sequence[Path], last: int, target: float | None) -> None:
    if not runs:
        raise ConfigurationError("no run is named: give one or more run folders, such as runs/mnist5k-seed0.")
    if last < 1:
        raise ConfigurationError(f"--last {last} must be at least 1, the number of evaluations.")
    if target is not None and not 0 < target <= 1:
        raise ConfigurationError(f"--target {target} must be above 0 and at most 1, an accuracy such as 0.9.")


def report(
    runs: Runs,
    *,
    output: Output = None,
    last: int = 10,
    target: Annotated[float | None, UNSET] = None,
    baseline: Annotated[str | None, UNSET] = None,
) -> int:
    """Writes one HTML file that shows a run, or compares several; it opens in any browser without a server.

    Args:
      runs: run folders.
      output: the file; default report.html in the folder of a single run, comparison.html for several.
      last: in a comparison, number of last evaluations that an accuracy is averaged over.
      target: reports the rounds to reach this accuracy.
      baseline: name of the method that paired differences are taken to.
    """
    _check_comparison(runs, last, target)
    from fedjax_qp.reports.html import write_report

    output = output or (RunFolder(runs[0]).report if len(runs) == 1 else Path("comparison.html"))
    with writing(output):
        write_report(list(runs), output, last=last, target=target, baseline=baseline)
    Console().print(f"report: {output}", markup=False)
    return 0


def inspect(
    runs: Runs,
    *,
    what: Instruments = (),
    plugins: Plugins = (),
    round: Annotated[int | None, UNSET] = None,
    output: Output = None,
    settings: Annotated[Settings, tyro.conf.OmitArgPrefixes] = Settings(),  # noqa: B008 (frozen)
) -> int:
    """Looks at runs' checkpoints: loss surface, sharpness, curvature, conflict, mutations, fairness. Files go to RUN/inspect.

    Args:
      runs: run folders; several are printed side by side.
      what: instruments; default all that fit the method.
      plugins: as in `resume`.
      round: of the checkpoint; default the newest.
      output: writes the table as a CSV file.
      settings: sizes and radii.
    """
    if not runs:
        raise ConfigurationError("no run is named: give one or more run folders, such as runs/mnist5k-seed0.")
    load_plugins(plugins)
    from fedjax_qp.instruments.inspection import inspect_runs, side_by_side, to_csv

    console = Console()
    found = inspect_runs(list(runs), what=what, round=round, settings=settings, console=console)
    console.print(side_by_side(found))
    if output is not None:
        with writing(output):
            to_csv(found, output)
    for one in found:
        if one.files:
            console.print(f"numbers and figures: {one.files[0].parent}", markup=False)
    return 0
