"""Claims C1 to C6 of the paper, each put to the same records by a rule that was fixed before the runs.

Some were changed after the first of them. Towards "undecided": C2 asks for two cells in which runs compare and takes a
run once, C3 asks for six runs. And C3 and C6 look at the default gate and heads, since the cosine depends on the gate
and a mean over variants is one of the mix; C3 asks separately whether the cosine ends below that of the module's own
start, and no longer for one level in all models. C5 knows two more steps.

Every judge takes records named by `gcalib.tables.named`, looks at those of the commonest width, and returns one row a
model (and part): `claim`, `model`, `part` (a domain, or what is asked, where a claim has several), what was asked in
`question`, `ours` with its interval `low` to `high` and that interval's `level`, the `unit`, `verdict` ("confirmed",
"refuted", "undecided"), `n` and what it counts in `of`, and `runs`, how many records it rests on. `overall` sums up a
claim that is made of every model: it is confirmed if it is so for each, refuted if it is for one, and undecided
otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from gcalib import relations, stats, tables
from gcalib.verdicts import TEXTS, by_measure, figure, in_short, overall

__all__ = [
    "CELLS", "COLUMNS", "MARGIN", "METRIC", "PROTOCOLS", "STEPS", "TEXTS", "alignment", "by_measure", "comparable",
    "depth", "early", "effect", "figure", "first_points", "in_short", "independent", "judge", "matched", "one_width",
    "orthogonal_is_better", "overall", "published", "same_level", "seeds_needed", "steps", "under_protocols",
    "untrained",
]  # fmt: skip

METRIC = "full.ndcg@10"
MOST_SEEDS = 10_000  # that `seeds_needed` looks at
MARGIN = 0.3  # correlation below which C6 calls two cosines independent: a tenth of the variance
COLUMNS = [
    "claim", "model", "part", "question", "ours", "low", "high", "level", "unit", "verdict", "n", "of", "runs",
]  # fmt: skip
PROTOCOLS = {
    "full": "full.ndcg@10", "999 sampled": "s999.ndcg@10", "100 sampled": "s100.ndcg@10", "AUC": "full.auc",
}  # fmt: skip
"""What ranking is measured by, the first of them the judged one."""


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
    runs: pd.DataFrame,
    base: str,
    variants: Sequence[str],
    metric: str = METRIC,
    level: float = 0.95,
    variance: Literal["pooled", "own"] = "pooled",
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
    return stats.stratified_difference(both, "value", **within, level=level, variance=variance)  # type: ignore[arg-type]


def _gains(runs: pd.DataFrame, claim: str, base: str, variant: str, metric: str) -> pd.DataFrame:
    found = effect(runs, base, [variant], metric).rename(columns={"mean": "ours"})
    words = [stats.verdict(low, high) for low, high in found[["low", "high"]].to_numpy(float)]
    question = f"{variant} against {base}, {metric.rpartition('.')[2].upper()}"
    return found.assign(
        claim=claim, part="", question=question, level=0.95, unit="%", verdict=words,
        of="pairs of runs", runs=2 * found["n"],
    )[COLUMNS]  # fmt: skip


def early(runs: pd.DataFrame, metric: str = METRIC) -> pd.DataFrame:
    """C1: does GCA0 improve each baseline?"""
    return _gains(runs, "C1", "plain", "GCA0", metric)


def matched(runs: pd.DataFrame, metric: str = METRIC) -> pd.DataFrame:
    """C4: does GCA0 beat the baseline widened to its size?"""
    return _gains(runs, "C4", "widened", "GCA0", metric)


def under_protocols(runs: pd.DataFrame) -> pd.DataFrame:
    """C1 and C4 as they would be judged by other candidates or by AUC: their rows, with a column `protocol`.

    Protocols for which the runs have no figure (a pair with too few items) are left out.
    """
    there = {name: metric for name, metric in PROTOCOLS.items() if f"test.a.{metric}" in runs}
    found = [one(runs, metric).assign(protocol=name) for name, metric in there.items() for one in (early, matched)]
    return pd.concat(found, ignore_index=True)


def seeds_needed(
    runs: pd.DataFrame, base: str, variant: str, smallest: float, power: float = 0.8, level: float = 0.95
) -> pd.Series:
    """Seeds a pair with which an effect of `smallest` percent would be seen with some power, by the spread so far.

    Returns
    -------
    pandas.Series
        By model; nan where there is no spread to go by.
    """
    needed: dict[str, float] = {}
    for row in effect(runs, base, [variant], level=level).to_dict("records"):
        sets, each, half = row["strata"], row["n"] / row["strata"], (row["high"] - row["low"]) / 2
        needed[row["model"]] = np.nan
        if np.isfinite(half):
            # of the mean over pairs, were there one seed a pair
            spread = half / scipy_stats.t.ppf((1 + level) / 2, row["n"] - sets) * np.sqrt(each)
            tried = np.arange(2, MOST_SEEDS)
            quantiles = scipy_stats.t.ppf([[(1 + level) / 2], [power]], sets * (tried - 1)).sum(axis=0)
            enough = tried[quantiles * spread / np.sqrt(tried) <= smallest]
            needed[row["model"]] = enough[0] if len(enough) else np.inf
    return pd.Series(needed, dtype=float)


def alignment(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a run, domain and insertion point: the cosines and their nulls by their names, and `ndcg`.

    `null_fresh_mean_abs` is nan of runs recorded before it was measured.
    """
    names = (
        "cos_mean_abs", "cos_xy_mean_abs", "null_mean_abs", "null_perm_mean_abs", "null_init_mean_abs",
        "null_fresh_mean_abs",
    )  # fmt: skip
    same = one_width(runs)
    since = [f"test.{letter}.gca{point}.null_fresh_mean_abs" for letter in "ab" for point in (0, 1, 2)]
    same = same.assign(**{name: np.nan for name in since if name not in same})
    cosines = tables.by_point(same, {name: name for name in names})
    ranking = tables.by_domain(same, {"ndcg": METRIC})[["run_id", "domain", "ndcg"]]
    return cosines.merge(ranking, on=["run_id", "domain"])


