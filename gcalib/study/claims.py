"""Claims C1 to C6 of the paper (arXiv 2510.09435), each an estimate with its interval, and a verdict on it.

A verdict holds the interval against the range that a claim names (`RULES`): "replicated" if it lies inside,
"contradicted" if it lies outside, "not replicated" if it reaches over an end. With fewer than four seeds in a cell, or
twelve runs in a scatter, a question is "not tested".

Judges take records named by `gcalib.study.tables.named`, and answer for each model and width, over all pairs and for
each, in rows with `COLUMNS`: `protocol` is the candidates, `reason` why the verdict is so, `seeds` those of the cell
with fewest, `paper` its figure, `p` that of no effect, `holm` the same corrected for the rows of a claim over as many
pairs and domains; `decides` marks what `overall` counts; `each` are the changes of C1, C4 and C5, seed by seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gcalib.study import statistics, tables

TEXTS = {
    "C1": "early cross-attention (GCA0) improves every baseline",
    "C2": "the more orthogonal X′ is to X, the better the ranking",
    "C3": "orthogonality emerges in training and settles at a cosine of 0.1 to 0.2 in every model",
    "C4": "GCA0 beats the baseline widened to the same number of parameters",
    "C5": "stacking is not monotone: deeper is not always better",
    "C6": "the cosine of X and X′ does not depend on how similar X and Y are",
}
RULES = pd.read_csv(Path(__file__).with_name("rules.csv"), keep_default_na=False, na_values={"low": "", "high": ""})
"""What is asked: `claim`, `question`, `model` (or every), `variant` and `base` that are compared, the range (`low` to
`high`) that is claimed, whether the answer `decides` the claim, and the `rule` in words."""
VERDICTS = ["contradicted", "not replicated", "not tested", "replicated"]
"""By rank: of several parts of a claim, the first of these that occurs is the verdict on all of it."""
COLUMNS = [
    "claim", "model", "dim", "domain", "pair", "question", "protocol", "ours", "low", "high", "unit", "text", "verdict",
    "reason", "seeds", "runs", "paper", "p", "holm", "decides", "case", "each",
]  # fmt: skip
SAME = 3.0  # percent, of either sign, up to which there is no difference
SCATTER = 12  # runs of a pair from which a correlation is judged
PAPER = "paper.ndcg@10"  # the judged metric, see `tables.by_domain`


def verdict(low: float, high: float, least: float, most: float) -> tuple[str, str]:
    """What an interval says of the claim that a figure lies between two bounds, and why.

    >>> verdict(0.1, 0.3, 0, np.inf), verdict(-0.1, 0.3, 0, np.inf)
    (('replicated', 'interval above 0'), ('not replicated', 'interval includes 0'))
    """
    if low > most or high < least:
        return "contradicted", f"interval above {most:g}" if low > most else f"interval below {least:g}"
    if low < least or high > most:
        return "not replicated", f"interval includes {least if low < least else most:g}"
    inside = (
        f"above {least:g}" if np.isinf(most) else f"below {most:g}" if np.isinf(least) else f"in {least:g} to {most:g}"
    )
    return "replicated", f"interval {inside}"


def effects(
    runs: pd.DataFrame, base: str, variants: Sequence[str], metric: str = PAPER, method: statistics.Method = "paired"
) -> pd.DataFrame:
    """`statistics.log_ratio` of a metric (as of `tables.by_domain`) by model, width `dim` and `protocol`."""
    long = tables.by_domain(runs[runs["variant"].isin([base, *variants])], {"value": metric})
    candidates = long["protocol"] if metric.startswith("paper.") else metric.partition(".")[0]
    by = ["model", "dim", "protocol"]
    return statistics.log_ratio(long.assign(protocol=candidates), "value", base, by=by, method=method)


def _judged(claim: str, runs: pd.DataFrame, answers: list[dict[Any, Any]], metric: str = PAPER) -> pd.DataFrame:
    """Verdicts on a claim's questions; answers say in `lacks` what too few are there of, and may have a `note`."""
    rules, rows = RULES[RULES["claim"] == claim].set_index("question").to_dict("index"), []
    answered = {(row["question"], row["model"], row["dim"]) for row in answers}
    nothing: dict[str, Any] = {"domain": "both", "pair": "all", "lacks": "not run", "text": "not run"}
    nothing |= dict.fromkeys(("mean", "low", "high"), np.nan)
    asked = runs.loc[runs["model"].isin(tables.BASELINES), ["model", "dim"]].drop_duplicates().to_records(index=False)
    for question, (model, dim) in product(rules, asked):
        if rules[question]["model"] in ("", model) and (question, model, dim) not in answered:
            answers = [*answers, {"question": question, "model": model, "dim": dim, **nothing}]
    theirs = tables.published("claims").fillna({"pair": ""}).set_index(["question", "model", "domain", "pair"])
    printed = theirs[["figure", "low", "high"]].to_dict("index")
    for row in answers:
        rule, question = rules[row["question"]], row["question"]
        unit = "%" if rule["base"] else "r" if question.startswith("r") else ""
        question += f", {metric.rpartition('.')[2].upper()}" * (unit == "%")
        places = [(question, row["model"], row["domain"], pair) for pair in ("", row["pair"].removesuffix("-ts"))]
        paper = printed.get(places[0]) or printed.get(places[1]) or {"figure": np.nan}
        claimed = rule | {name: bound for name, bound in paper.items() if pd.notna(bound)}
        word, reason = verdict(row["low"], row["high"], claimed["low"], claimed["high"])
        if row["lacks"] or np.isnan(row["low"]):
            word, reason = "not tested", row["lacks"] or "no spread"
        elif word == "not replicated" and unit == "%" and statistics.within(row["low_90"], row["high_90"], SAME):
            reason = f"no difference within {SAME:g}%"
        text = statistics.as_text(row["mean"], row["low"], row["high"], "%" * (unit == "%"), 1 if unit == "%" else 2)
        said = {"claim": claim, "question": question, "ours": row["mean"], "unit": unit, "verdict": word}
        said |= {"reason": reason + row.get("note", ""), "paper": paper["figure"], "decides": rule["decides"]}
        said |= {"case": f"{row['model']} · {row['pair']}"}
        rows.append({"text": text, **row, **said})
    table = pd.DataFrame(rows, columns=COLUMNS).astype({"seeds": "Int64", "runs": "Int64", "holm": float})
    tested = table[(table["verdict"] != "not tested") & table["p"].notna()]
    for _, part in tested.groupby([tested["decides"], tested["domain"] == "both", tested["pair"] == "all"]):
        p = part["p"].sort_values()
        table.loc[p.index, "holm"] = (p * np.arange(len(p), 0, -1)).cummax().clip(upper=1)
    table["decides"] &= (table["pair"] == "all") & ((table["domain"] == "both") | (claim == "C2"))
    return table


