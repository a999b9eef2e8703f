"""Each claim put to records whose answer is known by construction."""

from __future__ import annotations

import doctest

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.power import TTestPower

from gcalib.study import claims, tables

VARIANTS: dict[str, dict[str, object]] = {
    "plain": {"gca": ()},
    "GCA0": {"gca": (0,)},
    "matched": {"gca": (0,), "match": "network"},
    "GCA1": {"gca": (1,)},
    "GCA2": {"gca": (2,)},
    "GCA0+1": {"gca": (0, 1)},
    "GCA1+2": {"gca": (1, 2)},
    "GCA0+1+2": {"gca": (0, 1, 2)},
}
RISING = {"GCA0": 0.0, "GCA1": 1.0, "GCA0+1": 4.0, "GCA1+2": 6.0, "GCA0+1+2": 12.0}
LENGTHS = {"norm_parallel": 0.0, "norm_orthogonal": 1.0, "gated_norm_parallel": 0.0, "gated_norm_orthogonal": 1.0}


def study(
    gains: dict[str, float],
    *,
    slope: float = 0.0,
    cosine: float = 0.15,
    follows: float = 0.0,
    untrained: float = 0.1,
    models: tuple[str, ...] = ("abxi",),
) -> pd.DataFrame:
    """Records in which a variant ranks `gains` percent better, NDCG falls by `slope` with the cosine, and so on."""
    rng = np.random.default_rng(0)
    rows = []
    for model in models:
        for number, pair in enumerate(("one", "two", "three")):
            for variant, fields in VARIANTS.items():
                for seed in range(3):
                    row = {"gate": "sigmoid", "heads": 4, "match": None, "dim": 64, **fields}
                    row |= {"model": model, "pair": pair, "seed": seed, "run_id": f"{model}{pair}{variant}{seed}"}
                    for place, letter in enumerate("ab"):
                        xy = 0.1 + 0.05 * (2 * number + place)
                        off = 0.02 * rng.standard_normal()
                        level = 0.1 * (1 + number) * (1 + gains.get(variant, 0.0) / 100 + 0.002 * rng.standard_normal())
                        row[f"test.{letter}.full.ndcg@10"] = level + slope * off
                        for point in (0, 1, 2):
                            measured = {"cos_mean_abs": cosine + off + follows * xy, "null_mean_abs": 0.1, **LENGTHS}
                            measured |= {"cos_xy_mean_abs": xy + 0.01 * rng.standard_normal()}
                            measured |= {"null_initial_mean_abs": untrained}
                            row |= {f"test.{letter}.gca{point}.{name}": value for name, value in measured.items()}
                    rows.append(row)
    return tables.named(pd.DataFrame(rows))


def verdicts(found: pd.DataFrame) -> set[str]:
    return set(found["verdict"])


@pytest.mark.parametrize(("gain", "verdict"), [(5.0, "confirmed"), (-5.0, "refuted"), (0.0, "undecided")])
def test_c1_is_judged_by_the_gain_of_early_cross_attention(gain, verdict):
    found = claims.early(study({"GCA0": gain}))
    (row,) = found.to_dict("records")
    assert row["verdict"] == verdict and row["ours"] == pytest.approx(gain, abs=0.3)
    assert row["low"] < row["ours"] < row["high"] and (row["n"], row["runs"]) == (9, 18)


@pytest.mark.parametrize(("gain", "verdict"), [(5.0, "refuted"), (-5.0, "confirmed")])
def test_c4_compares_with_the_matched_baseline(gain, verdict):
    runs = study({"matched": gain})
    assert verdicts(claims.matched(runs)) == {verdict} and verdicts(claims.early(runs)) == {"undecided"}


@pytest.mark.parametrize(("slope", "verdict"), [(-1.0, "confirmed"), (1.0, "refuted"), (0.0, "undecided")])
def test_c2_is_judged_within_pair_and_point(slope, verdict):
    found = claims.orthogonal_is_better(study({}, slope=slope))
    assert verdicts(found) == {verdict} and found["part"].tolist() == ["A", "B"]
    assert found["n"].tolist() == [3 * 3 * 6] * 2  # a run is one row, whatever its points


