"""The look that all figures share, and how they get into a notebook file.

A notebook calls `enable()` once. From then on a chart shown as a cell's result is stored as a PNG, which GitHub, an
exported page and an offline reader can all see, beside its Vega-Lite form for pages that can draw that.
"""

from __future__ import annotations

import io
from typing import Any

import altair as alt
import pandas as pd
import vl_convert
from PIL import Image

MAX_PNG = 60_000  # bytes
MAX_ROWS = 1_000  # of a table behind a figure; one of more is to be aggregated before it is drawn
SIGNIFICANT = 5  # digits of the numbers stored with a figure
PALETTE = 128  # colours of a PNG: enough for the blurred edges of letters and lines
# Okabe and Ito (2008), told apart with any kind of colour vision; without their yellow, which fades on white
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
INK, GREY, GRID = "#222222", "#666666", "#e6e6e6"
# With "+json", so that nbformat takes the figure for JSON. Altair 6.3's own renderer leaves the "+" out, and a notebook
# file with such an output is invalid: papermill stops at it.
VEGALITE = "application/vnd.vegalite.v6+json"


def enable() -> None:
    """Give every chart of this session the look of the package, and store it as PNG and Vega-Lite."""
    alt.theme.enable("gcalib")
    alt.renderers.enable("gcalib")
    alt.data_transformers.enable("default", max_rows=MAX_ROWS)


@alt.theme.register("gcalib", enable=False)
def _theme() -> alt.theme.ThemeConfig:
    text = {"labelFontSize": 12, "titleFontSize": 13, "labelColor": INK, "titleColor": INK, "titleFontWeight": "normal"}
    config: dict[str, Any] = {
        # The first font is the one that the PNG writer brings along: the same picture on every machine.
        "font": "Liberation Sans, Arial, Helvetica, sans-serif",
        "background": "#ffffff",  # not transparent, or the axes vanish on a dark page
        "padding": 12,
        "view": {"continuousWidth": 560, "continuousHeight": 260, "stroke": None},
        "title": {
            "anchor": "start", "color": INK, "fontSize": 16, "offset": 14,
            "subtitleColor": GREY, "subtitleFontSize": 13, "subtitlePadding": 5,
        },
        "axis": {
            **text, "titlePadding": 8, "labelFlush": False, "gridColor": GRID, "domainColor": GREY, "tickColor": GREY,
        },
        "legend": {**text, "labelLimit": 300, "symbolStrokeWidth": 2.5, "symbolSize": 120},
        "header": {**text, "labelFontSize": 13, "labelFontWeight": "bold"},
        "range": {"category": COLOURS, "heatmap": {"scheme": "viridis"}},
        "line": {"strokeWidth": 2},
        "point": {"filled": True, "size": 60},
        "bar": {"color": COLOURS[0]},
        "text": {"color": INK, "fontSize": 12},
        "mark": {"tooltip": True},
    }  # fmt: skip
    return {"config": config}  # type: ignore[typeddict-item]


def png(spec: dict[str, Any]) -> tuple[bytes, int, int]:
    """Draw a Vega-Lite chart as a palette PNG of at most `MAX_PNG` bytes.

    Returns
    -------
    picture, width, height
        The size is that to show it at, in pixels of the page; the picture itself has twice as many a side, for sharp
        displays, or just as many where it would be too large a file otherwise. A chart may ask for less with
        `usermeta={"scale": ...}`, and for fewer colours than `PALETTE` with `usermeta={"palette": ...}`.

    Raises
    ------
    ValueError
        If the figure is too detailed for that.
    """
    asked = spec.get("usermeta", {})
    for scale in dict.fromkeys((float(asked.get("scale", 2)), 1.0)):
        drawn = Image.open(io.BytesIO(vl_convert.vegalite_to_png(spec, scale=scale))).convert("RGB")
        # "maximum coverage" keeps rare colours, such as that of a few dots, which others give up for shades of white
        colours = int(asked.get("palette", PALETTE))
        coded = drawn.quantize(colours, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        file = io.BytesIO()
        coded.save(file, "PNG", optimize=True)
        if file.tell() <= MAX_PNG:
            return file.getvalue(), int(drawn.width // scale), int(drawn.height // scale)
    raise ValueError(
        f"The figure takes {file.tell()} bytes as a PNG, more than {MAX_PNG}: draw fewer marks or a smaller figure."
    )


def compact(spec: dict[str, Any]) -> dict[str, Any]:
    """The same chart with its tables as CSV and numbers to `SIGNIFICANT` digits.

    Notebook files put every field of every row on a line of its own, far indented; CSV is several times smaller.
    """
    tables = spec.get("datasets", {})
    formats: dict[str, dict[str, Any]] = {}
    texts: dict[str, str] = {}
    for name, rows in tables.items():
        table = pd.DataFrame(rows)
        numeric = {column: "number" for column in table.select_dtypes("number")}
        yes_no = {column: "boolean" for column in table.select_dtypes("bool")}
        formats[name] = {"type": "csv", "parse": {**numeric, **yes_no}}
        texts[name] = table.to_csv(index=False, float_format=f"%.{SIGNIFICANT}g", lineterminator="\n")

    def read_as_csv(part: Any) -> Any:
        if isinstance(part, list):
            return [read_as_csv(one) for one in part]
        if not isinstance(part, dict):
            return part
        changed = {key: read_as_csv(value) for key, value in part.items() if key != "datasets"}
        if isinstance(part.get("data"), dict) and part["data"].get("name") in formats:
            changed["data"] = {**part["data"], "format": formats[part["data"]["name"]]}
        return changed

    return {**read_as_csv(spec), **({"datasets": texts} if tables else {})}


def _render(spec: dict[str, Any], **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a notebook stores of a chart: its parts by media type, and the size to show the PNG at."""
    small = compact(spec)
    picture, width, height = png(small)
    bundle = {"image/png": picture, VEGALITE: small, "text/plain": f"Figure: {_headline(spec)}"}
    return bundle, {"image/png": {"width": width, "height": height}}


def _headline(spec: dict[str, Any]) -> str:
    title = spec.get("title", "untitled")
    return str(title.get("text", "untitled")) if isinstance(title, dict) else str(title)


alt.renderers.register("gcalib", _render)