def first_points(runs: pd.DataFrame) -> pd.DataFrame:
    """`alignment` with one row a run and domain: of a stack, its first insertion point."""
    return alignment(runs).sort_values("point", kind="stable").drop_duplicates(["run_id", "domain"])


CELLS = ["pair", "point"]
"""What comparable runs share, for C2."""


def comparable(rows: pd.DataFrame) -> bool:
    """Whether rows of `alignment` have two cells or more in which several runs compare: a correlation needs them."""
    return bool((rows.groupby(CELLS).size() > 1).sum() > 1)


def orthogonal_is_better(runs: pd.DataFrame) -> pd.DataFrame:
    """C2: among runs of one pair and insertion point, does NDCG@10 fall as the cosine rises?

    A stack is taken at its first point, since a run ranks once. A model whose runs have one such cell only is
    undecided.
    """
    rows = []
    for (model, domain), part in first_points(runs).groupby(["model", "domain"], sort=False):
        r = low = high = np.nan
        if comparable(part):
            found = relations.correlations(part, "cos_mean_abs", "ndcg", CELLS)
            within = found[found["reading"] == "within cells"]
            ((r, low, high),) = within[["r", "low", "high"]].to_numpy(float)
        question = "r of mean |cos(X, X′)| with NDCG@10, within pair and point"
        word = stats.verdict(low, high, expected=-1)
        rows.append(("C2", model, domain, question, r, low, high, 0.95, "r", word, len(part), "runs", len(part)))
    return pd.DataFrame(rows, columns=COLUMNS)


def same_level(runs: pd.DataFrame) -> pd.DataFrame:
    """C3, of GCA0 with its default gate and heads: does the median cosine lie within the paper's range, and does the
    cosine end below that of the same module set back to its start?

    The first by a percentile bootstrap over runs, the second by Student's t. Fewer than six runs leave the first
    undecided: even from the lowest to the highest of five, a median is missed more often than once in twenty.
    """
    low, high = published("C3")["found"]
    rows = []
    default = alignment(runs).query("point == 0 and variant == 'GCA0'")
    default = default.assign(rise=default["cos_mean_abs"] - default["null_init_mean_abs"])
    for model, part in default.groupby("model", sort=False):
        by_run = part.groupby("run_id")[["cos_mean_abs", "rise"]].mean().reset_index()
        values, left, right = by_run["cos_mean_abs"].to_numpy(), np.nan, np.nan
        if len(values) >= 6:
            drawn = scipy_stats.bootstrap((values,), np.median, method="percentile", rng=np.random.default_rng(0))
            left, right = drawn.confidence_interval
        word = (
            "confirmed" if low <= left and right <= high else "refuted" if right < low or left > high else "undecided"
        )
        counted = (len(values), "runs", len(values))
        question = "median of mean |cos(X, X′)| at point 0"
        rows.append(("C3", model, "level", question, np.median(values), left, right, 0.95, "", word, *counted))
        mean = stats.mean_interval(by_run.assign(all=0), "rise", "all").iloc[0]
        question = "mean |cos(X, X′)| at point 0, less that of the module set back to its start"
        word = stats.verdict(mean["low"], mean["high"], expected=-1)
        rows.append(("C3", model, "rise", question, mean["mean"], mean["low"], mean["high"], 0.95, "", word, *counted))
    return pd.DataFrame(rows, columns=COLUMNS)


