"""LwSF: train on the codes of the kept classes alone, and the others are forgotten."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax.fisher import diagonal_fisher
from mnemonic_jax.rivals import descent, model
from mnemonic_jax.rivals.protocol import Reads, Rival
from mnemonic_jax.rivals.request import ALL, NOTHING, NotApplicable, Request

PyTree = Any

_CODES, _WEIGHTS = 10.0, 100.0
_STEPS = 100  # for each of the request's epochs
_KNOWN = 0.5  # the least accuracy on the codes of a model that was trained with them


def prepare(request: Request) -> PyTree:
  """The diagonal Fisher F of all training data."""
  loss, examples = model.PerExampleLoss(request.logits_fn), request.side(ALL)
  return diagonal_fisher(loss, request.params, examples.inputs, examples.labels)


def forget(request: Request, fisher: PyTree, classes: tuple[int, ...], rate: float) -> PyTree:
  """Take 100 steps of SGD for each epoch of the request, on the codes of the kept classes.

      minimise 10 (mean cross-entropy of the codes) + 100/2 sum_i F_i (w_i - w0_i)^2

  The model must have been trained with examples blended with the codes of their classes.
  """
  if request.codes is None:
    raise NotApplicable("the model must be trained with codes, and the request has none")
  num_classes, per_class, *shape = request.codes.shape
  labels = np.repeat(np.arange(num_classes, dtype=np.int32), per_class)
  inputs = request.codes.reshape(-1, *shape)
  right = np.argmax(model.logits(request, request.params, inputs), axis=-1) == labels
  if right.mean() < _KNOWN:
    raise NotApplicable(f"the model knows only {right.mean():.0%} of the codes: it was not trained "
                        "with them")  # fmt: skip
  kept = ~np.isin(labels, classes)
  extras = jax.tree.leaves(fisher), jax.tree.leaves(request.params)
  learner, program = descent.begin(request), descent.Descent(anchored)
  while learner.steps < _STEPS * request.epochs:
    learner = descent.epoch(
      request, program, learner, (inputs[kept], labels[kept]), rate, extras=extras
    )
  return descent.end(request, learner)


def anchored(
  forward: descent.Forward, params: PyTree, statistics: PyTree, batch: Any, extras: Any
) -> tuple[jax.Array, PyTree]:
  """The loss on codes, with weights held where the Fisher is large."""
  wrong, statistics = descent.cross_entropy(forward, params, statistics, batch, None)
  groups = zip(jax.tree.leaves(params), *extras, strict=True)
  far = sum(jnp.sum(f * jnp.square((w - w0).astype(f.dtype))) for w, f, w0 in groups)
  return _CODES * wrong + _WEIGHTS / 2 * far, statistics


RIVAL = Rival(
  name="lwsf",
  source="Shibata et al. (2021), Learning with Selective Forgetting, with EWC",
  reads=Reads(NOTHING, "codes alone", prepare=ALL),
  strengths=(1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1),
  prepare_fn=prepare,
  forget_fn=forget,
  trains=True,
  reconstruction=True,
)
