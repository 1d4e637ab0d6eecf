"""SalUn: random labels, in the weights alone that the forgotten examples' loss depends on most."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax.rivals import descent, random_labels
from mnemonic_jax.rivals.protocol import Reads, Rival
from mnemonic_jax.rivals.request import ALL, FORGOTTEN, Request

PyTree = Any


def forget(request: Request, state: None, classes: tuple[int, ...], rate: float) -> PyTree:
  """Train with random labels where |d forget loss / d w| is at least its median over all weights.

  The gradient is that of the mean cross-entropy of the forgotten examples, in evaluation mode.
  """
  moves = salient(descent.gradient(request, request.side(FORGOTTEN)))
  return random_labels.forget(request, None, classes, rate, moves)


def salient(gradient: PyTree) -> list[jax.Array]:
  """For each leaf, where the gradient is at least its median in size.

  >>> [x.tolist() for x in salient({"a": jnp.array([3.0, -1.0]), "b": jnp.array([2.0])})]
  [[True, False], [True]]
  """
  sizes = [jnp.abs(leaf) for leaf in jax.tree.leaves(gradient)]
  median = np.median(np.concatenate([np.ravel(size) for size in sizes]))
  return [size >= median for size in sizes]


RIVAL = Rival(
  name="salun",
  source="Fan et al. (2024), arXiv 2310.12508",
  reads=Reads(ALL, "the forgotten ones once, then all once an epoch"),
  strengths=random_labels.RIVAL.strengths,
  forget_fn=forget,
  trains=True,
  reconstruction=True,
)
