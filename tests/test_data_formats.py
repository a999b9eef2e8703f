"""Files: what is read, what is refused with file and line, and that no damage passes unnoticed."""

from __future__ import annotations

import gzip
import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gcalib.data.formats import read_item_map, read_prepared, read_sequences, read_titles
from gcalib.data.pair import DataError, Pair
from gcalib.data.sources import load_pair

# Domain A: ids 1..3, domain B: ids 4..7.
ITEMS = {"A1": [1, 0], "A2": [2, 0], "B1": [4, 1], "A3": [3, 0], "B2": [5, 1], "B3": [6, 1], "B4": [7, 1]}
GLOBAL = "0 1|100 5|100 2|300 4|400\n1 7|50 6|60 3|60 4|60 1|86400\nu2 2|1 4|2 3|3 5|4 1|5 6|6\n"
PER_DOMAIN = "0 1|-1 3|-1 2|-1 5|300 4|300 6|400\n1 2|-1 1|-1 3|-1 7|50 6|60 5|60 4|90\n"
ONE_A = "u1 P1|10 P2|20 P3|30\nu2 P2|5 P1|5 P3|9 P4|9\nu3 P4|1\n"
ONE_B = "u2 Q1|1 Q2|7 Q3|9\nu1 Q3|15 Q1|16 Q2|40 Q4|41\nu9 Q4|3 Q1|4\n"


