"""Records as tables: variants by their names, a row a domain and insertion point."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from gcalib.study import tables


def records(*fields: dict[str, object]) -> pd.DataFrame:
    plain = {
        "model": "abxi",
        "pair": "p",
        "gca": (),
        "match": None,
        "gate": "sigmoid",
        "heads": 4,
        "dim": 64,
        "seed": 0,
    }
    rows = [{"run_id": str(number), **plain, **changes} for number, changes in enumerate(fields)]
    return tables.named(pd.DataFrame(rows))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "plain"),
        ({"gca": (0, 1)}, "GCA0+1"),
        ({"gca": (0,), "gate": "tanh", "heads": 8}, "GCA0, tanh, 8 heads"),
        ({"gca": (0,), "match": "network"}, "matched"),
        ({"gca": (1,), "match": "params"}, "matched to GCA1's params"),
        ({"gca": (0,), "match": np.nan}, "GCA0"),
    ],
)
def test_named_variant(fields, name):
    assert records(fields)["variant"].tolist() == [name]


def test_named_case_is_model_and_pair():
    assert records({"model": "cdsrnp"})[["model", "case"]].values.tolist() == [["CDSRNP", "CDSRNP · p"]]


def test_by_domain_has_a_row_a_domain_and_drops_the_splits():
    runs = records({}, {}).assign(
        **{"test.a.full.mrr": [1.0, 2.0], "test.b.full.mrr": [3.0, None], "val.a.full.mrr": 0.0}
    )
    found = tables.by_domain(runs, {"mrr": "full.mrr"})
    assert found["domain"].tolist() == ["A", "A", "B", "B"]
    assert found["mrr"].fillna(-1).tolist() == [1, 2, 3, -1]
    assert not [name for name in found if "full" in name]


def test_alignment_has_a_row_a_point_that_a_run_has():
    runs = records({}, {"gca": (0, 1)}, {"gca": (0,), "match": "network"}, {"gca": (1,), "dim": 128})
    lengths = {"norm_parallel": 3.0, "norm_orthogonal": 4.0, "gated_norm_parallel": 5.0, "gated_norm_orthogonal": 12.0}
    measured = {f"test.{d}.gca{p}.{name}": value + p for d in "ab" for p in (0, 1) for name, value in lengths.items()}
    found = tables.alignment(runs.assign(**measured, **{f"test.{d}.full.ndcg@10": 0.5 for d in "ab"}))
    assert found[["run_id", "domain", "point"]].values.tolist() == [[*"1A", 0], [*"1B", 0], [*"1A", 1], [*"1B", 1]]
    assert found["cos_ungated"].iloc[0] == pytest.approx(0.6) and found["cos_gated"].iloc[0] == pytest.approx(5 / 13)
    assert found["norm_parallel"].tolist() == [3, 3, 4, 4] and (found["ndcg"] == 0.5).all()


def test_relative_is_in_percent_of_the_base_of_the_group():
    runs = pd.DataFrame(
        {"pair": list("ppqqr"), "variant": ["plain", "GCA0", "plain", "GCA0", "GCA0"], "x": [2, 3, 10, 9, 1]}
    )
    found = tables.relative(runs, "x", "plain", ["pair"])
    assert found.iloc[:4].tolist() == [100, 150, 100, 90] and np.isnan(found.iloc[4])


def test_published_figures_are_complete():
    table = tables.published("published")
    assert len(table) == 2 * 2 * 4 and set(table["pair"]) == {"food-kitchen", "beauty-electronics"}
    hits = table.pivot_table(index=["pair", "domain"], columns="metric", values="mean")
    assert (hits["hr@10"] > hits["hr@5"]).all() and (hits["ndcg@10"] > hits["mrr"]).all()
    assert set(tables.published("claims")["model"].dropna()) == set(tables.BASELINES)
