"""Run records as the tables that statistics and figures read: variants by their names, domains in rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

NAMES = {
    "abxi": "ABXI", "llm4cdsr": "LLM4CDSR", "cdsrnp": "CDSRNP", "sasrec": "SASRec, one domain",
    "sasrec-mixed": "SASRec, mixed", "popularity": "popularity", "markov": "Markov chain", "item-knn": "item-KNN",
}  # fmt: skip

BASELINES = [NAMES[name] for name in ("abxi", "llm4cdsr", "cdsrnp")]
"""The models that the paper's claims are about."""


def published(name: str) -> pd.DataFrame:
    """Figures of others: "claims" (of the paper, by claim) or "published" (of official programs, on the test events).

    Claims have `claim`, `model`, `pair`, `domain`, `figure`, `plain` (without cross-attention), `found`; programs have
    `source`, `model`, `pair`, `candidates`, `domain` (a or b), `metric`, `mean`, `sd` over `runs` seeds.
    """
    return pd.read_csv(Path(__file__).with_name(f"{name}.csv"))


def named(runs: pd.DataFrame) -> pd.DataFrame:
    """Records with columns that name them for a reader: `model` as its paper spells it, `case` (model and pair) and
    `variant`, such as "plain", "GCA0", "GCA0+1", "GCA0, tanh", "GCA0, 8 heads".

    "matched" is the parameter-matched baseline of GCA0.
    """
    models = runs["model"].map(NAMES)
    fields = zip(runs["gca"], runs["match"], runs["gate"], runs["heads"], strict=True)
    return runs.assign(model=models, variant=[_variant(*row) for row in fields], case=models + " · " + runs["pair"])


def _variant(gca: Sequence[int], match: object, gate: str, heads: int) -> str:
    if not len(gca):
        return "plain"
    name = "GCA" + "+".join(map(str, gca))
    if isinstance(match, str):  # else None, or nan where pandas has put it
        return "matched" if (name, match) == ("GCA0", "network") else f"matched to {name}'s {match}"
    return name + (f", {gate}" if gate != "sigmoid" else "") + (f", {heads} heads" if heads != 4 else "")


def one_width(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of the commonest width: the cosine of random directions depends on it, and ranking does too."""
    return runs[runs["dim"] == runs["dim"].mode().iloc[0]]


def by_domain(runs: pd.DataFrame, figures: Mapping[str, str]) -> pd.DataFrame:
    """Records with one row a run and domain: what belongs to no split, `domain` ("A", "B"), and some test figures.

    `figures` maps a new column to the name that a figure has within a domain, such as `{"ndcg": "full.ndcg@10"}`.
    """
    plain = runs[[name for name in runs if not str(name).startswith(("test.", "val."))]]
    parts = []
    for letter in "ab":
        found = {name: runs[f"test.{letter}.{figure}"].astype(float) for name, figure in figures.items()}
        parts.append(plain.assign(domain=letter.upper(), **found))
    return pd.concat(parts, ignore_index=True)


def alignment(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a run of the commonest width, domain and insertion point (`point`) that the run has.

    Returns
    -------
    pandas.DataFrame
        As `by_domain`, with all measures of `gcalib.alignment.cosine` by their names (nan where a run lacks one) and
        `ndcg`, NDCG@10 under full ranking. `cos_ungated` and `cos_gated` are the cosines that mean lengths imply,
        parallel / hypot(parallel, orthogonal), of X' and of what is added to X, gate * X': ratios of means, in which
        long updates weigh more, and no means of |cos|. Plain and parameter-matched runs have no rows.
    """
    same, parts = one_width(runs), []
    same = same[[not isinstance(match, str) for match in same["match"]]]
    for point in sorted({point for points in same["gca"] for point in points}):
        place = f"gca{point}."
        measures = [name.partition(place)[2] for name in map(str, same) if name.startswith(f"test.a.{place}")]
        figures = {"ndcg": "full.ndcg@10", **{name: f"{place}{name}" for name in measures}}
        parts.append(by_domain(same[[point in points for points in same["gca"]]], figures).assign(point=point))
    if not parts:
        raise ValueError("None of these runs has cross-attention, so there is nothing to measure.")
    rows = pd.concat(parts, ignore_index=True)
    for name, lengths in (("cos_ungated", "norm"), ("cos_gated", "gated_norm")):
        parallel = rows[f"{lengths}_parallel"]
        rows[name] = parallel / np.hypot(parallel, rows[f"{lengths}_orthogonal"])
    return rows


def relative(frame: pd.DataFrame, value: str, base: str, by: Sequence[str]) -> pd.Series:
    """A column in percent of the mean of variant `base` in the same group, so that groups of other levels compare.

    `by` are the columns that name a group, such as model, pair and domain. A group without the base has nan.
    """
    level = frame[value].where(frame["variant"] == base).groupby([frame[name] for name in by]).transform("mean")
    return 100.0 * frame[value] / level
