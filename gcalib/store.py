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
from filelock import FileLock, Timeout

from gcalib.config import RunConfig, run_id

CHANGES = {1: "the first results", 2: "padded batches, the cosine schedule, options of published code by name"}
"""Results versions and what each changed. Add one whenever a change alters results: older records answer no longer."""

RESULTS_VERSION = max(CHANGES)
ANSWERING = (1, 2)
"""Versions whose records answer. Those of version 1 were given the ids of version 2; the next one will be alone."""

CIRCUMSTANCES = ("seconds", "peak_memory_bytes", "device", "threads")
"""Columns of a record that may differ between two runs of the same config."""

DEFAULTS = {name: field.default for name, field in RunConfig.model_fields.items() if not field.is_required()}
"""What a record means that is older than one of the config's fields."""

LISTS = {"gca": pa.list_(pa.int64()), "published": pa.list_(pa.string())}


class BusyError(RuntimeError):
    """Another process, here or on another machine, works on the run."""


class RunStore:
    """A folder of finished runs (see the module's docstring), made when the first one is stored."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def run_path(self, name: str) -> Path:
        """Where a run is stored until it is merged."""
        return self.folder / "runs" / f"{name}.json"

    def checkpoint_path(self, name: str) -> Path:
        """Where an interrupted run resumes from."""
        return self.folder / "checkpoints" / f"{name}.pt"

    def model_path(self, name: str) -> Path:
        """Where the weights of a run are, if they were kept."""
        return self.folder / "models" / f"{name}.safetensors"

    def names(self) -> list[str]:
        """Ids of all finished runs whose records answer."""
        new, merged = self._new(), self._merged()
        answering = pc.is_in(merged["results_version"], pa.array(ANSWERING))
        return sorted({*new, *merged["run_id"].filter(answering).to_pylist()})

    def get(self, name: str) -> dict[str, Any] | None:
        """The record of a run id; None if the run is not finished, or of a results version that no longer answers."""
        try:
            record, _ = read_run(self.run_path(name))
        except FileNotFoundError:
            if (row := (merged := self._merged())["run_id"].index(name).as_py()) < 0:
                return None
            record = {key: value for key, value in merged.slice(row, 1).to_pylist()[0].items() if value is not None}
        fields = {key: record.get(key, default) for key, default in DEFAULTS.items()}
        lists = {key: tuple(fields[key]) for key in LISTS}
        return {**record, **fields, **lists} if record["results_version"] in ANSWERING else None

    def find(self, config: RunConfig) -> dict[str, Any] | None:
        """The record of a config, for machines without the data; ValueError if the store has it on several versions."""
        ids = [run_id(config, sha256, RESULTS_VERSION) for pair, sha256 in self._data if pair == config.pair]
        found = [record for name in ids if (record := self.get(name))]
        if len(found) > 1:
            raise ValueError(f"{self.folder} holds this config on several versions of {config.pair}: load the data.")
        return found[0] if found else None

    def frame(self, run_ids: Sequence[str] | None = None) -> pd.DataFrame:
        """All records that answer, or those named in that order (a name may come twice)."""
        frame: pd.DataFrame = self._table("records", run_ids).to_pandas()
        if frame.empty:
            return frame
        for name, default in DEFAULTS.items():
            if name not in frame:
                frame[name] = default
            elif default is not None and frame[name].isna().any():
                frame[name] = frame[name].where(frame[name].notna(), default).infer_objects()
        for name in LISTS:
            frame[name] = [tuple(value.tolist()) for value in frame[name]]
        if run_ids is None:
            return frame[frame["results_version"].isin(ANSWERING)].reset_index(drop=True)
        return frame.set_index("run_id", drop=False).rename_axis(None).loc[list(run_ids)].reset_index(drop=True)

    @functools.cached_property
    def _data(self) -> set[tuple[str, str]]:
        """Pairs of the stored runs, each with the hash of its data."""
        frame = self.frame()
        return set(zip(frame["pair"], frame["data_sha256"], strict=True)) if len(frame) else set()

    def _new(self) -> list[str]:
        """Ids of the runs that have a file of their own; a copy that some program made has a longer name."""
        return sorted(path.stem for path in (self.folder / "runs").glob(f"{'?' * 16}.json"))

    def _merged(self, kind: str = "records") -> pa.Table:
        """The table of merged runs, which is kept until its file changes."""
        path = self.folder / f"{kind}.parquet"
        if not path.exists():
            return _from_rows([])
        stat = path.stat()
        return _read_table(path, (stat.st_mtime_ns, stat.st_ino))

    def _table(self, kind: str, run_ids: Sequence[str] | None = None) -> pa.Table:
        """Records or curves of all runs, or of those named, by run id; without columns that are all empty."""
        rows: list[dict[str, Any]] = []
        for name in self._new() if run_ids is None else set(run_ids):
            with suppress(FileNotFoundError):  # it is merged, perhaps a moment ago: the table is read after this
                record, curves = read_run(self.run_path(name))
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
        write(self.run_path(record["run_id"]), json.dumps(content, indent=1).encode())

    @contextmanager
    def lock(self, name: str, *, wait: bool = True) -> Iterator[None]:
        """Hold a run for this process; wait while another, here or on another machine, holds it, or raise BusyError."""
        path = self.folder / "locks" / f"{name}.lock"
        held = FileLock(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held.acquire(blocking=wait)
        except Timeout:
            raise BusyError(f"Run {name} is under way in another process.") from None
        except OSError as error:
            reason = error.strerror or str(error)
            raise OSError(f"{self.folder} cannot be written ({reason}), and run {name} is not in it.") from error
        try:
            for left in self.folder.glob(f"*/.{name}.*"):  # by a process that was killed while it wrote
                left.unlink(missing_ok=True)
            yield
            if name in self.names():
                path.unlink(missing_ok=True)  # who still waits for it, or comes next, looks for the record first
        finally:
            held.release()

    def compact(self) -> int:
        """Merge all new runs into two files; returns the number of runs in them.

        Runs that others finish meanwhile stay files of their own. A kill at any moment loses nothing: a file is removed
        only when the merged ones are in place, and a run that is in both counts once.
        """
        if new := self._new():
            (self.folder / "locks").mkdir(exist_ok=True)
            with FileLock(self.folder / "locks" / "compact.lock"):
                for kind in ("curves", "records"):
                    buffer = pa.BufferOutputStream()
                    table = self._table(kind)
                    pq.write_table(table, buffer, compression="zstd", write_statistics=False, write_page_checksum=True)
                    write(self.folder / f"{kind}.parquet", buffer.getvalue().to_pybytes())
                for name in new:
                    self.run_path(name).unlink(missing_ok=True)
        return len(self._merged())


def load_results(store: str | Path = "results") -> pd.DataFrame:
    """Every finished record of a store, one row a run; an empty frame if there is none."""
    frame = RunStore(store).frame()
    trace(frame)
    return frame


def load_curves(store: str | Path = "results", run_ids: Sequence[str] | None = None) -> pd.DataFrame:
    """Curves of the store's finished runs (or of those named), one row an epoch, `run_id` beside them."""
    frame: pd.DataFrame = RunStore(store)._table("curves", run_ids).to_pandas()
    return frame


