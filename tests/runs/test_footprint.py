"""The memory table: arguments are counted exactly, and the compiler agrees."""

import json

import pytest
import yaml

from fedjax_qp import config
from fedjax_qp.cli import main
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs import footprint as memory
from fedjax_qp.runs.footprint import measure

LAYERS, WIDTH, VOCABULARY, HIDDEN, RANK = 2, 16, 32, 24, 2
CLIENTS, SEQUENCES, LENGTH, TESTS = 6, 5, 8, 2


@pytest.fixture
def settings(tmp_path):
    """A model's folder with nothing but config.json."""
    content = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": HIDDEN,
        "vocab_size": VOCABULARY,
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    return {
        "name": "tiny",
        "data": {"name": "records", "files": "nowhere"},
        "partition": "natural",
        "model": {"name": "pretrained", "path": str(tmp_path), "rank": RANK, "dtype": "bfloat16"},
        "algorithm": "fedit",
        "text": {"cut_off": LENGTH, "test_records": TESTS},
        "local": {"batch_size": 2, "epochs": 1},
        "participation": {"cohort": 4},
        "engine": {"parallel": "shard_map", "devices": 2, "model_devices": 4, "lanes": 2, "rounds_per_chunk": 1},
        "evaluation": {"batch_size": 4},
    }


def test_arguments_are_counted_exactly_and_printed(settings, tmp_path, monkeypatch, capsys):
    made = config.from_dict(settings)
    found = measure(made, clients=CLIENTS, sequences_per_client=SEQUENCES)
    matrices = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * HIDDEN) + 2 * VOCABULARY * WIDTH
    assert found.frozen == 2 * (matrices // 4 + (2 * LAYERS + 1) * WIDTH)  # bfloat16; norms are whole everywhere
    entries = 2 * LAYERS * RANK * 2 * WIDTH
    assert found.trainable_entries == entries
    assert found.clients == CLIENTS * (4 * entries + 4)
    assert found.server == 4 * entries + 2 * 4
    sequence = LENGTH * (3 * 4 + 1)
    assert found.per_client == 4 * entries + 4 + SEQUENCES * sequence + TESTS * (sequence + 1)
    counted = found.frozen + found.clients + found.server + found.batches
    assert found.argument_bytes == pytest.approx(counted, rel=0.02)  # per device; it pads scalars
    assert found.temporaries > 0

    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(memory, "measure", lambda given, **numbers: found if (given, numbers) == asked else None)
    asked = (made, {"clients": CLIENTS, "sequences_per_client": SEQUENCES})
    with pytest.raises(SystemExit) as ended:
        main(["memory", str(file), "--clients", str(CLIENTS), "--sequences-per-client", str(SEQUENCES)])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for part in (f"{found.frozen:,}", f"{found.total:,}", f"{entries:,} (before any mask)", "CPU compiler", "estimate"):
        assert part in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "lenet"}, "model = 'lenet': memory is counted for language models only"),
        ({"participation": {"cohort": 7}}, "participation.cohort = 7 is more than the 6 clients assumed"),
        ({"engine": {"parallel": "shard_map", "devices": 16}}, "engine.devices = 16, but 8"),
    ],
)
def test_what_cannot_be_counted_is_refused(settings, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        measure(config.from_dict({**settings, **changes}), clients=CLIENTS, sequences_per_client=SEQUENCES)


@pytest.mark.parametrize(
    "numbers",
    [{"clients": 0}, {"clients": -1}, {"sequences_per_client": 0}, {"clients": 10**6, "sequences_per_client": 10**3}],
)
def test_numbers_out_of_range_are_refused(settings, numbers, tmp_path, capsys):
    with pytest.raises(ConfigurationError, match="must be at least 1 each, and their product at most 100,000,000"):
        measure(config.from_dict(settings), **{"clients": CLIENTS, "sequences_per_client": SEQUENCES, **numbers})
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(settings))
    given = [f"--{name.replace('_', '-')}={value}" for name, value in numbers.items()]
    with pytest.raises(SystemExit) as ended:
        main(["memory", str(file), *given])
    assert ended.value.code == 2
    assert "must be at least 1 each" in capsys.readouterr().err
