"""Runs: `run` trains what the store does not hold and fetches what it does; `run_grid` does so for many at once."""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import json
import logging
import resource
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import safetensors.torch
import torch

from gcalib.attention import GatedCrossAttention
from gcalib.cluster import run_in_processes, run_on_ray
from gcalib.config import DATA, RunConfig, run_id
from gcalib.data.pair import DataError, NoDataError, Pair
from gcalib.data.sources import load_pair, stamp
from gcalib.evaluation import evaluate
from gcalib.models.base import Recommender
from gcalib.models.matching import build_model, flops_per_step, matched, parameter_counts
from gcalib.store import RESULTS_VERSION, RunStore, trace, write
from gcalib.training import fit, pick_device

log = logging.getLogger("gcalib")
ByConfig = dict[RunConfig, str]
DRAWS = 2  # re-initialised cross-attentions that a null level is the mean of


class GridError(RuntimeError):
    """Some runs of a grid failed; the others are stored. `failures` says why, by config."""

    def __init__(self, failures: ByConfig, asked: int) -> None:
        self.failures = failures
        lines = (f"{config.model_dump(exclude_defaults=True)}: {error}" for config, error in failures.items())
        super().__init__(f"{len(failures)} of {asked} runs failed, the others are stored. " + " | ".join(lines))


def pair_of(config: RunConfig, download: bool = True) -> Pair:
    """The pair of a config, kept until its files change; without `download`, NoDataError if it is not here."""
    fields = tuple(config.model_dump(include=set(DATA)).items())
    with suppress(NoDataError):
        return _pair(stamp(config.pair), fields, download=False)
    return _pair(stamp(config.pair), fields, download=download)


@functools.lru_cache(maxsize=4)
def _pair(files: tuple[tuple[str, int, int], ...], fields: tuple[tuple[str, Any], ...], download: bool) -> Pair:
    options = dict(fields)
    columns = json.loads(options.pop("columns") or "null")
    return load_pair(options.pop("pair"), **options, columns=columns, download=download)


def run(
    config: RunConfig, store: str | Path = "results", *, device: str = "auto", keep_model: bool = False
) -> dict[str, Any]:
    """Train, evaluate and measure one config, or fetch its record if the store has it.

    An interrupted run resumes from its checkpoint. One that another process works on is waited for.

    Parameters
    ----------
    keep_model
        Keep the weights for `load_model`; a run that is stored without them is trained again.

    Returns
    -------
    dict
        The config's fields; id, sizes, costs and versions; the figures of the best epoch (`gcalib.evaluation.evaluate`)
        behind `val.` or `test.`, with two more nulls of an alignment (`_untrained_cosines`).

    Raises
    ------
    DivergedError, DataError
        If the loss stops being finite; if the data is bad, or missing while the store has no such run.
    """
    config, runs = config.canonical(), RunStore(store)
    name = _name(config, runs, download=True)
    if keep_model or runs.get(name) is None:
        with runs.lock(name):
            train_and_store(config, name, runs, device, keep_model)
    record = runs.records([name])[name]
    trace([record])
    return record


def load_model(run_id: str, store: str | Path = "results") -> Recommender:
    """The trained model of a run, on the CPU, ready to score.

    Raises
    ------
    ValueError
        If the store has no such run or not its weights, or if this machine has another version of its data.
    """
    runs = RunStore(store)
    record, path = runs.get(run_id), runs.path("models", run_id)
    if record is None or not path.exists():
        raise ValueError(f"{store} holds no weights of run {run_id!r}: gcalib.run(config, keep_model=True) keeps them.")
    config = RunConfig(**{name: record[name] for name in RunConfig.model_fields})
    if (pair := pair_of(config)).sha256 != record["data_sha256"]:
        raise ValueError(f"{run_id} was trained on another version of {config.pair} than is on this machine.")
    model = build_model(config, pair)
    model.load_state_dict(safetensors.torch.load_file(path))
    return model.eval()


