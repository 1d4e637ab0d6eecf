"""How far params were moved, module by module."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

PyTree = Any

WHOLE = "whole"


def parameter_distance(before: PyTree, after: PyTree) -> dict[str, float]:
  """Measure how far params moved, relative to their length.

      |after - before|_2 / |before|_2

  for each top-level module, and for the whole tree.

  Cost: a look at each weight, in float64 on the host, one leaf at a time. Pitfall: distance is no
  forgetting. One bias that moves far hides a class, and a Retrain of another seed is as far as any
  other model, since units can be permuted; so it has no verdict.

  Edge cases:
    a module of zeros that moved: inf; that did not: 0.

  Args:
    before, after: trees of one structure and of the same shapes.

  Returns:
    {name of the module: distance}, and "whole".

  >>> parameter_distance({"a": np.array([3.0, 4.0])}, {"a": np.array([3.0, 5.0])})
  {'a': 0.2, 'whole': 0.2}
  """
  moved: dict[str, float] = {}
  length: dict[str, float] = {}
  leaves = jax.tree.leaves(after)
  for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), leaves, strict=True):
    name = jax.tree_util.keystr(path[:1], simple=True)
    old, new = np.asarray(old, np.float64), np.asarray(new, np.float64)
    for key in (name, WHOLE):
      moved[key] = moved.get(key, 0.0) + float(((new - old) ** 2).sum())
      length[key] = length.get(key, 0.0) + float((old**2).sum())
  whole = moved.pop(WHOLE)
  return {name: _ratio(moved[name], length[name]) for name in moved} | {
    WHOLE: _ratio(whole, length[WHOLE])
  }


def _ratio(moved: float, length: float) -> float:
  if not moved:
    return 0.0
  return float(np.sqrt(moved / length)) if length else float("inf")
