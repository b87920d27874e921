"""What a configuration can name, read from this package's source text.

Nothing of it is imported, nor is JAX: so a typo is found, and an entry explained, in a fraction of a second. What a
launcher of a user's own has registered besides is known once the package is loaded; see `entries`.
"""

import ast
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from fedjax_qp.config import PARTS, Config
from fedjax_qp.registry import EXAMPLES, unknown_name
from fedjax_qp.settings import plugins


class Kind(NamedTuple):
    """A registry, by the name under which functions are registered in it."""

    part: str  # of a configuration: data, partition, model or algorithm
    title: str  # the registry's `kind`, for messages


KINDS = {
    "algorithms": Kind("algorithm", "algorithm"),
    "sources": Kind("data", "data source"),
    "partitions": Kind("partition", "partition"),
    "models": Kind("model", "model"),
}
ANY = ("all",)  # what suits every kind of examples
_PACKAGE = Path(__file__).parents[1]
_FOLDERS = ("algorithms", "data", "models")
# Where the options stand that all entries of a registry have, see `registry.Registry`.
_COMMON = {"partitions": ("data/client_tests.py", "client_tests")}


class Entry(NamedTuple):
    """A registered function."""

    registry: str
    name: str
    suits: tuple[str, ...]  # the kinds of examples that it gives, takes or is for
    text: str  # its docstring
    of_file: str  # the docstring of its file
    options: dict[str, str | None]  # with their defaults as written; None = there is none

    @property
    def idea(self) -> str:
        return self.text.partition("\n")[0]

    def shown_options(self) -> list[str]:
        return [name if default is None else f"{name}={default}" for name, default in self.options.items()]


def entries() -> list[Entry]:
    """All entries by registry and name, with what others have registered in registries that are loaded."""
    plugins.load_installed()
    known = _of_package()
    return [*known, *_of_others({(entry.registry, entry.name) for entry in known})]


def check_names(config: Config) -> None:
    """Checks the names of parts and options, as `experiment.resolve` does, without loading anything.

    Raises:
      ConfigurationError: a name is unknown; the nearest ones are named.
    """
    for part in PARTS:
        given = getattr(config, part)
        of_part = [entry for entry in entries() if KINDS[entry.registry].part == part]
        found = next((entry for entry in of_part if entry.name == given.name), None)
        if found is None:
            title = next(kind.title for kind in KINDS.values() if kind.part == part)
            raise unknown_name(title, given.name, [entry.name for entry in of_part])
        for option in given.options:
            if option not in found.options:
                title = f"option of {KINDS[found.registry].title} {found.name!r}"
                raise unknown_name(title, option, found.options)


@cache
def _of_package() -> tuple[Entry, ...]:
    files = [file for folder in _FOLDERS for file in sorted((_PACKAGE / folder).rglob("*.py"))]
    found = [entry for file in files for entry in _of_file(file.read_text(encoding="utf-8"))]
    return tuple(sorted(found, key=_order))


def _order(entry: Entry) -> tuple[int, int, str]:
    """By registry, then by the kinds of examples, then by name."""
    return [*KINDS].index(entry.registry), [*ANY, *EXAMPLES].index(entry.suits[0]), entry.name


def _of_file(source: str) -> Iterator[Entry]:
    if ".register" not in source:
        return
    tree = ast.parse(source)
    for node in tree.body:
        found = _registered(node) if isinstance(node, ast.FunctionDef) else None
        if isinstance(node, ast.FunctionDef) and found is not None:
            registry, examples = found
            yield Entry(
                registry,
                node.name,
                ("instructions",) if _tunes_adapters(source) else examples or ANY,
                ast.get_docstring(node) or "",
                ast.get_docstring(tree) or "",
                _options(node) | _common_options(registry),
            )


def _options(function: ast.FunctionDef) -> dict[str, str | None]:
    pairs = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    return {option.arg: None if default is None else ast.unparse(default) for option, default in pairs}


@cache
def _common_options(registry: str) -> dict[str, str | None]:
    if registry not in _COMMON:
        return {}
    file, name = _COMMON[registry]
    tree = ast.parse((_PACKAGE / file).read_text(encoding="utf-8"))
    return next(_options(node) for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)


def _registered(function: ast.FunctionDef) -> tuple[str, tuple[str, ...]] | None:
    """Where a function is registered, and for which examples: by `@registry.register` or `@registry.register("rows")`."""
    for decorator in function.decorator_list:
        called = decorator.func if isinstance(decorator, ast.Call) else decorator
        if isinstance(called, ast.Attribute) and called.attr == "register" and isinstance(called.value, ast.Name):
            examples = decorator.args if isinstance(decorator, ast.Call) else []
            declared = tuple(ast.literal_eval(kind) for kind in examples)
            return (called.value.id, declared) if called.value.id in KINDS else None
    return None


def _tunes_adapters(source: str) -> bool:
    """Whether a file's methods say that they work on adapters, or are made of a method that does."""
    return "tunes_adapters=True" in source or "from fedjax_qp.algorithms.ranks import" in source


def _of_others(known: set[tuple[str, str]]) -> Iterator[Entry]:
    modules = [sys.modules[f"fedjax_qp.{folder}"] for folder in _FOLDERS if f"fedjax_qp.{folder}" in sys.modules]
    loaded = [(key, getattr(module, key)) for module in modules for key in KINDS if hasattr(module, key)]
    for key, registry in loaded:
        for name in registry.names():
            if (key, name) not in known:
                function, options = registry[name], registry.options(name)
                written = {one: None if o.default is o.empty else repr(o.default) for one, o in options.items()}
                file = inspect.getdoc(inspect.getmodule(function)) or ""
                yield Entry(key, name, registry.examples(name) or ANY, inspect.getdoc(function) or "", file, written)
