"""`fedjax-qp list`: the parts that a configuration can name with their options, and the groups of settings besides."""

import inspect
import textwrap
from collections.abc import Sequence

from fedjax_qp import config
from fedjax_qp.registry import unknown_name
from fedjax_qp.settings.catalogue import KINDS, Entry, entries

_PLURALS = {"algorithms": "algorithm", "data": "data", "partitions": "partition", "models": "model"}
_UNBROKEN = "\N{NO-BREAK SPACE}"  # within a value


def listing(what: str, width: int = 100) -> Sequence[str]:
    """Tables of parts, or the explanation of one.

    Args:
      what: "all", a kind of parts such as "algorithms", a part's name, or the name of a group of settings such as "local".
      width: of the lines, which are cut between words only.

    Raises:
      ConfigurationError: nothing has that name; the nearest ones are named.
    """
    if what in ("all", *_PLURALS):
        wanted = _PLURALS.values() if what == "all" else [_PLURALS[what]]
        return [_table(key, width) for part in wanted for key, kind in KINDS.items() if kind.part == part]
    groups = config.groups()
    if what in groups:
        return [inspect.getsource(groups[what])]  # the source has defaults, ranges and comments
    found = [_explanation(entry) for entry in entries() if entry.name == what]
    if not found:
        raise unknown_name("part", what, [*_PLURALS, *groups, *(entry.name for entry in entries())])
    return found


def _table(registry: str, width: int) -> str:
    """Each entry with the data it is for, its idea, and below that its options."""
    found = [entry for entry in entries() if entry.registry == registry]
    indent = max(len(entry.name) for entry in found) + 4
    lines = [f"{KINDS[registry].title}s", ""]
    for entry in found:
        lines += _wrapped(f"  {entry.name.ljust(indent - 2)}{entry.idea} [{', '.join(entry.suits)}]", indent, width)
        options = [option.replace(" ", _UNBROKEN) for option in entry.shown_options()]
        lines += _wrapped(" " * indent + ", ".join(options), indent, width)
    return "\n".join([*lines, ""])


def _wrapped(text: str, indent: int, width: int) -> list[str]:
    lines = textwrap.wrap(text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
    return [line.replace(_UNBROKEN, " ") for line in lines]


def _explanation(entry: Entry) -> str:
    """What is written on one entry; an algorithm's file opens with its source and deviations."""
    kind = KINDS[entry.registry]
    file = entry.of_file if kind.part == "algorithm" else ""
    options = ", ".join(entry.shown_options()) or "none"
    texts = (f"{kind.title} {entry.name}", file, entry.text, f"For: {', '.join(entry.suits)}", f"Options: {options}")
    return "\n\n".join(text for text in texts if text)
