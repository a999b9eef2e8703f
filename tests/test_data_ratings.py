"""Ratings csv files of the three Amazon releases: column order, units of time, and faults by line."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from test_data_readers import damage, prepared

from gcalib.data import DataError, Pair, load_pair
from gcalib.data.ratings import read_ratings

USERS = ["A2SUAM1J3GNN3B", "A3AF8FFZAZYNE5", "AABBCCDDEE"]  # the last one could be an item id by its form
ASINS = {"a": ["B000000001", "0439893577", "B00ZZZZZZ9", "098765432X"], "b": [f"B10000000{n}" for n in range(5)]}


def rows(domain: str, seed: int = 0) -> list[tuple[str, str, str, int]]:
    """Ratings of three users, in no order; two of them on one day."""
    rng = np.random.default_rng(seed)
    events = [(user, item, f"{rng.integers(1, 6)}.0") for user in USERS for item in ASINS[domain]]
    events = [events[place] for place in rng.permutation(len(events))]
    return [(*event, 1_300_000_000 + 86_400 * int(rng.integers(0, 6))) for event in events]


def write(folder: Path, **texts: str | bytes) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def csv(events: list[tuple], order: tuple[int, ...] = (0, 1, 2, 3), header: str = "") -> str:
    return header + "".join(",".join(str(event[place]) for place in order) + "\n" for event in events)


def expected(a: list[tuple], b: list[tuple]) -> list[list[str]]:
    """Items of each user in time order; at equal times domain A first, then the order of the file."""
    return [
        [item for _, item, _, _ in sorted((e for e in [*a, *b] if e[0] == user), key=lambda event: event[3])]
        for user in sorted(USERS)
    ]


def names(pair: Pair) -> list[list[str]]:
    return [[pair.item_names[item - 1] for item in pair.sequence(user)] for user in range(pair.num_users)]


HEADER = "user_id,parent_asin,rating,timestamp\n"


@pytest.mark.parametrize("edition", ["2014", "2018", "one of each", "2023", "2023 with history", "seconds, header"])
def test_editions_hold_the_same_pair(tmp_path, edition):
    a, b = rows("a"), rows("b", seed=1)
    milli = [[(*event[:3], event[3] * 1000 + 999, "B1 B2 B3") for event in side] for side in (a, b)]
    texts = {
        "2014": (csv(a), csv(b)),
        "2018": (csv(a, (1, 0, 2, 3)), csv(b, (1, 0, 2, 3))),
        "one of each": (csv(a), csv(b, (1, 0, 2, 3))),
        "2023": tuple(csv(side, header=HEADER) for side in milli),
        "2023 with history": tuple(csv(s, (0, 1, 2, 3, 4), HEADER.strip() + ",history\n") for s in milli),
        "seconds, header": tuple(csv(s, (3, 1, 0), "time,asin,reviewerID\n") for s in (a, b)),
    }[edition]
    pair = load_pair(write(tmp_path / "shop", alpha=texts[0], beta=texts[1]), ties="published")
    assert names(pair) == expected(a, b)
    assert pair.domains == ("alpha", "beta") and pair.num_items == (4, 5) and pair.has_clock
    assert (pair.times[:9] == sorted(event[3] for event in [*a, *b] if event[0] == USERS[0])).all()


def test_k_core_and_duplicates_are_counted(tmp_path):
    a, b = rows("a"), rows("b", seed=1)
    later = (*a[0][:3], a[0][3] + 86_400)
    lone = [("A9LONELYUSERXY", "B000000001", "5.0", 1_300_000_000)]
    folder = write(tmp_path / "shop", alpha=csv([*a, a[0], later, *lone]), beta=csv(b))
    counts = load_pair(folder, k_core=2).counts
    assert counts["duplicate_events"] == 1 and counts["repeated_events"] == 1
    assert counts["events_below_k_core"] == 1 and counts["users_in_one_domain"] == 0
    assert load_pair(folder).counts["users_in_one_domain"] == 1
    with pytest.raises(DataError, match="shop: no user is left .*events_below_k_core 28"):
        load_pair(folder, k_core=6)


def test_columns_that_cannot_be_told_apart_are_not_guessed(tmp_path):
    a, b = rows("a"), rows("b", seed=1)
    plain = [(f"u{USERS.index(user)}", f"i{item}", rating, time) for user, item, rating, time in a]
    folder = write(tmp_path / "neither", alpha=csv(plain), beta=csv(b))
    with pytest.raises(DataError, match="alpha.csv: neither of the first two columns looks like Amazon item ids, so "):
        load_pair(folder)
    both = [("AABBCCDDEE", *event[1:]) for event in a]
    with pytest.raises(DataError, match="both of the first two columns look .*columns='user,item,rating,timestamp'"):
        load_pair(write(tmp_path / "both", alpha=csv(both), beta=csv(b)))
    users = [(f"u{USERS.index(user)}", *rest) for user, *rest in b]
    stated = load_pair(write(tmp_path / "x", alpha=csv(plain), beta=csv(users)), columns="user,item,rating,timestamp")
    assert stated.num_users == 3


GOOD = "A2SUAM1J3GNN3B,B000000001,5.0,1300000000\n"
FAULTS = {
    "A2SUAM1J3GNN3B,B000000002,5.0\n": "line 2: the line has 3 columns; 4 were expected",
    "A2SUAM1J3GNN3B,B000000002,5.0,13,1\n": "line 2: the line has 5 columns; 4 were expected",
    "\n": "line 2: the line has 1 column; 4 were expected",
    "A2SUAM1J3GNN3B,B000000002,5.0,\n": "line 2: the time '' is not a whole number of unix seconds",
    "A2SUAM1J3GNN3B,B000000002,5.0,June\n": "line 2: the time 'June' is not a whole number",
    "A2SUAM1J3GNN3B,B000000002,5.0,-5\n": "line 2: the time '-5' is negative",
    "A2SUAM1J3GNN3B,B000000002,5.0,-1\n": "line 2: the time is -1 .unknown.; ratings need their times",
    "A2SUAM1J3GNN3B,B000000002,1300000000,5.0\n": "line 2: the rating '1300000000' is not a number from 0 to 5; if the",
    "A2SUAM1J3GNN3B,B000000002,good,1300000000\n": "line 2: the rating 'good'",
    "A2SUAM1J3GNN3B,,5.0,1300000000\n": "line 2: '' is not a user or item id",
    "A2SUAM1J3GNN3B,B0000 0002,5.0,1300000000\n": "line 2: 'B0000 0002' is not a user or item id",
    "A2SUAM1J3GNN3B,B000000002,5.0,1300000000000\n": "line 2: the time is in other units than in the lines before",
    '"A2SUAM1J3GNN3B","B000000002","5.0","1300000000"\n': "line 2: the rating '\"5.0\"' is not a number",
}


@pytest.mark.parametrize("line", FAULTS)
def test_faults_are_named_by_line(tmp_path, line):
    path = tmp_path / "r.csv"
    with pytest.raises(DataError, match=FAULTS[line]) as error:
        read_ratings(path, (GOOD + line + GOOD).encode())
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        (HEADER, None, "line 1: there is no rating after the header"),
        ("user_id,rating,timestamp\nA,5.0,3\n", None, "line 1: the header names 0 item columns; it needs one, "),
        ("user,asin,item_id,timestamp\nA,B,C,3\n", None, "line 1: the header names 2 item columns"),
        ("A2SUAM1J3GNN3B,B000000001,1300000000\n", None, "line 1: the line has 3 columns; without a header 4 were"),
        ("A2SUAM1J3GNN3B,B000000001,1300000000\n", "user,item,rating,timestamp", "line 1: the line has 3 columns; 4"),
        (GOOD, "user,item,rating", "columns='user,item,rating' must name user, item and timestamp once each"),
        (GOOD, "user,item,timestamp,user", "must name user, item and timestamp once each"),
        (GOOD, "user,item,x,timestamp,x", "names a column twice"),
        ('"user_id","parent_asin","rating","timestamp"\n', None, "line 1: a field stands in quotation marks; write"),
        (GOOD, "user,item,timestamp,rating", "line 1: the time '5.0' is not a whole number of unix seconds"),
    ],
)  # fmt: skip
def test_headers_and_stated_columns(tmp_path, text, columns, message):
    with pytest.raises(ValueError, match=message):
        read_ratings(tmp_path / "r.csv", text.encode(), columns)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(data=damage(csv(rows("a")[:6]), csv(rows("a")[:6], header=HEADER)))
def test_damaged_ratings_are_refused_or_read_as_they_stand(tmp_path, data):
    """Against a plain reading line by line."""
    text = data.replace(b"\r\n", b"\n")
    text = text if text.endswith(b"\n") else text + b"\n"
    try:
        events = read_ratings(tmp_path / "r.csv", text)
    except DataError as error:
        assert "r.csv" in str(error) and "\n" not in str(error)
        return
    lines = text.decode().split("\n")[:-1]
    names = [name.strip().lower() for name in lines[0].split(",")]
    has_header = bool({"timestamp", "time"} & set(names))
    fields = [line.split(",") for line in lines[int(has_header) :]]
    assert all(len(field) == len(fields[0]) and re.fullmatch(r"\d{1,18}", field[3]) for field in fields)
    assert all(float(field[2]) <= 5 for field in fields if not has_header or "rating" in names)
    users, items = [field[0] for field in fields], [field[1] for field in fields]
    if not has_header and not all(re.fullmatch("[0-9A-Z]{10}", item) for item in items):
        users, items = items, users
    scale = 1000 if int(fields[0][3]) >= 100_000_000_000 else 1
    read = [
        (events.users[owner], events.item_names[item - 1], time)
        for owner, item, time in zip(events.owner, events.items, events.times, strict=True)
    ]
    plain = zip(users, items, (int(field[3]) // scale for field in fields), strict=True)
    assert read == sorted(plain, key=lambda event: (event[0], event[2]))


def test_a_mark_of_the_encoding_is_no_part_of_the_header(tmp_path):
    """Spreadsheets begin a file of UTF-8 text with one."""
    folders = [
        write(tmp_path / name, **{d: mark + csv(rows(d), header=HEADER).encode() for d in "ab"})
        for name, mark in (("plain", b""), ("marked", b"\xef\xbb\xbf"))
    ]
    assert names(load_pair(folders[0])) == names(load_pair(folders[1]))


def test_columns_are_for_ratings_only(tmp_path):
    with pytest.raises(ValueError, match="holds a prepared pair"):
        load_pair(prepared(tmp_path / "x"), columns="user,item,rating,timestamp")
    with pytest.raises(ValueError, match="columns='user,item' is for ratings csv files; synthetic has none"):
        load_pair("synthetic", columns="user,item")
