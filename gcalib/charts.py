"""One function a figure: a table in, a chart out. Call `enable()` once in a notebook to see them.

Each function says in its docstring which columns it reads; a table may have more. Domains appear under the names that
the table gives them. Every figure can be given its own `title` and `subtitle`, and says what its axes measure.
"""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import numpy as np
import pandas as pd

from gcalib.comparisons import (
    against_nulls,
    differences,
    metric_with_intervals,
    trajectories,
)
from gcalib.dots import by_width, dots
from gcalib.marks import base_of, check, facet, log_axis, titled
from gcalib.rendering import COLOURS, GREY, GRID, enable

__all__ = [
    "against_nulls", "attention_map", "by_width", "cosine_and_ndcg", "cost", "differences", "dots", "enable",
    "gate_histogram", "lengths", "lines", "metric_with_intervals", "popularity", "step_ratio",
    "tie_share", "timeline", "trajectories", "visibility",
]  # fmt: skip
POINTS = 60  # of a curve: what a panel can show
_LINES = {
    "cos_mean_abs": ("measured", COLOURS[0], [1, 0]),
    "null_mean_abs": ("null: random directions", COLOURS[6], [2, 3]),
    "null_perm_mean_abs": ("null: X′ of another user", COLOURS[1], [8, 4]),
    "null_init_mean_abs": ("the module's own start", COLOURS[2], [8, 3, 2, 3]),
}


def cosine_and_ndcg(
    curves: pd.DataFrame,
    *,
    domains: Sequence[str] = ("A", "B"),
    point: int = 0,
    split: str = "val",
    title: str = "How X′ stands to X, and how well the model ranks, epoch by epoch",
    subtitle: str = "",
) -> alt.VConcatChart:
    """|cos(X, X′)| over the epochs against its nulls, and NDCG@10 (full ranking) below, a column a domain.

    Parameters
    ----------
    curves
        One row an epoch, as of `gcalib.load_curves`: `epoch`, `<split>.<a|b>.gca<point>.<measure>` and
        `<split>.<a|b>.full.ndcg@10`. The level of the module set back to its start is drawn if
        there is a column `...null_init_mean_abs`. Of several runs, the mean of those that reached an epoch.
    domains
        Names of domains A and B.
    """
    cosines, ndcg = [], []
    for letter, domain in zip("ab", domains, strict=True):
        prefix = f"{split}.{letter}.gca{point}"
        check(curves, "epoch", *(f"{prefix}.{measure}" for measure in list(_LINES)[:3]))
        for measure, (line, _, _) in _LINES.items():
            if f"{prefix}.{measure}" in curves:
                cosines.append(_curve(curves, f"{prefix}.{measure}").assign(domain=domain, line=line))
        ndcg.append(_curve(curves, f"{split}.{letter}.full.ndcg@10").assign(domain=domain))
    names, colours, dashes = (list(part) for part in zip(*_LINES.values(), strict=True))
    shown = [name for name in names if any((part["line"] == name).any() for part in cosines)]
    scale = alt.Scale(domain=shown, range=colours[: len(shown)])
    dash = alt.Scale(domain=shown, range=dashes[: len(shown)])
    legend = alt.Legend(title=None, orient="top", columns=2, symbolSize=400)
    x = alt.X("epoch:Q", title="epoch (0 = untrained)", axis=alt.Axis(tickMinStep=1, tickCount=6, grid=False))
    top = base_of(pd.concat(cosines), width=300, height=190).mark_line().encode(
        x, alt.Y("value:Q", title="mean |cos(X, X′)|"),
        alt.Color("line:N", scale=scale, legend=legend), alt.StrokeDash("line:N", scale=dash, legend=legend),
    )  # fmt: skip
    bottom = base_of(pd.concat(ndcg), width=300, height=150).mark_line(color=COLOURS[3]).encode(
        x, alt.Y("value:Q", title="NDCG@10, full ranking")
    )  # fmt: skip
    panels = [facet(panel, "domain", domains) for panel in (top, bottom)]
    return titled(alt.vconcat(*panels), title, subtitle)


