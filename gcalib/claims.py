"""Claims C1 to C6 of the paper, each put to the same records by a rule that was fixed before the runs.

Two were made stricter after the first of them, both towards "undecided": C2 asks for two cells in which runs compare,
C3 for six runs.

Every judge takes records named by `gcalib.tables.named`, looks at those of the commonest width, and returns one row a
model (and domain): `claim`, `model`, what was asked in `question`, `ours` with its interval `low` to `high`, the
`unit`, `verdict` ("confirmed", "refuted", "undecided") and `runs`, how many it rests on. `overall` sums up a claim that
is made of every model: it is confirmed if it is so for each, refuted if it is for one, and undecided otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from gcalib import relations, stats, tables

METRIC = "full.ndcg@10"
MARGIN = 0.3  # correlation below which C6 calls two cosines independent: a tenth of the variance
TEXTS = {
    "C1": "early cross-attention (GCA0) improves every baseline",
    "C2": "the more orthogonal X′ is to X, the better the ranking",
    "C3": "orthogonality emerges and settles at the same level, a cosine of 0.1 to 0.2, in every model",
    "C4": "GCA0 beats the baseline widened to the same number of parameters",
    "C5": "stacking is not monotone: deeper is not always better",
    "C6": "the cosine of X and X′ does not depend on how similar X and Y are",
}
COLUMNS = ["claim", "model", "question", "ours", "low", "high", "unit", "verdict", "runs"]


def published(claim: str) -> pd.DataFrame:
    """The paper's figures for a claim: `model`, `pair`, `domain`, `figure`, `plain` (without GCA), `found`.

    Examples
    --------
    >>> published("C1").query("figure == 'NDCG@10'")[["model", "plain", "found"]].to_dict("records")[1]
    {'model': 'ABXI', 'plain': 0.154, 'found': 0.176}
    """
    table = pd.read_csv(Path(__file__).with_name("claims.csv"))
    return table[table["claim"] == claim].drop(columns="claim").reset_index(drop=True)


def one_width(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of the commonest width: the cosine of random directions depends on it, and ranking does too."""
    return runs[runs["dim"] == runs["dim"].mode().iloc[0]]


def effect(
    runs: pd.DataFrame, base: str, variants: Sequence[str], metric: str = METRIC, level: float = 0.95
) -> pd.DataFrame:
    """Change of a metric against a base variant, in percent of the base's mean, model by model.

    Each pair counts alike, and so do its two domains; runs are paired by seed within a pair.

    Returns
    -------
    pandas.DataFrame
        As `gcalib.stats.stratified_difference`, one row a model and variant.
    """
    same = one_width(runs)
    long = tables.by_domain(same[same["variant"].isin([base, *variants])], {"value": metric})
    # a pair on which a model has no run of the base has nothing to compare with
    based = long[long["variant"] == base].groupby(["model", "pair"]).size().rename("runs of the base")
    long = long.merge(based, left_on=["model", "pair"], right_index=True)
    long = long.assign(value=tables.relative(long, "value", base, ["model", "pair", "domain"]))
    both = long.groupby(["model", "pair", "variant", "seed"], sort=False)["value"].mean().reset_index()
    within = {"strata": "pair", "pair_on": "seed", "between": "variant", "base": base, "by": "model"}
    return stats.stratified_difference(both, "value", **within, level=level)  # type: ignore[arg-type]


def _gains(runs: pd.DataFrame, claim: str, base: str, variant: str, metric: str) -> pd.DataFrame:
    found = effect(runs, base, [variant], metric).rename(columns={"mean": "ours", "n": "runs"})
    words = [stats.verdict(low, high) for low, high in found[["low", "high"]].to_numpy(float)]
    question = f"{variant} against {base}, NDCG@10"
    return found.assign(claim=claim, question=question, unit="%", verdict=words)[COLUMNS]


def early(runs: pd.DataFrame, metric: str = METRIC) -> pd.DataFrame:
    """C1: does GCA0 improve each baseline?"""
    return _gains(runs, "C1", "plain", "GCA0", metric)


def matched(runs: pd.DataFrame, metric: str = METRIC) -> pd.DataFrame:
    """C4: does GCA0 beat the baseline widened to its size?"""
    return _gains(runs, "C4", "widened", "GCA0", metric)


