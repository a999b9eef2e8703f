"""Figures that set runs beside each other: variants, models, pairs, sizes. Notebooks reach them as `gcalib.charts`."""

from __future__ import annotations

from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from gcalib.marks import base_of, check, facet, titled
from gcalib.rendering import COLOURS, GREY, INK

BAND = "#f2e9d0"  # a level that somebody published
EPOCHS = 30  # of a curve among many
NULLS = {
    "null_mean_abs": ("null: random directions", COLOURS[6]),
    "null_perm_mean_abs": ("null: X′ of another user", COLOURS[1]),
    "null_fresh_mean_abs": ("null: module drawn anew", COLOURS[3]),
    "null_init_mean_abs": ("the module's own start", COLOURS[2]),
}
GATED = "after the gate, by mean lengths"


def _bounded(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame, where a mean without bounds has a bar of no length, which its dot hides.

    Bars filtered by what is there would be a second source of data, of which Vega-Lite warns on the reader's console.
    """
    return frame.assign(low=frame["low"].fillna(frame["mean"]), high=frame["high"].fillna(frame["mean"]))


def metric_with_intervals(
    frame: pd.DataFrame,
    *,
    metric: str,
    title: str,
    subtitle: str = "",
    variant: str = "variant",
    columns: int = 0,
    runs: pd.DataFrame | None = None,
) -> alt.FacetChart:
    """Means as dots with their intervals, a row a variant, a panel a domain with an axis of its own.

    Parameters
    ----------
    frame
        As of `gcalib.stats.mean_interval` by variant and domain: the column named by `variant`, `domain`, `mean`,
        `low`, `high`; where the bounds are nan, the dot stands alone.
    metric
        What the numbers are, for the axis, such as "NDCG@10, full ranking".
    columns
        Panels side by side; by default all.
    runs
        The single runs behind the means, as small ticks: the column named by `variant`, `domain`, `value`.
    """
    check(frame, variant, "domain", "mean", "low", "high")
    axis: dict[str, Any] = {"title": metric, "scale": alt.Scale(zero=False), "axis": alt.Axis(tickCount=5)}
    table = _bounded(frame)
    if runs is not None:
        check(runs, variant, "domain", "value")
        # One source of data: a run's row draws its mean again, without a bar, and the row of a mean has no tick.
        means = frame[[variant, "domain", "mean"]]
        single = runs[[variant, "domain", "value"]].merge(means, how="left", on=[variant, "domain"])
        if (lost := single["mean"].isna()).any():
            raise ValueError(f"runs of {sorted(set(single.loc[lost, variant]))} have no mean in frame.")
        table = pd.concat([table, single.assign(low=single["mean"], high=single["mean"])])
    base = base_of(table, width=270, height=alt.Step(30)).encode(alt.Y(f"{variant}:N", title=None, sort=None))
    bars = base.mark_rule(strokeWidth=2.5, color=GREY)
    dots = base.mark_point(color=COLOURS[0], opacity=1, size=80).encode(alt.X("mean:Q", **axis))
    ticks = base.mark_tick(color=INK, thickness=1.5, size=14, opacity=1).encode(alt.X("value:Q", **axis))
    spans = bars.encode(alt.X("low:Q", **axis), alt.X2("high:Q"))
    panels = spans + dots if runs is None else spans + ticks + dots
    faceted = facet(panels, "domain", frame["domain"].unique(), columns)
    return titled(faceted.resolve_scale(x="independent"), title, subtitle)


def differences(
    frame: pd.DataFrame,
    *,
    metric: str,
    title: str,
    subtitle: str = "",
    row: str = "case",
    panel: str = "domain",
    columns: int = 0,
    own_axes: bool = False,
    words: tuple[str, str] = ("gain", "loss"),
) -> alt.FacetChart:
    """Mean differences with their intervals about the line of no difference, a row a case, in panels.

    Parameters
    ----------
    frame
        As of `gcalib.stats.paired_difference`: the columns named by `row` and `panel`, `mean`, `low`, `high`; without
        bounds, the dot stands alone and decides nothing.
    metric
        What the numbers are, for the axis, with the unit.
    columns
        Panels side by side; by default all.
    own_axes
        Whether each panel has rows and a scale of its own; all are as high as the one of most rows.
    words
        What an interval says that lies right of zero, and left of it.
    """
    check(frame, row, panel, "mean", "low", "high")
    said = [*words, "undecided"]
    table = frame.assign(decided=np.select([frame["low"] > 0, frame["high"] < 0], words, said[2]))
    axis: dict[str, Any] = {"title": metric, "axis": alt.Axis(tickCount=5)}
    shown = alt.Scale(domain=said, range=[COLOURS[0], COLOURS[1], "#999999"])
    colour = alt.Color("decided:N", title="the interval says", scale=shown, legend=alt.Legend(orient="top"))
    rows = int(frame.groupby(panel)[row].nunique().max())
    drawn = base_of(_bounded(table), width=270, height=24 * rows if own_axes else alt.Step(24))
    base = drawn.encode(alt.Y(f"{row}:N", title=None, sort=None))
    bars = base.mark_rule(strokeWidth=2.5)
    dots = base.mark_point(opacity=1, size=70).encode(alt.X("mean:Q", **axis), colour)
    zero = drawn.mark_rule(color=GREY, strokeDash=[4, 3]).encode(alt.X(datum=0, title=metric))
    panels = zero + bars.encode(alt.X("low:Q", **axis), alt.X2("high:Q"), colour) + dots
    faceted = facet(panels, panel, frame[panel].unique(), columns)
    shared: alt.FacetChart = faceted.resolve_scale(x="independent", y="independent") if own_axes else faceted
    return titled(shared, title, subtitle)


def against_nulls(
    frame: pd.DataFrame, *, title: str, subtitle: str = "", row: str = "case", level: tuple[float, float] | None = None
) -> alt.FacetChart:
    """Mean |cos(X, X′)| of each case as a dot, its nulls and its module's own start as ticks, a panel a domain.

    Parameters
    ----------
    frame
        One row a run: the column named by `row`, `domain`, `cos_mean_abs` and levels to compare it with
        (`null_mean_abs`, `null_perm_mean_abs`, `null_init_mean_abs`, and where some runs have it
        `null_fresh_mean_abs`); runs of a case are averaged, and each is a faint dot. With `cos_gated` of
        `gcalib.effects.alignment`, its mean is a diamond.
    level
        A published range to shade.
    """
    needed = [name for name in NULLS if name != "null_fresh_mean_abs"]
    check(frame, row, "domain", "cos_mean_abs", *needed)
    levels = {name: NULLS[name] for name in NULLS if name in needed or (name in frame and frame[name].notna().any())}
    rows = frame[row].unique().tolist()
    measured = frame[[row, "domain", "cos_mean_abs"]].rename(columns={"cos_mean_abs": "value"}).assign(what="measured")
    nulls = frame.groupby([row, "domain"], sort=False)[list(levels)].mean().reset_index()
    ticks = nulls.melt([row, "domain"], var_name="what").dropna()
    ticks = ticks.replace({"what": {name: said for name, (said, _) in levels.items()}})
    means = measured.groupby([row, "domain", "what"], sort=False)["value"].mean().reset_index()
    drawn_as = [measured.assign(kind="run"), means.assign(kind="mean"), ticks.assign(kind="null")]
    colours = {"measured": COLOURS[0], **dict(levels.values())}
    if "cos_gated" in frame and frame["cos_gated"].notna().any():
        after = frame.groupby([row, "domain"], sort=False)["cos_gated"].mean().rename("value").dropna().reset_index()
        drawn_as.append(after.assign(what=GATED, kind="gated"))
        colours[GATED] = COLOURS[5]
    table = pd.concat(drawn_as)
    scale = alt.Scale(domain=list(colours), range=list(colours.values()))
    measure = "mean |cos(X, X′)|"
    x = alt.X("value:Q", title=measure, scale=alt.Scale(zero=True), axis=alt.Axis(tickCount=5))
    drawn = base_of(table, width=270, height=alt.Step(24))  # one table: altair facets no chart of several
    base = drawn.encode(
        x, alt.Y(f"{row}:N", title=None, sort=rows),
        alt.Color("what:N", title=None, scale=scale, legend=alt.Legend(orient="top", columns=2)),
    )  # fmt: skip
    layers = [
        base.transform_filter("datum.kind == 'null'").mark_tick(thickness=3, size=16, opacity=0.9),
        base.transform_filter("datum.kind == 'run'").mark_point(opacity=0.35, size=25),
        base.transform_filter("datum.kind == 'mean'").mark_point(opacity=1, size=90),
        base.transform_filter("datum.kind == 'gated'").mark_point(shape="diamond", opacity=1, size=60),
    ]
    if level:
        bounds = alt.X(datum=level[0], title=measure), alt.X2(datum=level[1])
        layers.insert(0, drawn.mark_rect(color=BAND).encode(*bounds))
    return titled(facet(alt.layer(*layers), "domain", frame["domain"].unique()), title, subtitle)


def trajectories(
    curves: pd.DataFrame,
    *,
    y: str,
    y_title: str,
    title: str,
    subtitle: str = "",
    colour: str = "model",
    columns: int = 0,
) -> alt.FacetChart:
    """A measure over training, a line a case (its runs averaged), a panel a domain.

    Parameters
    ----------
    curves
        One row an epoch and run: `case`, the column named by `colour`, `domain`, `epoch`, and the column named by `y`.
        Drawn as far as every run of a case trained, thinned to `EPOCHS` epochs or, in several rows, two thirds of it.
    y_title
        What it is, with its unit.
    columns
        Panels side by side; by default all.
    """
    check(curves, "case", colour, "domain", "epoch", y)
    # panels in several rows are many: each is smaller and takes less of a notebook's file
    points, scale = (2 * EPOCHS // 3, 1.5) if columns else (EPOCHS, 2)
    parts = []
    for (case, name, domain), part in curves.groupby(["case", colour, "domain"], sort=False):
        table = part.pivot_table(index="epoch", values=y, aggfunc=["mean", "count"])
        mean = table["mean"][y][table["count"][y] == table["count"][y].max()]
        kept = np.unique(np.linspace(0, len(mean) - 1, min(points, len(mean))).round().astype(int))
        parts.append(mean.iloc[kept].rename("value").reset_index().assign(case=case, name=name, domain=domain))
    size = {"width": 210, "height": 120} if columns else {"width": 270, "height": 210}
    chart = base_of(pd.concat(parts), **size).mark_line(strokeWidth=1.6, opacity=0.85).encode(
        alt.X("epoch:Q", title="epoch (0 = untrained)", axis=alt.Axis(tickMinStep=1, tickCount=6, grid=False)),
        alt.Y("value:Q", title=y_title, axis=alt.Axis(tickCount=5)),
        alt.Color("name:N", title=None, sort=None, legend=alt.Legend(orient="top")), alt.Detail("case:N"),
    )  # fmt: skip
    panels = facet(chart, "domain", curves["domain"].unique(), columns)
    return titled(panels.properties(usermeta={"scale": scale}), title, subtitle)
