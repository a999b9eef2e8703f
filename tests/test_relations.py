"""Correlations and power laws on data whose answers are known."""

from __future__ import annotations

import doctest

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from gcalib import relations, stats


def cells(slope: float, between: float, runs: int = 40, seed: int = 0) -> pd.DataFrame:
    """Runs of five cells whose levels go together by `between`, and in which y follows x by `slope`."""
    rng = np.random.default_rng(seed)
    rows = []
    for cell in range(5):
        x = rng.standard_normal(runs)
        y = slope * x + rng.standard_normal(runs)
        rows += [(cell, cell * 5 + a, cell * 5 * between + b) for a, b in zip(x, y, strict=True)]
    return pd.DataFrame(rows, columns=["pair", "cos", "ndcg"])


def test_pooled_and_within_may_have_opposite_signs() -> None:
    found = relations.correlations(cells(slope=-1.0, between=1.0), "cos", "ndcg", "pair").set_index("reading")
    assert found.at["pooled", "low"] > 0.8
    assert found.at["within cells", "high"] < -0.5 and found.at["mixed model", "high"] < -0.5
    assert ((found["low"] < found["r"]) & (found["r"] < found["high"])).all() and (found["n"] == 200).all()


def test_within_cells_is_the_partial_correlation_given_the_cells() -> None:
    table = cells(slope=0.3, between=-2.0)
    dummies = pd.get_dummies(table["pair"]).to_numpy(float)
    rest = [table[c] - dummies @ np.linalg.lstsq(dummies, table[c], rcond=None)[0] for c in ("cos", "ndcg")]
    found = relations.correlations(table, "cos", "ndcg", "pair").set_index("reading")
    assert found.at["within cells", "r"] == pytest.approx(scipy_stats.pearsonr(*rest).statistic, abs=1e-12)
    # both are standardised within cells, so the mixed model's slope is about the same number
    assert found.at["mixed model", "r"] == pytest.approx(found.at["within cells", "r"], abs=0.02)


def test_cells_of_one_level_leave_the_plain_regression() -> None:
    table = cells(slope=0.5, between=0.0).assign(pair=lambda t: t.index % 5)
    found = relations.correlations(table, "cos", "ndcg", "pair").set_index("reading")
    assert found.at["mixed model", "r"] == pytest.approx(found.at["within cells", "r"], abs=0.05)
    assert found.at["mixed model", "r"] == pytest.approx(found.at["pooled", "r"], abs=0.05)


def test_a_mixed_model_that_does_not_converge_leaves_the_other_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    table = cells(slope=0.5, between=1.0)
    before = relations.correlations(table, "cos", "ndcg", "pair").set_index("reading")
    fit = relations.MixedLM.fit

    def unsettled(*args: object, **kwargs: object) -> object:
        fitted = fit(*args, **kwargs)
        fitted.converged = False
        return fitted

    monkeypatch.setattr(relations.MixedLM, "fit", unsettled)
    found = relations.correlations(table, "cos", "ndcg", "pair").set_index("reading")
    assert found.loc["mixed model", ["r", "low", "high", "p"]].isna().all() and before["r"].notna().all()
    pd.testing.assert_frame_equal(found.drop("mixed model"), before.drop("mixed model"))


def test_the_intervals_hold_a_zero_relation_as_often_as_they_say() -> None:
    tables = [cells(slope=0.0, between=3.0, runs=8, seed=seed) for seed in range(120)]
    found = pd.concat(relations.correlations(t, "cos", "ndcg", "pair") for t in tables)
    held = found.assign(held=(found["low"] < 0) & (found["high"] > 0)).groupby("reading")["held"].mean()
    assert held["within cells"] > 0.89 and held["mixed model"] > 0.89
    assert held["pooled"] == 0  # what comes of taking the levels of cells for a relation


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (cells(1, 1).rename(columns={"cos": "x"}), "no column 'cos'"),
        (cells(1, 1)[lambda t: t["pair"] == 0], "two cells"),
        (cells(1, 1).groupby("pair").head(1), "two cells"),
        (cells(1, 1).assign(cos=lambda t: t["pair"]), "differ"),
    ],
)
def test_too_little_to_correlate_is_one_sentence(table: pd.DataFrame, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        relations.correlations(table, "cos", "ndcg", "pair")


def test_power_law_finds_the_exponent_of_each_group() -> None:
    size = np.array([1.0, 2, 4, 8, 16])
    noise = np.exp(np.random.default_rng(0).normal(0, 0.01, 5))
    table = pd.concat(
        pd.DataFrame({"part": name, "size": size, "ms": 3 * size**power * noise})
        for name, power in (("a", 1), ("b", 2))
    )
    found = relations.power_law(table, "size", "ms", by="part").set_index("part")
    for name, power in (("a", 1), ("b", 2)):
        assert found.at[name, "low"] < power < found.at[name, "high"] and found.at[name, "r2"] > 0.99
    with pytest.raises(ValueError, match="part a"):
        relations.power_law(table.assign(ms=0.0), "size", "ms", by="part")


def test_examples_of_the_docstrings() -> None:
    for module in (relations, stats):
        ran = doctest.testmod(module, extraglobs={"pd": pd})
        assert ran.attempted and not ran.failed