def untrained(runs: pd.DataFrame, by: Sequence[str] = ("model",)) -> pd.DataFrame:
    """Of the excess of mean |cos(X, X′)| over random directions: what is left with an untrained module in its place.

    A row a group of GCA0's runs with its default gate and heads that measured both kinds: `own`, the module set back to
    the weights of the run's start, and `fresh`, a module drawn anew. What the first keeps and the second does not is in
    the rest of the model, which was trained through those weights. Then `excess` itself, and `runs`.
    """
    rows = alignment(runs).query("point == 0 and variant == 'GCA0'").dropna(subset=["null_fresh_mean_abs"])
    grouped = rows.groupby(list(by), sort=False)
    means = grouped[["cos_mean_abs", "null_init_mean_abs", "null_fresh_mean_abs", "null_mean_abs"]].mean()
    excess, own, fresh = (means.iloc[:, place] - means["null_mean_abs"] for place in range(3))
    counted = grouped["run_id"].nunique()
    return pd.DataFrame({"own": own / excess, "fresh": fresh / excess, "excess": excess, "runs": counted})


STEPS = [
    ("GCA0", "GCA0+1"), ("GCA1", "GCA0+1"), ("GCA1", "GCA1+2"), ("GCA2", "GCA1+2"), ("GCA0+1", "GCA0+1+2"),
    ("GCA1+2", "GCA0+1+2"),
]  # fmt: skip


def steps(runs: pd.DataFrame) -> pd.DataFrame:
    """What one insertion point more changes: rows of `effect` with a column `step`, those that a model has runs for.

    Of several steps the worst will be looked at, so each interval's `level` is Bonferroni's for their number.
    """
    parts = []
    for _, mine in runs.groupby("model", sort=False):
        there = set(mine["variant"])
        mine_steps = [(base, more) for base, more in STEPS if {base, more} <= there]
        for base, more in mine_steps:
            level = 1 - 0.05 / len(mine_steps)
            found = effect(mine, base, [more], level=level)
            parts.append(found.assign(step=f"{more} against {base}", level=level))
    columns = ["model", "variant", "strata", "n", "mean", "low", "high", "p", "step", "level"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def depth(runs: pd.DataFrame) -> pd.DataFrame:
    """C5: what does one insertion point more add? A loss in some step confirms the claim, a gain in each refutes it.

    The worst of several steps is looked at, so the intervals are Bonferroni's. A model without stacks is undecided.
    """
    rows, found = [], steps(one_width(runs))
    for model in runs["model"].unique():
        part = found[found["model"] == model]
        if not len(part):
            nothing = (np.nan, np.nan, np.nan, np.nan, "%", "undecided", 0, "pairs of runs", 0)
            rows.append(("C5", model, "", "no runs with stacks", *nothing))
            continue
        word = "confirmed" if bool((part["high"] < 0).any()) else "undecided"
        word = "refuted" if bool((part["low"] > 0).all()) else word
        worst = part.nsmallest(1, "mean").to_dict("records")[0]
        question = f"{worst['step']}, NDCG@10: the worst of {len(part)} steps"
        ours = (worst["mean"], worst["low"], worst["high"], worst["level"])
        counted = (int(worst["n"]), "pairs of runs", 2 * int(worst["n"]))
        rows.append(("C5", model, "", question, *ours, "%", word, *counted))
    return pd.DataFrame(rows, columns=COLUMNS)


def independent(runs: pd.DataFrame) -> pd.DataFrame:
    """C6: over pairs and domains, does the cosine of X and X′ follow that of X and Y?

    One dot a model, pair and domain (the mean of its runs of GCA0 with the default gate and heads), so that many runs
    of one data set do not pass for many data sets. Confirmed if the interval of r lies within ±`MARGIN`, refuted if it
    excludes 0.
    """
    keys = ["model", "pair", "domain"]
    early_only = alignment(runs).query("point == 0 and variant == 'GCA0'")
    dots = early_only.groupby(keys, sort=False)[["cos_xy_mean_abs", "cos_mean_abs"]].mean()
    rows = []
    for model, part in dots.groupby("model", sort=False):
        r, low, high = np.nan, np.nan, np.nan
        if len(part) > 3:
            found = scipy_stats.pearsonr(part["cos_xy_mean_abs"], part["cos_mean_abs"])
            r, (low, high) = found.statistic, found.confidence_interval(0.95)
        word = "refuted" if low > 0 or high < 0 else "confirmed" if max(-low, high) < MARGIN else "undecided"
        question = "r of |cos(X, Y)| with |cos(X, X′)| over pairs and domains"
        counted = (len(part), "pairs and domains", int((early_only["model"] == model).sum() / 2))
        rows.append(("C6", model, "", question, r, low, high, 0.95, "r", word, *counted))
    return pd.DataFrame(rows, columns=COLUMNS)


def judge(runs: pd.DataFrame) -> pd.DataFrame:
    """All six claims, a row a model (and domain)."""
    judges = (early, orthogonal_is_better, same_level, matched, depth, independent)
    return pd.concat([one(runs) for one in judges], ignore_index=True)
