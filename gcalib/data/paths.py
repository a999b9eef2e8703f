"""Reading a pair from a path: which files are there, and which of the known forms they have.

A path is a folder that holds one of these, each file plain or gzipped (name ending in .gz):

-   a prepared pair: one text file `user item|timestamp item|timestamp ...`, and a file with `map_item` in its name,
    JSON `{"item": [id, domain], ...}` with ids 1..nA in domain 0 and nA + 1..nA + nB in domain 1. Further json files
    and `map_user` files are passed over. Times are unix seconds; a per-domain file, all of domain A and then all of
    domain B in every line, may hold -1 where unknown.
-   two files of one domain each, A and B in the order of their names, of the form `reviewer_id ASIN|timestamp ...`,
    or a ratings csv (`gcalib.data.ratings`). Users active in both are kept, with `min_per_domain=0` all.

A file `titles.json` (or `titles.json.gz`) may stand beside them, `{"item": "title", ...}`: what the items say, for
models that read it (`gcalib.data.text`).

Or it is the names of two such single-domain files, A then B: `"sports.txt.gz + phones.csv"`.
"""

from __future__ import annotations

from pathlib import Path

from gcalib.data.files import fault, read_text, read_titles
from gcalib.data.pair import DataError, Pair, Titles
from gcalib.data.prepare import Events, Options, finish, match
from gcalib.data.ratings import read_ratings
from gcalib.data.readers import read_prepared, read_single

SUFFIXES = (".txt", ".csv", ".txt.gz", ".csv.gz")


def read_path(path: str | Path, options: Options, columns: str | None = None, known: tuple[str, ...] = ()) -> Pair:
    """Load a pair from a folder, or from two files joined by a plus sign.

    Raises
    ------
    ValueError
        (as `DataError`) If there is nothing at the path (`known` names are listed), or it holds no pair.
    """
    text = str(path)
    if not Path(path).exists() and "+" in text:
        files = [Path(part.strip()) for part in text.split("+")]
        if len(files) != 2:
            raise DataError(f"{text}: {len(files)} files are joined by +; a pair needs two, domain A + domain B.")
        return _read_two(files[0], files[1], f"{stem(files[0])}-{stem(files[1])}", options, columns)
    folder = Path(path)
    if not folder.exists():
        raise DataError(f"There is no pair {text!r}: known are {', '.join(known)}; nor is there a folder of that name.")
    if not folder.is_dir():
        raise DataError(f"{folder} is a file; give the folder that holds the pair, or two files as 'a.csv + b.csv'.")
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    maps = [file for file in files if "map_item" in file.name]
    events = [file for file in files if file.name.endswith(SUFFIXES) and "map_" not in file.name]
    name = folder.resolve().name
    if len(maps) == 1 and len(events) == 1:
        if columns is not None:
            raise ValueError(f"columns={columns!r} is for ratings csv files; {folder} holds a prepared pair.")
        parts = name.split("-")
        domains = (parts[0], parts[1]) if len(parts) == 2 and all(parts) else ("a", "b")
        table, sizes, has_clock = read_prepared(events[0], maps[0])
        return finish(
            table, name=name, domains=domains, num_items=sizes, has_clock=has_clock, options=options, raw=False,
            titles=_titles(folder),
        )  # fmt: skip
    if not maps and len(events) == 2:
        return _read_two(events[0], events[1], name, options, columns)
    found = ", ".join(file.name for file in files) or "nothing"
    raise DataError(
        f"{folder} holds {found}; a pair is one text file with one map_item file, or two single-domain files "
        "(name them as 'a.txt + b.txt' if the folder has more)."
    )


def stem(path: Path) -> str:
    """Name of a domain: the file's name without its endings.

    >>> stem(Path("single-domain/sports_5core.txt.gz"))
    'sports_5core'
    """
    return path.name.removesuffix(".gz").rsplit(".", 1)[0]


def _read_two(a: Path, b: Path, name: str, options: Options, columns: str | None) -> Pair:
    parts = _read_one(a, columns), _read_one(b, columns)
    events, sizes, has_clock = match(*parts, options.k_core, None if options.min_per_domain == 0 else 0)
    return finish(
        events, name=name, domains=(stem(a), stem(b)), num_items=sizes, has_clock=has_clock, options=options, raw=True,
        titles=_titles(a.parent),
    )  # fmt: skip


def _titles(folder: Path) -> Titles | None:
    """What the items say, if a file of the folder tells."""
    found = [path for name in ("titles.json", "titles.json.gz") if (path := folder / name).is_file()]
    if len(found) == 2:
        raise DataError(f"{folder} holds both titles.json and titles.json.gz; one file of titles was expected.")
    return Titles(read_titles(found[0]), from_file=True) if found else None


def _read_one(path: Path, columns: str | None) -> Events:
    """Tell the two single-domain forms apart by the first line."""
    text = read_text(path)
    first = text[: text.find(b"\n")]
    if b"|" in first:
        return read_single(path, text)
    if b"," in first:
        return read_ratings(path, text, columns)
    what = "the line is neither `reviewer_id ASIN|timestamp ...` nor a comma-separated rating."
    raise fault(path, 1, what)
