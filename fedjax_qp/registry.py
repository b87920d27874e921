"""Names for the interchangeable parts: algorithms, data sources, partitions, models.

A part is a function whose keyword-only arguments are its options. The signature is the single place where an option, its
type and its default are written; configuration files, error messages and `fedjax-qp list` all read it from there. Its `float`
means a finite number and its `int` one of sane size, see `settings.values`.
"""

import difflib
import importlib
import inspect
import os
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any

import pydantic

from fedjax_qp.settings.values import checkable, shown


class ConfigurationError(ValueError):
    """A setting that cannot work; the message names the value, what is allowed and what to do."""


# What other simulators and the papers' code call things, in the words used here.
_USUAL = {
    **{"lr": "learning_rate", "eta": "learning_rate", "bs": "batch_size", "wd": "weight_decay", "opt": "optimizer"},
    **{"mu": "proximal", "epoch": "epochs", "round": "rounds", "num_rounds": "rounds", "num_clients": "clients"},
    **{
        "server_lr": "server_learning_rate",
        "temp": "temperature",
        "clients_per_round": "cohort",
        "grad_clip": "clip_norm",
    },
}
# What a data set may consist of, and a model take; what each kind means for a run is in `tasks`.
EXAMPLES = ("images", "rows", "characters", "instructions")
_MOST_NAMES = 12  # listed in a message


def require(condition: Any, message: str) -> None:
    """Raises a ConfigurationError unless a condition holds."""
    if not condition:
        raise ConfigurationError(message)


def unknown_name(kind: str, name: str, valid: Iterable[str], elsewhere: Iterable[str] = ()) -> ConfigurationError:
    """Returns the error for a name that does not exist.

    Args:
      valid: the names that could stand in its place; the nearest are named first, and the others only where they are few.
      elsewhere: further ones that may have been meant, in full.
    """
    valid = sorted(set(valid))
    nearest = nearest_names(str(name), list(dict.fromkeys([*valid, *elsewhere])))
    hint = f"did you mean {' or '.join(nearest)}? " if nearest else ""
    listed = ", ".join(valid[:_MOST_NAMES]) or "none"
    more = f", … ({len(valid)} in all)" if len(valid) > _MOST_NAMES else ""
    return ConfigurationError(f"unknown {kind} {shown(name)}: {hint}Valid: {listed}{more}.")


def nearest_names(name: str, names: list[str]) -> list[str]:
    """At most three names: those with the same last part, in these words or in usual ones, or else those spelt alike."""
    last = name.rpartition(".")[2].lower().replace("-", "_")
    same = [one for one in names if one.rpartition(".")[2] in (last, _USUAL.get(last))] if last != "yaml" else []
    return same[:3] or difflib.get_close_matches(name, names, n=3, cutoff=0.5)


def is_zero(value: Any) -> bool:
    """Whether a setting is a plain 0, whose arithmetic can be left out. An array, of runs that share a program, is not."""
    return isinstance(value, int | float) and value == 0


MOST_REASONS = 3  # of a value, in a message: a list may be wrong in every place


