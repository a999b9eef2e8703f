"""Every figure is drawn once, small enough to commit, and stored in a form that notebooks and the site can show."""

from __future__ import annotations

import io

import altair as alt
import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from gcalib.study import charts, tables, theme

rng = np.random.default_rng(0)
MEANS = pd.DataFrame(
    {
        "case": list("wxyz") * 2,
        "domain": ["A"] * 4 + ["B"] * 4,
        "n": [5, 5, 5, 3] * 2,
        "mean": [2.0, -2.0, 0.5, 2.0] * 2,
    }
).assign(low=lambda t: t["mean"] - 1, high=lambda t: t["mean"] + 1, each=[(1.0, 2.0, 3.0)] * 8)
DOTS = pd.DataFrame(
    {
        "model": list("mmmmnn"),
        "pair": list("ppqqpp"),
        "cos": [0.1, 0.3, 0.6, 0.8, 0.1, 0.2],
        "ndcg": [1.0, 2, 0, 1, 1, 5],
    }
)
BY_SIZE = pd.DataFrame(
    {"case": "ABXI · food-kitchen", "domain": ["A", "A", "B"], "arm": ["baseline", "early", "baseline"]}
    | {"params_total": [9e6, 11e6, 9e6], "n": [4, 3, 4], "mean": [0.15, 0.17, 0.11]}
).assign(low=lambda t: t["mean"] - 0.01, high=lambda t: t["mean"] + 0.01)
FIGURE3 = tables.published("figure3")
NAMED = {"x": "cos", "y": "ndcg", "x_title": "cos", "y_title": "NDCG", "title": "T", "colour": "pair", "shape": "pair"}


def curves(epochs: int = 200) -> pd.DataFrame:
    """Curves of one run, falling cosines and rising NDCG."""
    columns: dict[str, object] = {"epoch": np.arange(epochs + 1)}
    for letter in "ab":
        columns[f"val.{letter}.gca0.cos_mean_abs"] = 0.05 + 0.3 * np.exp(-np.arange(epochs + 1) / 30)
        columns[f"val.{letter}.gca0.null_mean_abs"] = 0.05
        columns[f"val.{letter}.full.ndcg@10"] = 0.08 * (1 - np.exp(-np.arange(epochs + 1) / 20))
    return pd.DataFrame(columns)


def everyone() -> dict[str, alt.TopLevelMixin]:
    nulls = pd.DataFrame([(c, d, 0.2 + s / 50) for c in "xy" for d in "AB" for s in range(3)])
    nulls = nulls.set_axis(["case", "domain", "cos_mean_abs"], axis=1).assign(null_mean_abs=0.1, gated_cos_mean_abs=0.3)
    long = pd.DataFrame(
        [(m, p, d, e, e + s) for m in "mn" for p in "pq" for d in "AB" for e in range(60) for s in (0, 1)]
    )
    sizes = pd.DataFrame([(v, d, w, n * w, w / 1e3) for v, n in (("a", 1), ("b", 2)) for d in "AB" for w in (16, 32)])
    heat = pd.DataFrame([(f"head {h}", q, k, 1 / q) for h in (1, 2) for q in range(1, 20) for k in range(1, q + 1)])
    events = {
        "user": np.repeat(["u", "v"], 40),
        "domain": np.tile(["f", "k"], 40),
        "time": 10**9 + np.arange(80) * 10**6,
    }
    axes = {"x_title": "x", "y_title": "y", "title": "T"}
    return {
        "lines": charts.lines(
            long.set_axis(["model", "case", "domain", "epoch", "cos"], axis=1), x="epoch", y="cos", colour="model",
            line="case", panel="domain", **axes,
        ),
        "lines by size": charts.lines(
            sizes.set_axis(["part", "domain", "width", "size", "ndcg"], axis=1), x="size", y="ndcg", log="xy",
            label="width", panel="domain", own_axes=True, **axes,
        ),
        "cosine_and_ndcg": charts.cosine_and_ndcg(curves(), title="T", subtitle="one run"),
        "forest_plot": charts.forest_plot(MEANS, x_title="NDCG@10 (%)", title="T"),
        "forest_plot of nothing": charts.forest_plot(MEANS[:0], x_title="x", title="T"),
        "lines of nothing": charts.lines(DOTS[:0], x="cos", y="ndcg", **axes),
        "by_size": charts.by_size(BY_SIZE, FIGURE3, title="T"),
        "by_size of nothing": charts.by_size(BY_SIZE[:0], FIGURE3, title="T"),
        "levels": charts.forest_plot(MEANS.drop(columns="each"), x_title="x", title="T", differences=False),
        "against_nulls": charts.against_nulls(nulls, title="T", band=(0.1, 0.2)),
        "scatter": charts.scatter(DOTS, panel="model", cells=["pair"], **NAMED),
        "heat_map": charts.heat_map(
            heat.set_axis(["head", "q", "k", "w"], axis=1), x="k", y="q", value="w", panel="head", **axes
        ),
        "timeline": charts.timeline(pd.DataFrame(events), title="T"),
    }  # fmt: skip


EVERYONE = everyone()


def rows_of(chart: alt.TopLevelMixin) -> pd.DataFrame:
    (rows,) = chart.to_dict()["datasets"].values()
    return pd.DataFrame(rows)


