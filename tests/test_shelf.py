"""The notebook machinery on notebooks made here, and the committed notebooks themselves."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from gcalib import RunConfig, run, shelf
from gcalib.records import record_sha256

ROOT = Path(__file__).parents[1]
COMMITTED = shelf.notebooks(folder=ROOT / "notebooks")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a profile and two notebooks, the first of which fails."""
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "tiny.yaml").write_text("pair: synthetic:num_users=120,items_a=110,items_b=115\n")
    (tmp_path / "params" / "other.yaml").write_text("pair: synthetic\nseeds: [7]\n")
    (tmp_path / "tiny.yaml").write_text("pair: synthetic\n")
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    settings = "import gcalib\nsettings = gcalib.notebook_parameters(globals())"
    run = 'config = settings.config(dim=8, epochs=1, batch_size=64)\nrecord = gcalib.run(config, settings.store)'
    for name, last in (("00_fails", "raise ValueError('on purpose')"), ("01_works", "print(settings.seeds[0])")):
        book = new_notebook(
            cells=[
                new_markdown_cell("# Title\n\nA formula $x_1$, `code $y$` and\n\n$$\\frac{1}{2}$$"),
                new_code_cell('profile = "tiny"', metadata={"tags": ["parameters"]}),
                new_code_cell(settings),
                new_markdown_cell("Prose."),
                new_markdown_cell("More prose."),
                new_code_cell(run),
                new_markdown_cell("Prose."),
                new_code_cell(last),
            ]
        )
        nbformat.write(book, notebooks / f"{name}.ipynb")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "gcalib", *arguments], capture_output=True, text=True, check=False)


def test_a_failing_notebook_stops_no_other_and_the_index_tells(project: Path) -> None:
    done = command("notebooks", "--profile", "params/other.yaml", "--out", "out")
    assert done.returncode == 1
    assert "00_fails.ipynb" in done.stdout and "ValueError: on purpose" in done.stdout
    assert "1 of 2 notebooks failed" in done.stdout
    index = (project / "out" / "index.html").read_text()
    assert 'href="01_works.html"' in index and "failed: cell 5: ValueError: on purpose" in index
    page = (project / "out" / "01_works.html").read_text()
    assert "<math" in page and "<mfrac>" in page and "code $y$" in page
    # Nothing is asked of another host; addresses in the text of scripts and namespaces are not requests.
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"'](?:https?:)?//[^\"']*", page)
    copy = nbformat.read(project / "out" / "01_works.ipynb", as_version=4)
    assert copy.cells[-1].outputs[0].text == "7\n"  # the profile was injected
    source = nbformat.read(project / "notebooks" / "01_works.ipynb", as_version=4)
    assert not source.cells[-1].outputs  # and the notebook itself left alone


def test_resume_keeps_a_copy_until_something_that_it_came_from_changes(project: Path) -> None:
    out, path, profile = project / "out", project / "notebooks" / "01_works.ipynb", project / "params" / "tiny.yaml"

    def status() -> str:
        return next(shelf.execute([path], out, "tiny", resume=True)).status

    assert status() == "executed"
    executed = nbformat.read(out / path.name, as_version=4).metadata["gcalib"]["seconds"]
    before = (out / path.name).read_bytes()
    done = command("notebooks", "--resume", "--profile", "tiny", "--out", "out")  # goes on after what failed
    assert done.returncode == 1 and "failed: cell 5: ValueError: on purpose" in done.stdout
    assert re.search(rf"01_works.ipynb +{executed} s  kept\n", done.stdout)
    assert f"<td>kept</td><td>{executed:.0f} s</td>" in (out / "index.html").read_text()
    assert (out / path.name).read_bytes() == before

    profile.write_text(profile.read_text() + "workers: 2\n")
    assert status() == "kept"  # the same runs
    profile.write_text(profile.read_text() + "seeds: [3]\n")
    assert status() == "executed" and status() == "kept"
    book = nbformat.read(path, as_version=4)
    book.cells[-1].source = "print(2)"
    nbformat.write(book, path)
    assert status() == "executed" and status() == "kept"