def compared(claim: str, runs: pd.DataFrame, metric: str = PAPER) -> pd.DataFrame:
    """C1 (GCA0 against plain), C4 (against the parameter-matched baseline), C5 (stacks against each other)."""
    answers: list[dict[Any, Any]] = []
    for rule in RULES[RULES["claim"] == claim].to_dict("records"):
        some = runs[runs["model"].isin([rule["model"]] if rule["model"] else tables.BASELINES)]
        if {rule["variant"], rule["base"]} <= set(some["variant"]):
            for row in effects(some, rule["base"], [rule["variant"]], metric).to_dict("records"):
                lacks = f"{row['seeds']} seeds of {statistics.FEWEST}" * (row["seeds"] < statistics.FEWEST)
                answers.append({**row, "question": rule["question"], "lacks": lacks, "runs": 2 * row["n"]})
    return _judged(claim, runs, answers, metric)


def _cuts(rows: pd.DataFrame) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Rows of `tables.alignment` by model and width, for both domains and each, all pairs and each."""
    some = rows[rows["model"].isin(tables.BASELINES)]
    for (model, dim, protocol), mine in some.groupby(["model", "dim", "protocol"], sort=False):
        for domain in ("both", "A", "B"):
            of = mine if domain == "both" else mine[mine["domain"] == domain]
            for pair in ("all", *of["pair"].unique()):
                where = {"model": model, "dim": dim, "protocol": protocol, "domain": domain, "pair": pair}
                yield where, of if pair == "all" else of[of["pair"] == pair]


def orthogonal_is_better(runs: pd.DataFrame) -> pd.DataFrame:
    """C2: does NDCG@10 fall as |mean cos| rises, over all variants with cross-attention, and within each of them?

    A run is one dot: a stack is taken at its first point. Pairs have an r each (`statistics.correlation`).
    """
    rows = tables.alignment(runs).sort_values(["point", "number"], kind="stable").drop_duplicates(["run_id", "domain"])
    answers = []
    for question in RULES.loc[RULES["claim"] == "C2", "question"]:
        measure = "gated_" * ("gate" in question) + "cos_abs_of_mean"
        for where, part in _cuts(rows.dropna(subset=[measure])) if measure in rows else ():
            if where["domain"] == "both":
                continue
            enough = part[part.groupby("pair")["run_id"].transform("size") >= SCATTER]
            dots, lacks = (enough, "") if len(enough) else (part, f"{len(part)} runs of {SCATTER}")
            r = statistics.correlation(dots, measure, "ndcg", ["variant"] * ("within" in question))
            counts = {"seeds": dots.groupby(["pair", "variant"]).size().min(), "runs": len(dots)}
            answers.append({**where, **r, **counts, "question": question, "lacks": lacks})
    return _judged("C2", runs, answers)


def _of_seeds(
    runs: pd.DataFrame, measure: str, of_seed: Callable[[pd.DataFrame], pd.Series]
) -> Iterator[tuple[dict[str, Any], pd.DataFrame, pd.Series]]:
    """Where, rows, and one figure a seed of GCA0 at point 0, out of those of the pairs and domains that it has."""
    rows = tables.alignment(runs).query("variant == 'GCA0'")
    for where, part in _cuts(rows.dropna(subset=[measure])) if measure in rows else ():
        wide = part.pivot(index="seed", columns=["pair", "domain"], values=measure)
        enough = wide.loc[:, wide.count() >= statistics.FEWEST]
        values = of_seed((enough if enough.size else wide).dropna())
        lacks = f"{len(values)} seeds of {statistics.FEWEST}" * (len(values) < statistics.FEWEST)
        yield {**where, "seeds": len(values), "runs": part["run_id"].nunique(), "lacks": lacks}, part, values


def same_level(runs: pd.DataFrame) -> pd.DataFrame:
    """C3: does |mean cos|, which the paper's figures show, lie in its range, and do models (at their widest) differ?"""
    answers, levels = [], {}
    level, apart = RULES.loc[RULES["claim"] == "C3", "question"]
    for where, part, values in _of_seeds(runs, "cos_abs_of_mean", lambda wide: wide.median(axis=1)):
        null, every = part["null_perm_signed"].abs().median(), part["cos_mean_abs"].median()
        note = f"; another user's X′ {null:.2f}, mean |cos| {every:.2f}"
        answers.append({**where, "question": level, **statistics.interval(values), "p": np.nan, "note": note})
        if where["domain"] == "both" and where["pair"] == "all":
            levels[where["model"], where["dim"]] = where, values
    widest = {model: levels[model, dim] for model, dim in sorted(levels)}
    for (one, values), (other, others) in combinations(widest.values(), 2):
        row = {**one, "model": f"{one['model']} less {other['model']}", "lacks": one["lacks"] or other["lacks"]}
        answers.append({**row, "question": apart, **statistics.interval(values, others)})
    return _judged("C3", runs, answers)


