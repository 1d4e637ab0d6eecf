"""ToW: one number for how near a model's accuracies are to those of a retrained one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mnemonic_jax import evaluation
from mnemonic_jax.evaluation import Predictions


class Accuracies(NamedTuple):
  """The three accuracies that ToW compares, in [0, 1]."""

  forgotten: float  # on training examples of the forgotten classes
  kept: float  # on training examples of the kept classes
  test: float  # on test examples of the kept classes


def accuracies(
  train: Predictions, test: Predictions, num_classes: int, classes: list[int]
) -> Accuracies:
  """Take the three accuracies from a model's answers.

  >>> found = Predictions(np.array([0, 1]), np.zeros(2), np.array([0, 1]))
  >>> accuracies(found, found, 2, [1])
  Accuracies(forgotten=1.0, kept=1.0, test=1.0)
  """
  seen, unseen = (evaluation.scores(x, num_classes, classes) for x in (train, test))
  return Accuracies(1 - seen.forget_error, seen.retain_accuracy, unseen.retain_accuracy)


def tow(found: Accuracies, retrained: Accuracies) -> float:
  """Compute ToW, the tug of war, in [0, 1].

      ToW = (1 - |dFA|) (1 - |dRA|) (1 - |dTA|)

  each d the difference to the retrained model's accuracy.

  Cost: a pass over the training and the test examples. Pitfalls: it looks at outputs alone, so the
  head edit gets nearly 1. Retrain gets less than 1 against a Retrain of another seed.

  >>> tow(Accuracies(0.5, 1.0, 0.8), Accuracies(0.0, 1.0, 0.8))
  0.5

  Source: Zhao et al. (2024).
  """
  differences = np.abs(np.subtract(found, retrained))
  return float(np.prod(1 - differences))