def write(folder: Path, **files: str | bytes | dict) -> Path:
    """A folder with files named `name_suffix`, such as events_txt."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        content = json.dumps(content) if isinstance(content, dict) else content
        path = folder / ".".join(name.rsplit("_", 1))
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def prepared(folder: Path, text: str | bytes = GLOBAL, items: str | bytes | dict = ITEMS) -> Path:
    return write(folder, events_txt=text, map_item_json=items)


def sequences(pair: Pair) -> list[list[int]]:
    return [pair.sequence(user).tolist() for user in range(pair.num_users)]


def named(pair: Pair) -> list[list[str]]:
    return [pair.item_names[pair.sequence(user) - 1].tolist() for user in range(pair.num_users)]


# --- Sequences ------------------------------------------------------------------------------------------------------


def test_prepared_with_a_global_order(tmp_path):
    pair = load_pair(prepared(tmp_path / "nuts-bolts"), ties="published")
    assert sequences(pair) == [[1, 5, 2, 4], [7, 6, 3, 4, 1], [2, 4, 3, 5, 1, 6]]
    assert pair.times[:4].tolist() == [100, 100, 300, 400]
    assert pair.has_global_order
    assert pair.num_items == (3, 4)
    assert pair.item_names.tolist() == ["A1", "A2", "A3", "B1", "B2", "B3", "B4"]


@pytest.mark.parametrize("unknown", ["-1", "900"])
def test_prepared_with_per_domain_order(tmp_path, unknown):
    """Without times, or where B starts again before A ended."""
    pair = load_pair(prepared(tmp_path / "x", PER_DOMAIN.replace("-1", unknown)), ties="published")
    assert not pair.has_global_order
    assert sequences(pair) == [[1, 3, 2, 5, 4, 6], [2, 1, 3, 7, 6, 5, 4]]


def test_prepared_user_of_few_events_is_dropped_and_counted(tmp_path):
    pair = load_pair(prepared(tmp_path / "x", GLOBAL + "2 1|5 4|6 5|7\n"))
    assert pair.num_users == 3
    assert pair.counts["users_below_minimum"] == 1


@pytest.mark.parametrize(
    "file", [gzip.compress(GLOBAL.encode()), GLOBAL.replace("\n", "\r\n"), GLOBAL.rstrip("\n"), "\ufeff" + GLOBAL]
)
def test_prepared_in_another_packing(tmp_path, file):
    assert load_pair(prepared(tmp_path / "x", file)).sha256 == load_pair(prepared(tmp_path / "y")).sha256


def test_single_domain_sequences_are_matched(tmp_path):
    pair = load_pair(write(tmp_path / "shop", left_txt=ONE_A, right_txt=ONE_B), ties="published")
    assert named(pair) == [["P1", "Q3", "Q1", "P2", "P3", "Q2", "Q4"], ["Q1", "P2", "P1", "Q2", "P3", "P4", "Q3"]]
    assert pair.counts["users_in_one_domain"] == 2


BAD_LINES = {
    "2 1\n": "'1' cannot be used; a line reads `user item|timestamp item|timestamp ...`",
    "2 1|\n": "'1|' cannot be used",
    "2 1|5 4|-3 2|5\n": "'4|-3' cannot be used",
    "2 1|5 4|soon 2|5\n": "'4|soon' cannot be used",
    "2 1|5 4|6.5 2|7\n": "'4|6.5' cannot be used",
    "2 1|5 4|99999999999999999999\n": "'4|99999999999999999999' cannot be used",
    "2 1|5 4|1300000000000\n": "'4|1300000000000' cannot be used; .* times in whole unix seconds",
    "2 1|5|6 4|7\n": "'1|5|6' cannot be used",
    "2 |5 4|7\n": "'|5' cannot be used",
    "2  1|5 4|7\n": "'' cannot be used",
    "1|5 4|7\n": "'1|5 4|7' cannot be used",
    "2\n": "'2' cannot be used",
    "\n2 1|5 4|7\n": "'' cannot be used",
    "2 1|5 4|6\t5|7\n": r"'4|6\\t5|7' cannot be used",
    "2 1|5 4|-1 2|7 5|9\n": "the time -1 is unknown, or earlier .* only a file with all of domain A.* line 1 breaks",
    "2 1|5 4|4 2|7 5|9\n": "the time 4 is unknown, or earlier than that of the event before",
    "2 100|1 200|4 300|2 400|5\n": "item '100' is not in map_item.json .ids 1..7.",
    "2 0|5 4|6 5|7 1|8\n": "item '0' is not in map_item.json",
    "2 B1|5 4|6 5|7 1|8\n": "item 'B1' is not in map_item.json",
    "1 1|5 4|6 5|7 1|8\n": "user '1' has a line already",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_sequences_with_a_bad_line(tmp_path, line):
    folder = prepared(tmp_path / "x", GLOBAL + line)
    message = f"{folder}/events.txt, line 4: {BAD_LINES[line].replace('|', '[|]')}"
    with pytest.raises(DataError, match=message):
        read_prepared(folder / "events.txt", folder / "map_item.json")


def test_prepared_out_of_order_inside_a_domain(tmp_path):
    folder = prepared(tmp_path / "x", PER_DOMAIN + "2 1|-1 2|-1 4|9 5|8\n")
    with pytest.raises(
        DataError, match="events.txt, line 3: time goes back from 9 to 8; events must stand in time order"
    ):
        load_pair(folder)


def test_single_domain_sequences_out_of_order(tmp_path):
    folder = write(tmp_path, a_txt=ONE_A + "u5 P1|7 P2|6\n")
    with pytest.raises(DataError, match="a.txt, line 4: time goes back from 7 to 6"):
        read_sequences(folder / "a.txt")


def test_damaged_gzip_is_refused(tmp_path):
    packed, path = gzip.compress(GLOBAL.encode()), tmp_path / "events.txt.gz"
    for data in (packed[:-10], packed[: len(packed) // 2], packed[:5], b"plain text", packed + b"tail"):
        path.write_bytes(data)
        with pytest.raises(DataError, match="events.txt.gz: is not a complete gzip file .*copy or download it again"):
            read_sequences(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\n \n", "a.txt: is empty"),
        (b"hello\n", "line 1: 'hello' cannot be used; a line reads `user item|timestamp item|timestamp ...`"),
        (b"u a|1\nu\xff b|2\n", "line 2: the line is not UTF-8 text"),
    ],
)
def test_text_that_is_no_events(tmp_path, data, message):
    write(tmp_path, a_txt=data)
    with pytest.raises(DataError, match=message.replace("|", "[|]")):
        read_sequences(tmp_path / "a.txt")


# --- Item maps and titles -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ('{"A1": [1, 0], "B1": [2, 1], "A1": [3, 1]}', "item 'B1' has id 2 where 1 was due"),  # A1 in both domains
        ({**ITEMS, "A1": [4, 0]}, "item 'A2' has id 2 where 1 was due; ids count from 1 in A and go on in B"),
        ({**ITEMS, "A1": [0, 1]}, "item 'A2' has id 2 where 1 was due"),
        ({**ITEMS, "B4": [9, 1]}, "item 'B4' has id 9 where 7 was due"),
        ({**ITEMS, "B4": [7, 2]}, r"domain 0 \(A\) or 1 \(B\), item 'B4': Input should be 0 or 1"),
        ({**ITEMS, "B4": ["7", 1]}, "item 'B4': Input should be a valid integer"),
        ({**ITEMS, "B4": [True, 1]}, "item 'B4': Input should be a valid integer"),
        ({**ITEMS, "B4": 7}, "item 'B4': Input should be a valid"),
        ("{}", "holds nothing; it must be JSON of the form"),
        ("[1, 2]", "is not JSON of the form"),
        ('{"A1": [1, 0],\n"B1": [2, 1]', "is not JSON of the form .* at line [23]"),
        ('{"A1": [' + "1" * 5000 + ", 0]}", "is not JSON of the form"),
        ("[" * 100_000, "is not JSON of the form"),
        (b'{"\xff": [1, 0]}', "line 1: the line is not UTF-8 text"),
        ("", "is empty"),
    ],
)  # fmt: skip
def test_item_map_that_is_wrong(tmp_path, items, message):
    write(tmp_path, map_item_json=items)
    with pytest.raises(DataError, match=f"^{tmp_path}/map_item.json.*{message}"):
        read_item_map(tmp_path / "map_item.json")


def test_titles_are_made_plain(tmp_path):
    titles = {"p": "Salt &amp;  pepper", "x": ["pots", "pans"], "y": " "}
    write(tmp_path, titles_json="\ufeff" + json.dumps(titles))
    assert read_titles(tmp_path / "titles.json") == {"p": "Salt & pepper", "x": "pots, pans"}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"a":\n"b",}', "is not JSON of the form .* at line [23]"),
        ('["a"]', "is not JSON of the form"),
        ('{"a": 3}', "is not JSON of the form .* a list of strings may be in place of a title, item 'a': Input"),
        ('{"a": ["b", 3]}', "is not JSON of the form .*, item 'a': Input"),
    ],
)
def test_titles_that_are_wrong(tmp_path, content, problem):
    with pytest.raises(DataError, match=f"titles.json(, |: ){problem}"):
        read_titles(write(tmp_path, titles_json=content) / "titles.json")


# --- Fuzz: an independent, slow and plain reading of the rules, against the reader, on damaged files. ---------------


@st.composite
def damage(draw, *texts: str) -> bytes:
    """A valid file with one to three small injuries."""
    data = bytearray(draw(st.sampled_from(texts)).encode())
    pieces = st.one_of(
        st.sampled_from([b" ", b"|", b"\n", b"-", b"-1", b"0", b"7", b"9", b"\r", b'"', b"\0", b",", b"\xe9", b"."]),
        st.binary(min_size=1, max_size=3),
    )
    for _ in range(draw(st.integers(1, 3))):
        at, width = draw(st.integers(0, len(data))), draw(st.integers(0, 12))
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
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def read_or_refuse(read, *paths: Path):
    """What is read, or None after an error of one line that names the file or folder."""
    try:
        return read(*paths)
    except DataError as error:
        assert paths[0].name in str(error)
        assert "\n" not in str(error)


def plain_text(data: bytes) -> str:
    return io.TextIOWrapper(io.BytesIO(data), "utf-8-sig").read()  # every line ending becomes a line feed


def plain_sequences(data: bytes) -> list[list[tuple[str, int]]] | None:
    """Events of each user, or None if any line is not of the form."""
    try:
        lines = plain_text(data).removesuffix("\n").split("\n")
    except UnicodeDecodeError:
        return None
    if not all(re.fullmatch(r"[!-{}~]+( [!-{}~]+\|([0-9]{1,11}|-1))+", line) for line in lines):
        return None
    if len({line.split(" ")[0] for line in lines}) < len(lines):
        return None
    rows = [[event.split("|") for event in line.split(" ")[1:]] for line in lines]
    return [[(item, int(time)) for item, time in row] for row in rows]


def backwards(times: list[int]) -> bool:
    known = [time for time in times if time >= 0]
    return known != sorted(known)


def plain_prepared(data: bytes) -> tuple[list[list[tuple[int, int]]], bool] | None:
    """Events of each user of a prepared file and whether they have a global order, or None if it must be refused."""
    rows = plain_sequences(data)
    if rows is None or not all(re.fullmatch("0{0,17}[1-7]", item) for row in rows for item, _ in row):
        return None
    users = [[(int(item), time) for item, time in row] for row in rows]
    if all(min(t for _, t in row) >= 0 and not backwards([t for _, t in row]) for row in users):
        return users, True
    for row in users:
        if [item > 3 for item, _ in row] != sorted(item > 3 for item, _ in row):
            return None
        if any(backwards([t for item, t in row if (item > 3) == side]) for side in (False, True)):
            return None
    return users, False


@FUZZ
@example(data=b"0 1|1 4|2 2|3 5|3")
@example(data=b"0 0001|1 4|2 2|3 5|3\r\n1 1|-1 4|2 2|3 5|3\n")
@given(data=damage(GLOBAL, PER_DOMAIN))
def test_damaged_prepared_file_is_refused_or_read_as_it_stands(tmp_path, data):
    folder = prepared(tmp_path / "fuzz", data)
    events = read_or_refuse(read_prepared, folder / "events.txt", folder / "map_item.json")
    expected = plain_prepared(data)
    assert (events is None) == (expected is None)
    if events is not None:
        rows = [(user, *event) for user, row in enumerate(expected[0]) for event in row]
        assert list(events.table.itertuples(index=False, name=None)) == rows
        assert events.has_global_order == expected[1]


@FUZZ
@given(data=damage(ONE_A))
def test_damaged_sequences_are_refused_or_read_as_they_stand(tmp_path, data):
    events = read_or_refuse(read_sequences, write(tmp_path, a_txt=data) / "a.txt")
    rows = plain_sequences(data)
    fine = rows is not None and not any(backwards([time for _, time in row]) for row in rows)
    assert (events is not None) == fine
    if fine:
        assert list(zip(events["item"], events["time"], strict=True)) == sum(rows, [])


@FUZZ
@given(items=damage(json.dumps(ITEMS)))
def test_damaged_item_map_is_refused_or_read_as_it_stands(tmp_path, items):
    read = read_or_refuse(read_item_map, write(tmp_path, map_item_json=items) / "map_item.json")
    if read is not None:
        expected = sorted((number, name, domain) for name, (number, domain) in json.loads(items).items())
        assert [name for _, name, _ in expected] == read[0].tolist()
        assert [number for number, _, _ in expected] == list(range(1, 1 + sum(read[1])))
        assert [domain for _, _, domain in expected] == [0] * read[1][0] + [1] * read[1][1]


@FUZZ
@given(st.data())
def test_damaged_gzip_is_refused_or_read_as_it_stands(tmp_path, data):
    packed = bytearray(gzip.compress(ONE_A.encode(), mtime=0))
    at = data.draw(st.integers(0, len(packed) - 1))
    if data.draw(st.booleans()):
        del packed[at:]
    else:
        packed[at] ^= data.draw(st.integers(1, 255))
    (tmp_path / "a.txt.gz").write_bytes(packed)
    events = read_or_refuse(read_sequences, tmp_path / "a.txt.gz")
    if events is not None:
        assert events["item"].tolist() == ["P1", "P2", "P3", "P2", "P1", "P3", "P4", "P4"]
