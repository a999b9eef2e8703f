"""Grids: order, workers that die, Ctrl-C, kills at random moments, progress, estimates, a Ray cluster."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import pty
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
import yaml

import gcalib.grid
import gcalib.pool
from gcalib.config import RunConfig, run_id
from gcalib.estimates import estimate
from gcalib.experiments import pair_of
from gcalib.grid import GridError, finished, run_grid
from gcalib.records import RESULTS_VERSION, record_sha256
from gcalib.store import RunStore, load_results

TINY = "synthetic:num_users=60,items_a=60,items_b=60"
SEED = 20260


def tiny_config(**changes: object) -> RunConfig:
    return RunConfig(**{"pair": TINY, "dim": 8, "heads": 2, "epochs": 2, "batch_size": 32, **changes})


def hashes(store: Path) -> list[str]:
    return sorted(record_sha256(row) for row in load_results(store).to_dict("records"))


def hidden(store: Path) -> list[Path]:
    return [path for path in store.rglob("*") if path.name.startswith(".")]


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six runs, one after the other."""
    store = tmp_path_factory.mktemp("serial")
    run_grid([tiny_config(seed=seed, gca=gca) for gca in ((), (0,)) for seed in range(3)], store)
    return store


def test_workers_end_where_one_process_does_and_failures_stop_no_other(serial: Path, tmp_path: Path) -> None:
    configs = [tiny_config(seed=seed, gca=gca) for gca in ((), (0,)) for seed in range(3)]
    bad = tiny_config(select="s999", seed=7)
    with pytest.raises(GridError, match="1 run.s. failed, the others are stored.*select='s999' needs") as failed:
        run_grid([bad, *configs], tmp_path, workers=2)
    assert list(failed.value.failures) == [bad.canonical()] and hashes(tmp_path) == hashes(serial)
    assert run_grid(configs, tmp_path)["seed"].tolist() == [0, 1, 2] * 2  # in the order given


def test_the_longest_runs_start_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    order: list[int] = []

    def note(config: RunConfig, store: Path, **_: object) -> dict[str, str]:
        order.append(config.dim)
        raise ValueError("not needed")

    monkeypatch.setattr(gcalib.pool, "run", note)
    with pytest.raises(GridError, match="3 run.s. failed, and there were no others"):
        run_grid([tiny_config(dim=8), tiny_config(dim=32), tiny_config(dim=16)], tmp_path)
    assert order == [32, 16, 8]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_another_process_is_at_comes_last(tmp_path: Path, workers: int) -> None:
    """Several processes may be given the same grid: they share the work instead of waiting for each other."""
    first, *others = [tiny_config(seed=seed) for seed in range(3)]
    store, arguments = RunStore(tmp_path), ([first, *others], tmp_path)
    shared = threading.Thread(target=run_grid, args=arguments, kwargs={"workers": workers})
    with store.lock(run_id(first, pair_of(first).sha256, RESULTS_VERSION)):
        shared.start()
        while len(store.names()) < 2 and shared.is_alive():
            time.sleep(0.01)
        assert set(finished(others, tmp_path)) == set(store.names()) and shared.is_alive()
    shared.join()
    assert len(store.names()) == 3


