"""Executing, cleaning and checking notebooks made here, and the checks of the committed ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from gcalib.config import RunConfig
from gcalib.publish.notebooks import Outcome, execute, faults, notebooks, write_index
from gcalib.publish.site import write_site
from gcalib.store import RESULTS_VERSION, RunStore, load_results

ROOT = Path(__file__).parents[1]
COMMITTED = notebooks(folder=ROOT / "notebooks")
RECORD = {**RunConfig(pair="synthetic").model_dump(), "run_id": "0" * 16, "results_version": RESULTS_VERSION}
RECORD |= {"data_sha256": "1", "seconds": 2.0, "test.a.full.ndcg@10": 0.25}


def write_notebook(path: Path, *sources: str) -> None:
    """A notebook with a parameters cell and these code cells, prose before each."""
    cells = [new_markdown_cell("# Title"), new_code_cell('profile = "tiny"', metadata={"tags": ["parameters"]})]
    for source in sources:
        cells += [new_markdown_cell("Prose."), new_code_cell(source, metadata={"jupyter": {"source_hidden": True}})]
    nbformat.write(new_notebook(cells=cells), path)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: profiles, a store with one run, and a notebook that reads it."""
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "tiny.yaml").write_text("pair: synthetic\n")
    (tmp_path / "params" / "other.yaml").write_text("pair: synthetic\nseeds: [7]\n")
    RunStore(tmp_path / "results").put(RECORD, [{"epoch": 0.0}])
    (tmp_path / "notebooks").mkdir()
    imports = "from gcalib.config import notebook_parameters\nfrom gcalib.store import load_results"
    read = "settings = notebook_parameters(globals())\nframe = load_results(settings.store)"
    show = "frame['test.a.full.ndcg@10'].tolist(), settings.seeds"
    write_notebook(tmp_path / "notebooks" / "01_works.ipynb", imports, read, show)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def path(project: Path) -> Path:
    return project / "notebooks" / "01_works.ipynb"


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Executions without a kernel: every cell ran and read all records, or the one that is asked for failed."""

    def use(error: tuple[str, str] | None = None) -> None:
        def pretend(source: Path, result: Path, parameters: dict[str, Any], **_: object) -> None:
            load_results("results")
            book = nbformat.read(source, as_version=4)
            for number, cell in enumerate((cell for cell in book.cells if cell.cell_type == "code"), 1):
                cell.execution_count = number
            nbformat.write(book, result)
            if error:
                raise papermill.PapermillExecutionError(7, 4, "source", *error, [])

        monkeypatch.setattr(papermill, "execute_notebook", pretend)

    use()
    return use


def run(path: Path, out: Path | None = None, profile: str | None = None, **options: bool) -> Outcome:
    (outcome,) = execute([path], out, profile, **options)
    return outcome


def test_failure_stops_no_other_notebook_and_the_index_tells(project: Path) -> None:
    write_notebook(project / "notebooks" / "00_fails.ipynb", "raise ValueError('on <purpose>')")
    outcomes = list(execute(notebooks(), project / "out", "other"))
    assert [outcome.status for outcome in outcomes] == ["failed: cell 3: ValueError: on <purpose>", "executed"]
    index = write_index(outcomes, project / "out", "other").read_text()
    assert 'href="01_works.html"' in index
    assert "failed: cell 3: ValueError: on &lt;purpose&gt;" in index
    copy = nbformat.read(project / "out" / "01_works.ipynb", as_version=4)
    assert copy.cells[-1].outputs[0].data["text/plain"] == "([0.25], (7,))"  # the profile was injected
    assert "([0.25], (7,))" in (project / "out" / "01_works.html").read_text()
    source = nbformat.read(project / "notebooks" / "01_works.ipynb", as_version=4)
    assert not source.cells[-1].outputs  # the notebook itself is as it was


def test_execution_in_place_is_clean_and_repeatable(path: Path) -> None:
    assert run(path).status == "executed"
    first = path.read_bytes()
    book = nbformat.read(path, as_version=4)
    assert set(book.metadata) == {"kernelspec", "language_info", "gcalib"}
    assert book.metadata["gcalib"]["runs"] == ["0" * 16]
    assert book.metadata["gcalib"]["profile"] == "tiny"
    assert {key for cell in book.cells for key in cell.metadata} == {"tags", "jupyter"}
    assert str(path.parent).encode() not in first
    assert faults(path) == []
    assert run(path).status == "executed"
    assert path.read_bytes() == first


def test_failure_in_place_leaves_the_notebook_as_it_was(path: Path, no_kernel: Callable[..., None]) -> None:
    before = path.read_bytes()
    no_kernel(error=("ValueError", "\x1b[31mon purpose\x1b[0m\nand more"))
    assert run(path).status == "failed: cell 4: ValueError: on purpose"
    assert path.read_bytes() == before


def test_notebook_whose_data_is_elsewhere_is_kept_if_nothing_changed(
    path: Path, no_kernel: Callable[..., None]
) -> None:
    run(path)
    no_kernel(error=("NoDataError", "food-kitchen is not here"))
    assert run(path).status == "kept"
    book = nbformat.read(path, as_version=4)
    book.cells[0].source += " and more"
    nbformat.write(book, path)
    assert run(path).status == "failed: cell 4: NoDataError: food-kitchen is not here"


def change_source(project: Path) -> None:
    path = project / "notebooks" / "01_works.ipynb"
    book = nbformat.read(path, as_version=4)
    book.cells[-1].source = "2"
    nbformat.write(book, path)


def change_profile(project: Path) -> None:
    (project / "params" / "tiny.yaml").write_text("pair: synthetic\nseeds: [3]\n")


def change_output(project: Path) -> None:
    path = project / "notebooks" / "01_works.ipynb"
    book = nbformat.read(path, as_version=4)
    book.cells[-1].outputs = [nbformat.v4.new_output("stream", text="all is well")]
    nbformat.write(book, path)


def change_record(project: Path) -> None:
    RunStore(project / "results").put({**RECORD, "test.a.full.ndcg@10": 0.5}, [{"epoch": 0.0}])


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (change_source, "its cells changed since it was executed."),
        (change_profile, "its profile changed since it was executed."),
        (change_output, "its outputs were edited."),
        (change_record, "the records it used changed or are gone."),
    ],
)
def test_check_finds_what_changed(
    project: Path, path: Path, no_kernel: Callable[..., None], change: Callable[[Path], None], fault: str
) -> None:
    run(path)
    assert faults(path) == []
    change(project)
    assert faults(path) == [f"01_works.ipynb: {fault}"]


def test_check_finds_bad_cells(path: Path, no_kernel: Callable[..., None]) -> None:
    run(path)
    book = nbformat.read(path, as_version=4)
    book.cells[1].metadata = {}
    book.cells[3].execution_count = 7
    book.cells[3].outputs = [nbformat.v4.new_output("stream", name="stderr", text="x" * 312_000)]
    book.cells[5].outputs = [nbformat.v4.new_output("error", ename="E", evalue="e", traceback=[])]
    book.cells += [new_code_cell('display(Markdown(f"{x} is"))' + " " * 99)]
    book.cells += [new_code_cell("a = 1\n" * 13, execution_count=None) for _ in range(6)]
    nbformat.write(book, path)
    assert [fault.removeprefix("01_works.ipynb: ") for fault in faults(path)] == [
        "it has no cell tagged 'parameters'.",
        "cells were not executed, or not in order.",
        "an output is an error.",
        "an output went to stderr.",
        "its cells changed since it was executed.",
        "its profile changed since it was executed.",
        "its outputs were edited.",
        "it has 309 KB, more than 300.",
        "half of its code cells have more than 5 lines.",
        "more than a tenth of its code cells have 13 lines or more.",
        "a line of code has more than 100 characters.",
        "a code cell builds sentences.",
        "code cells follow each other without prose.",
    ]


@pytest.mark.parametrize("change", [change_source, change_profile, change_record])
def test_resume_executes_again_what_changed(
    project: Path, path: Path, no_kernel: Callable[..., None], change: Callable[[Path], None]
) -> None:
    out = project / "out"
    assert run(path, out, "tiny", resume=True).status == "executed"
    assert run(path, out, "tiny", resume=True).status == "kept"
    change(project)
    assert run(path, out, "tiny", resume=True).status == "executed"
    assert run(path, out, "tiny", resume=True).status == "kept"


def test_resume_keeps_nothing_half_done(project: Path, path: Path, no_kernel: Callable[..., None]) -> None:
    out = project / "out"
    run(path, out, "tiny")
    (out / path.name).write_bytes((out / path.name).read_bytes()[:500])
    assert run(path, out, "tiny", resume=True).status == "executed"
    (out / "01_works.html").unlink()
    assert run(path, out, "tiny", resume=True).status == "executed"
    assert run(path, out, "other", resume=True).status == "executed"


def test_notebook_with_marks_of_a_merge_conflict_is_named(project: Path, path: Path) -> None:
    path.write_text("<<<<<<< HEAD\n" + path.read_text())
    for use in (faults, run, lambda path: write_site([path], project / "site")):
        with pytest.raises(ValueError, match="01_works.ipynb is not a notebook: "):
            use(path)


def test_unknown_notebook_is_named(project: Path) -> None:
    with pytest.raises(ValueError, match=r"No notebook of notebooks starts with '77'; there are 01_works\."):
        notebooks(["01", "77"])


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_notebook_is_fit_to_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert faults(path) == []
