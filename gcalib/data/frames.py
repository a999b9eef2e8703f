"""A pair from events as people have them: two DataFrames (`gcalib.data.files` reads them from files).

Ids become strings, times whole microseconds, which order events and are cut to seconds in the end. Rows count from 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from gcalib.data.pair import DataError, Pair, Titles
from gcalib.data.prepare import Options, finish, match

Domain = tuple[pd.DataFrame, dict[str, str]]  # events, and titles by item
Columns = Mapping[str, str | int]  # role: name of the column, or its number from 0 in a file without a header
ROLES = ("user", "item", "timestamp", "title")
KNOWN = {  # names in the headers of the Amazon releases, RecBole and MovieLens, the preferred ones first
    "user": ("user", "user_id", "reviewerid", "userid"),
    "item": ("item", "item_id", "parent_asin", "asin", "movieid"),
    "timestamp": ("timestamp", "time", "unixreviewtime"),
}
PER_SECOND = 10**6  # times are microseconds until events are in order
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
    return assemble(of_a, of_b, {}, "-".join(names), names, options)


def assemble(
    a: Domain, b: Domain, titles: dict[str, str], name: str, domains: tuple[str, str], options: Options
) -> Pair:
    """The pair of two domains' events; `titles` are those of a file beside them."""
    if domains[0] == domains[1] or domains[0] == "B" or domains[1] == "A":
        raise ValueError(
            f"The domains are named {domains[0]!r} and {domains[1]!r}, which would be taken for one another."
        )
    one_domain = None if options.min_per_domain == 0 else 0
    matched = match(a[0], b[0], one_domain, options.shared_ids, PER_SECOND)
    of_b = b[1] | titles if a[1].keys() & b[1].keys() else None
    texts = a[1] | titles if of_b else a[1] | b[1] | titles
    return finish(matched, name, domains, options, Titles(texts, from_file=True, of_b=of_b) if texts else None)


def choose(names: Sequence[Any], columns: Columns | None, where: str) -> dict[str, str | int]:
    """The column of each role among a table's `names`: those that are stated, else those with a known name."""
    if not isinstance(columns or {}, Mapping):
        raise ValueError(f"columns={columns!r} must name columns by role, as in {{'user': 'who', 'item': 'what'}}.")
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
    if twice := [column for column in stated.values() if list(names).count(column) > 1]:
        raise DataError(f"{where}: there are two columns {twice[0]!r}.")
    if len(set(stated.values())) < len(stated):
        raise DataError(f"{where}: {stated} takes one column twice; state the others by columns=.")
    return stated


def tidy(
    table: pd.DataFrame, where: str, columns: Columns | None = None, in_order: bool = True
) -> tuple[pd.DataFrame, dict[str, str]]:
    """Events of one domain, with `user`, `item` (str) and `time` (int64, microseconds, -1 where unknown), and titles of
    items by id. `where` opens the sentence of an error. Not `in_order`, the order of the rows has no influence.
    """
    table = flat(table)
    chosen = choose(list(table.columns), columns, where)
    chosen |= {"title": "title"} if "title" in table and "title" not in chosen else {}
    found = {role: table[column].reset_index(drop=True) for role, column in chosen.items()}
    if len(table) == 0:
        raise DataError(f"{where}: there is no event.")
    events = pd.DataFrame({role: _ids(found[role], role, where) for role in ("user", "item")})
    events["time"] = microseconds(found["timestamp"], where)
    if (events["time"] < 0).all():
        raise DataError(f"{where}: no event has a time, so the order of a user's events is not known.")
    titles: dict[str, str] = {}
    if "title" in found:
        texts = pd.Series(found["title"].to_numpy(), index=events["item"]).dropna().astype(str).str.strip()
        texts = texts[texts != ""]
        if "title" not in (columns or {}) and (several := texts.groupby(level=0).nunique().gt(1)).any():
            what = f"item {several.idxmax()} has more than one title; if these are titles of reviews"
            raise DataError(f"{where}: {what}, leave the column out, or name it in columns= to take the first.")
        texts = texts[~texts.index.duplicated()]
        titles = dict(zip(texts.index, texts, strict=True))
    return events if in_order else events.sort_values("item", kind="stable"), titles


def _ids(column: pd.Series, role: str, where: str) -> pd.Series:
    """Ids as text; whole numbers that a missing value made floats (17.0) are read as what they were."""
    text = column.astype("str").str.strip()
    if pd.api.types.is_float_dtype(column) and (column.dropna().astype("float64") % 1 == 0).all():
        text = column.astype("float64").map("{:.0f}".format)
    elif text.str.fullmatch(r"[0-9]+\.0").all():
        text = text.str.removesuffix(".0")
    if (missing := (column.isna() | (text == "")).to_numpy()).any():
        raise DataError(f"{where}, row {1 + missing.argmax()}: the {role} is missing.")
    return text


def microseconds(times: pd.Series, where: str) -> np.ndarray:
    """int64 microseconds since 1970, -1 where unknown, of numbers (seconds to nanoseconds), dates or ISO 8601 text.

    The unit follows from the size of the numbers and must be the same throughout.
    """
    column = times.reset_index(drop=True)
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(column.cat.categories.dtype)
    if not (pd.api.types.is_numeric_dtype(column) or pd.api.types.is_datetime64_any_dtype(column)):
        text = column.where(column.isna(), column.astype("str").str.strip())
        number = pd.to_numeric(text.where(text != ""), errors="coerce")
        given = text.notna() & (text != "")
        dated = bool(number.isna().all())
        column = pd.to_datetime(text, utc=True, format="ISO8601", errors="coerce") if dated else number
        _refuse(column.isna() & given, where, text, "is not a time (a number or an ISO 8601 date, as the others)")
    if pd.api.types.is_datetime64_any_dtype(column):
        dates = pd.to_datetime(column, utc=True)
        column = (dates.dt.as_unit("us").astype("int64")).where(dates.notna(), -1)
        _refuse(column < -1, where, times, "lies before 1970")
        return column.to_numpy(dtype=np.int64)
    column = column.astype("float64").fillna(-1) if column.isna().any() else column
    column = column if pd.api.types.is_float_dtype(column) else column.astype("int64")
    _refuse((column < 0) & (column != -1) | (column == np.inf), where, times, "is not a time (-1 stands for unknown)")
    values = column.to_numpy()
    unit = np.searchsorted(UNITS, values, side="right")
    known = values > 0
    largest = int(unit[known].max(initial=0))
    _refuse(
        pd.Series(known & (unit != largest)), where, times, f"is not in the unit of the others, such as {values.max()}"
    )
    factor = PER_SECOND // 1000**largest  # 0 of nanoseconds
    scaled = values * factor if factor else values // 1000
    whole: np.ndarray = np.where(values < 0, -1, scaled).astype(np.int64)
    return whole


def _refuse(bad: pd.Series, where: str, values: pd.Series, what: str) -> None:
    """Raise the fault of the first bad row, if there is one."""
    if bad.any():
        row = int(bad.to_numpy().argmax())
        raise DataError(f"{where}, row {1 + row}: the time {str(values.iloc[row])!r} {what}.")


def flat(table: pd.DataFrame) -> pd.DataFrame:
    """With a named index as columns."""
    return table.reset_index() if any(table.index.names) else table
