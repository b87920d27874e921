"""Registered parts as functions, and arrays in the place of a data source.

A function's name, options and explanation are read from the package's source, so that listing them loads nothing; a call
checks what it is given as a configuration file is checked, and for that loads the package.
"""

import ast
import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fedjax_qp.config import Part
from fedjax_qp.registry import nearest_names
from fedjax_qp.settings.catalogue import KINDS, Entry, entries

if TYPE_CHECKING:
    import numpy as np

_ARGUMENTS = {
    "data": "data={}",
    "partition": "partition={}",
    "model": "model={}",
    "algorithm": "methods={{{name!r}: {}}}",
}


def constructor_names() -> list[str]:
    """The names of all registered parts, also of those that the user's own code has registered."""
    return sorted({entry.name for entry in entries()})


def constructor(name: str) -> Callable[..., Part]:
    """The function that makes a part, such as `fq.fedqp`.

    Returns:
      `(**options) -> Part`, with the part's explanation as its own. It raises a ConfigurationError where an option is
      unknown, missing or ill-typed, in the words of a configuration file.

    Raises:
      AttributeError: there is no such part; or there are several, which `fq.Part(name, options)` tells apart by its place.
    """
    found = [entry for entry in entries() if entry.name == name]
    if not found:
        meant = nearest_names(name, constructor_names())
        hint = f": did you mean {' or '.join(meant)}?" if meant else ""
        raise AttributeError(f"fedjax_qp has no {name!r}{hint}")
    if len(found) > 1:
        kinds = " and ".join(KINDS[entry.registry].title for entry in found)
        raise AttributeError(f"{name!r} is the name of several parts ({kinds}): write fq.Part({name!r}, {{…}}).")
    return _constructor(found[0])


def _constructor(entry: Entry) -> Callable[..., Part]:
    def make(**options: Any) -> Part:
        from fedjax_qp.experiment.parts import REGISTRIES

        given = {key: _as_in_yaml(value) for key, value in options.items()}
        REGISTRIES[KINDS[entry.registry].part].resolve(entry.name, given)
        return Part(entry.name, given)

    make.__name__ = make.__qualname__ = entry.name
    make.__module__ = "fedjax_qp"
    make.__doc__ = _explained(entry)
    parameters = [
        inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=_value(default))
        for option, default in entry.options.items()
    ]
    make.__signature__ = inspect.Signature(parameters, return_annotation=Part)  # pyright: ignore[reportFunctionMemberAccess]
    return make


def _explained(entry: Entry) -> str:
    part = KINDS[entry.registry].part
    needed = ", ".join(f"{option}=…" for option, default in entry.options.items() if default is None)
    call = _ARGUMENTS[part].format(f"fq.{entry.name}({needed})", name=entry.name)
    return (
        f"{entry.text}\n\nOptions: {', '.join(entry.shown_options()) or 'none'}\n\nExamples:\n  >>> fq.run(…, {call})\n"
    )


def _value(default: str | None) -> Any:
    if default is None:
        return inspect.Parameter.empty
    try:
        return ast.literal_eval(default)
    except ValueError:  # an expression
        return default


def _as_in_yaml(value: Any) -> Any:
    """A value as a configuration file would give it: lists for tuples, texts for paths, plain numbers."""
    if isinstance(value, list | tuple):
        return [_as_in_yaml(item) for item in value]
    if isinstance(value, dict):
        return {key: _as_in_yaml(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    return value.item() if getattr(value, "shape", None) == () else value


class Arrays(NamedTuple):
    """Your own images or rows as arrays, in the place of a data source.

    Bytes [N, H, W] or [N, H, W, C] with a class each are images, and all other numbers are rows of any shape. Labels of rows
    are whole numbers [N] or texts (classes), 0 and 1 [N, L] (which of L labels apply), or floats [N] or [N, T] (numbers).

    They are written to a file beside the runs, so that these can be continued and inspected: `data=fq.arrays(path=FILE)`
    means the same.

    Examples:
      >>> fq.run(data=fq.Arrays(train=(x, y), test=(x_test, y_test)), partition=fq.iid(clients=10), …)
    """

    train: "tuple[np.ndarray, np.ndarray]"  # inputs and labels
    test: "tuple[np.ndarray, np.ndarray]"
    client_ids: "np.ndarray | None" = None  # whose each training example is, for partition=fq.natural()
    class_names: "np.ndarray | None" = None  # strings, one a class

    def write(self, folder: Path) -> Part:
        """Writes the arrays into a folder under a name that their content gives; returns the data source of that file."""
        import numpy as np

        named = {"train_inputs": self.train[0], "train_labels": self.train[1]}
        named |= {"test_inputs": self.test[0], "test_labels": self.test[1]}
        named |= {"client_ids": self.client_ids, "class_names": self.class_names}
        content = {name: np.asarray(values) for name, values in named.items() if values is not None}
        digest = hashlib.sha256()
        for name, values in content.items():
            digest.update(f"{name} {values.dtype} {values.shape} ".encode() + values.tobytes())
        file = folder / f"arrays-{digest.hexdigest()[:16]}.npz"
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            np.savez(file, **content)  # pyright: ignore[reportArgumentType]
        return Part("arrays", {"path": str(file.resolve())})
