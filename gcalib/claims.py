"""Claims C1 to C6 of the paper, each put to the same records by a rule that was fixed before the runs.

Some were changed after the first of them. Towards "undecided": C2 asks for two cells in which runs compare and takes a
run once, C3 asks for six runs. And C3 and C6 look at the default gate and heads, since the cosine depends on the gate
and a mean over variants is one of the mix; C3 asks separately whether the cosine ends below that of the module's own
start, and no longer for one level in all models. C5 knows two more steps, and is refuted only by all of them.

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

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from gcalib import relations, stats, tables
from gcalib.effects import (
    CELLS,
    METRIC,
    PROTOCOLS,
    STEPS,
    alignment,
    between_variants,
    by_case,
    by_patience,
    comparable,
    effect,
    first_points,
    one_width,
    patience_lacking,
    protocols_apart,
    seeds_needed,
    steps,
    untrained,
    within_cells,
)
from gcalib.verdicts import TEXTS, by_measure, figure, in_short, overall

__all__ = [
    "CELLS", "COLUMNS", "MARGIN", "METRIC", "NEAR", "PROTOCOLS", "STEPS", "TEXTS", "alignment", "between_variants",
    "by_case", "by_measure", "by_patience", "caveats", "comparable", "depth", "early", "effect", "figure",
    "first_points", "in_short", "independent", "judge", "lies_within", "matched", "one_width", "orthogonal_is_better",
    "overall", "patience_lacking", "protocols_apart", "published", "same_level", "seeds_needed", "steps",
    "under_protocols", "untrained", "within_cells",
]  # fmt: skip

NEAR = 0.02  # a cosine no further than that from a null is said to lie at it
MARGIN = 0.3  # correlation below which C6 calls two cosines independent: a tenth of the variance
COLUMNS = [
    "claim", "model", "part", "question", "ours", "low", "high", "level", "unit", "verdict", "n", "of", "runs",
]  # fmt: skip


def published(claim: str) -> pd.DataFrame:
    """The paper's figures for a claim: `model`, `pair`, `domain`, `figure`, `plain` (without GCA), `found`.

    Examples
    --------
    >>> published("C1").query("figure == 'NDCG@10'")[["model", "plain", "found"]].to_dict("records")[1]
    {'model': 'ABXI', 'plain': 0.154, 'found': 0.176}
    """
    table = pd.read_csv(Path(__file__).with_name("claims.csv"))
    return table[table["claim"] == claim].drop(columns="claim").reset_index(drop=True)


def _gains(runs: pd.DataFrame, claim: str, base: str, variant: str, metric: str) -> pd.DataFrame:
    question = f"{variant} against {base}, {metric.rpartition('.')[2].upper()}"
    if not {base, variant} <= set(one_width(runs)["variant"]):  # in no model
        return _with_all(pd.DataFrame(columns=COLUMNS), runs, claim, question)
    found = effect(runs, base, [variant], metric).rename(columns={"mean": "ours"})
    words = [stats.verdict(low, high) for low, high in found[["low", "high"]].to_numpy(float)]
    rows = found.assign(
        claim=claim, part="", question=question, level=0.95, unit="%", verdict=words,
        of="pairs of runs", runs=2 * found["n"],
    )[COLUMNS]  # fmt: skip
    return _with_all(rows, runs, claim, question)


def _with_all(
    rows: pd.DataFrame, runs: pd.DataFrame, claim: str, question: str, parts: Sequence[str] = ("",)
) -> pd.DataFrame:
    """Rows, and undecided ones for the baselines among the runs that could not be asked: `overall` is about each."""
    lacking = [name for name in tables.BASELINES if name in set(runs["model"]) - set(rows["model"])]
    nothing = (np.nan, np.nan, np.nan, np.nan, "", "undecided", 0, "runs", 0)
    more = [(claim, name, part, question, *nothing) for name in lacking for part in parts]
    there = [table for table in (rows, pd.DataFrame(more, columns=COLUMNS)) if len(table)]
    return pd.concat(there, ignore_index=True) if there else rows


def early(runs: pd.DataFrame, metric: str = METRIC) -> pd.DataFrame:
    """C1: does GCA0 improve each baseline?"""
    return _gains(runs, "C1", "plain", "GCA0", metric)


def matched(runs: pd.DataFrame, metric: str = METRIC) -> pd.DataFrame:
    """C4: does GCA0 beat the baseline widened to its size?"""
    return _gains(runs, "C4", "widened", "GCA0", metric)


def under_protocols(runs: pd.DataFrame) -> pd.DataFrame:
    """C1 and C4 as they would be judged by other candidates or by AUC: their rows, with a column `protocol`.

    `cases` is how many pairs a model was compared on, and `clear` on how many of them the interval of that pair alone
    lies above zero. Protocols for which the runs have no figure (a pair with too few items) are left out.
    """
    there = {name: metric for name, metric in PROTOCOLS.items() if f"test.a.{metric}" in runs}
    found = []
    for name, metric in there.items():
        for judge_one, base in ((early, "plain"), (matched, "widened")):
            apart = by_case(runs, base, "GCA0", metric)
            alone = apart.assign(clear=apart["low"] > 0).groupby("model")["clear"].agg(["sum", "size"])
            rows = judge_one(runs, metric).assign(protocol=name)
            counts = alone.reindex(rows["model"], fill_value=0).to_numpy(int)
            found.append(rows.assign(clear=counts[:, 0], cases=counts[:, 1]))
    return pd.concat(found, ignore_index=True)


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
    return _with_all(pd.DataFrame(rows, columns=COLUMNS), runs, "C2", "no runs with cross-attention", ("A", "B"))


def lies_within(low: float, high: float, band: tuple[float, float]) -> str:
    """What an interval says of a claim that its figure lies within a range.

    Examples
    --------
    >>> lies_within(0.12, 0.18, (0.1, 0.2)), lies_within(0.18, 0.22, (0.1, 0.2)), lies_within(0.3, 0.4, (0.1, 0.2))
    ('confirmed', 'undecided', 'refuted')
    """
    if band[0] <= low and high <= band[1]:
        return "confirmed"
    return "refuted" if high < band[0] or low > band[1] else "undecided"


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
        word = lies_within(left, right, (low, high))
        counted = (len(values), "runs", len(values))
        question = "median of mean |cos(X, X′)| at point 0"
        rows.append(("C3", model, "level", question, np.median(values), left, right, 0.95, "", word, *counted))
        mean = stats.mean_interval(by_run.assign(all=0), "rise", "all").iloc[0]
        question = "mean |cos(X, X′)| at point 0, less that of the module set back to its start"
        word = stats.verdict(mean["low"], mean["high"], expected=-1)
        rows.append(("C3", model, "rise", question, mean["mean"], mean["low"], mean["high"], 0.95, "", word, *counted))
    return _with_all(pd.DataFrame(rows, columns=COLUMNS), runs, "C3", "no runs of GCA0", ("level", "rise"))


def depth(runs: pd.DataFrame) -> pd.DataFrame:
    """C5: what does one insertion point more add? A loss in some step confirms the claim, a gain in each refutes it.

    Each means all of `STEPS`: a step that was not run may lose. The worst of several steps is looked at, so the
    intervals are Bonferroni's; the row is that of the worst step that is shown to lose, or where none is, of the worst.
    A model without stacks is undecided.
    """
    rows, found = [], steps(one_width(runs))
    for model, part in found.groupby("model", sort=False):
        losing, gains = part[part["high"] < 0], bool((part["low"] > 0).all()) and len(part) == len(STEPS)
        word = "confirmed" if len(losing) else "refuted" if gains else "undecided"
        worst = (losing if len(losing) else part).nsmallest(1, "mean").to_dict("records")[0]
        question = f"{worst['step']}, NDCG@10: the worst of {len(part)} steps"
        ours = (worst["mean"], worst["low"], worst["high"], worst["level"])
        counted = (int(worst["n"]), "pairs of runs", 2 * int(worst["n"]))
        rows.append(("C5", model, "", question, *ours, "%", word, *counted))
    return _with_all(pd.DataFrame(rows, columns=COLUMNS), runs, "C5", "no runs with stacks")


def independent(runs: pd.DataFrame, over: Sequence[str] = ("pair", "domain")) -> pd.DataFrame:
    """C6: over pairs and domains, does the cosine of X and X′ follow that of X and Y?

    One dot a model, pair and domain (the mean of its runs of GCA0 with the default gate and heads), so that many runs
    of one data set do not pass for many data sets. Confirmed if the interval of r lies within ±`MARGIN`, refuted if it
    excludes 0. `over=["pair"]` looks at pairs alone, whose domains share users and a trained model.
    """
    keys, counts = ["model", *over], " and ".join(f"{name}s" for name in over)
    early_only = alignment(runs).query("point == 0 and variant == 'GCA0'")
    dots = early_only.groupby(keys, sort=False)[["cos_xy_mean_abs", "cos_mean_abs"]].mean()
    rows = []
    for model, part in dots.groupby("model", sort=False):
        r, low, high = np.nan, np.nan, np.nan
        if len(part) > 3:
            found = scipy_stats.pearsonr(part["cos_xy_mean_abs"], part["cos_mean_abs"])
            r, (low, high) = found.statistic, found.confidence_interval(0.95)
        word = "refuted" if low > 0 or high < 0 else "confirmed" if max(-low, high) < MARGIN else "undecided"
        question = f"r of |cos(X, Y)| with |cos(X, X′)| over {counts}"
        counted = (len(part), counts, int((early_only["model"] == model).sum() / 2))
        rows.append(("C6", model, "", question, r, low, high, 0.95, "r", word, *counted))
    return _with_all(pd.DataFrame(rows, columns=COLUMNS), runs, "C6", "no runs of GCA0")


def judge(runs: pd.DataFrame) -> pd.DataFrame:
    """All six claims, a row a model (and domain)."""
    judges = (early, orthogonal_is_better, same_level, matched, depth, independent)
    return pd.concat([one(runs) for one in judges], ignore_index=True)


def caveats(runs: pd.DataFrame) -> list[str]:
    """What weakens the rows of C2, C3 and C6 whose interval excludes zero, one sentence each.

    C2: how many rows were looked at, and whether runs of one variant, or what is added after the gate, show it as well.
    C3: where the module's own start leaves next to no room for a level in the paper's range below it.
    C6: what is left over pairs, which unlike the domains of one are independent.
    """
    found, points = [], first_points(runs)
    judged, gated = within_cells(points), within_cells(points, "cos_gated")
    alike = within_cells(points, cells=[*CELLS, "variant"])
    for row in judged[(judged["low"] > 0) | (judged["high"] < 0)].reset_index().to_dict("records"):
        model, domain = key = (row["model"], row["domain"])
        share = between_variants(points[(points["model"] == model) & (points["domain"] == domain)])
        same, after = (str(table["said"].to_dict()[key]) for table in (alike, gated))
        found.append(
            f"C2, {model}, {domain}: {row['said']} is one of {len(judged)} rows; corrected for their number (Holm), "
            f"its p is {row['holm']:.2f}. {share:.0%} of the cosine's variance within pair and point lies between "
            f"variants; among runs of one variant r is {same}, and with the update taken after the gate {after}."
        )
    default, lowest = alignment(runs).query("point == 0 and variant == 'GCA0'"), published("C3")["found"].min()
    starts = default.groupby("model")[["null_init_mean_abs", "null_mean_abs"]].mean()
    levels = same_level(runs).query("part == 'rise' and verdict == 'refuted'")
    for _, rise in levels.iterrows():
        start, chance = starts.loc[rise["model"]]
        if start - lowest < NEAR:
            found.append(
                f"C3, {rise['model']}: its module starts at {start:.2f}, where random directions have {chance:.2f} and "
                f"the paper's range begins at {lowest:.2f}. An end in that range and below the start had next to no "
                f"room, so the rise of {figure(rise)} says that the update is more aligned than random directions, and "
                "no more."
            )
    dots, by_pair = independent(runs), independent(runs, ["pair"]).set_index("model")
    for _, one in dots[dots["verdict"] == "refuted"].iterrows():
        pairs = by_pair.loc[one["model"]]
        found.append(
            f"C6, {one['model']}: {figure(one)} is over {one['n']} {one['of']}, and the domains of a pair share users "
            f"and a trained model; over the {pairs['n']} independent pairs it is {figure(pairs)}"
            f"{'' if pairs['verdict'] == 'refuted' else ', a weak refutation'}."
        )
    return found
