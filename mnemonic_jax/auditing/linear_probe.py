"""The linear probe: can a new linear head still tell the forgotten class from the features?"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mnemonic_jax.auditing.outputs import accuracy_of

_TOLERANCE = 1e-5  # of every entry of the gradient of the mean loss
_MOST_STEPS = 10_000


@dataclasses.dataclass(frozen=True)
class Probe:
  """A fitted probe.

  Attributes:
    accuracy: (C,) test accuracies in [0, 1]; NaN for a class without test examples.
    converged: whether the fit ended at its tolerance. If not, the probe tells too little.
    steps: how many steps of L-BFGS it took.
  """

  accuracy: np.ndarray
  converged: bool
  steps: int


def linear_probe(
  train_features: Any,
  train_labels: Any,
  test_features: Any,
  test_labels: Any,
  *,
  num_classes: int | None = None,
  max_steps: int = _MOST_STEPS,
) -> Probe:
  """Fit a new linear head to frozen features of all classes, and score it per class.

  Softmax regression on features standardised by their training mean and deviation, fitted by L-BFGS
  to the minimum of

      mean over examples of -log softmax(W z + b)_y  +  |W|^2 / (2 n)

  which is unique. The fit stops where no entry of the gradient is above 1e-5, or where float64 has
  no lower value.

  If the features have lost a class, no new head can recognise it.

  Cost: some hundred passes over the (N, F) features in float64, and N F 8 bytes twice. Pitfalls:
  features also separate classes that they never saw, so only the distance to the same probe of a
  retrained model counts. A probe that is stopped early reads far less (published: 41 % where a
  converged one reads 73 %), which flatters the forgetting.

  Args:
    train_features: (N, F) floats.
    train_labels: (N,) integers in [0, C), including the forgotten classes.
    test_features: (M, F) floats.
    test_labels: (M,) integers in [0, C).
    num_classes: C; None takes the largest training label plus one.
    max_steps: after which the fit gives up.

  >>> corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
  >>> linear_probe(np.repeat(corners, 9, 0), np.repeat(range(3), 9), corners, [0, 1, 1]).accuracy
  array([1. , 0.5, nan])

  Source: Alain and Bengio (2016).
  """
  regression = LogisticRegression(max_iter=max_steps, tol=_TOLERANCE)
  probe = make_pipeline(StandardScaler(), regression)
  wide = lambda features: np.asarray(features, np.float64)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", ConvergenceWarning)  # `converged` tells
    probe.fit(wide(train_features), np.asarray(train_labels))
  steps = int(np.max(regression.n_iter_))
  count = int(np.max(train_labels)) + 1 if num_classes is None else num_classes
  found = probe.predict(wide(test_features))
  accuracy = accuracy_of(found, test_labels, count)
  return Probe(accuracy, steps < max_steps, steps)


def probe_accuracy(
  train_features: Any, train_labels: Any, test_features: Any, test_labels: Any
) -> np.ndarray:
  """The (C,) test accuracies of a `linear_probe` with these arguments.

  >>> corners = np.array([[0.0, 0.0], [1.0, 0.0]])
  >>> probe_accuracy(np.repeat(corners, 9, 0), np.repeat(range(2), 9), corners, [0, 1])
  array([1., 1.])
  """
  return linear_probe(train_features, train_labels, test_features, test_labels).accuracy
