"""Readers of the text forms: prepared files `user item|timestamp ...` with a map of items, and single-domain files.

A file is parsed as one array of bytes, so every rule is checked on all lines at once; only a line that breaks a
rule is looked at again, to say in words what is wrong with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gcalib.data.files import fault, read_item_map, read_text, short
from gcalib.data.pair import MIN_EVENTS
from gcalib.data.prepare import Events

SPACE, BAR, NEWLINE = b" |\n"
DIGITS = 18  # longer numbers do not fit int64


@dataclass(frozen=True, eq=False)
class Lines:
    """A text file taken apart: one user a line, all events of the file in flat arrays.

    `line` is int64 (events,), counted from 0, with every line present; item tokens are `start:stop` of `text`.
    """

    text: bytes
    users: list[str]
    line: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    times: np.ndarray


def read_lines(path: Path, text: bytes) -> Lines:
    """Parse `user item|timestamp item|timestamp ...`, the content of `path`, without looking at what the items are.

    Raises
    ------
    DataError
        Naming the first line that is not of this form, or a user who has a second line.
    """
    buffer = np.frombuffer(text, np.uint8)
    # Every token is followed by one separator: the user by a space, an item by a bar, a time by a space or line feed.
    stop = np.flatnonzero((buffer == SPACE) | (buffer == BAR) | (buffer == NEWLINE))
    start = np.concatenate([[0], stop[:-1] + 1])
    after = buffer[stop]
    ends = after == NEWLINE
    line = np.cumsum(ends) - ends
    place = np.arange(len(stop)) - np.concatenate([[0], np.flatnonzero(ends)[:-1] + 1])[line]
    is_item = place % 2 == 1
    is_time = ~is_item & (place > 0)
    bad = (stop == start) | (is_item != (after == BAR)) | ((place == 0) & ends)
    odd = np.flatnonzero(((buffer < SPACE) & (buffer != NEWLINE)) | (buffer > 126))
    bad[np.searchsorted(stop, odd)] = True
    times, is_number = parse_numbers(buffer, start[is_time], stop[is_time])
    bad[np.flatnonzero(is_time)[~is_number]] = True
    if bad.any():
        number = int(line[bad.argmax()])
        raise fault(path, 1 + number, _why_bad(text.split(b"\n", number + 1)[number]))
    first = np.flatnonzero(place == 0)
    users = [text[a:b].decode() for a, b in zip(start[first], stop[first], strict=True)]
    if len(set(users)) < len(users):
        met: dict[str, int] = {}
        for number, user in enumerate(users, 1):
            if user in met:
                raise fault(path, number, f"user {user} has a line already, line {met[user]}; each user has one.")
            met[user] = number
    return Lines(text, users, line[is_item], start[is_item], stop[is_item], times)


def parse_numbers(buffer: np.ndarray, start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read tokens of `buffer` as whole numbers, or as -1.

    Returns
    -------
    tuple
        int64 (tokens,), and bool (tokens,): False where a token is neither digits (at most 18) nor "-1".
    """
    length = stop - start
    values = np.zeros(len(start), dtype=np.int64)
    good = (length > 0) & (length <= DIGITS)
    for place in range(int(length[good].max(initial=0))):
        here = good & (place < length)
        digit = buffer[start[here] + place] - np.uint8(ord("0"))  # wraps around below "0"
        values[here] = values[here] * 10 + digit
        good[np.flatnonzero(here)[digit > 9]] = False
    unknown = np.flatnonzero(length == 2)
    unknown = unknown[(buffer[start[unknown]] == ord("-")) & (buffer[start[unknown] + 1] == ord("1"))]
    values[unknown], good[unknown] = -1, True
    return values, good


def _why_bad(line: bytes) -> str:
    """Say in words why a line is not `user item|timestamp item|timestamp ...`."""
    form = "a line reads `user item|timestamp item|timestamp ...`"
    if not line.strip():
        return f"the line is empty; {form}."
    if any(byte < SPACE or byte > 126 for byte in line):
        return "the line holds a character that is not printable ASCII; is the file damaged or of another encoding?"
    user, *events = line.decode().split(" ")
    if "|" in user:
        return f"the line starts with {short(user)}, an event, not with a user; {form}."
    if not user or "" in events:
        return f"there is a space too many (at the start, at the end, or two in a row); {form}."
    if not events:
        return f"user {short(user)} has no events; {form}."
    for place, event in enumerate(events, 1):
        item, *rest = event.split("|")
        if not item:
            return f"event {place} of user {short(user)}, {short(event)}, has no item; {form}."
        if not rest or not rest[0]:
            return f"event {place} of user {short(user)}, {short(event)}, has no timestamp; {form}."
        if len(rest) > 1:
            return f"event {place} of user {short(user)}, {short(event)}, has more than one bar; {form}."
        if (problem := bad_time(rest[0])) is not None:
            return f"event {place} of user {short(user)}: {problem}"
    return f"the line cannot be read; {form}."


