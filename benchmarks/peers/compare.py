"""How much faster or slower is this simulator than its peers, on the same work?

    make bench-peers                                            # everything, some hours of nothing else on the machine
    python benchmarks/peers/compare.py w1 w4 --peers tuned_torch --turns 5

For each workload and peer, ours and the peer run the same block of rounds in turn, A B A B …; each is a process of its own
that stays alive, and waits while the other one works. A row holds the ratio peer / ours of each turn, median and spread;
start-up (imports, reading, compiling, the first block) is apart. Both sides report every round's mean training loss and how
far the model moved: they must agree, or somebody skipped work. Turns in which other processes were busy are repeated.

Writes `peers.jsonl` (a new row replaces the old one of the same workload and peer) and `peers.md`, the table made of it.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from quiet import foreign_seconds, processes
from workloads import Sources, benchmarks, prepare

HERE = Path(__file__).parent
# Which environment a peer lives in. The order is that of the table.
ENVIRONMENTS = {
    "usual_torch": "torch",
    "tuned_torch": "torch",
    "with_flower": "flower",
    "with_pfl": "pfl",
    "with_fedjax": "fedjax",
    "with_fluke": "fluke",
}
LABELS = {
    "usual_torch": "PyTorch, usual loop",
    "tuned_torch": "PyTorch, tuned",
    "with_flower": "Flower",
    "with_pfl": "pfl",
    "with_fedjax": "FedJAX",
    "with_fluke": "fluke",
}
# Rounding grows with every step; a side that left a client, a batch or the weights of the average out is far beyond it.
FIRST_ROUND, LAST_ROUND = 1e-3, 2e-2
# A turn in which other processes had a larger share of the processors does not count, if enough others do.
DISTURBED, RETRIES = 0.05, 3


class Side:
    """A process that runs blocks on command.

    OpenMP's threads wait passively: while they spin, one other busy process makes PyTorch's operations many times slower.
    """

    def __init__(self, python: str, script: str, folder: Path, errors: Path):
        errors.parent.mkdir(parents=True, exist_ok=True)
        self.errors = errors
        with errors.open("w") as file:
            self.process = subprocess.Popen(
                [python, str(HERE / f"{script}.py"), str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env={**os.environ, "OMP_WAIT_POLICY": "passive"},
                text=True,
                bufsize=1,
            )
        self.facts = self._answer()

    def block(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("block\n")
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            last = "\n".join(self.errors.read_text(errors="replace").splitlines()[-20:])
            raise RuntimeError(f"{self.process.args} ended with {self.process.wait()}; see {self.errors}:\n{last}")
        return json.loads(line)


def measured(side: Side, mark: str) -> dict[str, Any]:
    """A block, with the share of the machine that others used meanwhile."""
    before, started = processes(), time.perf_counter()
    found = side.block()
    available = (time.perf_counter() - started) * (os.cpu_count() or 1)
    return {**found, "others": foreign_seconds(before, processes(), mark) / available}


def in_turn(ours: Side, peer: Side, turns: int, mark: str) -> list[tuple[dict, dict]]:
    """Blocks of both, alternately; turns that others disturbed are repeated, but not for ever."""
    pairs = []
    for _ in range(RETRIES * turns):
        pairs.append((measured(ours, mark), measured(peer, mark)))
        quiet = [pair for pair in pairs if max(side["others"] for side in pair) <= DISTURBED]
        if len(quiet) == turns:
            return quiet
    return sorted(pairs, key=lambda pair: max(side["others"] for side in pair))[:turns]


def row(workload: dict[str, Any], name: str, ours: Side, peer: Side, turns: int, mark: str) -> dict[str, Any]:
    """Measures one peer on one workload."""
    pairs = in_turn(ours, peer, turns, mark)
    ratios = [theirs["seconds"] / own["seconds"] for own, theirs in pairs]
    own, theirs = pairs[-1]
    differences = [abs(a - b) / abs(a) for a, b in zip(own["losses"], theirs["losses"], strict=True)]
    moved = abs(own["distance"] - theirs["distance"]) / own["distance"]
    return {
        "benchmark": "peers",
        "workload": workload["workload"],
        "title": workload["title"],
        "images": workload["images"],
        "rounds": workload["rounds"],
        "peer": name,
        "ratio": {"median": median(ratios), "min": min(ratios), "max": max(ratios)},
        "ours_seconds": [own["seconds"] for own, _ in pairs],
        "peer_seconds": [theirs["seconds"] for _, theirs in pairs],
        "others": [[own["others"], theirs["others"]] for own, theirs in pairs],
        "losses": {"ours": own["losses"], "peer": theirs["losses"]},
        "loss_difference": {"first_round": differences[0], "largest": max(differences)},
        "distance": {"ours": own["distance"], "peer": theirs["distance"]},
        "agree": differences[0] <= FIRST_ROUND and max(*differences, moved) <= LAST_ROUND,
        "ours": {key: value for key, value in ours.facts.items() if key != "environment"},
        "peer_facts": peer.facts,
        "environment": ours.facts["environment"],
    }


def add_row(file: Path, new: dict[str, Any]) -> None:
    """Puts a row into a file in place of an older one for the same pair."""
    rows = {(old["workload"], old["peer"]): old for old in read_rows(file)}
    rows[new["workload"], new["peer"]] = new
    order = sorted(rows.values(), key=lambda row: (row["workload"], [*ENVIRONMENTS].index(row["peer"])))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in order))
    file.with_suffix(".md").write_text(table(order))


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """Workload by peer: how many times as long as ours the peer takes."""
    peers = [peer for peer in ENVIRONMENTS if any(row["peer"] == peer for row in rows)]
    lines = ["| workload | ours | " + " | ".join(LABELS[peer] for peer in peers) + " |"]
    lines.append("| :-- | --: |" + " --: |" * len(peers))
    for workload in sorted({row["workload"] for row in rows}):
        of_peer = {row["peer"]: row for row in rows if row["workload"] == workload}
        some = next(iter(of_peer.values()))
        seconds = median([second for row in of_peer.values() for second in row["ours_seconds"]]) / some["rounds"]
        cells = [cell(of_peer.get(peer)) for peer in peers]
        name = f"{workload.upper()}: {some['title']} ({some['images']})"
        lines.append(f"| {name} | {seconds:.3g} s | " + " | ".join(cells) + " |")
    star = f"\n\\* other processes had more than {DISTURBED:.0%} of the processors, or their share was not recorded.\n"
    return "\n".join(lines) + "\n" + (star if any("*" in line for line in lines) else "")


def cell(row: dict[str, Any] | None) -> str:
    """Median ratio with its spread; a cross where the losses disagree, a star where others disturbed the measurement."""
    if row is None:
        return "–"
    low, middle, high = (f"{row['ratio'][key]:.3g}" for key in ("min", "median", "max"))
    disturbed = max(share for turn in row.get("others", [[1.0]]) for share in turn) > DISTURBED
    return f"{middle} [{low} – {high}]" + ("*" if disturbed else "") + ("" if row["agree"] else " ✗ losses differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=[*benchmarks(Path(), Sources(None, ""))])
    parser.add_argument("--peers", nargs="+", choices=[*ENVIRONMENTS], default=[*ENVIRONMENTS])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rounds", type=int, help="rounds in a block; default: the workload's own")
    parser.add_argument("--environments", type=Path, default=Path(".venv-peers"), help="where `make` puts them")
    parser.add_argument("--exchange", type=Path, default=Path(".venv-peers/exchange"))
    parser.add_argument("--fashion-mnist", help="folder of its idx files; default: where Debian puts them")
    parser.add_argument("--split", default="splits/fedmut/cifar10_100_noniidCase5_beta0.1.json")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/peers.jsonl"))
    parser.add_argument("--table", action="store_true", help="measure nothing; make the table anew")
    parser.add_argument("--keep", action="store_true", help="take the exchange folders that are there")
    arguments = parser.parse_args()
    if arguments.table:
        arguments.output.with_suffix(".md").write_text(table(read_rows(arguments.output)))
        return
    found = Sources(arguments.fashion_mnist, arguments.split)
    for workload in arguments.workloads:
        folder = arguments.exchange / workload
        if not (arguments.keep and (folder / "settings.json").exists()):
            prepare(workload, arguments.exchange, found, rounds=arguments.rounds, threads=os.cpu_count() or 1)
        compare(workload, folder, arguments)


def compare(workload: str, folder: Path, arguments: argparse.Namespace) -> None:
    """One workload against every peer that has an environment."""
    settings = json.loads((folder / "settings.json").read_text())
    logs = arguments.exchange / "logs"
    ours = Side(sys.executable, "ours", folder, logs / f"{workload}-ours.txt")
    for name in arguments.peers:
        python = arguments.environments / ENVIRONMENTS[name] / "bin" / "python"
        if not python.exists():
            print(f"{workload} {name}: no {python}; left out")
            continue
        try:
            peer = Side(str(python), name, folder, logs / f"{workload}-{name}.txt")
            found = row(settings, name, ours, peer, arguments.turns, str(arguments.environments))
            peer.close()
        except RuntimeError as error:
            print(f"{workload} {name} failed: {error}")
            continue
        add_row(arguments.output, found)
        print(workload, name, cell(found), found["loss_difference"], flush=True)
    ours.close()


if __name__ == "__main__":
    main()
