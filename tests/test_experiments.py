"""Single runs: what a record holds, what is fetched instead of trained, what breaks, and the trained model in hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import gcalib.experiments
import gcalib.store
from gcalib.config import Profile, RunConfig, run_id
from gcalib.data import sources
from gcalib.data.pair import DataError, NoDataError
from gcalib.data.sources import load_pair
from gcalib.evaluation import evaluate, score
from gcalib.experiments import DRAWS, load_model, pair_of, run, run_grid
from gcalib.models.matching import build_model
from gcalib.store import RESULTS_VERSION, load_curves, record_sha256

TINY = "synthetic:num_users=90,items_a=110,items_b=115"
ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "fixtures" / "golden_run.json"
PINNED = (
    ".full.mrr", ".full.auc", ".cos_mean_abs", ".gated_cos_mean_abs", ".null_mean_abs", ".null_initial_mean_abs",
    ".norm_x_prime",
)  # fmt: skip


def tiny_config(**changes: object) -> RunConfig:
    return RunConfig(**{"pair": TINY, "dim": 8, "heads": 2, "gca": (0,), "epochs": 2, "batch_size": 32, **changes})


def counted(**changes: object) -> RunConfig:
    """A run that takes no training."""
    return RunConfig(**{"pair": TINY, "model": "popularity", **changes})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a run whose weights were kept."""
    folder = tmp_path_factory.mktemp("store")
    run(tiny_config(gca=(0, 1)), folder, keep_model=True)
    return folder


def never(*_: object, **__: object) -> None:
    pytest.fail("trained again")


def test_record_holds_the_config_its_costs_and_the_figures(store: Path) -> None:
    config = tiny_config(gca=(0, 1))
    record = run(config, store)
    assert {name: record[name] for name in RunConfig.model_fields} == config.model_dump()
    assert record["params_total"] == record["params_trainable"] > record["params_embedding"] > 0
    assert record["flops_per_step"] > 0 and record["seconds"] > 0 and record["peak_memory_bytes"] > 1e6
    assert record["epochs_trained"] == 2 and 1 <= record["best_epoch"] <= 2 and record["stopped_early"] is False
    assert record["precision_used"] == "fp32" and record["has_global_order"] is True
    for split in ("val", "test"):
        for domain in "ab":
            assert 0 <= record[f"{split}.{domain}.full.ndcg@10"] <= record[f"{split}.{domain}.full.hr@10"] <= 1
            for point in (0, 1):
                prefix = f"{split}.{domain}.gca{point}."
                for level in ("cos", "gated_cos", "cos_xy", "null", "null_perm"):
                    assert 0 < record[f"{prefix}{level}_mean_abs"] <= 1
                for level in ("null_initial", "null_reinitialised"):
                    assert (f"{prefix}{level}_mean_abs" in record) == (split == "test")
                assert 0 < record[f"{prefix}fixed_cos_abs_of_mean"] <= 1
    assert not any(".s999." in key for key in record)  # the domains have too few items for 999 negatives
    assert not any(key.startswith("best_test.") for key in record)
    json.dumps(record)


def test_curves_start_at_the_untrained_model(store: Path) -> None:
    curves = load_curves(store)
    assert curves["epoch"].tolist() == [0, 1, 2]
    assert np.isnan(curves["loss_a"].iloc[0]) and (curves["loss_a"].iloc[1:] > 0).all()


def test_nulls_of_an_untrained_module_are_measured_in_the_trained_model(store: Path) -> None:
    """With the weights that the run began with, and with those of the seeds after its own."""
    config, pair = tiny_config(gca=(0, 1)), pair_of(tiny_config())
    record = run(config, store)
    trained, levels = load_model(record["run_id"], store).state_dict(), []
    for seed in range(1 + DRAWS):
        torch.manual_seed(seed)
        model = build_model(config, pair)
        own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("gca.")}
        model.load_state_dict(trained | own)
        levels.append(evaluate(model, pair, "test", protocols=()))
    for module in ("a.gca0", "b.gca0", "a.gca1", "b.gca1"):
        initial, *others = (level[f"{module}.cos_mean_abs"] for level in levels)
        assert record[f"test.{module}.null_initial_mean_abs"] == pytest.approx(initial)
        assert record[f"test.{module}.null_reinitialised_mean_abs"] == pytest.approx(np.mean(others))
        assert abs(initial - np.mean(others)) > 1e-6


def test_best_on_test_is_what_selection_on_test_would_report(tmp_path: Path) -> None:
    record = run(tiny_config(track_test=True, epochs=5, eval_every=2, lr=0.03), tmp_path)
    curves = load_curves(tmp_path).set_index("epoch")
    metrics = [name for name in record if name.startswith("test.") and name.split(".")[2] in ("full", "s100")]
    assert {name for name in record if name.startswith("best_test.")} == {f"best_{name}" for name in metrics}
    assert len(metrics) >= 20
    for name in metrics:
        assert curves[name].notna().tolist() == [True, False, True, False, True, True]
        assert record[name] == curves.loc[record["best_epoch"], name]
        assert record[f"best_{name}"] == curves.loc[1:, name].max() >= record[name]


