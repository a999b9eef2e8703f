"""Where pairs come from: paths, the published pairs against their hashes and figures, downloads, and the report."""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from test_data_formats import GLOBAL, ONE_A, ONE_B, prepared, write

from gcalib.data import sources
from gcalib.data.pair import DataError, NoDataError
from gcalib.data.sources import PAIRS, Published, Source, load_pair, report, statistics

real = pytest.mark.skipif(
    "GCALIB_DATA" not in os.environ, reason="needs the published pairs: set GCALIB_DATA to the folder that holds them"
)

# `Pair.sha256` with ties shuffled and as published: what every record of the study names.
HASHES = {
    "food-kitchen": ("bceb5e31583c8666", "b8fac5c0faf105c5"),
    "beauty-electronics": ("5fe5980f2ab0d571", "8993975568952bd4"),
    "cloth-sport": ("d449eac19819f0cd", "dd6e844a2c795973"),
    "cloth-sport-ts": ("8fefdf9e3eaa3682", "0b9c0f9355d818a8"),
    "electronic-phone": ("5931c7066ff7cd33", "802b45783176f8bb"),
    "electronic-phone-ts": ("a569ee87c81b1c18", "cb98d0ee033aa205"),
    "sport-phone": ("e7a3c65ced1652ed", "9156257a6a320ae3"),
    "sport-phone-open": ("3a2473401448abad", "5b2c314493203179"),
}
# The others are published as they are read: 50 events at most, some in each domain.
DROPPED = {"cloth-sport-ts": {"events_beyond_max_length": 1087, "users_below_minimum": 1}}


# --- Paths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("folder", "domains"), [("nuts-bolts", ("nuts", "bolts")), ("mine", ("a", "b"))])
def test_folder_name_gives_the_domains(tmp_path, folder, domains):
    assert load_pair(prepared(tmp_path / folder)).domains == domains


def test_folder_of_two_files(tmp_path):
    pair = load_pair(write(tmp_path / "shop", left_txt=ONE_A, right_txt=ONE_B))
    assert pair.domains == ("left", "right")
    assert pair.name == "shop"


def test_two_files_by_name(tmp_path):
    write(tmp_path, left_txt=ONE_A, right_txt=ONE_B, third_txt=ONE_B)
    pair = load_pair(f"{tmp_path}/right.txt + {tmp_path}/left.txt")
    assert pair.domains == ("right", "left")
    assert pair.name == "right-left"


def test_folder_passes_over_other_files(tmp_path):
    folder = prepared(tmp_path / "x")
    before = load_pair(folder).sha256
    write(folder, map_user_json="{}", prices_json="", **{".hidden_txt": "x"})
    assert load_pair(folder).sha256 == before


def test_titles_beside_the_data_are_part_of_the_hash(tmp_path):
    folder = prepared(tmp_path / "x")
    without = load_pair(folder).sha256
    write(folder, titles_json='{"A1": "salt"}')
    pair = load_pair(folder)
    assert pair.titles.by_name == {"A1": "salt"}
    assert pair.sha256 != without


def test_titles_twice_are_refused(tmp_path):
    folder = write(prepared(tmp_path / "x"), titles_json='{"A1": "salt"}', **{"titles.json_gz": gzip.compress(b"{}")})
    with pytest.raises(DataError, match="x holds .*titles.json, titles.json.gz; .* with one file of titles at most"):
        load_pair(folder)


def test_folder_with_a_published_name_is_own_data(tmp_path):
    assert load_pair(prepared(tmp_path / "sport-phone")).name == "sport-phone (own data)"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("food-kichen", "'food-kichen' is neither a pair .synthetic, food-kitchen, .* nor a folder"),
        ("{0}/x/map_item.json", "is neither a pair .* nor a folder"),
        ("a.txt + b.txt + c.txt", "is neither a pair .* nor are they two files, 'a.csv . b.csv'"),
        ("{0}/x", "x holds map_item.json; a pair is one text file with one map_item file, or two files of events"),
        ("{0}/gone.txt + {0}/gone2.txt", "gone.txt is missing; a file of events was expected there"),
    ],
)
def test_path_that_is_no_pair(tmp_path, path, message):
    (prepared(tmp_path / "x") / "events.txt").unlink()
    with pytest.raises(DataError, match=message):
        load_pair(path.format(tmp_path))


