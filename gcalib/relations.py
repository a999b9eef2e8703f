"""How two columns go together over runs: correlations, pooled and within cells, and power laws.

Runs of one data set share its level of ranking, and runs of one variant its level of cosine. A pooled correlation mixes
these differences with what happens among comparable runs, and may have the other sign (Simpson's paradox), so all
readings stand side by side.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.regression.linear_model import OLS
from statsmodels.regression.mixed_linear_model import MixedLM
from statsmodels.tools.sm_exceptions import ConvergenceWarning


def correlations(frame: pd.DataFrame, x: str, y: str, cells: str | Sequence[str], level: float = 0.95) -> pd.DataFrame:
    """Linear relation of two columns, read in three ways.

    Parameters
    ----------
    frame
        One row a run.
    cells
        Column or columns that name what comparable runs share.
    level
        Of the intervals.

    Returns
    -------
    pandas.DataFrame
        One row a reading, with `reading`, `n`, `r`, `low`, `high`, `p`:

        pooled
            Pearson's r over all runs, Fisher's interval. It takes runs for independent, which those of a cell are not.
        within cells
            Pearson's r after each cell's means are subtracted, with the degrees of freedom that this leaves.
        mixed model
            Slope of a linear model with a random intercept for each cell, both columns in units of their standard
            deviation within cells, so that it compares to r; Wald interval (REML). Nan where it does not converge.

    Raises
    ------
    ValueError
        For a column that is not there, fewer than two cells with two runs each, or a column that never changes within a
        cell.
    """
    keys = [cells] if isinstance(cells, str) else list(cells)
    missing = [name for name in (x, y, *keys) if name not in frame]
    if missing:
        raise ValueError(f"The table has no column {missing[0]!r}; it has {', '.join(map(str, frame.columns))}.")
    table = frame[[x, y, *keys]].dropna(subset=[x, y])
    grouped = table.groupby(keys, sort=False, dropna=False)
    within = table[[x, y]] - grouped[[x, y]].transform("mean")
    freedom = len(table) - grouped.ngroups - 1
    spread = np.sqrt((within**2).sum() / max(freedom, 1))
    if (grouped.size() > 1).sum() < 2 or freedom < 2 or not (spread > 1e-12).all():
        raise ValueError(f"{x!r} and {y!r} need two cells of {keys} or more in which two runs or more differ.")
    pooled = stats.pearsonr(table[x], table[y])
    span = pooled.confidence_interval(level)
    rows = [("pooled", pooled.statistic, span.low, span.high, pooled.pvalue)]
    r = float(np.corrcoef(within[x], within[y])[0, 1])
    half = stats.norm.ppf((1 + level) / 2) / np.sqrt(max(freedom - 1, 1))
    p = 2 * stats.t.sf(abs(r) * np.sqrt(freedom / max(1 - r * r, 1e-12)), freedom)
    rows.append(("within cells", r, np.tanh(np.arctanh(r) - half), np.tanh(np.arctanh(r) + half), p))
    rows.append(("mixed model", *_mixed(table[[x, y]] / spread, grouped.ngroup(), level)))
    return pd.DataFrame(rows, columns=["reading", "r", "low", "high", "p"]).assign(n=len(table))


def _mixed(table: pd.DataFrame, cells: pd.Series, level: float) -> tuple[float, float, float, float]:
    """Slope, interval and p-value of the second column on the first, with a random intercept for each cell."""
    inputs = np.column_stack([np.ones(len(table)), table.iloc[:, 0] - table.iloc[:, 0].mean()])
    model = MixedLM(table.iloc[:, 1].to_numpy(), inputs, groups=cells.to_numpy())
    with warnings.catch_warnings():
        # cells without any variance of their own are an answer too; what matters of the fit is checked below
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", RuntimeWarning)  # the root of a negative variance: no convergence
        # by values, not gradients: those run to the boundary, where cells do not differ, and stay there
        fitted = model.fit(reml=True, method="powell")
        slope, error = float(fitted.fe_params[1]), float(fitted.bse_fe[1])
    if not fitted.converged or not np.isfinite(error):
        return np.nan, np.nan, np.nan, np.nan
    half = stats.norm.ppf((1 + level) / 2) * error
    return slope, slope - half, slope + half, float(2 * stats.norm.sf(abs(slope) / error))


def power_law(frame: pd.DataFrame, x: str, y: str, by: str | Sequence[str] = (), level: float = 0.95) -> pd.DataFrame:
    """Fit y = c x^e by least squares on logarithms, for each group.

    Returns
    -------
    pandas.DataFrame
        One row a group: the columns of `by`, `n`, `factor` (c), `exponent` (e) with `low` and `high`, and `r2` of the
        logarithms.

    Raises
    ------
    ValueError
        For a value that is not above 0, or a group with fewer than three rows or one x only.

    Examples
    --------
    >>> table = pd.DataFrame({"size": [1.0, 2, 4, 8], "loss": [8.0, 4, 2, 1]})
    >>> power_law(table, "size", "loss")[["factor", "exponent", "r2"]].round(3)
       factor  exponent   r2
    0     8.0      -1.0  1.0
    """
    keys = [by] if isinstance(by, str) else list(by)
    rows = []
    for group, part in frame.groupby(keys, sort=False) if keys else [((), frame)]:
        if not (part[[x, y]] > 0).all(axis=None) or len(part) < 3 or part[x].nunique() < 2:
            raise ValueError(
                f"A power law of {y!r} on {x!r} needs three rows above 0 and two sizes{_where(keys, group)}."
            )
        logs = np.log(part[[x, y]].to_numpy(float))
        fitted = OLS(logs[:, 1], np.column_stack([np.ones(len(logs)), logs[:, 0]])).fit()
        low, high = fitted.conf_int(alpha=1 - level)[1]
        found = {"factor": np.exp(fitted.params[0]), "exponent": fitted.params[1], "low": low, "high": high}
        rows.append({**dict(zip(keys, group, strict=True)), "n": len(part), **found, "r2": fitted.rsquared})
    return pd.DataFrame(rows)


def _where(keys: Sequence[str], group: Sequence[object]) -> str:
    return "".join(f", {key} {name}" for key, name in zip(keys, group, strict=True))
