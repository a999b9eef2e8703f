"""Intervals and paired differences against scipy, and what is refused."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from gcalib import stats


def runs(seed: int = 0, count: int = 6) -> pd.DataFrame:
    """Three variants over the same seeds in two domains."""
    rng = np.random.default_rng(seed)
    rows = [
        {"domain": domain, "gca": variant, "seed": number, "ndcg": shift + spread + 0.01 * rng.standard_normal()}
        for domain, shift in (("A", 0.1), ("B", 0.3))
        for number, spread in enumerate(rng.standard_normal(count))
        for variant in ("none", "early", "late")
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_mean_interval_is_that_of_scipy(level):
    frame = runs()
    found = stats.mean_interval(frame, "ndcg", ["domain", "gca"], level).set_index(["domain", "gca"])
    assert list(found.index) == [(d, g) for d in "AB" for g in ("none", "early", "late")]
    for group, part in frame.groupby(["domain", "gca"]):
        low, high = scipy.stats.t.interval(level, len(part) - 1, part["ndcg"].mean(), scipy.stats.sem(part["ndcg"]))
        row = found.loc[group]
        assert (row["n"], row["mean"]) == (6, pytest.approx(part["ndcg"].mean()))
        assert (row["low"], row["high"]) == (pytest.approx(low), pytest.approx(high))


def test_paired_difference_is_that_of_scipy():
    frame = runs().sample(frac=1, random_state=0)  # order plays no part
    found = stats.paired_difference(frame, "ndcg", "seed", "gca", "none", by="domain").set_index(["domain", "gca"])
    assert set(found.index) == {(d, g) for d in "AB" for g in ("early", "late")}
    wide = frame.pivot_table(index=["domain", "seed"], columns="gca", values="ndcg")
    for (domain, variant), row in found.iterrows():
        reference = scipy.stats.ttest_rel(wide.loc[domain, variant], wide.loc[domain, "none"])
        interval = reference.confidence_interval(0.95)
        assert row["p"] == pytest.approx(reference.pvalue)
        assert (row["low"], row["high"]) == (pytest.approx(interval.low), pytest.approx(interval.high))


def test_pairing_narrows_the_interval_where_seeds_differ():
    frame = runs()
    apart = stats.mean_interval(frame, "ndcg", ["domain", "gca"])
    paired = stats.paired_difference(frame, "ndcg", ["domain", "seed"], "gca", "none")
    assert list(paired["n"]) == [12, 12]
    assert (paired["high"] - paired["low"]).max() < (apart["high"] - apart["low"]).min() / 5


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    frame = pd.DataFrame({"group": np.repeat(np.arange(1000), 5), "x": rng.standard_normal(5000)})
    found = stats.mean_interval(frame, "x", "group", level=0.8)
    held = ((found["low"] < 0) & (found["high"] > 0)).mean()
    assert held == pytest.approx(0.8, abs=4 * math.sqrt(0.8 * 0.2 / 1000))


def test_one_run_has_no_interval():
    frame = runs(count=1)
    found = stats.mean_interval(frame, "ndcg", ["domain", "gca"])
    assert found[["low", "high"]].isna().all(axis=None)
    assert stats.paired_difference(frame, "ndcg", "seed", "gca", "none", by="domain")["p"].isna().all()


def test_no_spread_leaves_no_doubt():
    frame = pd.DataFrame({"gca": [0, 0, 1, 1, 2, 2], "seed": [0, 1] * 3, "x": [1.0, 2.0, 1.5, 2.5, 1.0, 2.0]})
    found = stats.paired_difference(frame, "x", "seed", "gca", 0).set_index("gca")
    assert found.loc[1, ["mean", "low", "high", "p"]].tolist() == [0.5, 0.5, 0.5, 0.0]
    assert found.loc[2, ["mean", "low", "high", "p"]].tolist() == [0.0, 0.0, 0.0, 1.0]


def test_refusals():
    frame = runs()
    with pytest.raises(ValueError, match="no column 'mrr'; it has domain, gca, seed, ndcg"):
        stats.mean_interval(frame, "mrr", "gca")
    with pytest.raises(ValueError, match="empty"):
        stats.mean_interval(frame[:0], "ndcg", "gca")
    with pytest.raises(ValueError, match="not finite in row 3"):
        stats.mean_interval(frame.assign(ndcg=frame["ndcg"].where(frame.index != 3)), "ndcg", "gca")
    with pytest.raises(ValueError, match="level=95"):
        stats.mean_interval(frame, "ndcg", "gca", level=95)
    with pytest.raises(ValueError, match=r"no gca 'mid', domain A; there are \['none', 'early', 'late'\]"):
        stats.paired_difference(frame, "ndcg", "seed", "gca", "mid", by="domain")
    with pytest.raises(ValueError, match="occurs twice"):
        stats.paired_difference(frame, "ndcg", "seed", "gca", "none")
    with pytest.raises(ValueError, match=r"Some run of gca 'late' has no partner in 'none', domain B: .* 5 is alone"):
        stats.paired_difference(frame.iloc[:-1], "ndcg", "seed", "gca", "none", by="domain")


def test_docstring_examples():
    result = doctest.testmod(stats)
    assert result.attempted >= 4
    assert result.failed == 0


def test_published_figures_are_found_by_column_and_complete() -> None:
    table = stats.published(model="abxi")
    assert set(table["pair"]) == {"food-kitchen", "beauty-electronics"} and len(table) == 2 * 2 * 4
    assert table["mean"].between(0.1, 0.4).all() and table["sd"].between(0.001, 0.01).all()
    hits = table.pivot_table(index=["pair", "domain"], columns="metric", values="mean")
    assert (hits["hr@10"] > hits["hr@5"]).all() and (hits["ndcg@10"] > hits["mrr"]).all()
    with pytest.raises(ValueError, match="pair='toys': there are beauty-electronics, food-kitchen"):
        stats.published(pair="toys")


def strata(sets: int = 3, seeds: int = 3, noise: float = 0.1, gain: float = 1.0, seed: int = 0) -> pd.DataFrame:
    """Runs of a plain and a changed model on data sets of very different levels; the gain differs between sets too."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(sets):
        for run in range(seeds):
            level = 10.0 * number + run
            rows += [
                (number, run, "plain", level),
                (number, run, "gca", level + gain + number - 1 + noise * rng.normal()),
            ]
    return pd.DataFrame(rows, columns=["pair", "seed", "variant", "ndcg"])


