"""What a model answers: A_R and E_F with intervals, each class, the worst kept class."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy import special

from mnemonic_jax import evaluation
from mnemonic_jax.auditing.intervals import Estimate, wilson
from mnemonic_jax.evaluation import Predictions


@dataclasses.dataclass(frozen=True)
class OutputScores:
  """Scores of one model's answers, with 95 % intervals.

  Attributes:
    retain_accuracy: A_R, the share of right answers among examples of the kept classes.
    forget_error: E_F, the share of wrong answers among examples of the forgotten classes.
    per_class: for each class its accuracy; NaN without examples.
    worst_class: the kept class that lost most accuracy; None where there is nothing to compare.
    worst_drop: how much it lost, plus and minus half the interval of its accuracy.
  """

  retain_accuracy: Estimate
  forget_error: Estimate
  per_class: tuple[Estimate, ...]
  worst_class: int | None
  worst_drop: Estimate


def answers(logits: Any, labels: Any) -> Predictions:
  """Take what is scored from logits (N, C) on the host: predicted classes and losses.

  A logit of -inf is never predicted.

  >>> answers([[2.0, -np.inf, 1.0]], [0]).predictions
  array([0], dtype=int32)
  """
  logits, labels = np.asarray(logits), np.asarray(labels, np.int32)
  found = np.where(np.isnan(logits).any(1), -1, logits.argmax(1)).astype(np.int32)
  loss = np.logaddexp(0, -confidences(logits, labels))
  return Predictions(found, loss.astype(np.float32), labels)


def confidences(logits: Any, labels: Any) -> np.ndarray:
  """The logit log(p / (1 - p)) of the probability p that a model gives the true class, (N,).

      l_y - logsumexp_{j != y} l_j

  in float64: nothing cancels, however sure the model is.

  Args:
    logits: (N, C).
    labels: (N,) integers in [0, C).

  >>> confidences([[0.0, 0.0], [100.0, 0.0]], [0, 0])
  array([  0., 100.])

  Source: Carlini et al. (2022), section VI, "logit scaling".
  """
  logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
  rows = np.arange(len(labels))
  others = logits.copy()
  others[rows, labels] = -np.inf
  return np.asarray(logits[rows, labels] - special.logsumexp(others, axis=1))


def head_only(logits: Any, classes: Iterable[int]) -> np.ndarray:
  """The logits (N, C) of the head edit: those of `classes` are -inf, so they are never predicted.

  It is the control of every claim about outputs: it forgets them perfectly, keeps each kept class's
  order, and leaves every feature as it was. A mask of logits works for any function.

  >>> head_only([[1.0, 2.0, 0.0]], [1])
  array([[  1., -inf,   0.]])
  """
  edited = np.array(logits)
  edited[:, list(classes)] = -np.inf
  return edited


def output_scores(
  found: Predictions, num_classes: int, classes: Iterable[int], before: Predictions | None = None
) -> OutputScores:
  """Score the answers of one model.

      A_R = right examples of kept classes / examples of kept classes
      E_F = wrong examples of forgotten classes / examples of forgotten classes
      worst drop = max over kept classes of (accuracy of `before` - accuracy)

  Cost: one pass over the test examples. Pitfalls: the head edit gets E_F = 100 % and the best A_R
  for nothing, so outputs alone say nothing about features. The worst drop is a maximum: noise
  alone gives a positive one. Retrain gets E_F = 100 % and an A_R of its own training seed.

  Args:
    found: the answers.
    num_classes: C.
    classes: the forgotten classes.
    before: answers of the model before, to the same examples.

  >>> found = Predictions(np.array([0, 1, 1]), np.zeros(3), np.array([0, 1, 0]))
  >>> output_scores(found, 2, [1]).per_class[0].value
  0.5
  """
  gone = sorted(classes)
  scores = evaluation.scores(found, num_classes, gone)
  totals = np.bincount(found.labels, minlength=num_classes)
  forgotten = int(totals[gone].sum())
  kept = int(totals.sum()) - forgotten
  share = lambda ratio, total: wilson(round(ratio * total) if total else 0, total)
  per_class = tuple(map(share, scores.per_class, totals.tolist()))
  worst_class, worst_drop = None, Estimate(np.nan, np.nan, np.nan)
  if before is not None:
    drops = evaluation.scores(before, num_classes, gone).per_class - scores.per_class
    drops[gone] = np.nan
    if not np.isnan(drops).all():
      worst_class = int(np.nanargmax(drops))
      drop, half = float(drops[worst_class]), per_class[worst_class].half_width
      worst_drop = Estimate(drop, drop - half, drop + half)
  return OutputScores(
    retain_accuracy=share(scores.retain_accuracy, kept),
    forget_error=share(scores.forget_error, forgotten),
    per_class=per_class,
    worst_class=worst_class,
    worst_drop=worst_drop,
  )


def accuracy_of(predictions: Any, labels: Any, num_classes: int) -> np.ndarray:
  """The share of right answers of each class, (C,); NaN for a class without examples.

  >>> accuracy_of([0, 1, 1], [0, 0, 1], 3)
  array([0.5, 1. , nan])
  """
  predictions, labels = np.asarray(predictions), np.asarray(labels)
  right = np.bincount(labels[predictions == labels], minlength=num_classes)
  totals = np.bincount(labels, minlength=num_classes)
  return evaluation.scores_from_counts(right, totals, ()).per_class
