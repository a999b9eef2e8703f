"""A pair from events as people have them: two DataFrames, or two files that pandas reads.

`read_table` reads csv, tsv, RecBole's `.inter`, JSON lines and parquet, plain or packed (gz, zip), and keeps the
columns `user`, `item`, `timestamp` and, where it is named, `title`. `tidy` makes events of such a table, or of a
DataFrame of the reader's own: ids are strings, times whole unix seconds. Rows count from 1, a header not among them.
"""

from __future__ import annotations

import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from gcalib.data.formats import fault, read_prepared, read_sequences, read_text, read_titles
from gcalib.data.pair import DataError, NoDataError, Pair, Titles
from gcalib.data.prepare import Options, finish, match

OwnPath = str | Path | Sequence[str | Path]
Domain = tuple[pd.DataFrame, dict[str, str]]  # events, and titles by item
Columns = Mapping[str, str | int]  # role: name of the column, or its number from 0 in a file without a header
ROLES = ("user", "item", "timestamp", "title")
KNOWN = {  # names in the headers of the Amazon releases, RecBole and MovieLens, the preferred ones first
    "user": ("user", "user_id", "reviewerid", "userid"),
    "item": ("item", "item_id", "parent_asin", "asin", "movieid"),
    "timestamp": ("timestamp", "time", "unixreviewtime"),
}
TEXT, LINES, PARQUET = (".csv", ".tsv", ".inter", ".txt"), (".jsonl", ".json"), (".parquet",)
PACKED = ("", ".gz", ".zip")
SUFFIXES = tuple(kind + packed for kind in (*TEXT, *LINES, *PARQUET) for packed in PACKED)
TITLES = ("titles.json", "titles.json.gz")
CHUNK = 200_000  # JSON lines parsed at a time, since their other fields take memory
UNITS = (10**11, 10**14, 10**17)  # below: seconds (until the year 5138), milliseconds, microseconds; then nanoseconds


def pair_from_frames(
    a: pd.DataFrame,
    b: pd.DataFrame,
    names: tuple[str, str] = ("a", "b"),
    *,
    ties: str = "shuffle",
    max_length: int = 50,
    min_per_domain: int | None = None,
    min_events_per_item: int = 1,
    columns: Columns | None = None,
    shared_ids: str | None = None,
) -> Pair:
    """A pair of domains from two DataFrames, one row an event.

    Parameters
    ----------
    a, b
        The events of domain A and of domain B, in any order, with the columns `user`, `item`, `timestamp` (dates, ISO
        8601 text, or numbers since 1970: seconds to nanoseconds) and, if there are any, `title` (of the item).
    names
        Names of the two domains.

    The other arguments, and what is raised, are those of `gcalib.load_pair`.

    Examples
    --------
    >>> food = pd.DataFrame({"user": ["ann", "ann", "bob"], "item": ["tea", "rice", "tea"], "timestamp": [1, 4, 1]})
    >>> cups = pd.DataFrame({"user": ["ann", "ann", "bob"], "item": ["mug", "pot", "cup"], "timestamp": [2, 3, 2]})
    >>> pair = pair_from_frames(food, cups, names=("food", "kitchen"), min_per_domain=1)
    >>> pair.item_names[pair.sequence(0) - 1].tolist(), pair.counts["users_below_minimum"]
    (['tea', 'mug', 'pot', 'rice'], 1)
    """
    options = Options(ties, max_length, min_per_domain, min_events_per_item, shared_ids)
    in_order = ties == "published"
    of_a, of_b = (
        tidy(frame, f"events of {name}", columns, in_order) for frame, name in zip((a, b), names, strict=True)
    )
    return _pair(of_a, of_b, {}, "-".join(names), names, options)


def pair_from_files(path: OwnPath, options: Options, columns: Columns | None, known: Sequence[str]) -> Pair:
    """A pair from a folder or two files; `known` are the names that would not have been taken for a path."""
    files = files_of(path, known)
    for file in files:
        if not file.is_file():
            raise NoDataError(f"{file} is missing; a file of events was expected there.")
    texts = [file for file in files if file.name in TITLES]
    maps = [file for file in files if "map_item" in file.name]
    endings = (".txt", ".txt.gz") if maps else SUFFIXES
    events = [file for file in files if file.name.endswith(endings) and "map_" not in file.name and file not in texts]
    if (len(maps), len(events)) not in ((1, 1), (0, 2)) or len(texts) > 1:
        found = ", ".join(file.name for file in files) or "nothing"
        wanted = "one text file with one map_item file, or two files of events (or name them: 'a.csv + b.csv')"
        raise DataError(f"{path} holds {found}; a pair is {wanted}, with one file of titles at most.")
    titles = read_titles(texts[0]) if texts else {}
    folder = not isinstance(path, list | tuple) and Path(str(path)).is_dir()
    name = events[0].resolve().parent.name if folder else "-".join(map(_stem, events))
    # by a published name, one's own data would be given the published texts
    shown = f"{name} (own data)" if name in known else name
    if not maps:
        of_a, of_b = (_read_events(file, columns, options.ties == "published") for file in events)
        return _pair(of_a, of_b, titles, shown, (_stem(events[0]), _stem(events[1])), options)
    if columns is not None:
        raise ValueError(f"columns={columns!r} is for tables; {path} holds a prepared pair.")
    first, _, second = name.partition("-")
    domains = (first, second) if first and second and "-" not in second else ("a", "b")
    prepared = read_prepared(events[0], maps[0])
    return finish(prepared, shown, domains, options, Titles(titles, from_file=True) if titles else None)


