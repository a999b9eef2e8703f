"""The run store: what is stored, what is reused, what happens when processes meet or things break."""

from __future__ import annotations

import json
import multiprocessing
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

import gcalib.experiments
from gcalib.config import Profile, RunConfig, run_id
from gcalib.data import sources
from gcalib.data.pair import DataError, Pair
from gcalib.experiments import run
from gcalib.grid import run_grid
from gcalib.records import RESULTS_VERSION, record_sha256
from gcalib.store import RunStore, load_curves, load_results

TINY = "synthetic:num_users=120,items_a=110,items_b=115"
ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "fixtures" / "golden_run.json"


def tiny_config(**changes: object) -> RunConfig:
    return RunConfig(**{"pair": TINY, "dim": 8, "heads": 2, "gca": (0,), "epochs": 2, "batch_size": 32, **changes})


def test_a_record_holds_the_config_its_costs_and_the_figures(tmp_path: Path) -> None:
    config = tiny_config(gca=(0, 1))
    record = run(config, tmp_path)
    assert {name: record[name] for name in RunConfig.model_fields} == config.model_dump()
    assert record["params_total"] == record["params_trainable"] > record["params_embedding"] > 0
    assert record["flops_per_step"] > 0 and record["seconds"] > 0 and record["peak_memory_bytes"] > 1e6
    assert record["epochs_trained"] == 2 and 1 <= record["best_epoch"] <= 2 and record["stopped_early"] is False
    for split in ("val", "test"):
        for domain in "ab":
            assert 0 <= record[f"{split}.{domain}.full.ndcg@10"] <= record[f"{split}.{domain}.full.hr@10"] <= 1
            for point in (0, 1):
                prefix = f"{split}.{domain}.gca{point}."
                assert 0 < record[prefix + "cos_mean_abs"] <= 1
                assert 0 < record[prefix + "cos_xy_mean_abs"] <= 1
                assert {"null_mean_abs", "null_perm_mean_abs", "null_init_mean_abs", "null_fresh_mean_abs"} <= {
                    key.removeprefix(prefix) for key in record if key.startswith(prefix)
                }
    assert not any(".s999." in key for key in record)  # the domain has too few items for 999 negatives
    json.dumps(record)


def test_a_finished_run_is_never_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tiny_config(), tmp_path)
    monkeypatch.setattr(gcalib.experiments, "_compute", lambda *_: pytest.fail("computed again"))
    assert run(tiny_config(), tmp_path) == first
    assert run_grid([tiny_config()] * 3, tmp_path)["run_id"].tolist() == [first["run_id"]] * 3


def test_fields_without_effect_make_no_second_run(tmp_path: Path) -> None:
    plain = run(tiny_config(gca=(), gate="tanh", heads=4), tmp_path)
    assert run(tiny_config(gca=(), gate="sigmoid", heads=2), tmp_path)["run_id"] == plain["run_id"]
    assert plain["gate"] == "sigmoid"


def test_a_stored_run_is_found_without_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = run(tiny_config(), tmp_path)

    def missing(*_: object) -> None:
        raise DataError("no such file")

    monkeypatch.setattr(gcalib.experiments, "_pair", missing)
    assert run(tiny_config(), tmp_path) == stored
    with pytest.raises(DataError, match="no such file"):
        run(tiny_config(seed=9), tmp_path)


def test_what_is_stored_asks_for_no_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object) -> None:
        raise DataError("a download was asked for")

    monkeypatch.delenv("GCALIB_DATA", raising=False)
    monkeypatch.setattr(sources, "cache", lambda: tmp_path)
    monkeypatch.setattr(sources, "_download", download)
    config = Profile.load("first", ROOT / "params").grid_configs()[0]
    (found,) = run_grid([config], ROOT / "results")["run_id"]
    assert run(config, ROOT / "results")["run_id"] == found
    with pytest.raises(DataError, match="a download was asked for"):
        run(config, tmp_path)


def test_the_golden_run_is_pinned_to_the_results_version(tmp_path: Path) -> None:
    """A change of results must raise RESULTS_VERSION. After raising it, rewrite the fixture with what this prints."""
    golden = json.loads(GOLDEN.read_text())
    config = tiny_config(gca=(0, 1, 2), gate="tanh", seed=3)
    record = run(config, tmp_path)
    figures = {key: value for key, value in record.items() if key.startswith(("val.", "test."))}
    defaults = {name: field.default for name, field in RunConfig.model_fields.items() if name != "pair"}
    now = {"results_version": RESULTS_VERSION, "run_id": record["run_id"], "defaults": defaults, "figures": figures}
    print(json.dumps(now, indent=1, default=list))
    hint = "results changed: raise RESULTS_VERSION and rewrite tests/fixtures/golden_run.json"
    assert golden["results_version"] == RESULTS_VERSION, hint
    # Fields added later may appear: with their default, they rename no run.
    assert json.loads(json.dumps(defaults)) | golden["defaults"] == json.loads(json.dumps(defaults)), hint
    assert record["run_id"] == golden["run_id"], hint
    # Other processors round matrix products otherwise; a real change of results moves figures far more.
    found = {key: figures[key] for key in golden["figures"]}
    assert found == pytest.approx(golden["figures"], rel=2e-3, abs=2e-4), hint