def bad_time(time: str) -> str | None:
    """What is wrong with a time, or None: it must be unix seconds, a whole number, or -1 for unknown."""
    digits = time.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= DIGITS):
        return f"the time {short(time)} is not a whole number of unix seconds."
    if time.startswith("-") and time != "-1":
        return f"the time {short(time)} is negative; it must be unix seconds, or -1 where unknown."
    return None


def read_prepared(
    path: Path, map_path: Path, data: bytes | None = None, map_data: bytes | None = None
) -> tuple[Events, tuple[int, int], bool]:
    """Read a prepared pair: its text file and its item map.

    The file has a common clock if the times of every line never go back. It is a per-domain file if every line
    holds all of domain A, then all of domain B; only there may times be unknown (-1) or start again with domain B.

    Returns
    -------
    tuple
        Events, catalogue sizes, and whether there is a common clock.

    Raises
    ------
    DataError
        Naming file and line of the first fault.
    """
    names, sizes = read_item_map(map_path, map_data)
    lines = read_lines(path, read_text(path, data))
    items, good = parse_numbers(np.frombuffer(lines.text, np.uint8), lines.start, lines.stop)
    good &= (items >= 1) & (items <= sum(sizes))
    if not good.all():
        event = int((~good).argmax())
        token = lines.text[lines.start[event] : lines.stop[event]].decode()
        what = f"item {short(token)} is not in {map_path.name} (ids 1..{sum(sizes)}); an event reads `item|timestamp`."
        raise fault(path, 1 + int(lines.line[event]), what)
    count = np.bincount(lines.line)
    if (count < MIN_EVENTS).any():
        number = int((count < MIN_EVENTS).argmax())
        what = f"user {short(lines.users[number])} has {count[number]} event{'s' * int(count[number] != 1)}"
        raise fault(path, 1 + number, f"{what}; leave-one-out needs {MIN_EVENTS} or more.")
    in_b = items > sizes[0]
    if in_b.all() or not in_b.any():
        raise fault(path, None, f"domain {'A' if in_b.all() else 'B'} is empty; a pair has events in both.")
    has_clock = _check_order(path, lines, in_b)
    users = np.array(lines.users, dtype=object)
    return Events(lines.line, items, lines.times, users, names), sizes, has_clock


def _check_order(path: Path, lines: Lines, in_b: np.ndarray) -> bool:
    """Whether all lines run in time order; if not, they must all be ordered inside each domain."""
    times, line = lines.times, lines.line
    same_user = line[1:] == line[:-1]
    back = np.concatenate([[False], same_user & (times[1:] < times[:-1])])
    unknown = times < 0
    if not (back | unknown).any():
        return True
    b_then_a = same_user & in_b[:-1] & ~in_b[1:]
    if b_then_a.any():
        event, mixed = int((back | unknown).argmax()), 1 + int(line[1:][b_then_a.argmax()])
        what = f"time goes back from {times[event - 1]} to {times[event]}"
        what = "a time is -1 (unknown)" if unknown[event] else what
        only = "only a per-domain file may hold that, all of domain A and then all of domain B in every line"
        raise fault(path, 1 + int(line[event]), f"{what}; {only}, which line {mixed} breaks.")
    _check_ordered(path, times, line * 2 + in_b, line)
    return False


def _check_ordered(path: Path, times: np.ndarray, stream: np.ndarray, line: np.ndarray) -> None:
    """Known times must not go back inside a stream, passing over unknown ones."""
    known = np.flatnonzero(times >= 0)
    back = (np.diff(stream[known]) == 0) & (np.diff(times[known]) < 0)
    if back.any():
        at = int(back.argmax())
        what = f"time goes back from {times[known[at]]} to {times[known[at + 1]]}; events must stand in time order."
        raise fault(path, 1 + int(line[known[at + 1]]), what)


def read_single(path: Path, text: bytes) -> Events:
    """Read a single-domain file, `reviewer_id ASIN|timestamp ...`: its users in the order of the file.

    Parameters
    ----------
    path
        Named in errors.
    text
        Its unpacked content, lines ended by a line feed.

    Raises
    ------
    DataError
        Naming file and line of the first fault.
    """
    lines = read_lines(path, text)
    _check_ordered(path, lines.times, lines.line, lines.line)
    tokens = [lines.text[a:b].decode() for a, b in zip(lines.start, lines.stop, strict=True)]
    names, items = np.unique(np.array(tokens, dtype=object), return_inverse=True)
    return Events(lines.line, 1 + items, lines.times, np.array(lines.users, dtype=object), names)
