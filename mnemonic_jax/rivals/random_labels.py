"""Random labels: fine-tune with the forgotten examples labelled as kept classes at random."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from mnemonic_jax.rivals import descent
from mnemonic_jax.rivals.protocol import Reads, Rival
from mnemonic_jax.rivals.request import ALL, FORGOTTEN, KEPT, Examples, Request

PyTree = Any


def forget(
  request: Request,
  state: None,
  classes: tuple[int, ...],
  rate: float,
  moves: list[Any] | None = None,
) -> PyTree:
  """Lower the mean cross-entropy of all examples, the forgotten ones under their new labels.

  `moves`: which weights are trained, for each leaf; None: all.
  """
  examples = tuple(relabelled(request, classes))
  program = descent.Descent(descent.cross_entropy)
  return descent.fine_tuned(request, program, examples, rate, moves)


def relabelled(request: Request, classes: tuple[int, ...]) -> Examples:
  """All examples; each forgotten one has a kept class as its label, drawn once."""
  kept, forgotten = request.side(KEPT), request.side(FORGOTTEN)
  others = np.setdiff1d(np.arange(request.num_classes, dtype=np.int32), classes)
  key = jax.random.fold_in(request.key, 1)
  drawn = np.asarray(jax.random.randint(key, (len(forgotten.labels),), 0, len(others)))
  labels = np.concatenate([kept.labels, others[drawn]])
  return Examples(np.concatenate([kept.inputs, forgotten.inputs]), labels)


RIVAL = Rival(
  name="random_labels",
  source="Golatkar, Achille, Soatto (2020), arXiv 1911.04933, a baseline there",
  reads=Reads(ALL, "once an epoch"),
  strengths=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3),
  forget_fn=forget,
  trains=True,
)
