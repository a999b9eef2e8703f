"""What holds the repository together: pins, ranges, layers, and what must not be named."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gcalib.config import Profile

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]
PINS = dict(
    (canonicalize_name(name), version)
    for name, version in (line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
)
# From the ground up: a file may import those in earlier rows, and those of its own.
FLOORS = [
    ["config", "packing"],
    ["records"],
    ["store"],
    ["data"],
    ["ranking", "alignment"],
    ["yardsticks"],
    ["layers"],
    ["attention"],
    ["models"],
    ["evaluation"],
    ["training"],
    ["experiments"],
    ["estimates", "seeds"],
    ["cluster"],
    ["pool"],
    ["grid"],
    ["rendering", "stats", "relations", "tables", "pages", "shelf"],
    ["verdicts", "effects"],
    ["marks", "claims"],
    ["diagrams", "comparisons", "dots"],
    ["charts"],
    ["__init__"],
    ["__main__"],
]


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda r: r.name)
def test_every_requirement_has_a_pin_inside_its_range(requirement: Requirement) -> None:
    pin = PINS[canonicalize_name(requirement.name)]
    assert requirement.specifier and requirement.specifier.contains(pin, prereleases=True), (requirement, pin)


def test_conda_users_get_the_same_packages() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, from_pip = environment["dependencies"]
    assert python == "python" + PROJECT["requires-python"] and pip == "pip"
    assert from_pip == {"pip": ["-c constraints.txt", "-e .[dev]"]}


def imported(path: Path) -> set[str]:
    """First name after `gcalib.` of everything that a file imports from the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gcalib":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("gcalib.")}
    return found


def test_nothing_imports_upward() -> None:
    """The top of the package, imported for its version, counts as the highest floor but one."""
    level = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    seen = 0
    for path in (ROOT / "gcalib").rglob("*.py"):
        own = path.relative_to(ROOT / "gcalib").parts[0].removesuffix(".py")
        for name in imported(path) & set(level):
            seen += 1
            assert level[name] <= level[own], f"{path.name} imports {name} from a floor above"
    assert seen > 30
    modules = {path.stem for path in (ROOT / "gcalib").glob("*.py")}
    assert modules | {path.parent.name for path in (ROOT / "gcalib").glob("*/__init__.py")} == set(level)


def test_every_profile_is_valid() -> None:
    names = sorted(path.stem for path in (ROOT / "params").glob("*.yaml"))
    assert "smoke" in names
    for name in names:
        profile = Profile.load(name, ROOT / "params")
        assert profile.profile == name and profile.config().pair == profile.pair


def test_help_comes_without_loading_torch() -> None:
    code = "import sys; from gcalib.__main__ import app; sys.exit('torch' in sys.modules and 'altair' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_tracked_text_names_a_machine() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    texts = {".py", ".ipynb", ".md", ".yaml", ".yml"}
    paths = [ROOT / name for name in listed.stdout.split() if Path(name).suffix in texts]
    assert len(paths) > 20
    suspicious = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|Users)/\w")
    for path in paths:
        if path.exists() and path != Path(__file__):
            assert not suspicious.search(path.read_text()), path
