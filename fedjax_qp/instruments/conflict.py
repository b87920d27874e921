"""Angles between the updates of a cohort's clients, and the share of pairs that pull against each other.

Two updates of a client are looked at: its progress, trained − start model, which is what it learned; and its difference to
the global model, trained − w, which is what the server averages and which holds the client's mutation too.
"""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from fedjax_qp.instruments.drawing import DIVERGING, curve_style, place_legend, style_axes
from fedjax_qp.instruments.replay import Replayed, conflict_share, mean_cosine
from fedjax_qp.instruments.settings import Settings
from fedjax_qp.instruments.subject import Subject, state_at
from fedjax_qp.reports.plots import whole_ticks

KINDS = {"progress": "trained − start model", "difference": "trained − global model"}


def measure(subject: Subject, settings: Settings) -> dict[str, Any]:
    """Runs the round after the checkpoint once more, and likewise the round after some others that are kept.

    Returns:
      "clients" and the cosine matrices "progress" and "difference" of this checkpoint's next round; "over_rounds": of each of
      them the round that was run and, of both kinds, share of negative pairs and mean cosine; "recorded": the mean
      cosine of progress that the run recorded in each round.
    """
    run = subject.run
    others = _spread_out([round for round in run.kept if round != subject.round], settings.replays - 1)
    found = {round: run.replay(state_at(run, round)) for round in others}
    here = found[subject.round] = run.replay(subject.state)
    recorded = [
        [line["round"], line["update/cosine_between_clients"]]
        for line in run.history
        if line.get("update/cosine_between_clients") is not None
    ]
    return {
        "clients": here.clients.tolist(),
        **{kind: getattr(here, kind).tolist() for kind in KINDS},
        "over_rounds": [_summary(round, found[round]) for round in sorted(found)],
        "recorded": recorded,
    }


def headline(result: dict[str, Any]) -> dict[str, float]:
    """Numbers for the table."""
    clients, cosines = np.array(result["clients"]), {label: np.array(result[kind]) for kind, label in KINDS.items()}
    shares = {f"pairs in conflict, {label}": conflict_share(matrix, clients) for label, matrix in cosines.items()}
    return shares | {f"mean cosine, {label}": mean_cosine(matrix, clients) for label, matrix in cosines.items()}


def draw(result: dict[str, Any], title: str, path: Path) -> Figure:
    """Draws both matrices, and conflict share and mean cosine over the rounds."""
    figure = Figure(figsize=(15.5, 4.8), layout=ConstrainedLayoutEngine(w_pad=0.12))
    figure.suptitle(title, fontsize="medium", x=0.01, horizontalalignment="left", parse_math=False)
    *matrices, over_rounds = figure.subplots(1, 3, width_ratios=(1, 1.12, 1.35))
    for axes, (kind, label) in zip(matrices, KINDS.items(), strict=True):
        cosines = np.array(result[kind])
        axes.imshow(cosines, cmap=DIVERGING, vmin=-1, vmax=1)
        share = conflict_share(cosines, np.array(result["clients"]))
        axes.set_title(f"{label}\n{share:.0%} of pairs in conflict", fontsize="medium")
        axes.set_xticks(range(len(cosines)), result["clients"], rotation=90)
        axes.set_yticks(range(len(cosines)), result["clients"])
        axes.set(xlabel="client", ylabel="client")
    figure.colorbar(matrices[-1].images[0], ax=matrices[-1], label="cosine of the two updates")
    rounds = [line["round"] for line in result["over_rounds"]]
    index = 0
    for kind, label in KINDS.items():
        for quantity, name in (("share", "conflict share"), ("mean", "mean cosine")):
            values = [line[f"{kind}_{quantity}"] for line in result["over_rounds"]]
            over_rounds.plot(rounds, values, label=f"{name}, {label}", **curve_style(index))
            index += 1
    if result["recorded"]:
        numbers, values = zip(*result["recorded"], strict=True)
        style = {"color": "0.6", "linewidth": 1}
        over_rounds.plot(numbers, values, label="mean cosine of progress, as the run recorded it", zorder=1, **style)
    over_rounds.axhline(0, color="0.4", linewidth=1, linestyle=":")
    over_rounds.set(xlabel="round", ylabel="share of pairs, or cosine (no unit)")
    over_rounds.xaxis.set_major_locator(whole_ticks())
    style_axes(over_rounds)
    place_legend(over_rounds, 1)
    figure.savefig(path, dpi=140)
    return figure


def _spread_out(rounds: list[int], count: int) -> list[int]:
    """At most `count` of the rounds, from first to last."""
    if len(rounds) <= count:
        return rounds
    return [rounds[place] for place in np.linspace(0, len(rounds) - 1, count).round().astype(int)]


def _summary(round: int, found: Replayed) -> dict[str, Any]:
    """Args: round: of the checkpoint; the updates are those of the round after it."""
    line: dict[str, Any] = {"round": round + 1}
    for kind in KINDS:
        line[f"{kind}_share"] = conflict_share(getattr(found, kind), found.clients)
        line[f"{kind}_mean"] = mean_cosine(getattr(found, kind), found.clients)
    return line
