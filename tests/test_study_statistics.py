"""Intervals, ratios of variants and correlations against scipy, and on simulated studies with planted effects."""

from __future__ import annotations

import doctest

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from gcalib.study import statistics

STRUCTURES = [
    (pairs, seeds, partners, spreads)
    for pairs, seeds, spreads in ((1, 4, (1,)), (1, 5, (1,)), (3, 4, (1, 1, 1)), (3, 5, (10, 3, 1)))
    for partners in (-0.4, 0.0, 0.5)
]


def logs(pairs: int, seeds: int, partners: float, spreads: tuple[float, ...], draws: int) -> np.ndarray:
    """Logarithms of two variants that do not differ, (draws, pairs, variants, seeds), their partners correlated."""
    rng = np.random.default_rng(int(10 * partners) + 100 * pairs + seeds)
    both = rng.multivariate_normal([0, 0], [[1, partners], [partners, 1]], (draws, pairs, seeds))
    return 0.02 * np.array(spreads)[:, None, None] * both.swapaxes(2, 3)


def study(changes: np.ndarray, gain: float = 0.0, **columns: object) -> pd.DataFrame:
    """Runs of one draw: pairs of other levels, domain B twice as high as A; GCA0 is `gain` percent better."""
    rows = [
        (
            f"pair {pair}",
            "AB"[domain],
            variant,
            seed,
            (1 + pair) * (1 + domain) * np.exp(value) * (1 + gain / 100 * place),
        )
        for pair, cell in enumerate(changes)
        for place, (variant, values) in enumerate(zip(("plain", "GCA0"), cell, strict=True))
        for seed, value in enumerate(values)
        for domain in (0, 1)
    ]
    return pd.DataFrame(rows, columns=["pair", "domain", "variant", "seed", "ndcg"]).assign(**columns)


def ratios(frame: pd.DataFrame, method: statistics.Method = "paired") -> pd.DataFrame:
    found = statistics.log_ratio(frame, "ndcg", "plain", by=[], method=method)
    return found.set_index(["domain", "pair"])


def test_mean_interval_matches_scipy():
    table = study(logs(3, 4, 0.0, (1, 1, 1), 1)[0])
    found = statistics.mean_interval(table, "ndcg", ["pair", "variant"]).set_index(["pair", "variant"])
    for group, part in table.groupby(["pair", "variant"]):
        expected = scipy.stats.ttest_1samp(part["ndcg"], 0.0)
        row = found.loc[group]
        assert (row["low"], row["high"]) == pytest.approx(tuple(expected.confidence_interval()))
        assert row["p"] == pytest.approx(expected.pvalue) and row["each"] == tuple(part["ndcg"])


def test_difference_matches_a_paired_t_test_in_each_group():
    table = study(logs(3, 4, 0.0, (1, 1, 1), 1)[0]).sample(frac=1, random_state=0)  # order plays no part
    found = statistics.difference(table, "ndcg", "plain", by=["pair", "domain"]).set_index(["pair", "domain"])
    for where, part in table.groupby(["pair", "domain"]):
        wide = part.pivot(index="seed", columns="variant", values="ndcg")
        expected = scipy.stats.ttest_rel(wide["GCA0"], wide["plain"])
        assert found.loc[where, ["low", "high", "p"]].tolist() == pytest.approx(
            [*expected.confidence_interval(), expected.pvalue]
        )


def test_log_ratio_of_a_pair_matches_scipy():
    values = logs(2, 5, 0.0, (1, 3), 1)[0]
    tests = {"paired": scipy.stats.ttest_rel, "unpaired": lambda x, y: scipy.stats.ttest_ind(x, y, equal_var=False)}
    for method, test in tests.items():
        expected = test(values[1, 1], values[1, 0])
        row = ratios(study(values), method).loc["A", "pair 1"]
        bounds = [*expected.confidence_interval(), *expected.confidence_interval(0.9)]
        assert np.log1p(row[["low", "high", "low_90", "high_90"]].astype(float) / 100).tolist() == pytest.approx(bounds)
        assert row["p"] == pytest.approx(expected.pvalue) and (row["pairs"], row["seeds"], row["n"]) == (1, 5, 5)


