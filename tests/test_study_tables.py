"""Records as tables: variants by their names, a row a domain and module, sizes and what they save."""

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
    plain |= {"gca_depth": 1, "gate_hidden": None, "gca_norm": True, "params_total": 10}
    plain |= {"text": "auto", "latent": 16, "published": ()}
    rows = [{"run_id": str(number), **plain, **changes} for number, changes in enumerate(fields)]
    return tables.named(pd.DataFrame(rows))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "plain"),
        ({"gca": (0, 1)}, "GCA0+1"),
        ({"gca": (0,), "gca_depth": 2}, "GCA0 ×2"),
        ({"gca": (0,), "gate": "tanh", "heads": 8}, "GCA0, tanh, 8 heads"),
        ({"gca": (0,), "gate_hidden": 64}, "GCA0, small gate"),
        ({"gca": (0,), "gate_hidden": np.nan, "gca_norm": False}, "GCA0, no norm"),
        ({"gca": (0,), "match": "params"}, "matched (all parameters)"),
        ({"gca": (0,), "match": "network"}, "matched (network)"),
        ({"gca": (0, 1), "match": "params"}, "matched to GCA0+1 (all parameters)"),
        ({"gca": (0,), "gca_depth": 3, "match": "params"}, "matched to GCA0 ×3 (all parameters)"),
        ({"gca": (0,), "match": np.nan}, "GCA0"),
        ({"gca": (0,), "latent": 0, "text": "random"}, "GCA0, random text, no latent"),
        ({"published": ("official_attention",)}, "plain, official attention"),
    ],
)
def test_named_variant(fields, name):
    assert records(fields)["variant"].tolist() == [name]


def test_named_case_is_model_and_pair():
    assert records({"model": "cdsrnp"})[["model", "case"]].values.tolist() == [["CDSRNP", "CDSRNP · p"]]


def test_of_width_takes_one_or_the_largest_of_each_model():
    runs = records({"dim": 64}, {"dim": 256}, {"dim": 64, "model": "cdsrnp"})
    assert tables.of_width(runs)["run_id"].tolist() == ["1", "2"]
    assert tables.of_width(runs, 64)["run_id"].tolist() == ["0", "2"]


def test_by_domain_has_a_row_a_domain_and_drops_the_splits():
    runs = records({}, {}).assign(
        **{
            "test.a.full.mrr": [1.0, 2.0],
            "test.b.full.mrr": [3.0, None],
            "val.a.full.mrr": 0.0,
            "best_test.a.full.mrr": 9,
        }
    )
    found = tables.by_domain(runs, {"mrr": "full.mrr"})
    assert found["domain"].tolist() == ["A", "A", "B", "B"]
    assert found["mrr"].fillna(-1).tolist() == [1, 2, 3, -1]
    assert not [name for name in found if "full" in name]
    assert tables.by_domain(runs[:0], {"mrr": "full.mrr"}).columns.tolist() == found.columns.tolist()


def test_the_papers_candidates_are_those_of_the_model_and_all_where_items_are_too_few():
    runs = records({}, {"model": "llm4cdsr"}, {"model": "sasrec"}, {})
    values = {"full": 1, "s100": 2, "s999": 3}
    metrics = {f"test.{d}.{c}.{m}": values[c] for d in "ab" for c in values for m in ("mrr", "ndcg@10")}
    runs = pd.concat([runs.assign(**metrics)] * 2)  # an index need not be unique
    runs.loc[runs["run_id"] == "3", ["test.a.s999.mrr", "test.a.s999.ndcg@10"]] = np.nan
    found = tables.by_domain(runs, {"x": "paper.ndcg@10"})[["run_id", "x", "protocol"]].drop_duplicates()
    assert found.sort_values("run_id")[["x", "protocol"]].values.tolist() == [
        [3, "s999"],
        [2, "s100"],
        [1, "full"],
        [1, "full"],
    ]
    without = runs.drop(columns=["test.a.s999.mrr"])
    assert set(tables.by_domain(without, {})["protocol"]) == {"full", "s100"}


def test_alignment_has_a_row_a_module_that_a_run_has():
    stack, deep = {"gca": (0, 1)}, {"gca": (0,), "gca_depth": 2, "model": "sasrec"}
    runs = records({}, stack, {"gca": (0,), "match": "network"}, deep)
    measured = {
        f"test.{d}.gca{p}.cos_signed": value for d in "ab" for p, value in (("0", 0.1), ("1", 0.2), ("0_2", 0.3))
    }
    measured |= {f"test.{d}.full.ndcg@10": 0.5 for d in "ab"}
    found = tables.alignment(runs.assign(**measured)).query("domain == 'B'")
    assert found[["run_id", "point", "number", "cos_signed"]].values.tolist() == [
        ["1", 0, 1, 0.1],
        ["3", 0, 1, 0.1],
        ["3", 0, 2, 0.3],
        ["1", 1, 1, 0.2],
    ]
    assert (found["ndcg"] == 0.5).all() and "gca0.cos_signed" not in " ".join(found)
    assert tables.alignment(records({})).empty  # a plain run has no cosine


