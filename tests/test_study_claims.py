"""Each claim put to records whose answer is known by construction."""

from __future__ import annotations

import doctest

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from statsmodels.stats.multitest import multipletests

from gcalib.study import claims, statistics, tables

VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "GCA0": {"gca": (0,)},
    "matched (all parameters)": {"gca": (0,), "match": "params"},
    "GCA1": {"gca": (1,)},
    "GCA2": {"gca": (2,)},
    "GCA0+1": {"gca": (0, 1)},
    "GCA1+2": {"gca": (1, 2)},
    "GCA0+1+2": {"gca": (0, 1, 2)},
}
FIELDS = {"gca": (), "match": None, "gate": "sigmoid", "heads": 4, "gca_depth": 1, "gate_hidden": None}
FIELDS |= {"gca_norm": True, "text": "auto", "latent": 16, "published": ()}
MODELS = ("abxi", "llm4cdsr", "cdsrnp")
PAIRS = ("food-kitchen", "electronic-phone-ts")


def study(
    gains: dict[str, float] | None = None, *, slope: float = 0.0, tilt: float = 0.0, cosine: float = 0.15,
    r_xy: float = 0.0, follows: float = 0.0, models: tuple[str, ...] = ("abxi",), pairs: tuple[str, ...] = PAIRS,
    seeds: int = 4, noise: float = 0.003, dim: int = 64,
) -> pd.DataFrame:  # fmt: skip
    """Records in which a variant ranks `gains` percent better, NDCG follows |mean cos| by `slope` in it, and so on."""
    rng, rows = np.random.default_rng(0), []
    for model in models:
        for number, pair in enumerate(pairs):
            for order, (variant, fields) in enumerate(VARIANTS.items()):
                for seed in range(seeds):
                    row = {**FIELDS, **fields, "model": model, "pair": pair, "seed": seed, "dim": dim}
                    row["run_id"] = f"{model}{pair}{variant}{seed}{dim}"
                    for place, letter in enumerate("ab"):
                        xy = 0.1 + 0.05 * (2 * number + place)
                        off = 0.01 * rng.standard_normal()
                        level = 0.1 * (1 + number) * (1 + (gains or {}).get(variant, 0.0) / 100)
                        level *= np.exp(noise * rng.standard_normal() + slope * off + tilt * 0.01 * order)
                        for candidates in ("full", "s100", "s999"):
                            row |= {
                                f"test.{letter}.{candidates}.{m}": level for m in ("mrr", "ndcg@1", "ndcg@10", "auc")
                            }
                        for point in (0, 1, 2):
                            mean = cosine + off + 0.01 * order + follows * xy
                            measured = {
                                "cos_abs_of_mean": mean,
                                "cos_mean_abs": mean,
                                "gated_cos_abs_of_mean": 0.9 - mean,
                            }
                            measured |= {"null_perm_signed": 0.01, "cos_xy_mean_abs": xy}
                            measured["cos_xy_r"] = r_xy + 0.01 * rng.standard_normal()
                            row |= {f"test.{letter}.gca{point}.{name}": value for name, value in measured.items()}
                    rows.append(row)
    return tables.named(pd.DataFrame(rows))


def deciding(found: pd.DataFrame) -> list[str]:
    return found.loc[found["decides"], "verdict"].tolist()


@pytest.mark.parametrize(
    ("gain", "verdict", "reason"),
    [
        (5.0, "replicated", "interval above 0"),
        (-5.0, "contradicted", "interval below 0"),
        (0.0, "not replicated", "no difference within 3%"),
    ],
)
def test_c1_is_judged_by_the_gain_of_early_cross_attention(gain, verdict, reason):
    found = claims.compared("C1", study({"GCA0": gain}))
    assert deciding(found) == [verdict] and len(found) == 3 * 3  # domains, pairs
    row = found[found["decides"]].iloc[0]
    assert row["reason"] == reason and row["ours"] == pytest.approx(gain, abs=0.3) and row["unit"] == "%"
    assert row["low"] < row["ours"] < row["high"] and (row["seeds"], row["runs"], row["protocol"]) == (4, 16, "s999")


