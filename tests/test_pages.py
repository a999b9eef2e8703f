"""Pages and site, on notebooks made here and on the committed ones; what needs a browser is in test_browser.py."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from gcalib import shelf
from gcalib.pages import UNFINISHED, Page, to_html, write_site
from gcalib.rendering import VEGALITE

ROOT = Path(__file__).parents[1]
COMMITTED = shelf.notebooks(folder=ROOT / "notebooks")
CHART = {
    "image/png": "iVBORw0KGgo=\n",
    VEGALITE: {"title": {"text": "Rows lean", "subtitle": "two users"}, "mark": "bar", "note": "</script>"},
    "text/plain": 'Figure: Rows "lean"',
}
SAID = {"text/markdown": "The cosine of $X'$ is **0.3**.", "text/plain": "<Markdown>"}
FIRST = """# 07 · One

*Reading time: 5 minutes. Executes in seconds.*

[next](08_two.ipynb#2-%C2%B7-More), [from the root](notebooks/08_two.ipynb), [none](09_no.ipynb), [file](../a.yaml),
[paper](https://example.org/a), [here](#7-Below); **where $\\frac{1}{2}$ is**, `code $y$`

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


@pytest.fixture
def books() -> list[Page]:
    """Two pages: one executed, with all that a notebook may hold, and one that never was."""
    table = {"text/html": "<div><style scoped>td { color: black }</style><table><tr><td>1</td></tr></table></div>"}
    cells = [
        new_markdown_cell(FIRST),
        code("chart < 1", CHART, tags=("front-figure",)),
        code("said", SAID, tags=("front",)),
        code("other", CHART, tags=("front",)),
        code("table", table),
    ]
    second = [new_markdown_cell("# 08 · Two & more\n\n## 2 · More"), code("1 + 1", count=None)]
    return [Page("07_one", new_notebook(cells=cells)), Page("08_two", new_notebook(cells=second))]


def test_links_lead_to_pages_and_never_to_files_that_are_not_there(books: list[Page]) -> None:
    page = to_html(books[0], books)
    assert '<a href="08_two.html#2-%C2%B7-More">next</a>' in page and '<a href="08_two.html">from the root</a>' in page
    assert '<a href="https://example.org/a">paper</a>' in page and '<a href="#7-Below">here</a>' in page
    assert ", none, file,\n" in page
    assert "next, from the root, none, file" in to_html(books[0])  # a page alone has no neighbours


def test_navigation_marks_the_current_page_and_its_neighbours(books: list[Page]) -> None:
    first, second = (to_html(book, books) for book in books)
    assert '<a href="07_one.html" title="07 · One" aria-current="page">07<span> · One</span></a>' in first
    assert '<a href="08_two.html" title="08 · Two &amp; more">08<span> · Two &amp; more</span></a>' in first
    assert '<a rel="next" href="08_two.html">08 · Two &amp; more →</a>' in first and 'rel="prev"' not in first
    assert '<a rel="prev" href="07_one.html">← 07 · One</a>' in second and 'rel="next"' not in second


def test_a_chart_brings_its_picture_its_data_and_what_draws_it(books: list[Page]) -> None:
    page, without = (to_html(book, books) for book in books)
    figure = re.findall(r'<figure[^>]*class="chart".*?</figure>', page, re.DOTALL)[0]
    assert "alt='Rows \"lean\"'" in figure and 'width="7"' in figure and "base64,iVBORw0KGgo=" in figure
    assert figure.count("</script>") == 1 and "\\u003c/script>" in figure  # a text in the chart ends nothing
    assert "replaceChildren(drawn)" in page and len(page) > 500_000 and "replaceChildren" not in without
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"'](?!data:)", page.partition("<footer>")[0])


def test_formulas_and_folds_stay_whole_and_outputs_bring_no_style(books: list[Page]) -> None:
    page = to_html(books[0], books)
    formulas = re.findall(r"<math.*?</math>", page, re.DOTALL)
    assert len(formulas) == 5 and all(len(ElementTree.fromstring(one)) for one in formulas)
    assert "<code>code $y$</code>" in page and page.count("<mtr>") == 2 and '<span class="wide"><math' in page
    assert re.search(r"<details><summary>Solutions</summary>.*Hidden <math.*</details>", page, re.DOTALL)
    assert "scoped" not in page and '<div class="wide"><table><tr><td>1</td></tr></table></div>' in page


def test_a_notebook_that_never_ran_says_so(books: list[Page]) -> None:
    first, second = (to_html(book, books) for book in books)
    assert UNFINISHED in second and UNFINISHED not in first


def test_the_front_page_is_made_of_tagged_outputs(
    books: list[Page], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [tmp_path / f"{book.name}.ipynb" for book in books]
    for book, path in zip(books, paths, strict=True):
        nbformat.write(book.notebook, path)
    with caplog.at_level(logging.INFO, "gcalib"):
        front = write_site(paths, tmp_path / "out").read_text()
    assert caplog.messages == ["08_two has not been executed to its end; its page says so"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"index.html", "07_one.html", "08_two.html"}
    said = re.findall(r"<li>(.*?)</li>", front)
    assert "<math" in said[0] and said[0].endswith("<strong>0.3</strong>.") and said[1] == "Rows lean: two users."
    assert said[2:] == ['<a href="07_one.html">07 · One</a> Reading time: 5 minutes.',
                        '<a href="08_two.html">08 · Two &amp; more</a> Not executed yet.']  # fmt: skip
    assert front.count("<figure") == 1 and "chart &lt; 1" not in front and 'class="input"' not in front


def test_the_committed_notebooks_tell_the_finding_in_one_figure_and_three_sentences() -> None:
    books = [Page.read(path) for path in COMMITTED]
    figures = [data for book in books for data in book.tagged("front-figure")]
    assert len(figures) == 1 and VEGALITE in figures[0]
    assert sum(len(book.tagged("front")) for book in books) == 3


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_every_formula_of_the_committed_notebooks_was_understood(path: Path) -> None:
    formulas = re.findall(r"<math.*?</math>", to_html(Page.read(path)), re.DOTALL)
    read = ["".join(ElementTree.fromstring(one).itertext()) for one in formulas]
    markdown = "".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    assert bool(read) == ("$" in markdown) and not [one for one in read if re.search(r"[\\&]", one)]


def test_the_command_says_where_to_look_and_what_is_missing(tmp_path: Path) -> None:
    def site() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "gcalib", "site", "--out", "pages"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    missing = site()
    assert missing.returncode == 2 and missing.stderr.startswith("There is no notebooks/ folder")
    (tmp_path / "notebooks").mkdir()
    nbformat.write(new_notebook(cells=[new_markdown_cell("Prose.")]), tmp_path / "notebooks" / "00_a.ipynb")
    done = site()
    assert done.returncode == 0 and done.stdout == "Open pages/index.html\n"
    assert "<title>00_a</title>" in (tmp_path / "pages" / "00_a.html").read_text()
