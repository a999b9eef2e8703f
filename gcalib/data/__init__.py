"""Data: pairs of domains from published files, from one's own files, or from a generator with planted structure."""

from gcalib.data.pair import DataError, Pair, Split
from gcalib.data.sources import load_pair, report, statistics
from gcalib.data.synthetic import synthetic_pair

__all__ = ["DataError", "Pair", "Split", "load_pair", "report", "statistics", "synthetic_pair"]
