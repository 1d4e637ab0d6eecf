"""What a report is made of: the forget JSON, the evidence beside it, and the checks on both.

Both come from files that may have been edited by hand, so `validate` looks at all that the page relies on and says what is
wrong in words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypedDict

import numpy as np


class Seconds(TypedDict):
  """Seconds of one forget; None where one was not measured."""

  compile: float | None
  fisher: float | None
  perturb: float | None
  total: float | None


class Copy(TypedDict):
  """What a forget did to one copy of the params, as far as the page shows it."""

  retain_accuracy_before: float | None
  retain_accuracy_after: float | None
  forget_error_before: float | None
  forget_error_after: float | None
  per_class_accuracy_before: list[float | None]  # C values
  per_class_accuracy_after: list[float | None]  # C values
  params_sha256_before: str
  params_sha256_after: str


class Report(TypedDict):
  """The JSON of a forget. Accuracies and errors are fractions in [0, 1], None or NaN where there are no examples.

  Where a moving average of the params is kept, "copies" is there too: a `Copy` for "params" and one for "ema".
  """

  requested: list[int]  # classes of this request
  classes: list[int]  # all classes asked for so far, this request included
  retain_accuracy_before: float | None
  retain_accuracy_after: float | None
  forget_error_before: float | None
  forget_error_after: float | None
  per_class_accuracy_before: list[float | None]  # C values
  per_class_accuracy_after: list[float | None]  # C values
  lambda1: float
  lambda2: float
  sign: int  # +1 or -1
  seconds: Seconds
  checkpoint: str
  codes_sha256: str
  params_sha256_before: str
  params_sha256_after: str
  versions: dict[str, str]


class Losses(TypedDict):
  """Losses of single real examples of the forgotten classes; any list may be empty, any value huge."""

  train_before: list[float]
  train_after: list[float]
  test_before: list[float]
  test_after: list[float]


class Layer(TypedDict):
  """How far one parameter tensor was moved."""

  path: str  # jax.tree_util.keystr(path)
  shape: list[int]
  size: int  # number of weights
  norm_before: float  # L2
  norm_change: float  # L2 of (after - before)
  max_change: float  # largest |after - before|
  share_changed: (
    float  # fraction of the weights that moved by more than 1 % of the tensor's RMS weight
  )


class Control(TypedDict):
  """The scores of another way to the same end, such as a head edit."""

  name: str
  retain_accuracy: float | None
  forget_error: float | None
  note: str


class Evidence(TypedDict):
  """What the page shows beyond the forget JSON.

  "unanswered" may be there too, {"before": n, "after": n}: test examples that got NaN for an answer, in no column.
  """

  class_names: list[str]  # C names
  config: str
  dataset: str
  model: str
  num_test_examples: int
  confusion_before: list[
    list[int]
  ]  # C x C counts on the test set: row = true class, column = predicted class
  confusion_after: list[list[int]]
  losses: Losses
  layers: list[Layer]
  controls: list[Control]


REPORT_KEYS = tuple(Report.__annotations__)
EVIDENCE_KEYS = tuple(Evidence.__annotations__)

_REDO = "The file was edited or half-written, or comes from another version; run `mnemonic forget` again to rewrite it."
_FRACTIONS = (
  "retain_accuracy_before",
  "retain_accuracy_after",
  "forget_error_before",
  "forget_error_after",
)
_REPORT_TEXTS = ("checkpoint", "codes_sha256", "params_sha256_before", "params_sha256_after")


def validate(report: Mapping[str, Any], evidence: Mapping[str, Any]) -> None:
  """Refuse a report or evidence that the page cannot be made from.

  Raises:
    ValueError: a key is missing, or a value has the wrong type, length or range; the message names it.
  """
  _require_keys("report", report, Report)
  _require_keys("report['seconds']", report["seconds"], Seconds)
  _require_keys("evidence", evidence, Evidence)
  _require_keys("evidence['losses']", evidence["losses"], Losses)
  num_classes = len(
    _require_list("evidence['class_names']", evidence["class_names"], None, str, "a string")
  )
  _validate_classes(report, num_classes)
  _validate_report_values(report, num_classes)
  _validate_evidence_values(evidence, num_classes)


def number(value: Any) -> float:
  """Return a JSON number as a float; None, JSON's way to say "no value", is NaN."""
  return float("nan") if value is None else float(value)


def numbers(values: Any) -> np.ndarray:
  """Return a JSON list of numbers as float64, None as NaN."""
  return np.array([number(value) for value in values], np.float64)


def moving_average(report: Mapping[str, Any]) -> Mapping[str, Any] | None:
  """Return what the forget did to the moving average of the params, a `Copy`, or None where none is kept."""
  return report["copies"]["ema"] if "copies" in report else None


def _validate_classes(report: Mapping[str, Any], num_classes: int) -> None:
  for key in ("requested", "classes"):
    name = f"report[{key!r}]"
    chosen = _require_list(name, report[key], None, Integral, "an integer")
    if (
      not chosen or len(set(chosen)) != len(chosen) or not all(0 <= c < num_classes for c in chosen)
    ):
      raise ValueError(
        f"{name}: got {list(chosen)}; expected distinct classes in [0, {num_classes}), at least one."
      )
  if not set(report["requested"]) <= set(report["classes"]):
    raise ValueError(
      f"report['requested']: got {report['requested']}; expected a part of {report['classes']}."
    )


