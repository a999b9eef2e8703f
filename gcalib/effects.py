"""What runs show, before anything is judged: changes against a base variant, and cosines with their nulls.

Functions take records named by `gcalib.tables.named` and look at those of the commonest width. Notebooks reach them
through `gcalib.claims`, whose rules judge what they return.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests

from gcalib import relations, stats, tables

METRIC = "full.ndcg@10"
MOST_SEEDS = 10_000  # that `seeds_needed` looks at
PROTOCOLS = {
    "full": "full.ndcg@10", "999 sampled": "s999.ndcg@10", "100 sampled": "s100.ndcg@10", "AUC": "full.auc",
}  # fmt: skip
"""What ranking is measured by, the first of them the judged one."""
CELLS = ["pair", "point"]
"""What comparable runs share, for C2."""
STEPS = [
    ("GCA0", "GCA0+1"), ("GCA1", "GCA0+1"), ("GCA1", "GCA1+2"), ("GCA2", "GCA1+2"), ("GCA0+1", "GCA0+1+2"),
    ("GCA1+2", "GCA0+1+2"),
]  # fmt: skip


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
    domain: Literal["A", "B"] | None = None,
) -> pd.DataFrame:
    """Change of a metric against a base variant, in percent of the base's mean, model by model.

    Each pair counts alike, and so do its two domains (or one is asked, `domain`); runs are paired by seed within a
    pair.

    Returns
    -------
    pandas.DataFrame
        As `gcalib.stats.stratified_difference`, one row a model and variant.

    Raises
    ------
    ValueError
        If two runs share model, pair, variant and seed, such as those of two patiences.
    """
    long = _by_domain(runs, base, variants, {"value": metric})
    long = long[long["domain"] == domain] if domain else long
    long = long.assign(value=tables.relative(long, "value", base, ["model", "pair", "domain"]))
    return _within_pairs(long, base, level, variance)


def by_case(
    runs: pd.DataFrame, base: str, variant: str, metric: str = METRIC, domain: Literal["A", "B"] | None = None
) -> pd.DataFrame:
    """`effect` in each case (model and pair) by itself, those that have both variants: a mean over pairs may hide that
    one of them makes it.

    Returns
    -------
    pandas.DataFrame
        `model`, `pair`, then `n`, `mean`, `low`, `high`, `p` as in `effect`.
    """
    found, columns = [], ["model", "pair", "n", "mean", "low", "high", "p"]
    for (_, pair), mine in one_width(runs).groupby(["model", "pair"], sort=False):
        if {base, variant} <= set(mine["variant"]):
            found.append(effect(mine, base, [variant], metric, domain=domain).assign(pair=str(pair))[columns])
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=columns)


def steps(runs: pd.DataFrame) -> pd.DataFrame:
    """What one insertion point more changes: rows of `effect` with a column `step`, those that a model has runs for.

    Of several steps the worst will be looked at, so each interval's `level` is Bonferroni's for their number. Runs
    with a point more whose seed the other place lacks are left out.
    """
    parts = []
    for _, mine in runs.groupby("model", sort=False):
        compared = {}
        for base, more in STEPS:
            before = mine[mine["variant"] == base]
            after = mine[mine["variant"] == more].merge(before[["pair", "seed"]])
            if len(after):
                compared[base, more] = pd.concat([before, after])
        level = 1 - 0.05 / max(len(compared), 1)
        for (base, more), both in compared.items():
            found = effect(both, base, [more], level=level)
            parts.append(found.assign(step=f"{more} against {base}", level=level))
    columns = ["model", "variant", "strata", "n", "mean", "low", "high", "p", "step", "level"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def protocols_apart(runs: pd.DataFrame, base: str, variant: str, first: str, last: str) -> pd.DataFrame:
    """By how many points a variant's change is larger under one protocol of `PROTOCOLS` than under another, run by run.

    That one protocol's interval excludes zero and another's does not is no difference between them yet: both may hold
    the same effect, measured with less noise in one.

    Returns
    -------
    pandas.DataFrame
        As of `effect`, in points of percent: the change under `last` less that under `first`.
    """
    long = _by_domain(runs, base, [variant], {name: PROTOCOLS[name] for name in (first, last)})
    of = {name: tables.relative(long, name, base, ["model", "pair", "domain"]) for name in (first, last)}
    return _within_pairs(long.assign(value=of[last] - of[first]), base)


def _by_domain(runs: pd.DataFrame, base: str, variants: Sequence[str], figures: Mapping[str, str]) -> pd.DataFrame:
    """`tables.by_domain` of some variants at one width; a pair without the base has nothing to compare with."""
    same = one_width(runs)
    long = tables.by_domain(same[same["variant"].isin([base, *variants])], figures)
    return long.merge(long.loc[long["variant"] == base, ["model", "pair"]].drop_duplicates())


def _within_pairs(
    long: pd.DataFrame, base: str, level: float = 0.95, variance: Literal["pooled", "own"] = "pooled"
) -> pd.DataFrame:
    """Differences of `value` from the base, mean over domains, paired by seed within each pair."""
    run = ["model", "pair", "variant", "seed"]
    twice = long[long.duplicated([*run, "domain"])]
    if len(twice):  # their mean would pass for one run
        raise ValueError(
            f"Several runs are {', '.join(map(str, twice[run].iloc[0]))} (model, pair, variant, seed): keep one of "
            "each, such as those of one stop_patience."
        )
    both = long.groupby(["model", "pair", "variant", "seed"], sort=False)["value"].mean().reset_index()
    return stats.stratified_difference(
        both, "value", strata="pair", pair_on="seed", between="variant", base=base, by="model", level=level,
        variance=variance,
    )  # fmt: skip


def by_patience(searched: pd.DataFrame) -> pd.DataFrame:
    """Validation MRR, summed over both domains, of plain runs trained with several patiences.

    A row a case and seed, a column a patience (`stop_patience`, ascending); rows that lack one are left out.
    """
    plain = searched[searched["variant"] == "plain"]
    plain = plain.assign(mrr=plain["val.a.full.mrr"] + plain["val.b.full.mrr"])
    table = plain.pivot_table(index=["case", "seed"], columns="stop_patience", values="mrr", sort=False)
    return table.sort_index(axis=1).dropna()


def patience_lacking(runs: pd.DataFrame, searched: pd.DataFrame) -> pd.Series:
    """Percent of validation MRR that the longest patience of `by_patience` adds, of cases that run with a shorter one.

    By case, in the order of `runs`, mean over seeds; a case to which it adds less than half a percent is left out.
    """
    table = by_patience(searched)
    added = (100 * (table.iloc[:, -1] / table.iloc[:, 0] - 1)).groupby("case").mean()
    used = runs.groupby("case", sort=False)["stop_patience"].max()
    shorter = [case for case in used.index[used < table.columns[-1]] if case in added and added[case] >= 0.5]
    return added[shorter]


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

    `cos_ungated` and `cos_gated` are the cosines that mean lengths imply, along / hypot(along, across), of X' and of
    what is added to X, gate * X': ratios of means, in which long updates weigh more, and no means of |cos|. What a run
    was recorded without is nan, such as `null_fresh_mean_abs` and `gated_cos_mean_abs` in older ones.
    """
    names = [
        "cos_mean_abs", "cos_xy_mean_abs", "null_mean_abs", "null_perm_mean_abs", "null_init_mean_abs",
        "null_fresh_mean_abs", "cos_signed", "cos_abs_of_mean", "norm_along", "norm_across", "gated_norm_along",
        "gated_norm_across", "gated_cos_mean_abs", "gated_null_perm_mean_abs",
    ]  # fmt: skip
    same = one_width(runs)
    every = [f"test.{letter}.gca{point}.{name}" for letter in "ab" for point in (0, 1, 2) for name in names[5:]]
    same = same.assign(**{name: np.nan for name in every if name not in same})
    rows = tables.by_point(same, {name: name for name in names}).astype(dict.fromkeys(names[5:], float))
    for name, lengths in (("cos_ungated", "norm"), ("cos_gated", "gated_norm")):
        along, across = (rows.pop(f"{lengths}_{part}") for part in ("along", "across"))
        rows[name] = along / np.hypot(along, across)
    ranking = tables.by_domain(same, {"ndcg": METRIC})[["run_id", "domain", "ndcg"]]
    return rows.merge(ranking, on=["run_id", "domain"])


