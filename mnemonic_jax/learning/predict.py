"""What judges foresee: A_R and E_F on data, from their margins before and after a forgetting."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

_LEAST, _MOST = 0.005, 0.995  # accuracies that some fifty examples can tell
_FLOOR = 0.05  # of the mean spread, below which no spread counts
_CALIBRATED = 0.1  # how far judges may be from the accuracy that was measured, without offsets


def margin(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Compute the logit of the right class over the best other, (...,).

  >>> margin(jnp.array([[3.0, 1.0], [3.0, 1.0]]), jnp.array([0, 1]))
  Array([ 2., -2.], dtype=float32)

  Args:
    logits: (..., C).
    labels: (...,) integers.
  """
  classes = jnp.arange(logits.shape[-1], dtype=labels.dtype)
  own = labels[..., None] == classes.reshape((1,) * labels.ndim + classes.shape)
  best_other = jnp.max(jnp.where(own, -jnp.inf, logits), axis=-1)
  return jnp.sum(jnp.where(own, logits, 0), axis=-1) - best_other


def margins(logits: jax.Array) -> jax.Array:
  """Compute the `margin` of each judge, (C, J), from the logits (C, J, C) of a class's judges."""
  labels = jnp.arange(len(logits), dtype=jnp.int32)
  return margin(logits, jnp.broadcast_to(labels[:, None], logits.shape[:2]))


def _normal(x: jax.Array) -> jax.Array:
  return jax.scipy.stats.norm.cdf(x)


def _least_spread(weights: jax.Array, spread: jax.Array) -> jax.Array:
  """The spreads, none of them close to 0."""
  mean = jnp.sum(weights * spread) / jnp.maximum(jnp.sum(weights), 1e-30)
  return jnp.maximum(spread, jnp.maximum(_FLOOR * mean, jnp.finfo(spread.dtype).tiny))


def calibrated(
  before: jax.Array, weights: jax.Array, accuracy: jax.Array, spread: jax.Array
) -> jax.Array:
  """Tell whether judges alone give the accuracy that was measured, within 10 points.

  Where most of them are classified wrong, what they foresee means nothing.

  Args:
    before, weights, accuracy, spread: as `predict` takes them.

  Returns:
    () bool.

  >>> ones = jnp.ones((2, 1))
  >>> of = lambda margin: bool(calibrated(margin * ones, ones, 0.9 * ones, ones))
  >>> of(1.3), of(-1.3)
  (True, False)
  """
  right = _normal(before / _least_spread(weights, spread))
  gap = jnp.sum(weights * (right - accuracy)) / jnp.maximum(jnp.sum(weights), 1e-30)
  return jnp.abs(gap) <= _CALIBRATED


class Predicted(NamedTuple):
  """What judges foresee on data."""

  retain_accuracy: jax.Array  # (), A_R in [0, 1], NaN without a judge of a kept class
  forget_error: jax.Array  # (), E_F, NaN where a class to forget has no judge
  class_error: jax.Array  # (C,), of each class, NaN where it has no judge


def predict(
  before: jax.Array,
  after: jax.Array,
  weights: jax.Array,
  accuracy: jax.Array,
  spread: jax.Array,
  forget: jax.Array,
  remain: jax.Array,
) -> Predicted:
  """Predict A_R and E_F on data from the judges' margins; traceable.

      right_c = sum_j weights[c, j] Phi(sure[c, j] + (after[c, j] - before[c, j]) / spread[c, j])
      A_R = mean of right_c over the kept classes,   E_F = mean of 1 - right_c over the forgotten

  The margins of a cluster's examples are taken for normal, with the spread that the pass over data
  found, and to move with their judge's. sure = Phi^-1(accuracy) gives the model before forgetting
  each cluster's accuracy.

  Edge cases:
    accuracies count as 0.005 at least and 0.995 at most, since fifty examples tell no more; where
      the judge's own before / spread is surer, that counts.
    a class without a judge is left out of A_R. Where one is to be forgotten, E_F is NaN, and so is
    an A_R without any judge.

  Args:
    before, after: (C, J) `margins` under the params before and after forgetting.
    weights, accuracy, spread: (C, J), as in `LearnedCodes`.
    forget, remain: (C,) bool; a class may be in neither.

  >>> m, ones = jnp.array([[1.0], [1.0]]), jnp.ones((2, 1))
  >>> forget, after = jnp.array([True, False]), jnp.array([[-9.0], [1.0]])
  >>> found = predict(m, after, ones, 0.8 * ones, ones, forget, ~forget)
  >>> round(float(found.retain_accuracy), 3), round(float(found.forget_error), 3)
  (0.8, 1.0)
  """
  spread = _least_spread(weights, spread)
  sure = jax.scipy.stats.norm.ppf(jnp.clip(accuracy, _LEAST, _MOST))
  own = before / spread
  sure = jnp.where(accuracy >= _MOST, jnp.maximum(sure, own), sure)
  sure = jnp.where(accuracy <= _LEAST, jnp.minimum(sure, own), sure)
  right = jnp.sum(weights * _normal(sure + (after - before) / spread), axis=1)
  judged = jnp.sum(weights, axis=1) > 0
  kept = jnp.where(remain & judged, right, 0)
  retain_accuracy = jnp.sum(kept) / jnp.sum(remain & judged)
  wrong = jnp.where(judged, 1 - right, jnp.nan)
  forget_error = jnp.sum(jnp.where(forget, wrong, 0)) / jnp.sum(forget)
  return Predicted(retain_accuracy, forget_error, wrong)
