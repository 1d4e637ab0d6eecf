"""The default loss, written so that a confident code still has a gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mnemonic_jax import _trees


def softmax_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Return the softmax cross-entropy of each example without cancellation.

  With l the logits and y the label,

      loss = softplus(logsumexp_{j != y} l_j - l_y),

  which equals logsumexp(l) - l_y but keeps its relative accuracy, and that of its gradient, when
  the model is sure: at a margin of 17 the usual form has a float32 gradient of exactly 0, this one
  -e^-17. For probabilities p instead of a label, with y the likeliest class,

      loss = logsumexp(l) - sum_j p_j l_j
           = softplus(logsumexp_{j != y} l_j - l_y) + sum_{j != y} p_j (l_y - l_j),

  which for a one-hot p is the loss of its label, to the bit.

  Guarantees:
    The value and the gradient have a relative error of about eps * max|l| while the margin is
    below 87 in float32 (708 in float64). Beyond, e^-margin leaves the normal range, and both may
    become 0.

  Edge cases:
    a class with the logit -inf takes no part: its gradient is 0, and so is its share in the loss.
    If it is the label, or has a probability above 0, the loss is inf.
    where all other classes have the logit -inf, or there is one class only, the loss and its
    gradient are 0.
    labels outside [0, C) are not looked for, and their loss means nothing.

  Args:
    logits: (N, C), floating; computed in float32 at least.
    labels: (N,), integers in [0, C); or (N, C), floating, rows of probabilities that sum to 1.

  Returns:
    (N,) losses in nats, float32 (float64 for float64 logits).

  Raises:
    TypeError: labels that are neither integers nor floating numbers.
    ValueError: labels of another shape, as integers (N, 1) or an integer one-hot (N, C).

  >>> logits = jnp.array([[60.0, 0.0]])
  >>> grad = jax.grad(lambda l: softmax_cross_entropy(l, jnp.array([0])).sum())(logits)
  >>> [f"{float(g):.2e}" for g in grad[0]]
  ['-8.76e-27', '8.76e-27']
  """
  logits = logits.astype(_trees.at_least_float32(logits.dtype))
  labels = jnp.asarray(labels)
  soft = _are_probabilities(labels, logits.shape)
  label = jnp.argmax(labels, axis=-1) if soft else labels
  own = jax.nn.one_hot(label, logits.shape[-1], dtype=bool)
  own_logit = jnp.sum(jnp.where(own, logits, 0), axis=-1)
  loss = jax.nn.softplus(_logsumexp(jnp.where(own, -jnp.inf, logits)) - own_logit)
  if not soft:
    return loss
  # 0 * inf is NaN: a class without probability has no say, and a loss of inf stays what it is.
  counts = ~own & (labels != 0) & (own_logit > -jnp.inf)[..., None]
  behind = jnp.where(counts, own_logit[..., None], 0) - jnp.where(counts, logits, 0)
  return loss + jnp.sum(labels.astype(logits.dtype) * behind, axis=-1)


def _are_probabilities(labels: jax.Array, shape: tuple[int, ...]) -> bool:
  """Whether labels are rows of probabilities, not class numbers; refuses all else."""
  if jnp.issubdtype(labels.dtype, jnp.floating):
    if labels.shape != shape:
      raise ValueError(
        f"labels: got floating labels of shape {labels.shape} for logits {shape}; expected "
        "probabilities of the shape of the logits, or integers."
      )
    return True
  remedy = (
    f"expected integers of shape {shape[:-1]}: for a one-hot pass labels.argmax(-1), or "
    "labels.astype(float) as probabilities; for one column labels[:, 0]."
  )
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise TypeError(f"labels: got dtype {labels.dtype} of shape {labels.shape}; {remedy}")
  if labels.shape != shape[:-1]:
    raise ValueError(
      f"labels: got integer labels of shape {labels.shape} for logits {shape}; {remedy}"
    )
  return False


def _logsumexp(logits: jax.Array) -> jax.Array:
  """Over the last axis; where all are -inf the value is -inf and the gradient 0, not NaN."""
  some = jnp.any(logits > -jnp.inf, axis=-1)
  total = jax.nn.logsumexp(jnp.where(some[..., None], logits, 0), axis=-1)
  return jnp.where(some, total, -jnp.inf)
