"""Figures of dots: a run by two of its figures, a mean by its model's size. Notebooks reach them as `gcalib.charts`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from gcalib.marks import base_of, check, facet, log_axis, titled
from gcalib.rendering import GREY


def dots(
    frame: pd.DataFrame,
    *,
    x: str,
    y: str,
    x_title: str,
    y_title: str,
    title: str,
    subtitle: str = "",
    colour: str = "model",
    shape: str = "domain",
    panel: str = "",
    columns: int = 0,
    cells: Sequence[str] = (),
    lined: Sequence[str] = (),
) -> alt.LayerChart | alt.FacetChart:
    """A dot a row, told apart by colour and shape; no line but where one is asked for.

    Parameters
    ----------
    frame
        One row a dot: the columns named by `x`, `y`, `colour`, `shape`, and `panel` and `cells` if given. Panels share
        the axis of x.
    x_title, y_title
        What they are, with units.
    panel, columns
        Column that names a panel, and how many stand side by side; by default one panel, or all.
    cells, lined
        In the panels named by `lined`, each cell has a line through its mean; their slope is one, that of least squares
        within cells (`gcalib.relations.correlations`).
    """
    check(frame, x, y, colour, shape, *([panel] if panel else []), *cells)
    shown = list(dict.fromkeys([x, y, colour, shape, *([panel] if panel else [])]))
    parts = [frame[shown].assign(drawn="dot", cell="")]
    for name in lined:
        part = frame[frame[panel] == name]
        inside = part[[x, y]] - part.groupby(list(cells))[[x, y]].transform("mean")
        slope = float((inside[x] * inside[y]).sum() / (inside[x] ** 2).sum())
        for cell, some in part.groupby(list(cells)):
            ends = some[x].agg(["min", "max"]).to_numpy()
            line = {x: ends, y: some[y].mean() + slope * (ends - some[x].mean()), "drawn": "line", "cell": str(cell)}
            shared = {key: some[key].iloc[0] for key in (colour, shape, panel)}
            parts.append(pd.DataFrame({**shared, **line}))
    if lined:  # a line of one point, which is not seen: Vega-Lite warns of a layer that is empty in a panel
        others = frame[~frame[panel].isin(lined)].drop_duplicates(panel)
        parts.append(others[shown].assign(drawn="line", cell=""))
    room = 0.05 * np.ptp(frame[x])  # one span for all, but an axis for each: panels of several rows do not align
    span = alt.Scale(domain=[frame[x].min() - room, frame[x].max() + room], nice=False)
    hues, shapes = frame[colour].unique().tolist(), frame[shape].unique().tolist()
    symbols = alt.Scale(domain=shapes, range=["circle", "square", "triangle-up", "diamond", "cross"])
    grey = alt.Legend(orient="top", columns=4, symbolFillColor=GREY, symbolStrokeWidth=0)
    size = {"width": 215, "height": 170} if panel else {"width": 460, "height": 260}
    base = base_of(pd.concat(parts), **size).encode(
        alt.X(f"{x}:Q", title=x_title, scale=span, axis=alt.Axis(tickCount=5, grid=False)),
        alt.Y(f"{y}:Q", title=y_title, scale=alt.Scale(zero=False, padding=6), axis=alt.Axis(tickCount=5)),
        alt.Color(f"{colour}:N", title=None, sort=hues, legend=alt.Legend(orient="top", columns=4)),
    )  # fmt: skip
    # lines and dots in one table, as altair facets no chart of several
    through = base.transform_filter("datum.drawn == 'line'").mark_line(strokeWidth=1.5, opacity=0.8).encode(
        alt.Detail("cell:N")
    )  # fmt: skip
    points = base.transform_filter("datum.drawn == 'dot'").mark_point(opacity=0.8, size=55).encode(
        alt.Shape(f"{shape}:N", title=None, scale=symbols, legend=grey)
    )  # fmt: skip
    layers = alt.layer(through, points) if lined else alt.layer(points)
    if not panel:
        return titled(layers, title, subtitle)
    faceted = facet(layers, panel, frame[panel].unique(), columns).resolve_scale(x="independent", y="independent")
    return titled(faceted, title, subtitle)


def by_width(
    frame: pd.DataFrame, *, x: str, x_title: str, metric: str, title: str, subtitle: str = ""
) -> alt.FacetChart:
    """Quality against a size on a logarithmic axis, each dot with its width, a line a variant, a panel a domain.

    Parameters
    ----------
    frame
        One row a mean: `variant` (two at most), `domain`, `dim` (the width), the column named by `x` (above 0), `mean`,
        `low`, `high`; where the bounds are nan, the dot stands alone.
    x_title, metric
        What the axes are, with units.
    """
    check(frame, "variant", "domain", "dim", x, "mean", "low", "high")
    # room about the outer dots, so that none lies on an axis
    least, most = frame[x].min() / 1.25, frame[x].max() * 1.25
    steps = (1, 2, 5) if most > 20 * least else (1, 1.5, 2, 3, 5, 7)
    every = [step * 10.0**power for power in range(int(np.log10(least)), int(np.log10(most)) + 1) for step in steps]
    ticks = [value for value in every if least <= value <= most]
    table = frame.assign(low=frame["low"].fillna(frame["mean"]), high=frame["high"].fillna(frame["mean"]))
    of_panel = table.groupby("domain")
    floor, top = of_panel["low"].transform("min"), of_panel["high"].transform("max")
    table = table.assign(floor=floor - (top - floor) / 10, top=top + (top - floor) / 10)
    # not "nice": a label at the upper end would push the panel's header up
    y: dict[str, Any] = {"title": metric, "scale": alt.Scale(zero=False, nice=False), "axis": alt.Axis(tickCount=5)}
    base = base_of(table, width=270, height=230).encode(
        log_axis(alt.X, frame[x], x_title, ticks).scale(type="log", nice=False, domain=[least, most]),
        alt.Color("variant:N", title=None, sort=None, legend=alt.Legend(orient="top", symbolOpacity=1)),
    )
    layers = [
        base.mark_rule(opacity=0).encode(alt.Y("floor:Q", **y), alt.Y2("top:Q")),
        base.mark_rule(strokeWidth=1.5, opacity=0.6).encode(alt.Y("low:Q", **y), alt.Y2("high:Q")),
        base.mark_line(point=alt.OverlayMarkDef(opacity=1, size=50)).encode(alt.Y("mean:Q", **y)),
    ]
    # above the higher line and below the lower one, away from the other's dots
    by_height = frame.groupby("variant")["mean"].mean().sort_values(ascending=False).index
    for name, dx, dy in zip(by_height, (-8, 10), (-11, 15), strict=False):
        text = base.transform_filter(alt.datum.variant == name).mark_text(dx=dx, dy=dy)
        layers.append(text.encode(alt.Y("mean:Q", **y), alt.Text("dim:Q")))
    panels = facet(alt.layer(*layers), "domain", frame["domain"].unique())
    return titled(panels.resolve_scale(y="independent"), title, subtitle)
