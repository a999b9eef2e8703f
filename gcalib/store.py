"""The run store: a folder of finished runs.

    records/<run_id>.parquet      one row: the config, the figures, what they cost
    curves/<run_id>.parquet       one row an epoch (epoch 0 is the untrained model)
    checkpoints/<run_id>.pt       of runs under way
    locks/<run_id>.lock           held while a process works on a run; freed by the system when it dies

`RunStore.compact` merges the records, and the curves, of many runs into one file each, `compacted.parquet` beside
them. Files appear whole or not at all: they are written beside their place and renamed, and what a killed process left
half written is removed by whoever takes up its run. Locks are those of the file system, so machines may share a store.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock, Timeout

from gcalib.config import RunConfig
from gcalib.records import (
    CHANGES,
    COMPACTED,
    DEFAULTS,
    RESULTS_VERSION,
    compacted,
    compacted_table,
    equal,
    frame_of,
    loose,
    made,
    read,
    record_of,
    schema_of,
    signature,
    trace,
    with_defaults,
    without,
    write,
)

log = logging.getLogger("gcalib")
MANY_FILES = 2000  # loose records, from which on reading them one by one is a nuisance
SAMPLE = 50  # loose records that estimates learn from


class BusyError(RuntimeError):
    """Another process, here or on another machine, is at the run."""


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
        """Where the record of a run id is, or will be, until it is compacted."""
        return self.folder / "records" / f"{name}.parquet"

    def curve_path(self, name: str) -> Path:
        """Where the curves of a run id are, or will be, until they are compacted."""
        return self.folder / "curves" / f"{name}.parquet"

    def checkpoint_path(self, name: str) -> Path:
        """Where an interrupted run resumes from."""
        return self.folder / "checkpoints" / f"{name}.pt"

    def names(self) -> list[str]:
        """Run ids of all finished runs."""
        return sorted({*loose(self.folder / "records"), *compacted(self.folder / "records")})

    def has(self, name: str) -> bool:
        """Whether a run is finished."""
        return self.record_path(name).exists() or name in compacted(self.folder / "records")

    def get(self, name: str) -> dict[str, Any] | None:
        """The record of a run id, or None if the run is not finished."""
        path = self.record_path(name)
        if path.exists():
            with suppress(FileNotFoundError):  # another process has just compacted it
                return record_of(read(path))
        if name not in compacted(self.folder / "records"):
            return None
        table = compacted_table(self.folder / "records")
        return record_of(table.filter(pc.equal(table["run_id"], name)))

    def curves(self, name: str) -> list[dict[str, float]]:
        """The curves of a finished run, one dict an epoch, as `put` takes them."""
        rows = frame_of(self.folder / "curves", [name]).drop(columns="run_id").to_dict("records")
        return [{str(key): value for key, value in row.items() if value == value} for row in rows]

    def frame(self, run_ids: Sequence[str] | None = None, *, stale: bool = False) -> pd.DataFrame:
        """All records, or those named in that order (a name may come twice); see `load_results`."""
        frame = with_defaults(frame_of(self.folder / "records", run_ids))
        if run_ids is not None:
            return frame.set_index("run_id", drop=False).rename_axis(None).loc[list(run_ids)].reset_index(drop=True)
        if stale and not frame.empty:
            frame["stale"] = frame["results_version"].map(_changed_since)
        elif not frame.empty:
            frame = frame[frame["results_version"] == RESULTS_VERSION].reset_index(drop=True)
        return frame

    def find(self, config: RunConfig) -> dict[str, Any] | None:
        """The record of a config, by its fields alone: for machines without the data.

        Raises
        ------
        ValueError
            If runs on different versions of the data are stored.
        """
        (name,) = self.find_names([config])
        return None if name is None else self.get(name)

    def find_names(self, configs: Iterable[RunConfig]) -> list[str | None]:
        """Run ids of configs, None where there is none; see `find`."""
        ids = _by_fields(self.folder, signature(self.folder / "records"))
        found: list[str | None] = []
        for config in configs:
            names = ids.get(_key(config.canonical().model_dump()), {})
            if len(set(names.values())) > 1:
                raise ValueError(
                    f"{self.folder} holds this config on several versions of {config.pair}: load the data."
                )
            found.append(next(iter(names), None))
        return found

    def costs(self, columns: Sequence[str]) -> pd.DataFrame:
        """Columns of finished runs to learn from: of all merged runs, and of some of the others."""
        folder = self.folder / "records"
        # ids are hashes, so that the first ones are a sample like any other
        names = sorted({*loose(folder)[:SAMPLE], *compacted(folder)})
        frame = with_defaults(frame_of(folder, names, [*columns, "results_version"]))
        return frame if frame.empty else frame[frame["results_version"] == RESULTS_VERSION].reset_index(drop=True)

    def advise(self) -> None:
        """Log a sentence if the store holds so many loose records that reading them takes long."""
        if (count := len(loose(self.folder / "records"))) > MANY_FILES:
            log.info(
                "%s holds %s records in files of their own; `python -m gcalib compact --store %s` merges them, "
                "and it is quicker to read.",
                self.folder, f"{count:,}", self.folder,
            )  # fmt: skip

    def tidy(self) -> None:
        """Remove what killed processes left behind of runs that are finished."""
        with suppress(OSError):  # a store may be there for reading only
            for path in (self.folder / "locks").glob("*.lock"):
                if self.has(path.stem):
                    with self.lock(path.stem):
                        self.checkpoint_path(path.stem).unlink(missing_ok=True)

    def put(self, record: dict[str, Any], curves: list[dict[str, float]]) -> None:
        """Store a finished run: the record last, since its presence says that all is there."""
        name = record["run_id"]
        # floats throughout, so that files of different runs have one schema
        rows = [{"run_id": name, **{key: float(value) for key, value in row.items()}} for row in curves]
        write(self.curve_path(name), pa.Table.from_pylist(rows, schema=schema_of(rows)))
        write(self.record_path(name), pa.Table.from_pylist([{**record, "gca": list(record["gca"])}]))

    @contextmanager
    def lock(self, name: str, *, wait: bool = True) -> Iterator[None]:
        """Hold a run for this process; wait while another, here or on another machine, holds it, or raise BusyError."""
        path = self.folder / "locks" / f"{name}.lock"
        held, left = FileLock(path), path.exists()
        try:
            made(path.parent)
            held.acquire(blocking=wait)
        except Timeout:
            raise BusyError(f"Run {name} is under way in another process.") from None
        except OSError as error:
            reason = error.strerror or str(error)
            raise OSError(f"{self.folder} cannot be written ({reason}), and run {name} is not in it.") from error
        try:
            # a process that was killed at the run left its lock, too; a folder of many runs takes long to look through
            for kind in ("records", "curves", "checkpoints") if left else ():
                _sweep(self.folder / kind, name)
            yield
            if self.has(name):
                # Whoever still waits, or comes next, looks for the record first: the file is not needed any more.
                path.unlink(missing_ok=True)
        finally:
            held.release()

    def compact(self) -> int:
        """Merge all records into one file, and all curves; returns the number of runs in it.

        Runs that others finish meanwhile stay files of their own. A kill at any moment loses nothing: a loose file is
        removed only after the merged one is in place, and one that is in both counts once.
        """
        with FileLock(made(self.folder / "locks") / "compact.lock"):
            for kind in ("curves", "records"):
                folder = self.folder / kind
                _sweep(folder, COMPACTED)
                apart = [folder / f"{name}.parquet" for name in loose(folder)]
                kept = without(compacted_table(folder), [path.stem for path in apart])
                if apart:
                    tables = [kept, *(read(path) for path in apart)]
                    write(folder / f"{COMPACTED}.parquet", pa.concat_tables(tables, promote_options="default"))
                for path in apart:
                    path.unlink(missing_ok=True)
        return len(compacted(self.folder / "records"))


def load_results(store: str | Path = "results", *, stale: bool = False) -> pd.DataFrame:
    """Every finished record of a store, one row a run; an empty frame if there is none.

    Parameters
    ----------
    stale
        Also records of an older results version, which no run would return any more. The column `stale` then says
        what has changed since, and is empty for the others.
    """
    frame = RunStore(store).frame(stale=stale)
    trace(frame)
    return frame


def load_curves(store: str | Path = "results", run_ids: Sequence[str] | None = None) -> pd.DataFrame:
    """Curves of the store's finished runs (or of those named), one row an epoch, `run_id` beside them."""
    return frame_of(Path(store) / "curves", RunStore(store).names() if run_ids is None else run_ids)


