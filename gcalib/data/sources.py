"""Where data come from: `load_pair`, finding and verifying published files, and the state of every pair.

Published pairs (`gcalib.data.registry`) are read from the folder named by the environment variable GCALIB_DATA;
without it, from the user's cache, into which pooch downloads what is public. Every file is checked against its
sha256 before it is parsed.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pooch
import requests

from gcalib.data.errors import NoDataError
from gcalib.data.files import fault, read_bytes, read_text, unpack
from gcalib.data.pair import DataError, Pair
from gcalib.data.paths import read_path
from gcalib.data.prepare import Options, finish, match
from gcalib.data.readers import read_prepared, read_single
from gcalib.data.registry import PAIRS, Open, Published, Source
from gcalib.data.synthetic import parse_name, synthetic_pair


def load_pair(
    name_or_path: str | Path,
    *,
    ties: str = "shuffle",
    tie_seed: int = 0,
    max_length: int = 50,
    k_core: int = 1,
    min_per_domain: int | None = None,
    columns: str | None = None,
) -> Pair:
    """Load a pair of domains.

    Parameters
    ----------
    name_or_path
        "synthetic", with options if wanted ("synthetic:novelty=1.0,seed=3", see `synthetic_pair`); a published pair:
        "food-kitchen", "beauty-electronics", "cloth-sport", "electronic-phone" (both per-domain, without a common
        clock), "electronic-phone-ts", "sport-phone", "sport-phone-open" (with users of one domain); a folder of one's
        own data; or two files, "a.csv + b.csv".
        The forms that files may have are described in `gcalib.data.paths`.
    ties
        Order of a user's events at equal times: "shuffle" at random, or "published", the order of the file
        (in which, within a day, domain A precedes B and ids ascend: an artefact that a model can learn).
    tie_seed
        Seed of the shuffled ties.
    max_length
        Events kept a user, the newest ones (without a common clock: a user and domain); 4 or more.
    k_core
        Events that every item, and every user in each domain, must have; 1 keeps all.
    min_per_domain
        Events that every user must have in each domain in the end; by default 3, as in the published cuts, for raw
        files and for pairs without a common clock, else 1. With 0 users active in one domain only are let in, where
        the source has them.
    columns
        Order of the columns of ratings csv files without a header, such as "item,user,rating,timestamp", where it
        cannot be told from the data.

    Returns
    -------
    Pair
        What was dropped is counted in `Pair.counts`; `gcalib.data.prepare` explains the steps.

    Raises
    ------
    DataError
        For a missing, damaged or wrong file, or a line that cannot be used: one sentence with file and line.
    ValueError
        For an unknown name (the message lists the known ones) or an option out of range.
    """
    options = Options(ties, tie_seed, max_length, k_core, min_per_domain)
    name = str(name_or_path)
    if columns is not None and (name in PAIRS or name.partition(":")[0] == "synthetic"):
        raise ValueError(f"columns={columns!r} is for ratings csv files; {name} has none.")
    if name.partition(":")[0] == "synthetic":
        return synthetic_pair(**parse_name(name), options=options)
    if name in PAIRS:
        return load_published(name, options)
    pair = read_path(name_or_path, options, columns, known=("synthetic", *PAIRS))
    # by a published name, one's own data would be given the published texts
    return replace(pair, name=f"{pair.name} (own data)") if pair.name in PAIRS else pair


def load_published(name: str, options: Options | None = None, download: bool = True) -> Pair:
    """Load a pair of the registry, every file verified against its sha256."""
    published, options = PAIRS[name], options or Options()
    (path, data), (other_path, other_data) = (locate(name, source, download) for source in published.files)
    if isinstance(published, Open):
        a, b = read_single(path, read_text(path, data)), read_single(other_path, read_text(other_path, other_data))
        events, sizes, has_clock = match(a, b, options.k_core, published.one_domain_users)
        if options.min_per_domain is None:
            options = replace(options, min_per_domain=0)
    else:
        events, sizes, has_clock = read_prepared(path, other_path, data, other_data)
    return finish(
        events, name=name, domains=published.domains, num_items=sizes, has_clock=has_clock, options=options,
        raw=isinstance(published, Open),
    )  # fmt: skip


def at_hand(name: str) -> bool:
    """Whether a pair can be loaded without a download: its files are there, or it needs none."""
    if name not in PAIRS:
        return True
    folder = os.environ.get("GCALIB_DATA")
    paths = (Path(folder) / one.path if folder else cache() / one.plain_path for one in PAIRS[name].files)
    return all(path.is_file() for path in paths)


def locate(name: str, source: Source, download: bool = True) -> tuple[Path, bytes]:
    """Find a published file and read its verified bytes.

    Raises
    ------
    DataError
        If the file is missing and cannot be downloaded, or is not the published one.
    """
    folder = os.environ.get("GCALIB_DATA")
    if folder:
        wanted = f"{source.path} (sha256 {source.sha256}) was expected in it for the pair {name}"
        path = Path(folder) / source.path
        if not path.is_file():
            raise NoDataError(f"GCALIB_DATA={folder} has no file {path}: {wanted}.")
        data = read_bytes(path)
        _verify(path, data, source)
        return path, data
    path = cache() / source.plain_path
    if source.url is None:
        needed = dict.fromkeys((*PAIRS[name].files, source))
        files = (f"{file.path} (sha256 {file.sha256})" for file in needed)
        what = name if source in PAIRS[name].files else f"The item text of {name}"
        raise NoDataError(
            f"{what} has no public download: put {' and '.join(files)} into a folder and set the environment variable "
            "GCALIB_DATA to that folder."
        )
    if download:
        _download(source, path)
    elif not path.is_file():
        raise NoDataError(f"{path} is missing; load_pair({name!r}) downloads it.")
    data = read_bytes(path)
    _verify(path, data, source)
    return path, data


def cache() -> Path:
    """The folder that downloads are kept in."""
    return Path(pooch.os_cache("gcalib"))


def _download(source: Source, path: Path) -> None:
    """Have the public original in the cache; pooch writes to a temporary file and renames it once its hash is right."""
    try:
        pooch.retrieve(
            source.url,
            known_hash=f"sha256:{source.content_sha256}",
            path=path.parent,
            fname=path.name,
            downloader=pooch.HTTPDownloader(timeout=30, progressbar=False),
        )
    except (OSError, ValueError) as error:  # what requests raises is an OSError; a wrong hash is a ValueError
        unreachable = isinstance(error, requests.ConnectionError | requests.Timeout)
        reason = "the server cannot be reached" if unreachable else " ".join(str(error).split()).rstrip(".")
        raise NoDataError(
            f"{source.url} could not be downloaded ({reason}); set the environment variable GCALIB_DATA to a folder "
            f"that holds {source.path} (sha256 {source.sha256}) to do without."
        ) from None


def _verify(path: Path, data: bytes, source: Source) -> None:
    """Refuse bytes that are neither the published file nor the same content packed anew."""
    found = hashlib.sha256(data).hexdigest()
    if found in (source.sha256, source.content_sha256):
        return
    remark = ""
    if path.suffix == ".gz":
        try:
            if hashlib.sha256(unpack(path, data)).hexdigest() == source.content_sha256:
                return
        except DataError:
            remark = " and is not a complete gzip file"
    raise fault(path, None, f"has sha256 {found}{remark}; expected {source.sha256}: copy or download it again.")


def statistics(pair: Pair) -> dict[str, Any]:
    """Figures that describe a pair.

    Returns
    -------
    dict
        users; items, events and mean events a user for each domain (`_a`, `_b`); `tie_share`, the share of
        neighbouring events of a user (without a clock: and domain) with known times that fall on the same time;
        `last_tied_share`, the share of users whose last event is tied with the one before (NaN without a clock);
        `unseen_share`, the share of test targets that occur in no training history; `users_in_both`, those active in
        both domains;
        `items_once`, items that occur once; `clock`.
    """
    owner = np.repeat(np.arange(pair.num_users), pair.lengths)
    stream = owner if pair.has_clock else owner * 2 + pair.domain_of(pair.items)
    neighbours = (np.diff(stream) == 0) & (pair.times[1:] >= 0) & (pair.times[:-1] >= 0)
    tied = neighbours & (np.diff(pair.times) == 0)
    last = tied[pair.offsets[1:] - 2]
    return {
        "users": pair.num_users,
        "items_a": pair.num_items[0],
        "items_b": pair.num_items[1],
        "events_a": pair.num_interactions[0],
        "events_b": pair.num_interactions[1],
        "mean_a": pair.num_interactions[0] / pair.num_users,
        "mean_b": pair.num_interactions[1] / pair.num_users,
        "tie_share": float(tied.sum() / neighbours.sum()) if neighbours.any() else float("nan"),
        "last_tied_share": float(last.mean()) if pair.has_clock else float("nan"),
        "unseen_share": float(pair.unseen_targets("test").mean()),
        "users_in_both": int(pair.in_both.sum()),
        "items_once": int(np.count_nonzero(np.bincount(pair.items) == 1)),
        "clock": pair.has_clock,
    }


def report(download: bool = False) -> pd.DataFrame:
    """State of every known pair: where it was found, whether it is the published one, and what is in it.

    Parameters
    ----------
    download
        Whether to download what is public and missing.

    Returns
    -------
    pandas.DataFrame
        One row a pair: `name`; `found` ("built in", "GCALIB_DATA", "cache" or "missing"); `verified` (all hashes
        right; None where files are missing); the columns of `statistics`, empty where the pair cannot be read;
        `counts`, what reading dropped or changed, as text; `problem`, the sentence that says why a pair cannot be read.
    """
    rows = []
    for name in ("synthetic", *PAIRS):
        row: dict[str, Any] = {"name": name, "found": "built in", "verified": True, "problem": ""}
        try:
            pair = load_pair(name) if name == "synthetic" else load_published(name, download=download)
            row |= statistics(pair)
            row["counts"] = ", ".join(f"{key} {number}" for key, number in pair.counts.items())
        except DataError as error:
            row |= {"verified": None if isinstance(error, NoDataError) else False, "problem": str(error)}
        if name in PAIRS:
            row["found"] = _where(PAIRS[name])
        rows.append(row)
    return pd.DataFrame(rows)


def _where(published: Published | Open) -> str:
    folder, sources = os.environ.get("GCALIB_DATA"), published.files
    if folder:
        return "GCALIB_DATA" if all((Path(folder) / source.path).is_file() for source in sources) else "missing"
    return "cache" if all((cache() / source.plain_path).is_file() for source in sources) else "missing"
