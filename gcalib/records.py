"""Records as files and rows: what they hold, how they are hashed, read and written.

A folder of records (or of curves) holds files of one run each, named by run id, and perhaps one file that merges many,
`compacted.parquet`; a run that is in both counts once.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gcalib.config import RunConfig

CHANGES = {1: "the first results"}
"""Results versions, and what each changed. Add one whenever a change alters results; `tests/test_experiments.py` pins a
tiny run to the newest. Records of an older one are stale: they are neither returned nor lost."""

RESULTS_VERSION = max(CHANGES)

CIRCUMSTANCES = ("seconds", "peak_memory_bytes", "device", "threads")
"""Columns of a record that may differ between two runs of the same config."""

DEFAULTS = {name: field.default for name, field in RunConfig.model_fields.items() if not field.is_required()}
"""What a record means that is older than one of the config's fields: such a field came with what had been so before."""

COMPACTED = "compacted"


def record_sha256(record: dict[str, Any]) -> str:
    """Hash of a record without its circumstances; a row of `load_results` hashes like the record it was read from."""
    content = {}
    for key, value in record.items():
        if key in CIRCUMSTANCES or key == "stale" or equal(value, None):
            continue  # a frame has the columns of all its runs: what a record lacks is missing there
        if key in DEFAULTS and equal(value, DEFAULTS[key]):
            continue  # and a record may be older than the field
        if isinstance(value, (int, float, np.number)) and not isinstance(value, bool):
            value = float(value)  # and a column with gaps holds its integers as floats
        content[key] = [int(point) for point in value] if isinstance(value, (tuple, list, np.ndarray)) else value
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=bool).encode()).hexdigest()


def trace(records: pd.DataFrame | Iterable[dict[str, Any]]) -> None:
    """Note which records a notebook used, if the shelf asks for it (`GCALIB_TRACE` names a file)."""
    if target := os.environ.get("GCALIB_TRACE"):
        rows: Iterable[Any] = records.to_dict("records") if isinstance(records, pd.DataFrame) else records
        with open(target, "a", encoding="utf-8") as file:
            file.writelines(f"{row['run_id']} {record_sha256(row)}\n" for row in rows)


def equal(found: Any, value: Any) -> bool:
    """Whether a field as read from a file is that value: lists are tuples there, and None may be nan."""
    if isinstance(found, (list, np.ndarray)):
        found = tuple(found)
    missing = found is None or (isinstance(found, float) and np.isnan(found))
    return bool(missing if value is None else found == value)


