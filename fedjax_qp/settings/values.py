"""What a setting may be: numbers that are numbers, names that stay in their folder. One type for each kind of value.

Whole numbers have a limit that no honest use meets, so that no array of an absurd size is asked for. Other numbers must be
finite, and stay so in float32, in which runs compute. YAML's truth values (true, yes, on, …) are not numbers, nor are numbers
truth values. Texts are single lines. `checkable` makes these the meaning of plain `int`, `float`, `bool` and `str` in the
options of registered functions.
"""

import reprlib
import unicodedata
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import AfterValidator, BeforeValidator, Field, Strict
from pydantic_core import PydanticCustomError

MOST = 10**9
LARGEST, SMALLEST = 3.4028234e38, 1.1754944e-38  # float32's, apart from 0
LONGEST_NAME = 200  # bytes; with what is added to a name, a file system takes 255
LONGEST_PART, LONGEST_PATH = 255, 4096  # bytes that a file system takes


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("truth_value", "must be a number (YAML reads yes, no, on and off as truth values)")
    return value


def _in_float32(value: float) -> float:
    if abs(value) > LARGEST or 0 < abs(value) < SMALLEST:
        raise PydanticCustomError(
            "float32", "must be 0 or between 1.2e-38 and 3.4e38 in size, as far as float32 reaches"
        )
    return value


def _below_one_in_float32(value: float) -> float:
    if value >= 1 - 2**-25:
        raise PydanticCustomError("probability", "must be less than 1, also in float32: at most 0.99999997")
    return value


def _one_line(text: str) -> str:
    if not text.strip() or _has_control_characters(text) or len(text.encode()) > LONGEST_PATH:
        raise PydanticCustomError("line", "must be a line of text, not empty, of at most 4096 bytes")
    return text


Whole = Annotated[int, BeforeValidator(_no_truth_value), Field(ge=-MOST, le=MOST)]
Count = Annotated[Whole, Field(ge=1)]
Finite = Annotated[float, BeforeValidator(_no_truth_value), Field(allow_inf_nan=False), AfterValidator(_in_float32)]
Positive = Annotated[Finite, Field(gt=0)]
NotNegative = Annotated[Finite, Field(ge=0)]
Share = Annotated[Finite, Field(ge=0, le=1)]
Probability = Annotated[Finite, Field(ge=0), AfterValidator(_below_one_in_float32)]
Truth = Annotated[bool, Strict()]
Seed = Annotated[int, BeforeValidator(_no_truth_value), Field(ge=0, lt=2**31)]
Line = Annotated[str, AfterValidator(_one_line)]


def _has_control_characters(text: str) -> bool:
    """Also NUL, ends of lines, and bytes that were no UTF-8 (surrogates)."""
    return any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text)


_PLAIN = {int: Whole, float: Finite, bool: Truth, str: Line}


def checkable(annotation: Any) -> Any:
    """The annotation with plain numbers, truth values and texts replaced by this file's types, at every depth."""
    if annotation in (int, float, bool, str):
        return _PLAIN[annotation]
    inner = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return Annotated[checkable(inner[0]), *inner[1:]]
    if get_origin(annotation) in (Union, UnionType):
        return Union[tuple(checkable(kind) for kind in inner)]  # noqa: UP007 (their number is not fixed)
    if get_origin(annotation) in (tuple, list, dict):
        return get_origin(annotation)[tuple(checkable(kind) for kind in inner)]
    return annotation


def takes(annotation: Any, kind: type) -> bool:
    """Whether values of a plain type belong to an annotation, at any depth."""
    return annotation is kind or any(takes(inner, kind) for inner in get_args(annotation))


def _one_component(name: str) -> str:
    """A name becomes part of a folder's, so it must not lead anywhere else."""
    if not name.strip() or name.strip() != name:
        raise PydanticCustomError("name", "must be a name, not empty and without spaces around it")
    if _has_control_characters(name) or {"/", "\\"} & set(name) or name in (".", ".."):
        raise PydanticCustomError("name", "must be one name, without / or \\ and without control characters")
    if len(name.encode()) > LONGEST_NAME:
        raise PydanticCustomError("name", "must be at most 200 bytes long")
    return name


def _path(path: str) -> str:
    if not path.strip() or _has_control_characters(path):
        raise PydanticCustomError("path", "must be a path, not empty and without control characters")
    if len(path.encode()) > LONGEST_PATH or any(len(part.encode()) > LONGEST_PART for part in path.split("/")):
        raise PydanticCustomError("path", "must be at most 4096 bytes long, and 255 between two slashes")
    try:
        Path(path).expanduser()
    except RuntimeError:
        raise PydanticCustomError("path", "begins with ~, but there is no such home folder") from None
    return path


Name = Annotated[str, AfterValidator(_one_component)]
PathName = Annotated[str, AfterValidator(_path)]


class _Shortened(reprlib.Repr):
    """Looks no further than it shows: a value made of YAML aliases may be exponentially larger than its file."""

    def __init__(self):
        super().__init__()
        self.maxstring = self.maxother = 80
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        """Python does not write out numbers of more than 4,300 digits."""
        return f"a whole number of {x.bit_length()} bits" if x.bit_length() > 200 else repr(x)


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = _Shortened().repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
