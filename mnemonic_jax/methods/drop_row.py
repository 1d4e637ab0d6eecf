"""Drop the forgotten classes' rows of the head: exact for the outputs, nothing for the features."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from mnemonic_jax import _trees
from mnemonic_jax.methods import network
from mnemonic_jax.methods.problem import Problem
from mnemonic_jax.methods.protocol import Info, method

PyTree = Any


@method
@dataclasses.dataclass(frozen=True)
class DropRow:
  """Give the forgotten classes the mean row of the kept ones, and a bias less by one.

      w_f <- mean of the kept rows        b_f <- mean of the kept biases - 1

  for every class f that is not kept, those of `forgotten` too.

  Guarantees:
    With a bias, a forgotten class's score is the mean kept score less one: it is never the largest,
    and the kept classes keep their order exactly. The head holds nothing about the class any more.
    All other leaves stay as they are; features still tell the class apart.

  Edge cases:
    a head that cannot be dropped (several heads, a cosine or text head, rows shared with an
      embedding): a ValueError that says why.
    a head without a bias: the score is the mean kept score, so it is the largest only where all
      kept ones tie (as where all features are 0) and the class stands first; with one kept class, a
      ValueError.

  >>> codes = jax.random.uniform(jax.random.key(0), (3, 1, 8))
  >>> params = {"kernel": codes[:, 0].T, "bias": jnp.zeros(3)}
  >>> model = lambda p, x: x @ p["kernel"] + p["bias"]
  >>> mj.forget(model, params, codes, [0], method=DropRow()).params["bias"]
  Array([-1.,  0.,  0.], dtype=float32)

  Source: this project; it equals the head edit that every table carries as a control.
  """

  def step(self, problem: Problem) -> tuple[PyTree, Info]:
    """Forget; `info["margin"]`: whether a forgotten class is below the kept ones for certain."""
    outline = drop_program.eval_shape(problem)[1]
    outline.require_margin(problem.remain)
    return drop_program(problem)[0], {"margin": np.bool_(outline.has_bias)}


@jax.jit
def drop_program(problem: Problem) -> tuple[PyTree, network.Outline]:
  """The params with the rows dropped."""
  leaves, treedef = _trees.flatten(problem.params)
  model = network.look(problem)
  new = model.require_head().dropped(leaves, problem.forget, problem.remain)
  return treedef.unflatten([new.get(i, leaf) for i, leaf in enumerate(leaves)]), model.outline
