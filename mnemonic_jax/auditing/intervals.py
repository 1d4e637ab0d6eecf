"""Intervals of what is counted on a finite number of examples: shares, and areas under a ROC."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95
_ROUNDING = 1e-12  # of a variance that is 0


class Estimate(NamedTuple):
  """A value in [0, 1] and its interval; all three are NaN where nothing was counted."""

  value: float
  low: float
  high: float

  @property
  def half_width(self) -> float:
    """The larger distance from the value to an end of the interval."""
    return max(self.high - self.value, self.value - self.low)


def wilson(right: float, total: float, level: float = LEVEL) -> Estimate:
  """Estimate a share by the Wilson score interval.

      (p + z^2 / 2n  +-  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

  with p = right / total, n = total, and z the normal quantile of the level.

  Cost: none. Pitfall: examples count as independent draws. Two models scored on the same examples
  differ by less than their intervals suggest.

  Edge cases:
    no examples: NaN. All right, or none: the interval still has a width.

  Args:
    right: how many are right; not negative, need not be whole.
    total: of how many.
    level: the probability to cover the true share.

  >>> [round(x, 3) for x in wilson(90, 100)]
  [0.9, 0.826, 0.945]

  Source: Wilson (1927).
  """
  if not total:
    return Estimate(np.nan, np.nan, np.nan)
  z2 = float(stats.norm.ppf((1 + level) / 2)) ** 2
  share = right / total
  middle = (share + z2 / (2 * total)) / (1 + z2 / total)
  spread = np.sqrt(z2 * (share * (1 - share) / total + z2 / (4 * total**2))) / (1 + z2 / total)
  low, high = min(middle - spread, share), max(middle + spread, share)
  return Estimate(float(share), max(0.0, float(low)), min(1.0, float(high)))


def of_variance(value: float, variance: float, count: float, level: float = LEVEL) -> Estimate:
  """Estimate a mean of numbers in [0, 1] from the variance of that mean.

  It is the Wilson interval of a share of n = value (1 - value) / variance examples, those that
  would give a share the same variance; n = count where the variance is 0.

  >>> of_variance(0.9, 0.9 * 0.1 / 100, 7) == wilson(90, 100)
  True

  Source: Korn and Graubard (1998), who use an effective sample size in the same way.
  """
  spread = value * (1 - value)
  effective = spread / variance if variance > _ROUNDING * spread > 0 else count
  return wilson(value * effective, effective, level)


def auc(positives: Any, negatives: Any, level: float = LEVEL) -> Estimate:
  """Estimate the area under the ROC of a score that should be larger for positives.

      AUC = P(positive > negative) + P(positive = negative) / 2

  with DeLong's variance: that of each positive's share of smaller negatives, over the number of
  positives, plus that of each negative's share of larger positives, over theirs. The interval is
  that of `of_variance`, so it has a width at 0 and 1 too.

  Cost: a sort. Pitfall: 0.5 is what a score without knowledge gets. An AUC far below it tells as
  much as one far above.

  Args:
    positives: (M,) scores; -inf and inf are scores like others.
    negatives: (N,) scores.

  Raises:
    ValueError: fewer than two scores of a kind, or NaN.

  >>> auc([1.0, 2.0, 3.0], [0.0, 1.0]).value
  0.9166666666666666

  Source: DeLong, DeLong, Clarke-Pearson (1988); Sun and Xu (2014) for the ranks.
  """
  positives, negatives = (np.asarray(x, np.float64).reshape(-1) for x in (positives, negatives))
  for name, scores in (("positives", positives), ("negatives", negatives)):
    if len(scores) < 2:
      raise ValueError(f"{name}: got {len(scores)} scores; expected two or more.")
    if np.isnan(scores).any():
      raise ValueError(f"{name}: NaN among the scores; expected numbers.")
  m, n = len(positives), len(negatives)
  ranks = stats.rankdata(np.concatenate([positives, negatives]))
  smaller = (ranks[:m] - stats.rankdata(positives)) / n
  larger = 1 - (ranks[m:] - stats.rankdata(negatives)) / m
  variance = smaller.var(ddof=1) / m + larger.var(ddof=1) / n
  return of_variance(float(smaller.mean()), float(variance), min(m, n), level)