def test_best_on_test_is_each_figure_s_own_and_not_the_untrained_model_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prescribed = [(0.9, 0.9), (0.1, 0.4), (0.3, 0.2)]  # of the untrained model, of epochs 1 and 2

    def validate(_: object) -> dict[str, float]:
        mrr, auc = prescribed.pop(0)
        val = {"val.a.full.mrr": mrr, "val.b.full.mrr": mrr}
        return {**val, "test.a.full.mrr": mrr, "test.b.s999.auc": auc, "test.a.full_seen.mrr": 1.0, "test.a.targets": 9}

    monkeypatch.setattr(gcalib.training.Trainer, "validate", validate)
    record = run(tiny_config(track_test=True), tmp_path)
    best = {name: value for name, value in record.items() if name.startswith("best_test.")}
    assert best == {"best_test.a.full.mrr": 0.3, "best_test.b.s999.auc": 0.4}


def test_best_on_test_of_a_model_that_is_not_trained_is_left_out(tmp_path: Path) -> None:
    record = run(counted(track_test=True), tmp_path)
    assert record["test.a.full.mrr"] > 0
    assert not any(name.startswith("best_test.") for name in record)


def test_finished_run_is_never_trained_again(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gcalib.experiments, "fit", never)
    first = run(tiny_config(gca=(0, 1)), store)
    assert run(tiny_config(gca=(1, 0)), store, keep_model=True) == first
    assert run_grid([tiny_config(gca=(0, 1))] * 3, store)["run_id"].tolist() == [first["run_id"]] * 3


def test_fields_without_effect_make_no_second_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run(counted(gate="tanh", heads=2), tmp_path)
    monkeypatch.setattr(gcalib.experiments, "fit", never)
    assert run(counted(stop_patience=3), tmp_path) == plain
    assert plain["gate"] == "sigmoid"


def test_stored_run_is_found_without_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = run(counted(), tmp_path)

    def missing(*_: object, **__: object) -> None:
        raise NoDataError("no such file")

    monkeypatch.setattr(gcalib.experiments, "_pair", missing)
    assert run(counted(), tmp_path) == stored
    with pytest.raises(DataError, match="no such file"):
        run(counted(max_length=9), tmp_path)


def own_data(folder: Path, users: int = 60) -> Path:
    """Two tables of a small pair, in a folder that is returned."""
    pair = load_pair(f"synthetic:num_users={users},items_a=60,items_b=60")
    folder.mkdir(parents=True, exist_ok=True)
    for letter, domain in (("a", 0), ("b", 1)):
        mine = pair.domain_of(pair.items) == domain
        table = pd.DataFrame({"user": pair.owner[mine], "item": pair.items[mine], "timestamp": pair.times[mine]})
        table.assign(item=letter + table["item"].astype(str)).to_csv(folder / f"{letter}.csv", index=False)
    return folder


def test_files_that_became_bad_are_refused(tmp_path: Path) -> None:
    """Bad data is not missing data: a stored run of what the files were says nothing of what they are."""
    folder = own_data(tmp_path / "shop")
    config = counted().replace(pair=str(folder))
    run(config, tmp_path / "store")
    with open(folder / "a.csv", "a") as file:
        file.write("u,i,soon\n")
    with pytest.raises(DataError, match="the time 'soon' is not a time"):
        run(config, tmp_path / "store")


def test_files_that_changed_are_another_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_data(tmp_path / "one" / "shop")
    config = counted().replace(pair="shop")
    monkeypatch.chdir(tmp_path / "one")
    first = run(config, tmp_path / "store")
    own_data(tmp_path / "one" / "shop", users=50)
    assert run(config, tmp_path / "store")["run_id"] != first["run_id"]
    own_data(tmp_path / "two" / "shop")
    monkeypatch.chdir(tmp_path / "two")  # the same relative path is another folder
    assert run(config, tmp_path / "store")["run_id"] == first["run_id"]


def test_run_of_other_columns_is_not_taken_where_the_data_is_elsewhere(tmp_path: Path) -> None:
    folder = own_data(tmp_path / "shop")
    for name in "ab":
        table = pd.read_csv(folder / f"{name}.csv")
        table.assign(family=table["item"].str[:2]).to_csv(folder / f"{name}.csv", index=False)
    config = counted().replace(pair=str(folder), min_per_domain=0)
    stored = run(config, tmp_path / "store")
    folder.rename(tmp_path / "gone")
    assert run(config, tmp_path / "store") == stored
    with pytest.raises(NoDataError, match="shop"):
        run(config.replace(columns={"item": "family"}), tmp_path / "store")


