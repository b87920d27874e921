"""YAML and JSON read strictly: what the parsers would pass over in silence is an error of one line.

Both parsers keep the last of several equal keys, and leave through exceptions of many kinds where a file is damaged, too
deep, or not text at all.
"""

import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, ClassVar

import yaml

from fedjax_qp.registry import ConfigurationError
from fedjax_qp.settings.values import shown

_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_NUMBERS_AND_DATES = (_INT, _FLOAT, "tag:yaml.org,2002:timestamp")
_OTHER_TYPES = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("binary", "timestamp", "set", "omap", "pairs"))
_MERGE_TAG = "tag:yaml.org,2002:merge"
_MERGE = object()  # the key <<
DEEPEST = 50  # levels of nesting; nothing that this package reads comes near it


def read_text(path: Path) -> str:
    """Reads a UTF-8 file, with or without a byte-order mark.

    Raises:
      ConfigurationError: the file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigurationError(f"{_short(path)} cannot be read ({error.strerror}): check the path.") from None
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"{path} is not a UTF-8 text file (byte {error.start}): give another file, or save it as UTF-8."
        ) from None
    except ValueError:  # a NUL in the path
        raise ConfigurationError(f"{shown(str(path))} is not a path: it holds a NUL character.") from None


def load_yaml(text: str, where: str) -> Any:
    """Parses YAML of plain values: strings, numbers, truth values, lists and mappings.

    Args:
      where: what the text is, for messages, such as the file's path.

    Raises:
      ConfigurationError: the text is not YAML, asks for other types, repeats a key, or is nested too deeply.
    """
    try:
        value = yaml.load(text, Loader=_StrictLoader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise ConfigurationError(f"{where}{line} is not valid YAML: {error.problem or error.context}.") from None
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{where} is not valid YAML: {str(error).splitlines()[0]}.") from None
    except RecursionError:
        raise _too_deep(where) from None
    except (ValueError, TypeError, OverflowError) as error:  # of a scalar, such as the date 2026-99-99
        raise ConfigurationError(f"{where} is not valid YAML: {error}.") from None
    _check_depth(value, where)
    return value


def load_json(text: str | bytes, where: str) -> Any:
    """Parses JSON.

    Args:
      text: with or without a byte-order mark.
      where: what the text is, for messages, such as the file's path.

    Raises:
      ConfigurationError: the text is not JSON or not UTF-8, repeats a key, holds NaN or Infinity, or is nested too deeply.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = json_decoder(where).decode(text.removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{where} is not UTF-8 (byte {error.start}): save it as UTF-8.") from None
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"{where}, line {error.lineno} is not valid JSON: {error.msg}.") from None
    except RecursionError:
        raise _too_deep(where) from None
    except ConfigurationError:
        raise
    except ValueError as error:  # a constant, or a number of too many digits
        raise ConfigurationError(f"{where} is not valid JSON: {error}.") from None
    _check_depth(value, where)
    return value


def json_decoder(where: str) -> json.JSONDecoder:
    """What `load_json` parses with, for values that stand one after another. It checks no depth.

    It raises ConfigurationError for a repeated key, RecursionError, and ValueError for all else that is not JSON.
    """
    return json.JSONDecoder(object_pairs_hook=lambda pairs: _unrepeated(pairs, where), parse_constant=_refuse)


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that a mapping already has, and reads numbers as people write them.

    010 and 1:30 stay texts, where YAML 1.1 takes them for 8 and 90; so do dates. All else that is a number there is one here,
    and the other way round, so that what PyYAML writes is read again as it was.
    """

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS_AND_DATES]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors: ClassVar = {
        tag: constructor for tag, constructor in yaml.SafeLoader.yaml_constructors.items() if tag not in _OTHER_TYPES
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Checks keys as they stand in the text: later, what is merged in (<<) stands among them, also where others share it.

        Keys that are merged in give way to the mapping's own, by YAML's rules.
        """
        node = super().compose_mapping_node(anchor)
        lines: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # no key here: it can be no part of a dict
            key = _MERGE if key_node.tag == _MERGE_TAG else self.construct_object(key_node)
            line = key_node.start_mark.line + 1
            if key in lines:
                remedy = "write <<: [*one, *other]" if key is _MERGE else "keep one of them"
                name = "<<" if key is _MERGE else repr(key)
                problem = f"the key {name} stands twice, in lines {lines[key]} and {line}: {remedy}"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            lines[key] = line
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Puts what is merged in (<<) before the mapping's own keys, which override it; of a list the first overrides.

        PyYAML 6.0.4 tells merged keys apart by their identity in memory, so that which value stays is chance.
        """
        merges = [value for key, value in node.value if key.tag == _MERGE_TAG]
        if not merges:
            return
        node.value = own = [pair for pair in node.value if pair[0].tag != _MERGE_TAG]  # first: it may merge in itself
        pairs = [pair for value in merges for pair in self._merged(node, value)] + own
        node.value = list({self._identity(key): (key, value) for key, value in pairs}.values())

    def _merged(self, node: yaml.MappingNode, value: yaml.Node) -> list[tuple[yaml.Node, yaml.Node]]:
        sources = value.value[::-1] if isinstance(value, yaml.SequenceNode) else [value]
        for source in sources:
            if not isinstance(source, yaml.MappingNode):
                problem = "what is merged in (<<) must be a mapping or a list of mappings"
                raise yaml.constructor.ConstructorError(None, None, problem, source.start_mark)
            self.flatten_mapping(source)
        return [pair for source in sources for pair in source.value]

    @staticmethod
    def _identity(key: yaml.Node) -> Hashable:
        return (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)


_StrictLoader.add_implicit_resolver(
    _INT, re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$"), [*"-+0123456789"]
)
_StrictLoader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.(?:inf|Inf|INF))$"
        r"|\.(?:[0-9][0-9_]*(?:[eE][-+][0-9]+)?|nan|NaN|NAN)$"
    ),
    [*"-+0123456789."],
)


def _unrepeated(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ConfigurationError(f"{where} has the key {shown(key)} twice in one mapping: keep one of them.")
        found[key] = value
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number: write null where a value is missing")


def _check_depth(value: Any, where: str) -> None:
    """Whoever walks the value later does so recursively. Level by level, so that this check does not; nor does it follow a
    YAML alias more often than the value is deep."""
    level, depth = [value], 0
    while level := [
        inner
        for one in {id(outer): outer for outer in level if isinstance(outer, dict | list)}.values()
        for inner in (one.values() if isinstance(one, dict) else one)
    ]:
        depth += 1
        if depth > DEEPEST:
            raise _too_deep(where)


def _too_deep(where: str) -> ConfigurationError:
    return ConfigurationError(f"{where} is nested too deeply: at most {DEEPEST} levels are read.")


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:200]}…"
