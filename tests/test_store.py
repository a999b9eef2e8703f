"""The store's files: merged, copied, damaged, unwritable, shared, of another results version."""

from __future__ import annotations

import errno
import multiprocessing
import os
import threading
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from filelock import Timeout

from gcalib.config import Profile, RunConfig, run_id
from gcalib.store import RESULTS_VERSION, RunStore, load_curves, load_results, record_sha256, write

ROOT = Path(__file__).parents[1]
CONFIGS = [
    RunConfig(pair="food-kitchen", gca=(0, 2), published=("official_attention",)),
    RunConfig(pair="food-kitchen", min_per_domain=0, seed=1),
    RunConfig(pair="cloth-sport", model="cdsrnp", latent=0),
]


def record_of(config: RunConfig, **more: Any) -> dict[str, Any]:
    """What `run` would store of a config: figures of every type, and one that only some models have."""
    figures = {"test.a.full.mrr": 0.1 + config.seed / 3, "best_epoch": 3, "stopped_early": True, "seconds": 1.5}
    name = run_id(config, "data", RESULTS_VERSION)
    own = {"support_users": 256} if config.model == "cdsrnp" else {"test.a.gca0.cos_mean_abs": 0.25}
    versions = {"results_version": RESULTS_VERSION, "data_sha256": "data"}
    return {"run_id": name, **config.model_dump(), **versions, **figures, **own, **more}


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    runs = RunStore(tmp_path)
    for config in CONFIGS:
        record = record_of(config)
        runs.put(record, [{"epoch": 0, "val.a.full.mrr": 0.01}, {"epoch": 1, "val.a.full.mrr": 0.2, "loss_a": 3.5}])
    return runs


def hashes(runs: RunStore) -> dict[str, str]:
    return {row["run_id"]: record_sha256(row) for row in load_results(runs.folder).to_dict("records")}


def test_record_comes_back_as_it_was_stored(store: RunStore) -> None:
    for config in CONFIGS:
        record = record_of(config)
        assert store.get(record["run_id"]) == record
    frame = load_results(store.folder).set_index("run_id")
    assert frame["gca"].tolist() == [store.get(name)["gca"] for name in frame.index]  # type: ignore[index]
    assert frame["published"].map(len).sum() == 1


def test_merged_store_holds_the_same_runs_in_two_files(store: RunStore) -> None:
    before, curves = hashes(store), load_curves(store.folder)
    records = {name: store.get(name) for name in store.names()}
    assert store.compact() == 3
    assert sorted(path.name for path in store.folder.rglob("*.[jp]*")) == ["curves.parquet", "records.parquet"]
    assert hashes(store) == before
    assert {name: store.get(name) for name in store.names()} == records
    pd.testing.assert_frame_equal(load_curves(store.folder), curves)
    assert set(pd.read_parquet(store.folder / "records.parquet")["run_id"]) == set(before)


def test_new_runs_stand_beside_merged_ones_and_join_them_later(store: RunStore) -> None:
    store.compact()
    new = record_of(RunConfig(pair="food-kitchen", seed=7), **{"test.a.new": 1.0})
    store.put(new, [{"epoch": 0.0, "loss_kl": 1.0}])
    assert len(load_results(store.folder)) == 4
    assert store.get(new["run_id"]) == new
    before, curves = hashes(store), load_curves(store.folder)
    assert store.compact() == 4 == store.compact()
    assert hashes(store) == before
    pd.testing.assert_frame_equal(load_curves(store.folder), curves)


def test_frame_has_the_named_runs_in_order(store: RunStore) -> None:
    first, second, _ = store.names()
    assert store.frame([second, first, second])["run_id"].tolist() == [second, first, second]
    assert set(load_curves(store.folder, [second])["run_id"]) == {second}


def test_run_in_both_places_counts_once(store: RunStore) -> None:
    """As a kill leaves it, between the writing of the merged files and the removal of the others."""
    kept = {path: path.read_bytes() for path in (store.folder / "runs").iterdir()}
    before = hashes(store)
    store.compact()
    for path, content in kept.items():
        path.write_bytes(content)
    assert hashes(store) == before
    assert len(load_curves(store.folder)) == 3 * 2
    assert store.compact() == 3