def test_committed_runs_ask_for_no_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCALIB_DATA", str(tmp_path))
    monkeypatch.setattr(sources.pooch, "retrieve", never)
    gcalib.experiments._pair.cache_clear()
    config = Profile.load("search", ROOT / "params").grid_configs()[0]
    (found,) = run_grid([config], ROOT / "results")["run_id"]
    assert run(config, ROOT / "results")["run_id"] == found
    with pytest.raises(DataError, match="food-kitchen"):
        run(config, tmp_path)


def test_trained_model_is_the_one_that_was_measured(store: Path) -> None:
    record = run(tiny_config(gca=(0, 1)), store)
    model, pair = load_model(record["run_id"], store), pair_of(tiny_config())
    measured = gcalib.experiments.evaluate(model, pair, "test")
    assert {key: record[f"test.{key}"] for key in measured} == pytest.approx(measured)
    scores = score(model, pair, [pair.sequence(0), [1, 2]])
    assert scores.shape == (2, 1 + sum(pair.num_items)) and not model.training


def test_model_that_was_not_kept_is_asked_for_and_trained_again(tmp_path: Path) -> None:
    config = tiny_config(gca=(0,), match="network", dim=16)
    record = run(config, tmp_path)
    with pytest.raises(
        ValueError, match=r"holds no weights of run .*: gcalib.run\(config, keep_model=True\) keeps them"
    ):
        load_model(record["run_id"], tmp_path)
    with pytest.raises(ValueError, match="holds no weights of run 'nothing'"):
        load_model("nothing", tmp_path)
    assert run(config, tmp_path, keep_model=True) == record  # which stays as it was
    assert load_model(record["run_id"], tmp_path).config.dim == record["match_dim"] > 16


def test_matched_run_records_both_sizes(tmp_path: Path) -> None:
    record = run(tiny_config(match="network", dim=16, epochs=1), tmp_path)
    assert record["match_size"] == record["params_network"]
    assert abs(record["match_size"] / record["match_target"] - 1) <= 0.01
    assert record["gca"] == (0,) and not any(".gca0." in key for key in record)


def test_record_that_cannot_be_written_costs_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("could not be written: No space left on device")

    monkeypatch.setattr(gcalib.store, "write", full)
    with pytest.raises(OSError, match="No space left on device"):
        run(tiny_config(epochs=1), tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(gcalib.training.Trainer, "step", never)
    assert run(tiny_config(epochs=1), tmp_path)["epochs_trained"] == 1  # from the checkpoint of the last epoch
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".json"]


def test_store_that_cannot_be_written_fails_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = run(counted(), tmp_path)

    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(gcalib.store.FileLock, "acquire", read_only)
    monkeypatch.setattr(gcalib.experiments, "fit", never)
    assert run(counted(), tmp_path) == stored  # what is stored can be read
    with pytest.raises(OSError, match="Read-only file system"):
        run(tiny_config(), tmp_path)


def test_trace_names_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCALIB_TRACE", str(tmp_path / "trace"))
    record = run(counted(), tmp_path / "store")
    run_grid([counted()], tmp_path / "store")
    assert (tmp_path / "trace").read_text() == 2 * f"{record['run_id']} {record_sha256(record)}\n"


def test_golden_run_is_pinned_to_the_results_version(tmp_path: Path) -> None:
    """A change of results must raise RESULTS_VERSION. After raising it, rewrite the fixture with what this prints."""
    record = run(tiny_config(gca=(0, 1, 2), gate="tanh", seed=3), tmp_path)
    figures = {key: value for key, value in record.items() if key.startswith("test.") and key.endswith(PINNED)}
    defaults = {name: field.default for name, field in RunConfig.model_fields.items() if name != "pair"}
    now = {"results_version": RESULTS_VERSION, "run_id": record["run_id"], "defaults": defaults, "figures": figures}
    print(json.dumps(now, indent=1))
    golden, now = json.loads(GOLDEN.read_text()), json.loads(json.dumps(now))
    assert (golden["results_version"], golden["run_id"]) == (now["results_version"], now["run_id"])
    assert now["defaults"] | golden["defaults"] == now["defaults"]  # a field that came later renames no run
    # other processors round matrix products otherwise; a real change of results moves figures far more
    assert figures == pytest.approx(golden["figures"], rel=5e-3, abs=5e-4)


def test_run_id_depends_on_config_data_and_version_only() -> None:
    config = tiny_config()
    name = run_id(config, "data", 1)
    assert name == run_id(config.replace(pair="another/path"), "data", 1)  # the data's hash speaks for the pair
    others = [
        run_id(config.replace(seed=1), "data", 1), run_id(config, "other", 1), run_id(config, "data", 2),
        run_id(config.replace(gca=()), "data", 1), run_id(config.replace(gate="tanh"), "data", 1),
    ]  # fmt: skip
    assert len({name, *others}) == 6
