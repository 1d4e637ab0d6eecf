"""The questions that verdicts answer, and where in the results of the panel each value stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mnemonic_jax.auditing import tow
from mnemonic_jax.auditing.intervals import Estimate
from mnemonic_jax.auditing.verdicts import (
  BOTH,
  LOWER,
  UPPER,
  Question,
  Threshold,
  share_left,
  threshold,
  threshold_of_pairs,
)

# Results of all models by key: "before/outputs", "after/features/stage1", "before & retrained 0".
Results = Mapping[str, Any]

# Question -> the key of its result, and of the value in it.
OF_OUTPUTS = {
  Question("retain accuracy", LOWER, separates=False): ("outputs", "retain_accuracy"),
  Question("forget error", LOWER): ("outputs", "forget_error"),
  Question("worst kept class", UPPER, separates=False): ("outputs", "worst_drop"),
}
OF_ATTACKS = {
  Question("prototype attack"): ("prototype", "recovered"),
  Question("relearned from shots"): ("relearn", "shots_mean"),
  Question("relearned from kept data"): ("relearn", "kept_mean"),
  Question("membership by loss", BOTH): ("membership", "auc"),
  Question("codes as a trigger"): ("codes", "triggered"),
}
OF_PAIRS = {
  Question("routing"): "routing",
  Question("told apart from Retrain"): "separability",
}
TOW = Question("ToW", LOWER)


def single(stages: Sequence[str]) -> dict[Question, tuple[str, str]]:
  """The questions about one model, in the order of the report."""
  of_features = {
    Question(f"{title}, {name}"): (f"features/{name}", key)
    for title, key in (("probe", "probe"), ("nearest mean", "nearest_mean"))
    for name in stages
  }
  return {**OF_OUTPUTS, **of_features, **OF_ATTACKS}


def value(results: Results, subject: str, at: tuple[str, str]) -> Estimate | None:
  """One value of a model, as an estimate; None where it was not measured.

  >>> value({"after/membership": {"auc": [0.5, 0.4, 0.6]}}, "after", ("membership", "auc"))
  Estimate(value=0.5, low=0.4, high=0.6)
  """
  return estimate(results.get(f"{subject}/{at[0]}", {}).get(at[1]))


def estimate(found: Any) -> Estimate | None:
  """A plain result as an estimate: a number has no interval.

  >>> estimate(None), estimate(0.5).half_width
  (None, nan)
  """
  if found is None:
    return None
  if not isinstance(found, list):
    return Estimate(found, np.nan, np.nan)
  low, middle, high = (np.nan if x is None else x for x in (found[1], found[0], found[2]))
  return Estimate(middle, low, high)


def pair(results: Results, first: str, second: str, question: Question) -> Estimate | None:
  """What compares two models; the order of the two is that of the key, or the other."""
  if question == TOW:
    keys = [f"{name}/tow" for name in (first, second)]
    if not all(key in results for key in keys):
      return None
    named = [{part: Estimate(*x) for part, x in results[key].items()} for key in keys]
    return tow.tow(tow.Accuracies(**named[0]), tow.Accuracies(**named[1]))
  for key in (f"{first} & {second}", f"{second} & {first}"):
    if key in results:
      return estimate(results[key].get(OF_PAIRS[question]))
  return None


def thresholds(
  results: Results, stages: Sequence[str], retrained: Sequence[str]
) -> list[Threshold]:
  """Fix what passes for each question whose values are known; reads nothing of "after"."""
  fixed = []
  for question, at in single(stages).items():
    before = value(results, "before", at)
    if before is not None:
      values = [value(results, name, at) for name in retrained]
      fixed.append(threshold(question, [x for x in values if x is not None], before))
  for question in (*OF_PAIRS, TOW):
    before_pairs = [pair(results, "before", name, question) for name in retrained]
    known = [x for x in before_pairs if x is not None]
    if known and len(known) == len(retrained):
      matrix = [
        [None if a == b else pair(results, a, b, question) for b in retrained] for a in retrained
      ]
      fixed.append(threshold_of_pairs(question, matrix, known))
  return fixed


def after(
  results: Results, question: Question, stages: Sequence[str], retrained: Sequence[str]
) -> Estimate:
  """The value of the model under audit; NaN where it was not measured."""
  unknown = Estimate(np.nan, np.nan, np.nan)
  if question in (*OF_PAIRS, TOW):
    found = [pair(results, "after", name, question) for name in retrained]
    known = [x for x in found if x is not None]
    return Estimate(*np.mean(np.asarray(known), axis=0).tolist()) if known else unknown
  return value(results, "after", single(stages)[question]) or unknown


def probe_left(results: Results, stages: Sequence[str], retrained: Sequence[str]) -> float:
  """`share_left` of the probes, over all stages; NaN where features were not read."""
  of = lambda subject: [
    estimate(results.get(f"{subject}/features/{name}", {}).get("probe")) for name in stages
  ]
  rows = [of(subject) for subject in ("before", "after", *retrained)]
  if not stages or any(x is None for row in rows for x in row):
    return float("nan")
  before, now, *others = [[x.value for x in row if x is not None] for row in rows]
  return share_left(before, now, others)