def _name(config: RunConfig, runs: RunStore, *, download: bool) -> str:
    """The run's id. What is stored is found without its data; NoDataError if it is not, and the data is not here."""
    with suppress(NoDataError):
        return run_id(config, pair_of(config, download=False).sha256, RESULTS_VERSION)
    return runs.find(config) or run_id(config, pair_of(config, download).sha256, RESULTS_VERSION)


def train_and_store(config: RunConfig, name: str, runs: RunStore, device: str, keep_model: bool = False) -> None:
    """Train, evaluate, measure and store a run that this process has locked, if another has not just done so."""
    stored, checkpoint, weights = runs.get(name), runs.path("checkpoints", name), runs.path("models", name)
    if stored and (weights.exists() or not keep_model):
        return
    pair, target = pair_of(config), pick_device(device)
    done = fit(config, pair, device=target, checkpoint=checkpoint)
    model = done.model
    figures = _untrained_cosines(model, config, pair) if config.gca and not config.match else {}
    for split in ("val", "test"):
        figures |= {f"{split}.{key}": value for key, value in evaluate(model, pair, split).items()}
    record = {
        "run_id": name,
        **config.model_dump(),
        **parameter_counts(model),
        "flops_per_step": flops_per_step(model, pair, config.batch_size) if model.trained else 0,
        "seconds": done.seconds,
        "peak_memory_bytes": _peak_memory(target),
        "epochs_trained": len(done.curves) - 1,
        "best_epoch": done.best_epoch,
        "stopped_early": done.stopped_early,
        "precision_used": done.precision,
        "code_version": importlib.metadata.version("gcalib"),
        "results_version": RESULTS_VERSION,
        "data_sha256": pair.sha256,
        "has_global_order": pair.has_global_order,
        "device": target.type,
        "threads": torch.get_num_threads(),
        **(matched(config, pair).facts() if config.match else {}),
        **model.facts(),
        **_best_on_test(done.curves),
        **figures,
    }
    if keep_model:
        state = {key: value.cpu().contiguous().clone() for key, value in model.state_dict().items()}
        write(weights, safetensors.torch.save(state))
    if stored is None:
        runs.put(record, done.curves)
    checkpoint.unlink(missing_ok=True)


def _best_on_test(curves: list[dict[str, float]]) -> dict[str, float]:
    """With `track_test`, the best of each test figure over the trained epochs (`best_test.`): selection on test."""
    metrics = [name for name in curves[-1] if name.startswith("test.") and "target" not in name and "_" not in name]
    return {f"best_{name}": max(row[name] for row in curves[1:] if name in row) for name in metrics}


