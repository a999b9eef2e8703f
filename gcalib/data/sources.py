"""Where pairs come from: `load_pair`, the files of published pairs, and what a path holds.

Published pairs (`pairs.yaml`) are read from the folder named by the environment variable GCALIB_DATA; without it,
from the user's cache, into which pooch downloads what is public. Every file is checked against its hash before it is
parsed.

One's own data is read in `gcalib.data.files`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pooch
import requests
import yaml
from pydantic import TypeAdapter

from gcalib.data.files import files_of, pair_from_files
from gcalib.data.formats import fault, read_bytes, read_prepared, read_sequences
from gcalib.data.frames import Columns
from gcalib.data.pair import DataError, NoDataError, Pair
from gcalib.data.prepare import STEPS, Options, finish, match
from gcalib.data.synthetic import parse_name, synthetic_pair


@dataclass(frozen=True)
class Source:
    """One published file."""

    path: str  # below GCALIB_DATA
    sha256: str  # of the unpacked content, which `url` delivers
    url: str | None = None
    kind: str = ""  # of an item text


@dataclass(frozen=True)
class Published:
    """A pair with a name, as `pairs.yaml` explains."""

    domains: tuple[str, str]
    figures: dict[str, int | bool]
    files: tuple[Source, Source]
    texts: tuple[tuple[Source, ...], tuple[Source, ...]]
    one_domain_users: int | None = None


_TEXT = Path(__file__).with_name("pairs.yaml").read_bytes()
PAIRS = TypeAdapter(dict[str, Published]).validate_python(yaml.safe_load(_TEXT))


def load_pair(
    name_or_path: str | Path | Sequence[str | Path],
    *,
    ties: str = "shuffle",
    max_length: int = 50,
    min_per_domain: int | None = None,
    min_events_per_item: int = 1,
    columns: Columns | None = None,
    shared_ids: str | None = None,
    download: bool = True,
) -> Pair:
    """Load a pair of domains.

    Parameters
    ----------
    name_or_path
        "synthetic", with options if wanted ("synthetic:novelty=1.0,seed=3", see `synthetic_pair`); a published pair,
        such as "food-kitchen" (`python -m gcalib pairs` lists them); or the path of one's own data: a folder, two
        files, or "a.csv + b.csv" (docs/own_data.md).
    ties
        Order of a user's events at equal times: "shuffle" at random, or "published", the order of the file (where A
        precedes B within a day, and ids ascend: an artefact that a model can learn).
    max_length
        Events kept a user, the newest ones (per-domain order: a user and domain); 4 or more.
    min_per_domain
        Events that every user must have in each domain in the end; by default 3, as in the published cuts, for
        single-domain files and per-domain order, else 1. With 0 users active in one domain only are let in.
    min_events_per_item
        Events that every item must have in the end.
    columns
        Columns of tables of one's own: `{"user": "reviewerID", "item": "asin", "timestamp": "unixReviewTime"}`, and
        "title" if there is one; in a file without a header their numbers, from 0. Usual names are known.
    shared_ids
        Whether an item id that both domains have is one item, which is left out ("drop"), or two ("distinct"). It must
        be said where all ids are numbers; otherwise such items are left out.
    download
        Whether a public file that is missing may be fetched.

    What was dropped is counted in `Pair.counts`, as `gcalib.data.prepare.STEPS` explains.

    Raises
    ------
    DataError
        For an unknown name, a missing, damaged or wrong file, or a line that cannot be used, which it names.
    ValueError
        For an option out of range.
    """
    options, name = Options(ties, max_length, min_per_domain, min_events_per_item, shared_ids), str(name_or_path)
    built_in = name.partition(":")[0] == "synthetic"
    if (columns or shared_ids) and (built_in or name in PAIRS):
        raise ValueError(f"columns and shared_ids are for tables of one's own; {name} needs neither.")
    if built_in:
        return synthetic_pair(**parse_name(name), name=name, options=options)
    if name not in PAIRS:
        return pair_from_files(name_or_path, options, columns, known=("synthetic", *PAIRS))
    domains, extra = PAIRS[name].domains, PAIRS[name].one_domain_users
    first, second = (locate(source, name, download) for source in PAIRS[name].files)
    if extra is None:
        return finish(read_prepared(first, second), name, domains, options)
    options = replace(options, min_per_domain=min_per_domain or 0)
    return finish(match(read_sequences(first), read_sequences(second), extra), name, domains, options)


def stamp(name_or_path: str | Path) -> tuple[tuple[str, int, int], ...]:
    """Files of a pair, each with its size and the time of its last change: what is read again once this differs."""
    name = str(name_or_path)
    if name.partition(":")[0] == "synthetic":
        return ()
    paths = map(place, PAIRS[name].files) if name in PAIRS else files_of(name_or_path, ("synthetic", *PAIRS))
    found = [path.resolve() for path in paths if path.is_file()]
    return tuple((str(path), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in found)


def cache() -> Path:
    """The folder that downloads, and vectors of texts, are kept in."""
    return Path(pooch.os_cache("gcalib"))


def place(source: Source) -> Path:
    """Where a published file is looked for."""
    data = os.environ.get("GCALIB_DATA")
    return Path(data) / source.path if data else cache() / source.path.removesuffix(".gz")


def locate(source: Source, pair: str, download: bool = True, verify: bool = True) -> Path:
    """The path of a published file, its hash checked; `NoDataError` if it is missing and cannot be downloaded."""
    data, path = os.environ.get("GCALIB_DATA"), place(source)
    if not data and source.url and download:
        _download(source, path)
    if not path.is_file():
        files = dict.fromkeys((*PAIRS[pair].files, source))
        advice = f"load_pair({pair!r}) downloads it"
        if data or not source.url:
            named = " and ".join(f"{file.path} (sha256 of its content {file.sha256})" for file in files)
            advice = f"set the environment variable GCALIB_DATA to a folder that holds {named}"
        raise NoDataError(f"{path}, a file of {pair}, is missing; {advice}.")
    if verify and (found := hashlib.sha256(read_bytes(path)).hexdigest()) != source.sha256:
        what = f"is not the published file: its content has sha256 {found}, expected {source.sha256}"
        raise fault(path, None, f"{what}; copy or download it again.")
    return path


def _download(source: Source, path: Path) -> None:
    """Have the public original in the cache; pooch writes to a temporary file and renames it once its hash is right."""
    downloader = pooch.HTTPDownloader(timeout=30, progressbar=False)
    try:
        pooch.retrieve(source.url, f"sha256:{source.sha256}", path.name, path.parent, downloader=downloader)
    except (OSError, ValueError) as error:  # what requests raises is an OSError; a wrong hash is a ValueError
        unreachable = isinstance(error, requests.ConnectionError | requests.Timeout)
        reason = "the server cannot be reached" if unreachable else " ".join(str(error).split()).rstrip(".")
        advice = f"set the environment variable GCALIB_DATA to a folder that holds {source.path} to do without"
        raise NoDataError(f"{source.url} could not be downloaded ({reason}); {advice}.") from None


def report(*, download: bool = False, verify: bool = False) -> pd.DataFrame:
    """State of every known pair: where it was found, whether it is the published one, and how large it is.

    Returns
    -------
    pandas.DataFrame
        One row a pair: `name`; `found` ("built in", "GCALIB_DATA", "cache" or "missing"); `verified`, whether all
        hashes are right (None without `verify`, or if files are missing); the columns of `statistics`; `problem`, why
        it cannot be read.
    """
    built_in = {"name": "synthetic", "found": "built in", "verified": None, **statistics(load_pair("synthetic"))}
    rows = [{**built_in, "problem": ""}]
    for name, published in PAIRS.items():
        found, problem = "GCALIB_DATA" if os.environ.get("GCALIB_DATA") else "cache", ""
        verified: bool | None = verify or None
        try:
            for source in published.files:
                locate(source, name, download, verify)
        except NoDataError as error:
            found, verified, problem = "missing", None, str(error)
        except DataError as error:
            verified, problem = False, str(error)
        rows.append({"name": name, "found": found, "verified": verified, **published.figures, "problem": problem})
    return pd.DataFrame(rows)


def statistics(pair: Pair) -> dict[str, int]:
    """Size of a pair: `users`, and `items` and `events` of each domain (`_a`, `_b`); and `has_global_order`."""
    names = ("users", "items_a", "items_b", "events_a", "events_b", "has_global_order")
    numbers = (pair.num_users, *pair.num_items, *pair.num_interactions, pair.has_global_order)
    return dict(zip(names, numbers, strict=True))


def summary(pair: Pair) -> str:
    """Size of a pair, and what was dropped on the way to it and why, in lines."""
    users, order = f"{pair.num_users:,} users", "in time order" if pair.has_global_order else "in order in each domain"
    sizes = zip(pair.domains, pair.num_items, pair.num_interactions, strict=True)
    domains = "; ".join(f"{name}: {items:,} items, {events:,} events" for name, items, events in sizes)
    lines = [f"{number:9,} {key}: {STEPS[key]}" for key, number in pair.counts.items() if number]
    return "\n".join([f"{pair.name}: {users}, {order}; {domains}", *lines])
