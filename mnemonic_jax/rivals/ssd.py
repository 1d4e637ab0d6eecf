"""Selective synaptic dampening: shrink the weights that matter more to the forgotten class."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mnemonic_jax.fisher import diagonal_fisher
from mnemonic_jax.rivals.model import PerExampleLoss
from mnemonic_jax.rivals.protocol import Reads, Rival
from mnemonic_jax.rivals.request import ALL, FORGOTTEN, Request

PyTree = Any


def prepare(request: Request) -> PyTree:
  """I_D, the diagonal Fisher of all training data."""
  return _fisher(request, ALL)


def forget(request: Request, importance: PyTree, classes: tuple[int, ...], alpha: float) -> PyTree:
  """Dampen by I_D and I_F, the Fisher of the forgotten examples.

  w <- min(lambda I_D / I_F, 1) w   where   I_F > alpha I_D,     lambda = 1
  """
  forgotten = _fisher(request, FORGOTTEN)
  return _dampened(request.params, importance, forgotten, jnp.float32(alpha))


def _fisher(request: Request, side: str) -> PyTree:
  loss, examples = PerExampleLoss(request.logits_fn), request.side(side)
  return diagonal_fisher(loss, request.params, examples.inputs, examples.labels)


@jax.jit
def _dampened(params: PyTree, of_all: PyTree, of_forgotten: PyTree, alpha: jax.Array) -> PyTree:
  def one(leaf: jax.Array, in_all: jax.Array, in_forgotten: jax.Array) -> jax.Array:
    chosen = in_forgotten > alpha * in_all
    factor = jnp.minimum(in_all / jnp.where(chosen, in_forgotten, 1), 1)
    return jnp.where(chosen, (leaf * factor).astype(leaf.dtype), leaf)

  return jax.tree.map(one, params, of_all, of_forgotten)


RIVAL = Rival(
  name="ssd",
  source=(
    "Foster, Schoepf, Brintrup (2024), arXiv 2308.07707. Gradients are squared per example; the "
    "published code squares those of mini-batches."
  ),
  reads=Reads(FORGOTTEN, "once", prepare=ALL),
  strengths=(30.0, 10.0, 6.0, 4.0, 3.0, 2.0, 1.0, 0.5),
  prepare_fn=prepare,
  forget_fn=forget,
  default=10.0,
)
