"""Tokenizers of pretrained models, read by the package transformers from a local folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedjax_qp.registry import ConfigurationError
from fedjax_qp.settings.strict import load_json

INSTALL = "pip install -e '.[language]'"
FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# What transformers reads besides, where it is there.
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def load_tokenizer(folder: Path | str) -> Any:
    """Reads the tokenizer of a model in Hugging Face's layout; nothing is downloaded and no code of the folder is run.

    A tokenizer without a padding token pads with its end-of-sequence token. That is harmless here: padding has segment 0,
    so attention and loss never see it, whatever its id.

    Returns:
      A transformers tokenizer that has `pad_token_id`.

    Raises:
      ConfigurationError: transformers is not installed, the folder has no tokenizer, or nothing can serve as padding.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in FILES):
        # Without this check transformers would take the path for a model's name on the hub.
        raise ConfigurationError(f"{folder} has no tokenizer: none of {', '.join(FILES)} is there.")
    transformers = _transformers()
    _check_files(folder)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the packages raise many kinds, and Exception itself
        raise ConfigurationError(f"the tokenizer in {folder} cannot be read: {one_line(error)}") from None
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ConfigurationError(
                f"the tokenizer in {folder} has neither pad_token nor eos_token; name one in its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def one_line(error: Exception) -> str:
    """What a foreign library says, cut to a line; without its advice to run a folder's code, which is never done here."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any("trust_remote_code" in line for line in lines):
        return "it asks for code of its own, which is never run; take a model of an ordinary class."
    return (" ".join(lines) or type(error).__name__)[:300]


def _check_files(folder: Path) -> None:
    """Checks that the tokenizer's files are JSON objects, by rules that transformers does not have.

    Raises:
      ConfigurationError: one of them is damaged, or repeats a key.
    """
    for file in (folder / name for name in (*FILES, *SETTINGS) if name.endswith(".json")):
        if not file.is_file():
            continue
        try:
            content = load_json(file.read_bytes(), str(file))
        except (OSError, ConfigurationError) as error:
            raise ConfigurationError(f"the tokenizer in {folder} cannot be read: {error}") from None
        if not isinstance(content, dict):
            raise ConfigurationError(
                f"the tokenizer in {folder} cannot be read: {file.name} holds a {type(content).__name__}, not a JSON object."
            )


def _transformers() -> Any:
    try:
        with _no_advice():
            import transformers
    except ImportError as error:
        raise ConfigurationError(f"tokenizers need `{INSTALL}` ({error}).") from None
    return transformers


@contextmanager
def _no_advice() -> Iterator[None]:
    """Keeps transformers from warning at import that there is no PyTorch: nothing here needs it."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})