@pytest.mark.parametrize("damage", ["half", "page", "records", "profile"])
def test_resume_keeps_nothing_half_done(project: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out, path = project / "out", project / "notebooks" / "01_works.ipynb"
    monkeypatch.setattr(shelf, "_execute", _pretended)
    assert [o.status for o in shelf.execute([path], out, "tiny")] == ["executed"]
    assert [o.status for o in shelf.execute([path], out, "tiny", resume=True)] == ["kept"]
    if damage == "half":
        (out / path.name).write_bytes((out / path.name).read_bytes()[:500])
    elif damage == "page":
        (out / "01_works.html").unlink()
    elif damage == "records":
        next((project / "results" / "records").iterdir()).unlink()
    profile = "other" if damage == "profile" else "tiny"
    assert [o.status for o in shelf.execute([path], out, profile, resume=True)] == ["executed"]


def _pretended(path: Path, result: Path, parameters: dict[str, object], trace: Path) -> None:
    """An execution without a kernel, of a notebook that uses one run."""
    pair = "synthetic:num_users=120,items_a=110,items_b=115"
    record = run(RunConfig(pair=pair, model="popularity"), "results")
    trace.write_text(f"{record['run_id']} {record_sha256(record)}\n")
    result.write_bytes(path.read_bytes())


def test_in_place_execution_is_clean_repeatable_and_checked(project: Path) -> None:
    path = project / "notebooks" / "01_works.ipynb"
    assert command("notebooks", "--in-place", "01").returncode == 0
    first = path.read_bytes()
    book = nbformat.read(path, as_version=4)
    assert set(book.metadata) == {"kernelspec", "language_info", "gcalib"} and len(book.metadata["gcalib"]["runs"]) == 1
    assert str(project).encode() not in first and b"papermill" not in first
    assert shelf.faults(path) == []
    assert command("notebooks", "--in-place", "01").returncode == 0 and path.read_bytes() == first
    assert command("notebooks", "--check", "01").returncode == 0

    book.cells[-1].source = "print(2)"
    nbformat.write(book, path)
    assert shelf.faults(path) == ["01_works.ipynb: its cells changed since it was executed."]
    path.write_bytes(first)
    for record in (project / "results" / "records").iterdir():
        record.unlink()
    assert shelf.faults(path) == ["01_works.ipynb: the records it used changed or are gone."]
    failed = command("notebooks", "--check", "01")
    assert failed.returncode == 1 and "records it used" in failed.stdout


def test_a_notebook_that_fails_in_place_is_left_as_it_was(project: Path) -> None:
    path = project / "notebooks" / "00_fails.ipynb"
    before = path.read_bytes()
    assert command("notebooks", "--in-place", "00").returncode == 1
    assert path.read_bytes() == before
    assert any("not executed" in fault for fault in shelf.faults(path))


def test_a_notebook_whose_data_is_elsewhere_is_kept_if_nothing_else_changed(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = project / "notebooks" / "00_fails.ipynb"
    book = nbformat.read(path, as_version=4)
    book.cells[-1].source = 'import os\nif "GCALIB_DATA" in os.environ:\n    gcalib.load_pair("food-kitchen")'
    nbformat.write(book, path)
    monkeypatch.delenv("GCALIB_DATA", raising=False)
    assert command("notebooks", "--in-place", "00").returncode == 0
    before = path.read_bytes()

    monkeypatch.setenv("GCALIB_DATA", str(project))  # where there are no ratings
    away = command("notebooks", "--in-place", "00")
    assert away.returncode == 0 and re.search("00_fails.ipynb .* s  kept\n", away.stdout)
    assert path.read_bytes() == before

    book = nbformat.read(path, as_version=4)
    book.cells[0].source += " And more."
    nbformat.write(book, path)
    changed = command("notebooks", "--in-place", "00")
    assert changed.returncode == 1 and "NoDataError: GCALIB_DATA=" in changed.stdout


def test_an_unknown_parameter_stops_with_the_list_of_the_known(project: Path) -> None:
    import papermill

    with pytest.raises(papermill.PapermillExecutionError, match=r"sedes.*The parameters are profile, pair, seeds"):
        papermill.execute_notebook(
            "notebooks/01_works.ipynb", "out.ipynb", {"sedes": [1]}, kernel_name="python3", language="python",
            progress_bar=False,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["notebooks", "--profile", "nope"], "There is no profile 'nope' in params; there are other, tiny."),
        (["notebooks", "--profile", "away/tiny.yaml"], "There is no profile 'away/tiny.yaml' in params; there are"),
        (["notebooks", "--profile", "tiny.yaml"], "--profile tiny.yaml: a notebook reads its profile from params/;"),
        (["notebooks", "--in-place", "--resume"], "--resume keeps executed copies; it goes with --out, not with"),
        (["bench", "steps"], "There is no benchmark 'steps'; there are step and grid."),
        (["notebooks", "77"], "No notebook of notebooks starts with '77'; there are 00_fails, 01_works."),
        (["run", "--set", "dmi=3"], "--set dmi=3: write key=value with a key of pair, ties"),
        (["run", "--set", "dim=9", "--set", "gca=[0]"], "heads=4 does not divide dim=9"),
        (["run", "--pair", "nope"], "nope"),
    ],
)
def test_what_a_user_did_wrong_is_one_sentence(project: Path, arguments: list[str], sentence: str) -> None:
    done = command(*arguments)
    assert done.returncode == 2 and sentence in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_run_and_results_print_records(project: Path) -> None:
    assert "holds no finished run" in command("results").stdout
    pair = "synthetic:num_users=120,items_a=110,items_b=115"
    settings = ("dim=8", "epochs=1", "gca=[0]", "heads=2", "batch_size=64")
    done = command("run", "--pair", pair, *(part for text in settings for part in ("--set", text)))
    assert done.returncode == 0 and "test.a.gca0.cos_mean_abs" in done.stdout
    assert "(0,)" in command("results").stdout


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_the_committed_notebooks_are_fit_to_read(path: Path) -> None:
    assert shelf.faults(path, ROOT / "results") == []


def test_the_shelf_has_its_first_four_notebooks() -> None:
    assert [path.name[:2] for path in COMMITTED][:4] == ["00", "01", "02", "03"]
