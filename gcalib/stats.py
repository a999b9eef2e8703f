"""Intervals over repeated runs: the mean over seeds, and the difference of two variants that share seeds.

Both are Student's t, exact for values (differences) that are normally distributed over seeds. With few seeds the
interval is wide, and rightly so; with one seed there is none, and its bounds are nan.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy import stats


def mean_interval(frame: pd.DataFrame, value: str, by: str | Sequence[str], level: float = 0.95) -> pd.DataFrame:
    """Mean of a column with its t-interval, for each group.

    Parameters
    ----------
    frame
        One row a run.
    value
        Column to average, such as `"test.a.full.ndcg@10"`.
    by
        Column or columns that name a group; what differs within a group (the seed) is what is averaged over.
    level
        Share of such intervals that hold the true mean.

    Returns
    -------
    pandas.DataFrame
        One row a group, in order of appearance: the columns of `by`, then `n`, `mean`, `low`, `high`.

    Raises
    ------
    ValueError
        For a column that is not there, a value that is missing, or a level outside 0..1.

    Examples
    --------
    >>> runs = pd.DataFrame({"model": ["plain"] * 3 + ["gca"], "ndcg": [0.1, 0.2, 0.3, 0.4]})
    >>> mean_interval(runs, "ndcg", "model").round(3)
       model  n  mean    low   high
    0  plain  3   0.2 -0.048  0.448
    1    gca  1   0.4    NaN    NaN
    """
    keys = _columns(by)
    _check(frame, [value, *keys], value, level)
    rows = []
    for group, part in frame.groupby(keys, sort=False, dropna=False):
        rows.append({**dict(zip(keys, group, strict=True)), **_interval(part[value].to_numpy(float), level)})
    return pd.DataFrame(rows, columns=[*keys, "n", "mean", "low", "high"])


def paired_difference(
    frame: pd.DataFrame,
    value: str,
    pair_on: str | Sequence[str],
    between: str,
    base: Any,
    by: str | Sequence[str] = (),
    level: float = 0.95,
) -> pd.DataFrame:
    """Every other variant minus the base one, paired run by run, with the t-interval of the mean difference.

    Pairing takes out what two runs of one seed share (initial weights, batches). It narrows the interval where that
    makes both rise and fall together, and widens it where they go against each other.

    Parameters
    ----------
    frame
        One row a run (and a group, with `by`).
    value
        Column to compare.
    pair_on
        Column or columns that say which runs belong together, such as `"seed"`.
    between
        Column that names the variant.
    base
        The variant that is subtracted.
    by
        Column or columns within which to compare, such as `"domain"`.
    level
        Share of such intervals that hold the true difference.

    Returns
    -------
    pandas.DataFrame
        One row a group and variant: the columns of `by`, `between`, then `n` (pairs), `mean`, `low`, `high`, and `p`,
        the two-sided p-value of no difference (paired t-test).

    Raises
    ------
    ValueError
        If a column or the base is not there, a value is missing, a run occurs twice, or a run has no partner.

    Examples
    --------
    >>> runs = pd.DataFrame({"gca": [0, 0, 0, 1, 1, 1], "seed": [0, 1, 2, 0, 1, 2], "ndcg": [1.0, 5, 9, 1.1, 5.2, 9.3]})
    >>> paired_difference(runs, "ndcg", pair_on="seed", between="gca", base=0).round(3)
       gca  n  mean    low   high      p
    0    1  3   0.2 -0.048  0.448  0.074
    """
    groups, pairs = _columns(by), _columns(pair_on)
    _check(frame, [value, between, *groups, *pairs], value, level)
    rows = []
    parts = frame.groupby(groups, sort=False, dropna=False) if groups else [((), frame)]
    for group, part in parts:
        where = "".join(f", {key} {name}" for key, name in zip(groups, group, strict=True))
        for name in part.loc[part[between] != base, between].unique():
            difference = _interval(_differences(part, value, pairs, between, name, base, where).to_numpy(float), level)
            rows.append({**dict(zip(groups, group, strict=True)), between: name, **difference})
    return pd.DataFrame(rows, columns=[*groups, between, "n", "mean", "low", "high", "p"])


def stratified_difference(
    frame: pd.DataFrame,
    value: str,
    *,
    strata: str | Sequence[str],
    pair_on: str | Sequence[str],
    between: str,
    base: Any,
    by: str | Sequence[str] = (),
    level: float = 0.95,
    variance: Literal["pooled", "own"] = "pooled",
) -> pd.DataFrame:
    """Every other variant minus the base one, averaged over strata that count alike, such as data sets.

    Within a stratum runs are paired as in `paired_difference`. The interval speaks of these strata, not of others like
    them.

    Parameters
    ----------
    strata
        Column or columns that name a stratum; those without the variant are left out, as are runs of the base that
        have no partner.
    variance
        "pooled": differences vary alike in all strata; Student's t with the degrees of freedom that their means leave.
        "own": each stratum has a variance of its own; degrees of freedom by Welch and Satterthwaite.
    frame, value, pair_on, between, base, by, level
        As in `paired_difference`.

    Returns
    -------
    pandas.DataFrame
        One row a group and variant: the columns of `by`, `between`, then `strata` (how many), `n` (pairs), `mean`,
        `low`, `high`, `p`. With one pair a stratum (with "own", in any stratum) there is no interval.

    Raises
    ------
    ValueError
        As `paired_difference`.

    Examples
    --------
    >>> runs = pd.DataFrame({"gca": [0, 0, 1, 1] * 2, "seed": [0, 1] * 4, "set": list("ppppqqqq"),
    ...                      "ndcg": [1.0, 2, 1.5, 2.7, 11, 12, 11.1, 12.3]})
    >>> stratified_difference(runs, "ndcg", strata="set", pair_on="seed", between="gca", base=0).round(3)
       gca  strata  n  mean    low   high     p
    0    1       2  4   0.4  0.096  0.704  0.03
    """
    if variance not in ("pooled", "own"):
        raise ValueError(f"variance={variance!r} is unknown; it is 'pooled' or 'own'.")
    groups, sets, pairs = _columns(by), _columns(strata), _columns(pair_on)
    _check(frame, [value, between, *groups, *sets, *pairs], value, level)
    rows = []
    for group, part in frame.groupby(groups, sort=False, dropna=False) if groups else [((), frame)]:
        for name in part.loc[part[between] != base, between].unique():
            parts = [both for _, both in part.groupby(sets, sort=False) if (both[between] == name).any()]
            found = [_differences(both, value, pairs, between, name, base, spare=True) for both in parts]
            where = {**dict(zip(groups, group, strict=True)), between: name, "strata": len(found)}
            rows.append({**where, **_averaged([one.to_numpy(float) for one in found], level, variance)})
    table = pd.DataFrame(rows, columns=[*groups, between, "strata", "n", "mean", "low", "high", "p"])
    return table.astype(dict.fromkeys(("mean", "low", "high", "p"), float))  # also where there is no row


def said(mean: float, low: float, high: float, unit: str = "%", digits: int = 1) -> str:
    """A difference with its interval, for a sentence.

    Examples
    --------
    >>> said(1.23, -0.5, 2.96), said(-0.31, -0.4, -0.2, unit="", digits=2), said(1.0, float("nan"), float("nan"))
    ('+1.2% [-0.5, +3.0]', '-0.31 [-0.40, -0.20]', '+1.0% (too few runs for an interval)')
    """
    if not np.isfinite(mean):
        return "too few runs"
    value = f"{mean:+.{digits}f}{unit}"
    if not np.isfinite([low, high]).all():
        return f"{value} (too few runs for an interval)"
    return f"{value} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _averaged(strata: Sequence[np.ndarray], level: float, variance: str) -> dict[str, float]:
    """Mean of the strata's means, bounds of its t-interval by the variance within strata, and the p-value of zero."""
    n, mean = sum(map(len, strata)), float(np.mean([part.mean() for part in strata]))
    squares = np.array([((part - part.mean()) ** 2).sum() for part in strata])
    sizes = np.array([len(part) for part in strata])
    free = sizes - 1
    if free.sum() < 1 or (variance == "own" and free.min() < 1):
        return {"n": n, "mean": mean, "low": np.nan, "high": np.nan, "p": np.nan}
    if variance == "own":
        of_means = squares / free / sizes
        total = float(of_means.sum())
        freedom = total**2 / float((of_means**2 / free).sum()) if total else float(free.sum())
    else:
        freedom = float(free.sum())
        total = float(squares.sum() / freedom * (1 / sizes).sum())
    error = np.sqrt(total) / len(strata)
    half = stats.t.ppf((1 + level) / 2, freedom) * error
    p = 2 * stats.t.sf(abs(mean) / error, freedom) if error else float(mean == 0)
    return {"n": n, "mean": mean, "low": mean - half, "high": mean + half, "p": float(p)}


