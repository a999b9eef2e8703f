"""One's own data: DataFrames and the files that people have, what is read of them, asked and refused."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data_formats import named, write

import gcalib
from gcalib.data.files import read_table
from gcalib.data.frames import tidy
from gcalib.data.pair import DataError, NoDataError, Pair
from gcalib.data.sources import load_pair, summary
from gcalib.data.text import item_text

HEADER = "user,item,timestamp\n"
FOOD = pd.DataFrame(
    {
        "user": ["ann", "ann", "ann", "bob", "bob", "cat"],
        "item": ["tea", "rice", "oats", "rice", "tea", "salt"],
        "timestamp": [1300000000, 1300000300, 1300000500, 1300000050, 1300000060, 1300000000],
    }
)
CUPS = pd.DataFrame(
    {
        "user": ["bob", "ann", "bob", "ann"],
        "item": ["mug", "pot", "cup", "cup"],
        "timestamp": [1300000070, 1300000100, 1300000020, 1300000400],
    }
)
SEQUENCES = [["tea", "pot", "rice", "cup", "oats"], ["cup", "rice", "tea", "mug"]]


def pair_of(a: pd.DataFrame = FOOD, b: pd.DataFrame = CUPS, **options) -> Pair:
    return gcalib.pair_from_frames(a, b, names=("food", "cups"), **{"min_per_domain": 2, **options})


def read(folder: Path, text: str | bytes, name: str = "a_csv", columns: dict | None = None) -> list[tuple]:
    """Events of a file as rows."""
    path = write(folder, **{name: text}) / ".".join(name.rsplit("_", 1))
    events, _ = tidy(read_table(path, columns), str(path))
    return in_seconds(events)


def in_seconds(events: pd.DataFrame) -> list[tuple]:
    return [(user, item, time // 10**6) for user, item, time in events.itertuples(index=False, name=None)]


# --- Frames ---------------------------------------------------------------------------------------------------------


def test_frames_become_a_pair():
    pair = pair_of()
    assert named(pair) == SEQUENCES
    assert pair.domains == ("food", "cups")
    assert pair.num_items == (3, 3)
    assert pair.counts["users_in_one_domain"] == 1


def test_frames_with_titles():
    titled = FOOD.assign(title=["Green tea", None, " Oats ", "", "Green tea", "Salt"])
    assert pair_of(titled).titles.by_name == {"tea": "Green tea", "oats": "Oats", "salt": "Salt"}
    assert pair_of().titles is None
    assert pair_of(titled).sha256 != pair_of().sha256
    stated = pair_of(titled, CUPS.assign(title="A cup"), columns={"timestamp": "timestamp"})
    assert stated.titles.by_name["cup"] == "A cup"


def test_frames_with_titles_of_reviews_are_asked_about():
    reviews = FOOD.assign(title=["Good", "Bad", "So so", "Fine", "Great", "Good"])
    with pytest.raises(
        DataError, match="^events of food: item rice has more than one title; if these are titles of rev"
    ):
        pair_of(reviews)
    first = {"title": "title"}
    assert pair_of(reviews, CUPS.assign(title="A cup"), columns=first).titles.by_name["tea"] == "Good"


def test_frames_with_other_columns_need_them_named():
    other = FOOD.set_axis(["who", "what", "when"], axis="columns")
    with pytest.raises(
        DataError, match=r"^events of food: none of the columns \(who, what, when\) is known .* columns="
    ):
        pair_of(other)
    columns = {"user": "who", "item": "what", "timestamp": "when"}
    both = pair_of(other, CUPS.set_axis(["who", "what", "when"], axis="columns"), columns=columns)
    assert both.sha256 == pair_of().sha256
    with pytest.raises(DataError, match="there is no column 'where', which columns=.* names"):
        pair_of(other, columns=columns | {"item": "where"})
    with pytest.raises(ValueError, match="names place; it may name user, item, timestamp, title"):
        pair_of(other, columns=columns | {"place": "where"})


@pytest.mark.parametrize(
    "convert",
    [
        lambda t: t.astype(float),
        lambda t: t * 1000,
        lambda t: t * 10**6 + 1,
        lambda t: t * 10**9,
        lambda t: t.astype(str),
        lambda t: (t * 1000).astype(str) + ".0",
        lambda t: pd.to_datetime(t, unit="s"),
        lambda t: pd.to_datetime(t, unit="s", utc=True).dt.tz_convert("Asia/Tokyo"),
        lambda t: pd.to_datetime(t, unit="s").dt.strftime("%Y-%m-%dT%H:%M:%SZ"),
        lambda t: pd.to_datetime(t, unit="s").dt.strftime("%Y-%m-%d %H:%M:%S"),
    ],
)
def test_frames_with_any_form_of_time(convert):
    """Each file may have its own: what is milliseconds in one domain and seconds in the other is the same time."""
    assert pair_of(FOOD.assign(timestamp=convert(FOOD["timestamp"]))).sha256 == pair_of().sha256


def test_frames_with_ids_that_a_missing_value_made_floats():
    numbers = {"tea": 1, "rice": 2, "oats": 3, "salt": 4}
    whole = FOOD.assign(item=FOOD["item"].map(numbers))
    assert pair_of(whole.assign(item=whole["item"].astype(float))).sha256 == pair_of(whole).sha256
    assert "2" in pair_of(whole).item_names
    for kind in ("double[pyarrow]", "string"):  # which print 1.0
        assert pair_of(whole.assign(item=whole["item"].astype(float).astype(kind))).sha256 == pair_of(whole).sha256


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["ann", None, 1300000000], "row 7: the item is missing"),
        ([" ", "tea", 1300000000], "row 7: the user is missing"),
        (["ann", "tea", "June"], "row 7: the time 'June' is not a time .a number or an ISO 8601 date"),
        (["ann", "tea", -5], "row 7: the time '-5' is not a time .-1 stands for unknown"),
        (["ann", "tea", np.inf], "row 7: the time 'inf' is not a time"),
        (["ann", "tea", 1300000000000], "row 1: the time '1300000000' is not in the unit of the others"),
    ],
)
def test_frames_with_a_bad_row(row, message):
    bad = pd.concat([FOOD.astype(object), pd.DataFrame([row], columns=FOOD.columns)])
    with pytest.raises(DataError, match=f"^events of food, {message}"):
        pair_of(bad)


def test_frames_with_events_within_a_second_keep_their_order():
    """Times of milliseconds order the events of both domains; only equal ones are ties."""
    a = pd.DataFrame(
        {"user": "u", "item": ["a1", "a2", "a3"], "timestamp": [1300000000100, 1300000000300, 1300000000500]}
    )
    b = pd.DataFrame({"user": "u", "item": ["b1", "b2"], "timestamp": [1300000000.2, 1300000000.4]})
    pair = pair_of(a, b)
    assert named(pair) == [["a1", "b1", "a2", "b2", "a3"]]
    assert pair.times.tolist() == [1300000000] * 5
    assert pair.counts["tied_events"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.set_axis(["user", "item", "user"], axis="columns"), "there are two columns 'user'"),
        (lambda f: f.iloc[:0], "there is no event"),
    ],
)
def test_frames_that_are_no_events(change, message):
    frame = change(FOOD)
    frame = frame if "timestamp" in frame else frame.assign(timestamp=1)
    with pytest.raises(DataError, match=f"^events of food: {message}"):
        pair_of(frame)


@pytest.mark.parametrize(
    "convert",
    [
        lambda f: f.set_index("user"),
        lambda f: f.astype({"user": "category", "item": "category", "timestamp": "category"}),
        lambda f: f.astype({"timestamp": "UInt64"}),
        lambda f: f.convert_dtypes(dtype_backend="pyarrow"),
    ],
)
def test_frames_of_any_make(convert):
    assert pair_of(convert(FOOD)).sha256 == pair_of().sha256


def test_domains_that_would_be_taken_for_one_another_are_refused(tmp_path):
    for names in (("shop", "shop"), ("B", "A")):
        with pytest.raises(ValueError, match="which would be taken for one another"):
            gcalib.pair_from_frames(FOOD, CUPS, names=names)
    for name, frame in (("food", FOOD), ("cups", CUPS)):
        (tmp_path / name).mkdir()
        frame.to_csv(tmp_path / name / "ratings.csv", index=False)
    paths = [tmp_path / "food" / "ratings.csv", tmp_path / "cups" / "ratings.csv"]
    assert load_pair(paths, min_per_domain=2).domains == ("food", "cups")


def test_frames_without_some_times_lose_these_events_and_count_them():
    """One unknown time among all must not take the order from all others."""
    more = pd.concat([FOOD, pd.DataFrame({"user": ["ann", "bob"], "item": ["salt", "jam"], "timestamp": [-1, np.nan]})])
    pair = pair_of(more)
    assert pair.has_global_order
    assert named(pair) == SEQUENCES
    assert pair.counts["events_without_time"] == 2
    with pytest.raises(DataError, match="events of food: no event has a time"):
        pair_of(FOOD.assign(timestamp=None))


def test_sequences_without_some_times_lose_these_events_and_count_them(tmp_path):
    texts = {"a_txt": "u P1|10 P2|-1 P3|30\nv P2|1 P3|2\n", "b_txt": "u Q1|5 Q2|6\nv Q1|3 Q2|4\n"}
    pair = load_pair(write(tmp_path / "x", **texts), min_per_domain=1)
    assert pair.has_global_order
    assert named(pair) == [["Q1", "Q2", "P1", "P3"], ["P2", "P3", "Q1", "Q2"]]
    assert pair.counts["events_without_time"] == 1


def test_numbers_in_both_domains_are_asked_about():
    a, b = (frame.assign(item=frame["item"].astype("category").cat.codes + 1) for frame in (FOOD, CUPS))
    with pytest.raises(DataError, match=r"3 item ids, such as 1, are in both domains.*shared_ids='distinct'.*'drop'"):
        pair_of(a, b)
    distinct = pair_of(a, b, shared_ids="distinct")
    assert distinct.num_items == (3, 3)
    assert distinct.counts["items_in_both_domains"] == 0
    assert [len(sequence) for sequence in named(distinct)] == [5, 4]
    with pytest.raises(DataError, match="no event of food is left"):
        pair_of(a, b, shared_ids="drop")
    titled = [frame.assign(title=letter + frame["item"].astype(str)) for letter, frame in (("a", a), ("b", b))]
    texts = item_text(pair_of(*titled, shared_ids="distinct")).texts
    assert list(texts) == ["a1", "a2", "a4", "b1", "b2", "b3"]
    with pytest.raises(ValueError, match="shared_ids='both' is unknown"):
        pair_of(a, b, shared_ids="both")


def test_names_in_both_domains_are_dropped_and_counted():
    jam = pd.DataFrame({"user": ["ann", "bob"], "item": ["jam", "jam"], "timestamp": [1300000900, 1300000800]})
    pair = pair_of(pd.concat([FOOD, jam]), CUPS.replace("pot", "tea"), min_per_domain=1)
    assert "tea" not in pair.item_names
    assert pair.counts["items_in_both_domains"] == 1
    assert pair.counts["events_of_items_in_both_domains"] == 3


def test_domains_of_times_that_never_meet_are_warned_of(caplog):
    pair_of(FOOD.assign(timestamp=FOOD["timestamp"] - 10**9))
    assert "All events of one domain are earlier than all of the other" in caplog.text
    caplog.clear()
    pair_of()
    assert caplog.text == ""


def test_minima_of_users_and_items_hold_together():
    """Rare items leave users with too few events, and these leave items that are rare."""
    rng = np.random.default_rng(0)
    frames = [
        pd.DataFrame({"user": rng.integers(0, 60, 400), "item": rng.zipf(1.5, 400) % 50, "timestamp": np.arange(400)})
        .astype({"user": str})
        .assign(item=lambda frame, letter=letter: letter + frame["item"].astype(str))
        for letter in "ab"
    ]
    pair = gcalib.pair_from_frames(*frames, min_per_domain=3, min_events_per_item=4)
    assert np.bincount(pair.items)[1:].min() >= 4
    domains = [pair.domain_of(pair.sequence(user)) for user in range(pair.num_users)]
    assert min(min(np.sum(d == 0), np.sum(d == 1)) for d in domains) >= 3
    assert pair.counts["events_of_rare_items"] > 0
    kept = len(pair.items) + pair.counts["events_of_rare_items"]
    assert kept < len(gcalib.pair_from_frames(*frames, min_per_domain=1).items)


# --- Files ----------------------------------------------------------------------------------------------------------

EVENTS = [("u1", "B0", 1300000000), ("u1", "C,0", 1300000001), ("u2", "D", 1300000000)]


@pytest.mark.parametrize(
    ("name", "text"),
    {
        "a_csv": 'user_id,parent_asin,rating,timestamp\nu1,B0,5.0,1300000000000\nu1,"C,0",1,1300000001000\n'
        "u2,D,3.0,1300000000000\n",
        "b_csv": '\ufeffuserId,movieId,rating,timestamp\r\nu1,B0,5,1300000000\r\n"u1","C,0",5,1300000001\r\nu2,D,5,'
        "1300000000\r\n\r\n",
        "a_tsv": "timestamp\titem\tuser\n1300000000\tB0\tu1\n1300000001\tC,0\tu1\n1300000000\tD\tu2\n",
        "a_inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\nu1\tB0\t5\t1300000000.0\n"
        "u1\tC,0\t5\t1300000001.0\nu2\tD\t5\t1300000000.0\n",
        "a_jsonl": '{"reviewerID": "u1", "asin": "B0", "unixReviewTime": 1300000000, "summary": "a\\nb"}\n'
        '{"asin": "C,0", "reviewerID": "u1", "unixReviewTime": 1300000001}\n'
        '{"reviewerID": "u2", "asin": "D", "unixReviewTime": 1300000000, "vote": [1]}\n',
        "a_json": '{"user_id": "u1", "parent_asin": "B0", "asin": "B9", "timestamp": 1300000000123, "title": "Good!"}\n'
        '{"user_id": "u1", "parent_asin": "C,0", "asin": "C,0", "timestamp": 1300000001001, "title": "Bad"}\n'
        '{"user_id": "u2", "parent_asin": "D", "asin": "D", "timestamp": 1300000000000, "title": "So so"}\n',
        "a_txt": "user;item;timestamp\nu1;B0;1300000000\nu1;C,0;1300000001\nu2;D;1300000000\n",
    }.items(),
)
@pytest.mark.parametrize("packing", ["", ".gz", ".zip"])
def test_tables_of_the_usual_forms(tmp_path, name, text, packing):
    path = write(tmp_path, **{name: text}) / ".".join(name.rsplit("_", 1))
    if packing == ".gz":
        path = path.with_name(path.name + packing)
        path.write_bytes(gzip.compress(text.encode()))
    elif packing == ".zip":
        with zipfile.ZipFile(path.with_name(path.name + packing), "w") as packed:
            packed.write(path, path.name)
        path = path.with_name(path.name + packing)
    events, titles = tidy(read_table(path), "here")
    assert in_seconds(events) == EVENTS
    assert titles == {}  # what reviews of 2023 name title is the review's


def test_ids_are_kept_as_they_are_written(tmp_path):
    assert [item for _, item, _ in read(tmp_path, HEADER + "u,0031,5\nu,NA,6\nu,1e5,7\nu, i ,8\n")] == [
        "0031", "NA", "1e5", "i",
    ]  # fmt: skip
    assert read(tmp_path, '{"user": 7, "item": "0031", "timestamp": 5}\n', "a_jsonl") == [("7", "0031", 5)]


def test_tables_without_a_header_need_numbers_of_columns(tmp_path):
    """User ids that look like item ids of Amazon: nothing is guessed."""
    text = "A2SUAM1J3G,B000000001,5.0,1300000000\nAABBCCDDEE,B000000001,1.0,1250000000\n"
    with pytest.raises(DataError, match="a.csv: none of the columns .* its number, counted from 0"):
        read(tmp_path, text)
    numbered = read(tmp_path, text, columns={"user": 0, "item": 1, "timestamp": 3})
    assert numbered == [("A2SUAM1J3G", "B000000001", 1300000000), ("AABBCCDDEE", "B000000001", 1250000000)]
    with pytest.raises(DataError, match="there is no column 4, which columns="):
        read(tmp_path, text, columns={"user": 0, "item": 1, "timestamp": 4})
    with pytest.raises(DataError, match="takes one column twice"):
        read(tmp_path, text, columns={"user": 0, "item": 0, "timestamp": 3})


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("", "a_csv", "a.csv: cannot be read: No columns to parse"),
        (HEADER, "a_csv", "a.csv: there is no event"),
        (HEADER + "u,i,5\nu,i,5,9\n", "a_csv", "a.csv: .* Expected 3 fields in line 3, saw 4"),
        (HEADER + "u,i,5,9\n", "a_csv", "a.csv: .* does not match length of data"),
        (HEADER + "u,i,5\nu,,6\n", "a_csv", "a.csv, row 2: the item is missing"),
        (HEADER + "u,i,5\nv,j,soon\n", "a_csv", "a.csv, row 2: the time 'soon' is not a time"),
        ('user\titem\tnote\ttimestamp\nu\ti\tok\t5\nu\tj\t"Best\t6\nu\tk\tx"\t7\n', "a_tsv", "a.tsv: row 2 has a quot"),
        ('[{"user": "u", "item": "i", "timestamp": 5}]', "a_json", "a.json: cannot be read as one object a line"),
        (b"\xff\xfeuser", "a_csv", "a.csv: is not UTF-8 text"),
        (b"\x1f\x8bgarbage", "a.csv_gz", "a.csv.gz: cannot be unpacked"),
        (gzip.compress(b"user,item,timestamp\nu,i,5\n" * 99)[:-12], "a.csv_gz", "a.csv.gz: cannot be unpacked"),
        (b"x", "a.csv_zip", "a.csv.zip: cannot be unpacked"),
        (b"x", "a_parquet", "a.parquet: cannot be read"),
        ('{"user": "u", "item": "i"\n', "a_jsonl", "a.jsonl: cannot be read"),
        ('{"user": "u", "item": "i"}\n', "a_jsonl", "a.jsonl: none of the columns .user, item. .* the timestamp"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, text, name, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, text, name)


def test_missing_and_ambiguous_files_are_named(tmp_path):
    with pytest.raises(NoDataError, match="'nowhere' is neither a pair .synthetic, food-kitchen, .* nor a folder"):
        load_pair("nowhere")
    folder = write(tmp_path / "x", a_csv=HEADER + "u,i,5\n", c_md="read me")
    with pytest.raises(DataError, match="x holds a.csv, c.md; a pair is one text file with one map_item file, or two"):
        load_pair(folder)
    with pytest.raises(NoDataError, match="b.csv is missing"):
        load_pair(f"{folder}/a.csv + {folder}/b.csv")


def test_paths_with_a_plus_and_large_endings(tmp_path):
    folder = tmp_path / "R+D"
    folder.mkdir()
    FOOD.to_csv(folder / "A.CSV", index=False)
    CUPS.to_csv(folder / "B.CSV", index=False)
    both = [load_pair(path, min_per_domain=2) for path in (folder, f"{folder}/A.CSV + {folder}/B.CSV")]
    assert [named(pair) for pair in both] == [SEQUENCES, SEQUENCES]


@pytest.mark.parametrize("columns", ["who", ["who", "what", "when"]])
def test_columns_that_name_no_roles_are_refused(columns):
    for use in (lambda: pair_of(columns=columns), lambda: gcalib.RunConfig(pair="x", columns=columns)):
        with pytest.raises(ValueError, match="must name columns by role"):
            use()


@pytest.mark.parametrize("value", [True, 2.5, "two"])
def test_options_that_are_no_whole_numbers_are_refused(value):
    with pytest.raises(ValueError, match="min_events_per_item=.* must be a whole number, 1 or more"):
        pair_of(min_events_per_item=value)


def test_folder_and_two_paths_are_one_pair(tmp_path):
    folder = tmp_path / "shop"
    folder.mkdir()
    FOOD.to_csv(folder / "food.csv", index=False)
    CUPS.to_parquet(folder / "cups.parquet")
    (folder / "titles.json").write_text(json.dumps({"tea": "Green tea"}))
    paths = [folder / "food.csv", folder / "cups.parquet"]
    by_folder = load_pair(folder, min_per_domain=2)
    assert by_folder.domains == ("cups", "food")
    assert by_folder.name == "shop"
    listed, joined = load_pair(paths, min_per_domain=2), load_pair(f"{paths[0]} + {paths[1]}", min_per_domain=2)
    assert named(listed) == SEQUENCES
    assert listed.sha256 == joined.sha256
    assert listed.titles.by_name == {"tea": "Green tea"}


def test_summary_names_what_was_dropped_and_why():
    text = summary(pair_of(pd.concat([FOOD, FOOD.iloc[:1]])))
    assert text.startswith("food-cups: 2 users, in time order; food: 3 items, 5 events; cups: 3 items, 4 events")
    assert "1 duplicate_events: the same user, item and time" in text
    assert "1 users_in_one_domain: users found in one of the two domains only" in text
    assert "repeated_events" not in text


@st.composite
def shops(draw):
    """A frame of events with ids and titles that need quotes, at whole seconds."""
    letter = draw(st.sampled_from("ab"))
    ids = st.text("xyz ,;'\"\t#é", min_size=1, max_size=4).map(lambda text: f"{letter}{text}.")
    rows = draw(st.lists(st.tuples(st.sampled_from("pqrs"), ids, st.integers(1, 60)), min_size=12, max_size=40))
    return pd.DataFrame(rows, columns=["user", "item", "timestamp"]).assign(
        item=lambda frame: letter + frame["item"], timestamp=lambda frame: 1300000000 + 3600 * frame["timestamp"]
    )


def save(frame: pd.DataFrame, path: Path, form: str) -> Path:
    path = path.with_name(f"{path.name}.{form}")
    if form == "parquet":
        frame.to_parquet(path)
    elif form == "jsonl.gz":
        frame.to_json(path, orient="records", lines=True, force_ascii=False)
    elif form == "inter":
        typed = frame.rename(columns={"user": "user_id:token", "item": "item_id:token", "timestamp": "timestamp:float"})
        typed.to_csv(path, sep="\t", index=False)
    else:
        frame.to_csv(path, sep="\t" if form == "tsv" else ",", index=False)
    return path


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    a=shops(), b=shops(), form=st.sampled_from(["csv", "tsv", "inter", "jsonl.gz", "parquet"]), seed=st.integers(0, 99),
    scale=st.sampled_from([1, 1000, 10**6, 10**9]), dates=st.booleans(), ties=st.just("shuffle"),
)  # fmt: skip
def test_every_form_of_file_loads_to_the_same_pair(tmp_path, a, b, form, seed, scale, dates, ties):
    def load(function, *arguments):
        try:
            return function(*arguments, min_per_domain=0, ties=ties).sha256
        except DataError as error:
            return str(error).partition(": ")[2].partition(" is left")[0]  # nothing is left of so few events

    wanted = load(gcalib.pair_from_frames, a, b)
    paths = []
    for name, frame in (("a", a), ("b", b)):
        shuffled = frame.sample(frac=1, random_state=seed).assign(more='x "y", z', rating=np.arange(len(frame)) / 2)
        time = shuffled["timestamp"]
        as_date = pd.to_datetime(time, unit="s", utc=True).dt.strftime("%Y-%m-%dT%H:%M:%SZ")
        shuffled["timestamp"] = as_date if dates else time * scale
        paths.append(save(shuffled[["more", "timestamp", "user", "rating", "item"]], tmp_path / name, form))
    assert load(load_pair, paths) == wanted


@pytest.mark.slow
def test_four_million_ratings_load_in_half_a_minute_and_little_memory(tmp_path):
    import subprocess
    import sys

    rng = np.random.default_rng(0)
    for name in "ab":
        users, items = rng.integers(0, 200_000, 2_000_000), rng.zipf(1.3, 2_000_000) % 100_000
        frame = pd.DataFrame({"user_id": users, "parent_asin": items, "rating": 5.0})
        frame["user_id"], frame["parent_asin"] = "A" + frame["user_id"].astype(str), name + items.astype(str)
        frame["timestamp"] = 1_300_000_000_000 + rng.integers(0, 10**8, 2_000_000) * 1000
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
    code = "import sys, resource, gcalib; gcalib.load_pair(sys.argv[1]);"
    code += (
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, resource.getrusage(resource.RUSAGE_SELF).ru_utime)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    kilobytes, seconds = map(float, done.stdout.split())
    assert kilobytes < 1.5e6
    assert seconds < 30
