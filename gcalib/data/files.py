"""One's own files: two that pandas reads, or a pair in a published form.

Tables are csv, tsv, RecBole's `.inter`, JSON lines or parquet, plain or packed (gz, zip). Of their columns `user`,
`item`, `timestamp` and, where it is named, `title` are kept.
"""

from __future__ import annotations

import re
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from gcalib.data.formats import fault, read_prepared, read_sequences, read_text, read_titles
from gcalib.data.frames import PER_SECOND, Columns, Domain, assemble, choose, flat, tidy
from gcalib.data.pair import DataError, NoDataError, Pair, Titles
from gcalib.data.prepare import Options, finish

OwnPath = str | Path | Sequence[str | Path]
TEXT, LINES, PARQUET = (".csv", ".tsv", ".inter", ".txt"), (".jsonl", ".json"), (".parquet",)
SUFFIXES = tuple(kind + packed for kind in (*TEXT, *LINES, *PARQUET) for packed in ("", ".gz", ".zip"))
TITLES = ("titles.json", "titles.json.gz")
CHUNK = 200_000  # JSON lines parsed at a time, since their other fields take memory


def pair_from_files(path: OwnPath, options: Options, columns: Columns | None, known: Sequence[str]) -> Pair:
    """A pair from a folder or two files; `known` are the names that would not have been taken for a path."""
    files = files_of(path, known)
    for file in files:
        if not file.is_file():
            raise NoDataError(f"{file} is missing; a file of events was expected there.")
    texts = [file for file in files if file.name in TITLES]
    maps = [file for file in files if "map_item" in file.name]
    endings = (".txt", ".txt.gz") if maps else SUFFIXES
    others = [file for file in files if "map_" not in file.name and file not in texts]
    events = [file for file in others if file.name.lower().endswith(endings)]
    if (len(maps), len(events)) not in ((1, 1), (0, 2)) or len(texts) > 1:
        found = ", ".join(file.name for file in files) or "nothing"
        wanted = "one text file with one map_item file, or two files of events (or name them: 'a.csv + b.csv')"
        ends = ", ".join((*TEXT, *LINES, *PARQUET))
        raise DataError(f"{path} holds {found}; a pair is {wanted}, with one file of titles at most ({ends}; gz, zip).")
    titles = read_titles(texts[0]) if texts else {}
    folder = not isinstance(path, list | tuple) and Path(str(path)).is_dir()
    domains = (_stem(events[0]), _stem(events[-1]))
    if len(events) == 2 and domains[0] == domains[1]:  # such as food/ratings.csv + kitchen/ratings.csv
        domains = (events[0].resolve().parent.name, events[1].resolve().parent.name)
    name = events[0].resolve().parent.name if folder else "-".join(domains)
    # by a published name, one's own data would be given the published texts
    shown = f"{name} (own data)" if name in known else name
    if not maps:
        of_a, of_b = (_read_events(file, columns, options.ties == "published") for file in events)
        return assemble(of_a, of_b, titles, shown, domains, options)
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
        files = [Path(part.strip()) for part in str(path).split(" + ")]
    if len(files) != 2:
        names = f" a pair ({', '.join(known)}) nor" if known else ""
        raise NoDataError(f"{str(path)!r} is neither{names} a folder, nor are they two files, 'a.csv + b.csv'.")
    return files + [titles for name in TITLES if (titles := files[0].parent / name).is_file()]


def _stem(path: Path) -> str:
    """Name of a domain: "sports_5core" of `sports_5core.txt.gz`."""
    return _unpacked(path).rsplit(".", 1)[0]


def _unpacked(path: Path) -> str:
    return re.sub(r"\.(gz|zip)$", "", path.name, flags=re.IGNORECASE)


def _read_events(path: Path, columns: Columns | None, in_order: bool) -> Domain:
    """Events of a sequence file or of a table."""
    if path.name.lower().endswith((".txt", ".txt.gz")) and "|" in read_text(path).partition("\n")[0]:
        events = read_sequences(path)
        return events.assign(time=events["time"].where(events["time"] < 0, events["time"] * PER_SECOND)), {}
    table = read_table(path, columns)
    return tidy(table, str(path), {str(name): str(name) for name in table}, in_order)


def read_table(path: Path, columns: Columns | None = None) -> pd.DataFrame:
    """The columns of a file that are asked for, under the names of their roles."""
    kind = Path(_unpacked(path).lower()).suffix
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # of lines with more fields than the header
            if kind in PARQUET:
                chosen = choose(pq.read_schema(path).names, columns, str(path))
                return flat(pd.read_parquet(path, columns=[*map(str, chosen.values())])).rename(columns=_roles(chosen))
            if kind in LINES:
                return _read_lines(path, columns)
            return _read_separated(path, kind, columns)
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
        form = " as one object a line" if kind in LINES else ""
        raise fault(path, None, f"cannot be read{form}: {' '.join(str(error).split()).rstrip('.')}.") from None


def _read_separated(path: Path, kind: str, columns: Columns | None) -> pd.DataFrame:
    first = pd.read_csv(path, header=None, sep="\x00", nrows=1, dtype=str, quoting=3, encoding="utf-8-sig").iloc[0, 0]
    separator = "\t" if kind in (".tsv", ".inter") else max(",\t;", key=str(first).count)
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
    if separator == "\t":  # where a quotation mark may be a letter, and then takes the rows up to the next one
        for name in read:
            if (several := read[name].str.contains("\n", regex=False, na=False).to_numpy()).any():
                raise fault(
                    path, None, f"row {1 + several.argmax()} has a quotation mark in {name!r} that no other ends."
                )
    return read[list(chosen.values())].rename(columns=_roles(chosen))


def _read_lines(path: Path, columns: Columns | None) -> pd.DataFrame:
    parts = []
    with pd.read_json(path, lines=True, chunksize=CHUNK, dtype=False) as reader:
        for part in reader:
            if not all(isinstance(name, str) for name in part):
                raise ValueError("a line is a list")
            chosen = choose(list(part.columns), columns, str(path))
            parts.append(part[list(chosen.values())].rename(columns=_roles(chosen)))
    return pd.concat(parts, ignore_index=True)


def _roles(chosen: Columns) -> dict[str | int, str]:
    return {column: role for role, column in chosen.items()}
