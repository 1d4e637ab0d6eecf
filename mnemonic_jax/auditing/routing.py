"""Where forgotten examples go, and whether that tells a model from a retrained one."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import special
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mnemonic_jax.auditing import intervals
from mnemonic_jax.auditing.intervals import Estimate
from mnemonic_jax.evaluation import confusion_matrix

FOLDS = 5
_RESAMPLES = 200
_LOWEST = -30.0  # log probability, below which a class counts as impossible


def routes(predictions: Any, labels: Any, classes: Any, num_classes: int) -> np.ndarray:
  """Count where the examples of each forgotten class go, as shares (len(classes), C).

  Cost: none beyond the answers. Pitfall: a class may go to its look-alikes in Retrain as well, so
  a sharp distribution is no sign of anything; only the distance to Retrain's counts.

  >>> routes([2, 2, 1, 0], [0, 0, 0, 1], [0], 3)
  array([[0.        , 0.33333333, 0.66666667]])
  """
  counts = confusion_matrix(labels, predictions, num_classes)[np.asarray(classes)]
  return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def total_variation(first: Any, second: Any) -> np.ndarray:
  """The total variation distance of distributions along the last axis, in [0, 1].

      TV = 1/2 sum_c |p_c - q_c|

  Pitfall: it is positive for two models of different seeds, and for small samples.

  >>> float(total_variation([1.0, 0.0], [0.5, 0.5]))
  0.5
  """
  return np.abs(np.asarray(first, float) - np.asarray(second, float)).sum(-1) / 2


def routing_distance(
  first: Any, second: Any, labels: Any, classes: Any, num_classes: int, seed: int = 0
) -> Estimate:
  """Estimate how far apart two models send the same forgotten examples.

  The mean over the forgotten classes of the total variation distance of their routes. Its variance
  is that over bootstraps of the examples, both models on the same ones.

  Args:
    first, second: (N,) predicted classes of the two models.
    labels: (N,) true classes; only examples of `classes` count.
    classes: the forgotten classes.
    num_classes: C.

  >>> routing_distance([1, 1], [1, 2], [0, 0], [0], 3).value
  0.5
  """
  first, second, labels = (np.asarray(x) for x in (first, second, labels))

  def distance(rows: np.ndarray) -> float:
    pair = [routes(x[rows], labels[rows], classes, num_classes) for x in (first, second)]
    return float(total_variation(*pair).mean())

  value, rng = distance(np.arange(len(labels))), np.random.default_rng(seed)
  own = [np.flatnonzero(labels == label) for label in classes]
  again = [
    distance(np.concatenate([rng.choice(rows, len(rows)) for rows in own]))
    for _ in range(_RESAMPLES)
  ]
  return intervals.of_variance(value, float(np.var(again)), sum(map(len, own)))


def separability(first: Any, second: Any, classes: Any, seed: int = 0) -> Estimate:
  """Estimate how well an attack tells two models apart by their answers to forgotten examples.

  The attack sees log softmax over the kept classes only, so a forgotten logit, however low, gives
  nothing away. It is a logistic regression on these numbers and their squares, fitted on four
  fifths of the examples and scored on the rest (both answers to one example are in the same part);
  the value is the AUC of its scores on all parts.

  Cost: 5 fits on 2 N rows of 2 (C - |classes|) numbers. Pitfalls: 0.5 is what one model gets
  against itself, but two models of different seeds are told apart too, so only the distance to the
  AUC between Retrains counts. DeLong's interval takes the two answers to one example as
  independent.

  Args:
    first, second: (N, C) logits of the two models for the same forgotten examples.
    classes: the forgotten classes.

  Raises:
    ValueError: fewer examples than folds.

  >>> logits = np.random.default_rng(0).normal(size=(40, 4))
  >>> separability(logits, 3 * logits, [0]).value > 0.6
  True
  """
  first, second = np.asarray(first), np.asarray(second)
  if len(first) < FOLDS:
    raise ValueError(
      f"test: {len(first)} forgotten examples; expected at least {FOLDS}, one a fold."
    )
  seen = np.concatenate([_seen(first, classes), _seen(second, classes)])
  of_first = np.repeat([True, False], len(first))
  group = np.tile(np.random.default_rng(seed).permutation(len(first)), 2)
  scores = np.zeros(len(seen))
  for train, test in GroupKFold(FOLDS).split(seen, of_first, group):
    attack = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    scores[test] = attack.fit(seen[train], of_first[train]).decision_function(seen[test])
  return intervals.auc(scores[of_first], scores[~of_first])


def _seen(logits: np.ndarray, classes: Any) -> np.ndarray:
  """What the attack sees of each example: log probabilities of kept classes, and their squares."""
  kept = np.delete(logits.astype(np.float64), list(classes), axis=1)
  found = np.maximum(special.log_softmax(kept, axis=1), _LOWEST)
  return np.concatenate([found, found**2], axis=1)