def test_pairs_and_domains_count_alike():
    table = study(logs(2, 5, 0.0, (1, 1), 1)[0], 5.0)
    found = ratios(table[(table["pair"] != "pair 1") | (table["seed"] < 4)])  # fewer seeds in one of them
    alone = np.log1p(found["mean"] / 100)
    assert alone["A", "all"] == pytest.approx((alone["A", "pair 0"] + alone["A", "pair 1"]) / 2)
    assert found.loc[("both", "all"), ["pairs", "seeds", "n"]].tolist() == [2, 4, 9]
    louder = table.assign(
        ndcg=table["ndcg"] * np.where((table["domain"] == "B") & (table["variant"] == "GCA0"), 1.1, 1)
    )
    louder = np.log1p(ratios(louder)["mean"] / 100) - np.log1p(ratios(table)["mean"] / 100)
    assert louder[["A", "B", "both"]].xs("all", level="pair").tolist() == pytest.approx(
        np.log(1.1) * np.array([0, 1, 0.5])
    )


def test_all_pairs_leave_out_one_with_too_few_seeds():
    table = study(logs(2, 5, 0.0, (1, 1), 1)[0])
    found = ratios(table[(table["pair"] != "pair 1") | (table["seed"] < 3)])
    assert found.loc[("A", "all"), ["pairs", "seeds"]].tolist() == [1, 5] and found.loc[("A", "pair 1"), "seeds"] == 3
    found = ratios(table[table["seed"] < 3])
    assert found.loc[("A", "all"), ["pairs", "seeds"]].tolist() == [2, 3]


@pytest.mark.parametrize("partners", [-0.9, 0.9])
def test_the_mixed_model_is_the_narrower_of_the_two_simple_forms(partners):
    table = study(logs(2, 5, partners, (1, 1), 1)[0], 5.0)
    errors = {}
    for method in ("paired", "mixed"):
        row = ratios(table, method).loc["both", "all"]
        errors[method] = np.diff(np.log1p(row[["low", "high"]].astype(float) / 100))[0] / 2
        assert row["mean"] == pytest.approx(ratios(table).loc[("both", "all"), "mean"], rel=1e-4)
    cells = np.log(table[table["domain"] == "A"].pivot(index=["pair", "seed"], columns="variant", values="ndcg"))
    of_difference = cells["GCA0"].sub(cells["plain"]).groupby("pair").var()
    simple = {-0.9: cells.groupby("pair").var().sum(axis=1), 0.9: of_difference}[partners]  # unpaired, paired
    expected = scipy.stats.t.ppf(0.975, 8) * np.sqrt(simple.sum() / 5) / 2
    assert errors["mixed"] == pytest.approx(expected, rel=0.03)
    assert (errors["mixed"] < 0.7 * errors["paired"]) == (partners < 0)


@pytest.mark.parametrize(("pairs", "seeds", "partners", "spreads"), STRUCTURES)
def test_intervals_hold_the_planted_ratio_as_often_as_they_say(pairs, seeds, partners, spreads):
    changes = logs(pairs, seeds, partners, spreads, 2000)
    found = [statistics.interval(*(draw[:, 1] - draw[:, 0]), weights=[1 / pairs] * pairs) for draw in changes]
    assert 0.93 <= np.mean([row["low"] < 0 < row["high"] for row in found]) <= 0.97


@pytest.mark.slow
def test_log_ratios_of_whole_studies_hold_the_planted_ratio_as_often_as_they_say():
    draws = enumerate(logs(2, 5, -0.4, (1, 1), 500))
    table = pd.concat(study(changes, 4.0, draw=number) for number, changes in draws)
    found = statistics.log_ratio(table, "ndcg", "plain", by=["draw"]).query("domain == 'both' and pair == 'all'")
    assert len(found) == 500 and 0.93 <= ((found["low"] < 4.0) & (found["high"] > 4.0)).mean() <= 0.97


def test_welch_misses_too_often_where_partners_go_against_each_other():
    changes = logs(1, 5, -0.4, (1,), 1000)[:, 0]
    held = [row["low"] < 0 < row["high"] for row in (statistics.interval(more, less) for less, more in changes)]
    assert np.mean(held) < 0.93


@pytest.mark.parametrize(
    ("gain", "spread", "least", "most"), [(3.0, 1, 0.02, 0.07), (0.0, 0.5, 0.9, 1.0), (0.0, 3, 0.0, 0.1)]
)
def test_equivalence_is_said_in_one_of_twenty_studies_at_the_margin(gain, spread, least, most):
    changes = logs(1, 5, 0.0, (spread,), 1000)[:, 0] + np.log1p(gain / 100) * np.array([[0], [1]])
    bounds = [statistics.interval(more - less, weights=[1]) for less, more in changes]
    said = [statistics.within(*(100 * np.expm1([row["low_90"], row["high_90"]]))) for row in bounds]
    assert least <= np.mean(said) <= most


