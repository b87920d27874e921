"""Configurations that come with the package, by name (`@mnist5k`), and a first one of one's own.

An installed package carries those of `configs/` that run as they stand; a checkout has them all.
"""

from pathlib import Path

from fedjax_qp.registry import ConfigurationError, unknown_name

_PACKAGE = Path(__file__).parents[1]
_FOLDERS = (_PACKAGE / "presets", _PACKAGE.parent / "configs")  # of a wheel, of a checkout

_FIRST = """\
# {name}: what one run is made of. Settings that are left out have their defaults.
# Command:  fedjax-qp run {file}
# Changes:  ... rounds=100 algorithm=fedavg name=another          several seeds: ... --seeds 0 1 2
# Options:  fedjax-qp list                (all parts)       fedjax-qp list fedqp    (one of them)
#           fedjax-qp list local          (this group of settings; likewise participation, engine, evaluation, …)
name: {name}                      # the run's folder is runs/{name}-seed0
seed: 0
rounds: 20

# The data, and which client gets what of them. Your own: {{name: arrays, path: mine.npz}}
data: mnist5k
partition: {{name: dirichlet, clients: 50, beta: 0.1, minimum: 5}}    # a smaller beta makes clients differ more
model: lenet

# The method.
algorithm: {{name: fedqp, form: nearest, alpha: 1.0}}

# A client's work in a round, and how many clients take part.
local: {{optimizer: sgd, learning_rate: 0.01, momentum: 0.9, epochs: 5, batch_size: 20}}
participation: {{cohort: 10}}

# lanes are clients trained side by side: auto measures how many are best. A checkpoint is saved after each chunk of rounds.
engine: {{lanes: auto, rounds_per_chunk: 5}}
evaluation: {{every: 1}}
"""


def located(path: Path) -> Path:
    """The file of a preset, where a path is one's name after an @; any other path as it is.

    Raises:
      ConfigurationError: there is no such preset; the nearest are named.
    """
    name = str(path)
    if not name.startswith("@"):
        return path
    known = names()
    if name[1:].removesuffix(".yaml") not in known:
        raise unknown_name("preset", name, [f"@{one}" for one in known])
    return known[name[1:].removesuffix(".yaml")]


def names() -> dict[str, Path]:
    """All presets, with their files."""
    folder = next((one for one in _FOLDERS if one.is_dir()), _FOLDERS[0])
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def write_first(name: str) -> Path:
    """Writes a commented configuration, NAME.yaml, into the current folder; returns its path.

    Raises:
      ConfigurationError: the name cannot be that of a run, there is such a file already, or it cannot be written.
    """
    name = name.removesuffix(".yaml")
    file = Path(f"{name}.yaml")
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ConfigurationError(f"new {name!r}: a name consists of letters, digits, - and _.")
    try:
        with file.open("x", encoding="utf-8") as opened:
            opened.write(_FIRST.format(name=name, file=file))
    except FileExistsError:
        raise ConfigurationError(f"{file} is there already: choose another name, or remove it.") from None
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be written ({error.strerror}): choose another folder.") from None
    return file
