"""The run store: a folder of finished runs.

    runs/<run_id>.json               a new run: its record, its curves, and a hash of both
    records.parquet, curves.parquet  runs that `compact` merged: a row a run; a row an epoch (0 is the untrained model)
    models/<run_id>.safetensors      weights, of runs that were asked to keep them
    checkpoints/<run_id>.pt          of runs under way
    locks/<run_id>.lock              held while a process works on a run; the system frees it when the process dies

Files appear whole or not at all: they are written under another name and renamed. Machines may share a store.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock

from gcalib.config import RunConfig, run_id

CHANGES = {
    1: "the first results",
    2: "padded batches, the cosine schedule, options of published code by name",
    3: "a gate with the paper's 12 d^2 parameters, titles and brands of more items, operations of a batch as it is",
}
"""Results versions and what each changed. Add one whenever a change alters results; older records are not reused."""

RESULTS_VERSION = max(CHANGES)

CIRCUMSTANCES = ("seconds", "peak_memory_bytes", "device", "threads")
"""Columns of a record that may differ between two runs of the same config."""

DEFAULTS = {name: field.default for name, field in RunConfig.model_fields.items() if not field.is_required()}
"""What a record means that is older than one of the config's fields."""

LISTS = {"gca": pa.list_(pa.int64()), "published": pa.list_(pa.string())}

SUFFIXES = {"runs": "json", "checkpoints": "pt", "models": "safetensors", "locks": "lock"}


class RunStore:
    """A folder of finished runs (see the module's docstring), made when the first one is stored."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, kind: str, name: str) -> Path:
        """Where a run has its record (until it is merged), checkpoint, model or lock; `kind` is one of `SUFFIXES`."""
        return self.folder / kind / f"{name}.{SUFFIXES[kind]}"

    def names(self) -> list[str]:
        """Ids of all finished runs whose records answer."""
        merged = self._merged()
        answering = pc.equal(merged["results_version"], RESULTS_VERSION)
        return sorted({*self._new(), *merged["run_id"].filter(answering).to_pylist()})

    def records(self, run_ids: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
        """Records that answer, by run id. One that is older than a field of the config means its default."""
        records: dict[str, dict[str, Any]] = {}
        for row in self._table("records", run_ids).to_pylist():
            if row["results_version"] == RESULTS_VERSION:
                record = DEFAULTS | {key: value for key, value in row.items() if value is not None}
                records[row["run_id"]] = record | {key: tuple(record[key]) for key in LISTS}
        return records

    def get(self, name: str) -> dict[str, Any] | None:
        """The record of a run id; None if the run is not finished, or of a results version that no longer answers."""
        return self.records([name]).get(name)

    def find(self, config: RunConfig) -> str | None:
        """Id of the run of a config, for machines without the data; ValueError if it is stored on several versions."""
        spelt = (config.pair, config.columns, config.shared_ids)
        ids = {run_id(config, str(sha256), RESULTS_VERSION) for *data, sha256 in self._data if tuple(data) == spelt}
        if len(found := ids.intersection(self.names())) > 1:
            raise ValueError(f"{self.folder} holds this config on several versions of {config.pair}: load the data.")
        return found.pop() if found else None

    def frame(self, run_ids: Sequence[str] | None = None) -> pd.DataFrame:
        """All records that answer, or those named in that order (a name may come twice); `trace` notes them."""
        records = self.records(run_ids)
        trace(rows := [records[name] for name in (records if run_ids is None else run_ids)])
        return pd.DataFrame(rows)

    @functools.cached_property
    def _data(self) -> set[tuple[str | None, ...]]:
        """Pairs of the stored runs as they were spelt, each with the hash of its data."""
        names = ("pair", "columns", "shared_ids", "data_sha256")
        return {tuple(record[name] for name in names) for record in self.records().values()}

    def _new(self) -> list[str]:
        """Ids of the runs that have a file of their own; a copy that some program made has a longer name."""
        return sorted(path.stem for path in (self.folder / "runs").glob(f"{'?' * 16}.json"))

    def _merged(self, kind: str = "records") -> pa.Table:
        """The table of merged runs, which is kept until its file changes."""
        path = self.folder / f"{kind}.parquet"
        if not path.exists():
            return _from_rows([])
        return _read_table(path, path.stat().st_mtime_ns, path.stat().st_ino)

    def _table(self, kind: str, run_ids: Sequence[str] | None = None) -> pa.Table:
        """Records or curves of all runs, or of those named, by run id; without columns that are all empty."""
        rows: list[dict[str, Any]] = []
        for name in self._new() if run_ids is None else set(run_ids):
            with suppress(FileNotFoundError):  # it is merged, perhaps a moment ago: the table is read after this
                record, curves = read_run(self.path("runs", name))
                rows += [record] if kind == "records" else [{"run_id": name, **row} for row in curves]
        merged, new = self._merged(kind), _from_rows(rows)
        if run_ids is not None:
            merged = merged.filter(pc.is_in(merged["run_id"], pa.array(run_ids, pa.string())))
        merged = merged.filter(pc.invert(pc.is_in(merged["run_id"], new["run_id"])))
        table = pa.concat_tables([merged, new], promote_options="permissive")
        filled = [name for name in table.column_names if name == "run_id" or table[name].null_count < len(table)]
        return table.select(filled).sort_by("run_id")

    def put(self, record: dict[str, Any], curves: list[dict[str, float]]) -> None:
        """Store a finished run."""
        plain = json.loads(json.dumps([record, curves], default=lambda number: number.item()))
        content = {"sha256": _sha256(plain), "record": plain[0], "curves": plain[1]}
        write(self.path("runs", record["run_id"]), json.dumps(content, indent=1).encode())

    @contextmanager
    def lock(self, name: str, *, wait: bool = True) -> Iterator[None]:
        """Hold a run; where another process holds it, here or on another machine, wait or raise `filelock.Timeout`."""
        with FileLock(path := self.path("locks", name), blocking=wait):
            for left in self.folder.glob(f"*/.{name}.*"):  # by a process that was killed while it wrote
                left.unlink(missing_ok=True)
            yield
            if name in self.names():
                path.unlink(missing_ok=True)  # who still waits for it, or comes next, looks for the record first

    def compact(self) -> int:
        """Merge all new runs into two files; returns the number of runs in them.

        Runs that others finish meanwhile stay files of their own. A kill at any moment loses nothing: a file is removed
        only when the merged ones are in place, and a run that is in both counts once.
        """
        if new := self._new():
            with FileLock(self.path("locks", "compact")):
                for kind in ("curves", "records"):
                    buffer = pa.BufferOutputStream()
                    table = self._table(kind)
                    pq.write_table(table, buffer, compression="zstd", write_statistics=False, write_page_checksum=True)
                    write(self.folder / f"{kind}.parquet", buffer.getvalue().to_pybytes())
                for name in new:
                    self.path("runs", name).unlink(missing_ok=True)
        return len(self._merged())


def load_results(store: str | Path = "results") -> pd.DataFrame:
    """Every finished record of a store, one row a run; an empty frame if there is none."""
    return RunStore(store).frame()


def load_curves(store: str | Path = "results", run_ids: Sequence[str] | None = None) -> pd.DataFrame:
    """Curves of the store's finished runs (or of those named), one row an epoch, `run_id` beside them."""
    return RunStore(store)._table("curves", run_ids).to_pandas()