def test_copy_under_another_name_counts_once(store: RunStore) -> None:
    name = store.names()[0]
    copy = store.path("runs", f"{name} (conflicted copy)")
    copy.write_bytes(store.path("runs", name).read_bytes())
    assert len(store.names()) == len(load_results(store.folder)) == store.compact() == 3


def test_copy_that_looks_like_a_run_is_named(store: RunStore) -> None:
    """What a file holds counts, not what it is called: merging must not make one run two."""
    name = store.names()[0]
    copy = store.path("runs", "0123456789abcdef")
    copy.write_bytes(store.path("runs", name).read_bytes())
    for read in (lambda: load_results(store.folder), store.compact):
        with pytest.raises(
            ValueError, match=f"0123456789abcdef.json cannot be read .it is a copy of run {name}.: delete"
        ):
            read()


def test_table_that_holds_no_runs_is_named(store: RunStore) -> None:
    pd.DataFrame({"x": [1]}).to_parquet(store.folder / "records.parquet")
    with pytest.raises(ValueError, match="records.parquet cannot be read .it is not a table of runs"):
        load_results(store.folder)


def test_config_is_found_without_its_data(store: RunStore) -> None:
    for place in ("new", "merged"):
        runs = RunStore(store.folder)
        assert [runs.find(config) for config in CONFIGS] == [record_of(config)["run_id"] for config in CONFIGS], place
        assert runs.find(CONFIGS[0].replace(seed=9)) is None
        store.compact()
    other = {"run_id": run_id(CONFIGS[0], "newer", RESULTS_VERSION), "data_sha256": "newer"}
    store.put({**record_of(CONFIGS[0]), **other}, [])
    with pytest.raises(ValueError, match="several versions of food-kitchen: load the data"):
        RunStore(store.folder).find(CONFIGS[0])


def _compact_often(store: str, times: int) -> None:
    for _ in range(times):
        RunStore(store).compact()


def test_compaction_beside_a_reader_and_a_writer_loses_nothing(store: RunStore) -> None:
    record = record_of(CONFIGS[0])
    process = multiprocessing.get_context("spawn").Process(target=_compact_often, args=(str(store.folder), 40))
    process.start()
    count = 0
    while process.is_alive() or count < 40:
        store.put({**record, "run_id": f"{count:016d}"}, [{"epoch": 0}])
        count += 1
        assert len(load_results(store.folder)) == 3 + count
        assert store.get(f"{count - 1:016d}") is not None
        time.sleep(0.02)
    process.join()
    assert process.exitcode == 0
    assert store.compact() == 3 + count
    assert len(load_curves(store.folder)) == 3 * 2 + count


@pytest.mark.parametrize("version", [RESULTS_VERSION - 1, RESULTS_VERSION + 1])
def test_records_of_another_results_version_do_not_answer(store: RunStore, version: int) -> None:
    """They stay in the store, for a program of that version."""
    ours, config = store.names(), CONFIGS[0].replace(seed=9)
    theirs = record_of(config, run_id=run_id(config, "data", version), results_version=version)
    store.put(theirs, [{"epoch": 0}])
    for _ in ("new", "merged"):
        runs = RunStore(store.folder)
        assert runs.get(theirs["run_id"]) is None and runs.find(config) is None
        assert load_results(store.folder)["run_id"].tolist() == ours
        assert store.compact() == 4
    assert store.names() == ours


def test_record_older_than_a_field_means_its_default(store: RunStore) -> None:
    """Fields come with a default that says what was so before: old records are found, read and hashed with it."""
    record = record_of(CONFIGS[1])
    older = {key: value for key, value in record.items() if key not in ("objective", "negative_pools", "hidden")}
    before = hashes(store)[record["run_id"]]
    store.put(older, [])
    for _ in ("new", "merged"):
        assert store.get(record["run_id"]) == record
        assert RunStore(store.folder).find(CONFIGS[1]) == record["run_id"]
        frame = load_results(store.folder)
        assert set(frame["objective"]) == {"published"} and set(frame["negative_pools"]) == {1}
        assert hashes(store)[record["run_id"]] == before
        store.compact()


