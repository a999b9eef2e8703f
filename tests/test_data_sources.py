"""Published pairs: the real data against their recorded figures, hashes, downloads, and the report."""

from __future__ import annotations

import gzip
import hashlib
import os
import threading
import time
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from test_data_readers import CLOCK, PER_DOMAIN, prepared

from gcalib.data import DataError, Pair, load_pair, report, sources, statistics
from gcalib.data.registry import PAIRS, Published, Source

real = pytest.mark.skipif(
    "GCALIB_DATA" not in os.environ, reason="needs the published pairs: set GCALIB_DATA to the folder that holds them"
)

# users, items A, items B, events A, events B, share of ties, last events that are tied, items that occur once
RECORDED = {
    "food-kitchen": (7144, 11837, 16258, 83663, 89885, 0.3118, 2275, 6603),
    "beauty-electronics": (4474, 10379, 14188, 50329, 63800, 0.3100, 1411, 9480),
    "cloth-sport": (3625, 11931, 12033, 28341, 36832, None, None, 10805),
    "electronic-phone": (3499, 7480, 6714, 83547, 31968, None, None, 2554),
    "electronic-phone-ts": (1461, 9031, 4119, 28740, 13301, 0.2737, 395, 6616),
    "sport-phone": (2852, 10683, 6489, 29911, 26247, 0.3471, 963, 7739),
}


CUT = [name for name, pair in PAIRS.items() if isinstance(pair, Published)]


@real
@pytest.mark.parametrize("name", CUT)
def test_real_pairs_have_the_recorded_figures(name):
    pair = load_pair(name, ties="published")
    users, items_a, items_b, events_a, events_b, tie_share, last_tied, once = RECORDED[name]
    figures = statistics(pair)
    assert (pair.num_users, pair.num_items, pair.num_interactions) == (users, (items_a, items_b), (events_a, events_b))
    assert figures["items_once"] == once
    assert 0 < figures["unseen_share"] < 0.25 and figures["users_in_both"] == users
    assert pair.has_clock == (tie_share is not None)
    if pair.has_clock:
        assert figures["tie_share"] == pytest.approx(tie_share, abs=5e-5)
        assert figures["last_tied_share"] * users == pytest.approx(last_tied)
    assert all(not number for key, number in pair.counts.items() if key != "tied_events")


@real
@pytest.mark.parametrize("name", CUT)
def test_shuffled_ties_move_events_within_a_time_only(name):
    published, shuffled = load_pair(name, ties="published"), load_pair(name)
    assert (published.times == shuffled.times).all() and (published.offsets == shuffled.offsets).all()
    owner = np.repeat(np.arange(published.num_users), published.lengths)
    for pair in (published, shuffled):
        assert pair.domain_of(pair.items).dtype == np.int8
    order = [np.lexsort((pair.items, pair.times, owner)) for pair in (published, shuffled)]
    assert (published.items[order[0]] == shuffled.items[order[1]]).all()
    assert (published.items != shuffled.items).any()
    if published.has_clock:
        tied = (np.diff(owner) == 0) & (np.diff(published.times) == 0)
        ascending = [float((np.diff(pair.items)[tied] > 0).mean()) for pair in (published, shuffled)]
        assert ascending[0] > 0.75 and ascending[1] == pytest.approx(0.5, abs=0.03)
    else:
        same = published.domain_of(published.items) == shuffled.domain_of(shuffled.items)
        assert same.all() and (published.items == shuffled.items)[published.times < 0].all()


@real
@pytest.mark.parametrize(
    ("a", "b", "name"),
    [
        ("sports_5core", "cell_phones_5core", "sport-phone"),
        ("clothing_5core_order_only", "sports_5core", "cloth-sport"),
        ("electronics_10core_order_only", "cell_phones_5core", "electronic-phone"),
    ],
)
def test_pairs_cut_again_from_single_domain_files_are_the_published_ones(a, b, name):
    folder = Path(os.environ["GCALIB_DATA"]) / "single-domain"
    cut = load_pair(f"{folder / a}.txt.gz + {folder / b}.txt.gz", ties="published")
    published = load_pair(name, ties="published")
    assert cut.sha256 == published.sha256
    assert (cut.item_names == published.item_names).all()


