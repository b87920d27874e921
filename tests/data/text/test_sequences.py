"""Encoding and packing: nothing lost, nothing doubled, and the loss where it belongs."""

import functools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_qp.config import Text
from fedjax_qp.data import Encoded, Record, encode, pack, padding_share, render, sources, tokenise
from fedjax_qp.registry import ConfigurationError


class Letters:
    """A tokenizer by hand: a character is a token (its code), 1 begins a text and 2 ends an answer."""

    eos_token_id = 2
    chat_template = None

    def __call__(self, text, *, add_special_tokens=True, verbose=True):
        return {"input_ids": [[1] * add_special_tokens + [ord(letter) for letter in item] for item in text]}

    def apply_chat_template(self, conversation, **options):
        raise NotImplementedError


def formatting(**options):
    return Text(**{"template": "short", "cut_off": 40, **options})


def prompt_length(record):
    return 1 + len(render(record, None, "short").prompt)


def encoded_of(sizes):
    """Records of the given sizes, every token of which is another number."""
    numbers = np.split(np.arange(1, sum(sizes) + 1, dtype=np.int32), np.cumsum(sizes)[:-1]) if sizes else []
    targets = [np.arange(len(ids)) >= max(1, len(ids) // 2) for ids in numbers]
    return Encoded(numbers, targets, np.arange(len(sizes)), 0, 0)


# ---- Packing --------------------------------------------------------------------------------------------------------

SIZES = st.lists(st.integers(1, 16), max_size=60)


def unpacked(sequences):
    """The records of packed sequences, read off their segments in order, and the sequence of each."""
    for row, (tokens, segments, positions, targets) in enumerate(zip(*sequences, strict=True)):
        for segment in range(1, segments.max() + 1):
            chosen = np.flatnonzero(segments == segment)
            np.testing.assert_array_equal(chosen, np.arange(chosen[0], chosen[0] + len(chosen)))
            np.testing.assert_array_equal(positions[chosen], np.arange(len(chosen)))
            yield row, tokens[chosen], targets[chosen]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(sizes=SIZES, enabled=st.booleans(), spare=st.integers(0, 5))
def test_every_record_is_there_once_and_whole(sizes, enabled, spare):
    encoded, length = encoded_of(sizes), 16 + spare
    sequences = pack(encoded, length, enabled)
    assert all(part.shape == (len(sequences.tokens), length) for part in sequences)
    assert [part.dtype for part in sequences] == [np.int32, np.int32, np.int32, bool]
    found = sorted(unpacked(sequences), key=lambda item: item[1][0])
    assert len(found) == len(sizes)
    for (_, tokens, targets), expected, marks in zip(found, encoded.tokens, encoded.targets, strict=True):
        np.testing.assert_array_equal(tokens, expected)
        np.testing.assert_array_equal(targets, marks)
    # Beside the records there is padding only, at the end, and nothing in it counts.
    padding = sequences.segments == 0
    assert (~padding).sum() == sum(sizes)
    assert (np.diff(padding.astype(int), axis=1) >= 0).all()
    assert not sequences.tokens[padding].any() and not sequences.positions[padding].any()
    assert not sequences.targets[padding].any() and not sequences.targets[sequences.positions == 0].any()
    assert padding_share(sequences) == pytest.approx(1 - sum(sizes) / (len(sequences.tokens) * length) if sizes else 0)
    if not enabled:
        assert [row for row, *_ in found] == list(range(len(sizes)))
    # Both levels in the order given: each sequence's first tokens rise, and so do the tokens in a sequence.
    assert (np.diff(sequences.tokens[:, 0]) > 0).all()
    assert all((np.diff(row[row > 0]) > 0).all() for row in sequences.tokens)
    again = pack(encoded_of(sizes), length, enabled)
    for first, second in zip(sequences, again, strict=True):
        np.testing.assert_array_equal(first, second)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(sizes=SIZES)
def test_waste_is_bounded(sizes):
    """No two sequences would fit into one, so all but one are more than half full on average."""
    sequences = pack(encoded_of(sizes), 16)
    filled = np.sort((sequences.segments > 0).sum(axis=1))
    if len(filled) > 1:
        assert filled[0] + filled[1] > 16
    assert len(filled) <= math.ceil(2 * sum(sizes) / 16)


def fewest(sizes, length):
    """The fewest sequences that hold all records, by trying everything."""

    @functools.cache
    def least(rest, rooms):
        if not rest:
            return 0
        size, rest = rest[0], rest[1:]
        best = 1 + least(rest, tuple(sorted((*rooms, length - size))))
        for place, room in enumerate(rooms):
            if room >= size:
                best = min(best, least(rest, tuple(sorted((*rooms[:place], room - size, *rooms[place + 1 :])))))
        return best

    return least(tuple(sizes), ())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 16), min_size=1, max_size=8))
