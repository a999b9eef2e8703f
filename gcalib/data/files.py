"""Bytes of data files, unpacked and checked, and the files that are JSON: the map of items, and their titles."""

from __future__ import annotations

import codecs
import gzip
import html
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from gcalib.data.pair import DataError

GZIP_MAGIC = b"\x1f\x8b"


def fault(path: Path, line: int | None, what: str) -> DataError:
    """The error of a data file: always `file, line n: sentence`."""
    return DataError(f"{path}{f', line {line}' if line else ''}: {what}")


def short(value: Any) -> str:
    """A value as it is shown in an error, cut to 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def read_bytes(path: Path) -> bytes:
    """Bytes of a file, or a `DataError` that names it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise fault(path, None, f"cannot be read ({error.strerror}); a data file was expected there.") from None


def read_text(path: Path, data: bytes | None = None) -> bytes:
    """Bytes of a text file, unpacked if its name ends in .gz, every line ended by a line feed.

    Parameters
    ----------
    path
        The file; named in errors.
    data
        Its bytes, if they have been read already (to check their hash).

    Raises
    ------
    DataError
        If the file is missing, empty, or no complete gzip file.
    """
    data = read_bytes(path) if data is None else data
    if path.suffix == ".gz":
        data = unpack(path, data)
    elif data.startswith(GZIP_MAGIC):
        raise fault(path, None, "holds gzip data although its name does not end in .gz; rename or unpack it.")
    data = data.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n")
    if not data.strip():
        raise fault(path, None, "is empty; one line a user was expected.")
    return data if data.endswith(b"\n") else data + b"\n"


def unpack(path: Path, data: bytes) -> bytes:
    """Content of a gzip file."""
    try:
        return gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        reason = str(error).rstrip(".")
        raise fault(path, None, f"is not a complete gzip file ({reason}); copy or download it again.") from None


def read_item_map(path: Path, data: bytes | None = None) -> tuple[np.ndarray, tuple[int, int]]:
    """Read `{"name": [id, domain], ...}`: names by id, and the number of items of each domain.

    Raises
    ------
    DataError
        If it is no such JSON, an item or an id is listed twice (an item in both domains among them), or the ids
        are not 1..nA in domain 0 and nA + 1..nA + nB in domain 1.
    """
    text = read_text(path, data).rstrip()

    def line_of(name: str) -> int:
        content = text.decode(errors="replace")
        return 1 + content[: max(content.rfind(json.dumps(name, ensure_ascii=False)), 0)].count("\n")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for name, value in pairs:
            if name in table:
                where = "in both domains" if _domain_of(value) != _domain_of(table[name]) else "twice"
                what = f"item {short(name)} is listed {where}; each item belongs to one domain."
                raise fault(path, line_of(name), what)
            table[name] = value
        return table

    try:
        table = json.loads(text.decode(), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise fault(path, error.lineno, f'is not JSON of the form {{"item": [id, domain]}} ({error.msg}).') from None
    except DataError:
        raise
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of thousands of digits, nested too deep
        raise fault(path, 1, f'is not JSON of the form {{"item": [id, domain]}} ({error}).') from None
    if not isinstance(table, dict) or not table:
        raise fault(path, 1, 'is not a JSON object {"item": [id, domain], ...} with items in it.')
    holder: dict[int, str] = {}
    for name, value in table.items():
        if not (isinstance(value, list) and len(value) == 2 and all(type(v) is int for v in value)):
            what = f"item {short(name)} has {short(value)}; it must be [id, domain], two whole numbers."
            raise fault(path, line_of(name), what)
        if value[1] not in (0, 1):
            what = f"item {short(name)} has domain {short(value[1])}; it must be 0 (A) or 1 (B)."
            raise fault(path, line_of(name), what)
        if value[0] in holder:
            both = f"{short(holder[value[0]])} and {short(name)}"
            raise fault(path, line_of(name), f"items {both} share the id {short(value[0])}; each needs its own.")
        holder[value[0]] = name
    in_b = sum(value[1] for value in table.values())
    sizes = len(table) - in_b, in_b
    if not all(sizes):
        raise fault(path, 1, f"domain {'AB'[sizes.index(0)]} is empty; both domains need items.")
    for name, (number, domain) in table.items():
        first, last = (1, sizes[0]) if domain == 0 else (1 + sizes[0], len(table))
        if not first <= number <= last:
            what = f"item {short(name)} has id {short(number)}; ids of domain {'AB'[domain]} are {first}..{last}."
            raise fault(path, line_of(name), what)
    return np.array([holder[number] for number in range(1, 1 + len(table))], dtype=object), sizes


def _domain_of(value: Any) -> Any:
    return value[1] if isinstance(value, list) and len(value) == 2 else None


def read_titles(path: Path, data: bytes | None = None) -> dict[str, str]:
    """Read `{"item": "title", ...}`; a list of strings in place of a title is joined by commas.

    HTML entities are resolved and white space is made single; an empty title is none.

    Raises
    ------
    DataError
        If it is no such JSON.
    """
    data = read_bytes(path) if data is None else data
    data = unpack(path, data) if path.suffix == ".gz" else data
    try:
        table = json.loads(data.removeprefix(codecs.BOM_UTF8).decode())
    except json.JSONDecodeError as error:
        raise fault(path, error.lineno, f'is not JSON of the form {{"item": "title"}} ({error.msg}).') from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise fault(path, 1, f'is not JSON of the form {{"item": "title"}} ({error}).') from None
    if not isinstance(table, dict):
        raise fault(path, 1, 'is not a JSON object {"item": "title", ...}.')
    titles = {}
    for name, value in table.items():
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(part, str) for part in parts):
            what = f"item {short(name)} has {short(value)}; it must be a title, or a list of strings."
            raise fault(path, None, what)
        if title := " ".join(html.unescape(", ".join(parts)).split()):
            titles[name] = title
    return titles
