"""Reader of ratings csv files, the form in which the Amazon releases of 2014, 2018 and 2023 come.

-   2014 and 2018: no header; `user,item,rating,timestamp` in one edition and `item,user,rating,timestamp` in the
    other, times in seconds. Which column holds the items is told from the data: an Amazon item id has exactly ten
    capitals and digits, and not every user id has. Where that does not tell, `columns=` must.
-   2023: a header (`user_id,parent_asin,rating,timestamp`, with or without a `history` after it), times in
    milliseconds, which are cut to seconds.

A well-formed file is read by pyarrow and checked column by column; only a file with a fault is walked line by line.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from gcalib.data.files import fault, short
from gcalib.data.prepare import Events
from gcalib.data.readers import bad_time

ITEM_ID = r"^[0-9A-Z]{10}$"
MILLISECONDS = 100_000_000_000  # as seconds, the year 5138; as milliseconds, 1973
ROLES = {
    "user": ("user", "user_id", "reviewerid", "reviewer_id"),
    "item": ("item", "item_id", "parent_asin", "asin"),
    "rating": ("rating", "overall", "score"),
    "timestamp": ("timestamp", "time", "unixreviewtime"),
}
UNTOLD = ("column 1", "column 2")  # the user and item columns, before the data have told which is which
ID = r"^[^\s\x00-\x1f]+$"
SOUND = {
    "user": ID,
    "item": ID,
    UNTOLD[0]: ID,
    UNTOLD[1]: ID,
    "rating": r"^([0-4](\.[0-9]+)?|5(\.0+)?)$",
    "timestamp": r"^[0-9]{1,18}$",
}
NOT_UTF8 = "the line is not UTF-8 text; is the file damaged?"
EXAMPLE = "columns='user,item,rating,timestamp'"


def read_ratings(path: Path, text: bytes, columns: str | None = None) -> Events:
    """Read the ratings of one domain, each user's in time order (equal times: in the order of the file).

    Parameters
    ----------
    path
        Named in errors.
    text
        Its unpacked content, lines ended by a line feed.
    columns
        Order of the columns of a file without a header; None tells it from the data, or refuses.

    Raises
    ------
    DataError
        Naming file and line of the first fault, or asking for `columns`.
    """
    names, header = _column_names(path, text, columns)
    table = _read_table(path, text, names, header)
    if "user" not in names:
        looks = [_all_match(table[name], ITEM_ID) for name in UNTOLD]
        if looks[0] == looks[1]:
            what = "both of the first two columns look" if looks[0] else "neither of the first two columns looks"
            what += " like Amazon item ids, so users and items cannot be told apart"
            raise fault(path, None, f"{what}; give the file a header, or state the order of its columns: {EXAMPLE}.")
        first_two = ["item", "user"] if looks[0] else ["user", "item"]
        table = table.rename_columns([*first_two, *names[2:]])
    times = table["timestamp"].cast(pa.int64()).to_numpy()
    late = times >= MILLISECONDS
    if late.any() and not late.all():
        line = 1 + int(header) + int((late != late[0]).argmax())
        raise fault(path, line, "the time is in other units than in the lines before; use seconds or milliseconds.")
    times = times // 1000 if late.any() else times
    users, user_names = pd.factorize(table["user"].to_pandas(), sort=True)
    items, item_names = pd.factorize(table["item"].to_pandas(), sort=True)
    order = np.lexsort((times, users))
    return Events(
        users[order].astype(np.int64),
        1 + items[order].astype(np.int64),
        times[order],
        np.array(user_names, dtype=object),
        np.array(item_names, dtype=object),
    )


def _column_names(path: Path, text: bytes, columns: str | None) -> tuple[list[str], bool]:
    """Names of the columns (`UNTOLD` where the data must tell), and whether line 1 is a header."""
    try:
        first = text[: text.find(b"\n")].decode().split(",")
    except UnicodeDecodeError:
        raise fault(path, 1, NOT_UTF8) from None
    if any(field.startswith('"') for field in first):
        raise fault(path, 1, "a field stands in quotation marks; write the file without them, a comma between fields.")
    lowered = [field.strip().lower() for field in first]
    if any(field in ROLES["timestamp"] for field in lowered):
        names = [next((role for role, known in ROLES.items() if field in known), field) for field in lowered]
        for role, known in ROLES.items():
            if names.count(role) > 1 or (role != "rating" and role not in names):
                what = f"the header names {names.count(role)} {role} columns; it needs one, named {' or '.join(known)}."
                raise fault(path, 1, what)
        return names, True
    if columns is not None:
        names = [name.strip() for name in columns.split(",")]
        if any(names.count(role) != 1 for role in ("user", "item", "timestamp")):
            raise ValueError(f"columns={columns!r} must name user, item and timestamp once each, as in {EXAMPLE}.")
        if len(set(names)) != len(names):
            raise ValueError(f"columns={columns!r} names a column twice; each name may stand once.")
        return names, False
    if len(first) != 4:
        what = f"the line has {len(first)} columns; without a header 4 were expected, or state their order: {EXAMPLE}."
        raise fault(path, 1, what)
    return [*UNTOLD, "rating", "timestamp"], False


def _read_table(path: Path, text: bytes, names: list[str], header: bool) -> pa.Table:
    """Read the columns with a role as text and check them; on any anomaly find the line."""
    # Names of further columns may be anything, even equal.
    unique = [name if name in (*ROLES, *UNTOLD) else f"further {place}" for place, name in enumerate(names)]
    trouble = "it holds carriage returns or zero bytes"
    # A lone carriage return would end a line for pyarrow, and not in the line numbers reported here.
    if b"\r" not in text and b"\0" not in text:
        try:
            table = csv.read_csv(
                io.BytesIO(text),
                read_options=csv.ReadOptions(column_names=unique, skip_rows=int(header)),
                parse_options=csv.ParseOptions(quote_char=False, ignore_empty_lines=False),
                convert_options=csv.ConvertOptions(
                    column_types=dict.fromkeys(unique, pa.string()), strings_can_be_null=False
                ),
            )
            roles = [name for name in unique if name in SOUND]
            if len(table) and all(_all_match(table[name], SOUND[name]) for name in roles):
                return table
            trouble = "a field is not of the expected form"
        except pa.ArrowInvalid as error:
            trouble = " ".join(str(error).split())
    _find_fault(path, text, names, header)
    raise fault(path, None, f"is not a readable ratings csv file ({trouble}).")


def _all_match(column: pa.ChunkedArray, pattern: str) -> bool:
    return bool(pc.all(pc.match_substring_regex(column, pattern)).as_py())


def _find_fault(path: Path, text: bytes, names: list[str], header: bool) -> None:
    """Walk the lines of a file that is known to have a fault, and raise the first."""
    lines = text.removesuffix(b"\n").split(b"\n")[int(header) :]
    if not lines:
        raise fault(path, 1, "there is no rating after the header; a domain needs events.")
    for number, line in enumerate(lines, 1 + int(header)):
        try:
            fields = line.decode().split(",")
        except UnicodeDecodeError:
            raise fault(path, number, NOT_UTF8) from None
        if what := _why_bad(fields, names):
            raise fault(path, number, what)


def _why_bad(fields: list[str], names: list[str]) -> str | None:
    """Say in words what is wrong with the fields of a line, or None."""
    if len(fields) != len(names):
        return f"the line has {len(fields)} column{'s' * (len(fields) != 1)}; {len(names)} were expected."
    for name, value in zip(names, fields, strict=True):
        if name == "timestamp" and value == "-1":
            return "the time is -1 (unknown); ratings need their times, in unix seconds."
        if name == "timestamp" and (problem := bad_time(value)):
            return problem
        if name in SOUND and not re.search(SOUND[name], value):
            if name == "rating":
                shown = f"the rating {short(value)} is not a number from 0 to 5"
                return f"{shown}; if the columns stand in another order, state it: {EXAMPLE}."
            return f"{short(value)} is not a user or item id: an id is neither empty nor holds white space."
    return None