@pytest.mark.parametrize("damage", [lambda b: b[:100], lambda b: b.replace(b"0.25", b"0.26"), lambda _: b"[]"])
def test_damaged_run_is_named_with_what_to_do(store: RunStore, damage: Any) -> None:
    path = store.path("runs", record_of(CONFIGS[0])["run_id"])
    path.write_bytes(damage(path.read_bytes()))
    for read in (lambda: load_results(store.folder), store.compact, lambda: store.get(path.stem)):
        with pytest.raises(ValueError, match=f"{path.name} cannot be read .*: delete it to run it again"):
            read()
    path.unlink()
    assert len(load_results(store.folder)) == 2


@pytest.mark.parametrize("kind", ["records", "curves"])
def test_damaged_merged_file_is_named_with_what_to_do(store: RunStore, kind: str) -> None:
    store.compact()
    path = store.folder / f"{kind}.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    with pytest.raises(ValueError, match=f"{kind}.parquet cannot be read .*restore it from a copy"):
        load_results(store.folder) if kind == "records" else load_curves(store.folder)
    path.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])  # in a page, found by its checksum
    with pytest.raises(ValueError, match=f"{kind}.parquet cannot be read"):
        load_results(store.folder) if kind == "records" else load_curves(store.folder)


def test_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        write(tmp_path / "a.json", b"whole")
    assert not list(tmp_path.iterdir())


def test_locked_run_is_busy_for_others_until_it_is_free(tmp_path: Path) -> None:
    runs, held = RunStore(tmp_path), threading.Event()

    def hold() -> None:
        with RunStore(tmp_path).lock("a" * 16):
            held.set()
            time.sleep(0.3)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    with pytest.raises(Timeout), runs.lock("a" * 16, wait=False):
        pass
    with runs.lock("a" * 16):
        assert not thread.is_alive() or thread.join() is None


def test_lock_of_a_finished_run_leaves_nothing_behind(store: RunStore) -> None:
    name = store.names()[0]
    for kind in ("runs", "checkpoints", "models"):
        (store.folder / kind).mkdir(exist_ok=True)
        (store.folder / kind / f".{name}.0a1b2c3d").write_bytes(b"half")  # of a process that was killed
    with store.lock(name):
        pass
    assert not [path for path in store.folder.rglob("*") if path.is_file() and path.suffix != ".json"]


def test_frames_of_an_empty_store_are_empty(tmp_path: Path) -> None:
    assert load_results(tmp_path / "nothing").empty and load_curves(tmp_path / "nothing").empty
    assert RunStore(tmp_path / "nothing").names() == [] and RunStore(tmp_path).get("a" * 16) is None
    assert RunStore(tmp_path).find(CONFIGS[0]) is None and RunStore(tmp_path).compact() == 0


def test_hash_leaves_circumstances_out() -> None:
    record = record_of(CONFIGS[0])
    assert record_sha256(record) == record_sha256({**record, "seconds": 99.0, "device": "cuda"})
    assert record_sha256(record) != record_sha256({**record, "test.a.full.mrr": 0.2})


def test_trace_names_what_was_used(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCALIB_TRACE", str(store.folder / "trace"))
    load_results(store.folder)
    assert (store.folder / "trace").read_text().split("\n")[:-1] == [f"{k} {v}" for k, v in hashes(store).items()]


def test_every_committed_run_belongs_to_a_profile() -> None:
    runs = RunStore(ROOT / "results")
    profiles = [Profile.load(path.stem, path.parent) for path in (ROOT / "params").glob("*.yaml")]
    asked = {config for profile in profiles for config in profile.grid_configs()}
    records = [record for name in runs.names() if (record := runs.get(name))]
    stored = [RunConfig(**{field: record[field] for field in RunConfig.model_fields}) for record in records]
    assert len(stored) > 75
    assert [config for config in stored if config not in asked] == []
