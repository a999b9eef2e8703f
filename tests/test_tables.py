"""Records named for a reader, and reshaped."""

from __future__ import annotations

import pandas as pd
import pytest

from gcalib import tables


def records() -> pd.DataFrame:
    """Five runs of one model and pair, as a store's frame has them."""
    rows = [
        {"gca": ()},
        {"gca": (0,)},
        {"gca": (0,), "match": "params"},
        {"gca": (0, 1), "gate": "tanh"},
        {"gca": (0,), "heads": 8},
        {"gca": (1,), "match": "flops"},
    ]
    fixed = {"model": "abxi", "pair": "one", "gate": "sigmoid", "heads": 4, "match": None, "seed": 0}
    frame = pd.DataFrame([{**fixed, **row} for row in rows])
    for letter, level in (("a", 1.0), ("b", 2.0)):
        frame[f"test.{letter}.full.ndcg@10"] = level + frame.index
        for point in (0, 1):
            has = frame["gca"].map(lambda points, point=point: point in points) & frame["match"].isna()
            frame[f"test.{letter}.gca{point}.cos_mean_abs"] = has.map({True: level / 10 + point})
    return frame


def test_variants_are_named_by_what_differs() -> None:
    found = tables.named(records())
    assert list(found["variant"]) == [
        "plain", "GCA0", "widened", "GCA0+1, tanh", "GCA0, 8 heads", "widened to GCA1's flops"
    ]  # fmt: skip
    assert set(found["case"]) == {"ABXI · one"} and set(found["model"]) == {"ABXI"}


def test_domains_become_rows() -> None:
    found = tables.by_domain(records(), {"ndcg": "full.ndcg@10"})
    assert len(found) == 12 and list(found["domain"].unique()) == ["A", "B"]
    assert found.query("domain == 'B'")["ndcg"].tolist() == [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert not [name for name in found if name.startswith("test.")]
    with pytest.raises(ValueError, match=r"No run has a figure 'test\.a\.full\.ndgc'"):
        tables.by_domain(records(), {"x": "full.ndgc"})


def test_each_insertion_point_of_a_run_becomes_a_row() -> None:
    found = tables.by_point(records(), {"cos": "cos_mean_abs"})
    counts = found.groupby(["point", "domain"]).size()
    assert counts.to_dict() == {(0, "A"): 3, (0, "B"): 3, (1, "A"): 1, (1, "B"): 1}
    assert found["cos"].notna().all() and set(found.query("point == 1")["cos"]) == {1.1, 1.2}
    with pytest.raises(ValueError, match="None of these runs has cross-attention"):
        tables.by_point(records().iloc[[0, 2]], {"cos": "cos_mean_abs"})


def test_relative_is_in_percent_of_the_base_of_the_same_group() -> None:
    long = tables.by_domain(tables.named(records()), {"ndcg": "full.ndcg@10"})
    share = tables.relative(long, "ndcg", base="plain", by=["case", "domain"])
    assert share[(long["variant"] == "plain")].tolist() == [100.0, 100.0]
    assert share[(long["variant"] == "GCA0")].tolist() == [200.0, 150.0]
    with pytest.raises(ValueError, match="Some group"):
        tables.relative(long[long["variant"] != "plain"], "ndcg", base="plain", by=["case", "domain"])
