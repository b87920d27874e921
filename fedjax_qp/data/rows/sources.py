"""Sources of rows: tables in files, scikit-learn's bundled sets, and FedProx's synthetic clients.

Nothing here downloads. A table becomes numbers: truth values 0 and 1, columns of texts one column for each text.
"""

import importlib.metadata
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from fedjax_qp.data.cached import brief
from fedjax_qp.data.dataset import Dataset
from fedjax_qp.data.images.prepared import import_module
from fedjax_qp.data.registry import sources
from fedjax_qp.data.rows.dataset import build_rows, split
from fedjax_qp.registry import ConfigurationError, require, unknown_name

if TYPE_CHECKING:
    import pandas as pd

Share = Annotated[float, Field(gt=0, lt=1)]


@sources.register("rows")
def csv(
    *,
    path: str,
    label: tuple[str, ...] | str,
    client: str | None = None,
    test_path: str | None = None,
    test_share: Share = 0.2,
    separator: str = ",",
) -> Dataset:
    """A table of your own, a CSV file with a line of names.

    Whole numbers and texts in the label are classes, fractions are numbers to predict; several columns of 0 and 1 are labels
    of which several may apply. All other columns are inputs: numbers, or texts, which get a column each.

    Args:
      path: the file; a .gz, .zip or .xz is unpacked.
      label: the column to predict, or several.
      client: the column that says whose each row is, for `partition: natural`; it is no input.
      test_path: a table of the same columns to test on; None holds out a share of the rows.
      test_share: of the rows (of each class), the same in every run.
      separator: between columns.

    Raises:
      ConfigurationError: a file cannot be read, a column is missing, or cells are empty.
    """
    import pandas as pd

    def read(file: Path) -> "pd.DataFrame":
        return pd.read_csv(file, sep=separator)

    return _table(read, path, test_path, label, client, test_share)


@sources.register("rows")
def parquet(
    *,
    path: str,
    label: tuple[str, ...] | str,
    client: str | None = None,
    test_path: str | None = None,
    test_share: Share = 0.2,
) -> Dataset:
    """A table of your own, a Parquet file; options as for `csv`. It needs the package pyarrow."""
    import pandas as pd

    import_module("pyarrow", "pyarrow")
    return _table(pd.read_parquet, path, test_path, label, client, test_share)


@sources.register("rows")
def breast_cancer(*, test_share: Share = 0.2) -> Dataset:
    """569 tumours by 30 measures of their cells, benign or malignant; it comes with scikit-learn.

    Source: Street, Wolberg and Mangasarian, "Nuclear feature extraction for breast tumor diagnosis", UCI, 1993.

    Args:
      test_share: of the rows of each class, the same in every run.
    """
    return _bundled("load_breast_cancer", test_share)


@sources.register("rows")
def wine(*, test_share: Share = 0.2) -> Dataset:
    """178 Italian wines of three growers by 13 chemical measures; it comes with scikit-learn.

    Source: Aeberhard and Forina, "Wine", UCI, 1991.

    Args:
      test_share: of the rows of each class, the same in every run.
    """
    return _bundled("load_wine", test_share)


@sources.register("rows")
def diabetes(*, test_share: Share = 0.2) -> Dataset:
    """442 patients by 10 measures: how far diabetes went in a year, a number; it comes with scikit-learn.

    Source: Efron, Hastie, Johnstone and Tibshirani, "Least angle regression", Annals of Statistics, 2004.

    Args:
      test_share: of the rows, the same in every run.
    """
    return _bundled("load_diabetes", test_share)


