"""`fedjax-qp check FILE`: the laws, on whatever a file registers."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from fedjax_qp.contract.federations import images, language
from fedjax_qp.contract.laws import Candidate, methods_laws
from fedjax_qp.contract.parts import parts_laws
from fedjax_qp.experiment.parts import REGISTRIES
from fedjax_qp.registry import ConfigurationError, Registry, unknown_name
from fedjax_qp.settings import plugins


class Finding(NamedTuple):
    """What came of one law."""

    part: str  # a kind and a name, such as "algorithm slow_average"
    law: str
    reason: str | None  # None: it holds

    @property
    def passed(self) -> bool:
        return self.reason is None


class Registered(NamedTuple):
    """A function that a file has registered."""

    registry: Registry
    name: str
    options: dict[str, Any]

    @property
    def title(self) -> str:
        return f"{self.registry.kind} {self.name}"


def check(files: Sequence[str], options: Sequence[tuple[str, Any]] = ()) -> Iterator[Finding]:
    """Runs plug-ins and yields what came of each law for each part that they register, one after another.

    Args:
      files: absolute paths or modules, see `plugins.located`.
      options: values of options by dotted name, such as "slow_average.step_size"; needed where there is no default.

    Raises:
      ConfigurationError: a file cannot be run or registers nothing, or an option is unknown, missing or ill-typed.
    """
    before = {registry: registry.functions for registry in REGISTRIES.values()}
    plugins.load(files)
    found = [
        (registry, name)
        for registry in REGISTRIES.values()
        for name, function in registry.functions.items()
        if before[registry].get(name) is not function or _is_of(function, files)
    ]
    if not found:
        raise ConfigurationError(
            f"{', '.join(files)} registers nothing: decorate a function with, say, @algorithms.register."
        )
    given = _by_name(options, [name for _, name in found])
    parts = [Registered(registry, name, registry.resolve(name, given.get(name, {}))) for registry, name in found]
    for part in parts:
        for law, hold in _laws(part).items():
            yield Finding(part.title, law, _broken(hold))


def _laws(part: Registered) -> dict[str, Callable[[], None]]:
    """The laws of a part, ready to be called."""
    if part.registry is not REGISTRIES["algorithm"]:
        return parts_laws(part.registry, part.name, part.options)
    candidate: list[Candidate] = []

    def with_candidate(law: Callable[[Candidate], None]) -> None:
        if not candidate:
            candidate.append(_candidate(part))
        law(candidate[0])

    return {name: lambda law=law: with_candidate(law) for name, law in methods_laws().items()}


def _candidate(part: Registered) -> Candidate:
    """The method on the federation that it is for."""
    function, options = part.registry[part.name], part.registry.own(part.options)
    declared = function(images().model, images().optimizer, **options)
    federation = language(declared.rank_factor) if declared.tunes_adapters else images()
    return Candidate(function(federation.model, federation.optimizer, **options), federation)


def _broken(hold: Callable[[], None]) -> str | None:
    """Why a law does not hold, in one line; None where it does."""
    try:
        hold()
    except Exception as error:  # anything can be in there
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        kind = "" if isinstance(error, AssertionError | ConfigurationError) else f"{type(error).__name__}: "
        return kind + (lines[0] if lines else "it failed")
    return None


def _is_of(function: Callable, files: Sequence[str]) -> bool:
    """Whether a function stands in one of the files or modules, also where they were run before."""
    return inspect.unwrap(function).__code__.co_filename in files or function.__module__ in files


def _by_name(options: Sequence[tuple[str, Any]], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for key, value in options:
        name, dot, option = key.partition(".")
        if name not in names or not dot:
            raise unknown_name("option", key, [f"{one}.…" for one in names])
        found.setdefault(name, {})[option] = value
    return found
