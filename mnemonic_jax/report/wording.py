"""Decide what counts as forgotten, and say numbers and outcomes in plain words.

The same words for the same result, good or bad.
"""

from __future__ import annotations

import dataclasses
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mnemonic_jax.report.schema import number

ENOUGH_ERROR = 0.95  # a class counts as forgotten from this error on
_WORST_FIRST = ("not forgotten", "not measured", "forgotten")
CHEAP_LOSS = 0.02  # a forget is cheap up to this loss of accuracy on the kept classes
NO_EXAMPLES = "no examples"
UNIT = "\u00a0%"  # the space keeps a number and its unit on one line

_COUNTS = (
  *("no", "one", "two", "three", "four", "five", "six"),
  *("seven", "eight", "nine", "ten", "eleven", "twelve"),
)
_BIDI = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclasses.dataclass(frozen=True)
class Verdict:
  """Say what happened: a symbol, a short label, one sentence, and what it means."""

  kind: str  # "good", "costly", "failed" or "unknown"
  symbol: str
  label: str
  sentence: str
  meaning: str


def clean(text: str, limit: int = 48) -> str:
  """Return `text` without control and direction characters, cut to `limit` characters."""
  shown = "".join(
    "\ufffd" if unicodedata.category(c) in ("Cc", "Cs") or c in _BIDI else c for c in text
  )
  return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def percent(fraction: float) -> str:
  """Return a fraction in percent; 0 % and 100 % stand for exactly none and exactly all."""
  if math.isnan(fraction):
    return NO_EXAMPLES
  if fraction in (0.0, 1.0):
    return f"{100 * fraction:.0f}{UNIT}"
  shown = {"0.0": "<0.1", "100.0": ">99.9"}.get(text := f"{100 * fraction:.1f}", text)
  return f"{shown}{UNIT}"


def points(difference: float) -> str:
  """Return a difference of two fractions in percentage points, signed; NaN is a dash."""
  if math.isnan(difference):
    return "–"
  shown = f"{100 * abs(difference):.1f}"
  if shown == "0.0":
    shown = f"{100 * abs(difference):.2f}"
  if float(shown) == 0:
    return "0.0"
  return ("+" if difference > 0 else "−") + shown


def scientific(value: float) -> str:
  """Return `value` with three significant digits, with a power of ten where it is long."""
  if not math.isfinite(value):
    return "not finite"
  if value == 0 or 1e-3 <= abs(value) < 1e5:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
  mantissa, exponent = f"{value:.1e}".split("e")
  return f"{mantissa}\u00a0×\u00a0{power_of_ten(int(exponent))}"


def power_of_ten(exponent: int) -> str:
  """Return 10 to the `exponent` with raised digits."""
  return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def duration(seconds: float) -> str:
  """Return a time in the unit that reads best."""
  if not math.isfinite(seconds):
    return "not measured"
  if seconds < 1:
    return f"{1000 * seconds:.3g}\u00a0ms"
  return f"{seconds:,.0f}\u00a0s" if seconds >= 100 else f"{seconds:.3g}\u00a0s"


def count(amount: int) -> str:
  """Return a small count as a word, a larger one in digits."""
  return _COUNTS[amount] if amount < len(_COUNTS) else f"{amount:,}"


def class_label(index: int, names: Sequence[str]) -> str:
  """Return "0 (zero)", or "0" where the name says no more than the index."""
  name = names[index].strip()
  return str(index) if name in ("", str(index)) else f"{index} ({clean(name)})"


def class_list(classes: Sequence[int], names: Sequence[str], limit: int = 5) -> str:
  """Return "class 0 (zero)" or "classes 0 (zero), 3 (three) and 5 (five)".

  Classes beyond `limit` are counted.
  """
  labels = [class_label(c, names) for c in classes[:limit]]
  if len(classes) > limit:
    labels.append(f"{count(len(classes) - limit)} more")
  if len(labels) == 1:
    return f"class {labels[0]}"
  return f"classes {', '.join(labels[:-1])} and {labels[-1]}"


def named_values(values: Mapping[str, Any]) -> str:
  """Return settings or info as text: "lambda1 = 0.001, lambda2 = 10"."""
  return ", ".join(f"{clean(str(k))} = {_value(v)}" for k, v in values.items()) or "none"


def _value(value: Any) -> str:
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  return f"{value:g}" if is_number else clean(str(value), 120)


def outcome(error: float) -> str:
  """Return the verdict on one class, or on several together, from the error after a forget.

  >>> outcome(0.95), outcome(0.94), outcome(float("nan"))
  ('forgotten', 'not forgotten', 'not measured')
  """
  if math.isnan(error):
    return "not measured"
  return "forgotten" if error >= ENOUGH_ERROR else "not forgotten"


def class_errors(accuracies: Sequence[float | None], classes: Iterable[int]) -> dict[int, float]:
  """Return the error on each of `classes`, NaN for one without examples, free of rounding."""
  return {c: round(1 - number(accuracies[c]), 9) for c in sorted(classes)}