def test_close_to_the_fewest_sequences(sizes):
    """Johnson et al. 1974 (with Dósa's constant): 11/9 of the fewest, plus 6/9."""
    best = fewest(sizes, 16)
    assert best <= len(pack(encoded_of(sizes), 16).tokens) <= 11 / 9 * best + 6 / 9


def test_best_fit_takes_the_fullest_sequence():
    """10 and 9 leave rooms of 6 and 7; 6 takes the 6, so that the 7 is left, and 1 takes what there is."""
    sequences = pack(encoded_of([10, 9, 6, 1]), 16)
    assert [(row, len(tokens)) for row, tokens, _ in unpacked(sequences)] == [(0, 10), (0, 6), (1, 9), (1, 1)]


def test_packing_is_fast():
    sizes = np.random.default_rng(0).integers(10, 513, 15_000).tolist()
    encoded = encoded_of(sizes)
    begin = time.perf_counter()
    sequences = pack(encoded, 512)
    assert time.perf_counter() - begin < 3
    assert padding_share(sequences) < 0.01 < 0.4 < padding_share(pack(encoded, 512, False))


def test_a_record_that_does_not_fit_is_explained():
    with pytest.raises(ConfigurationError, match="sequences of 5 tokens are too short for a record of 6 tokens"):
        pack(encoded_of([3, 6]), 5)


# ---- Encoding -------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(min_codepoint=97, max_codepoint=122), max_size=12)
RECORDS = st.lists(st.builds(Record, TEXT, TEXT, TEXT.map(lambda text: text + "!"), st.just("")), max_size=8)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    records=RECORDS,
    train_on=st.sampled_from(["response", "all"]),
    cut_off=st.integers(2, 70),
    longer=st.sampled_from(["cut", "drop"]),
)
def test_tokens_targets_and_the_cut_off(records, train_on, cut_off, longer):
    chosen = formatting(train_on=train_on, cut_off=cut_off, longer=longer)
    expected, cut = {}, 0
    for index, record in enumerate(records):
        # By hand: begin, prompt, response, end.
        text = render(record, None, "short")
        ids = [1, *map(ord, text.prompt + text.response), 2]
        counts = [place > 0 and (train_on == "all" or place > len(text.prompt)) for place in range(len(ids))]
        if not any(counts[:cut_off]) or (longer == "drop" and len(ids) > cut_off):
            continue
        expected[index] = (ids[:cut_off], counts[:cut_off])
        cut += len(ids) > cut_off
    if records and not expected:
        with pytest.raises(ConfigurationError, match=f"cut_off = {cut_off} leaves nothing"):
            encode(records, Letters(), chosen)
        return
    encoded = encode(records, Letters(), chosen)
    assert encoded.kept.tolist() == list(expected)
    assert (encoded.cut, encoded.dropped) == (cut, len(records) - len(expected))
    for tokens, targets, (ids, counts) in zip(encoded.tokens, encoded.targets, expected.values(), strict=True):
        assert tokens.tolist() == ids and targets.tolist() == counts
        assert (tokens.dtype, targets.dtype) == (np.int32, bool)


