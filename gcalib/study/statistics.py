"""Intervals over repeated runs, differences of variants that share seeds, and correlations over runs.

Intervals of means are Student's t, exact for values that are normally distributed over seeds. With few seeds they are
wide, and rightly so; with one seed there is none, and its bounds are nan.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.regression.mixed_linear_model import MixedLM

Variance = Literal["pooled", "own"]


def as_text(mean: float, low: float, high: float, unit: str = "%", digits: int = 1) -> str:
    """A difference with its interval, for a table or a sentence.

    Examples
    --------
    >>> as_text(1.23, -0.5, 2.96), as_text(-0.31, -0.4, -0.2, unit="", digits=2), as_text(1.0, np.nan, np.nan)
    ('+1.2% [-0.5, +3.0]', '-0.31 [-0.40, -0.20]', '+1.0% (too few runs for an interval)')
    """
    if not np.isfinite(mean):
        return "too few runs"
    value = f"{mean:+.{digits}f}{unit}"
    if not np.isfinite([low, high]).all():
        return f"{value} (too few runs for an interval)"
    return f"{value} [{low:+.{digits}f}, {high:+.{digits}f}]"


def mean_interval(frame: pd.DataFrame, value: str, by: str | Sequence[str]) -> pd.DataFrame:
    """Mean of a column with its 95% t-interval, for each group.

    What differs within a group of `by` (the seed) is what is averaged over. Returned are, in order of appearance, the
    columns of `by`, `n`, `mean`, `low`, `high`, `p` (of a mean of zero, two-sided) and `each` (the values).

    Examples
    --------
    >>> runs = pd.DataFrame({"model": ["plain"] * 3 + ["gca"], "ndcg": [0.1, 0.2, 0.3, 0.4]})
    >>> mean_interval(runs, "ndcg", "model")[["model", "n", "mean", "low", "high"]].round(3)
       model  n  mean    low   high
    0  plain  3   0.2 -0.048  0.448
    1    gca  1   0.4    NaN    NaN
    """
    keys = _names(by)
    groups = frame.groupby(keys, sort=False, dropna=False)[value]
    return pd.DataFrame(
        [{**dict(zip(keys, group, strict=True)), **_interval([part.to_numpy(float)])} for group, part in groups]
    )


def difference(
    frame: pd.DataFrame,
    value: str,
    base: str,
    *,
    by: str | Sequence[str] = (),
    strata: str | Sequence[str] = (),
    level: float = 0.95,
    variance: Variance = "pooled",
) -> pd.DataFrame:
    """Every other variant minus the base one, paired by `seed`, with the t-interval of the mean difference.

    Pairing takes out what two runs of one seed share (initial weights, batches). It narrows the interval where that
    makes both rise and fall together, and widens it where they go against each other.

    Parameters
    ----------
    frame
        One row a run and group: `variant`, `seed`, and the column to compare, named by `value`.
    base
        The variant that is subtracted. Its runs that have no partner are left out; others without one are refused, and
        so are runs that occur twice.
    by
        Column or columns within which to compare, such as `"domain"`.
    strata
        Column or columns that name a stratum, such as a data set. Strata count alike; those without the variant are
        left out. The interval speaks of these strata, not of others like them.
    variance
        "pooled": differences vary alike in all strata; Student's t with the degrees of freedom that their means leave.
        "own": each stratum has a variance of its own; degrees of freedom by Welch and Satterthwaite.

    Returns
    -------
    pandas.DataFrame
        One row a group and variant: the columns of `by`, `variant`, then `strata` (how many), `n` (pairs of runs),
        `mean`, `low`, `high`, `p` (of no difference, two-sided) and `each` (the differences). With one pair a stratum
        (with "own", in any stratum) there is no interval.

    Examples
    --------
    >>> runs = pd.DataFrame({"variant": ["plain", "plain", "GCA0", "GCA0"] * 2, "seed": [0, 1] * 4,
    ...                      "pair": list("ppppqqqq"), "ndcg": [1.0, 2, 1.5, 2.7, 11, 12, 11.1, 12.3]})
    >>> difference(runs, "ndcg", "plain", strata="pair").drop(columns="each").round(3)
      variant  strata  n  mean    low   high     p
    0    GCA0       2  4   0.4  0.096  0.704  0.03
    """
    groups, sets = _names(by), _names(strata)
    run = [*groups, *sets, "variant", "seed"]
    if frame.duplicated(run).any():
        raise ValueError(f"Several runs are {frame.loc[frame.duplicated(run), run].iloc[0].to_dict()}: keep one.")
    rows = []
    for group, part in frame.groupby(groups, sort=False, dropna=False) if groups else [((), frame)]:
        where = dict(zip(groups, group, strict=True))
        wide = part.pivot(index=[*sets, "seed"], columns="variant", values=value)
        if base not in wide:
            raise ValueError(f"There is no variant {base!r} in {where or 'the table'}; there are {list(wide)}.")
        for name in part.loc[part["variant"] != base, "variant"].unique():
            if (alone := wide[name].notna() & wide[base].isna()).any():
                raise ValueError(f"A run of {name!r} has no partner in {base!r}: {where}, {wide.index[alone][0]}.")
            change = (wide[name] - wide[base]).dropna()
            parts = [one.to_numpy() for _, one in change.groupby(level=sets)] if sets else [change.to_numpy()]
            rows.append({**where, "variant": name, "strata": len(parts), **_interval(parts, level, variance)})
    columns = [*groups, "variant", "strata", "n", "mean", "low", "high", "p", "each"]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(("mean", "low", "high", "p"), float))


def _names(columns: str | Sequence[str]) -> list[str]:
    return [columns] if isinstance(columns, str) else list(columns)


def _interval(strata: Sequence[np.ndarray], level: float = 0.95, variance: Variance = "pooled") -> dict[str, Any]:
    """Mean of the strata's means, bounds of its t-interval by the variance within strata, p of a mean of zero."""
    sizes = np.array([len(part) for part in strata])
    mean, each = float(np.mean([part.mean() for part in strata])), tuple(np.concatenate(strata).tolist())
    if not np.isfinite(mean):
        raise ValueError(f"A run has no figure among {each}.")
    free = sizes - 1
    if free.sum() < 1 or (variance == "own" and free.min() < 1):
        return {"n": len(each), "mean": mean, "low": np.nan, "high": np.nan, "p": np.nan, "each": each}
    squares = np.array([((part - part.mean()) ** 2).sum() for part in strata])
    of_means = (squares / free if variance == "own" else squares.sum() / free.sum()) / sizes
    freedom = of_means.sum() ** 2 / (of_means**2 / free).sum() if variance == "own" else free.sum()
    error = np.sqrt(of_means.sum()) / len(strata)
    half = stats.t.ppf((1 + level) / 2, freedom) * error
    p = 2 * stats.t.sf(abs(mean) / max(error, 1e-300), freedom)  # values without spread leave no doubt
    return {"n": len(each), "mean": mean, "low": mean - half, "high": mean + half, "p": p, "each": each}