def test_five_seeds_see_a_ratio_of_twice_their_spread():
    changes = logs(1, 5, 0.0, (1,), 500)[:, 0] + np.array([[0], [0.04]]) * np.sqrt(2)
    assert np.mean([statistics.interval(more - less, weights=[1])["low"] > 0 for less, more in changes]) > 0.8


def test_one_run_has_no_interval_and_runs_without_spread_leave_no_doubt():
    row = ratios(study(logs(1, 1, 0.0, (1,), 1)[0], 5.0)).loc["A", "all"]
    assert row[["low", "high", "p"]].isna().all() and row["mean"] > 0
    row = ratios(study(np.zeros((2, 2, 3)), 5.0)).loc["both", "all"]
    assert row[["mean", "low", "high", "p"]].tolist() == pytest.approx([5, 5, 5, 0])


def test_runs_without_partner_are_left_out_and_counted():
    table = study(logs(1, 5, 0.0, (1,), 1)[0])
    table = table[(table["variant"] == "GCA0") | (table["seed"] != 2)]
    assert ratios(table)["n"].eq(4).all()
    assert statistics.difference(table, "ndcg", "plain", by="domain")["n"].tolist() == [4, 4]
    assert statistics.log_ratio(table, "ndcg", "none", by=[]).empty


def test_a_run_that_is_there_twice_or_without_figure_is_refused():
    table = study(logs(1, 4, 0.0, (1,), 1)[0])
    with pytest.raises(ValueError, match=r"Several runs are .*'seed': 0"):
        statistics.difference(table, "ndcg", "plain")
    with pytest.raises(ValueError, match=r"Several runs are .*'pair': 'pair 0', 'seed': 0"):
        ratios(pd.concat([table, table[table["seed"] == 0]]))
    for value in (0.0, np.nan):
        with pytest.raises(ValueError, match="not above 0"):
            ratios(table.assign(ndcg=value))


def cells(slope: float, between: float, seed: int = 0) -> pd.DataFrame:
    """Runs of eight cells, whose means follow another slope than the runs in them."""
    rng = np.random.default_rng(seed)
    level, off = np.repeat(np.arange(8.0), 6), rng.normal(size=48)
    y = between * level + slope * off + 0.3 * rng.normal(size=48)
    return pd.DataFrame({"cell": level, "pair": level % 2, "x": level + off, "y": y})


def test_correlation_finds_the_planted_slope_within_cells():
    table = cells(slope=-1.0, between=1.0)
    pooled, within = (statistics.correlation(table, "x", "y", by, strata=()) for by in ((), ["cell"]))
    assert pooled["low"] > 0 > within["high"]  # Simpson's paradox
    expected = scipy.stats.pearsonr(table["x"], table["y"])
    assert [pooled["mean"], pooled["low"], pooled["high"]] == pytest.approx(
        [expected.statistic, *expected.confidence_interval()]
    )


def test_correlation_over_pairs_is_the_mean_of_theirs():
    table = cells(slope=-1.0, between=0.0)
    table["y"] *= np.where(table["pair"] == 0, 1, -3)
    alone = [statistics.correlation(part, "x", "y", ["cell"]) for _, part in table.groupby("pair")]
    both = statistics.correlation(table, "x", "y", ["cell"])
    assert alone[0]["high"] < 0 < alone[1]["low"]
    assert np.arctanh(both["mean"]) == pytest.approx(np.arctanh([one["mean"] for one in alone]).mean())
    half = (np.arctanh(both["high"]) - np.arctanh(both["low"])) / 2  # 24 runs and 4 cells a pair
    assert half == pytest.approx(1.959964 / np.sqrt(2 * (24 - 4 - 2)))


def test_correlations_within_cells_hold_zero_as_often_as_they_say():
    found = [statistics.correlation(cells(0.0, 1.0, seed), "x", "y", ["cell"]) for seed in range(200)]
    assert 0.92 <= np.mean([row["low"] < 0 < row["high"] for row in found]) <= 0.98


def test_runs_that_are_alone_in_their_cells_have_no_correlation_within():
    assert np.isnan(statistics.correlation(cells(1.0, 1.0).assign(cell=range(48)), "x", "y", ["cell"])["mean"])


def test_docstring_examples():
    assert doctest.testmod(statistics).failed == 0
