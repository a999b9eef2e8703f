"""One function a kind of figure: a table in, a chart out. A notebook calls `gcalib.study.theme.enable()` first.

Each function names the columns that it reads; a table may have more. `panel` is a column with a panel for each of its
values, in order of appearance, `columns` of them side by side. Titles state what was found; axes have units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from gcalib.study.theme import BAND, COLOURS, GREY, INK, LEVELS, PAPER, colours

FEWEST = 4  # runs of an interval that is drawn; of fewer, the runs are
POINTS, ROWS = 60, 300  # of a line, what a panel can show; of all lines of a figure
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross"]


def _base(frame: pd.DataFrame, *columns: str, **size: Any) -> alt.Chart:
    """A chart of some columns of a table, which are all that is stored."""
    shown = list(dict.fromkeys(name for name in columns if name))
    if not len(frame) or not set(shown) <= set(frame):
        missing = ", ".join(name for name in shown if name not in frame)
        raise ValueError(f"The figure needs {missing or 'a row'}; the table has {', '.join(map(str, frame))}.")
    return alt.Chart(frame[shown].reset_index(drop=True)).properties(**size)


def _axis(channel: type[Any], column: str, title: str, **scale: Any) -> Any:
    axis = alt.Axis(grid=channel is alt.Y, tickCount=5)
    return channel(f"{column}:Q", title=title, scale=alt.Scale(**scale), axis=axis)


def _log_axis(channel: type[Any], values: pd.Series, title: str) -> Any:
    """Logarithmic axis of a column, with ticks at 1, 10, 100, .. or, within two decades, at 1, 2, 5, 10, .."""
    low, high = values.min(), values.max()
    every = np.outer(10.0 ** np.arange(-9, 13), (1,) if high > 100 * low else (1, 2, 5)).ravel()
    # 1k and 1M, but 0.1 instead of SI's 100m, which beside a unit of ms would be misread
    label = "datum.value < 1 ? format(datum.value, '~g') : format(datum.value, '.3~s')"
    axis = alt.Axis(values=every[(every >= low) & (every <= high)].tolist(), labelExpr=label, grid=False)
    scale = alt.Scale(type="log", nice=False, padding=12)
    return channel(f"{values.name}:Q", title=title, scale=scale, axis=axis)


def _colour(frame: pd.DataFrame, column: str) -> alt.Color:
    names = frame[column].unique()
    legend = alt.Legend(title=None, orient="top", columns=2 if max(map(len, names)) > 20 else 3)  # of a phone's width
    return alt.Color(f"{column}:N", scale=colours(names), legend=legend)


def _finish(chart: Any, frame: pd.DataFrame, panel: str, columns: int, title: str, subtitle: str, own: str = "") -> Any:
    """The chart in its panels, with axes of their own for the channels in `own`, under its title."""
    if panel:
        names = frame[panel].unique().tolist()
        # wide enough apart that the last label of an axis does not touch the first of the next
        chart = chart.facet(alt.Facet(f"{panel}:N", title=None, sort=names), columns=columns or len(names), spacing=32)
        chart = chart.resolve_scale(**dict.fromkeys(own, "independent"))
    return chart.properties(title=alt.TitleParams(title, subtitle=subtitle or alt.Undefined)) if title else chart


def _nothing(title: str, subtitle: str) -> Any:
    """A figure without data, so that a notebook can be executed while its runs are awaited."""
    text = alt.Chart(pd.DataFrame({"text": ["no runs yet"]})).mark_text().encode(alt.Text("text:N"))
    return _finish(text, pd.DataFrame(), "", 0, title, subtitle)


def lines(
    frame: pd.DataFrame, *, x: str, y: str, x_title: str, y_title: str, title: str, subtitle: str = "",
    colour: str = "part", line: str = "", panel: str = "", columns: int = 0, log: str = "", label: str = "",
    own_axes: bool = False,
) -> Any:  # fmt: skip
    """Lines of y over x, the mean where several rows (runs) share an x, drawn as far as all runs of a line go.

    Parameters
    ----------
    frame
        One row a point: the columns named by `x`, `y`, `colour`, and by `line` (what a line is besides), `panel` and
        `label` (written at the points, such as a width) if given.
    log
        Axes that are logarithmic: "x", "y" or "xy".
    """
    if not len(frame):
        return _nothing(title, subtitle)
    keys, parts = list(dict.fromkeys(name for name in (colour, line, panel) if name)), []
    drawn = frame.dropna(subset=[y]).groupby(keys, sort=False)
    count = min(POINTS, ROWS // max(drawn.ngroups, 1))
    for key, part in drawn:
        means = part.groupby([x, label] if label else x)[y].agg(["mean", "size"])
        means = means.loc[means["size"] == means["size"].max(), "mean"].rename(y).reset_index()
        places = np.geomspace(1, len(means), count) - 1 if "x" in log else np.linspace(0, len(means) - 1, count)
        parts.append(means.iloc[np.unique(places.round().astype(int))].assign(**dict(zip(keys, key, strict=True))))
    table = pd.concat(parts or [frame])
    size = {"width": 210 if columns > 2 else 270, "height": 140 if columns > 2 else 210} if panel else {}
    base = _base(table, x, y, *keys, label, **size).encode(
        _log_axis(alt.X, table[x], x_title) if "x" in log else _axis(alt.X, x, x_title),
        _log_axis(alt.Y, table[y], y_title) if "y" in log else _axis(alt.Y, y, y_title, zero=not label),
        _colour(frame, colour), alt.Detail(f"{line or colour}:N"),
    )  # fmt: skip
    chart: Any = base.mark_line(point=max(map(len, parts), default=0) < 15)
    higher = table.groupby(colour)[y].mean().idxmax()  # labelled above its line, and the others below
    for name in table[colour].unique() if label else ():
        text = base.mark_text(dx=-8, dy=-11) if name == higher else base.mark_text(dx=10, dy=15)
        chart += text.encode(alt.Text(f"{label}:N")).transform_filter(alt.datum[colour] == name)
    return _finish(chart, frame, panel, columns, title, subtitle, "xy" if own_axes else "")


def cosine_and_ndcg(curves: pd.DataFrame, *, title: str, subtitle: str = "") -> Any:
    """Mean |cos(X, X′)| at point 0 over the epochs beside its nulls, and NDCG@10 below, a column a domain.

    `curves` has one row an epoch and run, as of `gcalib.load_curves`; figures are those of the validation users.
    """
    parts = []
    for letter in "ab":
        named = {f"val.{letter}.gca0.{name}": text for name, text in LEVELS.items() if "gated" not in name}
        named[f"val.{letter}.full.ndcg@10"] = "NDCG@10"
        there = curves[["epoch", *(name for name in named if name in curves)]].rename(columns=named)
        parts.append(there.melt("epoch", var_name="line").assign(domain=letter.upper()))
    table = pd.concat(parts)
    ndcg = table["line"] == "NDCG@10"
    shared: dict[str, Any] = {"x": "epoch", "y": "value", "x_title": "epoch (0 = untrained)", "title": ""}
    panels = [
        lines(table[rows], y_title=text, colour="line", panel="domain", **shared)
        for rows, text in ((~ndcg, "mean |cos(X, X′)|"), (ndcg, "NDCG@10, full ranking"))
    ]
    return _finish(alt.vconcat(*panels).resolve_scale(color="independent"), table, "", 0, title, subtitle)


def forest_plot(
    frame: pd.DataFrame, *, x_title: str, title: str, subtitle: str = "", row: str = "case", panel: str = "domain",
    columns: int = 0, own_axes: bool = False, differences: bool = True,
) -> Any:  # fmt: skip
    """Means with their intervals, a line a row of the table; of fewer than `FEWEST` runs, the runs as ticks.

    Parameters
    ----------
    frame
        As of `gcalib.study.statistics`: the columns named by `row` and `panel`, `n`, `mean`, `low`, `high`, and `each`
        for the runs; `paper`, a published figure, is drawn as a grey diamond.
    own_axes
        Whether each panel has rows and a scale of its own.
    differences
        Whether there is a line at zero, and colours that say on which side of it an interval lies.
    """
    if not len(frame):
        return _nothing(title, subtitle)
    drawn = (frame["n"] >= FEWEST) & frame["low"].notna()
    names = {"above 0": COLOURS[0], "below 0": COLOURS[1], "open": "#999999", "too few runs": "#bbbbbb"}
    says = np.select([~drawn, frame["low"] > 0, frame["high"] < 0], ["too few runs", "above 0", "below 0"], "open")
    each = frame["each"] if "each" in frame else frame["mean"]
    table = frame.assign(
        **{side: frame[side].where(drawn, frame["mean"]) for side in ("low", "high")},  # a bar that the dot hides
        says=says, run=each.where(~drawn, frame["mean"]),  # a field without any value has no scale
    ).explode("run").astype({"run": float})  # fmt: skip
    table["run"] = table["run"].fillna(table["mean"])
    high = 24 * int(frame.groupby(panel)[row].nunique().max()) if own_axes else alt.Step(24)
    table["paper"] = frame["paper"].reindex(table.index) if "paper" in frame else np.nan
    plain = _base(table, row, panel, "mean", "low", "high", "says", "run", "paper", width=270, height=high)
    ticks = alt.Axis(tickCount=5, labelFlush=True, labelOverlap=True)  # so that none touches those of the next panel
    axis: dict[str, Any] = {"title": x_title, "scale": alt.Scale(zero=differences), "axis": ticks}
    scale = alt.Scale(domain=[*names], range=[*names.values()])
    legend = alt.Legend(title="the interval is", orient="top")
    hue = alt.Color("says:N", scale=scale, legend=legend) if differences else alt.value(COLOURS[0])
    base = plain.encode(alt.Y(f"{row}:N", title=None, sort=None))
    shown = alt.condition("datum.says == 'too few runs'", alt.value(1), alt.value(0))
    layers = [
        base.mark_rule(strokeWidth=2.5).encode(alt.X("low:Q", **axis), alt.X2("high:Q"), color=hue),
        base.mark_tick(color=INK, thickness=1.5, size=14).encode(alt.X("run:Q", **axis), opacity=shown),
        base.mark_point(size=70).encode(alt.X("mean:Q", **axis), color=hue),
    ]
    if table["paper"].notna().any():
        mark = base.mark_point(size=90, shape="diamond", color=PAPER, filled=False, strokeWidth=2)
        layers.append(mark.encode(alt.X("paper:Q", **axis)))
    if differences:
        layers.insert(0, plain.mark_rule(color=GREY, strokeDash=[4, 3]).encode(alt.X(datum=0, title=x_title)))
    own = "xy" if own_axes else "" if differences else "x"
    return _finish(alt.layer(*layers), frame, panel, columns, title, subtitle, own)


def by_size(frame: pd.DataFrame, paper: pd.DataFrame, *, title: str, subtitle: str = "", columns: int = 2) -> Any:
    """NDCG@10 against parameters, a panel for each `case` and domain, with the paper's points in grey.

    `frame` is of `gcalib.study.tables.sizes`, `paper` of `tables.published("figure3")`. Intervals are drawn from
    `FEWEST` runs on.
    """
    if not len(frame):
        return _nothing(title, subtitle)
    drawn = frame["n"] >= FEWEST
    ours = pd.DataFrame({
        "panel": frame["case"] + " · " + frame["domain"], "arm": frame["arm"], "of": "ours", "ndcg": frame["mean"],
        "millions": frame["params_total"] / 1e6,
        "low": frame["low"].where(drawn, frame["mean"]), "high": frame["high"].where(drawn, frame["mean"]),
    })  # fmt: skip
    panels = paper["model"] + " · " + paper["pair"] + " · " + paper["domain"]
    theirs = paper.assign(panel=panels, of="paper", ndcg=paper["ndcg10"], millions=paper["params_millions"])
    theirs = theirs[theirs["panel"].isin(ours["panel"])]
    table = pd.concat([ours, theirs.assign(low=theirs["ndcg"], high=theirs["ndcg"])])
    base = _base(table, "panel", "arm", "of", "ndcg", "millions", "low", "high", width=270, height=190).encode(
        _axis(alt.X, "millions", "parameters, embeddings included (millions)", zero=False, padding=8),
        _axis(alt.Y, "ndcg", "NDCG@10", zero=False),
    )  # fmt: skip
    grey, mine = (base.transform_filter(f"datum.of == '{name}'") for name in ("paper", "ours"))
    hue = _colour(ours, "arm")
    form = alt.Shape("arm:N", scale=alt.Scale(domain=hue["scale"]["domain"], range=SHAPES), legend=hue["legend"])
    layers = [
        grey.mark_line(color=PAPER, strokeDash=[4, 3]).encode(alt.Detail("arm:N")),
        grey.mark_point(fill="white", stroke=PAPER, strokeWidth=2).encode(form),
        mine.mark_line().encode(hue),
        mine.mark_rule(strokeWidth=2).encode(hue, alt.Y("low:Q", title="NDCG@10"), alt.Y2("high:Q")),
        mine.mark_point(size=70).encode(hue, form),
    ]
    return _finish(alt.layer(*layers), table, "panel", columns, title, subtitle, "xy")


def against_nulls(frame: pd.DataFrame, *, title: str, subtitle: str = "", band: Sequence[float] = ()) -> Any:
    """Mean |cos(X, X′)| of each case as a dot, with its runs, and the levels to compare it with, a panel a domain.

    `frame` has one row a run: `case`, `domain`, `cos_mean_abs` and those of `theme.LEVELS` that were measured. `band`
    is a published range to shade.
    """
    there = [name for name in LEVELS if name in frame and frame[name].notna().any()]
    means = frame.groupby(["case", "domain"], sort=False)[there].mean().reset_index().melt(["case", "domain"])
    runs = frame[["case", "domain", "cos_mean_abs"]].melt(["case", "domain"]).assign(kind="run")
    table = pd.concat([means.dropna(), runs])
    kind = table["variable"].map({"cos_mean_abs": "mean", "gated_cos_mean_abs": "gated"}).fillna("null")
    table = table.assign(kind=table["kind"].fillna(kind), what=table["variable"].map(LEVELS))
    drawn = _base(table, "case", "domain", "value", "what", "kind", width=270, height=alt.Step(24))
    base = drawn.encode(
        _axis(alt.X, "value", "mean |cos(X, X′)|"), alt.Y("case:N", title=None, sort=frame["case"].unique().tolist()),
        _colour(table, "what"),
    )  # fmt: skip
    of = {kind: base.transform_filter(f"datum.kind == '{kind}'") for kind in ("null", "run", "mean", "gated")}
    layers = [
        of["null"].mark_tick(thickness=3, size=16), of["run"].mark_point(opacity=0.35, size=25),
        of["mean"].mark_point(size=90), of["gated"].mark_point(shape="diamond"),
    ]  # fmt: skip
    if band:
        layers.insert(0, drawn.mark_rect(color=BAND).encode(alt.X(datum=band[0]), alt.X2(datum=band[1])))
    return _finish(alt.layer(*layers), frame, "domain", 1, title, subtitle)


def scatter(
    frame: pd.DataFrame, *, x: str, y: str, x_title: str, y_title: str, title: str, subtitle: str = "",
    colour: str = "model", shape: str = "domain", panel: str = "", columns: int = 0, cells: Sequence[str] = (),
) -> Any:  # fmt: skip
    """A dot a row, told apart by colour and shape.

    Parameters
    ----------
    frame
        One row a dot: the columns named by `x`, `y`, `colour`, `shape`, and `panel` and `cells` if given.
    cells
        What comparable runs share (`gcalib.study.statistics.correlations`). In a panel where two cells or more hold
        several dots, each of these has a line through its mean, of the slope that is least squares within cells.
    """
    parts = [frame.assign(drawn="dot", cell="")]
    for _, part in frame.groupby(panel, sort=False) if cells else ():
        some = part[part.groupby(list(cells))[x].transform("size") > 1]
        means = some.groupby(list(cells))[[x, y]].transform("mean")
        inside = some[[x, y]] - means
        slope = (inside[x] * inside[y]).sum() / max((inside[x] ** 2).sum(), 1e-300)
        lined = some.assign(
            **{y: means[y] + slope * inside[x]}, drawn="line", cell=some[list(cells)].astype(str).sum(axis=1)
        )
        # a line of one point is not seen; Vega-Lite warns of a layer that is empty in a panel
        parts.append(lined if lined["cell"].nunique() > 1 else part.iloc[:1].assign(drawn="line", cell=""))
    size = {"width": 215, "height": 170} if panel else {"width": 460, "height": 260}
    base = _base(pd.concat(parts), x, y, colour, shape, panel, "drawn", "cell", **size).encode(
        _axis(alt.X, x, x_title, zero=False, padding=6), _axis(alt.Y, y, y_title, zero=False, padding=6),
        _colour(frame, colour),
    )  # fmt: skip
    shapes = alt.Scale(domain=frame[shape].unique().tolist(), range=SHAPES)
    legend = alt.Legend(title=None, orient="top", columns=4, symbolFillColor=GREY, symbolStrokeWidth=0)
    dots = base.transform_filter("datum.drawn == 'dot'").mark_point(opacity=0.8, size=55)
    through = base.transform_filter("datum.drawn == 'line'").mark_line(strokeWidth=1.5).encode(alt.Detail("cell:N"))
    layers = [through] * bool(cells) + [dots.encode(alt.Shape(f"{shape}:N", scale=shapes, legend=legend))]
    return _finish(alt.layer(*layers), frame, panel, columns, title, subtitle, "xy")


def heat_map(
    frame: pd.DataFrame, *, x: str, y: str, value: str, panel: str, x_title: str, y_title: str, title: str,
    subtitle: str = "",
) -> Any:  # fmt: skip
    """Cells of x and y in order, coloured by their value; what is not in the table stays white."""
    shared: dict[str, Any] = {"axis": alt.Axis(labelAngle=0, labelOverlap=True), "sort": None}
    chart = _base(frame, x, y, value, panel, width=210, height=210).mark_rect().encode(
        alt.X(f"{x}:O", title=x_title, **shared), alt.Y(f"{y}:O", title=y_title, **shared),
        alt.Color(f"{value}:Q", scale=alt.Scale(domainMin=0)),
    )  # fmt: skip
    return _finish(chart, frame, panel, 2, title, subtitle)


def timeline(frame: pd.DataFrame, *, title: str, subtitle: str = "") -> Any:
    """Events of some users by time, a line for each user and domain; a dot grows with the events of its day.

    `frame` has one row an event: `user` (a label), `domain`, `time` (seconds since 1970).
    """
    days = frame.assign(year=1970 + frame["time"] // 86_400 / 365.2425)
    table = days.groupby(["user", "domain", "year"], sort=False).size().rename("events").reset_index()
    counts = sorted({1, int(table["events"].max())})
    legend = alt.Legend(title="events on the day", orient="top", values=counts, format="d", symbolFillColor=GREY)
    chart = _base(table, "user", "domain", "year", "events", height=alt.Step(15)).mark_point().encode(
        alt.X("year:Q", scale=alt.Scale(zero=False), axis=alt.Axis(format="d", tickMinStep=1, grid=False)),
        alt.Y("user:N", title=None, sort=None, scale=alt.Scale(paddingInner=0.35)),
        alt.YOffset("domain:N", sort=frame["domain"].unique().tolist()), _colour(frame, "domain"),
        alt.Size("events:Q", scale=alt.Scale(range=[25, 180]), legend=legend),
    )  # fmt: skip
    return _finish(chart, table, "", 0, title, subtitle)