def test_c2_is_undecided_in_a_single_cell():
    runs = study({}, slope=-1.0)
    found = claims.orthogonal_is_better(runs[(runs["pair"] == "one") & runs["variant"].isin(["plain", "GCA0"])])
    assert verdicts(found) == {"undecided"} and found["ours"].isna().all()


def test_holm_corrects_for_the_rows_looked_at():
    found = claims.within_cells(claims.first_points(study({}))).sort_values("p")
    assert found["holm"].iloc[0] == pytest.approx(min(1, 2 * found["p"].iloc[0]))


@pytest.mark.parametrize(("cosine", "verdict"), [(0.15, "confirmed"), (0.4, "refuted"), (0.2, "undecided")])
def test_c3_holds_the_median_cosine_against_the_published_range(cosine, verdict):
    found = claims.same_level(study({}, cosine=cosine)).set_index("part")
    assert found.at["level", "verdict"] == verdict
    rise = found.loc["rise"]  # above the module's initial weights, which is no emergence
    assert rise["ours"] == pytest.approx(cosine - 0.1, abs=0.02) and rise["verdict"] == "refuted"


def test_c3_sees_a_cosine_that_falls():
    assert claims.same_level(study({}, cosine=0.05)).set_index("part").at["rise", "verdict"] == "confirmed"


def test_c3_takes_six_runs_for_a_median():
    runs = study({}, cosine=0.4)
    few = claims.same_level(runs[runs["pair"] == "one"]).set_index("part").loc["level"]
    assert few["verdict"] == "undecided" and few["n"] == 3 and np.isnan(few["low"])


@pytest.mark.parametrize("changes", [{"gate": "tanh"}, {"dim": 128, "seed": 7}])
def test_other_gates_and_widths_do_not_mix_in(changes):
    runs = study({"GCA0": 5.0})
    other = runs[runs["variant"] == "GCA0"].assign(**changes, model="abxi", run_id=lambda t: t["run_id"] + "x")
    both = pd.concat([runs, tables.named(other.assign(**{"test.a.gca0.cos_mean_abs": 0.9}))], ignore_index=True)
    pd.testing.assert_frame_equal(claims.same_level(both), claims.same_level(runs))
    pd.testing.assert_frame_equal(claims.early(both), claims.early(runs))


@pytest.mark.parametrize(("last", "verdict"), [(12.0, "refuted"), (6.0, "undecided"), (-3.0, "confirmed")])
def test_c5_falls_only_if_every_step_gains(last, verdict):
    found = claims.depth(study({**RISING, "GCA0+1+2": last}))
    assert verdicts(found) == {verdict} and found["level"].item() == pytest.approx(1 - 0.05 / len(claims.STEPS))
    assert last > 0 or found["question"].item().startswith("GCA0+1+2 against GCA1+2")


def test_c5_is_open_while_a_step_was_not_run():
    runs = study(RISING)
    runs = runs[~runs["variant"].isin(["GCA2", "GCA0+1+2"])]
    assert verdicts(claims.depth(runs)) == {"undecided"} and len(claims.steps(runs)) == 3
    assert claims.steps(runs[runs["variant"] == "plain"]).empty


def test_a_step_is_compared_on_the_seeds_that_both_have():
    runs = study({})
    lacking = runs[~(runs["variant"].isin(["GCA0", "GCA1"]) & (runs["seed"] == 2))]
    taken = claims.steps(lacking).set_index("step")["n"]
    assert taken["GCA0+1 against GCA0"] == 6 and taken["GCA0+1+2 against GCA0+1"] == 9


def test_c6_is_refuted_where_one_cosine_follows_the_other():
    assert verdicts(claims.independent(study({}, follows=1.0))) == {"refuted"}
    assert verdicts(claims.independent(study({}))) == {"undecided"}  # six dots cannot show that there is nothing
    over_pairs = claims.independent(study({}, follows=1.0), ["pair"])
    assert (over_pairs["n"].item(), over_pairs["verdict"].item()) == (3, "undecided")


