"""Runs and their store: `run(config)` gives a record, from the store if it is there, else by training.

A store is a folder:

    records/<run_id>.parquet      one row: the config, the figures, what they cost
    curves/<run_id>.parquet       one row an epoch (epoch 0 is the untrained model)
    checkpoints/<run_id>.pt       of runs under way
    locks/<run_id>.lock           held while a process works on a run; freed by the system when it dies

Files appear whole or not at all: they are written beside their place and renamed.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import logging
import multiprocessing
import os
import resource
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from filelock import FileLock
from tqdm import tqdm

from gcalib.attention import GatedCrossAttention
from gcalib.config import RunConfig, run_id
from gcalib.data.pair import DataError, Pair
from gcalib.data.sources import load_pair
from gcalib.evaluation import evaluate
from gcalib.models import Recommender, build_model, matched
from gcalib.models.cost import flops_per_step, parameter_counts
from gcalib.training import fit, pick_device

log = logging.getLogger("gcalib")

RESULTS_VERSION = 1
"""Raise by hand whenever a change alters results; `tests/test_experiments.py` pins a tiny run to it."""

CIRCUMSTANCES = ("seconds", "peak_memory_bytes", "device", "threads")
"""Columns of a record that may differ between two runs of the same config."""


DEFAULTS = {name: field.default for name, field in RunConfig.model_fields.items() if not field.is_required()}
"""What a record means that is older than one of the config's fields: such a field came with what had been so before."""


class RunStore:
    """A folder of finished runs (see the module's docstring).

    Parameters
    ----------
    folder
        Made when the first run is stored.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def record_path(self, name: str) -> Path:
        """Where the record of a run id is, or will be."""
        return self.folder / "records" / f"{name}.parquet"

    def curve_path(self, name: str) -> Path:
        """Where the curves of a run id are, or will be."""
        return self.folder / "curves" / f"{name}.parquet"

    def checkpoint_path(self, name: str) -> Path:
        """Where an interrupted run resumes from."""
        return self.folder / "checkpoints" / f"{name}.pt"

    def get(self, name: str) -> dict[str, Any] | None:
        """The record of a run id, or None if the run is not finished."""
        path = self.record_path(name)
        return _record_of(_read(path)) if path.exists() else None

    def find(self, config: RunConfig) -> dict[str, Any] | None:
        """The record of a config, by its fields alone: for machines without the data.

        Raises
        ------
        ValueError
            If runs on different versions of the data are stored.
        """
        frame = load_results(self.folder)
        if frame.empty:
            return None
        wanted = config.model_dump()
        same = frame["results_version"] == RESULTS_VERSION
        for name, value in wanted.items():
            column = frame[name]
            same &= column.map(lambda found, value=value: _equal(found, value))
        found = frame[same]
        if found["data_sha256"].nunique() > 1:
            raise ValueError(f"{self.folder} holds this config on several versions of {config.pair}: load the data.")
        return None if found.empty else self.get(found["run_id"].iloc[0])

    def put(self, record: dict[str, Any], curves: list[dict[str, float]]) -> None:
        """Store a finished run: the record last, since its presence says that all is there."""
        name = record["run_id"]
        # floats throughout, so that files of different runs have one schema
        rows = [{"run_id": name, **{key: float(value) for key, value in row.items()}} for row in curves]
        _write(self.curve_path(name), pa.Table.from_pylist(rows, schema=_schema(rows)))
        _write(self.record_path(name), pa.Table.from_pylist([record]))

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold a run for this process; waits while another holds it."""
        path = self.folder / "locks" / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path):
            yield
            if self.record_path(name).exists():
                # Whoever still waits, or comes next, looks for the record first: the file is not needed any more.
                path.unlink(missing_ok=True)

    def names(self) -> list[str]:
        """Run ids of all finished runs."""
        return sorted(path.stem for path in (self.folder / "records").glob("*.parquet"))


def _schema(rows: list[dict[str, Any]]) -> pa.Schema:
    """Every column of any row: the untrained epoch has no loss."""
    columns = dict.fromkeys(key for row in rows for key in row)
    return pa.schema([(key, pa.string() if key == "run_id" else pa.float64()) for key in columns])


