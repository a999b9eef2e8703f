"""Readers of the published forms: sequences (`user item|timestamp ...`, in time order), item maps and titles.

Every file may be plain or gzipped. What cannot be used is a `DataError` that reads `file, line n: what is wrong, and
what would be right`. Events come as a table with the columns `user`, `item`, `time` (unix seconds, -1 where unknown),
one row an event, each user's rows in order. Tables of ratings are read in `gcalib.data.frames`.
"""

from __future__ import annotations

import csv
import gzip
import html
import io
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from reprlib import repr as short  # of a value in an error
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import StrictInt, TypeAdapter, ValidationError

from gcalib.data.pair import DataError
from gcalib.data.prepare import Events

WORD = r"[!-{}~]+"  # printable ASCII without space and bar
EVENT = re.compile(rf"{WORD}\|([0-9]{{1,11}}|-1)")  # longer numbers are milliseconds
SEQUENCE = re.compile(rf"{WORD}( {EVENT.pattern})+")
SEQUENCE_FORM = "a line reads `user item|timestamp item|timestamp ...`, times in whole unix seconds, -1 where unknown"


def fault(path: Path, line: int | None, what: str) -> DataError:
    """The error of a data file: always `file, line n: sentence`."""
    return DataError(f"{path}{f', line {line}' if line else ''}: {what}")


def read_bytes(path: Path) -> bytes:
    """Content of a file, unpacked if it is gzipped."""
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if data.startswith(b"\x1f\x8b") or path.suffix == ".gz" else data
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise fault(path, None, f"is not a complete gzip file ({error}); copy or download it again.") from None
    except OSError as error:
        raise fault(path, None, f"cannot be read ({error.strerror}); a data file was expected there.") from None


def read_text(path: Path) -> str:
    """Content of a text file that is not empty; every line ends in a line feed."""
    data = read_bytes(path).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        raise fault(path, line, "the line is not UTF-8 text; is the file damaged?") from None
    if not text.strip():
        raise fault(path, None, "is empty; a data file was expected.")
    return text if text.endswith("\n") else text + "\n"


def read_sequences(path: Path) -> pd.DataFrame:
    """Events of one domain, with raw ids."""
    users, line, item, time = _read_sequences(path, read_text(path))
    _check_order(path, line, line, time)
    return pd.DataFrame({"user": users[line], "item": item, "time": time})


def read_prepared(path: Path, map_path: Path) -> Events:
    """A prepared pair: sequences of both domains with item ids, and the map of items.

    The file has a global order if the times of every line never go back. It has per-domain order if every line
    holds all of domain A, then all of domain B; only there may times be unknown (-1) or start again with domain B.
    """
    names, sizes = read_item_map(map_path)
    _, line, text, time = _read_sequences(path, read_text(path))
    item = text.where(text.str.fullmatch(r"[0-9]{1,18}"), "0").astype(np.int64).to_numpy()
    ids = f"{map_path.name} (ids 1..{sum(sizes)})"
    _refuse(path, line, (item < 1) | (item > sum(sizes)), lambda at: f"item {short(text[at])} is not in {ids}.")
    in_b = (item > sizes[0]).astype(int)
    same_user = np.diff(line, prepend=-1) == 0
    unordered = (same_user & (np.diff(time, prepend=0) < 0)) | (time < 0)
    b_then_a = same_user & (np.diff(in_b, prepend=0) < 0)
    if b_then_a.any():
        only = "only a file with all of domain A, then all of B in every line may hold that, which line"
        only += f" {1 + line[b_then_a.argmax()]} breaks"
        what = "is unknown, or earlier than that of the event before"
        _refuse(path, line, unordered, lambda at: f"the time {time[at]} {what}; {only}.")
    _check_order(path, line, 2 * line + in_b, time)
    table = pd.DataFrame({"user": line, "item": item, "time": time})
    return Events(table, names, sizes, has_global_order=not unordered.any())