def record_sha256(record: dict[str, Any]) -> str:
    """Hash of a record's id, which speaks for config and data, and of its numbers but for its circumstances."""
    kept = sorted(key for key in record if key not in (*CIRCUMSTANCES, *DEFAULTS))
    numbers = [(key, float(record[key])) for key in kept if isinstance(record[key], (int, float, np.number))]
    return _sha256([record["run_id"], [(key, number) for key, number in numbers if number == number]])


def trace(records: pd.DataFrame | Iterable[dict[str, Any]]) -> None:
    """Note which records a notebook used, if its execution asks for that (`GCALIB_TRACE` names a file)."""
    if target := os.environ.get("GCALIB_TRACE"):
        rows: Iterable[Any] = records.to_dict("records") if isinstance(records, pd.DataFrame) else records
        with open(target, "a", encoding="utf-8") as file:
            file.writelines(f"{row['run_id']} {record_sha256(row)}\n" for row in rows)


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
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_run(path: Path) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Record and curves in the file of a new run; ValueError, which says what to do, if it is damaged."""
    try:
        content = json.loads(path.read_bytes())
        if content.pop("sha256") != _sha256(list(content.values())):
            raise ValueError("its content does not have the hash that it names")
        return content["record"], content["curves"]
    except FileNotFoundError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it to run it again.") from error


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@functools.lru_cache(maxsize=8)
def _read_table(path: Path, version: tuple[int, int]) -> pa.Table:
    try:
        return pq.ParquetFile(path, page_checksum_verification=True).read()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): it holds many runs, so restore it from a copy.") from error


def _from_rows(rows: list[dict[str, Any]]) -> pa.Table:
    types = {"run_id": pa.string(), "results_version": pa.int64(), **LISTS}
    columns = dict.fromkeys(["run_id", "results_version", *(key for row in rows for key in row)])
    return pa.table({key: pa.array([row.get(key) for row in rows], types.get(key)) for key in columns})