@pytest.mark.parametrize("pair", ["synthetic", "food-kitchen", "{0}"])
def test_columns_are_for_tables_only(tmp_path, pair):
    prepared(tmp_path)
    with pytest.raises(ValueError, match="columns.* for tables"):
        load_pair(pair.format(tmp_path), columns={"user": 0})


def test_ratings_of_two_domains_count_what_is_dropped(tmp_path):
    users, days = ("A2SUAM1J3GNN3B", "A3AF8FFZAZYNE5"), 86_400

    def ratings(letter: str) -> list[str]:
        return [f"{u},{letter}00000000{n},5.0,{n * days}\n" for n in range(3) for u in users]

    again = f"{users[0]},B000000001,5.0,{days}\n{users[0]},B000000001,4.0,{9 * days}\n"
    lonely = f"A9LONELYUSERXY,B000000001,5.0,{days}\n"
    folder = write(tmp_path / "x", a_csv="".join(ratings("B")) + again + lonely, b_csv="".join(ratings("C")))
    pair = load_pair(folder, ties="published", columns={"user": 0, "item": 1, "timestamp": 3})
    assert pair.sequence(1).tolist() == [1, 4, 2, 5, 3, 6]
    assert {name: number for name, number in pair.counts.items() if number} == {
        "duplicate_events": 1, "repeated_events": 1, "users_in_one_domain": 1, "tied_events": 12,
    }  # fmt: skip


def test_options_are_checked_before_anything_is_read():
    with pytest.raises(ValueError, match="ties='none' is unknown"):
        load_pair("food-kitchen", ties="none")


# --- Published pairs ------------------------------------------------------------------------------------------------


