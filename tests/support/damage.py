"""Damage to files: bytes cut and flipped, values of another type or of absurd size, keys gone or repeated."""

import copy
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

HOSTILE = (
    None, True, False, -1, 0, 1, 2, 0.5, -0.0, 1e-320, 1e308, 2**31, 2**32 + 1, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400,
    math.nan, math.inf, -math.inf, "", " ", "0", "1e400", "nan", "\x00", "\n", "é", "猫", "\ud800", "[/red]", "$\\frac$",
    "../x", "x" * 10_000, [], {}, [[]], [None], [0], ["0"], {"0": 0}, list(range(1000)),
)  # fmt: skip


def damaged_bytes(intact: bytes, numbers: np.random.Generator, flips: int = 40) -> Iterator[tuple[str, bytes]]:
    """The file cut, flipped, emptied, doubled and re-encoded."""
    yield "empty", b""
    yield "doubled", intact + intact
    yield "zeros", bytes(len(intact))
    yield "noise", numbers.bytes(len(intact))
    yield "one byte", intact[:1]
    yield "byte-order mark", b"\xef\xbb\xbf" + intact
    yield "UTF-16", intact.decode("latin-1").encode("utf-16")
    yield "a NUL before", b"\0" + intact
    yield "a page of HTML", b"<!DOCTYPE html><html><body>404</body></html>"
    yield "brackets", b"[" * 100_000
    yield "braces", b'{"a":' * 100_000
    yield "spaces", b" " * 100_000
    for place in numbers.integers(1, len(intact), 12):
        yield f"cut at {place}", intact[:place]
    for place in numbers.integers(0, len(intact), flips):
        bit = 1 << int(numbers.integers(8))
        yield f"bit {bit} of byte {place}", intact[:place] + bytes([intact[place] ^ bit]) + intact[place + 1 :]
    for place, byte in zip(numbers.integers(0, len(intact), 16), b'\x00\xff"\\{}[],:-.0\n\t\x80', strict=True):
        yield f"byte {byte:#x} at {place}", intact[:place] + bytes([byte]) + intact[place:]


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all parts of a value of lists and dicts; of a list the first and last two items."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in sorted({*range(min(2, len(value))), *range(max(len(value) - 2, 0), len(value))}):
            yield from places(value[index], (*path, index))


def replaced(value: Any, path: tuple, new: Any) -> Any:
    if not path:
        return new
    value = copy.copy(value)
    value[path[0]] = replaced(value[path[0]], path[1:], new)
    return value


def removed(value: Any, path: tuple) -> Any:
    value = copy.deepcopy(value)
    inside = value
    for key in path[:-1]:
        inside = inside[key]
    del inside[path[-1]]
    return value


def damaged_values(value: Any, numbers: np.random.Generator, count: int) -> Iterator[tuple[str, str]]:
    """JSON texts of the value with one part replaced, removed or repeated."""
    everywhere = list(places(value))
    for _ in range(count):
        path, new = everywhere[numbers.integers(len(everywhere))], HOSTILE[numbers.integers(len(HOSTILE))]
        yield f"{path} = {new!r:.40}", as_json(replaced(value, path, new))
    for path in everywhere[1:]:
        yield f"without {path}", as_json(removed(value, path))
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"{key} twice", f"{{{as_json(key)}: {as_json(item)}, {as_json(value)[1:]}"
            yield f"a further {key!r:.20}s", as_json({**value, f"{key}s": item})


def as_json(value: Any) -> str:
    return json.dumps(value).replace("\\ud800", "\\uD800")


def as_bytes(cases: Iterator[tuple[str, str]]) -> Iterator[tuple[str, bytes]]:
    return ((name, text.encode("utf-8", "surrogatepass")) for name, text in cases)