def test_a_cut_record_loses_its_end():
    record = Record("ab", "", "c" * 10, "")
    begin = prompt_length(record)
    [tokens] = encode([record], Letters(), formatting(cut_off=begin + 10)).tokens
    assert tokens.tolist()[begin:] == [ord("c")] * 10
    whole = encode([record], Letters(), formatting(cut_off=begin + 11))
    assert whole.tokens[0][-1] == 2 and whole.cut == 0 and whole.targets[0].sum() == 11


def test_a_prompt_that_reaches_the_cut_off_is_dropped_and_counted():
    long, fitting = Record("x" * 40, "", "y", ""), Record("x", "", "y", "")
    for cut_off in (prompt_length(long) - 1, prompt_length(long)):
        encoded = encode([long, fitting], Letters(), formatting(cut_off=cut_off))
        assert (encoded.kept.tolist(), encoded.cut, encoded.dropped) == ([1], 0, 1)
    encoded = encode([long, fitting], Letters(), formatting(cut_off=prompt_length(long) + 1))
    assert (encoded.kept.tolist(), encoded.cut, encoded.dropped) == ([0, 1], 1, 0)


@pytest.mark.parametrize("longer", ["cut", "drop"])
def test_the_remedy_works(longer):
    records = [Record("a" * size, "", "b" * 5, "") for size in (30, 20)]
    with pytest.raises(ConfigurationError, match=r"of client 3: all 2 records.*at least \d+\.") as error:
        encode(records, Letters(), formatting(cut_off=10, longer=longer), owner="client 3")
    enough = int(str(error.value).rstrip(".").rpartition(" ")[2])
    assert encode(records, Letters(), formatting(cut_off=enough, longer=longer)).kept.tolist() == [1]
    with pytest.raises(ConfigurationError):
        encode(records, Letters(), formatting(cut_off=enough - 1, longer=longer))
    with pytest.raises(ConfigurationError, match="take template = 'short'"):
        encode(records, Letters(), formatting(cut_off=10, template="alpaca"))


def test_no_records_give_no_sequences():
    """A source may have no test records."""
    sequences = pack(encode([], Letters(), formatting()), 40)
    assert sequences.tokens.shape == (0, 40) and padding_share(sequences) == 0


@pytest.mark.parametrize("options", [{"cut_off": 1}, {"template": "none"}, {"train_on": "x"}, {"longer": "split"}])
def test_the_settings_check_their_values(options):
    with pytest.raises(ConfigurationError):
        Text(**options)


# ---- Real text, real tokenizer --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories(shared_folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(shared_folder / "models" / "stories260k")


def test_dolly_with_a_real_tokenizer(shared_folder, stories):
    options = {"files": str(shared_folder / "dolly" / "local_training_2.json"), "limit": 200}
    records = sources.build("records", **options).train.records
    chosen = Text(template="short", cut_off=512)
    encoded = encode(records, stories, chosen)
    sequences = pack(encoded, chosen.cut_off)
    assert len(encoded.kept) + encoded.dropped == 200 and encoded.cut > 0 < encoded.dropped
    assert padding_share(sequences) < 0.06 < 0.3 < padding_share(pack(encoded, chosen.cut_off, False))
    # What counts in the loss is the response, cut where the record is cut.
    tokenised = tokenise(records, stories, "short")
    counted = {tuple(tokens): tokens[targets] for _, tokens, targets in unpacked(sequences)}
    assert len(counted) == len(encoded.kept)
    for index in encoded.kept:
        prompt, response = tokenised[index]
        found = counted[tuple([*prompt, *response][:512])]
        np.testing.assert_array_equal(found, response[: 512 - len(prompt)])
        text = stories.decode(found, skip_special_tokens=True).rstrip("\ufffd")  # a cut can fall inside a character
        assert records[index].response.startswith(text) and text