def _write(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pq.write_table(table, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> pa.Table:
    try:
        return pq.ParquetFile(path).read()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a readable record ({error}): delete it to run it again.") from error


def _record_of(table: pa.Table) -> dict[str, Any]:
    record: dict[str, Any] = table.to_pylist()[0]
    return {**DEFAULTS, **record, "gca": tuple(record["gca"])}


def _equal(found: Any, value: Any) -> bool:
    if isinstance(found, (list, np.ndarray)):
        found = tuple(found)
    missing = found is None or (isinstance(found, float) and np.isnan(found))
    return bool(missing if value is None else found == value)


def _frame(paths: Iterable[Path]) -> pd.DataFrame:
    tables = [_read(path) for path in sorted(paths)]
    return pa.concat_tables(tables, promote_options="default").to_pandas() if tables else pd.DataFrame()


def load_results(store: str | Path = "results") -> pd.DataFrame:
    """Every finished record of a store, one row a run; an empty frame if there is none."""
    frame = _frame((Path(store) / "records").glob("*.parquet"))
    if not frame.empty:
        frame["gca"] = frame["gca"].map(tuple)
        for name, default in DEFAULTS.items():
            if name not in frame:
                frame[name] = default
            elif default is not None and frame[name].isna().any():
                frame[name] = frame[name].where(frame[name].notna(), default).infer_objects()
        trace({str(key): value for key, value in row.items()} for row in frame.to_dict("records"))
    return frame


def load_curves(store: str | Path = "results", run_ids: Sequence[str] | None = None) -> pd.DataFrame:
    """Curves of the store's finished runs (or of those named), one row an epoch, `run_id` beside them."""
    runs = RunStore(store)
    return _frame(runs.curve_path(name) for name in (runs.names() if run_ids is None else run_ids))


def record_sha256(record: dict[str, Any]) -> str:
    """Hash of a record without its circumstances; a row of `load_results` hashes like the record it was read from."""
    content = {}
    for key, value in record.items():
        if key in CIRCUMSTANCES or _equal(value, None):
            continue  # a frame has the columns of all its runs: what a record lacks is missing there
        if key in DEFAULTS and _equal(value, DEFAULTS[key]):
            continue  # and a record may be older than the field
        if isinstance(value, (int, float, np.number)) and not isinstance(value, bool):
            value = float(value)  # and a column with gaps holds its integers as floats
        content[key] = [int(point) for point in value] if isinstance(value, (tuple, list, np.ndarray)) else value
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=bool).encode()).hexdigest()


def trace(records: Iterable[dict[str, Any]]) -> None:
    """Note which records a notebook used, if the shelf asks for it (`GCALIB_TRACE` names a file)."""
    if target := os.environ.get("GCALIB_TRACE"):
        with open(target, "a", encoding="utf-8") as file:
            file.writelines(f"{record['run_id']} {record_sha256(record)}\n" for record in records)


@functools.lru_cache(maxsize=4)
def _pair(name: str, ties: str, tie_seed: int, max_length: int, min_per_domain: int | None) -> Pair:
    return load_pair(name, ties=ties, tie_seed=tie_seed, max_length=max_length, min_per_domain=min_per_domain)


def pair_of(config: RunConfig) -> Pair:
    """The pair of a config, with its tie order, maximum length and minimum (kept for the next call)."""
    return _pair(config.pair, config.ties, config.tie_seed, config.max_length, config.min_per_domain)


def run(config: RunConfig, store: str | Path = "results", *, device: str = "auto") -> dict[str, Any]:
    """Train, evaluate and measure one config, or fetch its record if the store has it.

    An interrupted run resumes from its checkpoint. A second process that asks for a run under way waits for it.

    Returns
    -------
    dict
        The config's fields, `run_id`, `params_*` (see `parameter_counts`), `flops_per_step`,
        `seconds`, `peak_memory_bytes`, `epochs_trained`, `best_epoch`, `stopped_early` (False: cut by `epochs`),
        `code_version`, `results_version`, `data_sha256`, `clock` (False: a per-domain
        pair, whose contexts may be later than their targets), and `<split>.<domain>...` figures of the best epoch
        (see `gcalib.evaluation.evaluate`; beside it `null_init_mean_abs`, from untrained cross-attention).

    Raises
    ------
    DivergedError
        If the loss stops being finite; nothing is recorded.
    ValueError
        If the data is bad, or missing while the store has no such run.
    """
    config = config.canonical()
    runs = RunStore(store)
    try:
        pair = pair_of(config)
    except DataError:
        if (record := runs.find(config)) is None:
            raise
        trace([record])
        return record
    name = run_id(config, pair.sha256, RESULTS_VERSION)
    if (record := runs.get(name)) is None:
        with runs.lock(name):
            if runs.get(name) is None:
                runs.put(*_compute(config, pair, name, runs.checkpoint_path(name), pick_device(device)))
                runs.checkpoint_path(name).unlink(missing_ok=True)
        record = runs.get(name)
        assert record is not None, f"{name} was stored a moment ago and is gone"
    trace([record])
    return record