def record_sha256(record: dict[str, Any]) -> str:
    """Hash of a record's id, which speaks for config and data, and of its numbers but for its circumstances."""
    kept = sorted(key for key in record if key not in (*CIRCUMSTANCES, *DEFAULTS))
    numbers = [(key, float(record[key])) for key in kept if isinstance(record[key], (int, float, np.number))]
    return _sha256([record["run_id"], [(key, number) for key, number in numbers if number == number]])


def trace(records: Iterable[dict[str, Any]]) -> None:
    """Note which records a notebook used, if its execution asks for that (`GCALIB_TRACE` names a file)."""
    if target := os.environ.get("GCALIB_TRACE"):
        with open(target, "a", encoding="utf-8") as file:
            file.writelines(f"{record['run_id']} {record_sha256(record)}\n" for record in records)


def write(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # random, since processes on two machines may have the same number
    temporary = path.parent / f".{path.stem}.{secrets.token_hex(4)}"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or the name may outlive a power cut, and the content not
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_run(path: Path) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Record and curves in the file of a new run; ValueError, which says what to do, if it is damaged."""
    text = path.read_bytes()
    try:
        content = json.loads(text)
        if content.pop("sha256") != _sha256(list(content.values())):
            raise ValueError("its content does not have the hash that it names")
        if content["record"]["run_id"] != path.stem:
            raise ValueError(f"it is a copy of run {content['record']['run_id']}")
        return content["record"], content["curves"]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it to run it again.") from error


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@functools.lru_cache(maxsize=8)
def _read_table(path: Path, *version: int) -> pa.Table:
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
        if not {"run_id", "results_version" if path.stem == "records" else "epoch"} <= {*table.column_names}:
            raise ValueError("it is not a table of runs")
        return table
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): it holds many runs, so restore it from a copy.") from error


def _from_rows(rows: list[dict[str, Any]]) -> pa.Table:
    types = {"run_id": pa.string(), "results_version": pa.int64(), **LISTS}
    columns = dict.fromkeys(["run_id", "results_version", *(key for row in rows for key in row)])
    return pa.table({key: pa.array([row.get(key) for row in rows], types.get(key)) for key in columns})
