"""gcalib: what gated cross-attention does in cross-domain sequential recommendation, measured.

Companion of the notebooks beside it and of the paper *Cross-attention Secretly Performs Orthogonal Alignment in
Recommendation Models* (arXiv 2510.09435).
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# A public name is imported at its first use, so that the command line need not wait for torch.
_HOMES = {
    "GatedCrossAttention": "attention",
    "Profile": "config",
    "RunConfig": "config",
    "alignment": "",
    "build_model": "models.matching",
    "finished": "experiments",
    "fit": "training",
    "load_curves": "store",
    "load_model": "experiments",
    "load_pair": "data.sources",
    "load_results": "store",
    "notebook_parameters": "config",
    "pair_from_frames": "data.frames",
    "ranking": "",
    "recommend": "evaluation",
    "record_activations": "attention",
    "run": "experiments",
    "run_grid": "experiments",
    "score": "evaluation",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gcalib' has no attribute {name!r}")
    home = importlib.import_module(f"gcalib.{_HOMES[name] or name}")
    return getattr(home, name) if _HOMES[name] else home


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
