"""Train what profiles lack on one GPU that is there for minutes, on a machine without network and with few packages.

    benchmarks/gpu_batch.sh --pack PROFILE...        before the loan: what must travel beside the tree, in build/gpu
    benchmarks/gpu_batch.sh PROFILE... --out DIR     there: trains for so many minutes, writes what is to come back
    benchmarks/gpu_batch.sh --unpack DIR             after it: takes DIR into the store

The machine has Python, PyTorch, NumPy, SciPy, pyarrow and pandas 2 or 3. What it lacks travels as wheels, with the
files of the pairs, the vectors of the texts (so that it needs no sentence encoder) and the checkpoints of earlier
batches. The limits, in bytes, stand below. Store and checkpoints stay in `--work`, where a second batch on the same
machine goes on.
"""

from __future__ import annotations

import argparse
import gzip
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gcalib.config import RunConfig

STARTED = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
PACK = ROOT / "build" / "gpu"
MISSING = "pydantic pydantic_core annotated-types typing-inspection pooch platformdirs"  # in an image made for PyTorch
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
TRAVELS = 66_000_000  # the tree and the pack together
RETURNS = 60_000_000  # what comes back
PART = 15_000_000  # each file of it
RESERVE = 20  # seconds of the minutes, for writing what comes back
MB = 1_000_000


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profiles", nargs="*", metavar="PROFILE", help="profiles of params/, whose grids are trained")
    parser.add_argument("--pack", action="store_true", help="make build/gpu instead")
    parser.add_argument("--unpack", type=Path, metavar="DIR", help="take a folder that came back into the store")
    only = "only such runs, as pair=food-kitchen,cloth-sport-ts; may be given several times"
    parser.add_argument("--only", action="append", default=[], metavar="FIELD=VALUES", help=only)
    parser.add_argument("--store", type=Path, default=ROOT / "results", help="default results")
    parser.add_argument("--device", default="cuda", help="cuda (default) or cpu")
    parser.add_argument("--minutes", type=float, default=9, help="of this command, all told (default 9)")
    parser.add_argument("--workers", type=int, help="processes; default 8 on a GPU, one a core on a CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_out", help="default build/gpu_out")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu_work", help="default build/gpu_work")
    parser.add_argument("--python", default="3.12", help="--pack: the Python there (default 3.12)")
    parser.add_argument("--wheels", default=MISSING, help=f"--pack: packages that it lacks (default {MISSING})")
    asked = parser.parse_args()
    if bool(asked.profiles) == bool(asked.unpack):
        parser.error("name profiles, or a folder to --unpack")
    sys.path.insert(0, str(ROOT))
    if asked.unpack:
        unpack(asked.unpack, asked.store)
    elif asked.pack:
        pack(asked)
    else:
        batch(asked)


def chosen(asked: argparse.Namespace) -> list[RunConfig]:
    """The runs of the profiles in order, but that the seeds of a cell are neighbours: they take the same time."""
    from gcalib.config import Profile

    only = [(field, values.split(",")) for field, _, values in (text.partition("=") for text in asked.only)]
    grids = (Profile.load(name).grid_configs() for name in asked.profiles)
    configs = [c for grid in grids for c in grid if all(str(getattr(c, field)) in values for field, values in only)]
    cells: dict[RunConfig, int] = {}
    return sorted(dict.fromkeys(configs), key=lambda config: cells.setdefault(config.replace(seed=0), len(cells)))


# --- before the loan ---


def pack(asked: argparse.Namespace) -> None:
    """Make the folder that travels beside the tree, and say how large it is."""
    from importlib import metadata

    from gcalib.config import READ_BY, run_id
    from gcalib.data.formats import read_bytes
    from gcalib.data.sources import PAIRS, locate
    from gcalib.experiments import pair_of
    from gcalib.store import RESULTS_VERSION, RunStore

    store = RunStore(asked.store)
    names = {run_id(config, pair_of(config).sha256, RESULTS_VERSION): config for config in chosen(asked)}
    left = {name: names[name] for name in names.keys() - set(store.names())}
    if not left:
        sys.exit("Nothing is left to train.")
    shutil.rmtree(PACK, ignore_errors=True)
    wheels = f"wheels-{asked.python}"
    _download(PACK / wheels, asked.python, asked.wheels.split())
    _name_package("gcalib", metadata.version("gcalib"))

    of_text = [config for config in left.values() if config.model in READ_BY["text"]]
    for pair in {config.pair for config in left.values()} & PAIRS.keys():
        has_text = any(config.pair == pair for config in of_text)
        for source in (*PAIRS[pair].files, *(file for files in PAIRS[pair].texts for file in files if has_text)):
            target = PACK / "data" / source.path
            target.parent.mkdir(parents=True, exist_ok=True)
            content = read_bytes(locate(source, pair))
            target.write_bytes(gzip.compress(content, mtime=0) if target.suffix == ".gz" else content)
    _pack_vectors(of_text)

    sizes = {part: _size((PACK / part).rglob("*")) for part in (wheels, "data", "text")}
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    tree = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    sizes["the tree"] = _size(ROOT / path for path in tree.split("\0"))
    room = TRAVELS - sum(sizes.values())
    for path, _ in _worth_most(store.path("checkpoints", name) for name in left):
        if path.stat().st_size > room:
            print(f"{path.name} ({path.stat().st_size / MB:.1f} MB) does not fit: its run starts anew there")
            continue
        (PACK / "checkpoints").mkdir(exist_ok=True)
        shutil.copy2(path, PACK / "checkpoints")
        room -= path.stat().st_size
    sizes["checkpoints"] = _size(PACK.glob("checkpoints/*"))
    listed = ", ".join(f"{part} {size / MB:.1f} MB" for part, size in sizes.items())
    print(f"{len(left)} of {len(names)} runs are left; {listed}")
    if room < 0:
        large = sorted(((file.stat().st_size, file) for file in PACK.rglob("*") if file.is_file()), reverse=True)[:6]
        named = ", ".join(f"{file.relative_to(PACK)} {size / MB:.1f} MB" for size, file in large)
        sys.exit(f"{-room / MB:.1f} MB more than the {TRAVELS / MB:.0f} that travel: use --only. Large are {named}.")
    print(
        f"{(TRAVELS - room) / MB:.1f} MB of {TRAVELS / MB:.0f} in all; {PACK.relative_to(ROOT)} travels beside the tree"
    )


