"""Text forms: what is read, what is refused with file and line, and that no damage passes unnoticed."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gcalib.data import DataError, Pair, load_pair

# Domain A: ids 1..3, domain B: ids 4..7.
ITEMS = {"A1": [1, 0], "A2": [2, 0], "B1": [4, 1], "A3": [3, 0], "B2": [5, 1], "B3": [6, 1], "B4": [7, 1]}
CLOCK = "0 1|100 5|100 2|300 4|400\n1 7|50 6|60 3|60 4|60 1|86400\nu2 2|1 4|2 3|3 5|4 1|5 6|6\n"
PER_DOMAIN = "0 1|-1 3|-1 2|-1 5|300 4|300 6|400\n1 2|-1 1|-1 3|-1 7|50 6|60 5|60 4|90\n"
ONE_A = "u1 P1|10 P2|20 P3|30\nu2 P2|5 P1|5 P3|9 P4|9\nu3 P4|1\n"
ONE_B = "u2 Q1|1 Q2|7 Q3|9\nu1 Q3|15 Q1|16 Q2|40 Q4|41\nu9 Q4|3 Q1|4\n"


def prepared(folder: Path, text: str | bytes = CLOCK, items: str | bytes | dict = ITEMS) -> Path:
    """A folder with a prepared pair."""
    folder.mkdir(exist_ok=True)
    items = json.dumps(items, indent=1) if isinstance(items, dict) else items
    for name, content in (("events.txt", text), ("map_item.json", items)):
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def two_files(folder: Path, a: str | bytes = ONE_A, b: str | bytes = ONE_B) -> Path:
    """A folder with two single-domain files."""
    folder.mkdir(exist_ok=True)
    for name, content in (("left.txt", a), ("right.txt", b)):
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def sequences(pair: Pair) -> list[list[int]]:
    return [pair.sequence(user).tolist() for user in range(pair.num_users)]


def test_prepared_pair(tmp_path):
    pair = load_pair(prepared(tmp_path / "nuts-bolts"), ties="published")
    assert sequences(pair) == [[1, 5, 2, 4], [7, 6, 3, 4, 1], [2, 4, 3, 5, 1, 6]]
    assert pair.times[:4].tolist() == [100, 100, 300, 400]
    assert pair.has_clock and pair.num_items == (3, 4)
    assert pair.item_names.tolist() == ["A1", "A2", "A3", "B1", "B2", "B3", "B4"]
    assert (pair.name, pair.domains) == ("nuts-bolts", ("nuts", "bolts"))


def test_a_folder_name_that_names_no_domains(tmp_path):
    assert load_pair(prepared(tmp_path / "mine")).domains == ("a", "b")


@pytest.mark.parametrize("change", ["gzip", "crlf", "no final line feed", "extra files"])
def test_the_same_pair_in_other_clothes(tmp_path, change):
    folder = prepared(tmp_path / "x")
    expected = load_pair(folder).sha256
    file = folder / "events.txt"
    if change == "gzip":
        for path in list(folder.iterdir()):
            (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    elif change == "crlf":
        file.write_bytes(CLOCK.replace("\n", "\r\n").encode())
    elif change == "no final line feed":
        file.write_text(CLOCK.rstrip("\n"))
    else:
        (folder / "map_user.json").write_text("{}")
        (folder / "prices.json.gz").write_bytes(b"")
        (folder / ".hidden.txt").write_text("x")
    assert load_pair(folder).sha256 == expected


def test_per_domain_file(tmp_path):
    pair = load_pair(prepared(tmp_path / "x", PER_DOMAIN), ties="published")
    assert not pair.has_clock
    assert sequences(pair) == [[1, 3, 2, 5, 4, 6], [2, 1, 3, 7, 6, 5, 4]]
    known = load_pair(prepared(tmp_path / "y", PER_DOMAIN.replace("-1", "900")), ties="published")
    assert not known.has_clock  # B starts again before A ended: still no order across domains
    assert sequences(known) == sequences(pair)


def test_two_single_domain_files(tmp_path):
    pair = load_pair(two_files(tmp_path / "shop"), ties="published")
    assert pair.domains == ("left", "right") and pair.name == "shop"
    names = [[pair.item_names[item - 1] for item in row] for row in sequences(pair)]
    assert names == [["P1", "Q3", "Q1", "P2", "P3", "Q2", "Q4"], ["Q1", "P2", "P1", "Q2", "P3", "P4", "Q3"]]
    assert pair.counts["users_in_one_domain"] == 2
    swapped = load_pair(f"{tmp_path}/shop/right.txt + {tmp_path}/shop/left.txt", ties="published")
    assert swapped.domains == ("right", "left") and swapped.num_items == pair.num_items[::-1]


BAD_LINES = {
    "2 1\n": "line 4: event 1 of user '2', '1', has no timestamp",
    "2 1|\n": "line 4: event 1 of user '2', '1|', has no timestamp",
    "2 1|5 4|5 2 5|9\n": "line 4: event 3 of user '2', '2', has no timestamp",
    "2 1|5 4|-3 2|5 5|9\n": "line 4: event 2 of user '2': the time '-3' is negative",
    "2 1|5 4|soon 2|5 5|9\n": "line 4: event 2 of user '2': the time 'soon' is not a whole number of unix seconds",
    "2 1|5 4|6.5 2|7 5|9\n": "line 4: .* the time '6.5' is not a whole number",
    "2 1|5 4|1e3 2|7 5|9\n": "line 4: .* the time '1e3' is not a whole number",
    "2 1|5 4|99999999999999999999 2|7 5|9\n": "line 4: .* is not a whole number of unix seconds",
    "2 1|5 4|-1 2|7 5|9\n": "line 4: a time is -1 .unknown.; only a per-domain file .* which line 1 breaks",
    "2 1|5 4|4 2|7 5|9\n": "line 4: time goes back from 5 to 4; only a per-domain file .* which line 1 breaks",
    "2 1|5|6 4|7 2|8 5|9\n": "line 4: .* has more than one bar",
    "2 |5 4|7 2|8 5|9\n": "line 4: event 1 .* has no item",
    "2  1|5 4|7 2|8 5|9\n": "line 4: there is a space too many",
    "2 1|5 4|7 2|8 5|9 \n": "line 4: there is a space too many",
    "1|5 4|7 2|8 5|9\n": "line 4: the line starts with '1|5', an event, not with a user",
    "2\n": "line 4: user '2' has no events",
    "\n2 1|5 4|7 2|8 5|9\n": "line 4: the line is empty",
    "2 1|5\n": "line 4: user '2' has 1 event; leave-one-out needs 4 or more",
    "2 1|5 4|6 5|7\n": "line 4: user '2' has 3 events; leave-one-out needs 4 or more",
    "2 100|1 200|4 300|2 400|5\n": "line 4: item '100' is not in map_item.json .ids 1..7.; an event reads `item",
    "2 0|5 4|6 5|7 1|8\n": "line 4: item '0' is not in map_item.json",
    "2 B1|5 4|6 5|7 1|8\n": "line 4: item 'B1' is not in map_item.json",
    "1 1|5 4|6 5|7 1|8\n": "line 4: user 1 has a line already, line 2",
    "2 1|5 4|6\t5|7 1|8\n": "line 4: the line holds a character that is not printable ASCII",
    "2 1|5 4|6 5\u00a0|7 1|8\n": "line 4: the line holds a character that is not printable ASCII",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_lines_are_named(tmp_path, line):
    folder = prepared(tmp_path / "x", CLOCK + line)
    with pytest.raises(DataError, match=BAD_LINES[line]) as error:
        load_pair(folder)
    assert str(error.value).startswith(str(folder / "events.txt")) and "\n" not in str(error.value)


def test_order_inside_a_domain_of_a_per_domain_file(tmp_path):
    folder = prepared(tmp_path / "x", PER_DOMAIN + "2 1|-1 2|-1 4|9 5|8\n")
    with pytest.raises(DataError, match="events.txt, line 3: time goes back from 9 to 8; events must stand in time"):
        load_pair(folder)
    folder = two_files(tmp_path / "y", ONE_A + "u5 P1|7 P2|6\n")
    with pytest.raises(DataError, match="left.txt, line 4: time goes back from 7 to 6"):
        load_pair(folder)


def changed(**items: list) -> dict:
    return {**ITEMS, **items}


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ('{"A1": [1, 0],\n"B1": [2, 1],\n"A1": [3, 1]}', "line 3: item 'A1' is listed in both domains"),
        ('{"A1": [1, 0], "B1": [2, 1], "A1": [3, 0]}', "line 1: item 'A1' is listed twice"),
        (changed(A1=[4, 0]), "line 10: items 'A1' and 'B1' share the id 4"),
        (changed(A1=[0, 1]), "line 2: item 'A1' has id 0; ids of domain B are 3..7"),
        (changed(A1=[0, 0]), "line 2: item 'A1' has id 0; ids of domain A are 1..3"),
        (changed(B4=[9, 1]), "item 'B4' has id 9; ids of domain B are 4..7"),
        (changed(B4=[7, 2]), "item 'B4' has domain 2; it must be 0 .A. or 1 .B."),
        (changed(B4=["7", 1]), r"item 'B4' has \['7', 1\]; it must be \[id, domain\]"),
        (changed(B4=[True, 1]), "two whole numbers"),
        (changed(B4=7), "item 'B4' has 7; it must be"),
        ({"A1": [1, 0], "A2": [2, 0]}, "line 1: domain B is empty; both domains need items"),
        ("{}", "line 1: is not a JSON object .* with items in it"),
        ("[1, 2]", "line 1: is not a JSON object"),
        ('{"A1": [1, 0],\n"B1": [2, 1]', "line 2: is not JSON of the form"),
        ('{"A1": [' + "1" * 5000 + ", 0]}", "line 1: is not JSON of the form"),
        ("[" * 100_000, "line 1: is not JSON of the form"),
        (b'{"\xff": [1, 0]}', "line 1: is not JSON of the form"),
        (r'{"\ud800": [1, 0]}', "line 1: domain B is empty"),
        ("", "is empty"),
    ],
)  # fmt: skip
def test_bad_item_maps(tmp_path, items, message):
    folder = prepared(tmp_path / "x", items=items)
    with pytest.raises(DataError, match=message) as error:
        load_pair(folder)
    assert str(error.value).startswith(str(folder / "map_item.json")) and "\n" not in str(error.value)


def test_a_domain_without_events(tmp_path):
    with pytest.raises(DataError, match="events.txt: domain B is empty; a pair has events in both"):
        load_pair(prepared(tmp_path / "x", "0 1|1 2|2 3|3 1|4\n"))


def test_damaged_and_missing_files(tmp_path):
    folder = prepared(tmp_path / "x")
    packed = gzip.compress(CLOCK.encode())
    (folder / "events.txt").unlink()
    for data in (packed[:-10], packed[: len(packed) // 2], packed[:5], b"plain text", packed + b"tail"):
        (folder / "events.txt.gz").write_bytes(data)
        with pytest.raises(DataError, match="events.txt.gz: is not a complete gzip file .*copy or download it again"):
            load_pair(folder)
    (folder / "events.txt.gz").unlink()
    (folder / "events.txt").write_bytes(packed)
    with pytest.raises(DataError, match="holds gzip data although its name does not end in .gz"):
        load_pair(folder)
    (folder / "events.txt").write_bytes(b"\n \n")
    with pytest.raises(DataError, match="events.txt: is empty"):
        load_pair(folder)
    (folder / "events.txt").unlink()
    with pytest.raises(DataError, match="x holds map_item.json; a pair is one text file with one map_item file, or"):
        load_pair(folder)
    with pytest.raises(DataError, match="There is no pair '.*nowhere': known are synthetic, food-kitchen, "):
        load_pair(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is a file; give the folder"):
        load_pair(folder / "map_item.json")
    with pytest.raises(DataError, match="gone.txt: cannot be read .No such file or directory."):
        load_pair(f"{tmp_path}/gone.txt + {tmp_path}/gone2.txt")
    with pytest.raises(DataError, match="3 files are joined by .; a pair needs two"):
        load_pair("a.txt + b.txt + c.txt")
    with pytest.raises(DataError, match="line 1: the line is neither `reviewer_id ASIN|timestamp ...` nor"):
        load_pair(two_files(tmp_path / "y", "hello\n"))


# --- Fuzz: an independent, slow and plain reading of the rules, against the reader, on damaged files. ---------------

EVENT = re.compile(r"[!-{}~]+( [!-{}~]+\|(\d{1,18}|-1))+", re.ASCII)


def plain_lines(data: bytes) -> list[tuple[str, list[tuple[str, int]]]] | None:
    """Users and their events, or None if any line is not of the form."""
    try:
        text = data.replace(b"\r\n", b"\n").decode("ascii")
    except UnicodeDecodeError:
        return None
    lines = (text[:-1] if text.endswith("\n") else text).split("\n")
    if not text.strip() or not all(EVENT.fullmatch(line) for line in lines):
        return None
    rows = [(line.split(" ")[0], line.split(" ")[1:]) for line in lines]
    if len({user for user, _ in rows}) < len(rows):
        return None
    return [(user, [(e.split("|")[0], int(e.split("|")[1])) for e in events]) for user, events in rows]


def backwards(times: list[int]) -> bool:
    known = [time for time in times if time >= 0]
    return known != sorted(known)


def plain_prepared(data: bytes) -> list[list[tuple[int, int]]] | None:
    """Events of each user of a prepared file after preparation (published ties), or None if it must be refused."""
    rows = plain_lines(data)
    if rows is None:
        return None
    if any(not re.fullmatch(r"0*[1-7]", item) or len(item) > 18 or len(row) < 4 for _, row in rows for item, _ in row):
        return None
    users = [[(int(item), time) for item, time in row] for _, row in rows]
    if len({item > 3 for row in users for item, _ in row}) < 2:
        return None
    has_clock = all(min(t for _, t in row) >= 0 and not backwards([t for _, t in row]) for row in users)
    if not has_clock:
        for row in users:
            if [item > 3 for item, _ in row] != sorted(item > 3 for item, _ in row):
                return None
            if any(backwards([t for item, t in row if (item > 3) == side]) for side in (False, True)):
                return None
    kept = []
    for row in users:
        first = [event for n, event in enumerate(row) if event[0] not in {item for item, _ in row[:n]}]
        counts = [sum((item > 3) == side for item, _ in first) for side in (False, True)]
        if min(counts) >= (1 if has_clock else 3) and len(first) >= 4:
            kept.append(first)
    return kept or None


@st.composite
def damage(draw, *texts: str) -> bytes:
    """A valid file with one to three small injuries."""
    data = bytearray(draw(st.sampled_from(texts)).encode())
    pieces = st.one_of(
        st.sampled_from([b" ", b"|", b"\n", b"-", b"-1", b"0", b"7", b"9", b"\r", b"\r\n", b"\0", b",", b"\xe9", b"."]),
        st.binary(min_size=1, max_size=3),
    )
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        width = draw(st.integers(0, 12))
        match draw(st.sampled_from(["insert", "replace", "delete", "repeat", "truncate"])):
            case "insert":
                data[at:at] = draw(pieces)
            case "replace":
                data[at : at + 1] = draw(pieces)
            case "delete":
                del data[at : at + width]
            case "repeat":
                data[at:at] = data[at : at + width]
            case "truncate":
                del data[max(at, len(data) - width) :]
    return bytes(data)


FUZZ = settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def load_or_refuse(folder: Path, **options) -> Pair | None:
    """The pair, or None after an error that is one line and names the file or folder."""
    try:
        return load_pair(folder, **options)
    except DataError as error:
        assert folder.name in str(error) and "\n" not in str(error) and len(str(error)) < 600
        return None


@FUZZ
@example(data=b"0 1|1 4|2 2|3 5|3")
@example(data=b"0 1|1 4|2 2|3 5|3\r\n1 1|-1 4|2 2|3 5|3\n")
@example(data=b"0 0001|1 4|2 2|3 5|3\n")
@given(data=damage(CLOCK, PER_DOMAIN))
def test_damaged_prepared_files_are_refused_or_read_as_they_stand(tmp_path, data):
    pair = load_or_refuse(prepared(tmp_path / "fuzz", data), ties="published")
    expected = plain_prepared(data)
    assert (pair is None) == (expected is None)
    if pair is not None:
        assert sequences(pair) == [[item for item, _ in row] for row in expected]
        assert pair.times.tolist() == [time for row in expected for _, time in row]


def plain_single(data: bytes) -> dict[str, list[tuple[str, int]]] | None:
    """Events of each user of a single-domain file, each item once, or None if the file must be refused."""
    rows = plain_lines(data)
    if rows is None or "|" not in data.replace(b"\r\n", b"\n").decode().split("\n")[0]:
        return None
    if any(backwards([time for _, time in row]) for _, row in rows):
        return None
    return {
        user: [event for n, event in enumerate(row) if event[0] not in {item for item, _ in row[:n]}]
        for user, row in rows
    }


@FUZZ
@given(data=damage(ONE_A))
def test_damaged_single_domain_files_are_refused_or_read_as_they_stand(tmp_path, data):
    pair = load_or_refuse(two_files(tmp_path / "fuzz", a=data), ties="published", min_per_domain=1)
    a, b = plain_single(data), plain_single(ONE_B.encode())
    expected = []
    if a is not None:
        shared = {item for row in a.values() for item, _ in row} & {item for row in b.values() for item, _ in row}
        a, b = ({u: [e for e in row if e[0] not in shared] for u, row in side.items()} for side in (a, b))
        unknown = any(time < 0 for user in set(a) & set(b) for _, time in a[user])
        for user in sorted(set(a) & set(b)):
            stream = a[user] + b[user] if unknown else sorted(a[user] + b[user], key=lambda event: event[1])
            if a[user] and b[user] and len(stream) >= 4:
                expected.append(stream)
    assert (pair is None) == (not expected)
    if pair is not None:
        assert [[pair.item_names[i - 1] for i in row] for row in sequences(pair)] == [
            [item for item, _ in row] for row in expected
        ]
        assert pair.times.tolist() == [time for row in expected for _, time in row]


@FUZZ
@given(items=damage(json.dumps(ITEMS)))
def test_damaged_item_maps_are_refused_or_read_as_they_stand(tmp_path, items):
    pair = load_or_refuse(prepared(tmp_path / "fuzz", items=items), ties="published")
    if pair is not None:
        expected = sorted((number, name, domain) for name, (number, domain) in json.loads(items).items())
        assert [name for _, name, _ in expected] == pair.item_names.tolist()
        assert [number for number, _, _ in expected] == list(range(1, 1 + sum(pair.num_items)))
        assert [domain for _, _, domain in expected] == pair.domain_of(np.arange(1, 1 + sum(pair.num_items))).tolist()


@FUZZ
@given(st.data())
def test_damaged_gzip_files_are_refused_or_read_as_they_stand(tmp_path, data):
    folder = prepared(tmp_path / "fuzz")
    (folder / "events.txt").unlink()
    packed = bytearray(gzip.compress(CLOCK.encode(), mtime=0))
    at = data.draw(st.integers(0, len(packed) - 1))
    if data.draw(st.booleans()):
        del packed[at:]
    else:
        packed[at] ^= data.draw(st.integers(1, 255))
    (folder / "events.txt.gz").write_bytes(packed)
    pair = load_or_refuse(folder, ties="published")
    if pair is not None:
        assert sequences(pair) == [[1, 5, 2, 4], [7, 6, 3, 4, 1], [2, 4, 3, 5, 1, 6]]
