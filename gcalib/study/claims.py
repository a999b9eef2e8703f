"""Claims C1 to C6 of the paper, each put to the same records by a rule that was fixed before the runs.

Some were changed after the first of them. Towards "undecided": C2 asks for two cells in which runs compare and takes a
run once, C3 asks for six runs. And C3 and C6 look at the default gate and heads, since the cosine depends on the gate
and a mean over variants is one of the mix; C3 asks separately whether the cosine ends below that of the module's
initial weights, and no longer for one level in all models. C5 knows two more steps, and is refuted only by all of them.

Functions take records named by `gcalib.study.tables.named` and look at those of the commonest width. Every judge
returns one row a model (and part) with `COLUMNS`: `part` is a domain, or what is asked, where a claim has several;
`ours` has an interval from `low` to `high` of some `level`; `n` counts what is in `of`, and `runs` the records behind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from gcalib.study import statistics, tables
from gcalib.study.statistics import Variance

TEXTS = {
    "C1": "early cross-attention (GCA0) improves every baseline",
    "C2": "the more orthogonal X′ is to X, the better the ranking",
    "C3": "orthogonality emerges in training and settles at a cosine of 0.1 to 0.2 in every model",
    "C4": "GCA0 beats the baseline widened to the same number of parameters",
    "C5": "stacking is not monotone: deeper is not always better",
    "C6": "the cosine of X and X′ does not depend on how similar X and Y are",
}
NEAR = 0.02  # a cosine no further than that from a null is said to lie at it
MARGIN = 0.3  # correlation below which C6 calls two cosines independent: a tenth of the variance
METRIC = "full.ndcg@10"
PROTOCOLS = {"full": METRIC, "999 sampled": "s999.ndcg@10", "100 sampled": "s100.ndcg@10", "AUC": "full.auc"}
"""What ranking is measured by, the first of them the judged one."""
CELLS = ["pair", "point"]
"""What comparable runs share, for C2."""
STEPS = [
    ("GCA0", "GCA0+1"), ("GCA1", "GCA0+1"), ("GCA1", "GCA1+2"), ("GCA2", "GCA1+2"), ("GCA0+1", "GCA0+1+2"),
    ("GCA1+2", "GCA0+1+2"),
]  # fmt: skip
COLUMNS = ["model", "part", "question", "ours", "low", "high", "level", "unit", "verdict", "n", "of", "runs"]


def published(claim: str) -> pd.DataFrame:
    """The paper's figures for a claim: `model`, `pair`, `domain`, `figure`, `plain` (without GCA), `found`."""
    return tables.published("claims").query("claim == @claim").drop(columns="claim").reset_index(drop=True)


def verdict(low: float, high: float, expected: int = 1) -> str:
    """What an interval (nan if there is none) says of a claimed direction, the sign `expected`.

    Examples
    --------
    >>> verdict(0.1, 0.3), verdict(-0.1, 0.3), verdict(0.1, 0.3, expected=-1)
    ('confirmed', 'undecided', 'refuted')
    """
    if low > 0 or high < 0:
        return "confirmed" if (low > 0) == (expected > 0) else "refuted"
    return "undecided"


def lies_within(low: float, high: float, band: tuple[float, float]) -> str:
    """What an interval says of a claim that its figure lies within a range."""
    if band[0] <= low and high <= band[1]:
        return "confirmed"
    return "refuted" if high < band[0] or low > band[1] else "undecided"


def effect(
    runs: pd.DataFrame, base: str, variants: Sequence[str], metric: str = METRIC, *, less: str = "",
    domain: str | None = None, level: float = 0.95, variance: Variance = "pooled",
) -> pd.DataFrame:  # fmt: skip
    """Change of a metric against a base variant, in percent of the base's mean, model by model.

    Each pair counts alike, and so do its two domains (or one is asked, "A" or "B"); runs are paired by seed within a
    pair, and pairs without the base are left out. Two runs of one model, pair, variant and seed are refused.

    Parameters
    ----------
    less
        A metric whose change is subtracted, run by run. That one metric's interval excludes zero and another's does not
        is no difference between them yet: both may hold the same effect, measured with less noise in one.
    level, variance
        See `gcalib.study.statistics.difference`, whose table is returned, a row a model and variant.
    """
    same = tables.one_width(runs)
    same = same[same["variant"].isin([base, *variants])]
    same = same[same["case"].isin(same.loc[same["variant"] == base, "case"])]
    run = ["model", "pair", "variant", "seed"]
    if (twice := same.duplicated(run)).any():  # a mean over domains would hide it
        raise ValueError(f"Several runs are {same.loc[twice, run].iloc[0].to_dict()}: keep one, such as one patience.")
    long = tables.by_domain(same, {"value": metric, "less": less or metric})
    changes = [tables.relative(long, name, base, ["case", "domain"]) for name in ("value", "less")]
    long = long.assign(value=changes[0] - changes[1] if less else changes[0])
    long = long[long["domain"] == domain] if domain else long
    both = long.groupby(run, sort=False)["value"].mean().reset_index()
    return statistics.difference(both, "value", base, by="model", strata="pair", level=level, variance=variance)


