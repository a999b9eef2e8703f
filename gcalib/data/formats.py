"""Readers of data files: events of one domain, prepared pairs with their item maps, titles.

Every file may be plain or gzipped. What cannot be used is a `DataError` that reads `file, line n: what is wrong, and
what would be right`. Events come as a table with the columns `user`, `item`, `time` (unix seconds, -1 where unknown),
one row an event, each user's rows in order. Sequences (`user item|timestamp ...`, in time order) and ratings are told
apart by the first line. Ratings are those of the Amazon releases: without a header in 2014 and 2018, times in seconds;
with one in 2023 (further columns allowed), times in milliseconds, which are cut to seconds.

A well-formed file is parsed by pandas and checked column by column; only one with a fault is walked line by line.
"""

from __future__ import annotations

import csv
import gzip
import html
import io
import re
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from reprlib import repr as short  # of a value in an error
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import StrictInt, TypeAdapter, ValidationError

from gcalib.data.pair import DataError
from gcalib.data.prepare import Events

WORD = r"[!-{}~]+"  # printable ASCII without space and bar
EVENT = re.compile(rf"{WORD}\|([0-9]{{1,18}}|-1)")  # longer numbers do not fit int64
SEQUENCE = re.compile(rf"{WORD}( {EVENT.pattern})+")
SEQUENCE_FORM = "a line reads `user item|timestamp item|timestamp ...`, times in whole unix seconds, -1 where unknown"

ROLES = {  # of columns, and their names in headers
    "user": ("user", "user_id", "reviewerid", "reviewer_id"),
    "item": ("item", "item_id", "parent_asin", "asin"),
    "rating": ("rating", "overall", "score"),
    "timestamp": ("timestamp", "time", "unixreviewtime"),
}
EXAMPLE = "columns='user,item,rating,timestamp'"
ID = r"[^\s\x00-\x1f]+", "an id, which is neither empty nor holds white space"
FIELDS = {  # what a field of a role looks like, and how that is said
    "user": ID,
    "item": ID,
    "rating": (r"[0-4](\.[0-9]+)?|5(\.0+)?", f"a rating from 0 to 5; if columns stand otherwise, state it: {EXAMPLE}"),
    "timestamp": (r"[0-9]{1,18}", "a time in whole unix seconds or milliseconds"),
}
ITEM_ID = r"[0-9A-Z]{10}"  # an Amazon item id; not every user id looks like that
MILLISECONDS = 100_000_000_000  # as seconds, the year 5138; as milliseconds, 1973


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


def read_events(path: Path, columns: str | None = None) -> pd.DataFrame:
    """Events of one domain, sequences or ratings, with raw ids.

    `columns` is the order of the columns of ratings without a header; None tells it from the data, or refuses.
    """
    text = read_text(path)
    first = text.lstrip().partition("\n")[0]
    if "|" in first:
        users, line, item, time = _read_sequences(path, text)
        _check_order(path, line, line, time)
        return pd.DataFrame({"user": users[line], "item": item, "time": time})
    if "," in first:
        return _read_ratings(path, text, columns)
    raise fault(path, 1, "the line is neither `user item|timestamp ...` nor a comma-separated rating.")


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


def _read_ratings(path: Path, text: str, columns: str | None) -> pd.DataFrame:
    names, header = _columns(path, text, columns)
    try:
        table = pd.read_csv(io.StringIO(text), header=None, dtype=str, keep_default_na=False)
        table = table.set_axis(names, axis="columns").iloc[int(header) :]
        fits = [len(table) > 0, *(table[name].str.fullmatch(FIELDS[name][0]).all() for name in names if name in FIELDS)]
        trouble = "" if all(fits) else "there is no rating"
    except ValueError as error:  # the parser's, or another number of columns
        trouble = " ".join(str(error).split())
    if trouble:
        _find_fault(path, text, names, header)
        raise fault(path, None, f"is not a readable file of ratings ({trouble}).")
    if not header and columns is None:
        looks = [bool(table[name].str.fullmatch(ITEM_ID).all()) for name in ("user", "item")]
        if looks[0] == looks[1]:
            what = "both of the first two columns look" if looks[0] else "neither of the first two columns looks"
            what += " like Amazon item ids, so users and items cannot be told apart"
            raise fault(path, None, f"{what}; give the file a header, or state the order of its columns: {EXAMPLE}.")
        table = table.rename(columns={"user": "item", "item": "user"} if looks[0] else {})
    time = table["timestamp"].astype(np.int64).to_numpy()
    late = time >= MILLISECONDS
    if late.any() and not late.all():
        line, _ = next(islice(_rows(text), int(header) + int((late != late[0]).argmax()), None))
        raise fault(path, line, "the time is in other units than in the lines before; use seconds or milliseconds.")
    table = table[["user", "item"]].assign(time=time // 1000 if late.any() else time)
    return table.sort_values("time", kind="stable")


def _columns(path: Path, text: str, columns: str | None) -> tuple[list[str], bool]:
    """Names of the columns, and whether line 1 is a header."""
    first = [field.strip().lower() for field in next(_rows(text))[1]]
    header = any(field in ROLES["timestamp"] for field in first)
    if header:
        names = [next((role for role, known in ROLES.items() if field in known), field) for field in first]
        for role, known in ROLES.items():
            if names.count(role) > 1 or (role != "rating" and role not in names):
                what = f"the header names {names.count(role)} {role} columns; it needs one, named {' or '.join(known)}."
                raise fault(path, 1, what)
    elif columns is not None:
        names = [name.strip() for name in columns.split(",")]
        if any(names.count(role) != 1 for role in ("user", "item", "timestamp")) or names.count("rating") > 1:
            raise ValueError(f"columns={columns!r} must name user, item and timestamp once each, as in {EXAMPLE}.")
    else:
        names = list(ROLES)  # or the first two the other way round, which the data must tell
        if len(first) != 4:
            what = f"the line has {len(first)} columns; without a header 4 were expected, or state"
            raise fault(path, 1, f"{what} their order: {EXAMPLE}.")
    return [name if name in FIELDS else f"further {place}" for place, name in enumerate(names)], header


def _rows(text: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of each row of comma-separated text, blank lines passed over, as pandas does."""
    reader = csv.reader(io.StringIO(text))
    return ((reader.line_num, row) for row in reader if len(row) > 1 or "".join(row).strip())


def _find_fault(path: Path, text: str, names: list[str], header: bool) -> None:
    """Walk the rows of ratings and raise the first fault, if there is one."""
    for line, fields in islice(_rows(text), int(header), None):
        if len(fields) != len(names):
            raise fault(path, line, f"the line has {len(fields)} columns; {len(names)} were expected.")
        for name, value in zip(names, fields, strict=True):
            if name in FIELDS and not re.fullmatch(FIELDS[name][0], value):
                raise fault(path, line, f"{short(value)} is not {FIELDS[name][1]}.")


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
