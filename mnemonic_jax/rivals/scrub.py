"""SCRUB: a student that moves away from its teacher on the forgotten examples alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mnemonic_jax import losses
from mnemonic_jax.methods.distilling import divergence
from mnemonic_jax.rivals import descent, model
from mnemonic_jax.rivals.protocol import Reads, Rival
from mnemonic_jax.rivals.request import ALL, FORGOTTEN, KEPT, Request

PyTree = Any

_ALPHA, _GAMMA = 0.5, 1.0  # of the divergence and of the cross-entropy on kept examples


def forget(request: Request, state: None, classes: tuple[int, ...], rate: float) -> PyTree:
  """Alternate epochs of two losses, with the model as it was for the teacher.

  raise KL(teacher || student) on the forgotten examples, in the first half of the epochs
  lower 0.5 KL(teacher || student) + cross-entropy on the kept examples, in all of them
  """
  sides = []
  for examples in (request.side(FORGOTTEN), request.side(KEPT)):
    teacher = model.logits(request, request.params, examples.inputs)
    sides.append((examples.inputs, examples.labels, teacher))
  student = descent.begin(request)
  for number in range(request.epochs):
    if number < (request.epochs + 1) // 2:
      student = descent.epoch(request, descent.Descent(away), student, sides[0], rate)
    student = descent.epoch(request, descent.Descent(towards), student, sides[1], rate)
  return descent.end(request, student)


def away(
  forward: descent.Forward, params: PyTree, statistics: PyTree, batch: Any, extras: Any
) -> tuple[jax.Array, PyTree]:
  """The divergence from the teacher with its sign turned."""
  inputs, _, teacher = batch
  logits, statistics = forward(params, statistics, inputs)
  return -divergence(teacher, logits, jnp.ones(logits.shape[-1], bool)), statistics


def towards(
  forward: descent.Forward, params: PyTree, statistics: PyTree, batch: Any, extras: Any
) -> tuple[jax.Array, PyTree]:
  """The loss on kept examples."""
  inputs, labels, teacher = batch
  logits, statistics = forward(params, statistics, inputs)
  apart = divergence(teacher, logits, jnp.ones(logits.shape[-1], bool))
  wrong = jnp.mean(losses.softmax_cross_entropy(logits, labels))
  return _ALPHA * apart + _GAMMA * wrong, statistics


RIVAL = Rival(
  name="scrub",
  source="Kurmanji et al. (2023), arXiv 2302.09880",
  reads=Reads(ALL, "the kept ones once an epoch, the forgotten ones in the first half of them"),
  strengths=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3),
  forget_fn=forget,
  trains=True,
  reconstruction=True,
)
