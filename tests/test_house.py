"""What holds the repository together: pins, imports, the budget, and what must not be named."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gcalib.config import Profile

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "gcalib").rglob("*.py"))
CORE = re.compile(r"gcalib/(attention|layers|alignment|ranking|training|evaluation|models/\w+|data/batches)\.py")
DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
LAYOUT = DESIGN.partition("## Layout")[2].partition("```\n")[2].partition("```")[0]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]
PINS = dict(
    (canonicalize_name(name), version)
    for name, version in (line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
)


def tracked(*patterns: str) -> list[Path]:
    """Files in git, as they stand."""
    listed = subprocess.run(["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0")[:-1] if (ROOT / name).exists()]


def test_budget_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in PACKAGE}
    long = {name: count for name, count in lines.items() if count > 320}
    results = tracked("results")
    rows = {
        "lines of the core": (sum(count for name, count in lines.items() if CORE.fullmatch(name)), 3235),
        "lines of the package": (sum(lines.values()), 7660),
        "Python files of the package": (len(lines), 42),
        "files above 320 lines": (len(long), 0),
        "results/ in MB": (sum(path.stat().st_size for path in results) / 1e6, 6.0),
        "files in results/": (len(results), 19),
    }
    with capsys.disabled():
        print("\n" + "\n".join(f"{name:28s} {found:8,.6g} of {most:,.6g}" for name, (found, most) in rows.items()))
    assert not {name: found for name, (found, most) in rows.items() if found > most}, long


def drawn_layers() -> dict[str, int]:
    """The folders and files of `gcalib/` that begin a line of the drawing; the highest has number 0."""
    return {name: number for number, name in enumerate(re.findall(r"^gcalib/(\w+(?:/|\.py))", LAYOUT, re.MULTILINE))}


def imports() -> dict[str, set[str]]:
    """What each file of the package imports of it: paths below `gcalib/`, such as `data/pair.py`."""
    names = {str(path.relative_to(ROOT / "gcalib")) for path in PACKAGE}

    def file_of(dotted: str) -> str:
        path = dotted.removeprefix("gcalib").strip(".").replace(".", "/")
        return next((name for name in (f"{path}.py", f"{path}/__init__.py".lstrip("/")) if name in names), "")

    graph: dict[str, set[str]] = {}
    for name in names:
        targets = graph.setdefault(name, set())
        for node in ast.walk(ast.parse((ROOT / "gcalib" / name).read_text())):
            if isinstance(node, ast.Import):
                targets |= {file_of(alias.name) for alias in node.names if alias.name.split(".")[0] == "gcalib"}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gcalib":
                submodules = {file_of(f"{node.module}.{alias.name}") for alias in node.names}
                targets |= submodules - {""} or {file_of(node.module or "")}
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{name}: write imports in full"
        targets.discard("")  # no file, which is for mypy to say
    return graph


def test_every_file_imports_only_from_below_it() -> None:
    layers = drawn_layers()

    def layer(name: str) -> int:
        return layers[name.partition("/")[0] + "/" if "/" in name else name]

    wrong = []
    for name, targets in imports().items():
        same_folder = {target for target in targets if "/" in name and layer(target) == layer(name)}
        wrong += [f"{name} imports {target}" for target in targets - same_folder if layer(target) <= layer(name)]
    assert not wrong


def test_no_imports_go_round_in_a_circle() -> None:
    assert len(tuple(TopologicalSorter(imports()).static_order())) == len(PACKAGE)  # a CycleError names the circle


def test_the_drawing_names_every_file() -> None:
    folder, drawn = "", set()
    for line in LAYOUT.splitlines():
        if start := re.match(r"gcalib/(\w+/|\w+\.py)", line):
            folder, line = (start[1], line[start.end() :]) if start[1].endswith("/") else ("", start[1])
        drawn |= {folder + name for name in re.findall(r"\w+\.py\b", line)}
    files = {str(path.relative_to(ROOT / "gcalib")) for path in PACKAGE}
    assert drawn == {name for name in files if not name.endswith("/__init__.py")}


def test_the_flow_of_a_batch_names_what_is_there() -> None:
    flow = DESIGN.partition("## How a batch flows")[2].partition("```\n")[2].partition("```")[0]
    steps = re.findall(r"^(gcalib/\S+) +(?:\w+\.)?(\w+)\(", flow, re.MULTILINE)
    assert len(steps) == 7
    for file, name in steps:
        function = f"def {name.replace('model', 'forward')}("  # model(batch) is its forward
        assert function in (ROOT / file).read_text(), f"{file} has no {function}"


def test_package_initialisers_are_empty() -> None:
    for path in (ROOT / "gcalib").glob("*/__init__.py"):
        body = ast.parse(path.read_text()).body
        assert [type(node) for node in body] == [ast.Expr], f"{path} holds more than a docstring"


def test_nothing_imports_a_notebook() -> None:
    imported = re.compile(r"^\s*(?:from|import) notebooks\b", re.MULTILINE)
    assert not [path for path in tracked("*.py") if imported.search(path.read_text())]


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda r: r.name)
def test_requirement_has_a_pin_inside_its_range(requirement: Requirement) -> None:
    pin = PINS[canonicalize_name(requirement.name)]
    assert requirement.specifier and requirement.specifier.contains(pin, prereleases=True), (requirement, pin)


def test_conda_users_get_the_same_packages() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, from_pip = environment["dependencies"]
    assert python == "python" + PROJECT["requires-python"] and pip == "pip"
    assert from_pip == {"pip": ["-c constraints.txt", "-e .[dev]"]}


@pytest.mark.parametrize("path", sorted((ROOT / "params").glob("*.yaml")), ids=lambda path: path.stem)
def test_profile_is_valid(path: Path) -> None:
    profile = Profile.load(path.stem, ROOT / "params")
    assert profile.config().pair == profile.pair


def test_help_comes_without_loading_torch() -> None:
    code = "import sys; from gcalib.__main__ import app; sys.exit('torch' in sys.modules and 'altair' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_tracked_text_names_a_machine() -> None:
    paths = tracked("*.py", "*.ipynb", "*.md", "*.yaml", "*.yml", "*.json")
    assert len(paths) > 20
    suspicious = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|Users)/\w")
    assert not [path for path in paths if path != Path(__file__) and suspicious.search(path.read_text())]
