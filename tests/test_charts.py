"""Every figure is drawn once, small enough to commit; a notebook with one goes through papermill and nbconvert."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import altair as alt
import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
from nbconvert import HTMLExporter
from PIL import Image

from gcalib import charts, rendering

ROOT = Path(__file__).parents[1]
DOMAINS = ("food", "kitchen")
rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def enabled():
    with alt.theme.enable("gcalib"), alt.renderers.enable("gcalib"), alt.data_transformers.enable("default"):
        charts.enable()
        yield


def curves(epochs: int = 200) -> pd.DataFrame:
    """Curves of one run, falling cosines and rising NDCG."""
    columns: dict[str, object] = {"epoch": np.arange(epochs + 1)}
    for letter in "ab":
        columns[f"val.{letter}.gca0.cos_mean_abs"] = 0.05 + 0.3 * np.exp(-np.arange(epochs + 1) / 30)
        columns[f"val.{letter}.gca0.null_mean_abs"] = 0.05
        columns[f"val.{letter}.gca0.null_perm_mean_abs"] = 0.06 + 0.1 * rng.random(epochs + 1)
        columns[f"val.{letter}.full.ndcg@10"] = 0.08 * (1 - np.exp(-np.arange(epochs + 1) / 20))
    return pd.DataFrame(columns)


def nulls() -> pd.DataFrame:
    """Cosines of three runs of two cases in two domains, with their nulls."""
    rows = [(case, d, 0.2 + 0.02 * seed) for case in ("ABXI · one", "CDSRNP · two") for d in "AB" for seed in range(3)]
    measured = pd.DataFrame(rows, columns=["case", "domain", "cos_mean_abs"])
    return measured.assign(null_mean_abs=0.1, null_perm_mean_abs=0.15, null_init_mean_abs=0.12)


def everyone() -> dict[str, alt.TopLevelMixin]:
    """One example of every figure, as large as it gets in a notebook."""
    pairs = ["food-kitchen", "cloth-sport"]
    long = [{"pair": p, "domain": d, "length": n} for p in pairs for d in "AB" for n in rng.geometric(0.1, 500)]
    items = [{"pair": p, "domain": d, "interactions": n} for p in pairs for d in "AB" for n in rng.zipf(2, 2000)]
    intervals = [
        {"variant": v, "domain": d, "mean": 0.1, "low": low, "high": high}
        for d in DOMAINS
        for v, low, high in (("plain", 0.09, 0.11), ("one seed", np.nan, np.nan))
    ]
    attention = [(h, q, k, 1 / q) for h in (1, 2) for q in range(1, 21) for k in range(1, q + 1)]
    ties = [(p, w, 0.3) for p in pairs for w in ("neighbouring events", "last event")]
    costs = [(p, n, c * n) for p, c in (("attention", 0.01), ("gate", 0.03)) for n in (16, 64, 256)]
    return {
        "cosine_and_ndcg": charts.cosine_and_ndcg(curves(), domains=DOMAINS, subtitle="one run"),
        "lengths": charts.lengths(pd.DataFrame(long)),
        "popularity": charts.popularity(pd.DataFrame(items)),
        "tie_share": charts.tie_share(pd.DataFrame(ties, columns=["pair", "what", "share"])),
        "metric_with_intervals": charts.metric_with_intervals(
            pd.DataFrame(intervals), metric="NDCG@10", title="T",
            runs=pd.DataFrame([{"variant": "plain", "domain": d, "value": v} for d in DOMAINS for v in (0.097, 0.103)]),
        ),
        "gate_histogram": charts.gate_histogram(pd.DataFrame({"domain": DOMAINS, "gate": list(rng.random((2, 400)))})),
        "attention_map": charts.attention_map(pd.DataFrame(attention, columns=["head", "query", "key", "weight"])),
        "cost": charts.cost(
            pd.DataFrame(costs, columns=["part", "length", "ms"]),
            x="length", y="ms", x_title="length (events)", y_title="time (ms)", title="T",
        ),
        "lines": charts.lines(
            pd.DataFrame({"part": ["a", "a", "b", "b"], "x": [0, 1] * 2, "y": [0, 1, 1, 0]}),
            x="x", y="y", x_title="cosine", y_title="angle (degrees)", title="T",
        ),
        "timeline": charts.timeline(
            pd.DataFrame(
                {"user": np.repeat(["user 1", "user 2"], 40), "domain": np.tile(DOMAINS, 40),
                 "time": 86_400 * rng.integers(12_000, 16_000, 80)}
            ), title="T",
        ),
        "visibility": charts.visibility(
            pd.DataFrame([{"query": q, "key": k, "visible": k <= q} for q in range(20) for k in range(20)]),
            x_title="key", y_title="query", title="T",
        ),
        "differences": charts.differences(
            pd.DataFrame([(c, d, m, m - 1, m + 1) for c in ("x", "y") for d in "AB" for m in (-2.0, 0.5, 2.0)],
                         columns=["case", "domain", "mean", "low", "high"]), metric="NDCG@10 (%)", title="T",
        ),
        "against_nulls": charts.against_nulls(nulls(), title="T", level=(0.1, 0.2)),
        "dots": charts.dots(
            pd.DataFrame({"model": ["m", "n"] * 60, "pair": ["p", "q", "p", "q"] * 30, "point": [0, 0, 1, 1] * 30,
                          "cos": rng.random(120), "ndcg": rng.random(120)}),
            x="cos", y="ndcg", x_title="mean |cos(X, X′)|", y_title="NDCG@10", title="T", colour="pair", shape="point",
            panel="model", cells=["pair", "point"], lined=["m"],
        ),
        "by_width": charts.by_width(
            pd.DataFrame([(v, d, w, n * w, w / 1e3, np.nan, np.nan) for v, n in (("plain", 1e3), ("GCA0", 1.3e3))
                          for d in "AB" for w in (16, 32, 64)],
                         columns=["variant", "domain", "dim", "size", "mean", "low", "high"]),
            x="size", x_title="parameters", metric="NDCG@10", title="T",
        ),
        "trajectories": charts.trajectories(
            pd.DataFrame([(f"{m} · {p}", m, d, e, 0.1 + e / 100 + s / 50) for m in ("ABXI", "CDSRNP") for p in "pqrs"
                          for d in "AB" for e in range(60) for s in (0, 1)],
                         columns=["case", "model", "domain", "epoch", "cos"]),
            y="cos", y_title="mean |cos(X, X′)|", title="T",
        ),
        "step_ratio": charts.step_ratio(pd.DataFrame({"step": ["fp32", "bf16"], "ratio": [11.0, 22.0]}), title="T"),
    }  # fmt: skip


EVERYONE = everyone()


def axis_titles(part: object) -> set[str]:
    """Titles of all x and y channels in a chart, `"?"` where a channel has none and no names to speak for it."""
    if isinstance(part, list):
        return set().union(*map(axis_titles, part))
    if not isinstance(part, dict):
        return set()
    found = set()
    for channel in ("x", "y"):
        shown = part.get("encoding", {}).get(channel)
        if shown is not None and shown.get("type") != "nominal":
            found.add(shown.get("title") or ("" if shown.get("field") == "one" else "?"))
    return found.union(*(axis_titles(value) for value in part.values()))


def test_every_figure_of_the_module_is_tried_here():
    assert set(EVERYONE) == set(charts.__all__) - {"enable"}


def test_a_tick_is_a_run_and_a_run_has_a_mean():
    means = pd.DataFrame({"variant": ["m", "n"], "domain": "A", "mean": [2.0, 5.0], "low": np.nan, "high": np.nan})
    runs = pd.DataFrame({"variant": "m", "domain": "A", "value": [1.0, 3.0]})
    (data,) = charts.metric_with_intervals(means, metric="M", title="T", runs=runs).to_dict()["datasets"].values()
    assert [row["value"] for row in data if row["value"] is not None] == [1.0, 3.0]
    with pytest.raises(ValueError, match=r"runs of \['m'\] have no mean"):
        charts.metric_with_intervals(means[1:], metric="M", title="T", runs=runs)


@pytest.mark.parametrize("name", EVERYONE)
def test_figure_has_titles_and_is_small(name):
    chart = EVERYONE[name]
    spec = chart.to_dict()
    assert spec["title"]["text"]
    assert axis_titles(spec)
    assert "?" not in axis_titles(spec)
    bundle, metadata = rendering._render(spec)
    assert len(bundle["image/png"]) <= rendering.MAX_PNG
    stored = len(json.dumps(bundle[rendering.VEGALITE], indent=1)) + len(bundle["image/png"]) * 4 / 3
    assert stored < 80_000, "four such figures must fit into a notebook of 300 KB"
    image = Image.open(io.BytesIO(bundle["image/png"]))
    assert image.mode == "P"
    assert "transparency" not in image.info
    pixels = np.asarray(image.convert("RGB"))
    assert (pixels[0, 0] == 255).all()  # white behind everything
    assert (pixels.astype(int).std(axis=(0, 1)) > 3).all()  # and something in front of it
    assert metadata["image/png"] == {"width": image.width // 2, "height": image.height // 2}


@pytest.mark.parametrize("name", ["cosine_and_ndcg", "metric_with_intervals", "attention_map"])
def test_tables_as_csv_draw_the_same_picture(name, monkeypatch):
    spec = EVERYONE[name].to_dict()
    small = rendering.compact(spec)
    assert len(json.dumps(small, indent=1)) < len(json.dumps(spec, indent=1))
    monkeypatch.setattr(rendering, "PALETTE", 256)
    pictures = [
        np.asarray(Image.open(io.BytesIO(rendering.png(one)[0])).convert("RGB")).astype(int) for one in (spec, small)
    ]
    assert pictures[0].shape == pictures[1].shape
    # five digits of a number are far less than a pixel; edges may differ by a shade
    assert (np.abs(pictures[0] - pictures[1]).max(axis=2) > 40).mean() < 1e-4


def test_csv_keeps_kinds_gaps_and_awkward_names():
    frame = pd.DataFrame(
        {"name": ['a "b", c', "d\ne"], "yes": [True, False], "x": [0.123456789, np.nan], "n": [1234567, 2]}
    )
    small = rendering.compact(alt.Chart(frame).mark_point().encode(x="x", y="name", color="yes:N").to_dict())
    (text,) = small["datasets"].values()
    assert small["data"]["format"] == {"type": "csv", "parse": {"x": "number", "n": "number", "yes": "boolean"}}
    back = pd.read_csv(io.StringIO(text))
    assert back["name"].tolist() == frame["name"].tolist()
    assert back["yes"].tolist() == [True, False]
    assert back["n"].tolist() == [1234567, 2]
    assert back["x"][0] == pytest.approx(0.123456789, rel=1e-4)
    assert np.isnan(back["x"][1])


def test_palette_keeps_the_colours_of_the_lines():
    frame = pd.DataFrame(
        {"x": np.tile([0.0, 1.0], 7), "y": np.repeat(np.arange(7), 2), "line": np.repeat(list("abcdefg"), 2)}
    )
    picture, _, _ = rendering.png(alt.Chart(frame).mark_line().encode(x="x", y="y", color="line").to_dict())
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).reshape(-1, 3).astype(int)
    for colour in rendering.COLOURS:
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert np.abs(pixels - wanted).max(axis=1).min() <= 6, colour


def test_a_figure_too_detailed_is_drawn_smaller_and_then_refused(monkeypatch):
    spec = EVERYONE["lengths"].to_dict()
    large, width, height = rendering.png(spec)
    monkeypatch.setattr(rendering, "MAX_PNG", len(large) - 1)
    small, *size = rendering.png(spec)
    assert len(small) < len(large)
    assert size == [pytest.approx(width, abs=1), pytest.approx(height, abs=1)]
    monkeypatch.setattr(rendering, "MAX_PNG", 1000)
    with pytest.raises(ValueError, match="more than 1000: draw fewer marks"):
        rendering.png(spec)


def test_a_table_too_long_is_refused():
    frame = pd.DataFrame({"x": np.arange(rendering.MAX_ROWS + 1)})
    with pytest.raises(alt.MaxRowsError):
        alt.Chart(frame).mark_point().encode(x="x").to_dict()


def test_several_runs_are_averaged_and_thinned():
    many = pd.concat([curves(300).assign(run_id="a"), curves(100).assign(run_id="b")])
    spec = charts.cosine_and_ndcg(many).to_dict()
    rows = [row for table in spec["datasets"].values() for row in table if row.get("line") == "measured"]
    food = [row for row in rows if row["domain"] == "A"]
    assert len(food) == charts.POINTS
    assert (food[0]["epoch"], food[-1]["epoch"]) == (0, 300)
    mean = curves(300)["val.a.gca0.cos_mean_abs"]
    assert [row["value"] for row in food] == pytest.approx(mean[[row["epoch"] for row in food]].tolist())


def test_a_null_that_was_not_measured_is_not_in_the_legend():
    without = charts.cosine_and_ndcg(curves()).to_dict()
    initial = {f"val.{letter}.gca0.null_init_mean_abs": 0.09 for letter in "ab"}
    with_it = charts.cosine_and_ndcg(curves().assign(**initial)).to_dict()
    assert "own start" not in json.dumps(without)
    assert "own start" in json.dumps(with_it["vconcat"][0])
    for values, shown in ((None, False), ([np.nan, 0.11, 0.11] * 4, True)):
        frame = nulls() if values is None else nulls().assign(null_fresh_mean_abs=values)
        spec = json.dumps(charts.against_nulls(frame, title="T").to_dict())
        assert ("drawn anew" in spec) is shown and "NaN" not in spec
    assert "after the gate" not in spec  # unless the frame has it
    rows = charts.against_nulls(nulls().assign(cos_gated=0.3), title="T").to_dict()["datasets"].values()
    (gated,) = [[row for row in table if row["kind"] == "gated"] for table in rows]
    assert gated and {(row["value"], row["what"][:14]) for row in gated} == {(0.3, "after the gate")}


def test_runs_without_the_module_leave_its_curves_alone():
    beside = curves(300).drop(columns=[name for name in curves() if "gca0" in name])
    spec = charts.cosine_and_ndcg(pd.concat([curves(10), beside])).to_dict()
    rows = [row for table in spec["datasets"].values() for row in table if row.get("line") == "measured"]
    assert max(row["epoch"] for row in rows) == 10
    with pytest.raises(ValueError, match="cos_mean_abs' holds no number"):
        charts.cosine_and_ndcg(pd.concat([curves(10), beside]).query("epoch > 10"))


def test_lengths_count_empty_bins_and_percent():
    frame = pd.DataFrame({"pair": "p", "domain": "A", "length": [1, 1, 1, 3]})
    (rows,) = charts.lengths(frame).to_dict()["datasets"].values()
    assert {row["length"]: row["share"] for row in rows} == {0: 0, 1: 75, 2: 0, 3: 25, 4: 0}


def test_a_missing_column_and_an_empty_table_are_named():
    with pytest.raises(ValueError, match="needs a column 'ratio'; the table has step"):
        charts.step_ratio(pd.DataFrame({"step": ["a"]}), title="T")
    with pytest.raises(ValueError, match="nothing to draw"):
        charts.step_ratio(pd.DataFrame({"step": [], "ratio": []}), title="T")


def test_a_notebook_with_a_figure_goes_through_papermill_and_nbconvert(tmp_path):
    source = """import pandas as pd
