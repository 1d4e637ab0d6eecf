"""Describe what a report is made of: the forget JSON, and the evidence beside it.

The tables below are the only description: `validate` checks by them. Both files may have been
edited by hand, so all that the page relies on is checked, and errors say what is wrong in words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

_REDO = (
  "The file was edited or half-written, or comes from another version; run `mnemonic forget` again "
  "to rewrite it."
)

# (name of the value in messages, value, number of classes) -> None, or a ValueError.
Check = Callable[[str, Any, int], None]


def number(value: Any) -> float:
  """Return a JSON number as a float; None, JSON's way to say "no value", is NaN."""
  return float("nan") if value is None else float(value)


def numbers(values: Any) -> np.ndarray:
  """Return a JSON list of numbers as float64, None as NaN."""
  return np.array([number(value) for value in values], np.float64)


def moving_average(report: Mapping[str, Any]) -> Mapping[str, Any] | None:
  """Return what the forget did to the moving average of the params; None where none is kept."""
  return report["copies"]["ema"] if "copies" in report else None


# ---- checks of one value


def _is(kind: type, expected: str) -> Check:
  def check(name: str, value: Any, num_classes: int) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
      raise ValueError(f"{name}: got {str(value)[:80]!r}; expected {expected}. {_REDO}")

  return check


def _or_null(check: Check) -> Check:
  return lambda name, value, num_classes: None if value is None else check(name, value, num_classes)


def _list_of(item: Check, *, one_per_class: bool = False) -> Check:
  def check(name: str, value: Any, num_classes: int) -> None:
    if not isinstance(value, (Sequence, np.ndarray)) or isinstance(value, (str, bytes)):
      raise ValueError(f"{name}: got {str(value)[:80]!r}; expected a list. {_REDO}")
    if one_per_class and len(value) != num_classes:
      raise ValueError(
        f"{name}: got {len(value)} values; expected {num_classes}, one per class. {_REDO}"
      )
    for each in value:
      item(f"an item of {name}", each, num_classes)

  return check


def _map_of(item: Check) -> Check:
  def check(name: str, value: Any, num_classes: int) -> None:
    _is(Mapping, "an object")(name, value, num_classes)
    for key, each in value.items():
      item(f"{name}[{key!r}]", each, num_classes)

  return check