def test_a_claim_about_every_model_falls_with_one():
    good, bad = study({"GCA0": 5.0}, untrained=0.3), study({"GCA0": -5.0}, untrained=0.3, models=("cdsrnp",))
    overall = claims.overall(claims.judge(pd.concat([good, bad], ignore_index=True))).set_index("claim")
    assert overall["verdict"].loc[["C1", "C2", "C3"]].tolist() == ["refuted", "undecided", "confirmed"]
    assert set(overall.index) == set(claims.TEXTS) and overall.at["C1", "confirmed"] == 1


def test_a_model_that_could_not_be_asked_leaves_its_claims_undecided():
    both = study({"GCA0": 5.0}, models=("abxi", "cdsrnp"))
    judged = claims.judge(both[(both["model"] == "ABXI") | (both["variant"] == "plain")])
    lacking = judged[judged["model"] == "CDSRNP"]
    assert set(lacking["claim"]) == set(claims.TEXTS) and not lacking["n"].any()
    assert claims.overall(judged)["verdict"].iloc[0] == "undecided" and "| no runs |" in claims.in_short(judged)


def test_a_counting_baseline_is_not_judged():
    runs = study({"GCA0": 5.0})
    counted = runs[runs["variant"] == "plain"].assign(model="popularity")
    assert claims.early(pd.concat([runs, counted]))["model"].tolist() == ["ABXI"]


def test_the_short_table_holds_every_figure():
    judged = claims.judge(study({"GCA0": 5.0}, models=("abxi", "cdsrnp")))
    text = claims.in_short(judged)
    assert text.count("\n") == 7 and all(claims.as_text(row) in text for row in judged.to_dict("records"))


def test_a_case_is_an_effect_by_itself():
    runs = study({"GCA0": 5.0}, models=("abxi", "cdsrnp"))
    found = claims.by_case(runs, "plain")
    assert len(found) == 6 and found.groupby("model")["mean"].mean().tolist() == pytest.approx(
        claims.early(runs).set_index("model")["ours"].sort_index().tolist()
    )
    a, b = (claims.by_case(runs, "plain", domain=domain)["mean"].to_numpy() for domain in "AB")
    assert found["mean"].to_numpy() == pytest.approx((a + b) / 2)


def test_effect_less_another_metric_is_the_difference_of_their_gains():
    runs = study({"GCA0": 5.0})
    more = 1 + 0.02 * (runs["variant"] == "GCA0")
    runs = runs.assign(**{f"test.{d}.s100.ndcg@10": runs[f"test.{d}.full.ndcg@10"] * more for d in "ab"})
    (row,) = claims.effect(runs, "plain", ["GCA0"], "s100.ndcg@10", less="full.ndcg@10").to_dict("records")
    assert row["low"] < row["mean"] < row["high"] and row["mean"] == pytest.approx(2.1, abs=0.01)
    assert set(claims.under_protocols(runs)["protocol"]) == {"full", "100 sampled"}


def test_two_runs_of_one_name_are_refused():
    runs = study({})
    with pytest.raises(ValueError, match="Several runs are .*'plain'"):
        claims.early(pd.concat([runs, runs[runs["variant"] == "plain"]]))


def test_seeds_needed_give_the_power():
    gains = claims.effect(study({}), "plain", ["GCA0"])
    (needed,) = claims.seeds_needed(gains, 0.1)
    error = (gains["high"] - gains["low"]).item() / 2 / 2.446912  # t of 6 degrees of freedom
    reached = [TTestPower().power(0.1 / error / 3**0.5, n, 0.05, df=3 * (n - 1)) for n in (needed - 1, needed)]
    assert reached[0] < 0.8 <= reached[1]
    assert np.isnan(claims.seeds_needed(claims.effect(study({}).query("seed == 0"), "plain", ["GCA0"]), 1.0)).all()


def test_docstring_examples():
    assert doctest.testmod(claims).failed == 0
