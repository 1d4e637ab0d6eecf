"""The nearest class mean: can a class be told by its mean features, without any fit?"""

from __future__ import annotations

from typing import Any

import numpy as np

from mnemonic_jax.auditing.outputs import accuracy_of

_ROWS = 4096  # examples whose distances are computed at once


def nearest_mean_accuracy(
  train_features: Any,
  train_labels: Any,
  test_features: Any,
  test_labels: Any,
  *,
  num_classes: int | None = None,
) -> np.ndarray:
  """Classify by the nearest class mean, and score that per class.

  Each channel is divided by its deviation over all training examples. With m_c the mean features of
  class c's training examples, the answer is

      argmin_c |(z - m_c) / sd|^2

  Cost: one pass over the features. Pitfall: it reads less than a probe; a class can be gone from it
  and still be linearly readable. Channels that never vary count for nothing. Retrain gets a value
  far above chance, because features also group a class that they never saw.

  Args:
    train_features: (N, F) floats.
    train_labels: (N,) integers in [0, C). A class without training examples is never the answer.
    test_features: (M, F) floats.
    test_labels: (M,) integers in [0, C).
    num_classes: C; None takes the largest training label plus one.

  Returns:
    (C,) test accuracies in [0, 1]; NaN for a class without test examples.

  >>> train, test = np.array([[0.0], [2.0], [4.0], [6.0]]), np.array([[1.0], [2.9], [3.1]])
  >>> nearest_mean_accuracy(train, [0, 0, 1, 1], test, [0, 1, 1])
  array([1. , 0.5])

  Source: Mensink et al. (2013).
  """
  train, labels = np.asarray(train_features, np.float64), np.asarray(train_labels)
  count = int(np.max(labels)) + 1 if num_classes is None else num_classes
  deviations = train.std(0)
  scale = np.where(deviations > 0, 1 / np.where(deviations > 0, deviations, 1), 0)
  members = np.bincount(labels, minlength=count)
  means = np.full((count, train.shape[1]), np.inf)
  for label in np.flatnonzero(members):
    means[label] = train[labels == label].mean(0) * scale
  test = np.asarray(test_features)
  parts = [
    _nearest(test[at : at + _ROWS].astype(np.float64) * scale, means, members > 0)
    for at in range(0, len(test), _ROWS)
  ]
  return accuracy_of(np.concatenate(parts), test_labels, count)


def _nearest(points: np.ndarray, means: np.ndarray, known: np.ndarray) -> np.ndarray:
  """The class whose mean is nearest to each point; |point|^2 is the same for all."""
  means = np.where(known[:, None], means, 0)
  distances = (means**2).sum(1) - 2 * points @ means.T
  return np.where(known, distances, np.inf).argmin(1)
