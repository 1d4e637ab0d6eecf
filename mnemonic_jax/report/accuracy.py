"""Draw accuracy per class before and after: a table whose rows hold dumbbells."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mnemonic_jax.report.schema import numbers
from mnemonic_jax.report.wording import UNIT, class_label, clean, count, percent, points

MOST_CLASSES = 30  # above this the table is cut to what matters
WORST_SHOWN = 10  # kept classes with the largest drops, when it is cut
FORGOTTEN_SHOWN = 20  # forgotten classes, when it is cut


@dataclasses.dataclass(frozen=True)
class AccuracyRow:
  """Hold one class, accuracies in percent.

  `x_before` and `x_after` are positions in percent of the track's width, None without examples.
  """

  index: int
  name: str
  forgotten: bool
  before: str
  after: str
  change: str
  x_before: float | None
  x_after: float | None


@dataclasses.dataclass(frozen=True)
class AccuracyTable:
  """Hold the rows, and one sentence about the classes that are left out ("" if none is)."""

  rows: tuple[AccuracyRow, ...]
  others: str


def accuracy_table(report: Mapping[str, Any], names: Sequence[str]) -> AccuracyTable:
  """Make the table: every class in order.

  Above 30 classes: the forgotten ones, and the kept ones with the ten worst drops.
  """
  before = numbers(report["per_class_accuracy_before"])
  after = numbers(report["per_class_accuracy_after"])
  forgotten = sorted(report["classes"])
  if len(names) <= MOST_CLASSES:
    shown, others = list(range(len(names))), ""
  else:
    shown, others = _cut(before, after, forgotten)
  rows = (_row(c, names[c], c in forgotten, float(before[c]), float(after[c])) for c in shown)
  return AccuracyTable(tuple(rows), others)


def worst_drop(report: Mapping[str, Any], names: Sequence[str]) -> tuple[str, str]:
  """Return the largest loss of accuracy of a kept class, and a note that names the class."""
  before = numbers(report["per_class_accuracy_before"])
  after = numbers(report["per_class_accuracy_after"])
  kept = _by_change(
    before, after, [c for c in range(len(names)) if c not in set(report["classes"])]
  )
  if not kept:
    return "–", "no kept class has test examples"
  worst = kept[0]
  if after[worst] >= before[worst]:
    return "none", "no kept class lost accuracy"
  label = f"class {class_label(worst, names)}: {percent(before[worst])} → {percent(after[worst])}"
  return f"{points(after[worst] - before[worst])}\u00a0points", label


def _cut(before: np.ndarray, after: np.ndarray, forgotten: Sequence[int]) -> tuple[list[int], str]:
  kept = [c for c in range(len(before)) if c not in set(forgotten)]
  ranked = _by_change(before, after, kept)
  least_forgotten = sorted(forgotten, key=lambda c: (-np.nan_to_num(after[c], nan=-1.0), c))
  shown = least_forgotten[:FORGOTTEN_SHOWN] + ranked[:WORST_SHOWN]
  rest, unknown = ranked[WORST_SHOWN:], len(kept) - len(ranked)
  parts = []
  if len(forgotten) > FORGOTTEN_SHOWN:
    hidden = least_forgotten[FORGOTTEN_SHOWN:]
    measured = after[hidden][~np.isnan(after[hidden])]
    highest = (
      f", each at {percent(measured.max())} or less" if len(measured) else ", without test examples"
    )
    parts.append(f"{count(len(hidden))} more classes to forget{highest}")
  if rest:
    change = after[rest] - before[rest]
    parts.append(
      f"{count(len(rest))} other kept classes, whose accuracy changed by {points(change.min())} to "
      f"{points(change.max())} points and is now between {percent(after[rest].min())} and "
      f"{percent(after[rest].max())}"
    )
  if unknown:
    parts.append(
      f"{count(unknown)} kept {'class' if unknown == 1 else 'classes'} without test examples"
    )
  return shown, f"Not in the table: {'; '.join(parts)}." if parts else ""


def _by_change(before: np.ndarray, after: np.ndarray, classes: Sequence[int]) -> list[int]:
  change = after - before
  return sorted((c for c in classes if np.isfinite(change[c])), key=lambda c: (change[c], c))


def _row(index: int, name: str, forgotten: bool, before: float, after: float) -> AccuracyRow:
  return AccuracyRow(
    index=index,
    name="" if name.strip() == str(index) else clean(name, 24),
    forgotten=forgotten,
    before=percent(before).removesuffix(UNIT),
    after=percent(after).removesuffix(UNIT),
    change=points(after - before),
    x_before=None if np.isnan(before) else round(100 * before, 2),
    x_after=None if np.isnan(after) else round(100 * after, 2),
  )
