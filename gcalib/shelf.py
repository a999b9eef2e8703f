"""The shelf of notebooks: executing them, cleaning them for a commit, and checking what is committed.

A notebook executed in place carries in its metadata, under `gcalib`, what its outputs came from:

    source_sha256    hash of its cells' sources
    results_sha256   hash of the run records it used
    runs             their ids
    profile          the profile it names

So does an executed copy: there the profile is the one that was injected, and beside it stand

    profile_sha256   hash of what the profile asks for
    seconds          what the execution took
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import nbformat
import papermill
from nbformat import NotebookNode

from gcalib.config import Profile
from gcalib.data.errors import NoDataError
from gcalib.pages import Page, frame, to_html
from gcalib.records import RESULTS_VERSION, record_sha256
from gcalib.store import RunStore

log = logging.getLogger("gcalib")
FOLDER = Path("notebooks")
MAX_KB = 300
NO_DATA = re.compile(rf"cell \d+: {NoDataError.__name__}: ")


@dataclass(frozen=True)
class Outcome:
    """One notebook's execution: its file name, seconds, and the sentence that ended it (None: it went through).

    `kept`: it was executed earlier, and nothing that it came from has changed. With `resume`, `seconds` are those of
    the earlier execution; in place, this one ended where the notebook reads data that is not on this machine.
    """

    name: str
    seconds: float
    error: str | None
    kept: bool = False

    @property
    def status(self) -> str:
        return f"failed: {self.error}" if self.error else "kept" if self.kept else "executed"


def notebooks(names: Sequence[str] = (), folder: Path = FOLDER) -> list[Path]:
    """The notebooks of the shelf in order, or those whose file name starts with one of `names`.

    Raises
    ------
    ValueError
        For a name that none starts with.
    """
    shelf = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    for name in names:
        if not any(path.name.startswith(Path(name).name) for path in shelf):
            there = ", ".join(path.stem for path in shelf) or "none"
            raise ValueError(f"No notebook of {folder} starts with {name!r}; there are {there}.")
    return [path for path in shelf if not names or any(path.name.startswith(Path(name).name) for name in names)]


def execute(
    paths: Sequence[Path], out: Path | None, profile: str | None, *, resume: bool = False
) -> Iterator[Outcome]:
    """Execute notebooks one after the other, going on after a failure.

    Parameters
    ----------
    paths
        The notebooks.
    out
        Folder of the executed copies and their HTML; None executes in place, for a commit: metadata cleaned,
        provenance written, and a notebook that fails left as it was. One that fails because the data it reads is
        not on this machine, and is fit to read as it is, counts as kept.
    profile
        Injected as the notebooks' parameter; None leaves what each of them names.
    resume
        With `out` and `profile`: keep an executed copy whose source, profile and records are what they were.
    """
    pages = [Page.read(path) for path in paths]
    for path in paths:
        if resume and out is not None and profile is not None and (kept := _kept(path, out, profile)):
            yield kept
            continue
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            result, trace = Path(scratch) / path.name, Path(scratch) / "trace"
            error = _execute(path, result, {"profile": profile} if profile else {}, trace)
            if result.exists():
                notebook = _clean(nbformat.read(result, as_version=4))
                if out is not None:
                    out.mkdir(parents=True, exist_ok=True)
                    (out / f"{path.stem}.html").write_text(to_html(Page(path.stem, notebook), pages), encoding="utf-8")
                    if error is None and profile is not None:
                        notebook.metadata["gcalib"] = {
                            **_provenance(nbformat.read(path, as_version=4), trace),
                            "profile": profile,
                            "profile_sha256": profile_sha256(profile),
                            "seconds": round(time.perf_counter() - started, 1),
                        }
                    nbformat.write(notebook, out / path.name)  # the last, since what it says holds for the page too
                elif error is None:
                    notebook.metadata["gcalib"] = _provenance(notebook, trace)
                    nbformat.write(notebook, path)
        seconds = time.perf_counter() - started
        if out is None and error is not None and NO_DATA.match(error) and not faults(path):
            yield Outcome(path.name, seconds, None, kept=True)
        else:
            yield Outcome(path.name, seconds, error)


def _execute(path: Path, result: Path, parameters: dict[str, Any], trace: Path) -> str | None:
    before = os.environ.get("GCALIB_TRACE")
    os.environ["GCALIB_TRACE"] = str(trace)
    try:
        papermill.execute_notebook(
            path, result, parameters, kernel_name="python3", language="python", progress_bar=False, cwd=Path.cwd(),
            extra_arguments=["--IPKernelApp.log_level=50"],  # its warnings are about the kernel, not the notebook
        )  # fmt: skip
    except papermill.PapermillExecutionError as error:
        return f"cell {error.exec_count}: {error.ename}: {_plain(error.evalue)}"
    except Exception as error:  # noqa: BLE001 - a kernel can die in many ways, and the other notebooks go on
        return f"{type(error).__name__}: {_plain(str(error))}"
    finally:
        os.environ.pop("GCALIB_TRACE")
        if before is not None:
            os.environ["GCALIB_TRACE"] = before
    return None


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text).strip().splitlines()[0] if text.strip() else "no message"


def _clean(notebook: NotebookNode) -> NotebookNode:
    """Drop what differs between machines and moments, so that an execution with the same outputs is the same file."""
    notebook.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
    )
    for number, cell in enumerate(notebook.cells):
        tags = cell.metadata.get("tags", [])
        cell.metadata = NotebookNode({"tags": tags} if tags else {})
        cell["id"] = f"cell-{number:03d}"
        for output in cell.get("outputs", []):
            output.get("metadata", {}).pop("papermill", None)
    return notebook


def source_sha256(notebook: NotebookNode) -> str:
    """Hash of the kinds and sources of all cells."""
    cells = [[cell.cell_type, cell.source] for cell in notebook.cells]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def results_sha256(records: dict[str, str]) -> str:
    """Hash of run ids and record hashes."""
    return hashlib.sha256(json.dumps(sorted(records.items())).encode()).hexdigest()


def _provenance(notebook: NotebookNode, trace: Path) -> dict[str, Any]:
    used = dict(line.split() for line in trace.read_text().splitlines()) if trace.exists() else {}
    found = re.search(r"^profile = [\"'](.+?)[\"']", _parameters(notebook), re.MULTILINE)
    return {
        "profile": found.group(1) if found else None,
        "source_sha256": source_sha256(notebook),
        "results_sha256": results_sha256(used),
        "runs": sorted(used),
    }


def profile_sha256(name: str) -> str:
    """Hash of what a profile asks for."""
    return hashlib.sha256(Profile.load(name).model_dump_json(exclude={"workers"}).encode()).hexdigest()


def _kept(path: Path, out: Path, profile: str) -> Outcome | None:
    """The outcome of an earlier execution, if everything is there and what it came from is as it was."""
    try:
        written = nbformat.read(out / path.name, as_version=4).metadata.get("gcalib")
    except (OSError, ValueError):  # there is none, or half of one
        return None
    if not written or not (out / f"{path.stem}.html").exists():
        return None
    now = {
        "profile": profile,
        "profile_sha256": profile_sha256(profile),
        "source_sha256": source_sha256(nbformat.read(path, as_version=4)),
        "results_sha256": results_sha256(_used(written, Profile.load(profile).store)),
    }
    right = all(written.get(name) == value for name, value in now.items())
    return Outcome(path.name, written["seconds"], None, kept=True) if right else None


def _used(written: dict[str, Any], store: str | Path) -> dict[str, str]:
    """Of the runs that a notebook used, those that the store still holds and would return, with their hashes."""
    stored = RunStore(store)
    found = {name: stored.get(name) for name in written.get("runs", [])}
    return {
        name: record_sha256(record)
        for name, record in found.items()
        if record is not None and record["results_version"] == RESULTS_VERSION
    }


def _parameters(notebook: NotebookNode) -> str:
    tagged = [cell.source for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    return tagged[0] if tagged else ""


def faults(path: Path, store: str | Path = "results") -> list[str]:
    """What keeps a committed notebook from being fit to read, one sentence each; empty if nothing does."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    outputs = [output for cell in code for output in cell.outputs]
    lengths = [len(cell.source.splitlines()) for cell in code] or [0]
    prose = sum(cell.cell_type == "markdown" for cell in notebook.cells)
    written = notebook.metadata.get("gcalib", {})
    used = _used(written, store)
    size = path.stat().st_size / 1024
    checks = {
        "it has no cell tagged 'parameters'": not _parameters(notebook),
        "cells were not executed, or not in order": [c.execution_count for c in code] != list(range(1, len(code) + 1)),
        "an output is an error": any(output.output_type == "error" for output in outputs),
        "an output went to stderr": any(output.get("name") == "stderr" for output in outputs),
        "its cells changed since it was executed": written.get("source_sha256") != source_sha256(notebook),
        "the records it used changed or are gone": written.get("results_sha256") != results_sha256(used),
        f"it has {size:.0f} KB, more than {MAX_KB}": size > MAX_KB,
        "half of its code cells have more than 6 lines": statistics.median(lengths) > 6,
        "more than a tenth of its code cells have 18 lines or more": sum(n >= 18 for n in lengths) > len(lengths) / 10,
        "code cells follow each other without prose": prose < 0.6 * len(code),
    }
    return [f"{path.name}: {sentence}." for sentence, wrong in checks.items() if wrong]


def write_index(outcomes: Sequence[Outcome], out: Path, profile: str) -> Path:
    """`index.html` with a line for each notebook: status, time, link."""
    rows = "\n".join(
        f'<tr><td><a href="{escape(o.name.removesuffix(".ipynb"))}.html">{escape(o.name)}</a></td>'
        f"<td>{escape(o.status)}</td><td>{o.seconds:.0f} s</td></tr>"
        for o in outcomes
    )
    body = f"""<h1>Notebooks</h1><p>Executed with the profile <b>{escape(profile)}</b>.</p>
<div class="wide"><table><tr><th>Notebook</th><th>Status</th><th>Time</th></tr>
{rows}
</table></div>"""
    out.mkdir(parents=True, exist_ok=True)
    index = out / "index.html"
    index.write_text(frame("Notebooks", body), encoding="utf-8")
    return index
