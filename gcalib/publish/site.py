"""Notebooks as web pages that work offline: one self-contained HTML file each, and a front page.

nbconvert does the work, with the template `site.html.j2`. Formulas become MathML. The style and the JavaScript that
draws the charts are part of each page, and a chart's PNG is shown until the chart is drawn. The front page repeats what
notebooks say in cells with one of two tags:

    front-figure    the cell's chart is the figure of the front page
    front           the cell's text, or the Markdown that it printed, is a sentence there
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import latex2mathml.converter
import nbformat
import vl_convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from gcalib.study.theme import VEGALITE

FOLDER = Path(__file__).parent  # with the template, the style, the script and the beginning of the front page
_PRIME = re.compile(r"<msup>(<mi>\w+</mi>)<mi>&#x02032;</mi></msup>")


@dataclass(frozen=True)
class Page:
    """A notebook that has a page: its file name without the ending, and its content."""

    name: str
    notebook: NotebookNode

    @property
    def title(self) -> str:
        """The first heading, or the name where there is none."""
        prose = "\n".join(cell.source for cell in self.notebook.cells if cell.cell_type == "markdown")
        heading = re.search(r"^# +(.+)$", prose, re.MULTILINE)
        return heading.group(1).strip() if heading else self.name

    @property
    def finished(self) -> bool:
        """Whether every code cell was executed."""
        return all(cell.execution_count for cell in self.notebook.cells if cell.cell_type == "code" and cell.source)

    def outputs(self, tag: str | None = None) -> list[dict[str, Any]]:
        """Outputs of the cells, or of those with a tag, by media type; a Markdown cell is its own output."""
        shown = []
        for cell in self.notebook.cells:
            if tag is None or tag in cell.metadata.get("tags", []):
                shown += [output.data for output in cell.get("outputs", []) if "data" in output]
                shown += [{"text/markdown": cell.source}] * (cell.cell_type == "markdown")
        return shown


class _Renderer(IPythonRenderer):
    """Markdown to HTML with formulas as MathML, and links that work on the site."""

    def __init__(self, names: set[str]) -> None:
        super().__init__(escape=False)
        self.names = names

    def inline_math(self, body: str) -> str:
        return _mathml(body, "inline")

    def block_math(self, body: str) -> str:
        return f'<span class="wide">{_mathml(body, "block")}</span>'

    def link(self, text: str, url: str, title: str | None = None) -> str:
        """A link to a page instead of its notebook; the bare text for a file that is not on the site."""
        parts = urlsplit(url)
        path = PurePosixPath(parts.path)
        if path.suffix == ".ipynb" and not parts.scheme and path.stem in self.names:
            url = f"{path.stem}.html" + (f"#{parts.fragment}" if parts.fragment else "")
        elif parts.path and not parts.scheme:
            return text
        return str(super().link(text, url, title))


def _mathml(tex: str, display: str) -> str:
    tex = tex.strip().replace("{aligned}", "{split}")  # the same, by the name that latex2mathml knows
    math: str = latex2mathml.converter.convert(tex, display=display)
    # A prime as an exponent is too small to see in a font that is not made for formulas.
    return _PRIME.sub(r'<mrow>\1<mo lspace="0" rspace="0">&#x02032;</mo></mrow>', math)


def read_notebook(path: Path) -> NotebookNode:
    """A notebook; ValueError, which names the file, if it is none (as one with the marks of a merge conflict)."""
    try:
        return nbformat.read(path, as_version=4)
    except ValueError as error:
        raise ValueError(f"{path} is not a notebook: {str(error).splitlines()[0][:80]}") from None


def to_html(page: Page, pages: Sequence[Page] = ()) -> str:
    """One self-contained page; `pages` are those of the site in order, for the navigation and for links."""
    renderer = _Renderer({one.name for one in pages})
    filters = {"markdown2html": lambda text: _fitted(MarkdownWithMath(renderer).render(text)), "fitted": _fitted}
    exporter = HTMLExporter(template_file=str(FOLDER / "site.html.j2"), filters=filters)
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    resources = {
        "page": page,
        "pages": pages,
        "style": (FOLDER / "site.css").read_text(encoding="utf-8"),
        "script": _drawing() if any(VEGALITE in data for data in page.outputs()) else "",
        "vegalite": VEGALITE,
    }
    return str(exporter.from_notebook_node(page.notebook, resources)[0])


def _fitted(html: str) -> str:
    """HTML whose tables scroll by themselves, without styles: those would hold for the page, and are for light ones."""
    html = re.sub(r"<style.*?</style>", "", html, flags=re.DOTALL)
    return re.sub(r"<table.*?</table>", r'<div class="wide">\g<0></div>', html, flags=re.DOTALL)


@functools.cache
def _drawing() -> str:
    """Vega-Lite with all it needs, and the lines that draw the charts of a page with it."""
    return str(vl_convert.javascript_bundle((FOLDER / "site.js").read_text(encoding="utf-8")))


def write_page(page: Page, out: Path, pages: Sequence[Page] = ()) -> Path:
    """Write `to_html` of a page into a folder, which is made where there is none; returns the file's path."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{page.name}.html"
    path.write_text(to_html(page, pages), encoding="utf-8")
    return path


def write_site(paths: Sequence[Path], out: Path) -> Path:
    """Write the page of each notebook, and the front page `index.html`, whose path is returned; execute nothing."""
    pages = [Page(path.stem, read_notebook(path)) for path in paths]
    return [write_page(page, out, pages) for page in (*pages, _front(pages))][-1]


def _front(pages: Sequence[Page]) -> Page:
    """The front page, as a notebook made of parts of the others."""
    lead = (FOLDER / "front.md").read_text(encoding="utf-8")
    said = [(page, data) for page in pages for data in page.outputs("front") if "text/markdown" in data]
    drawn = [(page, data) for page in pages for data in page.outputs("front-figure") if VEGALITE in data][:1]
    sources = dict.fromkeys(f"[{page.title}]({page.name}.ipynb)" for page, _ in said + drawn)
    told = [f"Sentences and figure are those of {' and '.join(sources)}.", ""] if sources else []
    listed = [f"- [{p.title}]({p.name}.ipynb){'' if p.finished else ' (not executed yet)'}" for p in pages]
    shown_only = {"transient": {"remove_source": True}}  # nbconvert's key for a cell that shows its outputs only
    cells = [
        new_markdown_cell("\n".join([lead, *(f"- {data['text/markdown']}" for _, data in said)])),
        *(new_code_cell(metadata=shown_only, outputs=[new_output("display_data", data)]) for _, data in drawn),
        new_markdown_cell("\n".join([*told, "## The notebooks", "", *listed])),
    ]
    return Page("index", new_notebook(cells=cells))
