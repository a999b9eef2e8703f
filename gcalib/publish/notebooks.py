"""Notebooks executed, cleaned for a commit, and checked; their metadata say what outputs came from (`_provenance`)."""

from __future__ import annotations

import hashlib
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import nbformat
import papermill
from nbconvert.filters import strip_ansi
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell, new_notebook

from gcalib.config import Profile
from gcalib.publish.site import Page, read_notebook, write_page
from gcalib.store import RunStore, record_sha256

FOLDER = Path("notebooks")
MAX_KB = 300
MAX_MEDIAN_LINES = 5
LONG_CELL = 13  # lines; a tenth of the code cells may have as many
MAX_COLUMNS = 100
SENTENCE = re.compile(r"(?:Markdown|print)\(f?[\"']")  # a cell that writes prose


@dataclass(frozen=True)
class Outcome:
    """One notebook's execution."""

    name: str  # of the file
    seconds: float
    error: str | None  # the sentence that ended it; None: it went through
    kept: bool = False  # what was there is still right, as nothing that it came from has changed

    @property
    def status(self) -> str:
        return f"failed: {self.error}" if self.error else "kept" if self.kept else "executed"


def notebooks(names: Sequence[str] = (), folder: Path = FOLDER) -> list[Path]:
    """The notebooks of a folder in order, and its appendices, or those whose file name starts with one of `names`.

    Raises
    ------
    ValueError
        For a name that none starts with.
    """
    starts = [Path(name).name for name in names]
    paths = [*sorted(folder.glob("[0-9][0-9]_*.ipynb")), *sorted(folder.glob("appendix/[A-Z]_*.ipynb"))]
    for start in starts:
        if not any(path.name.startswith(start) for path in paths):
            known = ", ".join(path.stem for path in paths) or "none"
            raise ValueError(f"No notebook of {folder} starts with {start!r}; there are {known}.")
    return [path for path in paths if not names or path.name.startswith(tuple(starts))]


def execute(paths: Sequence[Path], out: Path | None, profile: str | None, *, resume: bool = False) -> Iterator[Outcome]:
    """Execute notebooks one after the other; a failure does not stop the next.

    Parameters
    ----------
    out
        Folder of the executed copies and their HTML. None executes in place, for a commit: a notebook that fails stays
        as it was. One that fails because the data it reads is not on this machine, and has no other fault, is kept.
    profile
        Injected as the notebooks' parameter; None leaves the one that each of them names.
    resume
        With `out`: keep an executed copy whose source, profile and records are unchanged.
    """
    pages = [Page(path.stem, read_notebook(path)) for path in paths]
    for path, source in zip(paths, (page.notebook for page in pages), strict=True):
        started = time.perf_counter()
        if resume and out is not None and _up_to_date(path.stem, out, source, profile):
            yield Outcome(path.name, 0.0, None, kept=True)
            continue
        executed, runs, error = _run(path, {"profile": profile} if profile else {})
        if error is None:
            executed.metadata["gcalib"] = _provenance(source, profile, runs) | _outputs(executed)
        if out is not None:
            write_page(Page(path.stem, executed), out, pages)
            nbformat.write(executed, out / path.name)  # last: its metadata speaks for the HTML too
        elif error is None:
            nbformat.write(executed, path)
        elif re.match(r"cell \d+: NoDataError: ", error) and not faults(path):
            yield Outcome(path.name, time.perf_counter() - started, None, kept=True)
            continue
        yield Outcome(path.name, time.perf_counter() - started, error)


def _run(path: Path, parameters: dict[str, Any]) -> tuple[NotebookNode, set[str], str | None]:
    """The notebook as far as it was executed, ids of the runs whose records it used, and what ended it."""
    error = None
    with tempfile.TemporaryDirectory() as scratch:
        result, trace = Path(scratch) / path.name, Path(scratch) / "trace"
        os.environ["GCALIB_TRACE"] = str(trace)  # the store writes there which records are read
        try:
            papermill.execute_notebook(
                path, result, parameters, kernel_name="python3", language="python", progress_bar=False, cwd=Path.cwd(),
                extra_arguments=["--IPKernelApp.log_level=50"],  # its warnings are about the kernel, not the notebook
            )  # fmt: skip
        except papermill.PapermillExecutionError as failed:
            error = f"cell {failed.exec_count}: {failed.ename}: {failed.evalue}"
        except Exception as failed:  # noqa: BLE001 - a kernel can die in many ways, and the other notebooks go on
            error = f"{type(failed).__name__}: {failed}"
        finally:
            del os.environ["GCALIB_TRACE"]
        executed = nbformat.read(result if result.exists() else path, as_version=4)
        runs = {line.split()[0] for line in trace.read_text().splitlines()} if trace.exists() else set()
    return _clean(executed), runs, error and strip_ansi(error).splitlines()[0]


