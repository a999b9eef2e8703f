"""The README says what the committed records, benchmarks and files say."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest

from gcalib import claims, run_grid, stats, tables
from gcalib.config import Profile

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def benchmark(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())  # type: ignore[no-any-return]


def row(beginning: str) -> str:
    """The result in the row of the speed table that begins so."""
    table = README.partition("## Speed")[2]
    (found,) = re.findall(rf"^\| {re.escape(beginning)}[^|]*\| ([^|]+) \|", table, re.MULTILINE)
    return str(found)


def test_the_speed_table_is_that_of_the_kept_runs() -> None:
    run, other = benchmark("step"), benchmark("step_bf16")["step"]
    step, loading = run["step"], run["loading"]
    plain, crossed = (step[f"gca={gca} fp32"] for gca in ("()", "(0,)"))
    half, half_crossed = other["gca=() bf16"], step["gca=(0,) bf16"]
    faster = "{:.1f} times faster ({:.1f} with GCA0)".format
    assert row("fp32 step against") == faster(plain["times_faster"], crossed["times_faster"])
    assert row("bf16 step against") == faster(half["times_faster"], half_crossed["times_faster"])
    assert row("fp32 step, share") == f"{plain['share_of_peak']:.0%}"
    assert row("bf16 step, share") == f"{half['share_of_peak']:.0%} ({half_crossed['share_of_peak']:.0%} with GCA0)"
    assert row("peak memory of training") == f"{max(run['peak_memory_bytes'].values()) / 1e9:.1f} GB"
    assert row("full ranking") == f"{run['ranking']['ratio']:.1f} times"
    assert row("loading") == f"{loading['load_s']:.1f} s"
    assert row("`import gcalib`") == f"{loading['import_s']:.1f} s, of which torch {loading['torch_share']:.0%}"


def test_the_table_holds_the_other_models_and_grids() -> None:
    models, grids = benchmark("models")["models"], benchmark("grid")
    three = [models[name] for name in ("abxi", "llm4cdsr", "cdsrnp")]
    listed = "{}, {} and {}".format
    assert row("fp32 step of ABXI") == listed(*(f"{step['share_of_peak']:.0%}" for step in three))
    assert row("peak memory of their") == listed(*(f"{step['peak_memory_bytes'] / 1e9:.1f}" for step in three)) + " GB"
    for kind in ("moving", "attention", "elementwise"):
        assert listed(*(f"{step[f'share_{kind}']:.0%}" for step in three)) in README
    first, second, third = (f"{step['share_products']:.0%}" for step in three)
    assert f"ABXI spends {first} in matrix products, LLM4CDSR {second}, CDSRNP {third};" in README
    peak, other = three[0]["gflop_per_s"] / three[0]["share_of_peak"], benchmark("step")["peak_gflop_per_s"]["fp32"]
    assert f"at {peak:.0f} GFLOP/s, that of the first rows at\n{other:.0f}," in README
    assert row("24 runs by two workers") == f"{grids['throughput']['ratio']:.2f} times"
    merged, loose = grids["overhead"]["merged_ms"], grids["overhead"]["loose_ms"]
    assert row("store and scheduler") == f"{merged['0']:.0f} ms ({merged['10000']:.0f} ms; {loose['10000']:.0f} ms)"
    assert row("a grid of 10,000") == f"{grids['finished']['seconds']:.1f} s"
    assert row("records that differ") == f"{grids['kills']['differing_records']}, {grids['nodes']['differing_records']}"


@pytest.fixture(scope="module")
def study() -> pd.DataFrame:
    return run_grid(Profile.load("first", ROOT / "params").grid_configs(), ROOT / "results")


def test_the_verdicts_are_those_of_the_records(study: pd.DataFrame) -> None:
    assert claims.in_short(claims.judge(tables.named(study))) in README


def test_what_other_measures_say_is_what_the_records_say(study: pd.DataFrame) -> None:
    said = " ".join(claims.by_measure(claims.under_protocols(tables.named(study))))
    assert said in README


def test_the_papers_own_case_is_what_the_records_say(study: pd.DataFrame) -> None:
    (theirs,) = claims.published("C1").query("model == 'ABXI' and figure == 'NDCG@10'").to_dict("records")
    metric = claims.PROTOCOLS["999 sampled"]
    ours = claims.by_case(tables.named(study), "plain", "GCA0", metric, theirs["domain"])
    case = study[(study["model"] == "abxi") & (study["pair"] == theirs["pair"]) & (study["gca"] == ())]
    assert (len(case), set(case["dim"]), set(case["ties"])) == (3, {64}, {"shuffle"})
    (row,) = ours[(ours["model"] == "ABXI") & (ours["pair"] == theirs["pair"])].to_dict("records")
    gain = 100 * (theirs["found"] / theirs["plain"] - 1)
    assert f"the paper gains {gain:+.1f}%, and here it is {stats.said(row['mean'], row['low'], row['high'])}" in README


def test_what_weakens_the_verdicts_is_what_the_records_say(study: pd.DataFrame) -> None:
    weak = claims.caveats(tables.named(study))
    # "the one row of C2 that is clear, two rises of C3, and the refutation of C6"
    assert [text[:2] for text in weak] == ["C2", "C3", "C3", "C6"]
    assert all(sentence in README for sentence in weak) and weak[-1].endswith("a weak refutation.")


def test_the_gate_s_cosines_are_those_of_the_records(study: pd.DataFrame) -> None:
    rows = claims.alignment(tables.named(study)).query("point == 0")
    tanh = rows[rows["variant"] == "GCA0, tanh"]
    sigmoid = rows[rows["variant"] == "GCA0"].merge(tanh[["model", "pair", "domain", "seed"]])
    before, after = [], []
    for model in rows["model"].unique():
        turned, dosed = (part[part["model"] == model].mean(numeric_only=True) for part in (tanh, sigmoid))
        before.append(f"{turned['cos_mean_abs']:.2f} in place of {dosed['cos_mean_abs']:.2f} ({model})")
        after.append(f"{turned['cos_gated']:.2f} and {dosed['cos_gated']:.2f} ({model})")
        chance = turned["null_mean_abs"]
        assert abs(turned["cos_mean_abs"] - chance) < abs(dosed["cos_mean_abs"] - chance) / 2, model  # "decides where"
        assert abs(turned["cos_gated"] / dosed["cos_gated"] - 1) < 0.15, model  # "about as aligned"
    assert len(before) == 3 and f"{', '.join(before)}, on the same pairs and seeds" in README
    assert f"through either gate: {', '.join(after)}, tanh and sigmoid" in README
    assert f"random directions have {rows['null_mean_abs'].mean():.2f}" in README
    whole = rows[rows["variant"].isin(["GCA0", "GCA0, tanh"])].dropna(subset=["gated_cos_mean_abs"])
    told = []
    for model, part in whole.groupby("model", sort=False):
        own, other = (part.groupby("gate")[name].mean() for name in ("gated_cos_mean_abs", "gated_null_perm_mean_abs"))
        assert (own > other + claims.NEAR).all(), model  # "against", through either gate
        mine, theirs = (f"{one['tanh']:.2f} and {one['sigmoid']:.2f}" for one in (own, other))
        told.append(f"{mine} against {theirs} ({model})")
    assert f"{', '.join(told)}, in {whole['run_id'].nunique()} newer runs" in README


def test_what_an_untrained_module_keeps_is_what_the_records_say(study: pd.DataFrame) -> None:
    kept = claims.untrained(tables.named(study))
    shares = ", ".join(f"{row.fresh:.0%} and {row.own:.0%} ({model})" for model, row in kept.iterrows())
    assert f"random directions, {shares} are left" in README
    assert kept.loc["ABXI", "own"] > 0.4 and kept.loc["ABXI", "fresh"] < kept.loc["ABXI", "own"] / 2  # "much"


def test_what_the_runs_lack_is_what_the_records_say(study: pd.DataFrame) -> None:
    texts = study[study["model"] == "llm4cdsr"][["text_items_a", "text_items_b"]]
    assert (texts.min(axis=1) == 0).all() and (texts.max(axis=1) > 0).all()
    clock = study[study["model"] == "cdsrnp"].groupby("pair")["clock"].first()
    assert (~clock.astype(bool)).sum() == 2 and study[study["model"] != "cdsrnp"]["clock"].all()


def test_the_hours_are_those_of_the_records(study: pd.DataFrame) -> None:
    assert f"The {len(study)} runs of `first` took {study['seconds'].sum() / 3600:.0f} hours of one core" in README


def test_the_figure_is_the_one_of_its_notebook() -> None:
    notebook = nbformat.read(ROOT / "notebooks" / "07_orthogonality.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [
        base64.b64decode(output.data["image/png"]) for output in outputs if "image/png" in output.get("data", {})
    ]
    assert (ROOT / "docs" / "finding.png").read_bytes() in pictures


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
def test_every_file_that_it_links_to_is_there(target: str) -> None:
    assert (ROOT / target).exists()


def test_every_notebook_is_listed() -> None:
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"(notebooks/{path.name})" in README
