"""The audit of the audit: what Retrains of other seeds get decides what passes.

A threshold comes from Retrains alone, before the model under audit is looked at. Each Retrain is
also judged by the others' threshold: how many pass stands beside every verdict.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from mnemonic_jax.auditing.intervals import LEVEL, Estimate

LEAST = 3  # Retrains that a verdict needs

AS_RETRAINED = "as retrained"
NOT_AS_RETRAINED = "not as retrained"
NO_REFERENCE = "no reference"
CANNOT_TELL = "cannot tell"
NOT_MEASURED = "not measured"

_ROUNDING = 1e-9  # of a value that is the same for all

UPPER, LOWER, BOTH = "upper", "lower", "both"


@dataclasses.dataclass(frozen=True)
class Question:
  """One question of the panel.

  Attributes:
    name: what is asked.
    side: which values fail: those above a threshold ("upper"), below one ("lower"), or "both".
    separates: whether the answer means nothing where the model before would pass too.
  """

  name: str
  side: str = UPPER
  separates: bool = True


@dataclasses.dataclass(frozen=True)
class Threshold:
  """What passes, known before the model under audit is looked at.

  Attributes:
    question: what is asked.
    low, high: the values that pass, ends included; infinite on a side that passes anyway.
    retrained: the value of each Retrain.
    passed: how many of the Retrains pass by the threshold of the others; None without a threshold.
    before: the value of the model before.
  """

  question: Question
  low: float
  high: float
  retrained: tuple[float, ...]
  passed: int | None
  before: Estimate

  @property
  def exists(self) -> bool:
    """Whether there are Retrains enough."""
    return self.passed is not None


@dataclasses.dataclass(frozen=True)
class Verdict:
  """The answer to one question.

  "as retrained", "not as retrained", "cannot tell", "no reference" with fewer than three Retrains,
  or "not measured".

  Attributes:
    threshold: what passes.
    after: the value of the model under audit.
    verdict: the answer.
  """

  threshold: Threshold
  after: Estimate
  verdict: str


def limits(values: Sequence[float], noise: float, side: str) -> tuple[float, float]:
  """Return the range of values that pass, from the values of n Retrains.

      mean  +-  max(t sd sqrt(1 + 1/n), noise)

  with sd their deviation and t the 95 % quantile of Student's distribution with n - 1 degrees of
  freedom (97.5 % where both sides fail): one more Retrain would be inside with that probability, if
  their values were normal.

  Args:
    values: of two Retrains at least.
    noise: what the finite number of examples alone allows: half the width of the 95 % interval.
    side: "upper", "lower" or "both".

  >>> [round(x, 3) for x in limits([0.1, 0.2, 0.3], 0.0, "upper")]
  [-inf, 0.537]

  Source: Student's prediction interval.
  """
  count = len(values)
  level = (1 + LEVEL) / 2 if side == BOTH else LEVEL
  factor = float(stats.t.ppf(level, count - 1)) * np.sqrt(1 + 1 / count)
  half = max(float(factor * np.std(values, ddof=1)), noise)
  mean = float(np.mean(values))
  low = mean - half if side in (LOWER, BOTH) else -np.inf
  return low, mean + half if side in (UPPER, BOTH) else np.inf


def threshold(question: Question, retrained: Sequence[Estimate], before: Estimate) -> Threshold:
  """Fix what passes, for a question that asks one number of each model.

  >>> values = [Estimate(x, x - 0.01, x + 0.01) for x in (0.1, 0.2, 0.3)]
  >>> found = threshold(Question("probe"), values, Estimate(0.9, 0.8, 1.0))
  >>> round(found.high, 3), found.passed
  (0.537, 3)
  """
  values = [x.value for x in retrained]
  if len(values) < LEAST or np.isnan(values).any():
    return Threshold(question, -np.inf, np.inf, tuple(values), None, before)
  noise = _noise(retrained)
  passed = sum(
    _inside(value, limits(values[:i] + values[i + 1 :], noise, question.side))
    for i, value in enumerate(values)
  )
  low, high = limits(values, noise, question.side)
  return Threshold(question, low, high, tuple(values), passed, before)


def threshold_of_pairs(
  question: Question, pairs: Sequence[Sequence[Estimate | None]], before: Sequence[Estimate]
) -> Threshold:
  """Fix what passes, for a question that compares a model with each Retrain.

  A model's value is its mean over the Retrains, a Retrain's that over the others.

  Args:
    question: what is asked.
    pairs: (R, R), symmetric, between Retrains; its diagonal is not read.
    before: (R,), between the model before and each Retrain.

  >>> same, near = Estimate(0.0, 0.0, 0.0), Estimate(0.1, 0.0, 0.2)
  >>> pairs = [[None, near, near], [near, None, near], [near, near, None]]
  >>> threshold_of_pairs(Question("routing"), pairs, [near] * 3).passed
  3
  """
  count = len(pairs)
  value = lambda i, j: pairs[i][j].value  # type: ignore[union-attr]
  mean = lambda i, left: float(np.mean([value(i, j) for j in range(count) if j not in (i, left)]))
  values = [mean(i, i) for i in range(count)] if count > 1 else [np.nan] * count
  if count < LEAST or np.isnan(values).any():
    return Threshold(question, -np.inf, np.inf, tuple(values), None, mean_of(before))
  noise = _noise([x for i, row in enumerate(pairs) for j, x in enumerate(row) if x and i < j])
  passed = 0
  for left in range(count):
    others = [mean(i, left) for i in range(count) if i != left]
    passed += _inside(values[left], limits(others, noise, question.side))
  low, high = limits(values, noise, question.side)
  return Threshold(question, low, high, tuple(values), passed, mean_of(before))


def judge(fixed: Threshold, after: Estimate) -> Verdict:
  """Answer a question.

  "cannot tell": the model before would pass, so passing says nothing.

  >>> fixed = threshold(Question("probe"), [Estimate(0.2, 0.1, 0.3)] * 3, Estimate(0.9, 0.8, 1.0))
  >>> judge(fixed, Estimate(0.9, 0.8, 1.0)).verdict, judge(fixed, Estimate(0.25, 0, 1)).verdict
  ('not as retrained', 'as retrained')
  """
  range_of = fixed.low, fixed.high
  if np.isnan(after.value):
    verdict = NOT_MEASURED
  elif not fixed.exists:
    verdict = NO_REFERENCE
  elif not _inside(after.value, range_of):
    verdict = NOT_AS_RETRAINED
  elif fixed.question.separates and _inside(fixed.before.value, range_of):
    verdict = CANNOT_TELL
  else:
    verdict = AS_RETRAINED
  return Verdict(fixed, after, verdict)


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
  """The mean of values that are taken on the same examples, with the mean ends.

  >>> mean_of([Estimate(0.0, 0.0, 0.2), Estimate(1.0, 0.8, 1.0)])
  Estimate(value=0.5, low=0.4, high=0.6)
  """
  if not estimates:
    return Estimate(np.nan, np.nan, np.nan)
  return Estimate(*np.mean(np.asarray(estimates, float), axis=0).tolist())


def share_left(before: Any, after: Any, retrained: Any) -> float:
  """Compute how much of what a probe reads beyond Retrain is left: a stand-in for IDI.

      sum over stages of (after - Retrain)  /  sum over stages of (before - Retrain)

  with the probe's accuracy on the forgotten classes in place of mutual information, and the mean
  over Retrains: 0 is Retrain, 1 the model before. IDI itself estimates mutual information by a
  network that is trained at each stage; this is not IDI, and its numbers do not compare.

  Pitfall: where a probe reads no more before than of Retrain, the ratio is noise.

  Args:
    before, after: (S,) accuracies by stage.
    retrained: (R, S).

  Returns:
    The ratio, NaN without Retrains or where the denominator is not positive.

  >>> round(share_left([0.8, 0.9], [0.7, 0.9], [[0.5, 0.6], [0.7, 0.6]]), 3)
  0.8

  Source: this project, after Jeon et al. (2024), equation of IDI.
  """
  retrained = np.asarray(retrained, float)
  if not len(retrained):
    return float("nan")
  reference = retrained.mean(0)
  whole = float((np.asarray(before) - reference).sum())
  return float((np.asarray(after) - reference).sum() / whole) if whole > 0 else float("nan")


def _noise(estimates: Sequence[Estimate]) -> float:
  """The mean half width; none where there is no interval."""
  widths = [x.half_width for x in estimates]
  return float(np.nan_to_num(np.mean(widths)))


def _inside(value: float, range_of: tuple[float, float]) -> bool:
  return bool(range_of[0] - _ROUNDING <= value <= range_of[1] + _ROUNDING)