def by_case(runs: pd.DataFrame, base: str, metric: str = METRIC, domain: str | None = None) -> pd.DataFrame:
    """`effect` of GCA0 in each `model` and `pair` that has both: a mean over pairs may hide that one makes it."""
    found = [effect(runs, base, []).assign(pair="")]
    for (_, pair), mine in tables.one_width(runs).groupby(["model", "pair"], sort=False):
        if {base, "GCA0"} <= set(mine["variant"]):
            found.append(effect(mine, base, ["GCA0"], metric, domain=domain).assign(pair=str(pair)))
    return pd.concat(found[1:] or found, ignore_index=True)


def steps(runs: pd.DataFrame) -> pd.DataFrame:
    """What one insertion point more changes: rows of `effect` with a column `step`, those that a model has runs for.

    Of several steps the worst will be looked at, so each interval's `level` is Bonferroni's for their number. Runs
    with a point more whose seed the other variant lacks are left out.
    """
    parts = [effect(runs, "plain", []).assign(step="", level=0.95)]
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
    return pd.concat(parts[1:] or parts, ignore_index=True)


def seeds_needed(gains: pd.DataFrame, smallest: float) -> pd.Series:
    """By model, the seeds a pair with which an effect of `smallest` percent would be seen in four studies of five.

    They follow from the spread in `gains` (of `effect`); nan where there is none to go by, infinite beyond 1,000.
    """
    needed, tried = {}, np.arange(2, 1_000)
    for row in gains.dropna(subset=["low"]).to_dict("records"):
        sets, each = row["strata"], row["n"] / row["strata"]
        error = (row["high"] - row["low"]) / 2 / stats.t.ppf(0.975, row["n"] - sets)  # of the mean
        power = TTestPower().power(smallest / error / np.sqrt(each), tried, 0.05, df=sets * (tried - 1))
        needed[row["model"]] = min(tried[power >= 0.8], default=np.inf)
    return pd.Series(needed, dtype=float).reindex(gains["model"])


def first_points(runs: pd.DataFrame) -> pd.DataFrame:
    """`tables.alignment` with one row a run and domain: of a stack, its first insertion point."""
    return tables.alignment(runs).sort_values("point", kind="stable").drop_duplicates(["run_id", "domain"])


def within_cells(rows: pd.DataFrame, measure: str = "cos_mean_abs", cells: Sequence[str] = CELLS) -> pd.DataFrame:
    """Correlation of a measure with `ndcg` within cells, for each model and domain of `first_points`.

    Returns
    -------
    pandas.DataFrame
        By model and domain: `r`, `low`, `high`, `p`, `n`, `holm` (p corrected for the number of rows) and `text` (r
        with its interval). Nan where no two of `cells` hold runs that compare.
    """
    found = {}
    for key, part in rows.groupby(["model", "domain"], sort=False):
        found[key] = statistics.correlations(part, measure, "ndcg", cells).set_index("reading").loc["within cells"]
    table = pd.DataFrame(found).T.rename_axis(["model", "domain"]).astype(float)
    tested = table["p"].dropna()
    table["holm"] = pd.Series(multipletests(tested, method="holm")[1] if len(tested) else [], tested.index, float)
    bounds = table[["r", "low", "high"]].to_numpy()
    table["text"] = [statistics.as_text(r, low, high, unit="", digits=2) for r, low, high in bounds]
    return table


def _judged(claim: str, rows: list[tuple[Any, ...]], runs: pd.DataFrame, parts: Sequence[str] = ("",)) -> pd.DataFrame:
    """Rows, and undecided ones for the baselines among the runs that could not be asked: `overall` is about each."""
    lacking = [name for name in tables.BASELINES if name in set(runs["model"]) - {row[0] for row in rows}]
    nothing = ("no runs to compare", *[np.nan] * 4, "", "undecided", 0, "runs", 0)
    table = pd.DataFrame([*rows, *((name, part, *nothing) for name in lacking for part in parts)], columns=COLUMNS)
    table.insert(0, "claim", claim)
    return table


