"""Intervals, paired differences and correlations against scipy, statsmodels and planted effects."""

from __future__ import annotations

import doctest

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import statsmodels.api as sm

from gcalib.study import statistics


def runs(sets: int = 3, seeds: int = 4, noise: float = 0.1, gain: float = 1.0, seed: int = 0) -> pd.DataFrame:
    """A plain and a changed model on data sets of very different levels; the gain differs between sets too."""
    rng = np.random.default_rng(seed)
    rows = [
        (
            number,
            run,
            name,
            10.0 * number + run + (name == "GCA0") * (gain + number - (sets - 1) / 2) + noise * rng.normal(),
        )
        for number in range(sets)
        for run in range(seeds)
        for name in ("plain", "GCA0")
    ]
    return pd.DataFrame(rows, columns=["pair", "seed", "variant", "ndcg"])


def changes(table: pd.DataFrame) -> pd.Series:
    wide = table.pivot(index=["pair", "seed"], columns="variant", values="ndcg")
    return wide["GCA0"] - wide["plain"]


def test_mean_interval_matches_scipy():
    table = runs()
    found = statistics.mean_interval(table, "ndcg", ["pair", "variant"]).set_index(["pair", "variant"])
    for group, part in table.groupby(["pair", "variant"]):
        expected = scipy.stats.ttest_1samp(part["ndcg"], 0.0)
        row = found.loc[group]
        assert (row["low"], row["high"]) == pytest.approx(tuple(expected.confidence_interval()))
        assert row["p"] == pytest.approx(expected.pvalue) and row["each"] == tuple(part["ndcg"])


def test_difference_matches_a_paired_t_test_in_each_group():
    table = runs().sample(frac=1, random_state=0)  # order plays no part
    found = statistics.difference(table, "ndcg", "plain", by="pair").set_index("pair")
    for pair, part in changes(table).groupby("pair"):
        expected = scipy.stats.ttest_1samp(part, 0.0)
        assert tuple(found.loc[pair, ["low", "high", "p"]]) == pytest.approx(
            (*expected.confidence_interval(), expected.pvalue)
        )


@pytest.mark.parametrize("level", [0.95, 0.99])
def test_pooled_strata_match_a_regression_on_their_dummies(level):
    table = runs()
    change = changes(table)
    dummies = pd.get_dummies(change.index.get_level_values("pair")).astype(float)
    expected = sm.OLS(change.to_numpy(), dummies).fit().t_test(np.full((1, 3), 1 / 3))
    (row,) = statistics.difference(table, "ndcg", "plain", strata="pair", level=level).to_dict("records")
    assert (row["low"], row["high"]) == pytest.approx(tuple(expected.conf_int(1 - level)[0]))
    assert row["p"] == pytest.approx(float(expected.pvalue)) and (row["strata"], row["n"]) == (3, 12)


def test_own_variances_match_welch():
    table = runs(sets=2)
    table["ndcg"] = table["ndcg"].where(table["pair"] == 0, 5 * table["ndcg"])
    change = changes(table)
    expected = scipy.stats.ttest_ind(change[0], -change[1], equal_var=False)
    (row,) = statistics.difference(table, "ndcg", "plain", strata="pair", variance="own").to_dict("records")
    bounds = tuple(expected.confidence_interval())
    assert (2 * row["low"], 2 * row["high"], row["p"]) == pytest.approx((*bounds, expected.pvalue))


def test_stratified_intervals_hold_the_planted_gain_as_often_as_they_say():
    found = [
        statistics.difference(runs(noise=1.0, seed=seed), "ndcg", "plain", strata="pair").iloc[0] for seed in range(120)
    ]
    assert 0.89 < np.mean([row["low"] < 1.0 < row["high"] for row in found]) < 0.99


def test_one_run_has_no_interval():
    found = statistics.difference(runs(seeds=1), "ndcg", "plain", by="pair")
    assert found[["low", "high", "p"]].isna().all(axis=None) and found["mean"].notna().all()


def test_runs_without_spread_leave_no_doubt():
    found = statistics.mean_interval(pd.DataFrame({"g": [0, 0], "x": [0.5, 0.5]}), "x", "g").iloc[0]
    assert found[["mean", "low", "high", "p"]].tolist() == [0.5, 0.5, 0.5, 0.0]


def test_spare_runs_of_the_base_are_left_out():
    table = runs()
    fewer = table[(table["variant"] == "plain") | (table["seed"] < 2)]
    assert statistics.difference(fewer, "ndcg", "plain", strata="pair")["n"].tolist() == [6]


def test_a_run_alone_or_twice_or_without_figure_is_refused():
    table = runs()
    with pytest.raises(ValueError, match=r"'GCA0' has no partner in 'plain': \{'pair': 2\}, 3"):
        statistics.difference(table.drop(index=table.index[-2]), "ndcg", "plain", by="pair")
    with pytest.raises(ValueError, match="Several runs are .*'seed': 0"):
        statistics.difference(table, "ndcg", "plain")
    with pytest.raises(ValueError, match="no variant 'none'"):
        statistics.difference(table, "ndcg", "none", by="pair")
    with pytest.raises(ValueError, match="no figure"):
        statistics.mean_interval(table.assign(ndcg=np.nan), "ndcg", "pair")


def cells(slope: float, between: float, seed: int = 0) -> pd.DataFrame:
    """Runs of eight cells, whose means follow another slope than the runs in them."""
    rng = np.random.default_rng(seed)
    level, off = np.repeat(np.arange(8.0), 6), rng.normal(size=48)
    return pd.DataFrame(
        {"cell": level, "x": level + off, "y": between * level + slope * off + 0.3 * rng.normal(size=48)}
    )


def test_correlations_find_the_planted_slope_within_cells():
    table = cells(slope=-1.0, between=1.0)
    found = statistics.correlations(table, "x", "y", ["cell"]).set_index("reading")
    assert found.at["pooled", "low"] > 0 > found.at["within cells", "high"]  # Simpson's paradox
    pooled = scipy.stats.pearsonr(table["x"], table["y"])
    assert found.at["pooled", "r"] == pytest.approx(pooled.statistic)
    fixed = sm.OLS(table["y"], pd.get_dummies(table["cell"]).astype(float).assign(x=table["x"])).fit()
    assert found.at["within cells", "p"] == pytest.approx(fixed.pvalues["x"])
    assert found.at["mixed model", "r"] == pytest.approx(found.at["within cells", "r"], abs=0.05)


def test_intervals_within_cells_hold_zero_as_often_as_they_say():
    found = [statistics.correlations(cells(0.0, 1.0, seed), "x", "y", ["cell"]).iloc[1] for seed in range(40)]
    assert np.mean([row["low"] < 0 < row["high"] for row in found]) >= 0.85


def test_runs_that_are_alone_in_their_cells_have_no_correlation_within():
    found = statistics.correlations(cells(1.0, 1.0).assign(cell=np.arange(48)), "x", "y", ["cell"])
    assert found["r"].isna().tolist() == [False, True, True]


def test_docstring_examples():
    assert doctest.testmod(statistics).failed == 0