def test_c1_of_a_pair_and_domain_is_a_paired_t_test_of_logarithms():
    runs = study({"GCA0": 2.0}, noise=0.03)
    found = claims.compared("C1", runs).query("pair == 'food-kitchen' and domain == 'A'").iloc[0]
    column = runs[runs["pair"] == "food-kitchen"].pivot(index="seed", columns="variant", values="test.a.s999.ndcg@10")
    expected = scipy.stats.ttest_rel(np.log(column["GCA0"]), np.log(column["plain"]))
    bounds = (100 * np.expm1(expected.confidence_interval())).tolist()
    assert [found["low"], found["high"], found["p"]] == pytest.approx([*bounds, expected.pvalue])
    assert found["verdict"] == "not replicated" and found["reason"] == "interval includes 0"
    assert found["paper"] == 14.3 and found["text"] == statistics.as_text(*found[["ours", "low", "high"]])
    assert found["case"] == "ABXI · food-kitchen"
    assert found["each"] == pytest.approx(100 * (column["GCA0"] / column["plain"] - 1).to_numpy())


def test_without_cross_attention_nothing_is_tested():
    plain = study({"GCA0": 5.0}).query("variant == 'plain'")
    assert set(claims.judge(plain)["reason"]) == {"not run"}
    assert set(claims.beside_paper(plain)["ours"]) == {"not run"}


def test_c1_asks_four_seeds_a_cell():
    found = claims.compared("C1", study({"GCA0": 5.0}, seeds=3))
    assert set(found["verdict"]) == {"not tested"} and set(found["reason"]) == {"3 seeds of 4"}
    assert found["ours"].notna().all() and found["holm"].isna().all()


def test_a_pair_with_few_seeds_counts_by_itself_only():
    runs = study({"GCA0": 5.0})
    runs.loc[runs["pair"] == PAIRS[1], "test.a.s999.ndcg@10"] *= np.where(runs["variant"] == "GCA0", 2, 1)[8 * 4 :]
    found = claims.compared("C1", runs[(runs["pair"] != PAIRS[1]) | (runs["seed"] < 2)]).query("domain == 'A'")
    found = found.set_index("pair")
    assert found["verdict"].to_dict() == {"all": "replicated", PAIRS[0]: "replicated", PAIRS[1]: "not tested"}
    assert found.loc[["all", *PAIRS], "ours"].tolist() == pytest.approx([5, 5, 110], abs=2)


@pytest.mark.parametrize(("gain", "verdict"), [(5.0, "contradicted"), (-5.0, "replicated")])
def test_c4_compares_with_the_matched_baseline(gain, verdict):
    runs = study({"matched (all parameters)": gain})
    found = claims.compared("C4", runs)
    assert deciding(found) == [verdict] and deciding(claims.compared("C1", runs)) == ["not replicated"]
    figures = found.dropna(subset=["paper"]).set_index(["pair", "domain"])["paper"].to_dict()
    assert figures == {("food-kitchen", "A"): 2.7, ("food-kitchen", "B"): 3.0}
    network = found[found["question"].str.contains("network")]
    assert network[["verdict", "text"]].values.tolist() == [["not tested", "not run"]]


def test_a_cut_is_of_the_papers_pair():
    found = claims.compared("C4", study(models=("llm4cdsr",))).dropna(subset=["paper"])
    assert found[["pair", "domain", "paper"]].values.tolist() == [
        ["electronic-phone-ts", "A", 5.0],
        ["electronic-phone-ts", "B", 7.0],
    ]


def test_another_metric_is_named_and_used():
    runs = study()
    runs["test.a.full.hr@10"] = runs["test.b.full.hr@10"] = np.where(runs["variant"] == "GCA0", 0.22, 0.2)
    found = claims.compared("C1", runs, "full.hr@10")
    assert set(found["question"]) == {"GCA0 against plain, HR@10"} and set(found["protocol"]) == {"full"}
    assert found["ours"].tolist() == pytest.approx([10] * 9) and found["paper"].isna().all()


def test_deleting_a_variant_leaves_its_questions_untested():
    judged = claims.judge(study({"GCA0": 5.0}, pairs=PAIRS[:1]).query("variant != 'GCA0'"))
    overall = claims.overall(judged).set_index("claim")
    assert overall.loc[["C1", "C3", "C4", "C6"], "ABXI"].eq("not tested").all()
    assert overall.loc["C2", "ABXI"] != "not tested"
    step = judged.query("question == 'GCA1+2 against GCA0, NDCG@10'")
    assert step[["verdict", "reason"]].values.tolist() == [["not tested", "not run"]]


