"""What the figures share: tables checked, panels laid out, titles set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd


def check(frame: pd.DataFrame, *columns: str) -> None:
    """Refuse a table that is empty or lacks a column that the figure draws (ValueError)."""
    missing = [name for name in columns if name not in frame]
    if missing:
        raise ValueError(
            f"The figure needs a column {missing[0]!r}; the table has {', '.join(map(str, frame.columns))}."
        )
    if not len(frame):
        raise ValueError("The table is empty: there is nothing to draw.")


def base_of(frame: pd.DataFrame, **size: Any) -> alt.Chart:
    """A chart of a table, whatever its index."""
    return alt.Chart(frame.reset_index(drop=True)).properties(**size)


def log_axis(channel: type[Any], values: pd.Series, title: str, ticks: Sequence[float] = ()) -> Any:
    """Logarithmic axis of a column; unless told, ticks at 1, 10, 100, .. or, within two decades, at 1, 2, 5, 10, .."""
    low, high = np.log10(values.min()), np.log10(values.max())
    steps = (1,) if high - low > 2 else (1, 2, 5)
    every = [step * 10.0**power for power in range(int(np.floor(low)), int(np.ceil(high)) + 1) for step in steps]
    shown = list(ticks) or [value for value in every if values.min() <= value <= values.max()]
    # 1k and 1M, but 0.1 instead of SI's 100m, which beside a unit of ms would be misread
    label = "datum.value < 1 ? format(datum.value, '~g') : format(datum.value, '.3~s')"
    axis = alt.Axis(values=shown, labelExpr=label, grid=False)
    return channel(f"{values.name}:Q", title=title, scale=alt.Scale(type="log", nice=False), axis=axis)


def facet(chart: Any, column: str, names: Iterable[Any], columns: int = 0) -> alt.FacetChart:
    """Panels in the order of `names`."""
    panels = list(names)
    facet = alt.Facet(f"{column}:N", title=None, sort=panels)
    # wide enough apart that the last label of an axis does not touch the first of the next
    faceted: alt.FacetChart = chart.facet(facet, columns=columns or len(panels), spacing=32)
    return faceted


def titled(chart: Any, title: str, subtitle: str) -> Any:
    """The chart under its title, and a subtitle if there is one."""
    return chart.properties(title=alt.TitleParams(title, subtitle=subtitle) if subtitle else alt.TitleParams(title))