def files_of(path: OwnPath, known: Sequence[str] = ()) -> list[Path]:
    """All files of a folder; or the two of a list, or of a text with a plus sign, and their titles."""
    if isinstance(path, list | tuple):
        files = [Path(part) for part in path]
    elif Path(str(path)).is_dir():
        return sorted(file for file in Path(str(path)).glob("[!.]*") if file.is_file())
    else:
        files = [Path(part.strip()) for part in str(path).split("+")]
    if len(files) != 2:
        names = f" a pair ({', '.join(known)}) nor" if known else ""
        raise NoDataError(f"{str(path)!r} is neither{names} a folder, nor are they two files, 'a.csv + b.csv'.")
    return files + [titles for name in TITLES if (titles := files[0].parent / name).is_file()]


def _stem(path: Path) -> str:
    """Name of a domain: "sports_5core" of `sports_5core.txt.gz`."""
    return path.name.removesuffix(".gz").removesuffix(".zip").rsplit(".", 1)[0]


def _read_events(path: Path, columns: Columns | None, in_order: bool) -> Domain:
    """Events of a sequence file or of a table."""
    if _stem(path) + ".txt" in (path.name, path.name.removesuffix(".gz")) and "|" in read_text(path).partition("\n")[0]:
        return read_sequences(path), {}
    return tidy(read_table(path, columns), str(path), in_order=in_order)


def _pair(a: Domain, b: Domain, titles: dict[str, str], name: str, domains: tuple[str, str], options: Options) -> Pair:
    matched = match(a[0], b[0], None if options.min_per_domain == 0 else 0, options.shared_ids)
    texts = a[1] | b[1] | titles
    return finish(matched, name, domains, options, Titles(texts, from_file=True) if texts else None)