def independent(runs: pd.DataFrame) -> pd.DataFrame:
    """C6: does the cosine of X and X′ follow that of X and Y, by position within a run, and over pairs and domains?"""
    answers, (inside, over) = [], RULES.loc[RULES["claim"] == "C6", "question"]
    for where, _, values in _of_seeds(runs, "cos_xy_r", lambda wide: np.arctanh(wide).mean(axis=1)):
        r = {name: np.tanh(value) for name, value in statistics.interval(values).items()}
        answers.append({**where, "question": inside, **r, "p": np.nan})
    for where, part, _ in _of_seeds(runs, "cos_xy_mean_abs", lambda wide: wide.mean(axis=1)):
        if where["domain"] == "both" and where["pair"] == "all":
            dots = part.groupby(["pair", "domain"])[["cos_xy_mean_abs", "cos_mean_abs"]].mean()
            r = statistics.correlation(dots, "cos_xy_mean_abs", "cos_mean_abs", strata=())
            note = f"; mean |cos(X, Y)| {dots['cos_xy_mean_abs'].min():.2f} to {dots['cos_xy_mean_abs'].max():.2f}"
            lacks = f"{len(dots)} pairs and domains of 5" * (len(dots) < 5)
            answers.append({**where, "question": over, **r, "lacks": lacks, "note": note})
    return _judged("C6", runs, answers)


