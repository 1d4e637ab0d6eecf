"""Head projection: take the forgotten classes' rows of the head out of the features."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from mnemonic_jax.rivals import kernels, model
from mnemonic_jax.rivals.protocol import Reads, Rival
from mnemonic_jax.rivals.request import NOTHING, Request

PyTree = Any


def forget(request: Request, state: None, classes: tuple[int, ...], strength: float) -> PyTree:
  """Project the features, folded into the head's kernel.

      features <- (I - w w^T / ||w||^2) features

  with w the head's row of the forgotten class; of several, the projection is that of their span.
  Biases stay.
  """
  head = model.head_of(request)
  kernel, leaf = kernels.head_kernel(head), jax.tree.leaves(request.params)[head.kernel.leaf]
  matrix = kernel.matrix(leaf).astype(np.float64)
  basis = kernels.basis(matrix[:, list(classes)])
  projected = matrix - strength * basis @ (basis.T @ matrix)
  return model.replaced(request, request.params, {head.kernel.leaf: kernel.put(leaf, projected)})


RIVAL = Rival(
  name="head_projection",
  source="after POUR-P (2026): the projection on the head's own rows, in closed form",
  reads=Reads(NOTHING),
  strengths=(1.0,),
  forget_fn=forget,
  reconstruction=True,
  default=1.0,
)
