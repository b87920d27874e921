"""Names for the interchangeable parts: algorithms, data sources, partitions, models.

A part is a function whose keyword-only arguments are its options. The signature is the single place where an option, its
type and its default are written; configuration files, error messages and `fedjax-qp list` all read it from there.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pydantic


class ConfigurationError(ValueError):
    """A setting that cannot work; the message names the value, what is allowed and what to do."""


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> ConfigurationError:
    """Returns the error for a name that does not exist, with the nearest valid names first."""
    valid = sorted(valid)
    nearest = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(nearest)}? " if nearest else ""
    return ConfigurationError(f"unknown {kind} {name!r}: {hint}Valid: {', '.join(valid) or 'none'}.")


def is_zero(value: Any) -> bool:
    """Whether a setting is a plain 0, whose arithmetic can be left out. An array, of runs that share a program, is not."""
    return isinstance(value, int | float) and value == 0


class Registry:
    """Functions of one kind by name; see the module docstring."""

    def __init__(self, kind: str):
        self.kind = kind
        self._functions: dict[str, Callable] = {}

    def register(self, function: Callable) -> Callable:
        """Decorator: adds `function` under its own name."""
        if function.__name__ in self._functions:
            raise ValueError(f"{self.kind} {function.__name__!r} is registered twice")
        self._functions[function.__name__] = function
        return function

    def names(self) -> list[str]:
        return sorted(self._functions)

    def __getitem__(self, name: str) -> Callable:
        if name not in self._functions:
            raise unknown_name(self.kind, name, self._functions)
        return self._functions[name]

    def options(self, name: str) -> dict[str, inspect.Parameter]:
        """The keyword-only parameters of one entry."""
        parameters = inspect.signature(self[name]).parameters
        return {key: p for key, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}

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
                resolved[key] = self._checked(name, key, parameter.annotation, given[key])
            elif parameter.default is inspect.Parameter.empty:
                raise ConfigurationError(f"{self.kind} {name!r} needs the option {key!r} ({parameter.annotation}).")
            else:
                resolved[key] = parameter.default
        return resolved

    def build(self, name: str, *arguments: Any, **options: Any) -> Any:
        """Calls the entry with its checked options."""
        return self[name](*arguments, **self.resolve(name, options))

    def _checked(self, name: str, key: str, annotation: Any, value: Any) -> Any:
        try:
            return pydantic.TypeAdapter(annotation).validate_python(value)
        except pydantic.ValidationError as error:
            reasons = ", or ".join(reason(item["type"], item["msg"]) for item in error.errors())
            raise ConfigurationError(f"{self.kind} {name!r}: {key} = {value!r} {reasons}.") from None


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
    return message.replace("Input should", "must")
