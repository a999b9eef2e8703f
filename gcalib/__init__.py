"""gcalib: what gated cross-attention does in cross-domain sequential recommendation, measured.

Companion of the notebooks beside it and of the paper *Cross-attention Secretly Performs Orthogonal Alignment in
Recommendation Models* (arXiv 2510.09435).
"""

from __future__ import annotations

from gcalib import alignment, ranking
from gcalib.attention import GatedCrossAttention
from gcalib.config import Profile, RunConfig, notebook_parameters
from gcalib.data import load_pair
from gcalib.evaluation import score
from gcalib.experiments import run
from gcalib.grid import run_grid
from gcalib.models import build_model
from gcalib.store import load_curves, load_results

__version__ = "0.1.0"

__all__ = [
    "GatedCrossAttention",
    "Profile",
    "RunConfig",
    "alignment",
    "build_model",
    "load_curves",
    "load_pair",
    "load_results",
    "notebook_parameters",
    "ranking",
    "run",
    "run_grid",
    "score",
]