@pytest.mark.parametrize(("kills", "ends"), [(1, "stored"), (50, "failed")])
def test_a_worker_that_is_killed_costs_its_own_run_one_try(
    serial: Path, tmp_path: Path, kills: int, ends: str, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    configs = [tiny_config(seed=seed) for seed in (0, 1)]
    start, timers = gcalib.pool._Pool.start, []

    def start_and_kill(pool: gcalib.pool._Pool) -> gcalib.pool._Worker:
        worker = start(pool)
        if len(timers) < kills:  # while it imports, with its run already given to it
            timers.append(threading.Timer(0.3, os.kill, (worker.process.pid, signal.SIGKILL)))
            timers[-1].start()
        return worker

    monkeypatch.setattr(gcalib.pool._Pool, "start", start_and_kill)
    if ends == "stored":
        frame = run_grid(configs, tmp_path, workers=2)
        assert {record_sha256(row) for row in frame.to_dict("records")} < set(hashes(serial))
        assert caplog.text.count("A worker died (exit code -9)") == 1
    else:
        with pytest.raises(GridError, match="2 run.s. failed.*died 2 times, last with exit code -9"):
            run_grid(configs, tmp_path, workers=2)
        assert len(timers) == 4
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_with_nothing_to_do_costs_no_run_a_try(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, started = gcalib.pool._Pool.start, []

    def start_and_kill(pool: gcalib.pool._Pool) -> gcalib.pool._Worker:
        worker = start(pool)
        started.append(worker)
        if len(started) <= 2:  # as often as a run may die
            worker.process.kill()
            worker.process.join()
        return worker

    monkeypatch.setattr(gcalib.pool._Pool, "start", start_and_kill)
    assert len(run_grid([tiny_config(seed=seed) for seed in (0, 1)], tmp_path, workers=2)) == 2
    assert len(started) == 4 and "died" not in caplog.text


def test_a_batch_system_gets_its_share_of_cores_and_a_line_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(2)))
    caplog.set_level("INFO", "gcalib")
    frame = run_grid([tiny_config(seed=seed) for seed in (0, 1)], tmp_path, workers=2)
    assert frame["threads"].tolist() == [1, 1]
    lines = sorted(line for line in caplog.messages if " runs: " in line)
    assert [re.sub(r"[0-9a-f]{16}|\d+ s", "_", line)[:28] for line in lines] == [
        f"{done} of 2 runs: _ took _, {{'pai" for done in (1, 2)
    ]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a profile whose grid are the six runs of `serial`."""
    (tmp_path / "params").mkdir()
    content = {
        "pair": TINY, "seeds": [0, 1, 2],
        "settings": {"dim": 8, "heads": 2, "epochs": 2, "batch_size": 32},
        "grid": [{"variants": [{}, {"gca": [0]}]}],
    }  # fmt: skip
    (tmp_path / "params" / "six.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "gcalib", *arguments]


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def start_and_wait(project: Path, folder: str = "records") -> subprocess.Popen[str]:
    """A grid of two workers in a session of its own, once there is a file in a folder of its store."""
    process = subprocess.Popen(
        command("grid", "--profile", "six", "--workers", "2"), start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list((project / "results" / folder).glob("[!.]*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    return process


def gone(group: int) -> bool:
    """Whether a group of processes ends; Python's own resource tracker does a moment after its parent."""
    for _ in range(100):
        if not alive(group):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupt_leaves_what_is_finished_and_no_process(serial: Path, project: Path, sent: signal.Signals) -> None:
    process = start_and_wait(project)
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)  # what a terminal does
    else:
        process.send_signal(sent)  # what a batch system may do
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    *runs, last = said.splitlines()
    assert [line for line in runs if not re.match(r"\d of 6 runs: \w+ took ", line)] == []
    assert last == "Interrupted: what was finished is stored, what was running resumes from its last checkpoint."
    assert gone(process.pid)
    assert 0 < len(RunStore(project / "results").names()) < 6
    done = subprocess.run(command("grid", "--profile", "six"), capture_output=True, text=True, check=True)
    assert done.stdout.startswith("6 runs, ") and hashes(project / "results") == hashes(serial)


def test_an_interrupt_while_workers_start_is_one_sentence(project: Path) -> None:
    process = subprocess.Popen(
        command("grid", "--profile", "six", "--workers", "2"), start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline()  # what it will cost
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and re.fullmatch("Interrupted[^\n]*\\.\n", said)
    assert gone(process.pid)


def test_a_worker_hears_of_no_interrupt_from_its_start_on(tmp_path: Path) -> None:
    pool = gcalib.pool._Pool(tmp_path, "cpu", 1)
    process = pool.start().process
    for _ in range(20):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.02)
    pool.stop()
    assert process.exitcode == 0


