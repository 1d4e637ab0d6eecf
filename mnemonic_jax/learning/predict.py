"""What judges foresee: A_R and E_F on data, from their margins before and after a forgetting."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

_LEAST, _MOST = 0.005, 0.995  # accuracies that some fifty examples can tell
_STEPS = 128  # of each of two searches for the scale
_RANGE = 100.0  # by how much the scale may differ from the mean size of margins
_CALIBRATED = 0.1  # how far judges may be from the accuracy that was measured, without offsets


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
  """Find how far a margin is from sure: t with which the model before forgetting is told best.

      minimise sum_j weights_j (Phi(before_j / t) - accuracy_j)^2

  over the judges of all classes.

  Args:
    before: (C, J) margins.
    weights: (C, J), shares of each class; accuracy: (C, J), those that the pass over data found.

  Returns:
    t, a positive scalar within a factor of 100 of the mean size of a margin.
  """
  size = jnp.sum(weights * jnp.abs(before)) / jnp.maximum(jnp.sum(weights), 1e-30)
  middle = jnp.log(jnp.maximum(size, jnp.finfo(before.dtype).tiny * _RANGE))
  wanted = jnp.clip(accuracy, _LEAST, _MOST)

  def best(low: jax.Array, high: jax.Array) -> jax.Array:
    """The best of some scales between two, all of them logarithms."""
    tried = jnp.linspace(low, high, _STEPS)
    off = lambda t: jnp.sum(weights * jnp.square(_normal(before / jnp.exp(t)) - wanted))
    return tried[jnp.argmin(jax.lax.map(off, tried))]

  reach = jnp.log(_RANGE)
  step = 2 * reach / (_STEPS - 1)
  found = best(middle - reach, middle + reach)
  return jnp.exp(best(found - step, found + step))


def _normal(x: jax.Array) -> jax.Array:
  return jax.scipy.stats.norm.cdf(x)


def calibrated(before: jax.Array, weights: jax.Array, accuracy: jax.Array) -> jax.Array:
  """Tell whether judges with their t alone give the accuracy that was measured, within 10 points.

  Where most of them are classified wrong, what they foresee means nothing.

  Args:
    before, weights, accuracy: as `scale` takes them.

  Returns:
    () bool.

  >>> ones = jnp.ones((2, 1))
  >>> bool(calibrated(ones, ones, 0.9 * ones)), bool(calibrated(-ones, ones, 0.9 * ones))
  (True, False)
  """
  right = _normal(before / scale(before, weights, accuracy))
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

      right_c = sum_j weights[c, j] Phi(after[c, j] / t + offset[c, j])
      A_R = mean of right_c over the kept classes,   E_F = mean of 1 - right_c over the forgotten

  with t from `scale`, and the offset such that the model before forgetting gets each judge's
  accuracy: offset = Phi^-1(accuracy) - before / t.

  Edge cases:
    accuracies count as 0.005 at least and 0.995 at most: fifty examples tell no more.
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
  sure = jax.scipy.stats.norm.ppf(jnp.clip(accuracy, _LEAST, _MOST))
  right = jnp.sum(weights * _normal(sure + (after - before) / t), axis=1)
  judged = jnp.sum(weights, axis=1) > 0
  kept = jnp.where(remain & judged, right, 0)
  retain_accuracy = jnp.sum(kept) / jnp.sum(remain & judged)
  wrong = jnp.where(judged, 1 - right, jnp.nan)
  forget_error = jnp.sum(jnp.where(forget, wrong, 0)) / jnp.sum(forget)
  return Predicted(retain_accuracy, forget_error, wrong)
