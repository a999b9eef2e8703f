"""What is said of claims once they are judged: the sum over models, tables, sentences.

The rules are in `gcalib.claims`, through which notebooks reach what is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from gcalib import stats

TEXTS = {
    "C1": "early cross-attention (GCA0) improves every baseline",
    "C2": "the more orthogonal X′ is to X, the better the ranking",
    "C3": "orthogonality emerges in training and settles at a cosine of 0.1 to 0.2 in every model",
    "C4": "GCA0 beats the baseline widened to the same number of parameters",
    "C5": "stacking is not monotone: deeper is not always better",
    "C6": "the cosine of X and X′ does not depend on how similar X and Y are",
}


def overall(judged: pd.DataFrame) -> pd.DataFrame:
    """One row a claim: `text`, `verdict`, and for how many of its rows each word was found."""
    rows = []
    for claim, part in judged.groupby("claim", sort=False):
        words = part["verdict"]
        word = "confirmed" if (words == "confirmed").all() else "refuted" if (words == "refuted").any() else "undecided"
        counts = {name: int((words == name).sum()) for name in ("confirmed", "refuted", "undecided")}
        rows.append({"claim": claim, "text": TEXTS[str(claim)], "verdict": word, **counts})
    return pd.DataFrame(rows)


def figure(row: Mapping[str, Any] | pd.Series) -> str:
    """The figure of a judged row with its interval, for a sentence or a table."""
    if not row["n"]:
        return "no runs"
    unit = "%" if row["unit"] == "%" else ""
    return stats.said(row["ours"], row["low"], row["high"], unit=unit, digits=1 if unit else 2)


def in_short(judged: pd.DataFrame) -> str:
    """The verdicts as a Markdown table: a row a claim, a column a model; parts apart where they were judged so."""
    models = judged["model"].unique()
    lines = [f"| claim | {' | '.join(models)} | verdict |", "|---" * (len(models) + 2) + "|"]
    for total in overall(judged).itertuples():
        mine = judged[judged["claim"] == total.claim]
        cells = []
        for model in models:
            rows = [row for _, row in mine[mine["model"] == model].iterrows()]
            cells.append("<br>".join((f"{row['part']}: " if row["part"] else "") + figure(row) for row in rows))
        lines.append(f"| {total.claim}: {total.text} | {' | '.join(cells)} | **{total.verdict}** |")
    return "\n".join(lines)


def by_measure(measured: pd.DataFrame) -> list[str]:
    """One sentence a claim: its verdict by the judged measure, and by those that say otherwise, with how many cases
    (model and pair) would be so by themselves.

    Parameters
    ----------
    measured
        As of `under_protocols`.
    """
    said = []
    for claim, part in measured.groupby("claim"):
        word = {str(name): str(overall(rows)["verdict"].item()) for name, rows in part.groupby("protocol", sort=False)}
        judged = next(iter(word))
        alone = {str(name): rows[["clear", "cases"]].sum().tolist() for name, rows in part.groupby("protocol")}
        other = [
            f"{verdict} by {name} (by itself above zero in {alone[name][0]} of {alone[name][1]} cases)"
            for name, verdict in word.items()
            if verdict != word[judged]
        ]
        ending = f"{' and '.join(other)}" if other else "no other measure changes that"
        said.append(f"{claim} is {word[judged]} by {judged} NDCG@10, {ending}.")
    return said