def test_run_id_depends_on_config_data_and_version_only() -> None:
    config = tiny_config()
    name = run_id(config, "data", 1)
    assert name == run_id(config.but(pair="another/path"), "data", 1)  # the data's hash speaks for the pair
    others = [
        run_id(config.but(seed=1), "data", 1), run_id(config, "other", 1), run_id(config, "data", 2),
        run_id(config.but(gca=()), "data", 1), run_id(config.but(gate="tanh"), "data", 1),
    ]  # fmt: skip
    assert len({name, *others}) == 6


_both_are_here: Barrier  # set in each process


def _set_up_process(barrier: Barrier, computed: Path) -> None:
    """Have a process write to a file what it really computes; `barrier` is where both meet before each run."""
    global _both_are_here
    _both_are_here, real = barrier, gcalib.experiments._compute

    def noted(config: RunConfig, pair: Pair, name: str, *others: object) -> object:
        with computed.open("a") as file:
            file.write(f"{name}\n")
        return real(config, pair, name, *others)

    gcalib.experiments._compute = noted


def _run_in_process(arguments: tuple[dict[str, object], str]) -> str:
    fields, store = arguments
    _both_are_here.wait(60)
    return run(RunConfig(**fields), store)["run_id"]


def test_two_processes_on_one_store_lose_and_repeat_nothing(tmp_path: Path) -> None:
    """Both ask for each run at once; it is computed once, and all records equal the serial ones."""
    configs = [tiny_config(seed=seed) for seed in range(3)]
    serial = run_grid(configs, tmp_path / "serial")
    shared = tmp_path / "shared"
    work = [(config.model_dump(), str(shared)) for config in configs for _ in range(2)]
    context, computed = multiprocessing.get_context("spawn"), tmp_path / "computed"
    with context.Pool(2, _set_up_process, (context.Barrier(2), computed)) as pool:
        names = pool.map(_run_in_process, work, chunksize=1)
    assert sorted(names) == sorted(serial["run_id"].tolist() * 2)
    assert sorted(computed.read_text().split()) == sorted(serial["run_id"])
    parallel = load_results(shared)
    assert {record_sha256(r) for r in parallel.to_dict("records")} == {
        record_sha256(r) for r in serial.to_dict("records")
    }
    left = {path.suffix for path in shared.rglob("*") if path.is_file()}
    assert left <= {".parquet", ".lock"} and not list((shared / "locks").iterdir())


def test_frames_of_an_empty_store_are_empty(tmp_path: Path) -> None:
    assert load_results(tmp_path / "nothing").empty and load_curves(tmp_path / "nothing").empty


def test_curves_start_at_the_untrained_model(tmp_path: Path) -> None:
    record = run(tiny_config(), tmp_path)
    curves = load_curves(tmp_path)
    assert curves["epoch"].tolist() == [0, 1, 2] and set(curves["run_id"]) == {record["run_id"]}
    assert pd.isna(curves["loss_a"].iloc[0]) and curves["loss_a"].iloc[1:].gt(0).all()
    assert load_curves(tmp_path, [record["run_id"]]).equals(curves)


def test_the_trace_names_what_was_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCALIB_TRACE", str(tmp_path / "trace"))
    record = run(tiny_config(), tmp_path / "store")
    line = f"{record['run_id']} {record_sha256(record)}"
    assert (tmp_path / "trace").read_text().splitlines() == [line]
    load_results(tmp_path / "store")
    assert (tmp_path / "trace").read_text().splitlines() == [line] * 2  # a frame's row hashes like the record


def test_a_record_older_than_a_field_means_its_default(tmp_path: Path) -> None:
    """Fields come with a default that says what was so before: old records are found, read and hashed with it."""
    record = run(tiny_config(), tmp_path)
    path = RunStore(tmp_path).record_path(record["run_id"])
    whole = pq.read_table(path)
    pq.write_table(whole.drop_columns(["negative_groups", "objective", "layers"]), path)
    found = RunStore(tmp_path).find(tiny_config())
    assert found is not None
    assert (found["negative_groups"], found["objective"], found["layers"]) == (1, "published", None)
    assert record_sha256(found) == record_sha256(record)
    frame = load_results(tmp_path)
    assert frame["negative_groups"].item() == 1 and frame["objective"].item() == "published"
    run(tiny_config(negative_groups=3), tmp_path)  # a newer record beside it
    frame = load_results(tmp_path).sort_values("negative_groups")
    assert frame["negative_groups"].tolist() == [1, 3] and RunStore(tmp_path).find(tiny_config()) is not None
    rows = {row["run_id"]: record_sha256(row) for row in frame.to_dict("records")}
    assert rows[record["run_id"]] == record_sha256(record)


def test_a_matched_run_records_both_sizes_and_what_was_widened(tmp_path: Path) -> None:
    with_gca = run(tiny_config(dim=16), tmp_path)
    twin = run(tiny_config(dim=16, match="params", match_axis="hidden"), tmp_path)
    assert twin["match_size"] == twin["params_network"] and twin["match_target"] == with_gca["params_network"]
    assert abs(twin["params_network"] / with_gca["params_network"] - 1) <= 0.01
    assert twin["gca"] == (0,) and twin["match_hidden"] > 16 and not any(".gca0." in key for key in twin)
    assert twin["params_embedding"] == with_gca["params_embedding"]
    assert run(tiny_config(dim=16, match="params", match_axis="hidden", heads=4), tmp_path)["run_id"] == twin["run_id"]