def made(folder: Path) -> Path:
    """The folder, which now exists."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def loose(folder: Path) -> list[str]:
    """Run ids that have a file of their own."""
    return sorted(path.stem for path in folder.glob("[!.]*.parquet") if path.stem != COMPACTED)


def signature(folder: Path) -> tuple[Any, ...]:
    """What changes when a run is stored or the store compacted."""
    return (*loose(folder), _stamp(folder / f"{COMPACTED}.parquet"))


def compacted_table(folder: Path) -> pa.Table:
    """The merged file, kept until it changes; an empty table if there is none."""
    path = folder / f"{COMPACTED}.parquet"
    return _cached_table(path, _stamp(path))


def compacted(folder: Path) -> frozenset[str]:
    """Run ids of the merged file."""
    path = folder / f"{COMPACTED}.parquet"
    return _cached_names(path, _stamp(path))


def _stamp(path: Path) -> tuple[int, ...]:
    if not path.exists():
        return ()
    stat = path.stat()  # a renamed file is another inode, whatever the clock says
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


@functools.lru_cache(maxsize=8)
def _cached_table(path: Path, stamp: tuple[int, ...]) -> pa.Table:
    return read(path) if stamp else pa.table({"run_id": pa.array([], pa.string())})


@functools.lru_cache(maxsize=8)
def _cached_names(path: Path, version: tuple[int, ...]) -> frozenset[str]:
    return frozenset(read(path, ["run_id"])["run_id"].to_pylist() if version else ())


def without(table: pa.Table, names: Sequence[str]) -> pa.Table:
    """Rows of other runs than those named."""
    return table.filter(pc.invert(pc.is_in(table["run_id"], pa.array(names, pa.string()))))


def frame_of(
    folder: Path, run_ids: Sequence[str] | None = None, columns: Sequence[str] | None = None
) -> pd.DataFrame:
    """Rows of all runs, or of those named, in order of their ids; all columns, or those of `columns` that exist."""
    columns = None if columns is None else list(dict.fromkeys(("run_id", *columns)))
    wanted = None if run_ids is None else set(run_ids)
    while True:
        apart = [name for name in loose(folder) if wanted is None or name in wanted]
        try:
            tables = [read(folder / f"{name}.parquet", columns) for name in apart]
            break
        except FileNotFoundError:
            continue  # another process has just merged it
    merged = without(_merged(folder, columns, needed=wanted is None or not wanted <= set(apart)), apart)
    if wanted is not None:
        merged = merged.filter(pc.is_in(merged["run_id"], pa.array(sorted(wanted), pa.string())))
    tables += [merged] * bool(len(merged))
    if not tables:
        return pd.DataFrame()
    table = pa.concat_tables(tables, promote_options="default")
    filled = [name for name in table.column_names if table[name].null_count < len(table)]
    frame: pd.DataFrame = table.select(filled).to_pandas()
    return frame.sort_values("run_id", kind="stable", ignore_index=True)


def _merged(folder: Path, columns: list[str] | None, needed: bool) -> pa.Table:
    """The merged file, of which no more is read than is asked for: many runs may have hundreds of columns."""
    path = folder / f"{COMPACTED}.parquet"
    if not needed or not path.exists():
        return _cached_table(path, ())
    return compacted_table(folder) if columns is None else read(path, columns)


def with_defaults(frame: pd.DataFrame) -> pd.DataFrame:
    """A frame of records that has all fields of the config, also where the records are older than the field."""
    if frame.empty:
        return frame
    if "gca" in frame:
        frame["gca"] = [tuple(int(point) for point in points) for points in frame["gca"]]
    for name, default in DEFAULTS.items():
        if name not in frame:
            frame[name] = default
        elif default is not None and frame[name].isna().any():
            frame[name] = frame[name].where(frame[name].notna(), default).infer_objects()
    return frame


def schema_of(rows: list[dict[str, Any]]) -> pa.Schema:
    """Schema of curves: every column of any row: the untrained epoch has no loss."""
    columns = dict.fromkeys(key for row in rows for key in row)
    return pa.schema([(key, pa.string() if key == "run_id" else pa.float64()) for key in columns])


def write(path: Path, table: pa.Table) -> None:
    """Write a file that appears whole or not at all."""
    # random, since two machines may give their processes the same number
    temporary = made(path.parent) / f".{path.stem}.{secrets.token_hex(4)}"
    try:
        # what helps with many rows takes a third of the time and space of one
        pq.write_table(table, temporary, use_dictionary=False, write_statistics=False, write_page_checksum=True)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # or the name may outlive a power cut, and the content not
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a file, or those of its columns that are named.

    Raises
    ------
    FileNotFoundError
        If it is gone.
    ValueError
        If it is damaged; the message says what to do.
    """
    try:
        return pq.ParquetFile(path, page_checksum_verification=True).read(columns)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): {_remedy(path)}.") from error


def _remedy(path: Path) -> str:
    if path.stem == COMPACTED:
        return "it holds many runs, so restore it from a copy; without it they have to run again"
    if path.parent.name == "curves":
        return f"delete it, and {path.parents[1] / 'records' / path.name}, to run it again"
    return "delete it to run it again"


def record_of(table: pa.Table) -> dict[str, Any]:
    """The record in a table of one row, with the fields that are younger than it."""
    record: dict[str, Any] = table.to_pylist()[0]
    own = {key: value for key, value in record.items() if value is not None or key in DEFAULTS}
    return {**DEFAULTS, **own, "gca": tuple(own["gca"])}