def judge(runs: pd.DataFrame) -> pd.DataFrame:
    """All six claims."""
    judged = [compared("C1", runs), orthogonal_is_better(runs), same_level(runs), compared("C4", runs)]
    return pd.concat([*judged, compared("C5", runs), independent(runs)], ignore_index=True)


def overall(judged: pd.DataFrame) -> pd.DataFrame:
    """One row a claim: `claim`, `text`, `verdict`, and that for each model, from the rows that decide.

    Of several widths the largest that was tested counts; of several rows of a model, and of models, see `VERDICTS`.
    """
    rows = judged[judged["decides"]]
    keys = [rows[name] for name in ("claim", "model", "question")]
    width = rows["dim"].where(rows["verdict"] != "not tested", 0).groupby(keys).transform("max")
    ranks = rows["verdict"].map(VERDICTS.index)[(rows["dim"] == width) | (width == 0)]
    by_model = ranks.groupby([rows["claim"], rows["model"]]).min().unstack().reindex(columns=tables.BASELINES)
    by_model = by_model.fillna(VERDICTS.index("not tested"))  # the claims are about all of them
    table = by_model.assign(verdict=by_model.min(axis=1)).map(lambda rank: VERDICTS[int(rank)])
    return table.assign(text=table.index.map(TEXTS))[["text", "verdict", *by_model]].reset_index()


def beside_paper(runs: pd.DataFrame) -> pd.DataFrame:
    """The paper's figures and ours, as texts: a row for each of the former and each width that has it."""
    more = [compared("C1", runs, metric) for metric in ("paper.ndcg@1", "paper.auc")]
    judged, parts = pd.concat([judge(runs), *more]), []
    for one in tables.published("claims").fillna({"pair": "all", "domain": "both"}).to_dict("records"):
        same = [judged[name] == one[name] for name in ("claim", "question", "domain")]
        mine = judged[np.logical_and.reduce([*same, judged["pair"].str.removesuffix("-ts") == one["pair"]])]
        mine = mine if pd.isna(one["model"]) else mine[mine["model"] == one["model"]]
        none = pd.DataFrame([{**one, "text": "not run", "verdict": "not tested"}])
        parts.append((mine if len(mine) else none).assign(paper=one["text"]))
    shown = ["claim", "model", "dim", "pair", "domain", "question", "protocol", "paper", "text", "verdict"]
    return pd.concat(parts, ignore_index=True)[shown].rename(columns={"text": "ours"})
