"""What an audit returns: every result, every verdict; a table as text, or plain values as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mnemonic_jax._records import plain
from mnemonic_jax.auditing.intervals import Estimate
from mnemonic_jax.auditing.verdicts import CANNOT_TELL, LEAST, Verdict

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class AuditReport:
  """What an audit found. `str()` of it is a table.

  Attributes:
    classes: the forgotten classes.
    num_retrained: how many Retrains there were.
    stages: the names of the stages whose features were read, in the order of the data.
    verdicts: one for each question that could be asked.
    probe_left: `verdicts.share_left` of the probes: 0 is Retrain, 1 the model before; NaN without
      Retrains. A stand-in for IDI.
    results: what each metric gave, by "SUBJECT/METRIC"; values as JSON has them. Estimates are
      lists of value, low and high.
  """

  classes: tuple[int, ...]
  num_retrained: int
  stages: tuple[str, ...]
  verdicts: tuple[Verdict, ...]
  probe_left: float
  results: Mapping[str, Any]

  @property
  def skipped(self) -> dict[str, str]:
    """What could not be measured, and why."""
    return {
      key: found["skipped"]
      for key, found in self.results.items()
      if isinstance(found, Mapping) and "skipped" in found
    }

  def verdict(self, question: str) -> str:
    """The answer to one question, by its name.

    Raises:
      KeyError: a question that was not asked; the message lists those that were.
    """
    found = {each.threshold.question.name: each.verdict for each in self.verdicts}
    if question not in found:
      raise KeyError(f"question: got {question!r}; this audit asked {', '.join(found)}.")
    return found[question]

  def as_dict(self) -> dict[str, Any]:
    """Everything as JSON has it; NaN and infinity are None."""
    return {
      "format": FORMAT,
      "classes": list(self.classes),
      "retrained": self.num_retrained,
      "stages": list(self.stages),
      "probe_left": plain(self.probe_left),
      "verdicts": [_verdict(each) for each in self.verdicts],
      "skipped": self.skipped,
      "results": plain(self.results),
    }

  def to_text(self) -> str:
    """The table: a row a question, values in %, and what they are compared with."""
    rows: list[tuple[str, ...]] = [
      ("question", "before", "after", "Retrain", "passes", "verdict", "Retrains that pass")
    ]
    rows += [_row(each) for each in self.verdicts]
    lines = _table(rows)
    for subject in ("before", "after"):
      lines += self._classes(subject)
    if self.stages and self.num_retrained:
      lines.append(f"probes, left of what they read beyond Retrain, all stages: {self._left()}")
    if (moved := self.results.get("after/distance")) is not None:
      named = ", ".join(f"{name} {share:.3g}" for name, share in moved.items())
      lines.append(f"params moved, relative: {named}")
    if self.num_retrained < LEAST:
      lines.append(f"{self.num_retrained} Retrains; a verdict needs {LEAST}, of other seeds.")
    lines += [f"not measured: {key}: {why}" for key, why in self.skipped.items()]
    return "\n".join(lines)

  def __str__(self) -> str:
    return self.to_text()

  def _left(self) -> str:
    """What is left of the probes, if they read more before than Retrains get at any stage."""
    of_probes = [each for each in self.verdicts if each.threshold.question.name.startswith("probe")]
    if np.isnan(self.probe_left) or all(each.verdict == CANNOT_TELL for each in of_probes):
      return "cannot tell: before, they read no more than of Retrain"
    return f"{_percent(self.probe_left)} % (a stand-in for IDI; 0 is Retrain, 100 before)"

  def _classes(self, subject: str) -> list[str]:
    """One line with the accuracy of each class, and two of the controls."""
    found = self.results.get(f"{subject}/outputs")
    if found is None:
      return []
    accuracy = " ".join("-" if x[0] is None else _percent(x[0]) for x in found["per_class"])
    head = found["head_only"]
    return [
      f"{subject}, accuracy of each class: {accuracy}",
      f"{subject}, head edited: A_R {_percent(head['retain_accuracy'][0])}, "
      f"E_F {_percent(head['forget_error'][0])}",
    ]


def _verdict(each: Verdict) -> dict[str, Any]:
  fixed = each.threshold
  return {
    "question": fixed.question.name,
    "verdict": each.verdict,
    "side": fixed.question.side,
    "before": plain(fixed.before),
    "after": plain(each.after),
    "retrained": plain(fixed.retrained),
    "low": plain(fixed.low),
    "high": plain(fixed.high),
    "retrains_that_pass": fixed.passed,
  }


def _row(each: Verdict) -> tuple[str, ...]:
  fixed = each.threshold
  known = [x for x in fixed.retrained if not np.isnan(x)]
  spread = f"{_percent(min(known))} to {_percent(max(known))}" if known else "-"
  ends = [(fixed.low, "from"), (fixed.high, "to")]
  passes = " ".join(
    f"{word} {_percent(min(1.0, max(0.0, end)))}" for end, word in ends if np.isfinite(end)
  )
  passed = "-" if fixed.passed is None else f"{fixed.passed} of {len(fixed.retrained)}"
  name = fixed.question.name
  return name, _estimate(fixed.before), _estimate(each.after), spread, passes, each.verdict, passed


def _estimate(found: Estimate) -> str:
  if np.isnan(found.value):
    return "-"
  interval = f" ({_percent(found.low)} to {_percent(found.high)})"
  return _percent(found.value) + ("" if np.isnan(found.low) else interval)


def _percent(share: float) -> str:
  return f"{100 * share:.1f}"


def _table(rows: Sequence[Iterable[str]]) -> list[str]:
  cells = [tuple(row) for row in rows]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  pad = lambda row: "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
  return [pad(row) for row in cells]
