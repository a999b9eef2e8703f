"""Several seeds in one process: each ends as alone, whatever the others do, and whatever happens to the process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import pandas as pd
import pytest
import torch

from gcalib.config import RunConfig
from gcalib.experiments import run
from gcalib.grid import GridError, run_grid
from gcalib.records import CIRCUMSTANCES, equal
from gcalib.seeds import grouped, run_seeds
from gcalib.store import RunStore, load_curves
from gcalib.training import DivergedError, Trainer

TINY = "synthetic:num_users=90,items_a=60,items_b=70"


def tiny_config(**changes: object) -> RunConfig:
    return RunConfig(**{"pair": TINY, "dim": 8, "heads": 2, "gca": (0,), "epochs": 3, "batch_size": 32, **changes})


def seeds(**changes: object) -> list[RunConfig]:
    return [tiny_config(seed=seed, **changes) for seed in range(3)]


def assert_equal(found: pd.DataFrame, alone: pd.DataFrame) -> None:
    assert found.columns.tolist() == alone.columns.tolist() and len(found) == len(alone) > 0
    for one, other in zip(found.to_dict("records"), alone.to_dict("records"), strict=True):
        expected = {key: None if equal(value, None) else value for key, value in other.items()}
        assert [key for key in other if key not in CIRCUMSTANCES and not equal(one[key], expected[key])] == []


def test_groups_differ_by_the_seed_alone() -> None:
    a, b = seeds(), seeds(dim=16)
    assert grouped([a[0], b[2], a[1], b[0], a[2]], 2) == [[a[0], a[1]], [b[2], b[0]], [a[2]]]
    assert grouped([*a, *b], 1) == [[config] for config in (*a, *b)]


@pytest.mark.parametrize(
    "changes",
    [
        # some stop early, at epochs of their own, after cuts of the learning rate of their own
        {"epochs": 12, "lr": 0.03, "warmup_epochs": 0, "plateau_patience": 0, "stop_patience": 2},
        {"model": "cdsrnp", "support": 16},  # draws its support and its latent from torch's generator
        {"match": "params", "match_axis": "hidden"},
    ],
)
def test_each_seed_ends_as_alone(tmp_path: Path, changes: dict[str, object]) -> None:
    configs = seeds(**changes)
    alone = run_grid(configs, tmp_path / "alone")
    state = torch.get_rng_state()
    together = run_grid(configs, tmp_path / "together", seeds_at_once=3)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's generator is left as it was
    assert_equal(together, alone)
    assert load_curves(tmp_path / "together").equals(load_curves(tmp_path / "alone"))
    if "epochs" in changes:
        assert alone["stopped_early"].any() and alone["epochs_trained"].nunique() > 1
    left = [path.parent.name for path in (tmp_path / "together").rglob("*") if path.is_file()]
    assert sorted(left) == ["curves"] * 3 + ["records"] * 3


def test_turns_are_steps_and_a_pause_costs_a_run_no_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[int] = []
    original = Trainer.step

    def noted(trainer: Trainer, *arguments: object) -> object:
        order.append(trainer.config.seed)
        return original(trainer, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "step", noted)
    began = time.perf_counter()
    frame = run_grid(seeds(), tmp_path, seeds_at_once=3)
    assert order[:6] == [0, 1, 2] * 2
    assert frame["seconds"].sum() < time.perf_counter() - began


def test_a_seed_that_diverges_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = seeds()
    alone = run_grid(configs, tmp_path / "alone")
    original = Trainer.steps

    def steps(trainer: Trainer, lr: float) -> Generator[None, None, dict[str, float]]:
        losses = yield from original(trainer, lr)
        if trainer.config.seed == 1 and lr > 2 * trainer.config.lr / 6:  # in the third epoch
            raise DivergedError("no longer finite")
        return losses

    monkeypatch.setattr(Trainer, "steps", steps)
    with pytest.raises(GridError, match="1 run.s. failed.*no longer finite") as failed:
        run_grid(configs, tmp_path / "together", seeds_at_once=3)
    assert list(failed.value.failures) == [configs[1].canonical()]
    monkeypatch.undo()
    others = run_grid([configs[0], configs[2]], tmp_path / "together")
    assert_equal(others, alone.iloc[[0, 2]])


def test_seeds_that_are_stored_are_fetched(tmp_path: Path) -> None:
    stored = run(tiny_config(seed=1), tmp_path)
    found = dict(run_seeds(seeds(), tmp_path))
    assert found[tiny_config(seed=1)] == stored["run_id"] and len(set(found.values())) == 3


def test_a_kill_changes_no_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """SIGKILL once every seed has a checkpoint, start again: each resumes, and ends as alone."""
    configs = seeds(epochs=10)
    alone = run_grid(configs, tmp_path / "alone")
    store = RunStore(tmp_path / "killed")
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from gcalib import RunConfig, run_grid\n"
        f"run_grid([RunConfig(**fields) for fields in {[config.model_dump() for config in configs]}],"
        f" {str(store.folder)!r}, seeds_at_once=3)"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    checkpoints = [store.checkpoint_path(name) for name in alone["run_id"]]
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in checkpoints):
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoints were written"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    epochs = [torch.load(path, weights_only=True)["state"]["epoch"] for path in checkpoints]
    assert store.names() == [] and min(epochs) >= 1
    with caplog.at_level("INFO", "gcalib"):
        assert_equal(run_grid(configs, store.folder, seeds_at_once=3), alone)
    assert [f"{path.stem}: resumed after epoch" in caplog.text for path in checkpoints] == [True] * 3
    assert load_curves(store.folder).equals(load_curves(tmp_path / "alone"))


def _grid_in_process(fields: list[dict[str, object]], store: str) -> list[str]:
    return run_grid([RunConfig(**each) for each in fields], store, seeds_at_once=2)["run_id"].tolist()


def test_workers_and_processes_share_groups_without_waiting_for_each_other(tmp_path: Path) -> None:
    configs = [*seeds(), *seeds(gca=())]
    alone = run_grid(configs, tmp_path / "alone")
    assert_equal(run_grid(configs, tmp_path / "workers", workers=2, seeds_at_once=2), alone)
    fields = [config.model_dump() for config in configs[:3]]
    orders = [(order, str(tmp_path / "shared")) for order in (fields, fields[::-1])]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        forward, backward = pool.starmap(_grid_in_process, orders)
    assert forward == backward[::-1]
    assert_equal(run_grid(configs[:3], tmp_path / "shared"), run_grid(configs[:3], tmp_path / "alone"))


def test_it_is_for_the_local_engine(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seeds_at_once=2: it must be 1 or more, and is read by engine='local' only"):
        run_grid(seeds(), tmp_path, engine="ray", seeds_at_once=2)
    with pytest.raises(ValueError, match="seeds_at_once=0: it must be 1 or more"):
        run_grid(seeds(), tmp_path, seeds_at_once=0)