@real
def test_the_open_pair_holds_the_cut_one_and_a_sample_of_users_of_one_domain():
    pair, cut = load_pair("sport-phone-open", ties="published"), load_pair("sport-phone", ties="published")
    # the published cut asks for 3 events in each domain, so four users of both have too few in one
    domain, owner = pair.domain_of(pair.items), np.repeat(np.arange(pair.num_users), pair.lengths)
    events = np.bincount(owner * 2 + domain, minlength=2 * pair.num_users).reshape(-1, 2)
    rich = np.flatnonzero(events.min(axis=1) >= 3)
    assert len(rich) == cut.num_users == 2852 and pair.num_users == 12_856
    assert statistics(pair)["users_in_both"] == pair.in_both.sum() == 2855

    def named(whole: Pair, user: int) -> list[str]:
        return whole.item_names[whole.sequence(user) - 1].tolist()

    assert all(named(pair, user) == named(cut, place) for place, user in enumerate(rich))
    assert 0.4 < np.mean([pair.domain_of(pair.sequence(user))[0] for user in np.flatnonzero(~pair.in_both)]) < 0.5


@real
def test_speed():
    """In processor time, so that a busy machine does not fail it."""
    start = time.process_time()
    pair = load_pair("food-kitchen")
    assert time.process_time() - start < 2
    start = time.process_time()
    pair.candidates("test", 999)
    assert time.process_time() - start < 4


@real
def test_report_on_real_data():
    frame = report().set_index("name")
    assert list(frame.index) == ["synthetic", *PAIRS]
    assert frame["verified"].all() and (frame["problem"] == "").all()
    assert frame.loc["food-kitchen", "found"] == "GCALIB_DATA" and frame.loc["synthetic", "found"] == "built in"
    assert frame.loc["food-kitchen", "users"] == 7144
    assert "tied_events" in frame.loc["food-kitchen", "counts"]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments) -> None: ...


def packed(text: bytes) -> bytes:
    return gzip.compress(text, mtime=0)


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A registry of two small pairs, one of them public on a server of this machine, and an empty cache."""
    original = prepared(tmp_path / "original")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(original)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"

    def source(path: str, text: bytes, url: str | None) -> Source:
        digests = [hashlib.sha256(data).hexdigest() for data in (packed(text), text)]
        return Source(path, digests[0], digests[1], url)

    items = (original / "map_item.json").read_bytes()
    pairs = {
        "public": Published(
            ("a", "b"),
            source("public/events.txt.gz", CLOCK.encode(), f"{address}/events.txt"),
            source("public/map_item.txt.gz", items, f"{address}/map_item.json"),
        ),
        "derived": Published(
            ("a", "b"),
            source("derived/events.txt.gz", PER_DOMAIN.encode(), None),
            source("derived/map_item.txt.gz", items, None),
        ),
    }
    monkeypatch.setattr(sources, "PAIRS", pairs)
    monkeypatch.delenv("GCALIB_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    cache = tmp_path / "cache"
    monkeypatch.setattr(sources, "cache", lambda: cache)
    yield tmp_path
    server.shutdown()
    server.server_close()


def fill(folder: Path, name: str = "public", text: bytes = CLOCK.encode()) -> Path:
    """A data folder with one pair in it."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "events.txt.gz").write_bytes(packed(text))
    items = folder.parent / "original" / "map_item.json"
    (folder / name / "map_item.txt.gz").write_bytes(packed(items.read_bytes()))
    return folder


def test_download_and_cache(shop):
    assert list(report()["found"]) == ["built in", "missing", "missing"]
    pair = load_pair("public", ties="published")
    assert pair.num_users == 3 and pair.has_clock
    cached = shop / "cache" / "public" / "events.txt"
    assert cached.read_bytes() == CLOCK.encode()
    (shop / "original" / "events.txt").unlink()  # the second time nothing is asked of the server
    assert load_pair("public", ties="published").sha256 == pair.sha256
    frame = report().set_index("name")
    assert list(frame["found"]) == ["built in", "cache", "missing"]
    assert list(frame["verified"]) == [True, True, None]  # missing files are neither right nor wrong
    assert "derived has no public download: put derived/events.txt.gz (sha256 " in frame.loc["derived", "problem"]