def first_points(runs: pd.DataFrame) -> pd.DataFrame:
    """`alignment` with one row a run and domain: of a stack, its first insertion point."""
    return alignment(runs).sort_values("point", kind="stable").drop_duplicates(["run_id", "domain"])


def comparable(rows: pd.DataFrame) -> bool:
    """Whether rows of `alignment` have two cells or more in which several runs compare: a correlation needs them."""
    return bool((rows.groupby(CELLS).size() > 1).sum() > 1)


def within_cells(
    rows: pd.DataFrame, measure: str = "cos_mean_abs", cells: Sequence[str] = tuple(CELLS)
) -> pd.DataFrame:
    """Correlation of a measure with `ndcg` within cells, for each model and domain of `first_points` that has two or
    more `CELLS` in which runs compare: `r`, `low`, `high`, `p`, `holm` (p corrected for the number of rows), and
    `said`, r with its interval in words.

    Nan where no two of `cells` hold runs that compare.
    """
    found = {}
    for key, part in rows.groupby(["model", "domain"], sort=False):
        if comparable(part):
            try:
                readings = relations.correlations(part, measure, "ndcg", cells).set_index("reading")
                found[key] = readings.loc["within cells", ["r", "low", "high", "p"]].astype(float)
            except ValueError:
                found[key] = pd.Series(np.nan, index=["r", "low", "high", "p"])
    table = pd.DataFrame(found, index=["r", "low", "high", "p"]).T
    table.index = pd.MultiIndex.from_tuples(list(found), names=["model", "domain"]) if found else table.index
    tested = table["p"].dropna()
    table["holm"] = pd.Series(multipletests(tested, method="holm")[1] if len(tested) else [], tested.index, float)
    table["said"] = [stats.said(r, low, high, unit="", digits=2) for r, low, high in table.to_numpy()[:, :3]]
    return table


