"""Run records as the tables that statistics and figures read: variants by their names, domains in rows."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

NAMES = {
    "abxi": "ABXI", "llm4cdsr": "LLM4CDSR", "cdsrnp": "CDSRNP", "sasrec": "SASRec, one domain",
    "sasrec-mixed": "SASRec, mixed", "popularity": "popularity", "markov": "Markov chain", "item-knn": "item-KNN",
}  # fmt: skip

BASELINES = [NAMES[name] for name in ("abxi", "llm4cdsr", "cdsrnp")]
"""The models that the paper's claims are about."""


def named(runs: pd.DataFrame) -> pd.DataFrame:
    """Records with columns that name them for a reader.

    Returns
    -------
    pandas.DataFrame
        The same rows with `model` spelt as in its paper, `variant` (such as "plain", "GCA0", "GCA0+1", "GCA0, tanh",
        "GCA0, 8 heads", "widened": the plain twin of GCA0's size) and `case` (model and pair).
    """
    models = runs["model"].map(NAMES)
    fields = [name for name in ("gca", "match", "gate", "heads") if name in runs]
    variants = [_variant(dict(zip(fields, row, strict=True))) for row in runs[fields].itertuples(index=False)]
    return runs.assign(model=models, variant=variants, case=models + " · " + runs["pair"])


def _variant(row: Mapping[str, object]) -> str:
    points = row["gca"]
    assert isinstance(points, tuple)
    if not points:
        return "plain"
    name = "GCA" + "+".join(map(str, points))
    if isinstance(row.get("match"), str):
        return "widened" if name == "GCA0" and row["match"] == "params" else f"widened to {name}'s {row['match']}"
    changes = [f"{row['gate']}"] * (row["gate"] != "sigmoid") + [f"{row['heads']} heads"] * (row["heads"] != 4)
    return ", ".join([name, *changes])


def by_domain(runs: pd.DataFrame, figures: Mapping[str, str], split: str = "test") -> pd.DataFrame:
    """One row a run and domain.

    Parameters
    ----------
    runs
        Records, one row each.
    figures
        New column -> the figure's name within a domain, such as `{"ndcg": "full.ndcg@10"}`.

    Returns
    -------
    pandas.DataFrame
        The columns of `runs` that belong to no split, then `domain` ("A", "B") and those of `figures`.

    Raises
    ------
    ValueError
        For a figure that no run has.
    """
    plain = [name for name in runs.columns if not str(name).startswith(("test.", "val."))]
    parts = []
    for letter in "ab":
        columns = {name: f"{split}.{letter}.{figure}" for name, figure in figures.items()}
        missing = [column for column in columns.values() if column not in runs]
        if missing:
            raise ValueError(f"No run has a figure {missing[0]!r}.")
        values = {name: runs[column] for name, column in columns.items()}
        parts.append(runs[plain].assign(domain=letter.upper(), **values))
    return pd.concat(parts, ignore_index=True)


def by_point(runs: pd.DataFrame, measures: Mapping[str, str], split: str = "test") -> pd.DataFrame:
    """One row a run, domain and insertion point that the run has: `by_domain` for measures of the cross-attention.

    Parameters
    ----------
    measures
        New column -> the measure's name, such as `{"cos": "cos_mean_abs"}`; see `gcalib.alignment.cosine`.

    Returns
    -------
    pandas.DataFrame
        As `by_domain`, and `point`. Plain and widened runs have none.
    """
    matched = runs["match"].notna() if "match" in runs else pd.Series(False, index=runs.index)
    parts = []
    for point in (0, 1, 2):
        has = runs[runs["gca"].map(lambda points, point=point: point in points) & ~matched]
        if len(has):
            figures = {name: f"gca{point}.{measure}" for name, measure in measures.items()}
            parts.append(by_domain(has, figures, split).assign(point=point))
    if not parts:
        raise ValueError("None of these runs has cross-attention, so there is nothing to measure.")
    return pd.concat(parts, ignore_index=True)


def relative(frame: pd.DataFrame, value: str, base: str, by: list[str], between: str = "variant") -> pd.Series:
    """A column in percent of the base variant's mean in the same group, so that groups of other levels compare.

    Parameters
    ----------
    base
        The variant whose mean is 100%.
    by
        Columns that name a group, such as model, pair and domain.

    Raises
    ------
    ValueError
        For a group without the base.
    """
    means = frame[frame[between] == base].groupby(by)[value].mean().rename("base")
    joined = frame[by].merge(means, left_on=by, right_index=True, how="left")["base"]
    if joined.isna().any():
        raise ValueError(f"Some group of {by} has no {between} {base!r} to compare with.")
    return 100.0 * frame[value] / joined