@pytest.mark.parametrize(
    ("slope", "tilt", "pooled", "within"),
    [
        (-4, 0, "replicated", "replicated"),
        (4, 0, "contradicted", "contradicted"),
        (4, -10, "replicated", "contradicted"),
    ],
)
def test_c2_pooled_and_within_variants(slope, tilt, pooled, within):
    found = claims.orthogonal_is_better(study(slope=slope, tilt=tilt))
    every = found[found["pair"] == "all"].groupby("question")["verdict"].agg(set)
    assert every[["r, variants pooled", "r, within variants"]].tolist() == [{pooled}, {within}]
    other = {"replicated": {"contradicted"}, "contradicted": {"replicated"}}  # one cosine falls as the other rises
    gated = every[["r after the gate, variants pooled", "r after the gate, within variants"]]
    assert gated.tolist() == [other[pooled], other[within]]
    assert found.loc[found["decides"], "domain"].tolist() == ["A", "B"] and (found["unit"] == "r").all()
    assert found.loc[found["decides"], "runs"].tolist() == [2 * 6 * 4] * 2  # a run is one dot, whatever its points


def test_c2_asks_for_the_side_on_which_the_papers_figure_lies():
    runs = study(slope=10, tilt=10, models=MODELS, pairs=PAIRS[:1])
    found = claims.orthogonal_is_better(runs).query("decides").set_index(["model", "domain"])
    assert found.loc[("CDSRNP", "A"), ["verdict", "paper"]].tolist() == ["replicated", 0.537]  # as positive as theirs
    assert found.loc[("CDSRNP", "B"), ["verdict", "paper"]].tolist() == ["contradicted", -0.296]
    assert found.loc[("LLM4CDSR", "A"), ["verdict", "paper"]].tolist() == ["contradicted", -0.008]  # about none


def test_c2_asks_twelve_runs_of_a_pair():
    runs = study(slope=-4)
    few = runs[(runs["pair"] == PAIRS[0]) | (runs["variant"].isin(["plain", "GCA0", "GCA1"]))]
    found = (
        claims.orthogonal_is_better(few).query("domain == 'A' and question == 'r, variants pooled'").set_index("pair")
    )
    assert found["reason"][PAIRS[1]] == "8 runs of 12" and found["verdict"]["all"] == "replicated"
    assert found["runs"].to_dict() == {"all": 24, PAIRS[0]: 24, PAIRS[1]: 8}


@pytest.mark.parametrize(("cosine", "verdict"), [(0.14, "replicated"), (0.4, "contradicted"), (0.19, "not replicated")])
def test_c3_holds_the_level_against_the_published_range(cosine, verdict):
    found = claims.same_level(study(cosine=cosine))
    assert deciding(found) == [verdict] and found["ours"].iloc[0] == pytest.approx(cosine + 0.01, abs=0.01)
    assert found["reason"].str.contains("another user's X′ 0.01").all()


def test_c3_takes_the_median_over_pairs_and_domains_seed_by_seed():
    runs = study(pairs=("one", "two", "three"))
    found = claims.same_level(runs).query("decides").iloc[0]
    mine = runs[runs["variant"] == "GCA0"].groupby("seed")[[f"test.{d}.gca0.cos_abs_of_mean" for d in "ab"]]
    medians = [np.median(part.to_numpy()) for _, part in mine]
    bounds = scipy.stats.ttest_1samp(medians, 0).confidence_interval()
    assert [found["ours"], found["low"], found["high"]] == pytest.approx([np.mean(medians), *bounds])


def test_c3_leaves_out_a_pair_with_few_seeds():
    runs = study(cosine=0.14)
    runs = runs[(runs["pair"] == PAIRS[0]) | (runs["seed"] < 2)]
    found = claims.same_level(runs).query("domain == 'both'").set_index("pair")
    assert found["verdict"].to_dict() == {"all": "replicated", PAIRS[0]: "replicated", PAIRS[1]: "not tested"}
    assert found.loc["all", "ours"] == found.loc[PAIRS[0], "ours"]