def test_report_downloads_when_asked(shop):
    assert "public/events.txt is missing; load_pair('public') downloads it" in report().loc[1, "problem"]
    assert not (shop / "cache").exists()
    assert report(download=True).loc[1, "found"] == "cache"


def test_a_wrong_download_leaves_nothing_behind(shop):
    (shop / "original" / "events.txt").write_text(CLOCK + "9 1|1\n")
    with pytest.raises(DataError, match="events.txt could not be downloaded .*SHA256.*GCALIB_DATA") as error:
        load_pair("public")
    assert "\n" not in str(error.value)
    assert not [path for path in (shop / "cache").rglob("*") if path.is_file()]


def test_an_unreachable_server(shop):
    public = sources.PAIRS["public"]
    dead = replace(public, events=replace(public.events, url="http://127.0.0.1:9/events.txt"))
    sources.PAIRS["public"] = dead
    with pytest.raises(
        DataError, match="http://127.0.0.1:9/events.txt could not be downloaded .the server cannot be reached.; "
    ):
        load_pair("public")
    (shop / "original" / "events.txt").unlink()
    sources.PAIRS["public"] = public
    with pytest.raises(DataError, match="404"):
        load_pair("public")


def test_a_damaged_cache_is_downloaded_again(shop):
    load_pair("public")
    (shop / "cache" / "public" / "events.txt").write_text("0 1|1\n")
    with pytest.raises(DataError, match="events.txt: has sha256 .*; expected"):
        sources.load_published("public", download=False)
    assert load_pair("public").num_users == 3


def test_data_folder(shop, monkeypatch):
    monkeypatch.setenv("GCALIB_DATA", str(fill(shop / "data")))
    pair = load_pair("public")
    assert pair.num_users == 3 and not (shop / "cache").exists()
    # The same content packed in another way is the same file.
    (shop / "data" / "public" / "events.txt.gz").write_bytes(gzip.compress(CLOCK.encode(), 1, mtime=77))
    assert load_pair("public").sha256 == pair.sha256
    with pytest.raises(DataError, match="has no file .*derived/events.txt.gz: derived/events.txt.gz .sha256 .*derived"):
        load_pair("derived")


def test_wrong_hash_names_file_expected_and_found(shop, monkeypatch):
    folder = fill(shop / "data", text=CLOCK.replace("400", "500").encode())
    monkeypatch.setenv("GCALIB_DATA", str(folder))
    file = folder / "public" / "events.txt.gz"
    found, expected = hashlib.sha256(file.read_bytes()).hexdigest(), sources.PAIRS["public"].events.sha256
    with pytest.raises(DataError) as error:
        load_pair("public")
    assert str(error.value) == f"{file}: has sha256 {found}; expected {expected}: copy or download it again."
    file.write_bytes(packed(CLOCK.encode())[:-9])
    with pytest.raises(DataError, match="has sha256 .* and is not a complete gzip file; expected"):
        load_pair("public")
    row = report().set_index("name").loc["public"]
    assert not row["verified"] and row["found"] == "GCALIB_DATA" and "not a complete gzip file" in row["problem"]


def test_unknown_pair_lists_the_known_ones():
    with pytest.raises(ValueError, match="no pair 'food-kichen': known are synthetic, food-kitchen, ") as error:
        load_pair("food-kichen")
    assert "\n" not in str(error.value)


def test_options_are_checked_before_anything_is_read():
    with pytest.raises(ValueError, match="ties='none' is unknown"):
        load_pair("food-kitchen", ties="none")


def test_registry_covers_the_files_it_needs():
    for name, published in PAIRS.items():
        for source in published.files:
            folder = "single-domain" if name.endswith("-open") else name.removesuffix("-ts")
            assert source.path.startswith(folder) and source.path.endswith(".gz")
            assert len(source.sha256) == len(source.content_sha256) == 64 and source.sha256 != source.content_sha256
    assert [name for name, pair in PAIRS.items() if pair.files[0].url] == ["food-kitchen", "beauty-electronics"]
