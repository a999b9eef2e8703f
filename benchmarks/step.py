"""Speed and memory on this machine: `python benchmarks/step.py [--pair food-kitchen] [--quick]`.

Prints a table and writes it to `benchmarks/step.json`. Nothing else should run meanwhile.

- Step: `Trainer.step` over the batches of an epoch, in milliseconds and in microseconds per training event, and the
  share of the machine's matrix peak (the best rate of a large square product) that its counted operations reach.
- Memory: the largest resident set of a fresh process that loads the pair, trains an epoch and validates (Linux).
- Ranking: `evaluate` with the protocol `full` beside the bare products of all states and item vectors.
- Loading, importing, and `gcalib pairs`, each in a fresh process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from gcalib import RunConfig, load_pair
from gcalib.data.pair import Pair
from gcalib.evaluation import evaluate
from gcalib.models.matching import CPU_ATTENTION_FLOPS
from gcalib.training import Trainer, fastest_precision

CPU = torch.device("cpu")
MODELS = {
    "abxi, d 256": {"model": "abxi", "dim": 256, "negative_pools": 16},
    "abxi, d 64": {"model": "abxi", "dim": 64, "negative_pools": 16},
    "cdsrnp, d 128": {"model": "cdsrnp", "dim": 128, "negative_pools": 16, "objective": "infonce"},
    "llm4cdsr, d 128": {"model": "llm4cdsr", "dim": 128, "objective": "infonce"},
    "sasrec-mixed, d 64": {"model": "sasrec-mixed", "dim": 64, "objective": "infonce", "gca": ()},
}
EPOCH = """
import sys, torch
from pathlib import Path
from gcalib import RunConfig, load_pair
from gcalib.evaluation import evaluate
from gcalib.training import Trainer
config = RunConfig.model_validate_json(sys.argv[1])
trainer = Trainer(config, load_pair(config.pair), torch.device("cpu"))
trainer.epoch(config.lr)
evaluate(trainer.model, trainer.pair, "val")
print(1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]))
"""


def best_seconds(work: Callable[[], Any], repeats: int = 3) -> float:
    """The shortest wall time of several calls."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def matrix_peak(size: int) -> float:
    """Operations per second of a square product in fp32."""
    x = torch.ones(size, size)
    return 2 * size**3 / best_seconds(lambda: x @ x)


def step(config: RunConfig, pair: Pair, peak: float) -> dict[str, float]:
    """Time and operations of a training step, and the memory of an epoch."""
    torch.manual_seed(0)
    trainer = Trainer(config, pair, CPU)
    trainer.model.train()
    batches = list(trainer.batches())
    trainer.step(batches[0])
    started = time.perf_counter()
    for users in batches:
        trainer.step(users)
    seconds = time.perf_counter() - started
    counted = batches[::4]
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION_FLOPS) as counter:
        for users in counted:
            trainer.step(users)
    operations = counter.get_total_flops() / len(counted)
    memory = subprocess.run(
        [sys.executable, "-c", EPOCH, config.model_dump_json()], capture_output=True, text=True, check=True
    )
    return {
        "ms_per_step": 1e3 * seconds / len(batches),
        "us_per_event": 1e6 * seconds / len(pair.split("val").history_items),
        "share_of_peak": operations / (seconds / len(batches)) / peak,
        "epoch_gigabytes": int(memory.stdout) / 1e9,
    }


def ranking(config: RunConfig, pair: Pair) -> dict[str, float]:
    """Full ranking of the test split beside the products that it cannot do without."""
    model = Trainer(config, pair, CPU).model.eval()
    test = pair.split("test")

    def products() -> None:
        with torch.no_grad():
            for domain in (0, 1):
                users = int(np.count_nonzero(pair.domain_of(test.targets) == domain))
                states = torch.ones(users, config.dim)
                for part in states.split(512):
                    part @ model.item_vectors(domain).T

    def states() -> None:
        evaluate(model, pair, "test", protocols=(), alignment=False)

    whole = best_seconds(lambda: evaluate(model, pair, "test", protocols=("full",), alignment=False))
    return {"seconds": whole, "model_seconds": best_seconds(states), "product_seconds": best_seconds(products)}


def fresh(code: str) -> float:
    """Wall time of a fresh Python process."""
    return best_seconds(lambda: subprocess.run([sys.executable, "-c", code], check=True, capture_output=True))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pair", default="food-kitchen")
    parser.add_argument("--quick", action="store_true", help="one small model, for a test of this script")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    pair = load_pair(options.pair)
    peak = matrix_peak(512 if options.quick else 4096)
    found: dict[str, Any] = {
        "pair": pair.name, "threads": torch.get_num_threads(), "peak_gflops": peak / 1e9,
        "cpu": torch.backends.cpu.get_cpu_capability(), "fastest_precision": fastest_precision("cpu"), "steps": {},
    }  # fmt: skip
    models = {"abxi, d 8": {"model": "abxi", "dim": 8}} if options.quick else MODELS
    print(f"{pair.name}, {found['threads']} thread(s), {found['cpu']}, peak {peak / 1e9:.0f} GFLOP/s in fp32")
    for name, fields in models.items():
        config = RunConfig(**{"pair": options.pair, "gca": (0,), **fields})
        found["steps"][name] = step(config, pair, peak)
        texts = (f"{key} {value:,.2f}" for key, value in found["steps"][name].items())
        print(f"{name:20s} " + "  ".join(texts), flush=True)
    config = RunConfig(**{"pair": options.pair, **next(iter(models.values()))})
    found["ranking"] = ranking(config, pair)
    found["loading_seconds"] = best_seconds(lambda: load_pair(options.pair))
    found["import_seconds"] = fresh("import gcalib")
    found["pairs_seconds"] = fresh("import sys; sys.argv = ['', 'pairs']; from gcalib.__main__ import main; main()")
    for name in ("ranking", "loading_seconds", "import_seconds", "pairs_seconds"):
        print(f"{name:20s} {found[name]}")
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