def test_c3_compares_models_at_their_largest_width():
    narrow, wide = study(models=("abxi", "cdsrnp"), dim=64), study(cosine=0.25, dim=256)
    found = claims.same_level(pd.concat([narrow, wide])).query('question == "difference of two models\' levels"')
    assert found[["model", "verdict"]].values.tolist() == [["ABXI less CDSRNP", "contradicted"]]
    assert found["ours"].item() == pytest.approx(0.1, abs=0.02)


STACKS = {"GCA0": 1.0, "GCA1": 8.0, "GCA2": 1.0, "GCA0+1": 3.0, "GCA1+2": 12.0, "GCA0+1+2": 3.0}


def test_c5_asks_what_the_paper_says_of_each_model():
    runs = study(STACKS, models=MODELS, pairs=PAIRS[:1])
    overall = claims.overall(claims.compared("C5", runs)).iloc[0]
    assert overall[tables.BASELINES].tolist() == ["replicated"] * 3 and overall["verdict"] == "replicated"
    runs = study({**STACKS, "GCA2": 20.0, "GCA0+1+2": 9.0}, models=MODELS, pairs=PAIRS[:1])
    overall = claims.overall(claims.compared("C5", runs)).iloc[0]
    assert overall[["ABXI", "LLM4CDSR", "CDSRNP"]].tolist() == ["contradicted", "replicated", "contradicted"]


def test_c5_no_gain_takes_an_interval_below_three_percent():
    found = claims.compared("C5", study(STACKS, models=("cdsrnp",))).query("decides").iloc[0]
    assert found["reason"] == "interval below 3" and found["low"] < 0 < found["high"] < 3
    loud = claims.compared("C5", study(STACKS, models=("cdsrnp",), noise=0.1))
    assert deciding(loud) == ["not replicated"]


def test_c5_step_that_was_not_run_is_not_tested():
    runs = study(STACKS, pairs=PAIRS[:1])
    found = claims.compared("C5", runs[runs["variant"] != "GCA2"]).query("domain == 'both' and pair == 'all'")
    found = found.set_index("question")["verdict"]
    assert (
        found["GCA1+2 against GCA2, NDCG@10"] == "not tested" == found["one point more: GCA1+2 against GCA2, NDCG@10"]
    )
    assert found["GCA1+2 against GCA1, NDCG@10"] == "replicated"
    assert found["one point more: GCA0+1 against GCA1, NDCG@10"] == "replicated"  # one that loses
    assert found["one point more: GCA0+1 against GCA0, NDCG@10"] == "contradicted"


@pytest.mark.parametrize(("r", "verdict"), [(0.1, "replicated"), (-0.6, "contradicted")])
def test_c6_is_judged_by_position_within_runs(r, verdict):
    found = claims.independent(study(r_xy=r))
    assert deciding(found) == [verdict] and found["ours"].iloc[0] == pytest.approx(r, abs=0.02)


def test_c6_over_pairs_takes_five_of_them_with_domains():
    found = claims.independent(study(follows=1.0)).query("question.str.contains('over pairs')").iloc[0]
    assert found["verdict"] == "not tested" and found["reason"].startswith("4 pairs and domains of 5")
    three = study(follows=1.0, pairs=("one", "two", "three"))
    found = claims.independent(three).query("question.str.contains('over pairs')").iloc[0]
    assert found["verdict"] == "contradicted" and found["reason"].endswith("mean |cos(X, Y)| 0.10 to 0.35")


def test_c6_is_not_tested_where_records_hold_no_correlation_by_position():
    runs = study()
    found = claims.independent(runs[[name for name in runs if "cos_xy_r" not in name]])
    assert deciding(found) == ["not tested"]


def test_a_claim_about_every_model_falls_with_one():
    gains = zip((5.0, 5.0, -5.0), MODELS, strict=True)
    parts = [study({"GCA0": gain}, models=(model,), pairs=PAIRS[:1]) for gain, model in gains]
    overall = claims.overall(claims.judge(pd.concat(parts, ignore_index=True))).set_index("claim")
    assert overall.loc["C1", tables.BASELINES].tolist() == ["replicated", "replicated", "contradicted"]
    assert overall.loc["C1", "verdict"] == "contradicted" and overall.loc["C3", "verdict"] == "replicated"
    assert list(overall.index) == list(claims.TEXTS) and set(overall["verdict"]) <= set(claims.VERDICTS)
    overall = claims.overall(claims.compared("C1", pd.concat([parts[0], parts[1].query("variant == 'plain'")])))
    assert overall["verdict"].tolist() == ["not tested"]
    overall = claims.overall(claims.compared("C1", parts[0]))  # without runs of the other two
    assert overall[["ABXI", "CDSRNP", "verdict"]].values.tolist() == [["replicated", "not tested", "not tested"]]