def _changed_since(version: int) -> str:
    return "; ".join(change for number, change in sorted(CHANGES.items()) if number > version)


def _key(fields: dict[str, Any]) -> str:
    plain = {name: tuple(fields[name]) if name == "gca" else fields[name] for name in RunConfig.model_fields}
    plain = {name: None if equal(value, None) else value for name, value in plain.items()}
    return json.dumps(plain, sort_keys=True, default=lambda number: number.item())  # numpy's, from a frame


def _sweep(folder: Path, name: str) -> None:
    """Remove what a process left that was killed while it wrote a file of that name."""
    with suppress(FileNotFoundError):
        for entry in os.listdir(folder):  # much quicker than a glob, in a folder of many runs
            if entry.startswith(f".{name}."):
                (folder / entry).unlink(missing_ok=True)


@functools.lru_cache(maxsize=2)
def _by_fields(folder: Path, _: tuple[Any, ...]) -> dict[str, dict[str, str]]:
    """Run ids of every config stored, with the current results version, and the hash of their data."""
    found: dict[str, dict[str, str]] = {}
    for row in RunStore(folder).frame().to_dict("records"):
        fields = {name: row[name] for name in RunConfig.model_fields}
        for name, value in fields.items():  # a column with gaps holds its integers as floats
            if isinstance(value, float) and not np.isnan(value) and isinstance(DEFAULTS.get(name), (int, type(None))):
                fields[name] = int(value)
        found.setdefault(_key(fields), {})[row["run_id"]] = row["data_sha256"]
    return found
