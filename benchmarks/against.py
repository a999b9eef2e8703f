"""Training steps of this checkout and of another one, alternating: `python benchmarks/against.py CHECKOUT [MODEL DIM]`.

Prints, for each model, the processor time per training event in both and the ratio (this / other), the median of
several rounds. The first version of the package (commit 47c5dd3) is understood too.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROUNDS = 3
CASES = (("abxi", 256), ("abxi", 64), ("cdsrnp", 128), ("cdsrnp", 64), ("llm4cdsr", 128), ("llm4cdsr", 64))
TIMED = """
import json, sys, time
import torch
torch.set_num_threads(1)
from gcalib.config import RunConfig
from gcalib.data.sources import load_pair
from gcalib.training import Trainer
first = hasattr(RunConfig, "but")
model, dim = sys.argv[1], int(sys.argv[2])
fields = {"pair": "food-kitchen", "model": model, "dim": dim, "gca": (0,)}
fields |= {} if model == "abxi" else {"objective": "infonce"}
fields |= {} if model == "llm4cdsr" else {"negative_groups" if first else "negative_pools": 16}
pair = load_pair("food-kitchen")
lengths = pair.split("val").lengths
torch.manual_seed(0)
trainer = Trainer(RunConfig(**fields), pair, torch.device("cpu"))
trainer.model.train()
batches = sorted(trainer._batches() if first else trainer.batches(), key=lambda users: lengths[users].sum())
picked = batches[:: max(1, len(batches) // 8)]
trainer.step(picked[0])
started = time.process_time()
for users in picked:
    trainer.step(users)
print(1e6 * (time.process_time() - started) / sum(lengths[users].sum() for users in picked))
"""


def timed(checkout: Path, model: str, dim: int) -> float:
    """Microseconds of processor time per training event, on one thread."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TIMED, model, str(dim)]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(json.loads(done.stdout))


def main() -> None:
    """Compare the cases, or the one named."""
    if len(sys.argv) not in (2, 4):
        raise SystemExit(__doc__)
    here, other = Path(__file__).resolve().parents[1], Path(sys.argv[1]).resolve()
    cases = CASES if len(sys.argv) == 2 else ((sys.argv[2], int(sys.argv[3])),)
    for model, dim in cases:
        pairs = [(timed(here, model, dim), timed(other, model, dim)) for _ in range(ROUNDS)]
        this, that = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"{model:9s} d {dim:3d}  this {this:6.1f}  other {that:6.1f} us per event  ratio {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
