"""What was typed on the command line, before the parser sees it: slips are named with what was meant."""

import re
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from inspect import signature
from typing import get_type_hints

from fedjax_qp import config as configuration
from fedjax_qp.registry import ConfigurationError, nearest_names, unknown_name


def understood(arguments: list[str], commands: Mapping[str, Callable]) -> list[str]:
    """The arguments with seeds as the parser wants them.

    Args:
      commands: functions by their names; their parameters are the commands' options.

    Raises:
      ConfigurationError: there is no such command or option, and what was meant is named; or an option is given twice.
    """
    if not arguments or arguments[0].startswith("-"):
        return arguments
    name, *rest = arguments
    if name not in commands:
        raise unknown_name("command", name, commands)
    options = _options(commands[name])
    found = set()
    for place, argument in enumerate(rest):
        if not argument.startswith("--"):
            continue
        option, equals, value = argument.removeprefix("--").partition("=")
        known = option.replace("-", "_")
        if known not in options:
            raise _unknown_option(name, option, value if equals else "".join(rest[place + 1 : place + 2]), options)
        positive = known.removeprefix("no_")
        if positive in found:  # the parser takes the last one
            raise ConfigurationError(f"--{option} is given twice: keep one.")
        found.add(positive)
    for option in {"seeds", "plugins"} & options:
        rest = _with_values_apart(rest, f"--{option}")
    return [name, *rest]


def _options(command: Callable) -> set[str]:
    """The names of a command's options, with those of the groups of options that it takes."""
    found = {"help", "tyro_print_completion", "tyro_write_completion"}
    hints = get_type_hints(command)
    for parameter in signature(command).parameters.values():
        kind = hints[parameter.name]
        inner = {field.name: field.type for field in fields(kind)} if is_dataclass(kind) else {parameter.name: kind}
        found |= inner.keys() | {f"no_{name}" for name, of_what in inner.items() if of_what is bool}
    return found


def _unknown_option(command: str, option: str, value: str, options: set[str]) -> ConfigurationError:
    """Settings are not options: `--rounds 10` is meant to be `rounds=10`."""
    meant = [f"--{one.replace('_', '-')}" for one in nearest_names(option.replace("-", "_"), sorted(options))]
    if "overrides" in options:
        value = value if value and not value.startswith("-") else "…"
        meant = [
            f"{one}={value}" for one in nearest_names(option.replace("-", "_"), configuration.every_name())
        ] + meant
    hint = f" Did you mean {' or '.join(meant[:3])}?" if meant else ""
    rule = " Settings are written key=value, without dashes." if "overrides" in options else ""
    return ConfigurationError(
        f"`fedjax-qp {command}` has no option --{option}.{hint}{rule} See fedjax-qp {command} --help."
    )


def _with_values_apart(arguments: list[str], option: str) -> list[str]:
    """`--seeds=0,1` and `--seeds 0,1` as `--seeds 0 1`, and settings that follow the values before them."""
    places = [place for place, one in enumerate(arguments) if one.partition("=")[0] == option]
    if not places:
        return arguments
    start = places[0]
    end = next(
        (place for place in range(start + 1, len(arguments)) if arguments[place].startswith("--")), len(arguments)
    )
    given = [arguments[start].partition("=")[2], *arguments[start + 1 : end]]
    settings = [one for one in given if "=" in one]
    values = [
        value
        for one in given
        if "=" not in one
        for value in re.split("[, ]+" if option == "--seeds" else ",", one)
        if value
    ]
    return [*arguments[:start], *settings, option, *values, *arguments[end:]]
