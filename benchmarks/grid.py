"""Grids: throughput, overhead, and whether they survive: `python -m gcalib bench grid`.

- `throughput`: 24 small runs by one worker, then by two (start of their processes included), each on one core.
- `overhead`: what the store and the scheduler take beside the runs themselves: the time of a grid of 12 tiny runs less
  the time spent in training and measuring, divided by 12, in stores that hold more and more records.
- `finished`: a grid of 10,000 runs that are all stored; the figures of its records are those of a real tiny run.
- `kills`: two processes work on one store, one of them merges records too; each is killed at a random moment, over and
  over, and starts again. Ends with the comparison of every record and curve with those of an undisturbed grid.
- `nodes`: 24 runs on a Ray cluster of two nodes, one of which is killed after the first runs.

The first three ask for a machine with nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

import gcalib.experiments
from gcalib import RunConfig, load_curves, load_results, run, run_grid
from gcalib.config import run_id
from gcalib.experiments import pair_of
from gcalib.records import RESULTS_VERSION, read, record_sha256, write
from gcalib.store import RunStore
from gcalib.training import Trainer

SMALL = RunConfig(pair="synthetic:num_users=600,items_a=300,items_b=300", dim=32, epochs=10)
TINY = RunConfig(
    pair="synthetic:num_users=60,items_a=60,items_b=60", dim=8, heads=2, epochs=2, batch_size=32, gca=(0,)
)  # fmt: skip
SEED = 20261124


def grid_of(config: RunConfig, count: int, first: int = 0) -> list[RunConfig]:
    """Configs that differ in cross-attention and seed."""
    return [config.but(gca=(0,) if n % 2 else (), seed=first + n // 2) for n in range(count)]


def throughput(folder: Path, count: int, config: RunConfig = SMALL) -> dict[str, float]:
    """Seconds of a grid by one worker and by two."""
    configs = grid_of(config, count)
    run(config.but(epochs=1, seed=10**6), folder / "warm", device="cpu")  # imports and the pair
    seconds = {}
    for workers in (1, 2):
        started = time.perf_counter()
        run_grid(configs, folder / f"by-{workers}", workers=workers, device="cpu")
        seconds[f"seconds_{workers}"] = time.perf_counter() - started
    if contents(folder / "by-1") != contents(folder / "by-2"):
        raise AssertionError("two workers found other figures than one")
    return {"runs": count, **seconds, "ratio": seconds["seconds_1"] / seconds["seconds_2"]}


def overhead(folder: Path, sizes: tuple[int, ...], count: int = 12) -> dict[str, Any]:
    """Milliseconds a run beside the run itself, in stores of some sizes, loose and merged."""
    run(TINY, folder / "warm", device="cpu")
    table, curves = stored(folder / "warm")
    found: dict[str, Any] = {"runs": count, "loose_ms": {}, "merged_ms": {}}
    store, there, fresh = RunStore(folder / "many"), 0, 10**6
    for size in sizes:
        for row in renamed(table, range(there, size)).to_batches(max_chunksize=1):
            name = row["run_id"][0].as_py()
            write(store.record_path(name), pa.Table.from_batches([row]))
            write(store.curve_path(name), with_column(curves, "run_id", [name] * len(curves)))
        there = max(there, size)
        found["loose_ms"][size] = 1e3 * _beside(grid_of(TINY, count, fresh), store.folder)
        fresh += count
    for size in sizes:
        merged = RunStore(folder / f"merged-{size}")
        if size:
            write(merged.folder / "records" / "compacted.parquet", renamed(table, range(size)))
        found["merged_ms"][size] = 1e3 * _beside(grid_of(TINY, count, fresh), merged.folder)
    return found


def _beside(configs: list[RunConfig], store: Path) -> float:
    """Seconds a run that a grid takes beside training and measuring."""
    real, spent = gcalib.experiments._compute, 0.0

    def timed(*arguments: Any) -> Any:
        nonlocal spent
        steps = real(*arguments)
        while True:
            started = time.perf_counter()
            try:
                next(steps)
            except StopIteration as end:
                return end.value
            finally:
                spent += time.perf_counter() - started
            yield  # until it is resumed, the time is the scheduler's

    gcalib.experiments._compute = timed
    try:
        started = time.perf_counter()
        run_grid(configs, store, device="cpu")
        return (time.perf_counter() - started - spent) / len(configs)
    finally:
        gcalib.experiments._compute = real


def finished(folder: Path, count: int) -> dict[str, float]:
    """Seconds of a grid whose runs are all stored, in a merged store."""
    run(TINY, folder / "warm", device="cpu")
    table, _ = stored(folder / "warm")
    write(folder / "done" / "records" / "compacted.parquet", renamed(table, range(count)))
    configs = [TINY.but(seed=seed) for seed in range(count)]
    started = time.perf_counter()
    frame = run_grid(configs, folder / "done")
    seconds = time.perf_counter() - started
    if frame["seed"].tolist() != list(range(count)):
        raise AssertionError("the frame does not hold the runs in the order given")
    if len(RunStore(folder / "done").names()) != count:
        raise AssertionError("stored runs were computed again")
    return {"runs": count, "seconds": seconds}


def stored(store: Path) -> tuple[pa.Table, pa.Table]:
    """Record and curves of a store of one run."""
    (name,) = RunStore(store).names()
    return read(RunStore(store).record_path(name)), read(RunStore(store).curve_path(name))


def with_column(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    """The table with other values in a column."""
    place = table.column_names.index(name)
    return table.set_column(place, name, pa.array(values, table.schema.field(name).type))


def renamed(record: pa.Table, seeds: range) -> pa.Table:
    """The record as if it had been computed for each of the seeds, under the ids of those runs."""
    table = record.take(pa.array([0] * len(seeds), pa.int64()))
    ids = [run_id(TINY.but(seed=seed), pair_of(TINY).sha256, RESULTS_VERSION) for seed in seeds]
    return with_column(with_column(table, "seed", list(seeds)), "run_id", ids)


def contents(store: Path) -> tuple[list[str], str]:
    """Hashes of all records without their circumstances, and all curves."""
    records = sorted(record_sha256(dict(row)) for row in load_results(store).to_dict("records"))
    curves = load_curves(store)
    return records, curves[sorted(curves.columns)].to_csv()


def left_over(store: Path) -> list[str]:
    """Files that a finished grid has no use for; the lock of merging stays for the next time."""
    expected = {"records", "curves"}
    files = [path for path in store.rglob("*") if path.is_file() and path.name != "compact.lock"]
    return [str(path.relative_to(store)) for path in files if path.parent.name not in expected or path.name[0] == "."]


def _work(configs: list[RunConfig], store: Path, merge: bool) -> None:
    if merge:
        RunStore(store).compact()
    run_grid(configs, store, device="cpu")


def kills(folder: Path, times: int, count: int = 24) -> dict[str, Any]:
    """Kill that many processes at random moments, in as many grids as it takes."""
    rng, context = random.Random(SEED), multiprocessing.get_context("fork")  # forked, it works from the first moment
    configs = grid_of(TINY, count)
    # imports here, without a thread, what every process would spend its first second on, and be killed in
    Trainer(TINY, pair_of(TINY), torch.device("cpu"))
    started = time.perf_counter()
    _alone(context, configs, folder / "undisturbed")
    span = 4 * (time.perf_counter() - started) / count
    undisturbed = contents(folder / "undisturbed")
    done = grids = 0
    while done < times:
        grids += 1
        store = folder / f"disturbed-{grids}"
        while done < times and len(RunStore(store).names()) < count:
            pair: list[Any] = []
            for merge, order in ((False, configs), (True, configs[::-1])):
                pair.append(context.Process(target=_work, args=(order, store, merge)))
                pair[-1].start()
            for process in rng.sample(pair, 2):
                process.join(rng.uniform(0, span))
                process.kill()
                process.join()
                done += process.exitcode == -9
        _alone(context, configs, store)
        if contents(store) != undisturbed:
            raise AssertionError(f"after {done} kills the records of grid {grids} are not those of an undisturbed one")
        if left := left_over(store):
            raise AssertionError(f"after {done} kills grid {grids} leaves {', '.join(left)}")
    return {"kills": done, "seed": SEED, "grids": grids, "runs_each": count, "differing_records": 0, "files_left": 0}


def _alone(context: Any, configs: list[RunConfig], store: Path) -> None:
    process = context.Process(target=_work, args=(configs, store, False))
    process.start()
    process.join()
    if process.exitcode:
        raise AssertionError(f"a grid that nobody killed ended with exit code {process.exitcode}")


def nodes(folder: Path, count: int) -> dict[str, Any]:
    """A grid on a Ray cluster of two nodes, one of which is killed on the way."""
    import ray
    from ray.cluster_utils import Cluster

    configs, store = grid_of(TINY, count), folder / "cluster"
    run_grid(configs, folder / "serial", device="cpu")
    small = {"num_cpus": 1, "object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    node = cluster.add_node(**small)
    at: list[int] = []

    def kill() -> None:
        while len(RunStore(store).names()) < count // 6:
            time.sleep(0.01)
        cluster.remove_node(node, allow_graceful=False)
        at.append(len(RunStore(store).names()))

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        frame = run_grid(configs, store, engine="ray", address=cluster.address, cpus=1, device="cpu")
    finally:
        thread.join()
        ray.shutdown()
        cluster.shutdown()
    if contents(store) != contents(folder / "serial") or not frame["run_id"].is_unique or len(frame) != count:
        raise AssertionError("the cluster's records are not those of one process")
    if at[0] >= count or left_over(store):
        raise AssertionError(f"the node was killed after {at[0]} runs; left over: {left_over(store)}")
    return {"runs": count, "stored_when_the_node_died": at[0], "records": len(frame), "differing_records": 0}


PARTS: dict[str, tuple[Callable[[Path], dict[str, Any]], Callable[[Path], dict[str, Any]]]] = {
    "throughput": (lambda folder: throughput(folder, 24), lambda folder: throughput(folder, 2, TINY)),
    "overhead": (lambda folder: overhead(folder, (0, 1000, 10_000)), lambda folder: overhead(folder, (0, 20), 2)),
    "finished": (lambda folder: finished(folder, 10_000), lambda folder: finished(folder, 50)),
    "kills": (lambda folder: kills(folder, 100), lambda folder: kills(folder, 4, 4)),
    "nodes": (lambda folder: nodes(folder, 24), lambda folder: nodes(folder, 6)),
}
"""Each part as it is measured, and as a test tries it (but for `nodes`, which takes long)."""


def table(found: dict[str, Any]) -> str:
    """The figures as text, the goals beside those that have one."""
    rows: list[tuple[str, str, str, bool]] = []
    if part := found.get("throughput"):
        rows.append(("throughput of two workers against one", f"{part['ratio']:.2f}x", ">= 1.7", part["ratio"] >= 1.7))
    if part := found.get("overhead"):
        for kind in ("loose", "merged"):
            for size, value in part[f"{kind}_ms"].items():
                label = f"overhead a run beside {int(size):,} {kind} records"
                rows.append((label, f"{value:.1f} ms", "< 50", value < 50))
    if part := found.get("finished"):
        label = f"a grid of {part['runs']:,} finished runs"
        rows.append((label, f"{part['seconds']:.2f} s", "< 3", part["seconds"] < 3))
    if part := found.get("kills"):
        rows.append((f"records that differ after {part['kills']} kills", f"{part['differing_records']}", "0", True))
    if part := found.get("nodes"):
        rows.append(("records that differ after a node's death", f"{part['differing_records']}", "0", True))
    lines = [f"{'':<58}{'measured':>10}{'goal':>10}"]
    for label, value, goal, met in rows:
        verdict = "" if found["quick"] or not goal else "met" if met else "MISSED"
        lines.append(f"{label:<58}{value:>10}{goal:>10}  {verdict}".rstrip())
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description="Grids: throughput, overhead, survival.")
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; default all")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file; other parts' figures in it stay")
    parser.add_argument("--quick", action="store_true", help="as small as can be, where no goal applies")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    torch.set_num_threads(1)
    found: dict[str, Any] = {"torch": torch.__version__, "quick": options.quick}
    if options.out and options.out.exists():
        found = {**json.loads(options.out.read_text()), **found}
    # kills first: the processes they fork should find no threads
    for part in sorted(options.parts or PARTS, key=lambda name: name != "kills"):
        print(f"... {part}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="gcalib-") as folder:
            found[part] = PARTS[part][options.quick](Path(folder))
        if options.out:
            options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
