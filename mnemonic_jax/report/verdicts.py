"""Decide what counts as forgotten: class by class, from the error on test examples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mnemonic_jax.report.schema import number

ENOUGH_ERROR = 0.95  # a class counts as forgotten from this error on
WORST_FIRST = ("not forgotten", "not measured", "forgotten")


def of_error(error: float) -> str:
  """Return the verdict on one class, or on several together, from the error after a forget.

  >>> of_error(0.95), of_error(0.94), of_error(float("nan"))
  ('forgotten', 'not forgotten', 'not measured')
  """
  if math.isnan(error):
    return "not measured"
  return "forgotten" if error >= ENOUGH_ERROR else "not forgotten"


def class_errors(accuracies: Sequence[float | None], classes: Iterable[int]) -> dict[int, float]:
  """Return the error on each of `classes`, NaN for one without examples, free of rounding."""
  return {c: round(1 - number(accuracies[c]), 9) for c in sorted(classes)}


def by_name(
  accuracies: Sequence[float | None], classes: Iterable[int], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
  """Return the "verdicts" of the forget JSON, by class name.

  A name that two classes have is told apart by its index. Without test examples of a class, there
  is no evidence and no error: both are None.
  """
  verdicts = {}
  for c, error in class_errors(accuracies, classes).items():
    measured = not math.isnan(error)
    name = names[c] if list(names).count(names[c]) == 1 else f"{names[c]} ({c})"
    verdicts[name] = {
      "verdict": of_error(error),
      "evidence": "test" if measured else None,
      "error": error if measured else None,
    }
  return verdicts


def worst(verdicts: Iterable[str]) -> str:
  """Return the worst of several verdicts.

  >>> worst(["forgotten", "not measured"])
  'not measured'
  """
  return min(verdicts, key=WORST_FIRST.index)


def all_of(copies: Iterable[Mapping[str, Any]]) -> str:
  """Return the worst verdict on any class in any copy of the params."""
  return worst(one["verdict"] for copy in copies for one in copy["verdicts"].values())