def compared(table: pd.DataFrame) -> pd.Series:
    asked = {"strata": "pair", "pair_on": "seed", "between": "variant", "base": "plain"}
    return stats.stratified_difference(table, "ndcg", **asked).iloc[0]


def test_a_stratified_interval_does_not_widen_by_what_differs_between_strata() -> None:
    found = compared(strata())
    assert (found["strata"], found["n"]) == (3, 9) and found["low"] < 1.0 < found["high"]
    assert found["high"] - found["low"] < 0.4  # the sets' own gains are 0, 1 and 2
    one = strata(sets=1, gain=1.0)
    plain = stats.paired_difference(one, "ndcg", pair_on="seed", between="variant", base="plain").iloc[0]
    assert compared(one)[["mean", "low", "high", "p"]].tolist() == pytest.approx(
        plain[["mean", "low", "high", "p"]].tolist()
    )


def test_stratified_intervals_hold_the_truth_as_often_as_they_say() -> None:
    found = [compared(strata(noise=1.0, seed=seed)) for seed in range(200)]
    held = np.mean([row["low"] < 1.0 < row["high"] for row in found])
    assert 0.90 < held < 0.99


def test_strata_with_variances_of_their_own_are_compared_as_welch_did() -> None:
    table = strata(sets=2, noise=1.0)
    change = table.pivot(index=["pair", "seed"], columns="variant", values="ndcg").pipe(lambda t: t["gca"] - t["plain"])
    x, y = change[0].to_numpy(), 5 * change[1].to_numpy()
    wider = table.assign(ndcg=table["ndcg"].where(table["pair"] == 0, 5 * table["ndcg"]))
    asked = {"strata": "pair", "pair_on": "seed", "between": "variant", "base": "plain"}
    found = stats.stratified_difference(wider, "ndcg", **asked, variance="own").iloc[0]
    welch = scipy.stats.ttest_ind(x, -y, equal_var=False)
    span = welch.confidence_interval(0.95)
    assert (2 * found["low"], 2 * found["high"], found["p"]) == pytest.approx((span.low, span.high, welch.pvalue))
    with pytest.raises(ValueError, match="variance='none' is unknown"):
        stats.stratified_difference(wider, "ndcg", **asked, variance="none")


def test_strata_without_the_variant_and_spare_base_runs_are_left_out() -> None:
    table = strata()
    fewer = table[~((table["variant"] == "gca") & ((table["pair"] == 2) | (table["seed"] == 2)))]
    found = compared(fewer)
    assert (found["strata"], found["n"]) == (2, 4)
    with pytest.raises(ValueError, match="no partner"):
        compared(table[~((table["variant"] == "plain") & (table["seed"] == 2))])
    assert np.isnan(compared(table[table["seed"] == 0])["low"])  # one run a stratum decides nothing


def test_a_verdict_follows_the_interval() -> None:
    assert stats.verdict(-2.0, -1.0) == "refuted" and stats.verdict(-2.0, -1.0, expected=-1) == "confirmed"
    assert stats.verdict(0.0, 1.0) == stats.verdict(np.nan, np.nan) == "undecided"
