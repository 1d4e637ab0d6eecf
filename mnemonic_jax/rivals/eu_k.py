"""EU-k: the last k stages anew, trained on the kept examples."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mnemonic_jax import _trees
from mnemonic_jax.methods import network, relearn
from mnemonic_jax.methods.relearn import TrainFn
from mnemonic_jax.rivals import descent, model
from mnemonic_jax.rivals.protocol import Reads, Rival, layout
from mnemonic_jax.rivals.request import KEPT, NotApplicable, Request

PyTree = Any

_RATE, _WARM_UP = 0.05, 0.2
_TRANSFORM = optax.chain(
  optax.clip_by_global_norm(5.0),
  optax.add_decayed_weights(5e-4),
  optax.trace(0.9, nesterov=True),
)


def forget(request: Request, state: None, classes: tuple[int, ...], k: int) -> PyTree:
  """Put fresh weights into the last k stages, and train these alone on the kept examples.

  As `Relearn(depth=k)` beside it: the head stays as it was while the stages are trained, then the
  forgotten classes' rows are dropped; SGD with Nesterov momentum, a one-cycle rate of at most 0.05,
  weight decay 5e-4, gradient norm at most 5.
  """
  if request.fresh is None:
    raise NotApplicable("it needs freshly initialised weights, and none are given")
  if layout(request.fresh) != layout(request.params):
    raise ValueError("fresh: its structure, shapes or dtypes are not those of params.")
  found = model.network_of(request)
  _require_head(found, request, classes)
  try:
    renewed = found.stage(k, request.params)
  except ValueError as error:
    raise NotApplicable(f"k = {k}: {error}") from None
  leaves = jax.tree.leaves(request.params)
  if not any(x.ndim > 1 and bool(jnp.any(r)) for x, r in zip(leaves, renewed, strict=True)):
    raise NotApplicable(f"k = {k}: no kernel lies in the last {k} stages")
  fresh = zip(leaves, jax.tree.leaves(request.fresh), renewed, strict=True)
  start = model.replaced(
    request, request.params, {i: jnp.where(r, b, a) for i, (a, b, r) in enumerate(fresh)}
  )
  examples = tuple(request.side(KEPT))
  steps = request.epochs * descent.steps_of(request, len(examples[1]))
  rate = optax.cosine_onecycle_schedule(steps, _RATE, pct_start=_WARM_UP)
  program = descent.Descent(descent.cross_entropy, _TRANSFORM)
  learner, train_fn = descent.begin(request, start, _TRANSFORM), _train_fn(request, renewed)
  for _ in range(request.epochs):
    learner = descent.epoch(
      request, program, learner, examples, rate, moves=renewed, train_fn=train_fn
    )
  params = descent.end(request, learner)
  head = found.require_head()
  dropped = head.dropped(jax.tree.leaves(params), *model.masks(request, classes))
  return model.replaced(request, params, dropped)


def _require_head(found: network.Network, request: Request, classes: tuple[int, ...]) -> None:
  try:
    found.require_head()
    found.outline.require_margin(np.asarray(model.masks(request, classes)[1]))
  except ValueError as error:
    raise NotApplicable(str(error)) from None


def _train_fn(request: Request, renewed: list[jax.Array]) -> TrainFn | None:
  """Training mode for the stages that are learned anew alone, where the request can tell them."""
  if request.train_some is None or request.train_fn is None:
    return request.train_fn
  return request.train_some(relearn.modules(_trees.like(request.params, renewed)))


RIVAL = Rival(
  name="eu_k",
  source=(
    "Goel et al. (2022), arXiv 2201.06640. Without `train_some` all BatchNorm layers are in "
    "training mode."
  ),
  reads=Reads(KEPT, "once an epoch"),
  strengths=(1, 2),
  forget_fn=forget,
  trains=True,
)
