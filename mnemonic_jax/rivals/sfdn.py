"""SFDN: scrub by noise, the larger the less a weight matters to the kept examples."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax import _trees
from mnemonic_jax.fisher import diagonal_fisher
from mnemonic_jax.rivals import model
from mnemonic_jax.rivals.protocol import Reads, Rival
from mnemonic_jax.rivals.request import KEPT, Request

PyTree = Any

_LEAST = 1e-8  # added to F
_LARGEST, _LARGEST_IN_HEAD = 1e3, 1e2  # of 1 / F
_MORE = 10.0  # times the variance of the head and of biases
_ROW = 1e-4  # variance of the forgotten rows


def forget(request: Request, state: None, classes: tuple[int, ...], alpha: float) -> PyTree:
  """Add Gaussian noise to every weight.

      F = mean over the kept x of sum_y p(y | x) (d log p(y | x) / d w)^2
      variance = alpha min(1 / (F + 1e-8), 1e3)

  with 1e2 for the head in place of 1e3, averaged over a kernel's inputs (the last axis but one),
  10 times as large for the head and for leaves of one axis. The forgotten rows of the head become
  noise of variance 1e-4 around 0.
  """
  head, leaves = model.head_of(request), jax.tree.leaves(request.params)
  forget, _ = model.masks(request, classes)
  rows = {row.leaf: row for row in (head.kernel, head.bias) if row is not None}
  new = {}
  for index, (leaf, f) in enumerate(zip(leaves, jax.tree.leaves(fisher(request)), strict=True)):
    mean, variance = leaf, variance_of(f, alpha, index in rows)
    if index in rows:
      mean = rows[index].put(mean, forget, jnp.float32(0))
      variance = rows[index].put(variance, forget, jnp.float32(_ROW))
    key = jax.random.fold_in(request.key, index)
    noise = jnp.sqrt(variance) * jax.random.normal(key, leaf.shape)
    new[index] = mean.astype(variance.dtype) + noise
  return model.replaced(request, request.params, new)


def variance_of(fisher: jax.Array, alpha: float, in_head: bool) -> jax.Array:
  """The variance of the noise of a leaf.

  >>> variance_of(jnp.array([1.0, 0.0]), 1e-3, in_head=False)
  Array([ 0.01, 10.  ], dtype=float32)
  """
  largest = _LARGEST_IN_HEAD if in_head else _LARGEST
  variance = alpha * jnp.minimum(1 / (fisher + _LEAST), largest)
  if variance.ndim > 1:
    variance = jnp.broadcast_to(variance.mean(-2, keepdims=True), variance.shape)
  return variance * (_MORE if in_head or variance.ndim <= 1 else 1.0)


def fisher(request: Request) -> PyTree:
  """F of the kept examples: each counts once for each label, with that label's probability."""
  inputs, num_classes = request.side(KEPT).inputs, request.num_classes
  odds = jax.nn.softmax(jnp.asarray(model.logits(request, request.params, inputs)))
  weights = np.asarray(odds) / len(inputs)
  loss, total = model.PerExampleLoss(request.logits_fn), None
  for some, weight, mask in model.chunks(request.batch_size, inputs, weights):
    repeated = np.repeat(some, num_classes, axis=0)
    labels = np.tile(np.arange(num_classes, dtype=np.int32), len(some))
    weight = np.where(mask[:, None], weight, 0).reshape(-1)
    part = diagonal_fisher(loss, request.params, repeated, labels, jnp.asarray(weight))
    total = part if total is None else jax.tree.map(jnp.add, total, part)
  return _trees.like(request.params, jax.tree.leaves(total))


RIVAL = Rival(
  name="sfdn",
  source=(
    "Golatkar, Achille, Soatto (2020), arXiv 1911.04933. F takes all labels by their probability; "
    "none is drawn."
  ),
  reads=Reads(KEPT, "once, one backward pass for each label"),
  strengths=(1e-8, 3e-8, 1e-7, 3e-7, 1e-6, 3e-6, 1e-5),
  forget_fn=forget,
)
