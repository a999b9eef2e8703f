"""The pages of the site, from notebooks made here and the committed ones (in a browser: test_browser.py)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from gcalib.publish.notebooks import notebooks
from gcalib.publish.site import Page, to_html, write_site
from gcalib.study.theme import VEGALITE

COMMITTED = notebooks(folder=Path(__file__).parents[1] / "notebooks")
UNFINISHED = "has not been executed to its end"
CHART = {
    "image/png": "iVBORw0KGgo=\n",
    VEGALITE: {"title": {"text": "Rows lean", "subtitle": "two users"}, "mark": "bar", "note": "</script>"},
    "text/plain": 'Figure: Rows "lean"',
}
TABLE = {"text/html": "<div><style scoped>td { color: black }</style><table><tr><td>1</td></tr></table></div>"}
FIRST = """# 07 · One

[next](08_two.ipynb#2-%C2%B7-More), [from the root](notebooks/08_two.ipynb), [none](09_no.ipynb), [file](../a.yaml),
[paper](https://example.org/a), [here](#7-Below); **where $\\frac{1}{2}$ is**, `code $y$`, $a =
\\text{two lines}$

| a | b |
|---|---|
| $\\lvert x\\rvert$ | <b>2</b> |

$$\\begin{aligned}a &= b \\\\ c &= d\\end{aligned}$$

<details><summary>Solutions</summary>

Hidden $x_1$.

</details>"""


def code(source: str, *outputs: dict[str, object], tags: tuple[str, ...] = (), count: int | None = 1):
    shown = [new_output("display_data", data, metadata={"image/png": {"width": 7, "height": 5}}) for data in outputs]
    return new_code_cell(source, outputs=shown, execution_count=count, metadata={"tags": list(tags)} if tags else {})


@pytest.fixture(scope="module")
def books() -> list[Page]:
    """Two pages: one executed, with all that a notebook may hold, and one that never was."""
    cells = [
        new_markdown_cell(FIRST),
        code("chart < 1", CHART, tags=("front-figure",)),
        code("said", {"text/markdown": "The cosine of $X'$ is **0.3**."}, tags=("front",)),
        new_markdown_cell("It is small.", metadata={"tags": ["front"]}),
        code("table", TABLE),
    ]
    second = [new_markdown_cell("# 08 · Two & more\n\n## 2 · More"), code("1 + 1", count=None)]
    return [Page("07_one", new_notebook(cells=cells)), Page("08_two", new_notebook(cells=second))]


@pytest.fixture(scope="module")
def pages(books: list[Page]) -> tuple[str, str]:
    first, second = (to_html(book, books) for book in books)
    return first, second


def test_links_lead_to_pages_and_never_to_missing_files(books: list[Page], pages: tuple[str, str]) -> None:
    assert '<a href="08_two.html#2-%C2%B7-More">next</a>' in pages[0]
    assert '<a href="08_two.html">from the root</a>, none, file,' in pages[0]
    assert '<a href="https://example.org/a">paper</a>' in pages[0]
    assert '<a href="#7-Below">here</a>' in pages[0]
    assert "next, from the root, none, file" in to_html(books[0])  # a page alone has no neighbours


def test_navigation_marks_the_current_page(pages: tuple[str, str]) -> None:
    current = re.search(r"<nav.*?</nav>", pages[0], re.DOTALL)[0]
    assert re.findall(r'aria-current="page" href="(.*?)"', current) == ["07_one.html"]
    assert 'title="08 · Two &amp; more">08<span> · Two &amp; more</span></a>' in current


def test_navigation_leads_to_the_neighbours(pages: tuple[str, str]) -> None:
    feet = [re.search(r"<footer>.*?</footer>", page, re.DOTALL)[0] for page in pages]
    assert [re.findall(r'href="(.*?)" rel="(.*?)"', foot) for foot in feet] == [
        [("08_two.html", "next")],
        [("07_one.html", "prev")],
    ]


def test_chart_brings_its_picture_and_its_data(pages: tuple[str, str]) -> None:
    picture, data, *others = BeautifulSoup(pages[0], "html.parser").select("figure.chart > *")
    shown = {"src": "data:image/png;base64,iVBORw0KGgo=", "alt": 'Rows "lean"', "width": "7", "height": "5"}
    assert picture.attrs == shown
    assert json.loads(data.text) == CHART[VEGALITE]
    assert "</" not in data.text  # no text in a chart ends the script
    assert not others


def test_only_pages_with_charts_bring_what_draws_them(pages: tuple[str, str]) -> None:
    assert "replaceChildren" in pages[0]
    assert "replaceChildren" not in pages[1]


def test_pages_ask_nothing_of_another_host(pages: tuple[str, str]) -> None:
    for page in pages:
        tags = BeautifulSoup(page, "html.parser").select("script, link, img, iframe")
        addresses = [tag.get("src") or tag.get("href") or "data:" for tag in tags]
        assert all(address.startswith("data:") for address in addresses)


def test_formulas_become_mathml(pages: tuple[str, str]) -> None:
    formulas = re.findall(r"<math.*?</math>", pages[0], re.DOTALL)
    assert len(formulas) == 6
    assert all(len(ElementTree.fromstring(one)) for one in formulas)
    assert "<code>code $y$</code>" in pages[0]
    assert re.search(r"<details><summary>Solutions</summary>.*Hidden <math.*</details>", pages[0], re.DOTALL)


def test_tables_scroll_and_bring_no_style(pages: tuple[str, str]) -> None:
    body = re.search(r"<main>.*</main>", pages[0], re.DOTALL)[0]
    assert '<div class="wide"><table><tr><td>1</td></tr></table></div>' in body
    assert "<style" not in body


def test_unfinished_notebook_says_so(pages: tuple[str, str]) -> None:
    assert [UNFINISHED in page for page in pages] == [False, True]


def test_front_page_repeats_tagged_cells(books: list[Page], tmp_path: Path) -> None:
    paths = [tmp_path / f"{book.name}.ipynb" for book in books]
    for book, path in zip(books, paths, strict=True):
        nbformat.write(book.notebook, path)
    front = write_site(paths, tmp_path / "out").read_text()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"index.html", "07_one.html", "08_two.html"}
    said = re.findall(r"<li>(.*?)</li>", front)
    assert "<math" in said[0] and said[0].endswith("<strong>0.3</strong>.")
    assert said[1:] == [
        "It is small.",
        '<a href="07_one.html">07 · One</a>',
        '<a href="08_two.html">08 · Two &amp; more</a> (not executed yet)',
    ]
    assert front.count("<figure") == 1
    assert "chart &lt; 1" not in front  # the figure without its code


def test_committed_notebooks_tell_the_finding_in_one_figure_and_three_sentences() -> None:
    books = [Page(path.stem, nbformat.read(path, as_version=4)) for path in COMMITTED]
    assert [VEGALITE in data for book in books for data in book.outputs("front-figure")] == [True]
    assert ["text/markdown" in data for book in books for data in book.outputs("front")] == [True] * 3


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_every_formula_of_the_committed_notebooks_is_understood(path: Path) -> None:
    prose = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
    page = to_html(Page(path.stem, new_notebook(cells=prose)))
    formulas = ["".join(ElementTree.fromstring(one).itertext()) for one in re.findall(r"<math.*?</math>", page, re.S)]
    assert not [formula for formula in formulas if re.search(r"[\\&]", formula)]
    rest = re.sub(r"<(math|pre|code|script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    assert not re.findall(r"\$[^$]*\\\w+[^$]*\$", rest)  # none is left as TeX