def _validate_report_values(report: Mapping[str, Any], num_classes: int) -> None:
  for key in _FRACTIONS:
    _require_fraction(f"report[{key!r}]", report[key])
  if "copies" in report:
    _validate_average(report["copies"], num_classes)
  _validate_per_class("report", report, num_classes)
  for key in ("lambda1", "lambda2"):
    _require(f"report[{key!r}]", report[key], Real, "a number")
  if report["sign"] not in (1, -1):
    raise ValueError(f"report['sign']: got {report['sign']!r}; expected 1 or -1. {_REDO}")
  for key in Seconds.__annotations__:
    _require_number(f"report['seconds'][{key!r}]", report["seconds"][key])
  for key in _REPORT_TEXTS:
    _require(f"report[{key!r}]", report[key], str, "a string")
  _require("report['versions']", report["versions"], Mapping, "an object of name: version")


def _validate_per_class(name: str, values: Mapping[str, Any], num_classes: int) -> None:
  for key in ("per_class_accuracy_before", "per_class_accuracy_after"):
    for value in _require_list(f"{name}[{key!r}]", values[key], num_classes):
      _require_fraction(f"{name}[{key!r}]", value)


def _validate_average(copies: Any, num_classes: int) -> None:
  name = "report['copies']['ema']"
  _require("report['copies']", copies, Mapping, "an object")
  _require_keys(name, copies.get("ema"), Copy)
  for key in _FRACTIONS:
    _require_fraction(f"{name}[{key!r}]", copies["ema"][key])
  _validate_per_class(name, copies["ema"], num_classes)
  for key in ("params_sha256_before", "params_sha256_after"):
    _require(f"{name}[{key!r}]", copies["ema"][key], str, "a string")


def _validate_evidence_values(evidence: Mapping[str, Any], num_classes: int) -> None:
  for key in ("config", "dataset", "model"):
    _require(f"evidence[{key!r}]", evidence[key], str, "a string")
  _require("evidence['num_test_examples']", evidence["num_test_examples"], Integral, "an integer")
  for key in ("confusion_before", "confusion_after"):
    _require_counts(f"evidence[{key!r}]", evidence[key], num_classes)
  if "unanswered" in evidence:
    _require("evidence['unanswered']", evidence["unanswered"], Mapping, "an object")
    for name, value in evidence["unanswered"].items():
      _require(f"evidence['unanswered'][{name!r}]", value, Integral, "an integer")
  for key in Losses.__annotations__:
    for value in _require_list(f"evidence['losses'][{key!r}]", evidence["losses"][key], None):
      _require_number(f"evidence['losses'][{key!r}]", value)
  for i, layer in enumerate(_require_list("evidence['layers']", evidence["layers"], None)):
    _validate_layer(f"evidence['layers'][{i}]", layer)
  for i, control in enumerate(_require_list("evidence['controls']", evidence["controls"], None)):
    _require_keys(f"evidence['controls'][{i}]", control, Control)
    for key in ("retain_accuracy", "forget_error"):
      _require_fraction(f"evidence['controls'][{i}][{key!r}]", control[key])


def _validate_layer(name: str, layer: Any) -> None:
  _require_keys(name, layer, Layer)
  _require(f"{name}['path']", layer["path"], str, "a string")
  _require_list(f"{name}['shape']", layer["shape"], None, Integral, "an integer")
  _require(f"{name}['size']", layer["size"], Integral, "an integer")
  for key in ("norm_before", "norm_change", "max_change", "share_changed"):
    _require_number(f"{name}[{key!r}]", layer[key])


def _require_keys(name: str, value: Any, schema: Any) -> None:
  _require(name, value, Mapping, "an object")
  missing = [key for key in schema.__annotations__ if key not in value]
  if missing:
    raise ValueError(f"{name}: {', '.join(map(repr, missing))} missing. {_REDO}")


def _require(name: str, value: Any, kind: type, expected: str) -> None:
  if not isinstance(value, kind) or isinstance(value, bool):
    raise ValueError(f"{name}: got {str(value)[:80]!r}; expected {expected}. {_REDO}")


def _require_list(
  name: str, value: Any, length: int | None, kind: type = object, expected: str = ""
) -> Sequence[Any]:
  if not isinstance(value, (Sequence, np.ndarray)) or isinstance(value, (str, bytes)):
    raise ValueError(f"{name}: got {str(value)[:80]!r}; expected a list. {_REDO}")
  if length is not None and len(value) != length:
    raise ValueError(f"{name}: got {len(value)} values; expected {length}, one per class. {_REDO}")
  for item in value:
    if kind is not object:
      _require(f"an item of {name}", item, kind, expected)
  return list(value)


def _require_counts(name: str, value: Any, size: int) -> None:
  try:
    counts = np.asarray(value)
  except (ValueError, OverflowError):
    counts = np.empty(0)
  if counts.shape != (size, size) or counts.dtype.kind not in "iu" or counts.min(initial=0) < 0:
    raise ValueError(f"{name}: expected {size} rows of {size} counts, none below zero. {_REDO}")


def _require_number(name: str, value: Any) -> None:
  if value is not None:
    _require(name, value, Real, "a number, or null where there is none")


def _require_fraction(name: str, value: Any) -> None:
  _require_number(name, value)
  if not np.isnan(number(value)) and not 0.0 <= value <= 1.0:
    raise ValueError(
      f"{name}: got {value}; expected a fraction in [0, 1], or null where there are no examples. {_REDO}"
    )
