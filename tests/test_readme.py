"""README and docs: short, their links lead somewhere, their code runs, their numbers are those of the records."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
import torch

from gcalib.config import Profile
from gcalib.experiments import finished
from gcalib.publish.notebooks import notebooks
from gcalib.study import claims, tables

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKS = [(page, link) for page in PAGES for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text())]


def test_readme_is_short() -> None:
    assert len(README.encode()) <= 7 * 1024


def test_readme_has_the_two_commands_on_its_first_screen() -> None:
    first = "\n".join(README.splitlines()[:30])
    assert "make notebooks" in first
    assert "make test" in first


@pytest.mark.parametrize(("page", "link"), LINKS, ids=lambda part: Path(part).name)
def test_link_leads_to_a_file(page: Path, link: str) -> None:
    assert (page.parent / link).exists()


@pytest.mark.parametrize("path", notebooks(folder=ROOT / "notebooks"), ids=lambda path: path.stem)
def test_readme_lists_notebook(path: Path) -> None:
    assert f"({path.relative_to(ROOT)})" in README


def test_readme_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own, ours = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, Any] = {}
    exec(own, names)
    x, y = torch.zeros(2, 5, 8), torch.zeros(2, 7, 6)
    real = [torch.ones(part.shape[:2], dtype=torch.bool) for part in (x, y)]
    positions = [torch.arange(part.size(1)).expand(2, -1) for part in (x, y)]
    assert names["Mine"](8, 6)(x, y, *real, *positions).shape == (2, 5, 8)
    exec(ours.replace('"synthetic"', '"synthetic:num_users=300,items_a=150,items_b=150"'), names)
    assert {"test.a.full.ndcg@10", "test.a.gca0.cos_mean_abs"} <= set(names["record"])
    assert names["seen"].attention is not None


def test_readme_verdicts_are_those_of_the_records() -> None:
    profiles = [Profile.load(name, ROOT / "params") for name in ("paper", "ablations")]
    found = dict.fromkeys(claims.TEXTS, "not tested")
    try:
        runs = finished([config for profile in profiles for config in profile.grid_configs()], ROOT / "results")
    except ValueError:  # none is finished
        runs = pd.DataFrame()
    if len(runs):
        judged = claims.overall(claims.judge(tables.named(runs)))
        found |= dict(zip(judged["claim"], judged["verdict"], strict=True))
    shown = re.findall(r"^\| (C\d): (.+) \| \*\*(.+)\*\* \|$", README, re.MULTILINE)
    assert shown == [(claim, text, found[claim]) for claim, text in claims.TEXTS.items()]


def test_readme_figure_is_the_one_of_its_notebook() -> None:
    notebook = nbformat.read(ROOT / "notebooks" / "07_orthogonality.ipynb", as_version=4)
    outputs = [output.data for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    pictures = [base64.b64decode(data["image/png"]) for data in outputs if "image/png" in data]
    assert (ROOT / "docs" / "finding.png").read_bytes() in pictures