from gcalib import charts
charts.enable()
charts.step_ratio(pd.DataFrame({"step": ["fp32", "bf16"], "ratio": [11.0, 22.0]}), title="Faster")"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nbformat.write(notebook, tmp_path / "in.ipynb")
    papermill.execute_notebook(
        tmp_path / "in.ipynb", tmp_path / "out.ipynb", kernel_name="python3", progress_bar=False, cwd=ROOT
    )
    executed = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    nbformat.validate(executed)
    (output,) = executed.cells[0].outputs
    assert set(output.data) == {"image/png", rendering.VEGALITE, "text/plain"}
    assert output.data["text/plain"] == "Figure: Faster"
    picture = base64.b64decode(output.data["image/png"])
    assert Image.open(io.BytesIO(picture)).width == 2 * output.metadata["image/png"]["width"]
    # what is stored can be drawn again
    assert alt.Chart.from_dict(output.data[rendering.VEGALITE]) is not None
    page, _ = HTMLExporter().from_notebook_node(executed)
    assert "data:image/png;base64," in page


def test_a_loss_a_gain_and_an_open_case_are_told_apart():
    table = pd.DataFrame({"case": list("xyz"), "domain": "A", "mean": [2.0, -2.0, 0.5]})
    table = table.assign(low=table["mean"] - 1, high=table["mean"] + 1)
    spec = charts.differences(table, metric="NDCG@10 (%)", title="T").to_dict()
    (rows,) = spec["datasets"].values()
    assert [row["decided"] for row in rows] == ["gain", "loss", "undecided"]