def test_the_largest_width_that_was_tested_decides():
    narrow, wide = (study({"GCA0": gain}, dim=dim, pairs=PAIRS[:1]) for gain, dim in ((-5.0, 64), (5.0, 256)))
    found = claims.judge(pd.concat([narrow, wide.query("variant in ['plain', 'GCA0']")], ignore_index=True))
    verdicts = claims.overall(found).set_index("claim")["ABXI"]
    assert verdicts["C1"] == "replicated" and verdicts["C4"] == "contradicted" and verdicts["C2"] != "not tested"


def test_holm_corrects_for_rows_of_the_same_grain():
    found = claims.compared("C1", study({"GCA0": 3.0}, models=MODELS, noise=0.03))
    both = found[found["decides"]].sort_values("p")
    assert both["holm"].tolist() == pytest.approx(multipletests(both["p"], method="holm")[1]) and len(both) == 3
    assert both["holm"].nunique() > 1 and both["holm"].max() < 1
    alone = found[(found["domain"] != "both") & (found["pair"] != "all")]
    assert alone["holm"].min() == pytest.approx(min(1, 12 * alone["p"].min()))


def test_other_gates_and_models_do_not_mix_in():
    runs = study({"GCA0": 5.0})
    other = runs[runs["variant"] == "GCA0"].assign(gate="tanh", model="abxi", run_id=lambda t: t["run_id"] + "x")
    other = tables.named(other.assign(**{"test.a.gca0.cos_abs_of_mean": 0.9}))
    counted = runs[runs["variant"] == "plain"].assign(model="popularity", run_id=lambda t: t["run_id"] + "y")
    both = pd.concat([runs, other, counted], ignore_index=True)
    pd.testing.assert_frame_equal(claims.same_level(both), claims.same_level(runs))
    pd.testing.assert_frame_equal(claims.compared("C1", both), claims.compared("C1", runs))


def test_two_runs_of_one_name_are_refused():
    runs = study()
    with pytest.raises(ValueError, match="Several runs are .*'plain'"):
        claims.compared("C1", pd.concat([runs, runs[runs["variant"] == "plain"]]))


def test_beside_the_paper_each_of_its_figures_has_a_row():
    found = claims.beside_paper(study({"GCA0": 5.0, "matched (all parameters)": 5.0}, models=MODELS[:2]))
    assert len(found) == len(tables.published("claims")) + 2  # C3 and C6 are said of two models
    row = found.query("question == 'GCA0 against plain, NDCG@1' and model == 'ABXI'").iloc[0]
    assert (
        row["paper"] == "+22.0% (0.059 to 0.072)" and row["ours"].startswith("+4.9%") and row["verdict"] == "replicated"
    )
    cut = found.query("claim == 'C4' and model == 'LLM4CDSR' and pair == 'electronic-phone-ts'")  # a cut of its case
    assert cut["paper"].tolist() == ["+5.0%", "+7.0%"] and (cut["verdict"] == "not replicated").all()
    assert found.query("pair == 'cloth-sport'")["ours"].eq("not run").all()


def test_rules_say_every_question_once():
    assert not claims.RULES[["claim", "question"]].duplicated().any() and set(claims.RULES["claim"]) == set(
        claims.TEXTS
    )
    deciding = claims.RULES.query("claim != 'C2' and decides == True")
    assert (deciding["low"] < deciding["high"]).all()
    known = {f"{row.question}, NDCG@10" if row.base else row.question for row in claims.RULES.itertuples()}
    others = {"GCA0 against plain, NDCG@1", "GCA0 against plain, AUC"}
    assert set(tables.published("claims")["question"]) <= known | others


def test_docstring_examples():
    assert doctest.testmod(claims).failed == 0
