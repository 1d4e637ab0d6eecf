"""Search the strength of a rival: the same way, on the same held-out split, for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from mnemonic_jax.evaluation import Scores
from mnemonic_jax.rivals.protocol import Rival, State
from mnemonic_jax.rivals.request import NotApplicable, Request

PyTree = Any

ALIKE = 0.99  # above it, a larger E_F is worth nothing


class Tried(NamedTuple):
  """One strength, and the scores that it gives on the held-out split."""

  strength: Any
  retain_accuracy: float
  forget_error: float


class Found(NamedTuple):
  """What a search has found."""

  strength: Any
  params: PyTree
  curve: tuple[Tried, ...]  # of all strengths that apply
  training_mode: bool | None  # of rivals that train: in training, or in evaluation mode


def search(
  rival: Rival,
  request: Request,
  state: State,
  classes: Iterable[int],
  score: Callable[[PyTree], Scores],
) -> Found:
  """Try a rival's strengths, and keep the one with the largest A_R + min(E_F, 0.99).

  Of equals it keeps the weakest. Params that are NaN score 0 for A_R.

  Args:
    rival: its strengths stand from the weakest to the strongest.
    request, state, classes: as `Rival.forget` takes them.
    score: params -> A_R and E_F on examples that the rival does not read.

  Raises:
    NotApplicable: no strength applies; the reason of the last.
  """
  classes, best, curve = list(classes), None, []
  reason: NotApplicable | None = None
  for strength in rival.strengths:
    try:
      params = rival.forget(request, state, classes, strength)
    except NotApplicable as error:
      reason = error
      continue
    scores = score(params)
    curve.append(Tried(strength, scores.retain_accuracy, scores.forget_error))
    value = float(np.nan_to_num(scores.retain_accuracy)) + min(
      float(np.nan_to_num(scores.forget_error)), ALIKE
    )
    if best is None or value > best[0] + 1e-9:
      best = value, strength, params
  if best is None:
    raise reason or NotApplicable(f"{rival.name} has no strength to try")
  return Found(*best[1:], tuple(curve), rival.training_mode(request))