def verdict(low: float, high: float, expected: Literal[1, -1] = 1) -> str:
    """What an interval says of a claimed direction.

    Parameters
    ----------
    low, high
        Bounds of the interval; nan if there is none.
    expected
        The sign that the claim gives.

    Examples
    --------
    >>> verdict(0.1, 0.3), verdict(-0.1, 0.3), verdict(0.1, 0.3, expected=-1)
    ('confirmed', 'undecided', 'refuted')
    """
    if low > 0 or high < 0:
        return "confirmed" if (low > 0) == (expected > 0) else "refuted"
    return "undecided"


def _interval(values: np.ndarray, level: float) -> dict[str, float]:
    """Mean, bounds of its t-interval, and the p-value of a mean of zero; nan where a single value decides nothing."""
    n, mean = len(values), float(values.mean())
    if n < 2:
        return {"n": n, "mean": mean, "low": np.nan, "high": np.nan, "p": np.nan}
    error = float(values.std(ddof=1)) / np.sqrt(n)
    half = stats.t.ppf((1 + level) / 2, n - 1) * error
    # values without any spread leave no doubt about their mean
    p = 2 * stats.t.sf(abs(mean) / error, n - 1) if error else float(mean == 0)
    return {"n": n, "mean": mean, "low": mean - half, "high": mean + half, "p": float(p)}


