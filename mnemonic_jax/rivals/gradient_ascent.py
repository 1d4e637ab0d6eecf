"""Gradient ascent on the forgotten examples."""

from __future__ import annotations

from typing import Any

import jax

from mnemonic_jax.rivals import descent
from mnemonic_jax.rivals.protocol import Reads, Rival
from mnemonic_jax.rivals.request import FORGOTTEN, Request

PyTree = Any


def forget(request: Request, state: None, classes: tuple[int, ...], rate: float) -> PyTree:
  """Raise the mean cross-entropy of the forgotten examples by SGD."""
  examples = tuple(request.side(FORGOTTEN))
  return descent.fine_tuned(request, descent.Descent(raised), examples, rate)


def raised(
  forward: descent.Forward, params: PyTree, statistics: PyTree, batch: Any, extras: Any
) -> tuple[jax.Array, PyTree]:
  """The cross-entropy with its sign turned."""
  value, statistics = descent.cross_entropy(forward, params, statistics, batch, extras)
  return -value, statistics


RIVAL = Rival(
  name="gradient_ascent",
  source="Graves, Nagisetty, Ganesh (2021), arXiv 2010.10981; Thudi et al. (2022)",
  reads=Reads(FORGOTTEN, "once an epoch"),
  strengths=(3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1),
  forget_fn=forget,
  trains=True,
)