def between_variants(rows: pd.DataFrame) -> float:
    """Share of the cosine's variance within `CELLS` that lies between variants, and not between runs of one variant."""
    within, alike = (
        float(((rows["cos_mean_abs"] - rows.groupby(cells)["cos_mean_abs"].transform("mean")) ** 2).sum())
        for cells in (CELLS, [*CELLS, "variant"])
    )
    return 1 - alike / within if within else np.nan


def untrained(runs: pd.DataFrame, by: Sequence[str] = ("model",), *, drawn_anew: bool = True) -> pd.DataFrame:
    """Of the excess of mean |cos(X, X′)| over random directions: what is left with an untrained module in its place.

    A row a group of GCA0's runs with its default gate and heads that measured both kinds: `own`, the module set back to
    the weights of the run's start, and `fresh`, a module drawn anew. What the first keeps and the second does not is in
    the rest of the model, which was trained through those weights. Then `excess` itself, and `runs`. Without
    `drawn_anew`, of the other runs, which measured the first kind only.
    """
    rows = alignment(runs).query("point == 0 and variant == 'GCA0'")
    rows = rows[rows["null_fresh_mean_abs"].notna() == drawn_anew]
    grouped = rows.groupby(list(by), sort=False)
    means = grouped[["cos_mean_abs", "null_init_mean_abs", "null_fresh_mean_abs", "null_mean_abs"]].mean()
    excess, own, fresh = (means.iloc[:, place] - means["null_mean_abs"] for place in range(3))
    counted = grouped["run_id"].nunique()
    return pd.DataFrame({"own": own / excess, "fresh": fresh / excess, "excess": excess, "runs": counted})