def lengths(
    frame: pd.DataFrame, *, title: str = "Most users have few events in a domain", subtitle: str = ""
) -> alt.FacetChart:
    """How many events users have in each domain, a panel a pair.

    Parameters
    ----------
    frame
        One row a user and domain: `pair`, `domain`, `length` (events).
    """
    check(frame, "pair", "domain", "length")
    width = int(np.ceil(frame["length"].max() / POINTS))
    bins = np.arange(0, frame["length"].max() + 2 * width, width)  # one empty bin at the end lets the line come down
    parts = []
    for (pair, domain), part in frame.groupby(["pair", "domain"], sort=False):
        share = 100 * np.bincount(part["length"] // width, minlength=len(bins)) / len(part)
        parts.append(pd.DataFrame({"pair": pair, "domain": domain, "length": bins, "share": share}))
    x = "events of a user in the domain" + (f" (bins of {width})" if width > 1 else "")
    chart = base_of(pd.concat(parts), width=250, height=200).mark_line(interpolate="step-after").encode(
        alt.X("length:Q", title=x, axis=alt.Axis(tickMinStep=1, grid=False)), alt.Y("share:Q", title="users (%)"),
        alt.Color("domain:N", title="domain", sort=list(frame["domain"].unique())),
    )  # fmt: skip
    return titled(facet(chart, "pair", frame["pair"].unique(), columns=2), title, subtitle)


def popularity(
    frame: pd.DataFrame, *, title: str = "A few items draw most interactions", subtitle: str = ""
) -> alt.FacetChart:
    """Interactions of an item against its rank by popularity, both axes logarithmic, a panel a pair.

    Parameters
    ----------
    frame
        One row an item: `pair`, `domain`, `interactions` (at least 1).
    """
    check(frame, "pair", "domain", "interactions")
    parts = []
    for (pair, domain), part in frame.groupby(["pair", "domain"], sort=False):
        counts = part["interactions"].sort_values(ascending=False).to_numpy()
        ranks = np.unique(np.geomspace(1, len(counts), POINTS).astype(int))
        shown = {"rank": ranks, "interactions": counts[ranks - 1]}
        parts.append(pd.DataFrame({"pair": pair, "domain": domain, **shown}))
    table = pd.concat(parts)
    chart = base_of(table, width=250, height=200).mark_line().encode(
        log_axis(alt.X, table["rank"], "item, ranked by popularity"),
        log_axis(alt.Y, table["interactions"], "interactions of the item"),
        alt.Color("domain:N", title="domain", sort=list(frame["domain"].unique())),
    )  # fmt: skip
    return titled(facet(chart, "pair", frame["pair"].unique(), columns=2), title, subtitle)


def tie_share(
    frame: pd.DataFrame, *, title: str = "Time stamps of a day leave many events tied", subtitle: str = ""
) -> alt.LayerChart:
    """Shares of tied events as bars, grouped by pair.

    Parameters
    ----------
    frame
        One row a bar: `pair`, `what` is tied (such as "neighbouring events", "last event"), `share` (0 to 1).
    """
    check(frame, "pair", "what", "share")
    base = base_of(frame.assign(share=100 * frame["share"]), height=alt.Step(22)).encode(
        alt.X("share:Q", title="sharing their day (%)", axis=alt.Axis(grid=False, tickCount=6)),
        alt.Y("pair:N", title=None, sort=None, scale=alt.Scale(paddingInner=0.3)),
        alt.YOffset("what:N", sort=None),
    )  # fmt: skip
    bars = base.mark_bar().encode(
        alt.Color("what:N", title=None, sort=None, legend=alt.Legend(orient="top", symbolType="square"))
    )
    return titled(bars + base.mark_text(align="left", dx=4).encode(alt.Text("share:Q", format=".1f")), title, subtitle)


def gate_histogram(frame: pd.DataFrame, *, title: str = "How far the gate opens", subtitle: str = "") -> alt.FacetChart:
    """Distribution of the gate's values over positions and features, a panel a domain.

    Parameters
    ----------
    frame
        One row a value, or many values a row: `domain`, `gate` (within 0..1 or -1..1; a number, or an array of them).
    """
    check(frame, "domain", "gate")
    parts = []
    for domain, values in frame.groupby("domain", sort=False)["gate"]:
        gates = np.concatenate([np.ravel(value) for value in values])
        counts, edges = np.histogram(gates, bins=40, range=(-1.0 if gates.min() < 0 else 0.0, 1.0))
        share = 100 * counts / len(gates)
        parts.append(pd.DataFrame({"from": edges[:-1], "to": edges[1:], "share": share, "domain": domain}))
    chart = base_of(pd.concat(parts), width=270, height=180).mark_bar().encode(
        alt.X("from:Q", bin="binned", title="value of the gate (0 = closed)", axis=alt.Axis(tickCount=5, format="~g")),
        alt.X2("to:Q"),
        alt.Y("share:Q", title="positions × features (%)"),
    )  # fmt: skip
    return titled(facet(chart, "domain", frame["domain"].unique()), title, subtitle)


def attention_map(
    frame: pd.DataFrame, *, title: str = "Where each query looks", subtitle: str = ""
) -> alt.FacetChart | alt.Chart:
    """Attention weights as a heat map of query against key positions, a panel a head if there is a column `head`.

    Parameters
    ----------
    frame
        One row a cell: `query` and `key` (positions counted from the oldest, or names), `weight` (each query's sum to
        1; leave out pairs that may not attend, and they stay white).
    """
    check(frame, "query", "key", "weight")
    heads = "head" in frame
    side = 210 if heads else 320
    table = frame.assign(head="head " + frame["head"].astype(str)) if heads else frame
    chart = base_of(table, width=side, height=side).mark_rect().encode(
        alt.X("key:O", title="key position (other domain)", sort=None, axis=_places(frame["key"], side)),
        alt.Y("query:O", title="query position", sort=None, axis=_places(frame["query"], side)),
        alt.Color("weight:Q", title="weight", scale=alt.Scale(domainMin=0)),
    )  # fmt: skip
    return titled(facet(chart, "head", table["head"].unique(), columns=2) if heads else chart, title, subtitle)


def cost(
    frame: pd.DataFrame, *, x: str, y: str, x_title: str, y_title: str, title: str, subtitle: str = ""
) -> alt.LayerChart:
    """What each part costs against a size, both axes logarithmic: a power law is a straight line.

    Parameters
    ----------
    frame
        One row a measurement: `part`, and the columns named by `x` (such as a length or a width) and `y` (such as
        milliseconds or floating-point operations), both above 0.
    x_title, y_title
        What they are, with units.
    """
    check(frame, "part", x, y)
    sizes = sorted(frame[x].unique().tolist())
    base = base_of(frame).encode(
        log_axis(alt.X, frame[x], x_title, sizes if len(sizes) <= 10 else ()), log_axis(alt.Y, frame[y], y_title),
        alt.Color("part:N", title=None, sort=None),
    )  # fmt: skip
    return titled(base.mark_line() + base.mark_point(opacity=1), title, subtitle)


def step_ratio(
    frame: pd.DataFrame, *, title: str, subtitle: str = "", x_title: str = "times faster than the comparator"
) -> alt.LayerChart:
    """Speed ratios as bars, with the line of no gain at 1.

    Parameters
    ----------
    frame
        One row a bar: `step` (what was timed), `ratio` (comparator's time over ours).
    """
    check(frame, "step", "ratio")
    base = base_of(frame, height=alt.Step(34)).encode(
        alt.X("ratio:Q", title=x_title, axis=alt.Axis(grid=False, tickCount=6)), alt.Y("step:N", title=None, sort=None)
    )
    texts = base.mark_text(align="left", dx=5).encode(alt.Text("ratio:Q", format=".1f"))
    one = alt.Chart(pd.DataFrame({"one": [1]})).mark_rule(color=COLOURS[1], strokeDash=[4, 3]).encode(alt.X("one:Q"))
    return titled(base.mark_bar() + texts + one, title, subtitle)


def timeline(frame: pd.DataFrame, *, title: str, subtitle: str = "") -> alt.Chart:
    """Events of some users by time, a line for each user and domain; a dot grows with the events of its day.

    Parameters
    ----------
    frame
        One row an event: `user` (a label), `domain`, `time` (seconds since 1970).
    """
    check(frame, "user", "domain", "time")
    days = frame.assign(day=frame["time"] // 86_400).groupby(["user", "domain", "day"], sort=False).size()
    table = days.rename("events").reset_index()
    domains, counts = list(frame["domain"].unique()), sorted({1, int(table["events"].max())})
    axis = alt.Axis(format="d", tickMinStep=1, tickCount=6, grid=False)
    drawn = base_of(table, height=alt.Step(15)).transform_calculate(year="1970 + datum.day / 365.2425")
    chart = drawn.mark_point(opacity=1).encode(
        alt.X("year:Q", title="year", scale=alt.Scale(zero=False), axis=axis),
        alt.Y("user:N", title=None, sort=None, scale=alt.Scale(paddingInner=0.35)),
        alt.YOffset("domain:N", sort=domains),
        alt.Color("domain:N", title=None, sort=domains, legend=alt.Legend(orient="top")),
        alt.Size("events:Q", title="events on the day", scale=alt.Scale(range=[25, 180]),
                 legend=alt.Legend(orient="top", values=counts, symbolFillColor=GREY, symbolStrokeWidth=0)),
    )  # fmt: skip
    return titled(chart, title, subtitle)


def visibility(frame: pd.DataFrame, *, x_title: str, y_title: str, title: str, subtitle: str = "") -> alt.Chart:
    """What each query may see: a square for each pair of query and key.

    Parameters
    ----------
    frame
        One row a square: `query` and `key` (positions, or names in order of appearance), `visible` (bool).
    x_title, y_title
        What keys and queries are.
    """
    check(frame, "query", "key", "visible")
    table = frame.assign(state=np.where(frame["visible"], "visible", "hidden"))
    colours = alt.Scale(domain=["visible", "hidden"], range=[COLOURS[0], GRID])
    chart = base_of(table, width=alt.Step(24), height=alt.Step(24)).mark_rect(stroke="white").encode(
        alt.X("key:O", title=x_title, sort=None, axis=alt.Axis(labelAngle=0)),
        alt.Y("query:O", title=y_title, sort=None),
        alt.Color("state:N", title=None, scale=colours, legend=alt.Legend(symbolType="square")),
    )  # fmt: skip
    return titled(chart, title, subtitle)


def lines(
    frame: pd.DataFrame, *, x: str, y: str, x_title: str, y_title: str, title: str, subtitle: str = ""
) -> alt.Chart:
    """One line for each part, both axes linear; `cost` is the same on logarithmic axes.

    Parameters
    ----------
    frame
        One row a point: `part`, and the columns named by `x` and `y`.
    x_title, y_title
        What they are, with units.
    """
    check(frame, "part", x, y)
    chart = base_of(frame).mark_line().encode(
        alt.X(f"{x}:Q", title=x_title, axis=alt.Axis(grid=False)),
        alt.Y(f"{y}:Q", title=y_title), alt.Color("part:N", title=None, sort=None),
    )  # fmt: skip
    return titled(chart, title, subtitle)


def _curve(curves: pd.DataFrame, column: str) -> pd.DataFrame:
    """Mean of a column over the runs at each epoch, thinned to `POINTS` epochs; a constant needs only its ends."""
    check(curves, column)
    mean = curves.groupby("epoch")[column].mean().dropna()
    if not len(mean):
        raise ValueError(f"The column {column!r} holds no number: were these runs without that cross-attention?")
    count = min(len(mean), 2 if mean.nunique() == 1 else POINTS)
    kept = np.unique(np.linspace(0, len(mean) - 1, count).round().astype(int))
    return mean.iloc[kept].rename("value").reset_index()


def _places(values: pd.Series, side: int) -> alt.Axis:
    """Axis of a heat map: as many labels as fit; names lie aslant."""
    names = values.drop_duplicates().sort_values().tolist()
    if not pd.api.types.is_numeric_dtype(values):
        return alt.Axis(labelAngle=-40, labelLimit=160)
    step = int(np.ceil(20 * len(names) / side))
    return alt.Axis(labelAngle=0, values=names[step - 1 :: step])
