"""Notebooks as web pages that ask no other host for anything: one self-contained HTML file each, and a front page.

Formulas become MathML, the style and the JavaScript that draws the charts are part of each page, and a chart's PNG
stands in its place until it is drawn. The front page says nothing of its own accord: it is made of the outputs of cells
with one of two tags.

    front-figure    its chart is the figure of the front page
    front           what it printed as Markdown, or else the title of its chart, is said there; each is one sentence
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import latex2mathml.converter
import nbformat
import vl_convert
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from gcalib.rendering import VEGALITE

log = logging.getLogger("gcalib")
STYLE = Path(__file__).with_name("site.css")
UNFINISHED = "This notebook has not been executed to its end yet: cells without outputs have not run."

# No address of another host is in what follows, except in links for a reader to click on.
_LEAD = """# What gated cross-attention does in cross-domain sequential recommendation, measured

A recent paper, [*Cross-attention Secretly Performs Orthogonal Alignment in Recommendation
Models*](https://arxiv.org/abs/2510.09435), says that cross-attention between a user's two shopping histories makes
updates $X'$ that come out nearly orthogonal to the rows $X$ they are added to, without being asked to, and that ranking
is the better for it. A small cosine says little by itself: it is read against *nulls*, the levels that it would have if
$X'$ had nothing to do with $X$. This is what came out here:"""

_DRAW = """
for (const figure of document.querySelectorAll("figure.chart")) {
  const drawn = document.createElement("div");
  const chart = JSON.parse(figure.querySelector("script").textContent);
  vegaEmbed(drawn, chart, {actions: false, renderer: "svg"}).then(() => figure.replaceChildren(drawn));
}
"""

# code, which stays as it is, or a formula between $$ and $$, or one between $ and $
_MATH = re.compile(
    r"(```.*?```|`[^`\n]*`)" r"|\$\$(.+?)\$\$" r"|(?<![\\\w$])\$([^\s$](?:[^$\n]*[^\s$])?)\$(?![\w$])", re.DOTALL
)
_PRIME = re.compile(r"<msup>(<mi>\w+</mi>)<mi>&#x02032;</mi></msup>")


@dataclass(frozen=True)
class Page:
    """A notebook that is, or is to be, a page: its file name without the ending, and what it holds."""

    name: str
    notebook: NotebookNode

    @classmethod
    def read(cls, path: Path) -> Page:
        """The page of a notebook file."""
        return cls(path.stem, nbformat.read(path, as_version=4))

    @property
    def title(self) -> str:
        """The first heading, or the name where there is none."""
        return self._find(r"^# +(.+)$") or self.name

    @property
    def note(self) -> str:
        """The first sentence of the line in italics below the heading: how long it takes to read."""
        return self._find(r"^\*([^*.]+\.)")

    @property
    def finished(self) -> bool:
        """Whether every code cell was executed."""
        return all(cell.execution_count for cell in self.notebook.cells if cell.cell_type == "code" and cell.source)

    def tagged(self, tag: str) -> list[dict[str, Any]]:
        """What the code cells with a tag put out: their outputs by media type."""
        cells = [c for c in self.notebook.cells if c.cell_type == "code" and tag in c.metadata.get("tags", [])]
        return [output.data for cell in cells for output in cell.outputs if "data" in output]

    def _find(self, pattern: str) -> str:
        texts = (cell.source for cell in self.notebook.cells if cell.cell_type == "markdown")
        found = (re.search(pattern, text, re.MULTILINE) for text in texts)
        return next((match.group(1).strip() for match in found if match), "")


def to_html(page: Page, pages: Sequence[Page] = ()) -> str:
    """One self-contained page.

    Parameters
    ----------
    page
        The notebook.
    pages
        All notebooks that have a page beside it, in order: those of the navigation, and those that links may lead to.
    """
    notebook = nbformat.from_dict(page.notebook)  # a copy
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _with_formulas(cell.source)
        for output in cell.get("outputs", []):
            if "data" in output:
                output.data = _shown(output.data, output.metadata.get("image/png", {}))
    # Not embed_images: it parses each tag of the Markdown by itself, which tears <math> and <details> to pieces.
    exporter = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)
    body: str = exporter.from_notebook_node(notebook)[0]
    body = re.sub(r"<table.*?</table>", r'<div class="wide">\g<0></div>', body, flags=re.DOTALL)
    names = {one.name for one in pages}
    link = functools.partial(_link, names=names)
    body = re.sub(r'<a\b([^>]*?)\bhref="([^"]*)"([^>]*)>(.*?)</a>', link, body, flags=re.DOTALL)
    notice = "" if page.finished else f'<p class="notice">{UNFINISHED}</p>'
    return frame(page.title, notice + body, pages, page.name)


def frame(title: str, body: str, pages: Sequence[Page] = (), current: str = "") -> str:
    """A page around `body`: style, navigation, the neighbours of the page called `current`, and the charts' script."""
    names = [page.name for page in pages]
    place = names.index(current) if current in names else None
    before, after = (pages[place - 1 : place], pages[place + 1 : place + 2]) if place is not None else ([], pages[:1])
    here = ' aria-current="page"'
    links = "".join(
        f'<a href="{escape(page.name)}.html" title="{escape(page.title)}"{here if page.name == current else ""}>'
        f"{_short(page.title)}</a>"
        for page in pages
    )
    feet = "".join(
        f'<a rel="{rel}" href="{escape(page.name)}.html">{text.format(escape(page.title))}</a>'
        for rel, text, near in (("prev", "← {}", before), ("next", "{} →", after))
        for page in near
    )
    home = f'<a class="home" href="index.html"{here if current == "index" else ""}>gcalib</a>' if pages else ""
    script = f"<script>{_drawing()}</script>" if 'class="chart"' in body else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,"><title>{escape(title)}</title>
