"""Records that runs left once, kept in tests/golden: a change that moves a number shows here first.

Another processor may round otherwise, so numbers are compared closely, not to the bit. On one machine GOLDEN=exact compares
the bytes, and GOLDEN=write writes the files anew: for a change that is meant to move them, and says so.
"""

import json
import math
import os
from pathlib import Path

import pytest
from support.instructions import instruction_settings, write_instructions
from support.runs import SMALL

from fedjax_qp.cli import main
from fedjax_qp.runs.folder import RunFolder

GOLDEN = Path(__file__).parent / "golden"
MODE = os.environ.get("GOLDEN", "close")

JOINT = {
    "algorithm": {"name": "fedqp", "form": "joint", "alpha": 1.0},
    "participation": {"cohort": 4, "dropout": 0.3, "stragglers": 0.3},
}
FEDAVG = {"algorithm": {"name": "fedavg", "weighting": "uniform"}}
DEVICES = {"engine": {"lanes": 2, "devices": 2, "parallel": "shard_map", "rounds_per_chunk": 2}}

# Changes of SMALL, seeds, and whether the case is too long for the ordinary suite.
RUNS = {
    "fedavg_one_lane": (FEDAVG | {"engine": {"lanes": 1, "rounds_per_chunk": 2}}, "0", True),
    "fedavg_two_lanes": (FEDAVG, "0", True),
    "fedavg_two_devices": (FEDAVG | DEVICES, "0", True),
    "fedqp_nearest": ({}, "0", True),
    "fedqp_joint_dropouts": (JOINT, "0", False),
    "fedqp_joint_two_devices": (JOINT | DEVICES, "0", True),
    "four_runs": ({"partition": {"name": "iid", "clients": 12}}, "0 1 2 3", False),
    "perfit": (None, "0", False),
}


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[pytest.mark.slow] * slow) for name, (_, _, slow) in RUNS.items()]
)
def test_runs_leave_the_records_that_they_left_before(case, tmp_path):
    changes, seeds, _ = RUNS[case]
    settings = SMALL | changes if changes is not None else instruction_settings(write_instructions(tmp_path))
    settings |= {"name": case, "folder": str(tmp_path / "runs"), "tracking": {"tensorboard": False}}
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    several = ["--seeds", *seeds.split()] if " " in seeds else [f"seed={seeds}"]
    with pytest.raises(SystemExit) as ended:
        main(["run", str(tmp_path / "run.yaml"), *several])
    assert not ended.value.code
    found = "".join(
        RunFolder(tmp_path / "runs" / f"{case}-seed{seed}").records_file.read_text() for seed in seeds.split()
    )
    file = GOLDEN / f"{case}.jsonl"
    if MODE == "write":
        file.write_text(found)
    if MODE == "exact":
        assert found == file.read_text()
    expected = [json.loads(line) for line in file.read_text().splitlines()]
    assert not differences([json.loads(line) for line in found.splitlines()], expected)


def differences(found: object, expected: object, place: str = "records") -> list[str]:
    """Places where two records differ by more than rounding. Accuracies may differ by one of the 360 test examples."""
    if isinstance(expected, dict) and isinstance(found, dict) and found.keys() == expected.keys():
        return [line for key in expected for line in differences(found[key], expected[key], f"{place}.{key}")]
    if isinstance(expected, list) and isinstance(found, list) and len(found) == len(expected):
        return [line for at, one in enumerate(expected) for line in differences(found[at], one, f"{place}[{at}]")]
    if isinstance(expected, float) and isinstance(found, float | int):
        least = 0.003 if "accuracy" in place else 1e-5
        same = math.isclose(found, expected, rel_tol=2e-3, abs_tol=least)
    else:
        same = found == expected and type(found) is type(expected)
    return [] if same else [f"{place}: {found} where it was {expected}"]


def test_a_moved_number_is_seen():
    kept = [{"round": 1, "test_loss": 1.5, "clients": {"mean": 0.25, "accuracies": [0.5, None]}}]
    assert not differences(kept, kept)
    for moved in (
        [{**kept[0], "round": 2}],
        [{**kept[0], "test_loss": 1.51}],
        [{**kept[0], "clients": {"mean": 0.25, "accuracies": [0.6, None]}}],
        [{**kept[0], "clients": {"mean": None, "accuracies": [0.5, None]}}],
        [{"round": 1, "test_loss": 1.5}],
        kept * 2,
    ):
        assert len(differences(moved, kept)) == 1