def _compute(
    config: RunConfig, pair: Pair, name: str, checkpoint: Path, device: torch.device
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    _reset_peak_memory(device)
    twin = matched(config, pair) if config.match else None
    trained = twin.config if twin else config  # what is built and trained; the record keeps what was asked for
    done = fit(trained, pair, device=device, checkpoint=checkpoint)
    model = done.model
    figures: dict[str, float] = {}
    for split in ("val", "test"):
        found = evaluate(model, pair, split)
        if trained.gca:
            untrained = evaluate(_with_initial_gca(model, trained, pair), pair, split)
            found |= {
                key.replace("cos_mean_abs", "null_init_mean_abs"): value
                for key, value in untrained.items()
                if key.endswith(".cos_mean_abs")
            }
        figures |= {f"{split}.{key}": value for key, value in found.items()}
    record = {
        "run_id": name,
        **config.model_dump(),
        **parameter_counts(model),
        "flops_per_step": flops_per_step(model, pair, config.batch_size) if model.trained else 0,
        "seconds": done.seconds,
        "peak_memory_bytes": _peak_memory(device),
        "epochs_trained": len(done.curves) - 1,
        "best_epoch": done.best_epoch,
        "stopped_early": done.stopped_early,
        "code_version": _code_version(),
        "results_version": RESULTS_VERSION,
        "data_sha256": pair.sha256,
        "clock": pair.has_clock,
        "device": device.type,
        "threads": torch.get_num_threads(),
        **({} if twin is None else twin.facts()),
        **model.facts(),
        **figures,
    }
    return {**record, "gca": list(config.gca)}, done.curves


def _with_initial_gca(model: Recommender, config: RunConfig, pair: Pair) -> Recommender:
    """The trained model with every cross-attention set back to its start: the third null of `gcalib.alignment`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        fresh = dict(build_model(config, pair).named_modules())
    mixed = copy.deepcopy(model)
    for name, module in mixed.named_modules():
        if isinstance(module, GatedCrossAttention):
            module.load_state_dict(fresh[name].state_dict())
    return mixed


def _code_version() -> str:
    import gcalib

    return gcalib.__version__


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        with suppress(OSError):  # some containers forbid it: then the peak is the process's so far
            Path("/proc/self/clear_refs").write_text("5")  # forget the process's earlier peak


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU, or of this process since the run began (since it began itself, outside Linux)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class GridError(RuntimeError):
    """Some runs of a grid failed; the others are stored. `failures` maps each failed config to its error."""

    def __init__(self, failures: dict[RunConfig, BaseException]) -> None:
        self.failures = failures
        lines = (f"{config.model_dump(exclude_defaults=True)}: {error}" for config, error in failures.items())
        super().__init__(f"{len(failures)} run(s) failed, the others are stored. " + " | ".join(lines))


def run_grid(
    configs: Iterable[RunConfig],
    store: str | Path = "results",
    *,
    engine: Literal["local"] = "local",
    workers: int = 1,
    device: str = "auto",
) -> pd.DataFrame:
    """Run every config that the store does not hold; return all their records, one row each, in the order given.

    Parameters
    ----------
    workers
        Processes; they share the machine's cores evenly.

    Raises
    ------
    GridError
        After all other runs have finished, if some failed.
    ValueError
        For an unknown engine.
    """
    if engine != "local":
        raise ValueError(f"engine={engine!r} is unknown; the engines are local.")
    asked = [config.canonical() for config in configs]
    unique = list(dict.fromkeys(asked))
    records: dict[RunConfig, dict[str, Any]] = {}
    failures: dict[RunConfig, BaseException] = {}
    with tqdm(total=len(unique), unit="run", disable=not sys.stderr.isatty() or len(unique) == 1) as bar:
        for config, outcome in _outcomes(unique, store, workers, device):
            if isinstance(outcome, BaseException):
                failures[config] = outcome
                log.error("%s failed: %s", config.model_dump(exclude_defaults=True), outcome)
            else:
                records[config] = outcome
            bar.update()
    if failures:
        raise GridError(failures)
    frame = pd.DataFrame([records[config] for config in asked])
    return frame


def _outcomes(
    configs: list[RunConfig], store: str | Path, workers: int, device: str
) -> Iterator[tuple[RunConfig, dict[str, Any] | BaseException]]:
    if workers == 1 or len(configs) == 1:
        for config in configs:
            try:
                yield config, run(config, store, device=device)
            except Exception as error:
                yield config, error
        return
    # Fresh interpreters: a forked torch keeps a thread pool that no longer exists.
    spawn = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        waiting = {pool.submit(run, config, store, device=device): config for config in configs}
        for future in as_completed(waiting):
            yield waiting[future], future.exception() or future.result()
