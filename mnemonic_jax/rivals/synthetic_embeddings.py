"""Synthetic embeddings: random vectors in feature space, labelled by the head, train the head."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax import losses
from mnemonic_jax.rivals import kernels, model
from mnemonic_jax.rivals.protocol import Reads, Rival
from mnemonic_jax.rivals.request import KEPT, NotApplicable, Request

PyTree = Any

_PICTURES, _PER_CLASS, _DRAWS, _STEPS = 100, 1000, 100, 100


def forget(request: Request, state: None, classes: tuple[int, ...], rate: float) -> PyTree:
  """Take 100 steps of gradient descent with the head alone.

      minimise (cross-entropy of the kept classes' vectors) - (that of the forgotten classes')

  over 1,000 random vectors of each class by the head's own answer, at most 100 draws for each.
  They are normal, with the mean and the standard deviation of what the head reads of 100 kept
  examples, or N(0, 1) where there are none. A class that no draw meets has none.
  """
  head = model.head_of(request)
  kernel, leaves = kernels.head_kernel(head), jax.tree.leaves(request.params)
  matrix = jnp.asarray(kernel.matrix(leaves[head.kernel.leaf]))
  bias = jnp.zeros(request.num_classes)
  if head.bias is not None:
    bias = head.bias.arranged(leaves[head.bias.leaf]).reshape(-1)
  mean, deviation = spread(request, len(matrix))
  vectors, labels = drawn(request.key, matrix, bias, mean, deviation)
  forget, _ = model.masks(request, classes)
  if not np.any(np.isin(labels, classes)):
    raise NotApplicable("no random vector is one of the forgotten classes to the head")
  matrix, bias = _trained(matrix, bias, vectors, labels, forget, jnp.float32(rate))
  new = {head.kernel.leaf: kernel.put(leaves[head.kernel.leaf], np.asarray(matrix))}
  if head.bias is not None:
    old = leaves[head.bias.leaf]
    shape = jax.eval_shape(head.bias.arranged, old).shape
    new[head.bias.leaf] = head.bias.restored(bias.reshape(shape)).astype(old.dtype)
  return model.replaced(request, request.params, new)


def spread(request: Request, width: int) -> tuple[np.ndarray, np.ndarray]:
  """The mean and standard deviation (F,) of what the head reads of kept examples."""
  if request.kept is None:
    return np.zeros(width, np.float32), np.ones(width, np.float32)
  planned = model.plan_of(request)
  head = model.network_of(request).require_head()
  inputs = request.side(KEPT).inputs
  order = np.asarray(jax.random.permutation(request.key, len(inputs)))[:_PICTURES]
  read = kernels.reads_of(request, request.params, inputs[order])
  features = read[kernels.place_of(planned, head.step)]
  return features.mean(0), features.std(0)


def drawn(
  key: jax.Array, matrix: jax.Array, bias: jax.Array, mean: Any, deviation: Any
) -> tuple[np.ndarray, np.ndarray]:
  """Random vectors (N, F) and the classes (N,) that the head gives them."""
  num_classes = len(bias)
  found: list[list[np.ndarray]] = [[] for _ in range(num_classes)]
  left = np.full(num_classes, _PER_CLASS)
  for number in range(_DRAWS):
    shape = _PER_CLASS * num_classes, len(matrix)
    vectors = mean + deviation * jax.random.normal(jax.random.fold_in(key, number), shape)
    answers, vectors = np.asarray(jnp.argmax(vectors @ matrix + bias, -1)), np.asarray(vectors)
    for c in np.flatnonzero(left):
      own = vectors[answers == c][: left[c]]
      found[c].append(own)
      left[c] -= len(own)
    if not left.any():
      break
  own = [np.concatenate(parts) for parts in found]
  labels = np.repeat(np.arange(num_classes, dtype=np.int32), [len(x) for x in own])
  return np.concatenate(own), labels


@jax.jit
def _trained(
  matrix: jax.Array,
  bias: jax.Array,
  vectors: jax.Array,
  labels: jax.Array,
  forget: jax.Array,
  rate: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  gone = forget[labels]

  def loss(head: tuple[jax.Array, jax.Array]) -> jax.Array:
    each = losses.softmax_cross_entropy(vectors @ head[0] + head[1], labels)
    mean = lambda side: jnp.sum(jnp.where(side, each, 0)) / jnp.maximum(jnp.sum(side), 1)
    return mean(~gone) - mean(gone)

  def step(head: Any, _: None) -> tuple[Any, None]:
    return jax.tree.map(lambda x, g: x - rate * g, head, jax.grad(loss)(head)), None

  found, _ = jax.lax.scan(step, (matrix, bias), None, length=_STEPS)
  return found


RIVAL = Rival(
  name="synthetic_embeddings",
  source="source-free class unlearning via synthetic embeddings (TMLR 2026)",
  reads=Reads(KEPT, "100 of them, once; without them none", optional=True),
  strengths=(1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0),
  forget_fn=forget,
  reconstruction=True,
)