def correlations(frame: pd.DataFrame, x: str, y: str, cells: Sequence[str]) -> pd.DataFrame:
    """Linear relation of two columns over runs, read in three ways.

    Runs of one data set share its level of ranking, and runs of one variant its level of cosine. A pooled correlation
    mixes these differences with what happens among comparable runs, and may have the other sign (Simpson's paradox).

    `frame` has one row a run, and `cells` name what comparable runs share.

    Returns
    -------
    pandas.DataFrame
        One row a `reading`, with `n`, `r`, `low`, `high` (95%), `p`:

        pooled
            Pearson's r over all runs, as if those of a cell were independent. Nan for fewer than four.
        within cells
            Pearson's r after each cell's means are subtracted, with the degrees of freedom that this leaves. Nan for
            fewer than two cells with two runs each, or a column that never changes within a cell.
        mixed model
            Slope of a linear model with a random intercept for each cell, both columns in units of their standard
            deviation within cells, so that it compares to r; Wald interval (REML). Nan where it does not converge.
    """
    table = frame[[x, y, *cells]].dropna(subset=[x, y])
    grouped = table.groupby(list(cells), sort=False, dropna=False)
    within = table[[x, y]] - grouped[[x, y]].transform("mean")
    freedom = len(table) - grouped.ngroups - 1
    spread = np.sqrt((within**2).sum() / max(freedom, 1))
    rows: list[tuple[Any, ...]] = [(name, *[np.nan] * 4) for name in ("pooled", "within cells", "mixed model")]
    if len(table) > 3:
        pooled = stats.pearsonr(table[x], table[y])
        rows[0] = ("pooled", pooled.statistic, *pooled.confidence_interval(), pooled.pvalue)
    if (grouped.size() > 1).sum() > 1 and freedom > 1 and (spread > 1e-12).all():
        r = float(np.corrcoef(within[x], within[y])[0, 1])
        half = stats.norm.ppf(0.975) / np.sqrt(freedom - 1)
        p = 2 * stats.t.sf(abs(r) * np.sqrt(freedom / max(1 - r * r, 1e-12)), freedom)
        rows[1] = ("within cells", r, *np.tanh(np.arctanh(r) + [-half, half]), p)
        rows[2] = ("mixed model", *_mixed(table[x] / spread[x], table[y] / spread[y], grouped.ngroup()))
    return pd.DataFrame(rows, columns=["reading", "r", "low", "high", "p"]).assign(n=len(table))


def _mixed(x: pd.Series, y: pd.Series, cells: pd.Series) -> tuple[float, ...]:
    """Slope, interval and p-value of y on x, with a random intercept for each cell."""
    model = MixedLM(y.to_numpy(), np.column_stack([np.ones(len(x)), x - x.mean()]), groups=cells.to_numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cells that do not differ are an answer too; convergence is checked below
        # by values, not gradients: those run to the boundary, where cells do not differ, and stay there
        fitted = model.fit(reml=True, method="powell")
        found = float(fitted.fe_params[1]), *map(float, fitted.conf_int()[1]), float(fitted.pvalues[1])
    return found if fitted.converged and np.isfinite(found).all() else (np.nan,) * 4
