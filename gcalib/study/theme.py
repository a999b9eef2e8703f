"""The look that all figures share, and how they get into a notebook file.

A notebook calls `enable()` once. From then on a chart shown as a cell's result is stored as a PNG, which GitHub, an
exported page and an offline reader can all see, beside its Vega-Lite form for pages that can draw that.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from typing import Any

import altair as alt
import pandas as pd
import vl_convert
from PIL import Image

MAX_PNG = 60_000  # bytes
WANTED_PNG = 25_000  # bytes: a notebook under 300 KB holds several figures, each in two forms
MAX_ROWS = 1_000  # of a table behind a figure; one of more is to be aggregated before it is drawn
SIGNIFICANT = 5  # digits of the numbers stored with a figure
PALETTE = 128  # colours of a PNG: enough for the blurred edges of letters and lines
# Okabe and Ito (2008), told apart with any kind of colour vision; without their yellow, which fades on white
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
INK, GREY, GRID = "#222222", "#666666", "#e6e6e6"
PAPER = "#8a8a8a"  # what the paper reports
BAND = "#f2e9d0"  # a range that somebody published
LEVELS = {  # measures of alignment, as figures call them
    "cos_mean_abs": "measured",
    "null_mean_abs": "null: random directions",
    "null_perm_mean_abs": "null: X′ of another user",
    "null_reinitialised_mean_abs": "null: module re-initialised",
    "null_initial_mean_abs": "module with its initial weights",
    "gated_cos_mean_abs": "after the gate",
}
FIXED = dict(zip(["ABXI", "LLM4CDSR", "CDSRNP", "SASRec, mixed", "SASRec, one domain"], COLOURS, strict=False))
FIXED |= {"baseline": COLOURS[0], "early": COLOURS[1], "stack": COLOURS[2], "paper": PAPER, "ours": COLOURS[0]}
FIXED |= dict(zip(LEVELS.values(), [COLOURS[place] for place in (0, 6, 1, 3, 2, 5)], strict=True))
# With "+json", so that nbformat takes the figure for JSON. Altair 6.3's own renderer leaves the "+" out, and a notebook
# file with such an output is invalid: papermill stops at it.
VEGALITE = "application/vnd.vegalite.v6+json"


def enable() -> None:
    """Give every chart of this session the look of the package, store it as PNG and Vega-Lite, show tables uncut."""
    pd.set_option("display.max_colwidth", None)
    alt.theme.enable("gcalib")
    alt.renderers.enable("gcalib")
    alt.data_transformers.enable("default", max_rows=MAX_ROWS)


def colours(names: Iterable[str]) -> alt.Scale:
    """Colours of some series in their order: a model, or a level, has one colour in all figures."""
    shown = list(names)
    return alt.Scale(domain=shown, range=[FIXED[name] for name in shown] if set(shown) <= set(FIXED) else COLOURS)


@alt.theme.register("gcalib", enable=False)
def _theme() -> alt.theme.ThemeConfig:
    text = {"labelFontSize": 12, "titleFontSize": 13, "labelColor": INK, "titleColor": INK, "titleFontWeight": "normal"}
    config: dict[str, Any] = {
        # The first font is the one that the PNG writer brings along: the same picture on every machine.
        "font": "Liberation Sans, Arial, Helvetica, sans-serif",
        "background": "#ffffff",  # not transparent, or the axes vanish on a dark page
        "padding": 12,
        "view": {"continuousWidth": 560, "continuousHeight": 260, "stroke": None},
        "title": {"anchor": "start", "color": INK, "fontSize": 16, "offset": 14, "subtitleColor": GREY,
                  "subtitleFontSize": 13, "subtitlePadding": 5},
        "axis": {**text, "titlePadding": 8, "labelFlush": False, "labelLimit": 300, "gridColor": GRID,
                 "domainColor": GREY, "tickColor": GREY},
        "legend": {**text, "labelLimit": 300, "symbolStrokeWidth": 2.5, "symbolSize": 120},
        "header": {**text, "labelFontSize": 13, "labelFontWeight": "bold"},
        "range": {"category": COLOURS, "heatmap": {"scheme": "viridis"}},
        "line": {"strokeWidth": 2},
        "point": {"filled": True, "size": 60, "opacity": 1},
        "bar": {"color": COLOURS[0]},
        "text": {"color": INK, "fontSize": 12},
        "mark": {"tooltip": True},
    }  # fmt: skip
    return {"config": config}  # type: ignore[typeddict-item]


def png(spec: dict[str, Any]) -> tuple[bytes, int, int]:
    """Draw a Vega-Lite chart as a palette PNG of at most `MAX_PNG` bytes.

    It is returned with the width and height to show it at, in pixels of the page. The picture itself has twice as many
    a side, for sharp displays, or fewer where it would be larger than `WANTED_PNG` otherwise.
    """
    for scale in (2.0, 1.5, 1.0):
        drawn = Image.open(io.BytesIO(vl_convert.vegalite_to_png(spec, scale=scale))).convert("RGB")
        # "maximum coverage" keeps rare colours, such as that of a few dots, which others give up for shades of white
        coded = drawn.quantize(PALETTE, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        file = io.BytesIO()
        coded.save(file, "PNG", optimize=True)
        if file.tell() <= (MAX_PNG if scale == 1.0 else WANTED_PNG):
            return file.getvalue(), int(drawn.width // scale), int(drawn.height // scale)
    raise ValueError(f"The figure takes {file.tell()} bytes as a PNG, more than {MAX_PNG}: draw fewer marks.")


def compact(spec: dict[str, Any]) -> dict[str, Any]:
    """The same chart with its tables as CSV and numbers to `SIGNIFICANT` digits.

    Notebook files put every field of every row on a line of its own, far indented; CSV is several times smaller.
    """
    text, texts = json.dumps({**spec, "datasets": {}}), {}
    for name, rows in spec.get("datasets", {}).items():
        table = pd.DataFrame(rows)
        # a column of gaps as well, which else would be one of empty texts, drawn at 0
        parse = dict.fromkeys([*table.select_dtypes("number"), *table.columns[table.isna().all()]], "number")
        reference = {"name": name, "format": {"type": "csv", "parse": parse}}
        text = text.replace(json.dumps({"name": name}), json.dumps(reference))
        texts[name] = table.to_csv(index=False, float_format=f"%.{SIGNIFICANT}g", lineterminator="\n")
    return {**json.loads(text), "datasets": texts}


def _render(spec: dict[str, Any], **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a notebook stores of a chart: its parts by media type, and the size to show the PNG at."""
    small = compact(spec)
    picture, width, height = png(small)
    title = spec.get("title", "untitled")
    text = title.get("text", "untitled") if isinstance(title, dict) else title
    bundle = {"image/png": picture, VEGALITE: small, "text/plain": f"Figure: {text}"}
    return bundle, {"image/png": {"width": width, "height": height}}


alt.renderers.register("gcalib", _render)
