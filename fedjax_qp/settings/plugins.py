"""Plug-ins: code outside this package that registers methods, data, partitions and models.

A plug-in is a Python file or an importable module that the user names, in a configuration (`plugins: [mine.py]`) or on the
command line, or an installed package with an entry point in the group `fedjax_qp`. Nothing else is ever run. A run's folder
keeps copies of its files for the reader; where such a folder is continued or inspected, its configuration may be
a stranger's, so that what it names is run only if the user has named the same content before, see `load_of_run`.
"""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
import traceback
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from fedjax_qp.files import cache_folder, write_whole
from fedjax_qp.registry import ConfigurationError

GROUP = "fedjax_qp"  # of entry points

_loaded: dict[str, str] = {}  # digests of what has been run in this process, by path


def located(names: Iterable[str | Path], home: Path) -> tuple[str, ...]:
    """The plug-ins with absolute paths in the place of those that are relative to `home`; modules stay as they are."""

    def place(name: str) -> str:
        try:
            return str((home / Path(name).expanduser()).absolute())
        except (RuntimeError, ValueError):  # said of the setting when its type is checked
            return name

    return tuple(place(str(name)) if is_file(name) else str(name) for name in names)


def is_file(name: str | Path) -> bool:
    """Whether a plug-in is named as a file; otherwise it is a module."""
    return str(name).endswith(".py")


def load(names: Iterable[str]) -> None:
    """Runs plug-ins that the user has named, each once, and a file again if it has changed; installed ones before.

    Args:
      names: absolute paths or modules, see `located`.

    Raises:
      ConfigurationError: there is no such file or module, two files have one name, or the code fails.
    """
    load_installed()
    names = tuple(dict.fromkeys(names))
    _check_file_names(names)
    for name in names:
        content = _content(name)
        _run(name, content)
        _remember(name, content)


@cache
def load_installed() -> None:
    """Loads the entry points of installed packages, once in a process. One that fails is warned of: all else still works."""
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:  # anything can be in there
            warnings.warn(f"the installed plug-in {entry.name} ({entry.value}) fails: {_reason(error)}", stacklevel=2)


def load_of_run(copies: Path, names: Sequence[str]) -> None:
    """Runs the plug-ins of a run's configuration as far as the user vouches for them.

    Args:
      copies: the folder of the copies that the run keeps, within its own.
      names: the plug-ins in the run's configuration.

    Raises:
      ConfigurationError: the user has never named a plug-in of this content, or its file is gone.
    """
    load_installed()
    for name in names:
        copy = copies / Path(name).name
        if is_file(name) and copy.is_file() and _digest(copy.read_bytes()) in _loaded.values():
            continue  # named by the user before, perhaps by another path
        present = not is_file(name) or Path(name).is_file()
        content = _content(name) if present else b""
        if present and _mark(name, content).exists():
            _run(name, content)
        elif Path(name).name not in map(_file_name, _loaded):
            why = "which you have not run here yet, or not as it is now" if present else "which is not there"
            begun = f" (the run began with {copy})" if copy.is_file() else ""
            raise ConfigurationError(
                f"{copies.parent} needs the plug-in {name}, {why}: if you trust its code, name it with --plugins "
                f"{name if present else Path(name).name}{begun}."
            )


def keep(folder: Path, names: Iterable[str]) -> None:
    """Copies the files among plug-ins into a folder, which is made where there are any."""
    for name in filter(is_file, names):
        folder.mkdir(exist_ok=True)
        write_whole(folder / Path(name).name, Path(name).read_bytes())


def digests(names: Iterable[str]) -> dict[str, str]:
    """Digests of the content of plug-ins that have been run, by file name or module."""
    latest = {_file_name(name): digest for name, digest in _loaded.items()}
    return {_file_name(name): _loaded.get(name, latest.get(_file_name(name), "")) for name in names}


def _file_name(name: str) -> str:
    return Path(name).name if is_file(name) else name


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _check_file_names(names: Sequence[str]) -> None:
    files: dict[str, str] = {}
    for name in filter(is_file, names):
        other = files.setdefault(Path(name).name, name)
        if other != name:
            raise ConfigurationError(
                f"plugins: {other} and {name} have the same file name, under which a run keeps a copy: rename one of them."
            )


def _content(name: str) -> bytes:
    """A file's content; of a module its name, by which Python knows it."""
    if not is_file(name):
        return name.encode()
    if not Path(name).is_file():
        raise ConfigurationError(
            f"plugins: there is no file {name}: correct the path, which is relative to its configuration."
        )
    return Path(name).read_bytes()


def _run(name: str, content: bytes) -> None:
    digest = _digest(content)
    if _loaded.get(name) == digest:
        return
    try:
        if is_file(name):
            _run_file(Path(name), content)
        else:
            file = importlib.import_module(name).__file__
            digest = _digest(Path(file).read_bytes()) if file else digest
    except Exception as error:  # anything can be in there
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise ConfigurationError(
                f"plugins: there is no module {name}: install its package, or name a file that ends in .py."
            ) from None
        raise ConfigurationError(f"the plug-in {name} fails: {_reason(error, name)}") from error
    _loaded.pop(name, None)  # the latest is the last
    _loaded[name] = digest


def _run_file(path: Path, content: bytes) -> None:
    """Runs the content as a module, so that what was checked is what is run."""
    module_name = f"fedjax_qp_plugin_{path.stem}_{_digest(str(path).encode())[:8]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickles look there
    try:
        exec(compile(content, str(path), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[module_name]
        raise


def _reason(error: Exception, file: str = "") -> str:
    """An error in one line, with the last line of the file that led to it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    text = str(error).partition("\n")[0] if not isinstance(error, SyntaxError) else error.msg
    kind = "" if isinstance(error, ConfigurationError) else f"{type(error).__name__}: "
    return f"{kind}{text}{f' (line {line})' if line else ''}"


def _mark(name: str, content: bytes) -> Path:
    """The file whose presence says that this user has named a plug-in of this content."""
    kind = b"file" if is_file(name) else b"module"
    return cache_folder() / "plugins" / _digest(kind + b"\0" + content)


def _remember(name: str, content: bytes) -> None:
    mark = _mark(name, content)
    if mark.exists():
        return
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(f"{name}\n", encoding="utf-8")
    except OSError as error:
        warnings.warn(
            f"{mark.parent} cannot be written ({error}), so that continuing a run needs --plugins; set FEDJAX_QP_CACHE.",
            stacklevel=3,
        )
