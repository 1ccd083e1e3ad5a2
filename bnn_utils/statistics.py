"""Means and medians of independent trials, with their intervals: knows tables and numbers, no network."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats


def mean_interval(values: Any, confidence: float = 0.95) -> tuple[float, float]:
    """Return (mean, half-width of its two-sided Student t interval) of independent trials.

    Args:
        values: one number a trial.
        confidence: of the interval, in (0, 1).

    Returns:
        The half-width is NaN for a single trial, which says nothing about its spread; both are NaN if a value is.

    Source: Student, The probable error of a mean, Biometrika 6, 1908.
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return float(values.mean()) if len(values) else float("nan"), float("nan")
    with np.errstate(invalid="ignore"):
        error = values.std(ddof=1) / np.sqrt(len(values))
        return float(values.mean()), float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * error)


def bounded_interval(values: Any, confidence: float = 0.95) -> tuple[float, float]:
    """Return (centre, half-width) of an interval for the mean of values in [0, 1], such as accuracies.

    It is Student's t interval of the values and two more, a 0 and a 1. As if a failure that no trial has shown yet
    stood for those that are rarer than one in n trials, it is never narrower than about 1.4 / n, and that is what an
    interval needs by which a campaign stops: trials of rare failures all look alike until the first one fails, and
    the t interval of such trials is as narrow as it is wrong. Of many trials that differ, the two hardly matter.

    Args: as of `mean_interval`.

    Returns:
        The centre is drawn towards 1/2 by about 1 / n, well within the half-width; both are NaN without any value.

    Source: the two more are to the t interval what the two successes and failures of Agresti and Coull are to the
    binomial one (Approximate is Better than "Exact" for Interval Estimation of Binomial Proportions, The American
    Statistician 52(2), 1998). Its coverage when campaigns stop by it is simulated in the tests and in notebook 09.
    """
    values = np.asarray(values, np.float64)
    return mean_interval(np.append(values, (0.0, 1.0)) if len(values) else values, confidence)


def median_interval(values: Any, confidence: float = 0.95) -> tuple[float, float, float]:
    """Return (median, low, high): the median of independent trials and its interval, for values without a mean.

    The interval is distribution-free, from order statistics; NaN counts as infinite, so that it cannot be hidden.

    Args: as of `mean_interval`.

    Returns:
        low and high are NaN where the trials are too few for any interval.

    Source: W. J. Conover, Practical Nonparametric Statistics, 1999, section 3.2; computed by scipy's quantile_test.
    """
    values = np.asarray(values, np.float64)
    values = np.where(np.isnan(values), np.inf, values)
    interval = stats.quantile_test(values, p=0.5).confidence_interval(confidence)
    return float(np.median(values)), float(interval.low), float(interval.high)


def intervals(table: pd.DataFrame, keys: Sequence[str], value: str) -> pd.DataFrame:
    """Return mean and 95% interval of `value` over the rows that agree in `keys`, in their order of appearance.

    Args:
        table: a row a trial.
        keys: columns that tell settings apart.
        value: column of numbers.

    Returns:
        The keys, `value` (mean), its name with "_half" (half-width of the 95% interval) and trials.
    """
    rows = []
    for key, group in table.groupby(list(keys), sort=False):
        mean, half = mean_interval(group[value])
        rows.append(dict(zip(keys, key, strict=True)) | {value: mean, f"{value}_half": half, "trials": len(group)})
    return pd.DataFrame(rows)


def aggregate(table: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """Return mean and 95% interval of a campaign's trials, one row a network, data set, storage, repair, probability.

    Args:
        table: the rows of one campaign, or of several put together.
        by: more columns that tell settings apart: targets, or the file of networks that bear one name.

    Returns:
        Those five columns and `by`, trials, flips (mean number), not_finite (trials whose loss is NaN or infinite),
        loss and accuracy (means), loss_half and accuracy_half (half-widths of their 95% intervals). A mean over finite
        losses alone would hide the worst trials, so a loss that is not finite makes the mean so too; see
        `median_interval`.

    Raises:
        ValueError: two rows of one setting are of the same trial: counted twice, it would narrow the intervals.
    """
    keys = ["network", "dataset", "storage", "repair", "probability", *by]
    twice = table.duplicated([*keys, "trial", "seed"])
    if twice.any():
        row = table[twice].iloc[0]
        which = ", ".join(f"{name} {row[name]}" for name in (*keys, "trial", "seed"))
        raise ValueError(
            f"{twice.sum()} of {len(table)} rows are of trials that the table has already (the first: {which}); "
            "drop_duplicates drops rows that are there twice, and a column that tells campaigns apart, such as targets "
            'or the file of a network, is named in by=["column"]'
        )
    table = table.assign(not_finite=~np.isfinite(table["loss"]))
    means = table.groupby(keys, sort=False).agg(
        trials=("trial", "size"), flips=("flips", "mean"), not_finite=("not_finite", "sum")
    )
    for value in ("loss", "accuracy"):
        means = means.join(intervals(table, keys, value).drop(columns="trials").set_index(keys))
    return means.reset_index()
