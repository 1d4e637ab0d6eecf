"""ToW: one number for how near a model's accuracies are to those of a retrained one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mnemonic_jax import evaluation
from mnemonic_jax.auditing.intervals import Estimate, wilson
from mnemonic_jax.evaluation import Predictions


class Accuracies(NamedTuple):
  """The three accuracies that ToW compares."""

  forgotten: Estimate  # on training examples of the forgotten classes
  kept: Estimate  # on training examples of the kept classes
  test: Estimate  # on test examples of the kept classes


def accuracies(
  train: Predictions, test: Predictions, num_classes: int, classes: list[int]
) -> Accuracies:
  """Take the three accuracies from a model's answers.

  >>> found = Predictions(np.array([0, 1]), np.zeros(2), np.array([0, 1]))
  >>> [each.value for each in accuracies(found, found, 2, [1])]
  [1.0, 1.0, 1.0]
  """
  seen, unseen = (evaluation.scores(x, num_classes, classes) for x in (train, test))
  gone = [np.isin(x.labels, classes) for x in (train, test)]
  share = lambda ratio, of: wilson(round(ratio * of.sum()), int(of.sum()))
  return Accuracies(
    share(1 - seen.forget_error, gone[0]),
    share(seen.retain_accuracy, ~gone[0]),
    share(unseen.retain_accuracy, ~gone[1]),
  )


def tow(found: Accuracies, retrained: Accuracies) -> Estimate:
  """Estimate ToW, the tug of war, in [0, 1].

      ToW = (1 - |dFA|) (1 - |dRA|) (1 - |dTA|)

  each d the difference to the retrained model's accuracy. The interval adds the half widths of the
  model's three accuracies in squares.

  Cost: a pass over the training and the test examples. Pitfalls: it looks at outputs alone, so the
  head edit gets nearly 1. Retrain gets less than 1 against a Retrain of another seed.

  >>> one, none = wilson(9, 9), wilson(0, 9)
  >>> tow(Accuracies(none, one, one), Accuracies(none, one, one)).value
  1.0
  >>> tow(Accuracies(one, one, one), Accuracies(none, one, one)).value
  0.0

  Source: Zhao et al. (2024).
  """
  differences = [abs(a.value - b.value) for a, b in zip(found, retrained, strict=True)]
  value = float(np.prod(1 - np.asarray(differences)))
  half = float(np.hypot.reduce([each.half_width for each in found]))
  return Estimate(value, max(0.0, value - half), min(1.0, value + half))
