"""Learn the last stages of a trained model anew: what `Relearn` needs of the library's models."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from mnemonic_jax.methods.relearn import Relearn, renewed
from mnemonic_jax.runs.trained import Trained

STEPS = 800
_KEY = 1  # of the fresh weights; trainings draw theirs from other keys


def relearn(trained: Trained, shape: Any, depth: int, steps: int = STEPS) -> Relearn:
  """Make the method for a model of the library, the renewed modules in training mode.

  Args:
    shape: of one input.
    depth: how many stages.
  """
  model, state = trained.model, trained.model_state
  fresh, _ = model.init(jax.random.key(_KEY))
  one = jax.ShapeDtypeStruct((1, *shape), "float32")
  which = renewed(trained.logits_fn, trained.params, one, depth)
  if not jax.tree.leaves(state):
    return Relearn(depth, fresh, steps)
  names = [name for name, part in which.items() if any(map(np.any, jax.tree.leaves(part)))]
  return Relearn(
    depth,
    fresh,
    steps,
    train_fn=model.train_fn(tuple(names)),
    fold_fn=model.fold_fn(state),
    statistics=state,
  )
