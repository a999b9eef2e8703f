"""The store's files: merged, damaged, unwritable, shared, stale."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import time
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

import gcalib.records
import gcalib.store
from gcalib.config import RunConfig
from gcalib.experiments import run
from gcalib.grid import run_grid
from gcalib.records import RESULTS_VERSION, record_sha256, write
from gcalib.store import RunStore, load_curves, load_results

TINY = "synthetic:num_users=60,items_a=60,items_b=60"


def tiny_config(**changes: object) -> RunConfig:
    return RunConfig(**{"pair": TINY, "dim": 8, "heads": 2, "epochs": 1, "batch_size": 32, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of three runs, which tests copy what they need of."""
    folder = tmp_path_factory.mktemp("store")
    for config in (tiny_config(), tiny_config(gca=(0,)), tiny_config(gca=(0,), match="params", match_axis="hidden")):
        run(config, folder)
    return folder


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    for path in made.rglob("*.parquet"):
        target = tmp_path / path.relative_to(made)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    return tmp_path


def hashes(store: Path) -> dict[str, str]:
    return {row["run_id"]: record_sha256(row) for row in load_results(store).to_dict("records")}


def test_a_compacted_store_holds_the_same_runs_in_two_files(store: Path) -> None:
    runs, before, curves = RunStore(store), hashes(store), load_curves(store)
    records = {name: runs.get(name) for name in runs.names()}
    assert runs.compact() == 3
    assert sorted(path.name for path in store.rglob("*.parquet")) == ["compacted.parquet"] * 2
    assert hashes(store) == before and load_curves(store).equals(curves)
    assert {name: runs.get(name) for name in runs.names()} == records
    assert runs.find(tiny_config(gca=(0,))) == next(r for r in records.values() if r and r["gca"] and not r["match"])
    # one line for pandas
    assert set(pd.read_parquet(store / "records" / "compacted.parquet")["run_id"]) == set(before)
    # newer runs stand beside the merged ones, and join them the next time
    new = run(tiny_config(seed=1), store)
    assert len(load_results(store)) == 4 and runs.compact() == 4 and runs.get(new["run_id"]) == new
    assert runs.compact() == 4


def test_a_run_that_is_in_both_files_counts_once(store: Path) -> None:
    """A kill between the merged file's renaming and the removal of the loose ones leaves both."""
    kept = {path: path.read_bytes() for path in store.rglob("*.parquet")}
    before = hashes(store)
    RunStore(store).compact()
    for path, content in kept.items():
        path.write_bytes(content)
    assert hashes(store) == before and len(load_curves(store)) == 3 * 2
    assert RunStore(store).compact() == 3 and hashes(store) == before


def _compact_often(store: str, times: int) -> None:
    for _ in range(times):
        RunStore(store).compact()


def test_compaction_beside_a_reader_and_a_writer_loses_nothing(store: Path) -> None:
    record = RunStore(store).get(RunStore(store).names()[0])
    assert record is not None
    process = multiprocessing.get_context("spawn").Process(target=_compact_often, args=(str(store), 60))
    process.start()
    count = 0
    while process.is_alive() or count < 40:
        RunStore(store).put({**record, "run_id": f"{count:016d}"}, [{"epoch": 0.0}])
        count += 1
        assert len(load_results(store)) == 3 + count and RunStore(store).get(f"{count - 1:016d}") is not None
    process.join()
    assert process.exitcode == 0
    assert RunStore(store).compact() == 3 + count and len(load_curves(store)) == 3 * 2 + count


def test_records_of_an_older_results_version_are_stale_and_say_why(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {RESULTS_VERSION: "as before", RESULTS_VERSION + 1: "the loss was wrong"}
    for module in (gcalib.records, gcalib.store):
        monkeypatch.setattr(module, "CHANGES", changes)
        monkeypatch.setattr(module, "RESULTS_VERSION", RESULTS_VERSION + 1)
    assert load_results(store).empty
    marked = load_results(store, stale=True)
    assert marked["stale"].tolist() == ["the loss was wrong"] * 3
    assert RunStore(store).find(tiny_config()) is None
    monkeypatch.undo()
    assert load_results(store, stale=True)["stale"].tolist() == [""] * 3


def test_a_damaged_record_is_named(store: Path) -> None:
    path = RunStore(store).record_path(RunStore(store).names()[0])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{path.name} cannot be read .*: delete it to run it again"):
        load_results(store)
    with pytest.raises(ValueError, match=path.name):
        RunStore(store).compact()
    path.unlink()
    assert len(load_results(store)) == 2


def test_a_full_disk_costs_the_record_but_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pq.write_table

    def full(table: object, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="could not be written: No space left on device"):
        run(tiny_config(), tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix not in (".pt", ".lock")]
    monkeypatch.setattr(pq, "write_table", real)
    monkeypatch.setattr(gcalib.training.Trainer, "steps", lambda *_: pytest.fail("trained again"))
    record = run(tiny_config(), tmp_path)  # from the checkpoint of the last epoch
    assert record["epochs_trained"] == 1 and not list((tmp_path / "checkpoints").iterdir())


def test_a_store_that_cannot_be_written_says_so_before_training(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(gcalib.store.FileLock, "acquire", read_only)
    monkeypatch.setattr(gcalib.experiments, "_compute", lambda *_: pytest.fail("trained for nothing"))
    assert run(tiny_config(), store)["model"] == "abxi"  # what is stored can be read
    with pytest.raises(OSError, match=r"cannot be written \(Read-only file system\), and run \w{16} is not in it"):
        run(tiny_config(seed=5), store)


def test_temporary_files_of_two_machines_never_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes on two machines may have the same number."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    seen: list[str] = []
    monkeypatch.setattr(pq, "write_table", lambda table, path, **_: (seen.append(str(path)), Path(path).touch()))
    for _ in range(20):
        write(tmp_path / "name.parquet", None)  # type: ignore[arg-type]
    assert len(set(seen)) == 20 and all(Path(name).name.startswith(".name.") for name in seen)


def test_what_a_killed_process_left_is_removed_by_whoever_takes_up_its_run(store: Path) -> None:
    name = RunStore(store).names()[0]
    for kind in ("records", "curves", "checkpoints"):
        (store / kind).mkdir(exist_ok=True)
        (store / kind / f".{name}.0a1b2c3d").write_bytes(b"half")
    (store / "locks").mkdir(exist_ok=True)
    (store / "locks" / f"{name}.lock").touch()  # the system frees it, but does not remove it
    RunStore(store).record_path(name).unlink()
    RunStore(store).curve_path(name).unlink()
    run_grid([tiny_config(), tiny_config(gca=(0,)), tiny_config(gca=(0,), match="params", match_axis="hidden")], store)
    assert not [path for path in store.rglob(".*")]


def test_a_clock_that_goes_back_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backwards = itertools.count(1_000_000, -3600)
    monkeypatch.setattr(time, "time", lambda: float(next(backwards)))
    record = run(tiny_config(seed=2), tmp_path)
    assert 0 < record["seconds"] < 600 and run(tiny_config(seed=2), tmp_path) == record
