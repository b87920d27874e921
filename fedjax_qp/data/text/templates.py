"""Prompt templates: from a record to the tokens of its prompt and of its response.

The whole text is tokenised at once, because tokenising the two parts apart gives other tokens at their border (many
tokenizers put a space in front of whatever they are given). The response begins where the tokens of the whole text leave
those of the prompt alone; so where a merge crosses the border, the merged token belongs to the response.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol

from fedjax_qp.data.text.instructions import Record
from fedjax_qp.registry import ConfigurationError, unknown_name


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    @property
    def eos_token_id(self) -> Any: ...
    @property
    def pad_token_id(self) -> Any: ...
    @property
    def chat_template(self) -> Any: ...
    @property
    def apply_chat_template(self) -> Callable[..., Any]: ...

    @property
    def convert_ids_to_tokens(self) -> Callable[..., Any]: ...

    def __len__(self) -> int: ...

    def __call__(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> Any: ...


class Rendered(NamedTuple):
    """A record as text; for `chat`, both parts carry the template's markers."""

    prompt: str
    response: str


class Tokenised(NamedTuple):
    """A record as token ids."""

    prompt: list[int]
    response: list[int]  # the last one is the end of the text


def alpaca(record: Record, tokenizer: Tokenizer | None = None) -> Rendered:
    """Source: Taori et al., "Stanford Alpaca", 2023, in the wording and spacing that Alpaca-LoRA and Shepherd use."""
    paired = ", paired with an input that provides further context" if record.context else ""
    head = f"Below is an instruction that describes a task{paired}. "
    head += "Write a response that appropriately completes the request."
    parts = [head, f"### Instruction:\n{record.instruction}"]
    parts += [f"### Input:\n{record.context}"] if record.context else []
    return Rendered("\n\n".join([*parts, "### Response:\n"]), record.response)


def short(record: Record, tokenizer: Tokenizer | None = None) -> Rendered:
    """Ours: few words, for small models and short cut-offs."""
    context = f"Context: {record.context}\n" if record.context else ""
    return Rendered(f"Task: {record.instruction}\n{context}Answer:\n", record.response)


def chat(record: Record, tokenizer: Tokenizer | None = None) -> Rendered:
    """The tokenizer's own chat template: the instruction, with the context below it, is the user's message.

    Raises:
      ConfigurationError: the tokenizer has no chat template, or one whose prompt is not the beginning of the whole.
    """
    if tokenizer is None or not tokenizer.chat_template:
        raise ConfigurationError(
            "template = 'chat' needs a tokenizer with a chat template, and this one has none (models tuned for chat have "
            "one, base models often do not). Take template = 'alpaca' or 'short'."
        )
    message = f"{record.instruction}\n\n{record.context}" if record.context else record.instruction
    asked = [{"role": "user", "content": message}]
    answered = [*asked, {"role": "assistant", "content": record.response}]
    try:
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(answered, tokenize=False, add_generation_prompt=False)
    except Exception as error:  # of Jinja, or of the template's own
        raise ConfigurationError(
            f"template = 'chat': the tokenizer's chat template cannot be filled in ({str(error)[:200]!r}"
            f"{f', {record.where}' if record.where else ''}). Take template = 'alpaca' or 'short'."
        ) from None
    if not whole.startswith(prompt):
        raise ConfigurationError(
            f"template = 'chat': this tokenizer's chat template writes the prompt {prompt[-60:]!r} when it asks for an "
            "answer, but something else in front of a given answer, so the response cannot be told from the prompt"
            f"{f' ({record.where})' if record.where else ''}. Take template = 'alpaca' or 'short'."
        )
    if not whole[len(prompt) :].strip():
        raise ConfigurationError(
            "template = 'chat': this tokenizer's chat template leaves out the answers, so there is nothing to learn"
            f"{f' ({record.where})' if record.where else ''}. Take template = 'alpaca' or 'short'."
        )
    return Rendered(prompt, whole[len(prompt) :])