def verdicts(
  accuracies: Sequence[float | None], classes: Iterable[int], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
  """Return the "verdicts" of the forget JSON, by class name.

  A name that two classes have is told apart by its index. Without test examples of a class, there
  is no evidence and no error: both are None.
  """
  found = {}
  for c, error in class_errors(accuracies, classes).items():
    measured = not math.isnan(error)
    name = names[c] if list(names).count(names[c]) == 1 else f"{names[c]} ({c})"
    found[name] = {
      "verdict": outcome(error),
      "evidence": "test" if measured else None,
      "error": error if measured else None,
    }
  return found


def worst(copies: Iterable[Mapping[str, Any]]) -> str:
  """Return the worst verdict on any class in any copy of the params."""
  outcomes = (one["verdict"] for copy in copies for one in copy["verdicts"].values())
  return min(outcomes, key=_WORST_FIRST.index)


def badge(report: Mapping[str, Any]) -> tuple[str, str, str]:
  """Return (kind, symbol, label) of a forget: "good", "costly", "failed" or "unknown".

  It judges by the error on each of the forgotten classes, and by the loss on the kept ones
  together. `report` is the forget JSON, or what it says of the moving average.
  """
  errors = class_errors(report["per_class_accuracy_after"], report["classes"])
  outcomes = [outcome(error) for error in errors.values()]
  together = outcome(number(report["forget_error_after"]))
  costly = _loss(report) > CHEAP_LOSS
  if together == "not measured":
    kind, symbol, label = "unknown", "?", "Not measured"
  elif "not forgotten" in (together, *outcomes):
    kind, symbol, label = "failed", "✕", "Not forgotten"
  elif "not measured" in outcomes:
    kind, symbol, label = "unknown", "?", "Not all measured"
  else:
    kind, symbol, label = ("costly", "!", "Forgotten") if costly else ("good", "✓", "Forgotten")
  if costly:
    label += ", at a high cost" if kind == "costly" else ", and at a high cost"
  return kind, symbol, label


def verdict(report: Mapping[str, Any], names: Sequence[str]) -> Verdict:
  """Return what happened in a forget, in words."""
  meaning = f"{_meaning_of_error(report, names)} {_meaning_of_loss(_loss(report))}"
  return Verdict(*badge(report), sentence(report, names), meaning)


def _loss(report: Mapping[str, Any]) -> float:
  """Return how much accuracy the kept classes lost, free of rounding."""
  before, after = (number(report[f"retain_accuracy_{when}"]) for when in ("before", "after"))
  return round(before - after, 9)


def sentence(report: Mapping[str, Any], names: Sequence[str]) -> str:
  """Return what was asked and what happened."""
  classes, requested = sorted(report["classes"]), sorted(report["requested"])
  earlier = [c for c in classes if c not in requested]
  asked = f"Asked to forget {class_list(requested, names)}"
  whose = "Its test error" if len(classes) == 1 else "Their test error"
  if earlier:
    asked += f", on top of {class_list(earlier, names)} asked for earlier"
    all_of_them = "both" if len(classes) == 2 else f"all {count(len(classes))}"
    whose = f"The test error of {all_of_them} together"
  kept = len(names) - len(classes)
  keeping = {0: "no class is kept", 1: "accuracy on the one kept class"}
  accuracy = keeping.get(kept, f"accuracy on the {count(kept)} kept classes")
  if kept:
    accuracy += f" {_changed(report, 'retain_accuracy')}"
  return f"{asked}. {whose} {_changed(report, 'forget_error')}, while {accuracy}."


def _changed(report: Mapping[str, Any], score: str) -> str:
  before, after = (number(report[f"{score}_{when}"]) for when in ("before", "after"))
  if math.isnan(before) or math.isnan(after):
    return "is not known (no test examples)"
  if percent(before) == percent(after):
    return f"stayed at {percent(after)}"
  return f"went from {percent(before)} to {percent(after)}"


def _meaning_of_error(report: Mapping[str, Any], names: Sequence[str]) -> str:
  error = number(report["forget_error_after"])
  errors = class_errors(report["per_class_accuracy_after"], report["classes"])
  remembered = [c for c in errors if outcome(errors[c]) == "not forgotten"]
  unmeasured = [c for c in errors if outcome(errors[c]) == "not measured"]
  one = len(errors) == 1
  these, needed = "this class" if one else "these classes", f"{100 * ENOUGH_ERROR:.0f}{UNIT}"
  if math.isnan(error):
    which = "the class" if one else "the classes"
    return f"It is not known whether it worked: there were no test examples of {which} to forget."
  if remembered and not one:
    most = percent(max(1 - errors[c] for c in remembered))
    up_to, whose = ("", "its") if len(remembered) == 1 else ("up to ", "their")
    return (
      f"It did not work for {class_list(remembered, names)}: the model still gets {up_to}{most} of "
      f"{whose} test examples right. The error of each class should be at least {needed}."
    )
  if error < ENOUGH_ERROR:
    return (
      f"It did not work: the model still gets {percent(1 - error)} of the test examples of {these} "
      f"right. The error should be at least {needed}."
    )
  if unmeasured:
    which = class_list(unmeasured, names)
    return f"It is not known whether it worked for {which}: there were no test examples."
  meaning = f"Judged by its outputs, the model has forgotten {these}."
  if number(report["forget_error_before"]) >= ENOUGH_ERROR:
    meaning += f" It hardly knew {these} before, so there was little to forget."
  return meaning


def _meaning_of_loss(loss: float) -> str:
  if math.isnan(loss):
    return "The cost is not known: there were no test examples of the kept classes."
  lost = points(loss).lstrip("+−")
  if loss > CHEAP_LOSS:
    return (
      f"The cost is high: the kept classes lost {lost} points of accuracy. Up to "
      f"{100 * CHEAP_LOSS:.0f} points would be cheap."
    )
  if lost == "0.0":
    return "It cost nothing: the kept classes are as accurate as before."
  unit = "point" if lost == "1.0" else "points"
  return f"The kept classes {'lost' if loss > 0 else 'gained'} {lost} {unit} of accuracy."