def _gains(claim: str, runs: pd.DataFrame, base: str, metric: str) -> pd.DataFrame:
    question, rows = f"GCA0 against {base}, {metric.rpartition('.')[2].upper()}", []
    for row in effect(runs, base, ["GCA0"], metric).to_dict("records"):
        ours, found = (row["mean"], row["low"], row["high"], 0.95, "%"), verdict(row["low"], row["high"])
        rows.append((row["model"], "", question, *ours, found, row["n"], "pairs of runs", 2 * row["n"]))
    return _judged(claim, rows, runs)


def early(runs: pd.DataFrame, metric: str = METRIC) -> pd.DataFrame:
    """C1: does GCA0 improve each baseline?"""
    return _gains("C1", runs, "plain", metric)


def matched(runs: pd.DataFrame, metric: str = METRIC) -> pd.DataFrame:
    """C4: does GCA0 beat the parameter-matched baseline?"""
    return _gains("C4", runs, "matched", metric)


def under_protocols(runs: pd.DataFrame) -> pd.DataFrame:
    """C1 and C4 as they would be judged by each of `PROTOCOLS`: their rows, with a column `protocol`."""
    judges = [(name, metric, one) for name, metric in PROTOCOLS.items() for one in (early, matched)]
    there = [one(runs, metric).assign(protocol=name) for name, metric, one in judges if f"test.a.{metric}" in runs]
    return pd.concat(there, ignore_index=True)


def orthogonal_is_better(runs: pd.DataFrame) -> pd.DataFrame:
    """C2: among runs of one pair and insertion point, does NDCG@10 fall as the cosine rises?

    A stack is taken at its first point, since a run ranks once. A model whose runs have one such cell only is
    undecided.
    """
    question, rows = "r of mean |cos(X, X′)| with NDCG@10, within pair and point", []
    for row in within_cells(first_points(runs)).reset_index().to_dict("records"):
        ours, found = (row["r"], row["low"], row["high"], 0.95, "r"), verdict(row["low"], row["high"], -1)
        rows.append((row["model"], row["domain"], question, *ours, found, int(row["n"]), "runs", int(row["n"])))
    return _judged("C2", rows, runs, ("A", "B"))


def same_level(runs: pd.DataFrame) -> pd.DataFrame:
    """C3, of GCA0 with its default gate and heads. Does the median cosine lie within the paper's range ("level")?

    And does the cosine end below that of the same module with its initial weights ("rise")? The first by a percentile
    bootstrap over runs, the second by Student's t. Fewer than six runs leave the first undecided: even from the lowest
    to the highest of five, a median is missed more often than once in twenty.
    """
    band, rows = tuple(published("C3")["found"]), []
    default = tables.alignment(runs).query("point == 0 and variant == 'GCA0'")
    default = default.assign(rise=default["cos_mean_abs"] - default["null_initial_mean_abs"])
    for model, part in default.groupby("model", sort=False):
        by_run = part.groupby("run_id")[["cos_mean_abs", "rise"]].mean().assign(model=model)
        values, low, high = by_run["cos_mean_abs"].to_numpy(), np.nan, np.nan
        if len(values) >= 6:
            drawn = stats.bootstrap((values,), np.median, method="percentile", rng=np.random.default_rng(0))
            low, high = drawn.confidence_interval
        counted = (len(values), "runs", len(values))
        ours = (np.median(values), low, high, 0.95, "", lies_within(low, high, band))
        rows.append((model, "level", "median of mean |cos(X, X′)| at point 0", *ours, *counted))
        rise, low, high = statistics.mean_interval(by_run, "rise", "model")[["mean", "low", "high"]].to_numpy()[0]
        question = "mean |cos(X, X′)| at point 0, less that of the module with its initial weights"
        rows.append((model, "rise", question, rise, low, high, 0.95, "", verdict(low, high, -1), *counted))
    return _judged("C3", rows, runs, ("level", "rise"))


