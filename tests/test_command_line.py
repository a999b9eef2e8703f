"""The command line: what it prints, and that what a user did wrong is one sentence."""

from __future__ import annotations

import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
import yaml

import gcalib
from gcalib.__main__ import main
from gcalib.config import RunConfig
from gcalib.data.sources import load_pair
from gcalib.experiments import run_grid
from gcalib.store import RunStore

TINY = "synthetic:num_users=60,items_a=60,items_b=60"
ROOT = Path(__file__).parents[1]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a profile of two runs that take no training."""
    (tmp_path / "params").mkdir()
    content = {"pair": TINY, "seeds": [0, 1], "workers": 3, "grid": [{"models": ["popularity"]}]}
    (tmp_path / "params" / "two.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Run the command line here: exit code, standard output, standard error."""
    before = signal.getsignal(signal.SIGTERM)  # which `gcalib grid` sets

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gcalib", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    yield call
    signal.signal(signal.SIGTERM, before)


def test_grid_says_what_is_left_and_runs_it(command: Command, project: Path) -> None:
    code, out, _ = command("grid", "--profile", "two", "--dry-run")
    assert code == 0
    assert out == ("2 of 2 runs left: 0.0 hours of one process, 0.0 with 3; 2 without a comparable record.\n")
    assert not (project / "results").exists()
    assert command("grid", "--profile", "two", "--workers", "1")[0] == 0
    assert len(RunStore("results").names()) == 2
    assert command("grid", "--profile", "two", "--dry-run")[1].startswith("0 of 2 runs left: ")
    assert command("compact")[1] == "results: 2 runs in two files\n"


def test_run_prints_its_record(command: Command) -> None:
    code, out, _ = command("run", "--pair", TINY, "--set", "model=markov", "--set", "seed=3")
    assert code == 0 and "test.a.full.ndcg@10" in out


def test_results_are_a_line_each_without_the_gate_of_runs_that_have_none(command: Command) -> None:
    run_grid([RunConfig(pair=TINY, dim=8, heads=2, gca=(0,), epochs=1, warmup_epochs=0, negatives=8)], "results")
    command("run", "--pair", TINY, "--set", "model=markov", "--set", "seed=3")
    _, with_gate, without = command("results")[1].splitlines()[-3:]
    assert with_gate.split()[2:8] == ["abxi", "0", "8", "0", "sigmoid", "2"]
    assert without.split()[2:6] == ["markov", "64", "3", "0"]


def test_results_show_what_rows_that_look_alike_differ_in(command: Command, project: Path) -> None:
    for items in (60, 50):
        folder = project / "shop"
        folder.mkdir(exist_ok=True)
        for name in "ab":
            rows = [f"u{n % 12},{name}{n * 7 % items},{n}" for n in range(150)]
            (folder / f"{name}.csv").write_text("user,item,timestamp\n" + "\n".join(rows))
        for length in (50, 9):
            command("run", "--pair", "shop", "--set", "model=markov", "--set", f"max_length={length}")
    header, *rows = command("results")[1].splitlines()
    assert {"data", "max_length"} <= set(header.split())
    assert "lr" not in header.split()
    assert len({tuple(row.split()[1:9]) for row in rows}) == len(rows) == 4


@pytest.mark.parametrize("form", ["inter", "jsonl.gz"])
def test_files_as_people_have_them_are_run_and_described(command: Command, project: Path, form: str) -> None:
    """Two files of RecBole's form, and of the 2023 release's: from files to a record."""
    pair = load_pair(TINY)
    (project / "shop").mkdir()
    for letter, domain in (("food", 0), ("kitchen", 1)):
        mine = pair.domain_of(pair.items) == domain
        table = pd.DataFrame(
            {"user_id": pair.owner[mine], "parent_asin": pair.items[mine], "timestamp": pair.times[mine]}
        )
        table["parent_asin"] = letter + table["parent_asin"].astype(str)
        if form == "inter":
            table.columns = ["user_id:token", "item_id:token", "timestamp:float"]
            table.to_csv(project / "shop" / f"{letter}.inter", sep="\t", index=False)
        else:
            table["timestamp"] *= 1000
            table.assign(title="Good").to_json(project / "shop" / f"{letter}.jsonl.gz", orient="records", lines=True)
    described = command("pairs", "shop")[1]
    assert described.startswith("shop: 60 users, in time order; food: ")
    code, out, _ = command("run", "--pair", "shop", "--set", "dim=8", "--set", "epochs=1", "--set", "negatives=8")
    assert code == 0
    assert out.startswith(described)
    assert "test.b.full.ndcg@10" in out
    columns = "columns={user: user_id, timestamp: time}"
    assert "there is no column 'time'" in command("pairs", "shop", "--set", columns)[2]


def test_results_of_an_empty_store_is_one_sentence(command: Command) -> None:
    assert command("results", "--store", "nothing") == (0, "nothing holds no finished run\n", "")


def test_profile_may_be_named_by_its_file(command: Command) -> None:
    assert command("grid", "--profile", "params/two.yaml", "--dry-run")[1].startswith("2 of 2 runs left: ")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("run --set lr=-1 --set gac=0", "lr: Input should be greater than 0; gac: Extra inputs are not permitted"),
        ("run --set gca=[0,3]", "gca.1: Input should be 0, 1 or 2"),
        ("grid --profile six", "There is no profile 'six' in params; there are two."),
        ("grid --profile two --device tpu", "device='tpu' is unknown; the devices are auto, cpu and cuda."),
        ("notebooks --profile six", "There is no profile 'six' in params; there are two."),
        ("site", "There is no notebooks/ folder with notebooks here: run this in the root of the repository."),
    ],
)  # fmt: skip
def test_what_a_user_did_wrong_is_one_sentence(command: Command, arguments: str, sentence: str) -> None:
    code, _, err = command(*arguments.split())
    assert (code, err) == (2, f"{sentence}\n")


def test_value_that_is_no_yaml_is_quoted(command: Command) -> None:
    code, _, err = command("run", "--set", "gca=[0")
    assert code == 2 and "[0" in err and err.count("\n") == 1


def test_pairs_are_listed_without_torch() -> None:
    code = "import sys, gcalib.__main__ as c\ntry: c.main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "pairs"], capture_output=True, text=True, check=False, timeout=60
    )
    assert "sport-phone-open" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


def test_public_names_are_importable_and_listed() -> None:
    assert all(getattr(gcalib, name) is not None for name in gcalib.__all__)
    assert set(gcalib.__all__) <= set(dir(gcalib))
    with pytest.raises(AttributeError, match="no attribute 'rnu'"):
        _ = gcalib.rnu


def test_version_is_that_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert gcalib.__version__ == project["version"]
    assert project["scripts"]["gcalib"] == "gcalib.__main__:main"
