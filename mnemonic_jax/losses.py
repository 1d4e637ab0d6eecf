"""The default loss, written so that a confident code still has a gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mnemonic_jax import _trees


def softmax_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Return the softmax cross-entropy of each example without cancellation.

  With l the logits and y the label,

      loss = softplus(logsumexp_{j != y} l_j - l_y),

  which equals logsumexp(l) - l_y but keeps its relative accuracy, and that of its gradient, when the model is sure: at
  a margin of 17 the usual form has a float32 gradient of exactly 0, this one -e^-17. For probabilities p instead of a
  label, with y the likeliest class,

      loss = logsumexp(l) - sum_j p_j l_j = softplus(logsumexp_{j != y} l_j - l_y) + sum_{j != y} p_j (l_y - l_j),

  which for a one-hot p is the loss of its label, to the bit.

  Guarantees:
    The value and the gradient have a relative error of about eps * max|l| while the margin is below 87 in float32 (708
    in float64); beyond, e^-margin leaves the normal range and both may be flushed to zero.

  Args:
    logits: (N, C), floating; computed in float32 at least.
    labels: (N,), integers in [0, C); or (N, C), floating, rows of probabilities that sum to 1.

  Returns:
    (N,) losses in nats, float32 (float64 for float64 logits).

  Raises:
    ValueError: floating labels of another shape than the logits.

  >>> logits = jnp.array([[60.0, 0.0]])
  >>> grad = jax.grad(lambda l: softmax_cross_entropy(l, jnp.array([0])).sum())(logits)
  >>> [f"{float(g):.2e}" for g in grad[0]]
  ['-8.76e-27', '8.76e-27']
  """
  logits = logits.astype(_trees.at_least_float32(logits.dtype))
  soft = jnp.issubdtype(jnp.result_type(labels), jnp.floating)
  if soft and labels.shape != logits.shape:
    raise ValueError(
      f"labels: got floating labels of shape {labels.shape} for logits {logits.shape}; expected probabilities of the "
      "shape of the logits, or integers."
    )
  own = jax.nn.one_hot(
    jnp.argmax(labels, axis=-1) if soft else labels, logits.shape[-1], dtype=bool
  )
  own_logit = jnp.sum(jnp.where(own, logits, 0), axis=-1)
  other_logits = jnp.where(own, -jnp.inf, logits)
  loss = jax.nn.softplus(jax.nn.logsumexp(other_logits, axis=-1) - own_logit)
  if not soft:
    return loss
  behind = jnp.where(own, 0, own_logit[..., None] - logits)
  return loss + jnp.sum(labels.astype(logits.dtype) * behind, axis=-1)
