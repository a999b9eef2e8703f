"""Grids: order, failures, workers that die, Ctrl-C, kills, two grids on one store, a Ray cluster, a GPU for minutes."""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch
import yaml

import gcalib.experiments
from gcalib.cluster import run_in_processes
from gcalib.config import RunConfig, run_id
from gcalib.data.pair import NoDataError
from gcalib.experiments import GridError, pair_of, plan, run_grid
from gcalib.store import RESULTS_VERSION, RunStore, load_results, record_sha256
from gcalib.training import fit

TINY = "synthetic:num_users=60,items_a=60,items_b=60"
TRAINED = {"dim": 8, "epochs": 2, "batch_size": 32, "negatives": 16}


def tiny_config(**changes: object) -> RunConfig:
    return RunConfig(**{"pair": TINY, **TRAINED, **changes})


def counted(seed: int) -> RunConfig:
    """A run that takes no training."""
    return RunConfig(pair=TINY, model="popularity", seed=seed)


def hashes(store: Path) -> list[str]:
    return sorted(record_sha256(row) for row in load_results(store).to_dict("records"))


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


CONFIGS = [tiny_config(seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of `CONFIGS`, one after the other."""
    store = tmp_path_factory.mktemp("serial")
    run_grid(CONFIGS, store)
    return store


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a profile whose grid are the runs of `CONFIGS`."""
    (tmp_path / "params").mkdir()
    content = {"pair": TINY, "seeds": [0, 1, 2], "settings": TRAINED, "grid": [{}]}
    (tmp_path / "params" / "three.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(workers: int = 2) -> subprocess.Popen[str]:
    """A grid in a session of its own."""
    command = [sys.executable, "-m", "gcalib", "grid", "--profile", "three", "--workers", str(workers)]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)


def test_workers_end_where_one_process_does_and_a_failure_stops_no_other(serial: Path, tmp_path: Path) -> None:
    bad = tiny_config(select="s999", seed=7)
    with pytest.raises(
        GridError, match="1 of 4 runs failed, the others are stored.*ValueError: select='s999'"
    ) as failed:
        run_grid([bad, *CONFIGS], tmp_path, workers=2)
    assert list(failed.value.failures) == [bad]
    assert hashes(tmp_path) == hashes(serial)
    assert run_grid(CONFIGS[::-1], tmp_path)["seed"].tolist() == [2, 1, 0]  # in the order given
    assert {path.suffix for path in tmp_path.glob("*/*")} <= {".json", ".lock"}


def test_failures_without_others_say_so(tmp_path: Path) -> None:
    with pytest.raises(GridError, match="2 of 2 runs failed"):
        run_grid([tiny_config(select="s999", seed=seed) for seed in (0, 1)], tmp_path)


def test_what_another_process_works_on_comes_last(tmp_path: Path) -> None:
    """Several processes may be given the same grid: they share the work instead of waiting for each other."""
    first, *others = [counted(seed) for seed in range(3)]
    store = RunStore(tmp_path)
    shared = threading.Thread(target=run_grid, args=([first, *others], tmp_path))
    with store.lock(run_id(first, pair_of(first).sha256, RESULTS_VERSION)):
        shared.start()
        until(lambda: len(store.names()) == 2)
        time.sleep(0.3)
        assert shared.is_alive() and len(store.names()) == 2
    shared.join()
    assert len(store.names()) == 3


def test_two_grids_on_one_store_lose_and_repeat_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, real = [], gcalib.experiments.fit

    def noted(config: RunConfig, *arguments: Any, **more: Any) -> Any:
        trained.append(config.seed)
        return real(config, *arguments, **more)

    monkeypatch.setattr(gcalib.experiments, "fit", noted)
    configs, found = [counted(seed) for seed in range(8)], {}

    def grid(step: int) -> None:
        found[step] = run_grid(configs[::step], tmp_path)["seed"].tolist()

    threads = [threading.Thread(target=grid, args=(step,)) for step in (1, -1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[1] == found[-1][::-1] == sorted(trained) == list(range(8))


def die_or_store(config: RunConfig, name: str, runs: RunStore, device: str) -> None:
    """What a worker does here: with seed 0, it dies as one that is killed for its memory."""
    if config.seed == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    runs.put({"run_id": name, "results_version": RESULTS_VERSION, **config.model_dump(), "device": device}, [])


def test_run_whose_process_dies_twice_fails_and_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "gcalib")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where the worker finds the function above
    todo = {f"{seed:016d}": counted(seed) for seed in range(4)}
    failures = run_in_processes(die_or_store, todo, RunStore(tmp_path), workers=2, device="cpu")
    assert list(failures) == ["0" * 16] and failures["0" * 16].startswith("its process died twice")
    assert RunStore(tmp_path).names() == list(todo)[1:]
    assert caplog.text.count("A worker died (exit code -9); another takes its place.") == 2
    assert not [child for child in psutil.Process().children() if "cluster.worker" in " ".join(child.cmdline())]


@pytest.mark.parametrize("sent", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_interrupt_leaves_what_is_finished_and_no_process(serial: Path, project: Path, sent: str) -> None:
    process = start()
    store = RunStore(project / "results")
    until(store.names)
    workers = psutil.Process(process.pid).children(recursive=True)
    if sent == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    else:
        process.send_signal(signal.SIGTERM)  # what a batch system does
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1] == (
        "Interrupted: what was finished is stored, what was running resumes from its last checkpoint."
    )
    assert "Traceback" not in said
    assert psutil.wait_procs(workers, timeout=10)[1] == []
    assert 0 < len(store.names()) <= 3
    run_grid(CONFIGS, store.folder)
    assert hashes(store.folder) == hashes(serial)


def test_workers_end_with_the_process_that_started_them(project: Path) -> None:
    profile = project / "params" / "three.yaml"
    profile.write_text(profile.read_text().replace("epochs: 2", "epochs: 1000000"))
    process = start()
    until(lambda: list((project / "results").glob("checkpoints/[!.]*")))
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    assert "Traceback" not in process.communicate()[1]
    assert len(workers) == 2 and psutil.wait_procs(workers, timeout=10)[1] == []


@pytest.mark.slow
def test_kills_at_random_moments_change_no_record(serial: Path, project: Path) -> None:
    rng = random.Random(20260)
    for _ in range(8):
        process = start()
        time.sleep(rng.uniform(1.0, 8.0))
        workers = psutil.Process(process.pid).children(recursive=True)
        for one in (process, *workers):
            one.kill()
        process.communicate()
        psutil.wait_procs(workers)
    store = project / "results"
    run_grid(CONFIGS, store)
    assert hashes(store) == hashes(serial)
    assert [path for path in store.rglob("*") if path.is_file() and path.suffix not in (".json", ".lock", ".pt")] == []


def test_plan_counts_what_is_left_and_its_hours(serial: Path) -> None:
    seconds = load_results(serial)["seconds"]
    wider, other = tiny_config(dim=16, seed=9), RunConfig(pair=TINY, model="markov")
    found = plan([*CONFIGS, tiny_config(seed=9), wider, other], serial)
    assert (found["runs"], found["left"], found["unknown"]) == (6, 3, 2)
    assert found["hours"] == pytest.approx(seconds.mean() / 3600)


def test_plan_of_an_empty_store_knows_no_hours(tmp_path: Path) -> None:
    assert plan(CONFIGS, tmp_path / "new") == {"runs": 3, "left": 3, "hours": 0.0, "unknown": 3}
    assert not (tmp_path / "new").exists()


def test_grid_without_the_data_fetches_what_is_stored(serial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def missing(*_: object, download: bool, **__: object) -> None:
        asked.append(download)
        raise NoDataError("no such file")

    monkeypatch.setattr(gcalib.experiments, "_pair", missing)
    assert run_grid(CONFIGS, serial)["seed"].tolist() == [0, 1, 2]
    assert plan([*CONFIGS, tiny_config(seed=9)], serial)["left"] == 1
    assert not any(asked)
    with pytest.raises(GridError, match="2 of 5 runs failed, the others are stored.*no such file"):
        run_grid([*CONFIGS, tiny_config(seed=8), tiny_config(seed=9)], serial)
    assert asked.count(True) == 1  # a download that failed is not tried for every run


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"engine": "slurm"}, "engine='slurm' is unknown; the engines are local and ray"),
        ({"device": "tpu"}, "device='tpu' is unknown; the devices are auto, cpu and cuda"),
        ({"engine": "ray", "device": "tpu"}, "device='tpu' is unknown"),
    ],
)
def test_bad_argument_is_one_sentence(tmp_path: Path, arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        run_grid([counted(0)], tmp_path / "new", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


def test_grid_of_nothing_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no run to do: .* as it is for a profile without a grid"):
        run_grid([], tmp_path)


@pytest.mark.slow
def test_ray_cluster_that_loses_a_node_loses_no_run(
    serial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes on this machine, one killed once the first record is there: nothing is missing, nothing is twice."""
    import ray
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    node = cluster.add_node(**small)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    asked = {"engine": "ray", "device": "cpu"}

    def kill() -> None:
        until(RunStore(tmp_path).names, 120)
        cluster.remove_node(node, allow_graceful=False)

    thread = threading.Thread(target=kill)
    try:
        with pytest.raises(ValueError, match="gpus=0.25, and no node has both"):
            run_grid(CONFIGS, tmp_path, gpus=0.25, **asked)  # type: ignore[arg-type]
        thread.start()
        bad = tiny_config(select="s999")
        with pytest.raises(GridError, match="1 of 4 runs failed, the others are stored.*select='s999' needs"):
            run_grid([bad, *CONFIGS], tmp_path, cpus=1, **asked)  # type: ignore[arg-type]
    finally:
        ray.shutdown()
        cluster.shutdown()
    thread.join()
    assert not node.any_processes_alive()
    assert hashes(tmp_path) == hashes(serial)


def test_ray_cluster_that_is_gone_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"ray://127.0.0.1:{port}")
    with pytest.raises(ValueError, match=f"No Ray cluster answers at ray://127.0.0.1:{port} .*refused"):
        run_grid([counted(0)], tmp_path, engine="ray")


def test_missing_ray_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"engine='ray' needs Ray: pip install -e '.\[cluster\]' in a clone"):
        run_grid([counted(0)], tmp_path, engine="ray")


# ------------------------------------------------------------------------------------------------ a GPU for minutes


@pytest.fixture
def gpu_batch() -> ModuleType:
    """The script benchmarks/gpu_batch.py."""
    path = Path(__file__).parents[1] / "benchmarks" / "gpu_batch.py"
    spec = importlib.util.spec_from_file_location("gpu_batch", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unfinished(store: Path, config: RunConfig, epochs: int) -> Path:
    """The checkpoint of a run that has trained for some epochs."""
    name = run_id(config.canonical(), pair_of(config).sha256, RESULTS_VERSION)
    path = RunStore(store).path("checkpoints", name)

    def stop(row: dict[str, float]) -> None:
        if row["epoch"] == epochs:
            raise InterruptedError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr("gcalib.training.CHECKPOINT_SHARE", float("inf"))
        fit(config, pair_of(config), device="cpu", checkpoint=path, on_epoch=stop)
    return path


def test_gpu_batch_brings_back_runs_and_the_checkpoints_that_fit(
    gpu_batch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there, here, out = (tmp_path / name for name in ("there", "here", "out"))
    run_grid([counted(0), counted(1)], there)
    run_grid([counted(0)], here)
    small, large = unfinished(there, CONFIGS[0], 1), unfinished(there, tiny_config(dim=32), 1)
    room = small.stat().st_size + 20_000
    monkeypatch.setattr(gpu_batch, "RETURNS", room)
    monkeypatch.setattr(gpu_batch, "PART", 8192)
    gpu_batch.bring(there, here, out)
    assert f"too large to come back: {large.stem}" in capsys.readouterr().out
    sizes = [path.stat().st_size for path in out.iterdir()]
    assert len(sizes) > 3 and max(sizes) == 8192 and sum(sizes) <= room + 10_240  # which end a tar archive

    left = RunStore(here).path("checkpoints", run_id(counted(1), pair_of(counted(1)).sha256, RESULTS_VERSION))
    left.parent.mkdir()
    left.touch()
    gpu_batch.unpack(out, here)
    assert "1 runs and 1 checkpoints came" in capsys.readouterr().out
    assert hashes(here) == hashes(there)
    assert [path.name for path in left.parent.iterdir()] == [small.name]  # none of a finished run
    assert (left.parent / small.name).read_bytes() == small.read_bytes()


def test_gpu_batch_replaces_no_checkpoint_by_one_that_is_behind(gpu_batch: ModuleType, tmp_path: Path) -> None:
    there, here, out = (tmp_path / name for name in ("there", "here", "out"))
    behind, ahead = unfinished(there, CONFIGS[0], 1), unfinished(here, CONFIGS[0], 2)
    before = ahead.read_bytes()
    gpu_batch.bring(there, here, out)
    gpu_batch.unpack(out, here)
    assert ahead.read_bytes() == before != behind.read_bytes()


def test_gpu_batch_puts_the_seeds_of_a_cell_side_by_side(gpu_batch: ModuleType, project: Path) -> None:
    content = {"pair": TINY, "settings": TRAINED, "grid": [{"seeds": [0]}, {"models": ["sasrec"]}, {"seeds": [1, 2]}]}
    (project / "params" / "blocks.yaml").write_text(yaml.safe_dump(content))
    asked = argparse.Namespace(profiles=["blocks", "three"], only=["seed=0,2"])
    assert [(config.model, config.seed) for config in gpu_batch.chosen(asked)] == [
        ("abxi", 0), ("abxi", 2), ("sasrec", 0)
    ]  # fmt: skip


def test_checkpoint_of_a_gpu_goes_on_in_the_precision_of_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(precision="auto")
    monkeypatch.setattr("gcalib.training.fastest_precision", {"cpu": "fp32"}.__getitem__)
    path = unfinished(tmp_path, config, 1)
    content = torch.load(path, weights_only=True)
    torch.save(content | {"precision": "bf16", "cuda_rng": content["torch_rng"]}, path)
    resumed = fit(config, pair_of(config), device="cpu", checkpoint=path)
    assert (resumed.precision, len(resumed.curves)) == ("fp32", 3)
