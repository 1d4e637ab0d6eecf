"""Kodge's projection: take out what the forgotten examples span and the kept ones do not."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from mnemonic_jax.rivals import kernels, model
from mnemonic_jax.rivals.protocol import Reads, Rival
from mnemonic_jax.rivals.request import ALL, FORGOTTEN, KEPT, Request

PyTree = Any

_EXAMPLES = 450  # of each side


def forget(
  request: Request, state: None, classes: tuple[int, ...], strength: tuple[float, float]
) -> PyTree:
  """Project every kernel on what is left of its inputs.

      W <- W (I - P_f (I - P_r))       P = U diag(a p_i / ((a - 1) p_i + 1)) U^T

  U and p_i = sigma_i^2 / sum sigma^2 from the SVD of what the kernel reads of kept examples (P_r)
  and of forgotten ones (P_f), in the model as it is; for a convolution those are patches.
  `strength` is (a_r, a_f).

  Grouped convolutions, and kernels that are read at several places, stay as they are.
  """
  kept_scale, forgotten_scale = strength
  found = kernels.operators(model.plan_of(request))
  kept, forgotten = (
    kernels.grams_of(request, some(request, side), min(32, request.batch_size))
    for side in (KEPT, FORGOTTEN)
  )
  leaves, new = jax.tree.leaves(request.params), {}
  for operator in found:
    kernel, leaf = operator.kernel(taps=True), leaves[operator.row.leaf]
    of_kept = projection(kept[operator.place], kept_scale)
    of_forgotten = projection(forgotten[operator.place], forgotten_scale)
    matrix = kernel.matrix(leaf).astype(np.float64)
    taken = of_forgotten @ matrix
    new[operator.row.leaf] = kernel.put(leaf, matrix - (taken - of_kept @ taken))
  return model.replaced(request, request.params, new)


def some(request: Request, side: str) -> np.ndarray:
  """At most 450 inputs of a side, drawn at random."""
  inputs = request.side(side).inputs
  order = np.asarray(jax.random.permutation(request.key, len(inputs)))
  return inputs[np.sort(order[:_EXAMPLES])]


def projection(gram: np.ndarray, scale: float) -> np.ndarray:
  """P of the sum of x x^T over what is read; 0 where all of it is 0.

  >>> projection(np.diag([3.0, 1.0]), scale=3.0).round(3).tolist()
  [[0.9, 0.0], [0.0, 0.5]]
  """
  values, vectors = np.linalg.eigh(gram)
  share = np.maximum(values, 0) / max(np.maximum(values, 0).sum(), np.finfo(float).tiny)
  importance = scale * share / ((scale - 1) * share + 1)
  found: np.ndarray = (vectors * importance) @ vectors.T
  return found


RIVAL = Rival(
  name="kodge",
  source=(
    "Kodge, Saha, Roy (2024), arXiv 2312.00761; 450 examples of each side, and all layers from the "
    "model as it is"
  ),
  reads=Reads(ALL, "450 of each side, once"),
  strengths=(
    (300.0, 3.0),
    (100.0, 3.0),
    (30.0, 3.0),
    (30.0, 30.0),
    (30.0, 300.0),
    (10.0, 300.0),
    (10.0, 3000.0),
    (3.0, 3000.0),
  ),
  forget_fn=forget,
  reconstruction=True,
)
