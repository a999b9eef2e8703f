"""Where pairs come from: `load_pair`, the files of published pairs, and what a path holds.

Published pairs (`pairs.yaml`) are read from the folder named by the environment variable GCALIB_DATA; without it,
from the user's cache, into which pooch downloads what is public. Every file is checked against its hash before it is
parsed.

What the path of one's own data may hold is said in docs/own_data.md. Other files in such a folder are passed over.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pooch
import requests
import yaml
from pydantic import TypeAdapter

from gcalib.data.formats import fault, read_bytes, read_events, read_prepared, read_titles
from gcalib.data.pair import DataError, NoDataError, Pair, Titles
from gcalib.data.prepare import Options, finish, match
from gcalib.data.synthetic import parse_name, synthetic_pair

SUFFIXES = (".txt", ".csv", ".txt.gz", ".csv.gz")


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
    name_or_path: str | Path,
    *,
    ties: str = "shuffle",
    max_length: int = 50,
    min_per_domain: int | None = None,
    columns: str | None = None,
    download: bool = True,
) -> Pair:
    """Load a pair of domains.

    Parameters
    ----------
    name_or_path
        "synthetic", with options if wanted ("synthetic:novelty=1.0,seed=3", see `synthetic_pair`); a published pair,
        such as "food-kitchen" (`python -m gcalib pairs` lists them); or a path to one's own data, a folder or two
        files, "a.csv + b.csv" (`gcalib.data.sources`).
    ties
        Order of a user's events at equal times: "shuffle" at random, or "published", the order of the file (where A
        precedes B within a day, and ids ascend: an artefact that a model can learn).
    max_length
        Events kept a user, the newest ones (per-domain order: a user and domain); 4 or more.
    min_per_domain
        Events that every user must have in each domain in the end; by default 3, as in the published cuts, for
        single-domain files and per-domain order, else 1. With 0 users active in one domain only are let in.
    columns
        Order of the columns of ratings without a header, such as "item,user,rating,timestamp".
    download
        Whether a public file that is missing may be fetched.

    What was dropped is counted in `Pair.counts`; `gcalib.data.prepare` explains the steps.

    Raises
    ------
    DataError
        For an unknown name, a missing, damaged or wrong file, or a line that cannot be used, which it names.
    ValueError
        For an option out of range.
    """
    options, name = Options(ties, max_length, min_per_domain), str(name_or_path)
    built_in = name.partition(":")[0] == "synthetic"
    if columns is not None and (built_in or name in PAIRS):
        raise ValueError(f"columns={columns!r} is for ratings files; {name} has none.")
    if built_in:
        return synthetic_pair(**parse_name(name), name=name, options=options)
    if name not in PAIRS:
        return _read_path(name_or_path, options, columns)
    domains, extra = PAIRS[name].domains, PAIRS[name].one_domain_users
    first, second = (locate(source, name, download) for source in PAIRS[name].files)
    if extra is None:
        return finish(read_prepared(first, second), name, domains, options)
    options = replace(options, min_per_domain=min_per_domain or 0)
    return finish(match(read_events(first), read_events(second), extra), name, domains, options)


def _read_path(path: str | Path, options: Options, columns: str | None) -> Pair:
    """A pair from a folder, or from two files joined by a plus sign."""
    text, folder = str(path), Path(path)
    item_maps: list[Path] = []
    if folder.is_dir():
        files, name = sorted(file for file in folder.glob("[!.]*") if file.is_file()), folder.resolve().name
        item_maps = [file for file in files if "map_item" in file.name]
        events = [file for file in files if file.name.endswith(SUFFIXES) and "map_" not in file.name]
        if (len(item_maps), len(events)) not in ((1, 1), (0, 2)):
            found = ", ".join(file.name for file in files) or "nothing"
            wanted = "one text file with one map_item file, or two single-domain files (or name them: 'a.txt + b.txt')"
            raise DataError(f"{folder} holds {found}; a pair is {wanted}.")
    elif text.count("+") == 1:
        events = [Path(part.strip()) for part in text.split("+")]
        folder, name = events[0].parent, "-".join(_stem(file) for file in events)
    else:
        known = ", ".join(("synthetic", *PAIRS))
        raise DataError(f"{text!r} is neither a pair ({known}) nor a folder, nor are they two files, 'a.csv + b.csv'.")
    if item_maps:
        if columns is not None:
            raise ValueError(f"columns={columns!r} is for ratings; {folder} holds a prepared pair.")
        first, _, second = name.partition("-")
        domains = (first, second) if first and second and "-" not in second else ("a", "b")
        read = read_prepared(events[0], item_maps[0])
    else:
        domains = _stem(events[0]), _stem(events[1])
        a, b = (read_events(file, columns) for file in events)
        read = match(a, b, None if options.min_per_domain == 0 else 0)
    files = [file for end in ("json", "json.gz") if (file := folder / f"titles.{end}").is_file()]
    if len(files) == 2:
        raise DataError(f"{folder} holds both titles.json and titles.json.gz; one file of titles was expected.")
    titles = Titles(read_titles(files[0]), from_file=True) if files else None
    # by a published name, one's own data would be given the published texts
    return finish(read, f"{name} (own data)" if name in PAIRS else name, domains, options, titles)


def _stem(path: Path) -> str:
    """Name of a domain: "sports_5core" of `sports_5core.txt.gz`."""
    return path.name.removesuffix(".gz").rsplit(".", 1)[0]


def cache() -> Path:
    """The folder that downloads, and vectors of texts, are kept in."""
    return Path(pooch.os_cache("gcalib"))


def locate(source: Source, pair: str, download: bool = True, verify: bool = True) -> Path:
    """The path of a published file, its hash checked; `NoDataError` if it is missing and cannot be downloaded."""
    data = os.environ.get("GCALIB_DATA")
    path = Path(data) / source.path if data else cache() / source.path.removesuffix(".gz")
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