def test_a_terminal_shows_one_bar_whose_time_moves(project: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    process = subprocess.Popen(
        command("grid", "--profile", "six", "--workers", "2"), stdout=subprocess.DEVNULL, stderr=theirs
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # how Linux says that nobody writes any more
        pass
    os.close(ours)
    assert process.wait() == 0 and b"6 of 6 runs" in shown
    assert len(set(re.findall(rb"(\S+) passed, \? left, 0 of 6 runs", shown))) > 1
    assert b"epoch" not in shown and b" took " not in shown


def test_workers_end_with_the_process_that_started_them(project: Path) -> None:
    profile = project / "params" / "six.yaml"
    profile.write_text(profile.read_text().replace("epochs: 2", "epochs: 100000\n  stop_patience: 100000"))
    process = start_and_wait(project, "checkpoints")
    process.kill()
    process.wait()
    left = not gone(process.pid)
    if left:
        os.killpg(process.pid, signal.SIGKILL)
    assert not left
    assert process.stderr is not None and process.stderr.read() == ""  # nor does Python name what they left


def test_kills_at_random_moments_change_no_record(serial: Path, project: Path) -> None:
    """The whole group of processes dies eight times; `benchmarks/grid.py` does it a hundred times."""
    rng = random.Random(SEED)
    for _ in range(8):
        process = subprocess.Popen(
            command("grid", "--profile", "six", "--workers", "2"), start_new_session=True,
            stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(rng.uniform(2.0, 7.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    while alive(process.pid):
        time.sleep(0.05)
    subprocess.run(command("grid", "--profile", "six"), capture_output=True, check=True)
    store = project / "results"
    assert hashes(store) == hashes(serial) and not hidden(store)
    assert not list((store / "checkpoints").iterdir()) and not list((store / "locks").iterdir())


def test_a_dry_run_says_what_is_left_and_runs_nothing(project: Path) -> None:
    def said(*more: str) -> str:
        return subprocess.run(
            command("grid", "--profile", "six", *more), capture_output=True, text=True, check=True
        ).stdout  # fmt: skip

    text = said("--dry-run", "--workers", "2")
    assert text.startswith(
        "6 runs, 0 of them stored. The other 6 need about 0.0 hours of one process, 6 of them guessed"
    )
    assert not (project / "results").exists()
    run_grid([tiny_config(seed=1)], project / "results")
    assert said("--dry-run").startswith(
        "6 runs, 1 of them stored. The other 5 need about 0.0 hours of one process, 0.0"
    )
    told = subprocess.run(command("grid", "--profile", "seven"), capture_output=True, text=True, check=False)
    assert told.returncode == 2 and told.stderr == "There is no profile 'seven' in params; there are six.\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--workers", "0"], "--workers 0: it must be 1 or more."),
        (["--cpus", "2", "--gather"], "cpus, gather: read by engine='ray' only."),
        (["--device", "tpu"], "device='tpu' is unknown; the devices are auto, cpu and cuda."),
        (["--profile", "elsewhere/six.yaml"], "There is no profile 'elsewhere/six.yaml' in params; there are six."),
    ],
)
def test_what_a_user_did_wrong_is_one_sentence(project: Path, arguments: list[str], sentence: str) -> None:
    done = subprocess.run(
        command("grid", "--profile", "six", *arguments), capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2 and done.stderr == f"{sentence}\n"
    assert not (project / "results").exists()


def test_a_grid_of_nothing_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no run to do: .* as it is for a profile without a grid"):
        run_grid([], tmp_path)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("lr=-1", "The run cannot be set so: lr: Input should be greater than 0."),
        ("gca=[3]", "The run cannot be set so: settings: Value error, gca=(3,): the insertion points are 0 (early), "
                    "1 (mid) and 2 (late)."),
        ("gca=[0", "--set gca=[0: '[0' is no YAML value."),
    ],
)  # fmt: skip
def test_a_run_that_cannot_be_set_so_is_one_sentence(project: Path, setting: str, sentence: str) -> None:
    done = subprocess.run(command("run", "--set", setting), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2 and done.stderr == f"{sentence}\n"


def test_a_profile_may_be_a_file_elsewhere(project: Path) -> None:
    elsewhere = project / "elsewhere" / "params"
    elsewhere.mkdir(parents=True)
    shutil.copy("params/six.yaml", elsewhere)
    with (elsewhere / "six.yaml").open("a") as file:
        file.write("workers: 3\n")
    done = subprocess.run(
        command("grid", "--profile", str(elsewhere / "six.yaml"), "--dry-run"),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "hours with 3" in done.stdout


def test_estimates_learn_from_stored_runs(serial: Path) -> None:
    stored = RunStore(serial).frame()
    guessed = estimate([tiny_config()], stored.iloc[:0])
    learned = estimate([tiny_config(), tiny_config(dim=16), tiny_config(epochs=4)], stored)
    assert guessed["learned_from"].tolist() == [0] and learned["learned_from"].tolist() == [6] * 3
    plain = stored[stored["gca"] == ()]["seconds"].median()
    assert learned["seconds"][0] == pytest.approx(plain, rel=0.9)  # from runs with cross-attention, too
    assert learned["seconds"][1] > learned["seconds"][0] and learned["seconds"][2] == 2 * learned["seconds"][0]
    assert learned["bytes"][0] == pytest.approx(stored["peak_memory_bytes"].max(), rel=0.2)


def test_without_the_data_stored_runs_are_found(serial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise gcalib.grid.DataError("no such file")

    configs = [tiny_config(seed=1), tiny_config(seed=9)]
    there = finished(configs, serial)
    monkeypatch.setattr(gcalib.experiments, "_pair", missing)
    assert finished(configs, serial) == there and there[0] is not None and there[1] is None
    assert run_grid(configs[:1], serial)["run_id"].tolist() == there[:1]
    with pytest.raises(GridError, match="no such file"):
        run_grid(configs, serial)


def test_arguments_of_the_other_engine_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="engine='slurm' is unknown; the engines are local and ray"):
        run_grid([tiny_config()], tmp_path, engine="slurm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gpus: read by engine='ray' only"):
        run_grid([tiny_config()], tmp_path, gpus=1)
    for workers in (0, -1):
        with pytest.raises(ValueError, match=f"workers={workers}: it must be 1 or more"):
            run_grid([tiny_config()], tmp_path, workers=workers)


def test_a_device_that_is_not_there_stops_a_grid_before_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for engine in ("local", "ray"):
        with pytest.raises(ValueError, match="device='tpu' is unknown; the devices are auto, cpu and cuda"):
            run_grid([tiny_config()], tmp_path, engine=engine, device="tpu")
    with pytest.raises(ValueError, match="device='cuda': PyTorch .* finds 0 GPUs; use auto or cpu"):
        run_grid([tiny_config()], tmp_path, device="cuda")
    with pytest.raises(ValueError, match="finds 0 GPUs"):
        gcalib.run(tiny_config(), tmp_path, device="cuda:1")


@pytest.mark.parametrize("gather", [False, True])
def test_a_ray_cluster_that_loses_a_node_loses_no_run(serial: Path, tmp_path: Path, gather: bool) -> None:
    """Two nodes on this machine, one killed once the first record is there: nothing is missing, nothing is twice."""
    import ray
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    node = cluster.add_node(**small)
    configs = [tiny_config(seed=seed, gca=gca) for gca in ((), (0,)) for seed in range(3)]

    def kill() -> None:
        while not RunStore(tmp_path).names():
            time.sleep(0.01)
        cluster.remove_node(node, allow_graceful=False)

    thread = threading.Thread(target=kill)
    try:
        with pytest.raises(ValueError, match="gpus=0.25, and no node has both: they have 1 and 0"):
            run_grid(configs, tmp_path, engine="ray", address=cluster.address, gpus=0.25, gather=gather, device="cpu")
        thread.start()
        frame = run_grid(configs, tmp_path, engine="ray", address=cluster.address, cpus=1, gather=gather, device="cpu")
    finally:
        ray.shutdown()
        cluster.shutdown()
    thread.join()
    assert not node.any_processes_alive()
    assert hashes(tmp_path) == hashes(serial) and frame["run_id"].is_unique and len(frame) == 6
    assert not hidden(tmp_path)


def test_a_ray_cluster_that_is_gone_is_one_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        with pytest.raises(ValueError, match=f"No Ray cluster answers at {address} .*refused"):
            run_grid([tiny_config()], tmp_path, engine="ray", address=address)


def test_a_missing_ray_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"engine='ray' needs Ray: pip install -e '.\[cluster\]' in a clone"):
        run_grid([tiny_config()], tmp_path, engine="ray")
