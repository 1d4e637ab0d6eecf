"""What judges foresee: A_R and E_F on data, from their margins before and after a forgetting."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

_HALVINGS = 40
_CALIBRATED = 0.02
_RANGE = 1e3  # by how much the scale of margins may differ from their mean size


def margins(logits: jax.Array) -> jax.Array:
  """Compute the margin of each judge, its class's logit over the best other.

  >>> margins(jnp.array([[[3.0, 1.0]], [[3.0, 1.0]]]))
  Array([[ 2.],
         [-2.]], dtype=float32)

  Args:
    logits: (C, J, C), those of the J judges of each class.

  Returns:
    (C, J).
  """
  num_classes = len(logits)
  own = jnp.eye(num_classes, dtype=bool)[:, None]
  best_other = jnp.max(jnp.where(own, -jnp.inf, logits), axis=-1)
  return jnp.sum(jnp.where(own, logits, 0), axis=-1) - best_other


def scale(before: jax.Array, weights: jax.Array, accuracy: jax.Array) -> jax.Array:
  """Find t with which the model before forgetting gets the accuracy that was measured.

      sum_j weights_j Phi(before_j / t) = sum_j weights_j accuracy_j

  over the judges of all classes.

  Args:
    before: (C, J) margins.
    weights: (C, J), shares of each class; accuracy: (C, J), those that the pass over data found.

  Returns:
    t, a positive scalar. Where no t is right, the smallest or the largest that is tried.
  """
  wanted = jnp.sum(weights * accuracy)
  size = jnp.sum(weights * jnp.abs(before)) / jnp.maximum(jnp.sum(weights), 1e-30)
  middle = jnp.log(jnp.maximum(size, jnp.finfo(before.dtype).tiny))

  def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    low, high = bounds
    between = (low + high) / 2
    expected = jnp.sum(weights * jax.scipy.stats.norm.cdf(before / jnp.exp(between)))
    too_low = expected < wanted  # a smaller t is surer of positive margins
    return jnp.where(too_low, low, between), jnp.where(too_low, between, high)

  bounds = middle - jnp.log(_RANGE), middle + jnp.log(_RANGE)
  low, high = jax.lax.fori_loop(0, _HALVINGS, halve, bounds)
  return jnp.exp((low + high) / 2)


def calibrated(before: jax.Array, weights: jax.Array, accuracy: jax.Array) -> jax.Array:
  """Tell whether judges, with their t, give the accuracy that was measured, within 2 points.

  Where most of them are classified wrong, no t is right, and what they foresee means nothing.

  Args:
    before, weights, accuracy: as `scale` takes them.

  Returns:
    () bool.

  >>> ones = jnp.ones((2, 1))
  >>> bool(calibrated(ones, ones, 0.9 * ones)), bool(calibrated(-ones, ones, 0.9 * ones))
  (True, False)
  """
  right = jax.scipy.stats.norm.cdf(before / scale(before, weights, accuracy))
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
  forget: jax.Array,
  remain: jax.Array,
) -> Predicted:
  """Predict A_R and E_F on data from the judges' margins; traceable.

      right_c = sum_j weights[c, j] Phi(after[c, j] / t)
      A_R = mean of right_c over the kept classes,   E_F = mean of 1 - right_c over the forgotten

  with t from `scale`.

  Edge cases:
    a class without a judge is left out of A_R. Where one is to be forgotten, E_F is NaN, and so is
    an A_R without any judge.

  Args:
    before, after: (C, J) `margins` under the params before and after forgetting.
    weights, accuracy: (C, J), as in `LearnedCodes`.
    forget, remain: (C,) bool; a class may be in neither.

  >>> m, ones = jnp.array([[1.0], [1.0]]), jnp.ones((2, 1))
  >>> forget = jnp.array([True, False])
  >>> found = predict(m, jnp.array([[-9.0], [1.0]]), ones, 0.8 * ones, forget, ~forget)
  >>> round(float(found.retain_accuracy), 3), round(float(found.forget_error), 3)
  (0.8, 1.0)
  """
  t = scale(before, weights, accuracy)
  right = jnp.sum(weights * jax.scipy.stats.norm.cdf(after / t), axis=1)
  judged = jnp.sum(weights, axis=1) > 0
  kept = jnp.where(remain & judged, right, 0)
  retain_accuracy = jnp.sum(kept) / jnp.sum(remain & judged)
  wrong = jnp.where(judged, 1 - right, jnp.nan)
  forget_error = jnp.sum(jnp.where(forget, wrong, 0)) / jnp.sum(forget)
  return Predicted(retain_accuracy, forget_error, wrong)