def _read_sequences(path: Path, text: str) -> tuple[np.ndarray, np.ndarray, pd.Series, np.ndarray]:
    """The users line by line; and of each event the line (from 0), the item as text and the time."""
    lines = text.removesuffix("\n").split("\n")
    for number, line in enumerate(lines, 1):
        if not SEQUENCE.fullmatch(line):
            wrong = next((event for event in line.split(" ")[1:] if not EVENT.fullmatch(event)), line)
            raise fault(path, number, f"{short(wrong)} cannot be used; {SEQUENCE_FORM}.")
    users, events = zip(*(line.split(" ", 1) for line in lines), strict=True)
    again = pd.Index(users).duplicated()
    _refuse(path, np.arange(len(lines)), again, lambda at: f"user {short(users[at])} has a line already.")
    table = pd.read_csv(
        io.StringIO("\n".join(events).replace(" ", "\n")), sep="|", names=["item", "time"],
        dtype={"item": str, "time": np.int64}, na_filter=False, quoting=csv.QUOTE_NONE,
    )  # fmt: skip
    line_of = np.repeat(np.arange(len(lines)), [line.count("|") for line in events])
    return np.array(users, dtype=object), line_of, table["item"], table["time"].to_numpy()


def _check_order(path: Path, line: np.ndarray, stream: np.ndarray, time: np.ndarray) -> None:
    """Known times must not go back inside a stream, passing over unknown ones."""
    line, stream, time = line[time >= 0], stream[time >= 0], time[time >= 0]
    back, order = (np.diff(stream) == 0) & (np.diff(time) < 0), "events must stand in time order"
    _refuse(path, line[1:], back, lambda at: f"time goes back from {time[at]} to {time[at + 1]}; {order}.")


def _refuse(path: Path, line: np.ndarray, bad: np.ndarray, what: Callable[[int], str]) -> None:
    """Raise the fault of the first bad event, if there is one."""
    if bad.any():
        raise fault(path, 1 + int(line[bad.argmax()]), what(int(bad.argmax())))


def read_item_map(path: Path) -> tuple[np.ndarray, tuple[int, int]]:
    """Names by id, and the number of items of each domain, of `{"name": [id, domain], ...}`.

    The ids are 1..nA in domain 0 and nA + 1..nA + nB in domain 1.
    """
    form = '{"item": [id, domain], ...}, in whole numbers, domain 0 (A) or 1 (B)'
    table: dict[str, tuple[int, int]] = _read_json(path, dict[str, tuple[StrictInt, Literal[0, 1]]], form)
    names = sorted(table, key=lambda name: table[name][::-1])
    for due, name in enumerate(names, 1):
        if table[name][0] != due:
            what = f"id {table[name][0]} where {due} was due; ids count from 1 in A and go on in B, each once"
            raise fault(path, None, f"item {short(name)} has {what}.")
    in_b = sum(domain for _, domain in table.values())
    return np.array(names, dtype=object), (len(names) - in_b, in_b)


def read_titles(path: Path) -> dict[str, str]:
    """Read `{"item": "title", ...}`; a list of strings in place of a title is joined by commas.

    HTML entities are resolved and white space is made single; an empty title is none.
    """
    form = '{"item": "title", ...}, where a list of strings may be in place of a title'
    table: dict[str, str | list[str]] = _read_json(path, dict[str, str | list[str]], form)
    joined = {name: value if isinstance(value, str) else ", ".join(value) for name, value in table.items()}
    plain = {name: " ".join(html.unescape(title).split()) for name, title in joined.items()}
    return {name: title for name, title in plain.items() if title}


def _read_json(path: Path, kind: Any, form: str) -> Any:
    """A JSON object that is not empty, of the type that is asked for."""
    try:
        table = TypeAdapter(kind).validate_json(read_text(path))
    except ValidationError as error:
        first = error.errors()[0]
        item = "".join(f", item {short(name)}" for name in first["loc"][:1])
        raise fault(path, None, f"is not JSON of the form {form}{item}: {first['msg']}.") from None
    if not table:
        raise fault(path, None, f"holds nothing; it must be JSON of the form {form}.")
    return table