def _peak_memory(device: torch.device) -> int:
    """Bytes that this process has used at most, of the GPU or of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _untrained_cosines(model: Recommender, config: RunConfig, pair: Pair) -> dict[str, float]:
    """Mean |cos(X, X')| on the test split of the trained model with its cross-attention untrained: the third null.

    `null_initial_mean_abs` has the weights that the run began with, through which the rest was trained and to which it
    may have adapted: a level to compare with, not one of independence. `null_reinitialised_mean_abs` is the mean over
    `DRAWS` seeds that the run has not seen.
    """
    figures: dict[str, float] = {}
    mixed = copy.deepcopy(model)
    for seed in range(config.seed, config.seed + DRAWS + 1):
        measure, draws = ("initial", 1) if seed == config.seed else ("reinitialised", DRAWS)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            untrained = dict(build_model(config, pair).named_modules())
        for name, module in mixed.named_modules():
            if isinstance(module, GatedCrossAttention):
                module.load_state_dict(untrained[name].state_dict())
        for key, value in evaluate(mixed, pair, "test", protocols=()).items():  # measured, not ranked
            if key.endswith(".cos_mean_abs") and "gated" not in key:
                column = f"test.{key.removesuffix('cos_mean_abs')}null_{measure}_mean_abs"
                figures[column] = figures.get(column, 0.0) + value / draws
    return figures


def run_grid(
    configs: Iterable[RunConfig],
    store: str | Path = "results",
    *,
    engine: Literal["local", "ray"] = "local",
    workers: int = 1,
    device: str = "auto",
    cpus: float = 1,
    gpus: float = 0,
) -> pd.DataFrame:
    """Run every config that the store does not hold; return all their records, one row each, in the order given.

    A run that fails, or whose process dies twice, stops no other. Processes on several machines may be given the same
    grid and store: they share the work.

    Parameters
    ----------
    engine
        `"local"`: processes of this machine. `"ray"`: a Ray cluster (`pip install -e '.[cluster]'`).
    workers
        Local processes; they share the machine's cores evenly.
    cpus, gpus
        Read by `engine="ray"` only, see `gcalib.cluster.run_on_ray`.

    Raises
    ------
    GridError
        After all other runs have finished, if some failed.
    ValueError
        For no configs, an unknown engine, or a device that is not there.
    """
    if engine not in ("local", "ray"):
        raise ValueError(f"engine={engine!r} is unknown; the engines are local and ray.")
    if engine == "local" or not device.startswith("cuda"):  # which the nodes of a cluster may have
        pick_device(device)
    asked = [config.canonical() for config in configs]
    if not asked:
        raise ValueError("There is no run to do: the list of configs is empty, as it is for a profile without a grid.")
    runs = RunStore(store)
    names, failures = _names(asked, runs, download=engine == "local")
    stored = set(runs.names())
    todo = {name: config for config, name in names.items() if name not in stored}
    try:
        if engine == "local" and todo:
            failed = run_in_processes(train_and_store, todo, runs, min(workers, len(todo)), device)
            failures |= {todo[name]: error for name, error in failed.items()}
        elif engine == "ray" and (todo or failures):  # the nodes may have data that is not here
            waiting, failures = [*todo.values(), *failures], {}
            for config, name, error in run_on_ray(run, waiting, runs, device, cpus, gpus):
                (failures if error else names)[config] = error or name
    except KeyboardInterrupt:
        log.warning("Interrupted: what was finished is stored, what was running resumes from its last checkpoint.")
        raise
    if failures:
        raise GridError(failures, len(set(asked)))
    return runs.frame([names[config] for config in asked])


def _names(configs: Iterable[RunConfig], runs: RunStore, *, download: bool) -> tuple[ByConfig, ByConfig]:
    """Run ids by config; and, of those whose data is not here, what is wrong with it."""
    names, failures, lost = ByConfig(), ByConfig(), dict[str, str]()
    for config in dict.fromkeys(configs):
        try:
            names[config] = _name(config, runs, download=download and config.pair not in lost)
        except NoDataError as error:
            failures[config] = lost.setdefault(config.pair, str(error))
        except DataError as error:
            failures[config] = str(error)
    return names, failures


def finished(configs: Iterable[RunConfig], store: str | Path = "results") -> pd.DataFrame:
    """Records of those configs that the store holds, one row each; nothing is trained and nothing downloaded.

    Raises
    ------
    ValueError
        If none of them is finished.
    """
    runs, asked = RunStore(store), list(dict.fromkeys(config.canonical() for config in configs))
    names, _ = _names(asked, runs, download=False)
    stored = set(runs.names())
    if not (done := [name for name in names.values() if name in stored]):
        advice = "`python -m gcalib grid --profile NAME` trains them"
        raise ValueError(f"None of these {len(asked)} runs is in {store}; {advice}.")
    return runs.frame(done)


def plan(configs: Iterable[RunConfig], store: str | Path = "results") -> dict[str, float]:
    """What a grid still has to do: `runs`, how many of them are `left`, and the `hours` of one process that these take.

    That is at the mean seconds of stored runs of their model, pair and width; `unknown` of them are like no stored run
    and are not counted.
    """
    runs = RunStore(store)
    asked = dict.fromkeys(config.canonical() for config in configs)
    names, _ = _names(asked, runs, download=False)
    done = runs.frame()
    mean = done.groupby(["model", "pair", "dim"])["seconds"].mean().to_dict() if len(done) else {}
    stored = set(runs.names())
    left = [config for config in asked if names.get(config) not in stored]
    seconds = [mean.get((config.model, config.pair, config.dim)) for config in left]
    hours = sum(filter(None, seconds)) / 3600
    return {"runs": len(asked), "left": len(left), "hours": hours, "unknown": seconds.count(None)}