def test_a_curve_ends_where_the_first_run_of_its_case_does():
    runs = [("case", "m", "A", epoch, 1.0) for last in (20, 50) for epoch in range(last + 1)]
    table = pd.DataFrame(runs, columns=["case", "model", "domain", "epoch", "cos"])
    spec = charts.trajectories(table, y="cos", y_title="cos", title="T").to_dict()
    (rows,) = spec["datasets"].values()
    assert max(row["epoch"] for row in rows) == 20 and len(rows) <= 30


def test_dots_draw_the_slope_within_cells_where_asked_and_nowhere_else():
    table = pd.DataFrame(
        {"model": list("mmmmnn"), "pair": list("ppqqpp"), "cos": [0.1, 0.3, 0.6, 0.8, 0.1, 0.2],
         "ndcg": [1.0, 2, 0, 1, 1, 5]}
    )  # fmt: skip
    named = {"x_title": "cos", "y_title": "NDCG", "title": "T", "colour": "pair", "shape": "pair"}
    chart = charts.dots(table, x="cos", y="ndcg", panel="model", cells=["pair"], lined=["m"], **named)
    (rows,) = chart.to_dict()["datasets"].values()
    ends = pd.DataFrame([row for row in rows if row["drawn"] == "line"])
    assert ends["model"].tolist() == list("mmmmn")  # in n a line of one point, which is none
    # rising by 5 within both, whatever lies between them
    assert ends.loc[ends["model"] == "m", "ndcg"].tolist() == pytest.approx([1, 2, 0, 1])
    (rows,) = charts.dots(table, x="cos", y="ndcg", **named).to_dict()["datasets"].values()
    assert {row["drawn"] for row in rows} == {"dot"}