def scaled(levels: dict[tuple[str, int], float], noise: float = 0.0) -> pd.DataFrame:
    """Runs of four seeds: NDCG@10 by what is named and its parameters; domain B twice as high."""
    gcas: dict[str, dict[str, object]] = {"plain": {}, "early": {"gca": (0,)}, "stack": {"gca": (0, 1)}}
    gcas |= {"wide": {"gca": (0,), "match": "params"}, "wider": {"gca": (0,), "gca_depth": 2, "match": "params"}}
    gcas |= {"tanh": {"gca": (0,), "gate": "tanh"}, "net": {"gca": (0,), "match": "network"}}
    rng, rows = np.random.default_rng(0), []
    for (name, size), level in levels.items():
        for seed in range(4):
            off = noise * rng.standard_normal()
            values = {f"test.{d}.full.ndcg@10": (level + off) * factor for d, factor in (("a", 1), ("b", 2))}
            rows.append({**gcas[name], "params_total": size, "seed": seed, **values})
    return records(*rows)


LEVELS = {("plain", 100): 0.10, ("wide", 200): 0.12, ("wider", 400): 0.14, ("early", 200): 0.13, ("stack", 400): 0.2}


def test_sizes_have_three_arms():
    found = tables.sizes(scaled(LEVELS | {("tanh", 200): 1.0, ("net", 200): 1.0})).query("domain == 'A'")
    assert found.groupby("arm")["params_total"].agg(list).to_dict() == {
        "baseline": [100, 200, 400],
        "early": [200],
        "stack": [400],
    }
    assert found["mean"].tolist() == pytest.approx([0.10, 0.12, 0.13, 0.14, 0.2]) and (found["n"] == 4).all()


def test_saved_parameters_are_read_off_the_baseline():
    found = tables.saved(tables.sizes(scaled(LEVELS))).set_index(["domain", "arm"])
    assert found.loc["A", "saved"].tolist() == pytest.approx(
        [np.sqrt(200 * 400) - 200, np.inf]
    )  # half way, in log size
    assert (found["low"].to_numpy() == pytest.approx(found["saved"].to_numpy())) and len(found) == 4
    dented = {**LEVELS, ("early", 200): 0.05, ("wide", 200): 0.09, ("stack", 400): 0.12}
    found = tables.saved(tables.sizes(scaled(dented))).query("domain == 'A'")
    assert found["saved"].tolist() == pytest.approx(
        [-100, np.sqrt(200 * 400) - 400]
    )  # the smallest will do; best so far
    noisy = tables.saved(tables.sizes(scaled(LEVELS, noise=0.003))).query("arm == 'early' and domain == 'A'")
    assert noisy["low"].item() < 82.8 < noisy["high"].item() and noisy["high"].item() - noisy["low"].item() > 30
    assert tables.saved(tables.sizes(scaled({key: LEVELS[key] for key in (("plain", 100), ("early", 200))}))).empty


def test_selection_on_test_is_a_ratio_run_by_run():
    runs = records(*({"seed": seed, "gca": gca} for seed in range(4) for gca in ((), (0,))))
    level = 0.1 + 0.01 * runs["seed"]
    gain = np.where(runs["variant"] == "plain", 1.10, 1.21)
    columns = {f"test.{d}.full.ndcg@10": level for d in "ab"}
    columns |= {"best_test.a.full.ndcg@10": level * gain, "best_test.b.full.ndcg@10": level}
    found = tables.selection(runs.assign(**columns)).set_index(["chosen", "domain", "pair"])["mean"]
    assert found.xs("all", level="pair").unstack().loc["plain", ["A", "B"]].tolist() == pytest.approx([10, 0])
    assert found["GCA0", "both", "p"] == pytest.approx(10) and found["GCA0", "A", "all"] == pytest.approx(21)


def test_published_figures_are_complete():
    table = tables.published("published")
    assert len(table) == 2 * 2 * 4 and set(table["pair"]) == {"food-kitchen", "beauty-electronics"}
    hits = table.pivot_table(index=["pair", "domain"], columns="metric", values="mean")
    assert (hits["hr@10"] > hits["hr@5"]).all() and (hits["ndcg@10"] > hits["mrr"]).all()
    assert set(tables.published("claims")["model"].dropna()) == set(tables.BASELINES)


def test_the_points_of_the_papers_scatter_correlate_as_it_prints():
    points = tables.published("figure2").groupby(["model", "domain"])
    ours = {key: part["abs_cos"].corr(part["ndcg10"]) for key, part in points}
    printed = tables.published("claims").query("claim == 'C2'").set_index(["model", "domain"])["figure"].to_dict()
    assert len(printed) == 6 and all(abs(ours[key] - printed[key]) < 0.15 for key in printed)  # some hide each other


def test_the_papers_gains_at_equal_size_are_those_of_its_curves():
    points = tables.published("figure3")
    theirs = tables.published("claims").query("claim == 'C4'")
    assert len(theirs) == 10
    for row in theirs.itertuples():
        case = points.query("model == @row.model and pair == @row.pair and domain == @row.domain").set_index("arm")
        first, curve = case.loc[["early"]].iloc[0], case.loc["baseline"]
        equal = np.interp(first["params_millions"], curve["params_millions"], curve["ndcg10"])
        assert 100 * (first["ndcg10"] / equal - 1) == pytest.approx(row.figure, abs=1.0)