def _download(folder: Path, python: str, packages: list[str]) -> None:
    """Wheels for another Python, in the versions of constraints.txt."""
    kind = ["--no-deps", "--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    command = [sys.executable, "-m", "pip", "-q", "download", *kind, *(f"--platform={name}" for name in PLATFORMS)]
    subprocess.run([*command, "-c", ROOT / "constraints.txt", "-d", folder, *packages], check=True)


def _name_package(name: str, version: str) -> None:
    """Have `importlib.metadata.version(name)` answer there, for a package that is not installed there."""
    folder = PACK / "site" / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def _pack_vectors(configs: list[RunConfig]) -> None:
    """The files of the cache that the vectors of these configs' texts are read from, which they are named after.

    Four fifths of a vector's bytes are noise that nothing compresses; put together by place, the rest shrinks.
    """
    import numpy as np

    from gcalib.data.text import MINILM, text_vectors
    from gcalib.experiments import pair_of

    opened: set[str] = set()
    sys.addaudithook(lambda event, values: opened.add(str(values[0])) if event == "open" else None)
    for config in {(config.pair, config.text): config for config in configs}.values():
        text_vectors(pair_of(config), config.text)
    for path in (Path(name) for name in sorted(opened) if name.endswith(".npz")):
        (PACK / "text").mkdir(exist_ok=True)
        rows = np.load(path)["rows"]
        planes = np.ascontiguousarray(rows.view(np.uint8).reshape(-1, 4).T)  # first all lowest bytes, last all highest
        np.savez_compressed(PACK / "text" / path.name, planes=planes, width=rows.shape[1])
    if (PACK / "text").exists():
        from importlib import metadata

        _name_package(MINILM, metadata.version(MINILM))


def _size(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths if path.is_file())


def _worth_most(paths: Iterable[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Checkpoints that exist, each with its progress: those first that hold the most seconds of training a byte."""
    import torch

    found = [
        (path, torch.load(path, map_location="cpu", weights_only=True, mmap=True)["progress"])
        for path in paths
        if path.exists()
    ]
    return sorted(found, key=lambda one: one[1]["seconds"] / one[0].stat().st_size, reverse=True)


# --- there ---


def batch(asked: argparse.Namespace) -> None:
    """Train until the minutes are nearly over, then write what is to come back."""
    workers = asked.workers or (8 if asked.device.startswith("cuda") else os.cpu_count() or 1)
    if asked.device.startswith("cuda"):
        os.environ["OMP_NUM_THREADS"] = str(workers)  # which the workers share evenly: a thread each
        # cuDNN's attention, which torch prefers in bf16 on these cards, makes a plan for each new shape of a batch
        os.environ["TORCH_CUDNN_SDPA_DEPRIORITIZED"] = "1"
    prepare(asked.work)

    import torch

    from gcalib.experiments import GridError, plan, run_grid

    store, configs = asked.work / "store", chosen(asked)
    (store / "runs").mkdir(parents=True, exist_ok=True)
    (store / "checkpoints").mkdir(exist_ok=True)
    for path in (*asked.store.glob("*.parquet"), *asked.store.glob("runs/*.json"), *PACK.glob("checkpoints/*.pt")):
        target = store / (path.name if path.suffix == ".parquet" else f"{path.parent.name}/{path.name}")
        if path.suffix == ".parquet" or not target.exists():
            shutil.copy2(path, target)
    before = plan(configs, store)["left"]
    started, failed = time.monotonic(), False
    seconds = int(60 * asked.minutes - RESERVE - (started - STARTED))
    name = torch.cuda.get_device_name() if asked.device.startswith("cuda") else "CPU"
    print(f"{before} of {len(configs)} runs are left; {workers} processes on {name} for {seconds} s", flush=True)
    for number in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        signal.alarm(max(1, seconds))
        run_grid(configs, store, workers=workers, device=asked.device)
    except KeyboardInterrupt:
        pass
    except GridError as error:
        failed = True
        print(error)
    signal.alarm(0)
    minutes = (time.monotonic() - started) / 60
    left = plan(configs, store)["left"]
    done = f"{before - left} runs finished in {minutes:.1f} minutes, {(before - left) / minutes:.2f} a minute"
    print(f"{done}; {left} left")
    bring(store, asked.store, asked.out)
    sys.exit(failed)


def prepare(work: Path) -> None:
    """Unpack what travelled, and have this process and its workers find it."""
    site = work / "site"
    for wheel in PACK.glob(f"wheels-{sys.version_info.major}.{sys.version_info.minor}/*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    paths = [str(path) for path in (site, PACK / "site", ROOT)]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    if (PACK / "data").exists():
        os.environ["GCALIB_DATA"] = str(PACK / "data")
    if (PACK / "text").exists():
        os.environ["XDG_CACHE_HOME"] = str(work / "cache")
        import numpy as np

        from gcalib.data.sources import cache

        (cache() / "text").mkdir(parents=True, exist_ok=True)
        for path in PACK.glob("text/*.npz"):
            if not (target := cache() / "text" / path.name).exists():
                packed = np.load(path)
                rows = np.ascontiguousarray(packed["planes"].T).view(np.float32).reshape(-1, int(packed["width"]))
                np.savez(target, rows=rows)


def bring(store: Path, known: Path, out: Path) -> None:
    """Write the runs that a store has beyond the known ones, then checkpoints of unfinished ones as far as they fit."""
    from gcalib.store import RunStore

    out.mkdir(parents=True, exist_ok=True)
    new = sorted(set(RunStore(store).names()) - set(RunStore(known).names()))
    room = RETURNS
    if new:
        room -= _write_parts(out / "runs.tar.gz", {f"{name}.json": store / "runs" / f"{name}.json" for name in new})
    packed: dict[str, bytes] = {}
    left_behind = []
    for path, progress in _worth_most(sorted((store / "checkpoints").glob("*.pt"))):
        before = PACK / "checkpoints" / path.name
        if before.exists() and before.stat().st_mtime_ns == path.stat().st_mtime_ns:
            continue  # as it came
        content = gzip.compress(path.read_bytes(), 1) if path.stat().st_size < 1.2 * room else b""
        if content and len(content) + 2048 <= room:
            packed[f"{path.name}.gz"] = content
            room -= len(content) + 2048
        else:
            left_behind.append(f"{path.stem} ({path.stat().st_size / MB:.0f} MB, epoch {progress['epoch']})")
    if packed:
        _write_parts(out / "checkpoints.tar", packed)
    print(f"{out}: {len(new)} runs, {len(packed)} checkpoints, {_size(out.iterdir()) / MB:.1f} MB", end="")
    print(f"; too large to come back: {', '.join(left_behind)}" if left_behind else "")


def _write_parts(path: Path, files: dict[str, Any]) -> int:
    """Write paths or bytes to an archive in files of limited size, `path`.0, .1, ...; returns its size."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in files.items():
            content = content if isinstance(content, bytes) else content.read_bytes()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    for old in path.parent.glob(f"{path.name}.*"):
        old.unlink()
    whole = buffer.getvalue()
    for number, start in enumerate(range(0, len(whole), PART)):
        path.with_name(f"{path.name}.{number}").write_bytes(whole[start : start + PART])
    return len(whole)


# --- after it ---


def unpack(folder: Path, store: Path) -> None:
    """Take a folder that came back into a store: finished runs, and checkpoints that are further than those here."""
    from gcalib.store import RunStore, read_run

    runs, came, further = RunStore(store), 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        for path in _read_parts(folder, "runs.tar.gz", Path(temporary)):
            runs.put(*read_run(path))
            runs.path("checkpoints", path.stem).unlink(missing_ok=True)
            came += 1
        finished = set(runs.names())
        for packed in _read_parts(folder, "checkpoints.tar", Path(temporary)):
            new = packed.with_suffix("")
            new.write_bytes(gzip.decompress(packed.read_bytes()))
            here = runs.path("checkpoints", new.stem)
            epochs = {path: progress["epoch"] for path, progress in _worth_most([new, here])}
            if new.stem not in finished and epochs[new] > epochs.get(here, 0):
                here.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(new, here)
                further += 1
    print(f"{store}: {came} runs and {further} checkpoints came from {folder}")


def _read_parts(folder: Path, name: str, to: Path) -> list[Path]:
    """The files of an archive in parts."""
    parts = sorted(folder.glob(f"{name}.*"), key=lambda part: int(part.suffix[1:]))
    if not parts:
        return []
    with tarfile.open(fileobj=io.BytesIO(b"".join(part.read_bytes() for part in parts))) as archive:
        archive.extractall(to, filter="data")
        return [to / member.name for member in archive.getmembers()]


if __name__ == "__main__":
    main()