def depth(runs: pd.DataFrame) -> pd.DataFrame:
    """C5: what does one insertion point more add? A loss in some step confirms the claim, a gain in each refutes it.

    Each means all of `STEPS`: a step that was not run may lose. The worst of several steps is looked at, so the
    intervals are Bonferroni's; the row is that of the worst step that is shown to lose, or where none is, of the worst.
    A model without stacks is undecided.
    """
    rows = []
    for model, part in steps(tables.one_width(runs)).groupby("model", sort=False):
        losing, gains = part[part["high"] < 0], bool((part["low"] > 0).all()) and len(part) == len(STEPS)
        worst = (losing if len(losing) else part).nsmallest(1, "mean").iloc[0]
        ours = (*worst[["mean", "low", "high", "level"]], "%")
        found = "confirmed" if len(losing) else "refuted" if gains else "undecided"
        question = f"{worst['step']}, NDCG@10: the worst of {len(part)} steps"
        rows.append((model, "", question, *ours, found, worst["n"], "pairs of runs", 2 * worst["n"]))
    return _judged("C5", rows, runs)


def independent(runs: pd.DataFrame, over: Sequence[str] = ("pair", "domain")) -> pd.DataFrame:
    """C6: over pairs and domains, does the cosine of X and X′ follow that of X and Y?

    One dot a model, pair and domain (the mean of its runs of GCA0 with the default gate and heads), so that many runs
    of one data set do not pass for many data sets. Confirmed if the interval of r lies within ±`MARGIN`, refuted if it
    excludes 0. `over=["pair"]` looks at pairs alone, whose domains share users and a trained model.
    """
    counts, rows = " and ".join(f"{name}s" for name in over), []
    default = tables.alignment(runs).query("point == 0 and variant == 'GCA0'")
    dots = default.groupby(["model", *over], sort=False)[["cos_xy_mean_abs", "cos_mean_abs"]].mean()
    for model, part in dots.groupby("model", sort=False):
        pooled = statistics.correlations(part.reset_index(), "cos_xy_mean_abs", "cos_mean_abs", over)
        ((r, low, high),) = pooled[["r", "low", "high"]].to_numpy()[:1]
        found = "refuted" if low > 0 or high < 0 else "confirmed" if max(-low, high) < MARGIN else "undecided"
        question = f"r of |cos(X, Y)| with |cos(X, X′)| over {counts}"
        counted = (len(part), counts, default.loc[default["model"] == model, "run_id"].nunique())
        rows.append((model, "", question, r, low, high, 0.95, "r", found, *counted))
    return _judged("C6", rows, runs)


def judge(runs: pd.DataFrame) -> pd.DataFrame:
    """All six claims, a row a model (and domain)."""
    judges = (early, orthogonal_is_better, same_level, matched, depth, independent)
    return pd.concat([one(runs) for one in judges], ignore_index=True)


def overall(judged: pd.DataFrame) -> pd.DataFrame:
    """One row a claim: `text`, `verdict`, and how many of its rows are confirmed, refuted, undecided.

    A claim about every model is confirmed if it is so for each, refuted if it is for one, and undecided otherwise.
    """
    rows = []
    for claim, part in judged.groupby("claim", sort=False):
        counts = {name: int((part["verdict"] == name).sum()) for name in ("confirmed", "refuted", "undecided")}
        one = "confirmed" if counts["confirmed"] == len(part) else "refuted" if counts["refuted"] else "undecided"
        rows.append({"claim": claim, "text": TEXTS[str(claim)], "verdict": one, **counts})
    return pd.DataFrame(rows)


def as_text(row: Mapping[str, Any] | pd.Series) -> str:
    """The figure of a judged row with its interval, for a sentence or a table."""
    shown = (row["ours"], row["low"], row["high"])
    if not row["n"]:
        return "no runs"
    return statistics.as_text(*shown) if row["unit"] == "%" else statistics.as_text(*shown, unit="", digits=2)


def in_short(judged: pd.DataFrame) -> str:
    """The verdicts as a Markdown table: a row a claim, a column a model; parts apart where they were judged so."""
    models = judged["model"].unique()
    lines = [f"| claim | {' | '.join(models)} | verdict |", "|---" * (len(models) + 2) + "|"]
    parts = judged["part"].map(lambda part: f"{part}: " if part else "") + judged.apply(as_text, axis=1)
    cells = parts.groupby([judged["claim"], judged["model"]], sort=False).agg("<br>".join)
    for row in overall(judged).itertuples():
        mine = " | ".join(cells.get((row.claim, model), "") for model in models)
        lines.append(f"| {row.claim}: {row.text} | {mine} | **{row.verdict}** |")
    return "\n".join(lines)
