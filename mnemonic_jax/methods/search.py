"""Choose a method's numbers by what judges foresee."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from mnemonic_jax.learning import Predicted
from mnemonic_jax.methods.problem import Problem

PyTree = Any

ENOUGH = 0.95  # predicted E_F of every class asked for
_ALIKE = 0.99  # above it, a larger E_F is worth nothing
_DEAREST = 0.1  # predicted A_R given up against the head edit


class CannotForget(ValueError):
  """No candidate of a search forgets at a bearable price.

  Attributes:
    curve: one dict a candidate: its settings, "retain_accuracy" and "forget_error" as predicted.

  >>> raise CannotForget("quantile: none of 11 candidates ...", [])
  Traceback (most recent call last):
    ...
  mnemonic_jax.methods.search.CannotForget: quantile: none of 11 candidates ...
  """

  def __init__(self, message: str, curve: Sequence[dict[str, Any]]) -> None:
    super().__init__(message)
    self.curve = list(curve)


def require_judges(problem: Problem, setting: str) -> None:
  """Refuse a search without judges of the classes asked for."""
  if problem.judges is None:
    raise ValueError(
      f"{setting}: got None, which is searched by judges, and the codes have none. Pass the result "
      "of mnemonic_jax.learn_codes(key, logits_fn, params, batches, num_classes=C), or the number."
    )
  unjudged = np.asarray(problem.judges.weights).sum(1) == 0
  if missing := np.flatnonzero(np.asarray(problem.forget) & unjudged).tolist():
    raise ValueError(
      f"{setting}: got None, which is searched by judges, and classes {missing} have none: too few "
      "examples. Pass the number."
    )


def best(
  problem: Problem,
  name: str,
  candidates: PyTree,
  apply: Callable[[Any], PyTree],
  sizes: Any,
) -> tuple[int, dict[str, np.ndarray]]:
  """Return the candidate with the largest predicted A_R + min(E_F, 0.99), of equals the weakest.

  Args:
    name: of what is searched, for the message.
    candidates: a pytree whose leaves have a first axis of candidates.
    apply: from one of them to params.
    sizes: how strong each is; a smaller one is weaker.

  Returns:
    Its index, and the predicted curve.

  Raises:
    CannotForget: no candidate has a predicted E_F of 0.95 for every class asked for and a predicted
      A_R of at most 0.1 below that of the head edit.
  """
  edited = problem.predicted(problem.params, head_edited=True)
  if np.isnan(edited.retain_accuracy):
    raise CannotForget(
      f"{name}: judges cannot choose it: they do not give the accuracy that was measured when the "
      "codes were learned, so they foresee nothing. Learn the codes with more steps, pass the "
      "number, or use mnemonic_jax.Projection().",
      [],
    )
  found = predictions(problem, candidates, apply)
  asked = np.asarray(problem.forget)
  retain = np.nan_to_num(np.asarray(found.retain_accuracy, np.float64), nan=-1.0)
  errors = np.nan_to_num(np.asarray(found.class_error, np.float64)[:, asked], nan=0.0)
  dear = float(edited.retain_accuracy) - _DEAREST
  passes = (errors.min(1) >= ENOUGH) & (retain >= dear)
  curve = {"curve_retain_accuracy": retain, "curve_forget_error": errors.mean(1)}
  if not passes.any():
    setting = lambda i: jax.tree.map(lambda x: np.asarray(x)[i].tolist(), candidates)
    rows = [
      {"settings": setting(i), "retain_accuracy": float(a), "forget_error": float(e)}
      for i, (a, e) in enumerate(zip(retain, errors.mean(1), strict=True))
    ]
    raise CannotForget(
      f"{name}: none of {len(rows)} candidates has a predicted error of {ENOUGH:.0%} on each class "
      f"asked for and a predicted accuracy on kept classes of at least {dear:.1%}; the best error "
      f"is {errors.min(1).max():.1%}. Use mnemonic_jax.Projection(), or pass the number.",
      rows,
    )
  value = np.where(passes, retain + np.minimum(errors.mean(1), _ALIKE), -np.inf)
  among = value >= value.max() - 1e-6
  return int(np.argmin(np.where(among, sizes, np.inf))), curve


def predictions(problem: Problem, candidates: PyTree, apply: Callable[[Any], PyTree]) -> Predicted:
  """What judges foresee of each candidate, along a first axis."""
  return problem.map(lambda one: problem.predicted(apply(one)), candidates)