def _clean(notebook: NotebookNode) -> NotebookNode:
    """Drop what differs between machines and moments, so that an execution with the same outputs is the same file."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = NotebookNode(kernelspec=kernel, language_info={"name": "python"})
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:03d}"
        cell.metadata = NotebookNode({key: cell.metadata[key] for key in ("tags", "jupyter") if cell.metadata.get(key)})
        for output in cell.get("outputs", []):
            output.get("metadata", {}).pop("papermill", None)
    return notebook


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _outputs(executed: NotebookNode) -> dict[str, str]:
    return {"outputs_sha256": _sha256([cell.get("outputs") for cell in executed.cells])}


def _provenance(source: NotebookNode, profile: str | None, runs: Collection[str]) -> dict[str, Any]:
    """What a notebook that used these runs says of itself; `profile` None is the one it names."""
    cells = "\n".join(cell.source for cell in source.cells if "parameters" in cell.metadata.get("tags", []))
    named = re.search(r"^profile = [\"'](.+?)[\"']", cells, re.MULTILINE)
    profile = profile or (named.group(1) if named else None)
    settings = Profile.load(profile) if profile else None
    store = RunStore(settings.store if settings else "results")
    records = [record for record in map(store.get, sorted(runs)) if record is not None]
    return {
        "profile": profile,  # and what it asks for, the sources of the cells, the records that were used
        "profile_sha256": _sha256(settings and settings.model_dump(mode="json", exclude={"store", "workers"})),
        "source_sha256": _sha256([[cell.cell_type, cell.source] for cell in source.cells]),
        "results_sha256": _sha256([[record["run_id"], record_sha256(record)] for record in records]),
        "runs": sorted(runs),
    }


def _up_to_date(name: str, out: Path, source: NotebookNode, profile: str | None) -> bool:
    """Whether an executed copy is complete, and all that it came from is as it was."""
    try:
        copy = nbformat.read(out / f"{name}.ipynb", as_version=4)
        written = copy.metadata.get("gcalib")
    except (OSError, ValueError):  # there is no copy, or half of one
        return False
    there = written and (out / f"{name}.html").exists()
    return bool(there and written == _provenance(source, profile, written["runs"]) | _outputs(copy))


def faults(path: Path) -> list[str]:
    """What keeps a committed notebook from being fit to read, one sentence each; empty if nothing does."""
    notebook = read_notebook(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    outputs = [output for cell in code for output in cell.outputs]
    lines = [len(cell.source.splitlines()) for cell in code] or [0]
    prose = sum(cell.cell_type == "markdown" for cell in notebook.cells)
    tags = {tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])}
    written = notebook.metadata.get("gcalib", {})
    now = _provenance(notebook, None, written.get("runs", []))
    size = path.stat().st_size / 1024
    checks = {
        "it has no cell tagged 'parameters'": "parameters" not in tags,
        "cells were not executed, or not in order": [c.execution_count for c in code] != list(range(1, len(code) + 1)),
        "an output is an error": any(output.output_type == "error" for output in outputs),
        "an output went to stderr": any(output.get("name") == "stderr" for output in outputs),
        "its cells changed since it was executed": written.get("source_sha256") != now["source_sha256"],
        "its profile changed since it was executed": written.get("profile_sha256") != now["profile_sha256"],
        "its outputs were edited": written.get("outputs_sha256") != _outputs(notebook)["outputs_sha256"],
        "the records it used changed or are gone": written.get("results_sha256") != now["results_sha256"],
        f"it has {size:.0f} KB, more than {MAX_KB}": size > MAX_KB,
        f"half of its code cells have more than {MAX_MEDIAN_LINES} lines": statistics.median(lines) > MAX_MEDIAN_LINES,
        f"more than a tenth of its code cells have {LONG_CELL} lines or more": (
            sum(count >= LONG_CELL for count in lines) > len(lines) / 10
        ),
        f"a line of code has more than {MAX_COLUMNS} characters": any(
            len(line) > MAX_COLUMNS for cell in code for line in cell.source.splitlines()
        ),
        "a code cell builds sentences": any(SENTENCE.search(cell.source) for cell in code),
        "code cells follow each other without prose": prose < 0.6 * len(code),
    }
    return [f"{path.name}: {sentence}." for sentence, wrong in checks.items() if wrong]


def write_index(outcomes: Sequence[Outcome], out: Path, profile: str) -> Path:
    """`index.html` with a line for each notebook: link, status, time."""
    links = (f'<a href="{Path(one.name).stem}.html">{one.name}</a>' for one in outcomes)
    told = (f"{escape(one.status)}</td><td>{one.seconds:.0f} s" for one in outcomes)
    rows = "\n".join(f"<tr><td>{link}</td><td>{rest}</td></tr>" for link, rest in zip(links, told, strict=True))
    text = f"# Notebooks\n\nExecuted with the profile **{profile}**.\n\n<table>\n{rows}\n</table>"
    return write_page(Page("index", new_notebook(cells=[new_markdown_cell(text)])), out)
