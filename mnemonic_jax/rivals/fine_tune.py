"""Fine-tuning on the kept examples."""

from __future__ import annotations

from typing import Any

from mnemonic_jax.rivals import descent
from mnemonic_jax.rivals.protocol import Reads, Rival
from mnemonic_jax.rivals.request import KEPT, Request

PyTree = Any


def forget(request: Request, state: None, classes: tuple[int, ...], rate: float) -> PyTree:
  """Lower the mean cross-entropy of the kept examples by SGD, momentum 0.9."""
  examples = tuple(request.side(KEPT))
  return descent.fine_tuned(request, descent.Descent(descent.cross_entropy), examples, rate)


RIVAL = Rival(
  name="fine_tune",
  source="Golatkar, Achille, Soatto (2020), arXiv 1911.04933, a baseline there",
  reads=Reads(KEPT, "once an epoch"),
  strengths=(1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3),
  forget_fn=forget,
  trains=True,
)