class Registry:
    """Functions of one kind by name; see the module docstring."""

    def __init__(self, kind: str, common: Callable | None = None, *, declares_examples: bool = False):
        """Args:
        kind: what its entries are, for messages.
        common: a function whose keyword-only parameters are options of every entry, which are not handed to the entry.
        declares_examples: whether entries say which kinds of examples they give or take, see `EXAMPLES`.
        """
        self.kind = kind
        self._declares_examples = declares_examples
        self._examples: dict[Callable, tuple[str, ...]] = {}
        self._functions: dict[str, Callable] = {}
        self._common = {} if common is None else _keyword_only(common)
        self._adapters: dict[
            tuple[Callable, str], pydantic.TypeAdapter
        ] = {}  # making one takes far longer than using it

    def register(self, *given: Any) -> Callable:
        """Decorator: adds a function under its own name, in place of what the same file or notebook registered under it.

        Args:
          *given: the function; or, where entries declare them, the kinds of examples: `@models.register("images", "rows")`.

        Raises:
          ConfigurationError: the name is another's, or one of its options is one that all entries have.
        """
        if not self._declares_examples:
            return self._add(*given)
        example = f'@….register("{EXAMPLES[0]}")'
        if not given or not all(isinstance(kind, str) for kind in given):
            raise ConfigurationError(
                f"a {self.kind} says what its examples are: {example}, or {', '.join(EXAMPLES[1:])}."
            )
        for kind in given:
            if kind not in EXAMPLES:
                raise unknown_name("kind of examples", kind, EXAMPLES)

        def add(function: Callable) -> Callable:
            self._examples[function] = given
            return self._add(function)

        return add

    def _add(self, function: Callable) -> Callable:
        other = self._functions.get(function.__name__)
        require(
            other is None or not _places(other).isdisjoint(_places(function)),
            f"{self.kind} {function.__name__!r} is registered already, by {getattr(other, '__module__', '')}: give yours "
            "another name.",
        )
        taken = sorted(self._common.keys() & _keyword_only(function).keys())
        if taken:
            raise ConfigurationError(
                f"{self.kind} {function.__name__!r} has the option {taken[0]!r}, which every {self.kind} has already: give "
                "it another name."
            )
        self._functions[function.__name__] = function
        return function

    @property
    def functions(self) -> dict[str, Callable]:
        """The functions by name, as they are now."""
        return dict(self._functions)

    def names(self, examples: Iterable[str] | None = None) -> list[str]:
        """The names of all entries, or of those that declare one of these kinds of examples."""
        wanted = None if examples is None else set(examples)
        return sorted(name for name in self._functions if wanted is None or wanted & set(self.examples(name)))

    def examples(self, name: str) -> tuple[str, ...]:
        """The kinds of examples that an entry declares."""
        return self._examples.get(self[name], ())

    def __getitem__(self, name: str) -> Callable:
        if name not in self._functions:
            raise unknown_name(self.kind, name, self._functions)
        return self._functions[name]

    def options(self, name: str) -> dict[str, inspect.Parameter]:
        """The keyword-only parameters of one entry, and those that all entries have."""
        return _keyword_only(self[name]) | self._common

    def own(self, options: dict[str, Any]) -> dict[str, Any]:
        """Of the options of an entry, those that it takes itself."""
        return {key: value for key, value in options.items() if key not in self._common}

    def resolve(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        """Checks options by name and type and fills in the defaults.

        Raises:
          ConfigurationError: an option is unknown, missing or of the wrong type.
        """
        parameters = self.options(name)
        for key in given:
            if key not in parameters:
                raise unknown_name(f"option of {self.kind} {name!r}", key, parameters)
        resolved = {}
        for key, parameter in parameters.items():
            if key in given:
                resolved[key] = self.checked(name, key, given[key])
            elif parameter.default is inspect.Parameter.empty:
                raise ConfigurationError(f"{self.kind} {name!r} needs the option {key!r} ({parameter.annotation}).")
            else:
                resolved[key] = parameter.default
        return resolved

    def build(self, name: str, *arguments: Any, **options: Any) -> Any:
        """Calls the entry with its checked options."""
        return self[name](*arguments, **self.own(self.resolve(name, options)))

    def checked(self, name: str, key: str, value: Any) -> Any:
        """One option's value, as its type reads it.

        Raises:
          ConfigurationError: the value is not of the type.
        """
        try:
            return self._adapter(name, key).validate_python(value)
        except pydantic.ValidationError as error:
            found = dict.fromkeys(reason(item["type"], item["msg"]) for item in error.errors(include_url=False))
            reasons = ", or ".join(list(found)[:MOST_REASONS])
            raise ConfigurationError(f"{self.kind} {name!r}: {key} = {shown(value)} {reasons}.") from None

    def _adapter(self, name: str, key: str) -> pydantic.TypeAdapter:
        place = (self[name], key)
        if place not in self._adapters:
            self._adapters[place] = pydantic.TypeAdapter(checkable(self.options(name)[key].annotation))
        return self._adapters[place]


def _places(function: Callable) -> set[str]:
    """Where a function comes from: its module, and its file where there is one (a notebook's cells have none)."""
    file = getattr(getattr(inspect.unwrap(function), "__code__", None), "co_filename", "")
    return {function.__module__} | ({os.path.realpath(file)} if os.path.isfile(file) else set())


def import_modules(package: str, path: Iterable[str]) -> None:
    """Imports every module of a package, so that what they register is known: a new part is a new file."""
    for module in pkgutil.walk_packages(path, f"{package}."):
        importlib.import_module(module.name)


def _keyword_only(function: Callable) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters
    return {key: p for key, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


_KINDS = {
    "tuple": "must be a list, such as [1, 2]",
    "list": "must be a list, such as [1, 2]",
    "int": "must be a whole number, such as 10",
    "float": "must be a number, such as 0.1",
    "bool": "must be true or false",
}


def reason(kind: str, message: str) -> str:
    """What pydantic found, in the words of a configuration file: "must be …"."""
    if kind == "missing":
        return "is missing"
    sort, _, rest = kind.partition("_")
    if sort in _KINDS and rest in ("type", "parsing", "from_float"):
        return _KINDS[sort]
    if rest == "parsing_size":
        return "is too large"
    return message.replace("Input should", "must")