@sources.register("rows")
def synthetic(
    *,
    alpha: Annotated[float, Field(ge=0)] = 1.0,
    beta: Annotated[float, Field(ge=0)] = 1.0,
    clients: Annotated[int, Field(ge=1, le=100_000)] = 30,
    features: Annotated[int, Field(ge=1, le=10_000)] = 60,
    classes: Annotated[int, Field(ge=2, le=1000)] = 10,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> Dataset:
    """Synthetic(α, β): each client has a linear classifier and a mean of its own; `partition: natural` gives the clients.

    Source: Li et al., "Federated optimization in heterogeneous networks" (FedProx), MLSys 2020, 5.1, as in the authors' code:
    α and β are standard deviations, a client has 50 rows and a log-normal number (4, 2) besides, and 90 % of them are for
    training. The random numbers are numpy's new generator's, so that the rows are not those of their files.

    Args:
      alpha: how much the clients' classifiers differ.
      beta: how much their inputs do.
      clients: K.
      features: of a row.
      classes: C.
      seed: of the data; the run's own seed does not change them.
    """
    numbers = np.random.default_rng(seed)
    sizes = numbers.lognormal(4, 2, clients).astype(np.int64) + 50
    deviations = np.arange(1, features + 1) ** -0.6  # of a covariance of j^-1.2
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"train": [], "test": []}
    for size in sizes:
        centre, shift = numbers.normal(0, alpha), numbers.normal(0, beta)
        means = numbers.normal(shift, 1, features)
        weights, bias = numbers.normal(centre, 1, (features, classes)), numbers.normal(centre, 1, classes)
        rows = means + deviations * numbers.normal(size=(size, features))
        labels = (rows @ weights + bias).argmax(1)
        end = int(0.9 * size)
        parts["train"].append((rows[:end], labels[:end]))
        parts["test"].append((rows[end:], labels[end:]))
    pairs = []
    for part in parts.values():
        rows, labels = zip(*part, strict=True)
        pairs.append((np.concatenate(rows), np.concatenate(labels)))
    owner = np.repeat(np.arange(clients), [len(labels) for _, labels in parts["train"]])
    return build_rows(*pairs, names=tuple(map(str, range(classes))), client_ids=owner)


def _bundled(name: str, test_share: float) -> Dataset:
    bunch = getattr(import_module("sklearn.datasets", "scikit-learn"), name)()
    names = tuple(map(str, getattr(bunch, "target_names", ())))
    train, test = split(bunch.target, test_share)
    note = f"scikit-learn {importlib.metadata.version('scikit-learn')}: {len(train)} rows to train on, {len(test)} to test on"
    pairs = [(bunch.data[some], bunch.target[some]) for some in (train, test)]
    return build_rows(*pairs, names=names, notes=(note,))


def _table(
    read: Any, path: str, test_path: str | None, label: tuple[str, ...] | str, client: str | None, test_share: float
) -> Dataset:
    import pandas as pd

    labels = [label] if isinstance(label, str) else list(label)
    file = Path(os.path.expanduser(path))
    train = _read(read, file)
    for column in (*labels, *([client] if client else [])):
        if column not in train.columns:
            raise unknown_name(f"column of {file}", column, map(str, train.columns))
    if test_path is None:
        target = train[labels].to_numpy()
        chosen, held_out = split(target[:, 0] if len(labels) == 1 else target, test_share)
        train, test = train.iloc[chosen], train.iloc[held_out]
    else:
        test = _read(read, Path(os.path.expanduser(test_path)))
        missing = [str(column) for column in train.columns if column not in test.columns and column != client]
        require(not missing, f"{test_path} lacks the columns {', '.join(missing)} of {file}.")
    empty = pd.concat([train, test])[train.columns].isna().sum()
    gaps = ", ".join(f"{column} ({count})" for column, count in empty.items() if count)
    require(not gaps, f"{file} has empty cells in {gaps}: fill them, or leave these rows or columns out.")
    inputs = train.columns.difference([*labels, client], sort=False)
    require(len(inputs) > 0, f"{file} has no columns but the label: it needs others to predict it from.")
    encoded = pd.get_dummies(pd.concat([train[inputs], test[inputs]]), dtype=float)
    kinds = {str(column): kind for column, kind in encoded.dtypes.items() if kind.kind not in "iufb"}
    require(not kinds, f"{file}: the columns {', '.join(kinds)} are neither numbers nor texts: turn them into numbers.")
    rows = encoded.to_numpy(np.float64)
    targets = [part[labels[0]] if len(labels) == 1 else part[labels] for part in (train, test)]
    codes = [target.to_numpy() for target in targets]
    names = tuple(labels) if len(labels) > 1 else ()
    if len(labels) == 1 and codes[0].dtype.kind in "iu":
        codes, names = _renumbered(codes)
    owners = None if client is None else train[client].astype(str).to_numpy().astype(str)
    note = f"{file.name}: {len(train)} rows of {rows.shape[1]} inputs to train on, {len(test)} to test on"
    pairs = [(rows[: len(train)], codes[0]), (rows[len(train) :], codes[1])]
    return build_rows(*pairs, names=names, client_ids=owners, notes=(note,))


def _renumbered(codes: list[np.ndarray]) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """Whole numbers that count anything as classes from 0, with their names."""
    found = np.unique(np.concatenate(codes))
    return [np.searchsorted(found, part) for part in codes], tuple(map(str, found.tolist()))


def _read(read: Any, file: Path) -> "pd.DataFrame":
    try:
        return read(file)
    except Exception as error:  # pandas raises whatever its parsers meet
        raise ConfigurationError(
            f"{file} cannot be read as a table ({brief(error)}): check the path and the format."
        ) from None