def test_data_layer_imports_no_torch():
    stub = "import sys, types; g = types.ModuleType('gcalib'); g.__path__ = ['gcalib']; sys.modules['gcalib'] = g"
    command = f"{stub}; import gcalib.data.text; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], cwd=Path(__file__).parents[1]).returncode == 0


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments) -> None: ...


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A list of two small pairs, one of them public on a server of this machine, and an empty cache."""
    original = prepared(tmp_path / "original")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(original)))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    items = (original / "map_item.json").read_bytes()
    figures = statistics(load_pair(original))

    def published(name: str, text: bytes, public: bool) -> Published:
        files = [
            Source(f"{name}/{stem}.txt.gz", hashlib.sha256(data).hexdigest(), f"{address}/{file}" if public else None)
            for stem, data, file in (("events", text, "events.txt"), ("map_item", items, "map_item.json"))
        ]
        return Published(("a", "b"), figures, (files[0], files[1]), ((), ()))

    pairs = {"public": published("public", GLOBAL.encode(), True), "derived": published("derived", b"", False)}
    monkeypatch.setattr(sources, "PAIRS", pairs)
    monkeypatch.delenv("GCALIB_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(sources, "cache", lambda: tmp_path / "cache")
    yield tmp_path
    server.shutdown()
    server.server_close()


def fill(folder: Path, text: str = GLOBAL) -> Path:
    """A data folder with the public pair in it."""
    (folder / "public").mkdir(parents=True)
    (folder / "public" / "events.txt.gz").write_bytes(gzip.compress(text.encode()))
    items = (folder.parent / "original" / "map_item.json").read_bytes()
    (folder / "public" / "map_item.txt.gz").write_bytes(gzip.compress(items))
    return folder


def test_download_is_kept(shop):
    pair = load_pair("public")
    assert (shop / "cache" / "public" / "events.txt").read_text() == GLOBAL
    (shop / "original" / "events.txt").unlink()  # the second time nothing is asked of the server
    assert load_pair("public").sha256 == pair.sha256


def test_download_only_when_allowed(shop):
    with pytest.raises(NoDataError, match=r"public/events.txt, a file of public, is missing; load_pair\('public'\)"):
        load_pair("public", download=False)
    assert not (shop / "cache").exists()


def test_download_that_is_wrong_leaves_nothing_behind(shop):
    (shop / "original" / "events.txt").write_text(GLOBAL + "9 1|1\n")
    with pytest.raises(NoDataError, match="^[^\n]*events.txt could not be downloaded .*SHA256.*GCALIB_DATA[^\n]*$"):
        load_pair("public")
    assert not [path for path in (shop / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("url", "reason"), [("http://127.0.0.1:9/events.txt", "the server cannot be reached"), ("{0}/gone.txt", "404")]
)
def test_download_from_a_server_that_fails(shop, url, reason):
    public = sources.PAIRS["public"]
    address = public.files[0].url.rpartition("/")[0]
    sources.PAIRS["public"] = replace(
        public, files=(replace(public.files[0], url=url.format(address)), public.files[1])
    )
    with pytest.raises(NoDataError, match=f"could not be downloaded .*{reason}.*; set the environment variable GCALIB"):
        load_pair("public")


def test_damaged_cache_is_downloaded_again(shop):
    load_pair("public")
    (shop / "cache" / "public" / "events.txt").write_text("0 1|1\n")
    with pytest.raises(DataError, match="events.txt: is not the published file: its content has sha256 .*, expected "):
        load_pair("public", download=False)
    assert load_pair("public").num_users == 3


def test_private_pair_says_which_files_it_needs(shop):
    wanted = "derived/events.txt.gz .sha256 of its content [0-9a-f]{64}. and derived/map_item.txt.gz .sha256"
    with pytest.raises(NoDataError, match=f"is missing; set the environment variable GCALIB_DATA to .*{wanted}"):
        load_pair("derived")


def test_data_folder_is_read_without_a_cache(shop, monkeypatch):
    monkeypatch.setenv("GCALIB_DATA", str(fill(shop / "data")))
    assert load_pair("public").num_users == 3
    assert not (shop / "cache").exists()


def test_data_folder_without_the_pair(shop, monkeypatch):
    monkeypatch.setenv("GCALIB_DATA", str(fill(shop / "data")))
    with pytest.raises(NoDataError, match="data/derived/events.txt.gz, a file of derived, is missing"):
        load_pair("derived")


def test_data_folder_with_another_file(shop, monkeypatch):
    monkeypatch.setenv("GCALIB_DATA", str(fill(shop / "data", GLOBAL.replace("400", "500"))))
    with pytest.raises(DataError, match="data/public/events.txt.gz: is not the published file: .*copy or download it"):
        load_pair("public")


def test_report_says_where_pairs_are(shop):
    frame = report(download=True).set_index("name")
    assert list(frame["found"]) == ["built in", "cache", "missing"]
    assert frame["verified"].isna().all()
    assert frame.loc["public", ["users", "items_a", "events_b"]].tolist() == [3, 3, 8]
    assert "GCALIB_DATA" in frame.loc["derived", "problem"]


def test_report_verifies_when_asked(shop, monkeypatch):
    monkeypatch.setenv("GCALIB_DATA", str(fill(shop / "data", GLOBAL.replace("400", "500"))))
    row = report(verify=True).loc[1]
    assert row["verified"] is False
    assert "is not the published file" in row["problem"]


@real
@pytest.mark.parametrize("name", PAIRS)
def test_published_pair_is_what_records_name(name):
    pair = load_pair(name)
    assert pair.sha256[:16] == HASHES[name][0]
    assert statistics(pair) == PAIRS[name].figures
    assert pair.in_both.sum() == (2855 if name == "sport-phone-open" else pair.num_users)
    dropped = {key: number for key, number in pair.counts.items() if number and key != "tied_events"}
    assert name == "sport-phone-open" or dropped == DROPPED.get(name, {})


@real
@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_published_pair_in_its_published_order(name):
    assert load_pair(name, ties="published").sha256[:16] == HASHES[name][1]


@real
@pytest.mark.slow
@pytest.mark.parametrize(
    ("a", "b", "name"),
    [
        ("sports_5core", "cell_phones_5core", "sport-phone"),
        ("clothing_5core_order_only", "sports_5core", "cloth-sport"),
        ("electronics_10core_order_only", "cell_phones_5core", "electronic-phone"),
    ],
)
def test_published_pair_cut_again_from_single_domain_files(a, b, name):
    folder = Path(os.environ["GCALIB_DATA"]) / "single-domain"
    cut = load_pair(f"{folder / a}.txt.gz + {folder / b}.txt.gz", ties="published")
    published = load_pair(name, ties="published")
    assert cut.sha256 == published.sha256
    assert (cut.item_names == published.item_names).all()


@real
def test_report_finds_the_published_pairs():
    frame = report(verify=True).set_index("name")
    assert list(frame.index) == ["synthetic", *PAIRS]
    assert frame["verified"][1:].all()