@pytest.mark.parametrize("name", EVERYONE)
def test_figure_is_stored_small_and_in_both_forms(name):
    with alt.theme.enable("gcalib"):
        bundle, metadata = theme._render(EVERYONE[name].to_dict())
    assert set(bundle) == {"image/png", theme.VEGALITE, "text/plain"} and bundle["text/plain"] == "Figure: T"
    assert len(bundle["image/png"]) <= theme.MAX_PNG
    picture = Image.open(io.BytesIO(bundle["image/png"])).convert("RGB")
    assert picture.width >= metadata["image/png"]["width"]
    assert picture.getpixel((0, 0)) == (255, 255, 255) and np.asarray(picture).std() > 3
    output = nbformat.v4.new_output("display_data", data={theme.VEGALITE: bundle[theme.VEGALITE]})
    nbformat.validate(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(outputs=[output])]))


def test_an_interval_of_few_runs_is_not_drawn_but_they_are():
    rows = rows_of(charts.forest_plot(MEANS, x_title="x", title="T"))
    few = rows[rows["case"] == "z"]
    assert sorted(few["run"]) == [1, 1, 2, 2, 3, 3] and (few["low"] == few["high"]).all()
    others = rows[rows["case"] != "z"]
    assert (others["run"] == others["mean"]).all()  # under the dot, where a tick is not shown
    assert (others["high"] - others["low"] == 2).all()
    assert rows.drop_duplicates("case")["says"].tolist() == ["above 0", "below 0", "open", "too few runs"]


def test_a_line_ends_where_the_first_of_its_runs_does_and_is_thinned():
    runs = [("m", epoch, epoch + last) for last in (200, 500) for epoch in range(last + 1)]
    table = pd.DataFrame(runs, columns=["part", "epoch", "cos"])
    rows = rows_of(charts.lines(table, x="epoch", y="cos", x_title="x", y_title="y", title="T"))
    assert rows["epoch"].agg(["min", "max", "size"]).tolist() == [0, 200, charts.POINTS]
    assert (rows["cos"] == rows["epoch"] + 350).all()


def test_scatter_draws_the_slope_that_cells_share():
    rows = rows_of(charts.scatter(DOTS, panel="model", cells=["pair"], **NAMED)).query("drawn == 'line'")
    assert rows["model"].tolist() == list("mmmmn")  # in n, of one cell, a line of one point, which is none
    assert rows["ndcg"].tolist()[:4] == pytest.approx([1, 2, 0, 1])  # rising by 5 within both cells
    assert set(rows_of(charts.scatter(DOTS, **NAMED))["drawn"]) == {"dot"}


def test_a_model_has_one_colour_in_every_figure():
    first, second = (theme.colours(names).to_dict() for names in (["CDSRNP", "ABXI"], ["ABXI", "LLM4CDSR", "CDSRNP"]))
    shared = [dict(zip(scale["domain"], scale["range"], strict=True)) for scale in (first, second)]
    assert shared[0].items() <= shared[1].items() and len(set(shared[1].values())) == 3


def test_csv_keeps_numbers_gaps_and_awkward_names():
    table = pd.DataFrame({"name": ['a "b", c', "d\ne"], "x": [0.123456789, np.nan], "gap": [np.nan, np.nan]})
    small = theme.compact(alt.Chart(table).mark_point().encode(x="x", y="name", color="gap:Q").to_dict())
    (text,) = small["datasets"].values()
    assert small["data"]["format"] == {"type": "csv", "parse": {"x": "number", "gap": "number"}}
    back = pd.read_csv(io.StringIO(text))
    assert back["name"].tolist() == table["name"].tolist()
    assert back["x"][0] == pytest.approx(0.123456789, rel=1e-4) and back["x"].isna().tolist() == [False, True]


def test_a_figure_too_detailed_is_drawn_smaller_and_then_refused(monkeypatch):
    spec = EVERYONE["forest_plot"].to_dict()
    large, *size = theme.png(spec)
    monkeypatch.setattr(theme, "WANTED_PNG", len(large) - 1)
    small, *same = theme.png(spec)
    assert len(small) < len(large) and same == pytest.approx(size, abs=1)
    monkeypatch.setattr(theme, "WANTED_PNG", 1000)
    monkeypatch.setattr(theme, "MAX_PNG", 1000)
    with pytest.raises(ValueError, match="more than 1000: draw fewer marks"):
        theme.png(spec)


def test_by_size_shows_the_papers_points_and_intervals_of_four_runs_only():
    rows = rows_of(charts.by_size(BY_SIZE, FIGURE3, title="T"))
    ours, theirs = (rows[rows["of"] == name] for name in ("ours", "paper"))
    assert (ours["high"] - ours["low"]).tolist() == pytest.approx([0.02, 0, 0.02])
    assert ours["millions"].tolist() == [9, 11, 9]
    same = FIGURE3[(FIGURE3["model"] == "ABXI") & (FIGURE3["pair"] == "food-kitchen")]
    assert theirs["ndcg"].tolist() == same["ndcg10"].tolist() and set(theirs["panel"]) == set(ours["panel"])


def test_a_missing_column_and_an_empty_table_are_named():
    with pytest.raises(ValueError, match="needs time; the table has model, pair, cos, ndcg"):
        charts.heat_map(DOTS, x="cos", y="time", value="ndcg", panel="model", x_title="x", y_title="y", title="T")
    with pytest.raises(ValueError, match="needs a row"):
        charts.heat_map(DOTS[:0], x="cos", y="pair", value="ndcg", panel="model", x_title="x", y_title="y", title="T")
