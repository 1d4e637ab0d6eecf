"""The linear probe: can the forgotten class still be read off the features?"""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def probe_accuracy(
  train_features: np.ndarray,
  train_labels: np.ndarray,
  test_features: np.ndarray,
  test_labels: np.ndarray,
) -> np.ndarray:
  """Freeze the features, refit a linear head on all training data, and return each class's test accuracy.

  A class that the features have lost is hard for any new head. Compare with the same probe of a model retrained without
  the class: features learn to tell apart classes that they never saw, so a probe near 100 % alone proves nothing.

  Args:
    train_features: (N, F) floats. train_labels: (N,) integers in [0, C), the forgotten classes included.
    test_features: (M, F). test_labels: (M,).

  Returns:
    (C,) accuracies in [0, 1]; NaN for a class without test examples.
  """
  probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200, tol=1e-3))
  probe.fit(np.asarray(train_features), np.asarray(train_labels))
  right = probe.predict(np.asarray(test_features)) == test_labels
  num_classes = int(np.max(train_labels)) + 1
  counts = np.bincount(test_labels, minlength=num_classes)
  with np.errstate(invalid="ignore"):
    return np.bincount(test_labels, weights=right, minlength=num_classes) / counts