<style>
{STYLE.read_text(encoding="utf-8")}</style></head>
<body><header>{home}<nav aria-label="Notebooks">{links}</nav></header>
<main>
{body}
</main>
<footer>{feet}</footer>
{script}
</body></html>
"""


def write_site(paths: Sequence[Path], out: Path) -> Path:
    """Write the page of each notebook, and `index.html`, from the outputs that the notebooks hold.

    Returns
    -------
    Path
        The front page.
    """
    pages = [Page.read(path) for path in paths]
    out.mkdir(parents=True, exist_ok=True)
    for page in pages:
        if not page.finished:
            log.info("%s has not been executed to its end; its page says so", page.name)
        (out / f"{page.name}.html").write_text(to_html(page, pages), encoding="utf-8")
    front = out / "index.html"
    front.write_text(to_html(_front(pages), pages), encoding="utf-8")
    return front


def _front(pages: Sequence[Page]) -> Page:
    """The front page, as a notebook that is made of the outputs of others."""
    said = [sentence for page in pages for data in page.tagged("front") for sentence in _sentences(data)]
    drawn = [data for page in pages for data in page.tagged("front-figure") if VEGALITE in data][:1]
    sources = [f"[{p.title}]({p.name}.ipynb)" for p in pages if p.tagged("front") or p.tagged("front-figure")]
    shelf = [f"- [{p.title}]({p.name}.ipynb) {p.note if p.finished else 'Not executed yet.'}" for p in pages]
    cells = [new_markdown_cell(_LEAD), new_markdown_cell("\n".join(f"- {sentence}" for sentence in said))]
    for data in drawn:
        outputs = [nbformat.v4.new_output("display_data", data)]
        shown_only = {"transient": {"remove_source": True}}  # nbconvert's words for a cell without its source
        cells.append(new_code_cell(metadata=shown_only, outputs=outputs))
    told = f"Sentences and figure are outputs of {' and '.join(sources)}, printed from stored runs." if sources else ""
    cells.append(new_markdown_cell("\n".join([told, "", "## The notebooks", "", *shelf])))
    return Page("index", new_notebook(cells=cells))


def _sentences(data: dict[str, Any]) -> Iterator[str]:
    if "text/markdown" in data:
        yield data["text/markdown"]
    elif isinstance(title := data.get(VEGALITE, {}).get("title"), dict):
        yield f"{title['text']}: {title['subtitle']}." if "subtitle" in title else f"{title['text']}."


def _short(title: str) -> str:
    """A title in the navigation, of which a narrow screen leaves out what follows the number."""
    number, dot, rest = title.partition(" · ")
    return f"{escape(number)}<span>{dot}{escape(rest)}</span>"


def _with_formulas(text: str) -> str:
    """Markdown with its formulas as MathML."""

    def formula(match: re.Match[str]) -> str:
        code, block, inline = match.groups()
        if code is not None:
            return code
        tex = (block or inline).strip().replace("{aligned}", "{split}")  # the same, by the name that latex2mathml knows
        math = latex2mathml.converter.convert(tex, display="block" if block else "inline")
        # As an exponent, a prime can hardly be seen in a font that is not made for formulas; beside the letter it can.
        math = _PRIME.sub(r'<mrow>\1<mo lspace="0" rspace="0">&#x02032;</mo></mrow>', math)
        return f'<span class="wide">{math}</span>' if block else math

    return _MATH.sub(formula, text)


def _shown(data: dict[str, Any], size: dict[str, int]) -> dict[str, Any]:
    """An output as the page is to show it; `size` is that of its PNG, in pixels of the page."""
    if VEGALITE in data:
        title = escape(data.get("text/plain", "").removeprefix("Figure: "))
        measures = "".join(f' {side}="{length}"' for side, length in size.items())
        chart = json.dumps(data[VEGALITE]).replace("<", "\\u003c")  # so that no text in it ends the script
        picture = data["image/png"].replace("\n", "")
        html = (
            f'<figure class="chart" aria-label="{title}"><img src="data:image/png;base64,{picture}" alt="{title}"'
            f'{measures}><script type="application/json">{chart}</script></figure>'
        )
        return NotebookNode({"text/html": html})
    if "text/html" in data:  # without styles of its own, which would hold on the whole page and are for light ones only
        return NotebookNode({"text/html": re.sub(r"<style.*?</style>", "", data["text/html"], flags=re.DOTALL)})
    if "text/markdown" in data:
        return NotebookNode({"text/markdown": _with_formulas(data["text/markdown"])})
    return data


def _link(match: re.Match[str], names: set[str]) -> str:
    """A link that works beside the other pages: to a page instead of its notebook; its bare text where it has none."""
    before, address, after, text = match.groups()
    parts = urlsplit(unescape(address))
    path = PurePosixPath(parts.path)
    if path.suffix == ".ipynb" and not parts.scheme and path.stem in names:
        fragment = f"#{escape(parts.fragment)}" if parts.fragment else ""
        return f'<a{before}href="{escape(path.stem)}.html{fragment}"{after}>{text}</a>'
    return match.group() if parts.scheme or not parts.path else text


@functools.cache
def _drawing() -> str:
    """Vega-Lite with all it needs, and what draws the charts of a page with it."""
    return str(vl_convert.javascript_bundle(_DRAW))
