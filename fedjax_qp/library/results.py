"""What runs left, for a notebook: tables of pandas, comparisons, figures and parameters."""

import glob
import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from fedjax_qp.registry import ConfigurationError, unknown_name
from fedjax_qp.reports import compare as comparing
from fedjax_qp.reports import rendering
from fedjax_qp.reports.personal import VIEWS, PersonalRow, has_personal, personal_grid, personal_summary, quantity
from fedjax_qp.runs import record_numbers
from fedjax_qp.runs.folder import RunFolder

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from fedjax_qp.federated import Params
    from fedjax_qp.instruments.settings import Settings, What

Folders = Union[str, Path, "Runs"]


class Runs:
    """Finished runs, or as far as they came: several methods, several seeds each.

    Their records are in memory; checkpoints and all else lie in their folders, see `fq.run` for whose these are.

    Examples:
      >>> runs = fq.load("runs/mine-seed*")
      >>> runs.frame().groupby("method")["test_accuracy"].max()
    """

    def __init__(self, folders: Sequence[Path]):
        """Reads run folders.

        Raises:
          ConfigurationError: a folder is not a run folder, or a file in it is damaged.
        """
        self.runs = comparing.load_runs(folders)

    @property
    def folders(self) -> list[Path]:
        """The runs' folders."""
        return [run.folder for run in self.runs]

    def frame(self) -> "pd.DataFrame":
        """The records: a row for each method, seed and round.

        Returns:
          Columns `method`, `seed`, `round` and every number of the records under its own name, inner ones as
          "client_accuracy/q10"; NaN where a round has none (no evaluation) or it is not finite.

        Examples:
          >>> runs.frame().pivot(index="round", columns=["method", "seed"], values="test_accuracy")
        """
        import pandas as pd

        return pd.DataFrame(
            [
                {**head, "round": record["round"], **dict(record_numbers.scalars(record))}
                for head, record in self._records()
            ]
        )

    def clients(self) -> "pd.DataFrame":
        """The clients one by one: a row for each method, seed, evaluated round, view and client.

        Returns:
          Columns `method`, `seed`, `round`, `view` ("aggregated": the client's model after the server's last aggregation;
          "tuned": as it left its own training), `client`, and `loss`, `accuracy` and of language models `perplexity` on the
          client's own tests, NaN where it has none.

        Raises:
          ConfigurationError: no client has tests of its own.

        Examples:
          >>> runs.clients().query("view == 'aggregated'").groupby("client")["accuracy"].last()
        """
        import pandas as pd

        tables = []
        for head, record in self._records():
            for view, key in VIEWS.items():
                values = {
                    name: pd.Series(group["clients"], dtype=float)
                    for name, group in record.get(key, {}).items()
                    if isinstance(group, dict)
                }
                if values:
                    table = pd.DataFrame({**head, "round": record["round"], "view": view, **values})
                    table.insert(4, "client", table.index)
                    tables.append(table)
        if not tables:
            raise ConfigurationError(
                "these runs did not test their clients one by one: give the partition test='matched' or test='own', such as "
                "fq.iid(clients=10, test='own')."
            )
        return pd.concat(tables, ignore_index=True)

    def compare(self, baseline: str | None = None, *, last: int = 10, target: float | None = None) -> "Comparison":
        """Each method over its seeds, beside a baseline.

        Args:
          baseline: the method that differences are taken to, seed by seed.
          last: accuracies are means over so many last evaluations (all, where there are fewer).
          target: an accuracy, 0 to 1: reports the rounds to reach it.

        Raises:
          ConfigurationError: no method has the baseline's name, or a number is out of range.

        Examples:
          >>> runs.compare(baseline="FedAvg", target=0.9)
        """
        rows = comparing.summary(self.runs, last=last, target=target, baseline=baseline)
        personal = personal_summary(self.runs, baseline=baseline) if has_personal(self.runs) else []
        return Comparison(rows, personal)

    def plot(self, metric: str = "test_accuracy", path: str | Path | None = None) -> "Figure":
        """Draws a number of the records over rounds: a line for each method, a band of ± one standard deviation over seeds.

        Args:
          metric: a column of `frame`, such as "train_loss" or "client_accuracy/q10".
          path: writes the figure as well; its ending chooses the format (.png, .pdf, .svg).

        Raises:
          ConfigurationError: no record has such a number; the nearest are named.

        Examples:
          >>> runs.plot("train_loss", "loss.pdf")
        """
        known = {name for _, record in self._records() for name, _ in record_numbers.scalars(record)}
        if metric not in known:
            raise unknown_name("metric", metric, known)
        from fedjax_qp.reports.plots import plot_metric, save

        figure = plot_metric(self.runs, metric)
        if path is not None:
            save(figure, path)
        return figure

    def params(self, method: str | None = None, seed: int | None = None, client: int | None = None) -> "Params":
        """The parameters of a model after the last checkpoint.

        Args:
          method: whose; may be left out where there is but one.
          seed: likewise.
          client: the model that this client is served; default the server's.

        Returns:
          `trainable`, `statistics` and `masks`, trees of numpy arrays.

        Raises:
          ConfigurationError: it is not one run that is named, or that has no checkpoint or client.

        Examples:
          >>> runs.params("FedQP", seed=0).trainable
        """
        chosen = [run.folder for label, run in self._labelled() if _is(method, label) and _is(seed, _seed(run))]
        if len(chosen) != 1:
            there = "; ".join(f"{label!r}, seed {_seed(run)}" for label, run in self._labelled())
            raise ConfigurationError(
                f"method = {method!r}, seed = {seed!r} names {len(chosen)} runs: choose of {there}."
            )
        from fedjax_qp.engine import host_copy
        from fedjax_qp.runs.export import client_params
        from fedjax_qp.runs.run import restore

        return host_copy(client_params(*restore(chosen[0]), client, "aggregated"))

    def __len__(self) -> int:
        return len(self.runs)

    def __repr__(self) -> str:
        return f"{len(self)} run{'s' if len(self) > 1 else ''}\n{self.compare()!r}"

    def _repr_html_(self) -> str:
        return self.compare()._repr_html_()

    def _labelled(self) -> list[tuple[str, comparing.Run]]:
        """All runs with their methods' labels, method by method and by seed."""
        return [(method.label, run) for method in comparing.methods(self.runs) for run in method.runs]

    def _records(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """All records, each with what tells its run from the others."""
        for label, run in self._labelled():
            for record in run.records:
                yield {"method": label, "seed": _seed(run)}, record


class Comparison:
    """Methods side by side; a notebook shows it as a table.

    `rows` holds the numbers, see `reports.compare.Row`; `personal` those of clients with tests of their own.

    Examples:
      >>> print(runs.compare(baseline="FedAvg"))
    """

    def __init__(self, rows: list[comparing.Row], personal: list[PersonalRow]):
        self.rows, self.personal = rows, personal

    def frame(self) -> "pd.DataFrame":
        """A row for each method, named by it.

        Returns:
          For each quantity its mean over seeds, and as "…_std" the sample standard deviation; accuracies are shares, 0 to 1.
          `difference` is in percentage points, the method minus the baseline, paired by seed.

        Examples:
          >>> runs.compare(baseline="FedAvg").frame()["difference"]
        """
        import pandas as pd

        return pd.DataFrame([_flat(row) for row in self.rows]).set_index("method").dropna(axis="columns", how="all")

    def markdown(self) -> str:
        """The table with its notes in Markdown.

        Examples:
          >>> Path("table.md").write_text(comparison.markdown())
        """
        from fedjax_qp.reports.personal import personal_markdown

        return rendering.to_markdown(self.rows) + (f"\n{personal_markdown(self.personal)}" if self.personal else "")

    def __repr__(self) -> str:
        return self.markdown()

    def _repr_html_(self) -> str:
        tables = [_html_table(*rendering.grid(self.rows))]
        if self.personal:
            tables += [f"<p>{quantity(self.personal)}</p>", _html_table(*personal_grid(self.personal))]
        return "\n".join([*tables, *(f"<p>{html.escape(note)}</p>" for note in rendering.notes(self.rows))])


def load(*folders: Folders) -> Runs:
    """Reads runs that the command line, a sweep or `fq.run(…, folder=…)` has left.

    Args:
      *folders: run folders, folders with run folders at any depth (such as a sweep's), patterns such as "runs/mine-seed*", or
        runs that are loaded already.

    Raises:
      ConfigurationError: there is no run, or a file in it is damaged.

    Examples:
      >>> fq.load("runs/mine-seed*", "runs/other-seed*").compare(baseline="mine")
    """
    return Runs(list(dict.fromkeys(found for folder in folders for found in _run_folders(folder))))


def compare(*runs: Folders, baseline: str | None = None, last: int = 10, target: float | None = None) -> Comparison:
    """Compares runs, see `Runs.compare`; they may be given as in `fq.load`.

    Examples:
      >>> fq.compare("runs/mine-seed*", "runs/other-seed*", baseline="mine")
    """
    return load(*runs).compare(baseline, last=last, target=target)


def inspect(
    *runs: Folders,
    what: "Sequence[What]" = (),
    round: int | None = None,
    settings: "Settings | None" = None,
) -> "pd.DataFrame":
    """Looks at runs' checkpoints: loss surface, sharpness, curvature, conflict, mutations, fairness.

    Numbers and figures are written into `inspect` in each run's folder as well.

    Args:
      *runs: as in `fq.load`.
      what: instruments; default all that fit the method.
      round: of the checkpoint; default the newest.
      settings: sizes and radii, see `instruments.settings.Settings`.

    Returns:
      Columns `run`, `round`, `instrument`, `quantity`, `value`.

    Raises:
      ConfigurationError: an instrument does not exist or fits none of the runs, or there is no such checkpoint.

    Examples:
      >>> fq.inspect(runs, what=["sharpness"])
    """
    import pandas as pd

    from fedjax_qp.instruments.inspection import inspect_runs

    found = inspect_runs(load(*runs).folders, what=what, round=round, settings=settings)
    return pd.DataFrame(
        [
            {"run": one.label, "round": one.round, "instrument": instrument, "quantity": name, "value": value}
            for one in found
            for instrument, quantities in one.headlines.items()
            for name, value in quantities.items()
        ]
    )


def _run_folders(given: Folders) -> list[Path]:
    if isinstance(given, Runs):
        return given.folders
    folder = Path(given).expanduser()
    matching = [folder] if folder.exists() else [Path(path) for path in sorted(glob.glob(str(folder)))]
    found = [run.path for place in matching for run in RunFolder.within(place)]
    if not found:
        name = RunFolder(folder).records_file.name
        raise ConfigurationError(f"{given} is no run folder and holds none: give folders with a {name}.")
    return found


def _seed(run: comparing.Run) -> int:
    return run.config.get("seed", 0)


def _is(wanted: Any, found: Any) -> bool:
    return wanted is None or wanted == found


def _flat(row: comparing.Row) -> dict[str, Any]:
    """A row's numbers under plain names."""
    found: dict[str, Any] = {"method": row.method, "seeds": len(row.seeds)}
    spreads = {name: getattr(row, name) for name in ("perplexity", "accuracy", "final", "best", "worst_decile")}
    spreads |= row.watched
    spreads["difference"] = None if row.difference is None else row.difference.points
    for name, spread in spreads.items():
        found[name], found[f"{name}_std"] = (None, None) if spread is None else (spread.mean, spread.std)
    return found | {"rounds_to_target": None if row.reached is None else row.reached.median}


def _html_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    import pandas as pd

    return pd.DataFrame(rows, columns=list(headings)).to_html(index=False, border=0)
