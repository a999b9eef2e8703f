"""The command line: what it prints, and that what a user did wrong is one sentence."""

from __future__ import annotations

import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

import gcalib
from gcalib.__main__ import main
from gcalib.config import RunConfig
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
def command(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
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
    assert out == (
        "2 runs, 2 of them left, 2 of them like no stored run and not counted: "
        "about 0.0 hours of one process, 0.0 with 3.\n"
    )
    assert not (project / "results").exists()
    assert command("grid", "--profile", "two", "--workers", "1")[0] == 0
    assert len(RunStore("results").names()) == 2
    assert command("grid", "--profile", "params/two.yaml", "--dry-run")[1].startswith("2 runs, 0 of them left: ")
    assert command("compact")[1] == "results: 2 runs in two files\n"


def test_run_prints_its_record_and_results_a_line_each(command: Command) -> None:
    code, out, _ = command("run", "--pair", TINY, "--set", "model=markov", "--set", "seed=3")
    assert code == 0 and "test.a.full.ndcg@10" in out
    run_grid([RunConfig(pair=TINY, dim=8, heads=2, gca=(0,), epochs=1, warmup_epochs=0, negatives=8)], "results")
    _, out, _ = command("results")
    header, crossed, plain = out.splitlines()
    assert header.split() == [
        "run_id", "pair", "model", "gca", "match", "gate", "heads", "dim", "seed", "best_epoch",
        "test.a.full.ndcg@10", "test.b.full.ndcg@10",
    ]  # fmt: skip
    assert crossed.split()[2:8] == ["abxi", "0", "sigmoid", "2", "8", "0"]
    assert plain.split()[2:5] == ["markov", "64", "3"]  # which has neither gate nor heads


def test_results_of_an_empty_store_is_one_sentence(command: Command) -> None:
    assert command("results", "--store", "nothing") == (0, "nothing holds no finished run\n", "")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("run --set lr=-1 --set gac=0", "The run cannot be set so: lr: Input should be greater than 0; gac: Extra "
                                        "inputs are not permitted."),
        ("run --set gca=[3]", "The run cannot be set so: settings: Value error, gca=(3,): the insertion points are 0 "
                              "(early), 1 (mid) and 2 (late)."),
        ("run --set gca=[0", "--set gca=[0: write key=value with a YAML value."),
        ("grid --profile six", "There is no profile 'six' in params; there are two."),
        ("grid --profile elsewhere/two.yaml", "There is no profile 'elsewhere/two.yaml' in params; there are two."),
        ("grid --profile two --cpus 2 --gather", "cpus, gather: read by engine='ray' only."),
        ("grid --profile two --device tpu", "device='tpu' is unknown; the devices are auto, cpu and cuda."),
        ("notebooks --profile params/six.yaml", "There is no profile 'six' in params; there are two."),
        ("site", "There is no notebooks/ folder with notebooks here: run this in the root of the repository."),
    ],
)  # fmt: skip
def test_what_a_user_did_wrong_is_one_sentence(command: Command, arguments: str, sentence: str) -> None:
    code, _, err = command(*arguments.split())
    assert (code, err) == (2, f"{sentence}\n")


def test_pairs_are_listed_without_torch() -> None:
    code = "import sys, gcalib.__main__ as c\ntry: c.main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "pairs"], capture_output=True, text=True, check=False, timeout=60)
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