TEMPLATES: dict[str, Callable[[Record, Tokenizer | None], Rendered]] = {"alpaca": alpaca, "short": short, "chat": chat}


def render(record: Record, tokenizer: Tokenizer | None, template: str) -> Rendered:
    """Returns a record as text; only `chat` looks at the tokenizer."""
    if template not in TEMPLATES:
        raise unknown_name("template", template, TEMPLATES)
    return TEMPLATES[template](record, tokenizer)


def tokenise(
    records: Sequence[Record], tokenizer: Tokenizer, template: str, *, vocabulary: int | None = None
) -> list[Tokenised]:
    """Tokenises records in two batch calls; nothing is cut.

    The markers that the tokenizer adds on its own (such as a first `<s>`) are kept, except with `chat`, whose text has
    them already. Each response ends with exactly one end-of-text token; what a chat template writes after it (often a
    line break) is left out, since nobody generates it.

    Args:
      records: any number of records.
      tokenizer: of the model that is trained.
      template: alpaca, short or chat.
      vocabulary: rows of the model's embedding; None where there is no model.

    Raises:
      ConfigurationError: the tokenizer lacks an end-of-text token, or a chat template where one is needed; or it makes tokens
        that the model has no row for.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ConfigurationError(
            "the tokenizer has no end-of-text token (eos_token), so a model could not learn where an answer ends. Set "
            "`eos_token` in its tokenizer_config.json."
        )
    if vocabulary is not None:
        check_ids([end, tokenizer.pad_token_id], tokenizer, vocabulary, "the tokenizer's eos_token and pad_token")
    if not records:
        return []
    texts = [render(record, tokenizer, template) for record in records]

    def ids(parts: list[str]) -> list[list[int]]:
        # verbose would warn of every text that is longer than the model's positions
        try:
            return tokenizer(parts, add_special_tokens=template != "chat", verbose=False)["input_ids"]
        except Exception as error:  # the package raises nothing more special
            raise ConfigurationError(
                f"the tokenizer cannot encode {records[0].where or 'the texts'} and the rest ({str(error)[:200]!r}): check "
                "its tokenizer.json."
            ) from None

    prompts = ids([text.prompt for text in texts])
    wholes = ids([text.prompt + text.response for text in texts])
    if vocabulary is not None:
        for record, *both in zip(records, prompts, wholes, strict=True):
            check_ids(chain(*both), tokenizer, vocabulary, record.where or "the text")
    return [_split(prompt, whole, end, template == "chat") for prompt, whole in zip(prompts, wholes, strict=True)]


def check_ids(ids: Iterable[int], tokenizer: Tokenizer, vocabulary: int, where: str) -> None:
    """Checks that the model has a row for each token; a program would take another row in silence.

    Raises:
      ConfigurationError: it has not. More rows than the tokenizer has tokens are fine: some models are padded.
    """
    beyond = sorted({one for one in ids if not 0 <= one < vocabulary})
    if beyond:
        tokens = zip(beyond[:5], tokenizer.convert_ids_to_tokens(beyond[:5]), strict=True)
        named = ", ".join(f"{one} ({token!r})" for one, token in tokens) + (", …" if len(beyond) > 5 else "")
        raise ConfigurationError(
            f"{where}: the token ids {named} are beyond the {vocabulary} rows of the model's embedding (ids 0 to "
            f"{vocabulary - 1}), while the tokenizer has {len(tokenizer)} tokens: take the model's own tokenizer, or a model "
            "whose embedding was enlarged for it."
        )


def _split(prompt: list[int], whole: list[int], end: int, chat: bool) -> Tokenised:
    """Divides the tokens of the whole text after their common beginning with those of the prompt."""
    border = len(prompt)
    if whole[:border] != prompt:
        border = next((i for i, pair in enumerate(zip(prompt, whole, strict=False)) if pair[0] != pair[1]), len(whole))
    response = list(whole[border:])
    if chat and end in response:
        response = response[: len(response) - response[::-1].index(end)]
    while response and response[-1] == end:
        response.pop()
    return Tokenised(list(whole[:border]), [*response, end])
