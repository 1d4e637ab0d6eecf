"""Boundary Shrink: give each forgotten example the class that lies behind the nearest boundary."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax import _functions, losses
from mnemonic_jax.rivals import descent, model
from mnemonic_jax.rivals.protocol import Reads, Rival
from mnemonic_jax.rivals.request import FORGOTTEN, Examples, Request

PyTree = Any

_STEP = 0.1  # times the range of the inputs


def forget(request: Request, state: None, classes: tuple[int, ...], rate: float) -> PyTree:
  """Fine-tune on the forgotten examples under their `nearest` labels."""
  examples = request.side(FORGOTTEN)
  labelled = examples.inputs, nearest(request, examples, classes)
  return descent.fine_tuned(request, descent.Descent(descent.cross_entropy), labelled, rate)


def nearest(request: Request, examples: Examples, classes: tuple[int, ...]) -> np.ndarray:
  """The likeliest kept class at x + eps sign(d cross-entropy / d x), (N,) int32.

  eps is a tenth of the range of the inputs, 0.1 for pictures in [0, 1].
  """
  static, arrays = _functions.split(request.logits_fn)
  eps = jnp.float32(_STEP * float(np.ptp(examples.inputs)))
  forget, _ = model.masks(request, classes)
  found = []
  for inputs, labels, mask in model.chunks(request.batch_size, *examples):
    likeliest = _behind(static, arrays, request.params, inputs, labels, forget, eps)
    found.append(np.asarray(likeliest)[mask])
  return np.concatenate(found)


@partial(jax.jit, static_argnums=0)
def _behind(
  static: Any,
  arrays: Any,
  params: PyTree,
  inputs: jax.Array,
  labels: jax.Array,
  forget: jax.Array,
  eps: jax.Array,
) -> jax.Array:
  logits = partial(static(arrays), params)
  loss = lambda x: jnp.sum(losses.softmax_cross_entropy(logits(x), labels))
  moved = inputs + (eps * jnp.sign(jax.grad(loss)(inputs))).astype(inputs.dtype)
  return jnp.argmax(jnp.where(forget, -jnp.inf, logits(moved)), axis=-1).astype(jnp.int32)


RIVAL = Rival(
  name="boundary_shrink",
  source="Chen et al. (2023), arXiv 2303.11570",
  reads=Reads(FORGOTTEN, "once, then once an epoch"),
  strengths=(3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1),
  forget_fn=forget,
  trains=True,
  reconstruction=True,
)
