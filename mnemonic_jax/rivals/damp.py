"""DAMP: take the forgotten classes' prototypes out of what every kernel reads."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from mnemonic_jax.rivals import kernels, model
from mnemonic_jax.rivals.protocol import Reads, Rival
from mnemonic_jax.rivals.request import ALL, Request

PyTree = Any

_PER_CLASS = 500  # examples that prototypes are means of


def forget(request: Request, state: None, classes: tuple[int, ...], strength: float) -> PyTree:
  """Project the kernels, one after the other in the order of the data.

      r_f = a forgotten class's prototype less its least-squares fit by the kept ones
      kernel[..., i, o] <- kernel[..., i, o] - alpha_l sum_j (Q Q^T)[i, j] kernel[..., j, o]

  with Q an orthonormal basis of the r_f, and prototypes the means of what the kernel reads of real
  examples in the model as edited so far, positions averaged. Where there are as many kept classes
  as features, the fit would be exact, and r_f is the distance from the mean of the kept prototypes.
  alpha_l = clip(strength (2 a_l - 1), 0, 1), a_l the balanced accuracy of a linear probe of
  forgotten against kept in the model as it was (fitted to every other example, measured on the
  rest). Biases stay.

  Grouped convolutions, and kernels that are read at several places, stay as they are.
  """
  found = kernels.operators(model.plan_of(request))
  inputs, labels = some(request)
  gone = np.isin(labels, classes)
  before = kernels.reads_of(request, request.params, inputs)
  params = request.params
  for operator in found:
    alpha = float(np.clip(strength * (2 * separability(before[operator.place], gone) - 1), 0, 1))
    if not alpha:
      continue
    read = kernels.reads_of(request, params, inputs)[operator.place].astype(np.float64)
    directions = kernels.basis(residuals(read, labels, classes))
    kernel, leaf = operator.kernel(), jax.tree.leaves(params)[operator.row.leaf]
    matrix = kernel.matrix(leaf).astype(np.float64)
    edited = matrix - alpha * directions @ (directions.T @ matrix)
    params = model.replaced(request, params, {operator.row.leaf: kernel.put(leaf, edited)})
  return params


def some(request: Request) -> tuple[np.ndarray, np.ndarray]:
  """At most 500 examples of each class, drawn at random."""
  inputs, labels = request.side(ALL)
  order = np.asarray(jax.random.permutation(request.key, len(labels)))
  rows = [order[labels[order] == c][:_PER_CLASS] for c in np.unique(labels)]
  chosen = order[np.isin(order, np.concatenate(rows))]
  return inputs[chosen], labels[chosen]


def residuals(read: np.ndarray, labels: np.ndarray, classes: tuple[int, ...]) -> np.ndarray:
  """r_f of what is read (N, F), (F, forgotten classes).

  >>> read = np.array([[1.0, 1.0, 2.0], [1.0, 0.0, 0.0]])
  >>> residuals(read, np.array([0, 1]), (0,)).round(6).T.tolist()
  [[0.0, 1.0, 2.0]]
  """
  means = lambda which: np.stack([read[labels == c].mean(0) for c in which], axis=1)
  kept = means(np.setdiff1d(labels, classes))
  forgotten = means(np.intersect1d(labels, classes))
  if kept.shape[1] >= len(kept):
    return forgotten - kept.mean(1, keepdims=True)
  fit, *_ = np.linalg.lstsq(kept, forgotten, rcond=None)
  return forgotten - kept @ fit


def separability(read: np.ndarray, gone: np.ndarray) -> float:
  """The balanced accuracy of a linear probe of forgotten against kept; 1/2 if it cannot be fitted.

  >>> separability(np.repeat([[0.0], [1.0]], 8, axis=0), np.repeat([False, True], 8))
  1.0
  """
  from sklearn.linear_model import LogisticRegression  # slow to import
  from sklearn.metrics import balanced_accuracy_score
  from sklearn.pipeline import make_pipeline
  from sklearn.preprocessing import StandardScaler

  fitted, tested = slice(0, None, 2), slice(1, None, 2)
  if len(np.unique(gone[fitted])) < 2 or len(np.unique(gone[tested])) < 2:
    return 0.5
  probe = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=200))
  probe.fit(read[fitted], gone[fitted])
  return float(balanced_accuracy_score(gone[tested], probe.predict(read[tested])))


RIVAL = Rival(
  name="damp",
  source="our reading of Hatami, Aalishah, Monosov (2026), arXiv 2604.15166",
  reads=Reads(ALL, "500 a class, once for each kernel and once before"),
  strengths=(0.25, 0.5, 0.75, 1.0),
  forget_fn=forget,
  reconstruction=True,
  default=1.0,
)
