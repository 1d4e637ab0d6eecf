"""The linear probe: can a new linear head still tell the forgotten class from the features?"""

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
  """Fit a new linear head to frozen features of all classes and return its accuracy per class.

  If the features have lost a class, no new head can recognise it. Compare the result with the same
  probe of a model that was retrained without the class: features also separate classes that they
  never saw, so a probe near 100 % alone proves nothing.

  Args:
    train_features: (N, F) floats.
    train_labels: (N,) integers in [0, C), including the forgotten classes.
    test_features: (M, F) floats.
    test_labels: (M,) integers in [0, C).

  Returns:
    (C,) test accuracies in [0, 1]; NaN for a class without test examples.
  """
  probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200, tol=1e-3))
  probe.fit(np.asarray(train_features), np.asarray(train_labels))
  right = probe.predict(np.asarray(test_features)) == test_labels
  num_classes = int(np.max(train_labels)) + 1
  counts = np.bincount(test_labels, minlength=num_classes)
  with np.errstate(invalid="ignore"):
    return np.bincount(test_labels, weights=right, minlength=num_classes) / counts