def _object(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
  """Check an object by its keys; keys that no table names are left alone."""

  def check(name: str, value: Any, num_classes: int) -> None:
    _is(Mapping, "an object")(name, value, num_classes)
    if missing := [key for key in required if key not in value]:
      raise ValueError(f"{name}: {', '.join(map(repr, missing))} missing. {_REDO}")
    for key, each in {**required, **(optional or {})}.items():
      if key in value:
        each(f"{name}[{key!r}]", value[key], num_classes)

  return check


def _fraction(name: str, value: Any, num_classes: int) -> None:
  _NUMBER(name, value, num_classes)
  if not np.isnan(number(value)) and not 0.0 <= value <= 1.0:
    raise ValueError(
      f"{name}: got {value}; expected a fraction in [0, 1], or null where there are no examples. "
      f"{_REDO}"
    )


def _classes(name: str, value: Any, num_classes: int) -> None:
  _list_of(_WHOLE)(name, value, num_classes)
  if not len(value) or len(set(value)) != len(value) or min(value) < 0 or max(value) >= num_classes:
    raise ValueError(
      f"{name}: got {list(value)}; expected distinct classes in [0, {num_classes}), at least one."
    )


def _confusion(name: str, value: Any, num_classes: int) -> None:
  try:
    counts = np.asarray(value)
  except (ValueError, OverflowError):
    counts = np.empty(0)
  shape = (num_classes, num_classes)
  if counts.shape != shape or counts.dtype.kind not in "iu" or counts.min(initial=0) < 0:
    raise ValueError(
      f"{name}: expected {num_classes} rows of {num_classes} counts, none below zero. {_REDO}"
    )


def _anything(name: str, value: Any, num_classes: int) -> None:
  """Accept what the page only shows, as text."""


_TEXT = _is(str, "a string")
_WHOLE = _is(Integral, "an integer")
_NUMBER = _or_null(_is(Real, "a number, or null where there is none"))
_PER_CLASS = _list_of(_fraction, one_per_class=True)
_VERDICT = _object({"verdict": _TEXT, "evidence": _or_null(_TEXT), "error": _fraction})

# ---- the forget JSON

# What a forget did to one copy of the params. Fractions are null where there are no examples.
COPY: dict[str, Check] = {
  "method": _object({"name": _TEXT}),  # and its settings, resolved
  "info": _map_of(_anything),  # what the method says of itself
  "retain_accuracy_before": _fraction,
  "retain_accuracy_after": _fraction,
  "forget_error_before": _fraction,
  "forget_error_after": _fraction,
  "per_class_accuracy_before": _PER_CLASS,
  "per_class_accuracy_after": _PER_CLASS,
  "verdicts": _map_of(_VERDICT),  # of each class in "classes", by its name
  "seconds": _object({"compile": _NUMBER, "total": _NUMBER}),  # and the method's own
  "params_sha256_before": _TEXT,
  "params_sha256_after": _TEXT,
}
REPORT: dict[str, Check] = {
  "requested": _classes,  # of this request
  "classes": _classes,  # all asked for so far, this request included
  "class_names": _list_of(_TEXT),  # of "classes"
  "time": _or_null(_TEXT),  # UTC, ISO 8601
  "read": _object({"forget": _list_of(_TEXT), "score": _or_null(_TEXT)}),  # which data
  **COPY,
  "verdict": _TEXT,  # the worst, of any class in any copy
  "checkpoint": _TEXT,
  "codes_sha256": _TEXT,
  "versions": _map_of(_anything),
}
# What judges foresaw; null without judges.
PREDICTED = {
  "predicted": _or_null(_object({"retain_accuracy": _fraction, "forget_error": _fraction}))
}
# And a moving average of the params, where one is kept.
_OPTIONAL_REPORT = {"copies": _object({"ema": _object(COPY, PREDICTED)}), **PREDICTED}

# ---- the evidence: what the page shows beyond the forget JSON

EVIDENCE: dict[str, Check] = {
  "class_names": _list_of(_TEXT, one_per_class=True),
  "config": _TEXT,
  "dataset": _TEXT,
  "model": _TEXT,
  "num_test_examples": _WHOLE,
  # Counts of test examples: row = true class, column = predicted class.
  "confusion_before": _confusion,
  "confusion_after": _confusion,
  # Of single real examples of the forgotten classes; any list may be empty, any value huge.
  "losses": _object(
    {
      f"{split}_{when}": _list_of(_NUMBER)
      for split in ("train", "test")
      for when in ("before", "after")
    }
  ),
  # How far each parameter tensor moved.
  "layers": _list_of(
    _object(
      {
        "path": _TEXT,  # jax.tree_util.keystr(path)
        "shape": _list_of(_WHOLE),
        "size": _WHOLE,
        "norm_before": _NUMBER,  # L2
        "norm_change": _NUMBER,  # L2 of (after - before)
        "max_change": _NUMBER,  # largest |after - before|
        "share_changed": _NUMBER,  # of its weights, by more than 1 % of the tensor's RMS weight
      }
    )
  ),
  # The scores of other ways to the same end, such as a head edit.
  "controls": _list_of(
    _object({"name": _TEXT, "retain_accuracy": _fraction, "forget_error": _fraction, "note": _TEXT})
  ),
}
# Test examples whose logits are NaN, before and after; the confusions do not count them.
_OPTIONAL_EVIDENCE = {"unanswered": _map_of(_WHOLE)}


def validate(report: Mapping[str, Any], evidence: Mapping[str, Any]) -> None:
  """Refuse a report or evidence that the page cannot be made from.

  Raises:
    ValueError: a key is missing, or a value has the wrong type, length or range; the message names
      it.
  """
  _object({"class_names": _list_of(_TEXT)})("evidence", evidence, 0)
  num_classes = len(evidence["class_names"])
  _object(REPORT, _OPTIONAL_REPORT)("report", report, num_classes)
  if not set(report["requested"]) <= set(report["classes"]):
    raise ValueError(
      f"report['requested']: got {report['requested']}; expected a part of {report['classes']}."
    )
  _object(EVIDENCE, _OPTIONAL_EVIDENCE)("evidence", evidence, num_classes)