def read_table(path: Path, columns: Columns | None = None) -> pd.DataFrame:
    """The columns of a file that are asked for, under the names of their roles."""
    kind = Path(path.name.removesuffix(".gz").removesuffix(".zip")).suffix
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # of lines with more fields than the header
            if kind in PARQUET:
                chosen = choose(pq.read_schema(path).names, columns, str(path))
                return pd.read_parquet(path, columns=[*map(str, chosen.values())]).rename(columns=_roles(chosen))
            if kind in LINES:
                return _read_lines(path, columns)
            return _read_separated(path, columns)
    except DataError:
        raise
    except OSError as error:
        if error.strerror is None:  # of gzip and zip
            raise fault(path, None, f"cannot be unpacked ({error}); copy or download it again.") from None
        raise fault(path, None, f"cannot be read ({error.strerror}); a data file was expected there.") from None
    except (EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise fault(path, None, f"cannot be unpacked ({error}); copy or download it again.") from None
    except UnicodeDecodeError as error:
        raise fault(path, None, f"is not UTF-8 text (byte {error.start}); is it damaged or packed?") from None
    except (ValueError, pa.ArrowException, pd.errors.ParserWarning) as error:
        raise fault(path, None, f"cannot be read: {' '.join(str(error).split()).rstrip('.')}.") from None


def _read_separated(path: Path, columns: Columns | None) -> pd.DataFrame:
    first = pd.read_csv(path, header=None, sep="\x00", nrows=1, dtype=str, quoting=3, encoding="utf-8-sig").iloc[0, 0]
    separator = max(",\t;", key=str(first).count)
    table: dict[str, Any] = {"sep": separator, "dtype": str, "encoding": "utf-8-sig", "index_col": False}
    table |= {"keep_default_na": False, "na_values": [""]}
    if columns and all(isinstance(column, int) for column in columns.values()):
        width = pd.read_csv(path, header=None, nrows=1, **table).shape[1]
        chosen = choose(range(width), columns, str(path))
        # named, so that a line of another width is noticed
        read = pd.read_csv(path, header=None, names=range(width), **table)
    else:
        chosen = choose(list(pd.read_csv(path, nrows=0, **table).columns), columns, str(path))
        read = pd.read_csv(path, **table)
    return read[list(chosen.values())].rename(columns=_roles(chosen))


def _read_lines(path: Path, columns: Columns | None) -> pd.DataFrame:
    parts = []
    with pd.read_json(path, lines=True, chunksize=CHUNK, dtype=False) as reader:
        for part in reader:
            chosen = choose(list(part.columns), columns, str(path))
            parts.append(part[list(chosen.values())].rename(columns=_roles(chosen)))
    return pd.concat(parts, ignore_index=True)


def _roles(chosen: Columns) -> dict[str | int, str]:
    return {column: role for role, column in chosen.items()}


def choose(names: Sequence[Any], columns: Columns | None, where: str) -> dict[str, str | int]:
    """The column of each role among a table's `names`: those that are stated, else those with a known name."""
    stated = dict(columns or {})
    if unknown := set(stated) - set(ROLES):
        raise ValueError(f"columns={columns!r} names {', '.join(sorted(unknown))}; it may name {', '.join(ROLES)}.")
    plain = {str(name).partition(":")[0].strip().lower(): name for name in reversed(names)}  # RecBole: `item_id:token`
    stated = {role: column if column in names else plain.get(str(column), column) for role, column in stated.items()}
    for role, known in KNOWN.items():
        if role not in stated and (found := next((plain[name] for name in known if name in plain), None)) is not None:
            stated[role] = found
    shown = ", ".join(map(str, names))
    for role in KNOWN:
        if role not in stated:
            how = 'state it: columns={"user": ..., "item": ..., "timestamp": ...}, each the name of a column'
            how += ", or in a file without a header its number, counted from 0"
            raise DataError(f"{where}: none of the columns ({shown}) is known to be the {role}; {how}.")
    if missing := [column for column in stated.values() if column not in names]:
        raise DataError(
            f"{where}: there is no column {missing[0]!r}, which columns={columns!r} names; there are {shown}."
        )
    if len(set(stated.values())) < len(stated):
        raise DataError(f"{where}: {stated} takes one column twice; state the others by columns=.")
    return stated


def tidy(
    table: pd.DataFrame, where: str, columns: Columns | None = None, in_order: bool = True
) -> tuple[pd.DataFrame, dict[str, str]]:
    """Events of one domain, with `user`, `item` (str) and `time` (int64, unix seconds, -1 where unknown), and titles of
    items by id. `where` opens the sentence of an error. Not `in_order`, the order of the rows has no influence.
    """
    chosen: dict[str, str | int] = {"title": "title"} if "title" in table and not columns else {}
    chosen |= choose(list(table.columns), columns, where)
    found = {role: table[column].reset_index(drop=True) for role, column in chosen.items()}
    if len(table) == 0:
        raise DataError(f"{where}: there is no event.")
    events = pd.DataFrame({role: _ids(found[role], role, where) for role in ("user", "item")})
    events["time"] = seconds(found["timestamp"], where)
    if (events["time"] < 0).all():
        raise DataError(f"{where}: no event has a time, so the order of a user's events is not known.")
    titles: dict[str, str] = {}
    if "title" in found:
        texts = pd.Series(found["title"].to_numpy(), index=events["item"]).dropna().astype(str).str.strip()
        texts = texts[(texts != "") & ~texts.index.duplicated()]
        titles = dict(zip(texts.index, texts, strict=True))
    return events if in_order else events.sort_values("item", kind="stable"), titles


def _ids(column: pd.Series, role: str, where: str) -> pd.Series:
    """Ids as text; whole numbers that a missing value made floats are read as what they were."""
    if pd.api.types.is_float_dtype(column) and (column.dropna() % 1 == 0).all():
        column = column.astype("Int64")
    text = column.astype("str").str.strip()
    if (missing := (column.isna() | (text == "")).to_numpy()).any():
        raise DataError(f"{where}, row {1 + missing.argmax()}: the {role} is missing.")
    return text


def seconds(times: pd.Series, where: str) -> np.ndarray:
    """int64 unix seconds of numbers (seconds to nanoseconds since 1970), dates or ISO 8601 text; -1 where unknown.

    The unit follows from the size of the numbers and must be the same throughout.
    """
    column = times.reset_index(drop=True)
    if not (pd.api.types.is_numeric_dtype(column) or pd.api.types.is_datetime64_any_dtype(column)):
        text = column.where(column.isna(), column.astype("str").str.strip())
        number = pd.to_numeric(text.where(text != ""), errors="coerce")
        given = text.notna() & (text != "")
        dated = bool(number.isna().all())
        column = pd.to_datetime(text, utc=True, format="ISO8601", errors="coerce") if dated else number
        _refuse(column.isna() & given, where, text, "is not a time (a number or an ISO 8601 date, as the others)")
    if pd.api.types.is_datetime64_any_dtype(column):
        dates = pd.to_datetime(column, utc=True)
        column = dates.dt.as_unit("s").astype("int64").where(dates.notna(), -1)
    column = column.fillna(-1)
    _refuse((column < 0) & (column != -1) | (column == np.inf), where, times, "is not a time (-1 stands for unknown)")
    values = column.to_numpy()
    unit = np.searchsorted(UNITS, values, side="right")
    known = values > 0
    largest = int(unit[known].max(initial=0))
    _refuse(
        pd.Series(known & (unit != largest)), where, times, f"is not in the unit of the others, such as {values.max()}"
    )
    whole: np.ndarray = (values // 1000**largest).astype(np.int64)
    return whole


def _refuse(bad: pd.Series, where: str, values: pd.Series, what: str) -> None:
    """Raise the fault of the first bad row, if there is one."""
    if bad.any():
        row = int(bad.to_numpy().argmax())
        raise DataError(f"{where}, row {1 + row}: the time {values.iloc[row]!r} {what}.")