def alignment(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a run, domain and insertion point: the cosines and their nulls by their names, and `ndcg`."""
    names = ("cos_mean_abs", "cos_xy_mean_abs", "null_mean_abs", "null_perm_mean_abs", "null_init_mean_abs")
    same = one_width(runs)
    cosines = tables.by_point(same, {name: name for name in names})
    ranking = tables.by_domain(same, {"ndcg": METRIC})[["run_id", "domain", "ndcg"]]
    return cosines.merge(ranking, on=["run_id", "domain"])


CELLS = ["pair", "point"]
"""What comparable runs share, for C2."""


def comparable(rows: pd.DataFrame) -> bool:
    """Whether rows of `alignment` have two cells or more in which several runs compare: a correlation needs them."""
    return bool((rows.groupby(CELLS).size() > 1).sum() > 1)


def orthogonal_is_better(runs: pd.DataFrame) -> pd.DataFrame:
    """C2: among runs of one pair and insertion point, does NDCG@10 fall as the cosine rises?

    A model whose runs have one such cell only is undecided.
    """
    rows = []
    for (model, domain), part in alignment(runs).groupby(["model", "domain"], sort=False):
        r = low = high = np.nan
        if comparable(part):
            found = relations.correlations(part, "cos_mean_abs", "ndcg", CELLS)
            within = found[found["reading"] == "within cells"]
            ((r, low, high),) = within[["r", "low", "high"]].to_numpy(float)
        question = f"r of mean |cos(X, X′)| with NDCG@10 in {domain}, within pair and point"
        word = stats.verdict(low, high, expected=-1)
        rows.append(("C2", model, question, r, low, high, "r", word, len(part)))
    return pd.DataFrame(rows, columns=COLUMNS)


def same_level(runs: pd.DataFrame) -> pd.DataFrame:
    """C3: does the median cosine at point 0 lie within the paper's range? Percentile bootstrap over runs.

    Fewer than six runs leave it undecided: even from the lowest to the highest of five, a median is missed more often
    than once in twenty.
    """
    low, high = published("C3")["found"]
    rows = []
    early_only = alignment(runs).query("point == 0")
    for model, part in early_only.groupby("model", sort=False):
        values = part.groupby("run_id")["cos_mean_abs"].mean().to_numpy()
        left, right = np.nan, np.nan
        if len(values) >= 6:
            drawn = scipy_stats.bootstrap((values,), np.median, method="percentile", rng=np.random.default_rng(0))
            left, right = drawn.confidence_interval
        word = (
            "confirmed" if low <= left and right <= high else "refuted" if right < low or left > high else "undecided"
        )
        rows.append(("C3", model, "median of mean |cos(X, X′)| at point 0", np.median(values), left, right, "", word,
                     len(values)))  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS)


STEPS = [("GCA0", "GCA0+1"), ("GCA1", "GCA0+1"), ("GCA1", "GCA1+2"), ("GCA0+1", "GCA0+1+2")]


def depth(runs: pd.DataFrame) -> pd.DataFrame:
    """C5: what does one insertion point more add? A loss in some step confirms the claim, a gain in each refutes it.

    The worst of several steps is looked at, so the intervals are Bonferroni's. A model without stacks is undecided.
    """
    level = 1 - 0.05 / len(STEPS)
    steps = [effect(runs, base, [more], level=level).assign(step=f"{more} against {base}") for base, more in STEPS]
    rows = []
    for model, part in pd.concat(steps).groupby("model", sort=False):
        word = "confirmed" if bool((part["high"] < 0).any()) else "undecided"
        word = "refuted" if bool((part["low"] > 0).all()) else word
        worst = part.nsmallest(1, "mean").to_dict("records")[0]
        question = f"{worst['step']}, NDCG@10: the worst of {len(part)} steps"
        found = (worst["mean"], worst["low"], worst["high"])
        rows.append(("C5", model, question, *found, "%", word, int(part["n"].sum())))
    for model in runs["model"].unique():
        if model not in {row[1] for row in rows}:
            rows.append(("C5", model, "no runs with stacks", np.nan, np.nan, np.nan, "%", "undecided", 0))
    return pd.DataFrame(rows, columns=COLUMNS)


def independent(runs: pd.DataFrame) -> pd.DataFrame:
    """C6: over pairs and domains, does the cosine of X and X′ follow that of X and Y?

    One dot a model, pair and domain (the mean of its runs at point 0), so that many runs of one data set do not pass
    for many data sets. Confirmed if the interval of r lies within ±`MARGIN`, refuted if it excludes 0.
    """
    keys = ["model", "pair", "domain"]
    dots = alignment(runs).query("point == 0").groupby(keys, sort=False)[["cos_xy_mean_abs", "cos_mean_abs"]].mean()
    rows = []
    for model, part in dots.groupby("model", sort=False):
        r, low, high = np.nan, np.nan, np.nan
        if len(part) > 3:
            found = scipy_stats.pearsonr(part["cos_xy_mean_abs"], part["cos_mean_abs"])
            r, (low, high) = found.statistic, found.confidence_interval(0.95)
        word = "refuted" if low > 0 or high < 0 else "confirmed" if max(-low, high) < MARGIN else "undecided"
        question = f"r of |cos(X, Y)| with |cos(X, X′)| over {len(part)} pairs and domains"
        rows.append(("C6", model, question, r, low, high, "r", word, len(part)))
    return pd.DataFrame(rows, columns=COLUMNS)


def judge(runs: pd.DataFrame) -> pd.DataFrame:
    """All six claims, a row a model (and domain)."""
    judges = (early, orthogonal_is_better, same_level, matched, depth, independent)
    return pd.concat([one(runs) for one in judges], ignore_index=True)


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
    if not row["runs"]:
        return "no runs"
    unit = "%" if row["unit"] == "%" else ""
    return stats.said(row["ours"], row["low"], row["high"], unit=unit, digits=1 if unit else 2)


def in_short(judged: pd.DataFrame) -> str:
    """The verdicts as a Markdown table: a row a claim, a column a model; domains apart where they were judged so."""
    models = judged["model"].unique()
    lines = [f"| claim | {' | '.join(models)} | verdict |", "|---" * (len(models) + 2) + "|"]
    for total in overall(judged).itertuples():
        mine = judged[judged["claim"] == total.claim]
        cells = []
        for model in models:
            rows = [row for _, row in mine[mine["model"] == model].iterrows()]
            letters = [f"{row['question'].split(' in ')[1][0]}: " if len(rows) > 1 else "" for row in rows]
            cells.append("<br>".join(letter + figure(row) for letter, row in zip(letters, rows, strict=True)))
        lines.append(f"| {total.claim}: {total.text} | {' | '.join(cells)} | **{total.verdict}** |")
    return "\n".join(lines)