def _differences(
    runs: pd.DataFrame,
    value: str,
    pairs: list[str],
    between: str,
    name: Any,
    base: Any,
    where: str = "",
    *,
    spare: bool = False,
) -> pd.Series:
    """One variant minus the base, run by run; with `spare`, the base may have runs that nothing is compared to."""
    if not (runs[between] == base).any():
        raise ValueError(f"There is no {between} {base!r}{where}; there are {runs[between].unique().tolist()}.")
    subtracted = _by_pair(runs[runs[between] == base], pairs, value, f"{between} {base!r}{where}")
    found = _by_pair(runs[runs[between] == name], pairs, value, f"{between} {name!r}{where}")
    alone = found.index.difference(subtracted.index) if spare else found.index.symmetric_difference(subtracted.index)
    if len(alone):
        raise ValueError(
            f"Some run of {between} {name!r} has no partner in {base!r}{where}: {pairs} {alone[0]} is alone."
        )
    return (found - subtracted).dropna()


def _by_pair(runs: pd.DataFrame, pairs: list[str], value: str, where: str) -> pd.Series:
    found = runs.set_index(pairs)[value]
    if found.index.has_duplicates:
        twice = found.index[found.index.duplicated()][0]
        raise ValueError(f"{where}: {pairs} {twice} occurs twice, so it is unclear which run pairs with which.")
    return found


def _columns(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _check(frame: pd.DataFrame, columns: list[str], value: str, level: float) -> None:
    missing = [name for name in columns if name not in frame]
    if missing:
        raise ValueError(f"The table has no column {missing[0]!r}; it has {', '.join(map(str, frame.columns))}.")
    if not len(frame):
        raise ValueError(f"The table is empty, so {value!r} has no mean.")
    if not np.isfinite(frame[value].to_numpy(float)).all():
        row = frame.index[~np.isfinite(frame[value].to_numpy(float))][0]
        raise ValueError(f"{value!r} is missing or not finite in row {row}.")
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1, such as 0.95.")


def published(**where: str) -> pd.DataFrame:
    """Test figures that others published, to stand beside ours.

    Parameters
    ----------
    **where
        Columns and the value wanted in them, such as `pair="food-kitchen"`.

    Returns
    -------
    pandas.DataFrame
        `source`, `model`, `pair`, `candidates`, `domain` (a or b), `metric`, `mean`, `sd` over `runs` seeds.

    Raises
    ------
    ValueError
        If nothing was published there; the message lists what values the column has.

    Examples
    --------
    >>> published(pair="food-kitchen", metric="ndcg@10")[["domain", "mean", "sd"]]
      domain    mean      sd
    0      a  0.1971  0.0019
    1      b  0.1427  0.0023
    """
    table = pd.read_csv(Path(__file__).with_name("published.csv"))
    for column, value in where.items():
        if column not in table or value not in set(table[column]):
            has = sorted(set(table[column])) if column in table else list(table.columns)
            raise ValueError(f"No published figures for {column}={value!r}: there are {', '.join(map(str, has))}.")
        table = table[table[column] == value]
    return table.reset_index(drop=True)
