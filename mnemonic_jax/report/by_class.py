"""Draw what happened class by class, before and after: accuracies and confusions.

Accuracies are a table whose rows hold dumbbells; confusions two shaded matrices, or lists where
there are many classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mnemonic_jax.report.schema import numbers
from mnemonic_jax.report.wording import UNIT, class_label, clean, count, percent, points

MOST_CLASSES = 30  # above this the table is cut to what matters, and the matrices become lists
WORST_SHOWN = 10  # kept classes with the largest drops, when it is cut
FORGOTTEN_SHOWN = 20  # forgotten classes, when it is cut
LISTS_SHOWN = 8  # forgotten classes that get a list
ANSWERS_SHOWN = 8  # predicted classes in each list
DARKEST = 0.62  # opacity of a full cell: dark text stays readable on it


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


@dataclasses.dataclass(frozen=True)
class MatrixRow:
  """Hold one true class: its counts, and each cell's opacity."""

  index: int
  name: str
  forgotten: bool
  cells: tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True)
class Matrix:
  """Hold one confusion matrix, "before" or "after"."""

  when: str
  rows: tuple[MatrixRow, ...]


@dataclasses.dataclass(frozen=True)
class AnswerList:
  """Hold what the model answers on the examples of one forgotten class.

  An answer is (class, is it right, count before, count after).
  """

  label: str
  total: str
  answers: tuple[tuple[str, bool, str, str], ...]
  others: str


@dataclasses.dataclass(frozen=True)
class Confusion:
  """Hold either matrices or lists.

  `into` says how often examples of kept classes are taken for a forgotten class.
  """

  matrices: tuple[Matrix, ...]
  lists: tuple[AnswerList, ...]
  left_out: int
  into: str
  examples: str


def confusion(report: Mapping[str, Any], evidence: Mapping[str, Any]) -> Confusion:
  """Make both matrices, or lists above 30 classes."""
  names, forgotten = evidence["class_names"], sorted(report["classes"])
  before = np.asarray(evidence["confusion_before"], np.int64)
  after = np.asarray(evidence["confusion_after"], np.int64)
  matrices: tuple[Matrix, ...] = ()
  lists: tuple[AnswerList, ...] = ()
  if len(names) <= MOST_CLASSES:
    matrices = (
      _matrix("before", before, names, forgotten),
      _matrix("after", after, names, forgotten),
    )
  else:
    lists = tuple(_answers(c, before[c], after[c], names) for c in forgotten[:LISTS_SHOWN])
  return Confusion(
    matrices=matrices,
    lists=lists,
    left_out=max(0, len(forgotten) - LISTS_SHOWN) if lists else 0,
    into=_into(before, after, forgotten),
    examples=f"{_examples(before[forgotten], after[forgotten]):,}",
  )


def shades(counts: np.ndarray) -> np.ndarray:
  """Return opacities (C, C): the square root of each cell's share of its row.

  The root makes rare confusions visible.
  """
  totals = np.maximum(counts.sum(axis=1, keepdims=True), 1)
  return np.round(DARKEST * np.sqrt(counts / totals), 3)


def _matrix(
  when: str, counts: np.ndarray, names: Sequence[str], forgotten: Sequence[int]
) -> Matrix:
  opacity = shades(counts)
  rows = (
    MatrixRow(
      index=c,
      name="" if name.strip() == str(c) else clean(name, 16),
      forgotten=c in forgotten,
      cells=tuple((f"{n}", float(o)) for n, o in zip(counts[c], opacity[c], strict=True)),
    )
    for c, name in enumerate(names)
  )
  return Matrix(when, tuple(rows))


def _answers(true: int, before: np.ndarray, after: np.ndarray, names: Sequence[str]) -> AnswerList:
  top = sorted(range(len(names)), key=lambda c: (-max(before[c], after[c]), c))
  shown = [c for c in top[:ANSWERS_SHOWN] if before[c] or after[c]]
  rest = [c for c in top[ANSWERS_SHOWN:] if before[c] or after[c]]
  others = ""
  if rest:
    counts = f"{before[rest].sum():,} examples before, {after[rest].sum():,} after"
    others = f"{len(rest)} more answers: {counts}."
  return AnswerList(
    label=class_label(true, names),
    total=f"{_examples(before, after):,}",
    answers=tuple(
      (class_label(c, names), c == true, f"{before[c]:,}", f"{after[c]:,}") for c in shown
    ),
    others=others,
  )


def _examples(before: np.ndarray, after: np.ndarray) -> int:
  """Count the examples that were answered; a model that gives NaN answers fewer of them."""
  return max(int(before.sum()), int(after.sum()))


def _into(before: np.ndarray, after: np.ndarray, forgotten: Sequence[int]) -> str:
  """Say how often kept classes are taken for a forgotten one, where the model gave an answer."""
  kept = np.delete(np.arange(len(before)), forgotten)
  parts = []
  for when, counts in ("before", before), ("after", after):
    if total := int(counts[kept].sum()):
      taken = int(counts[kept][:, list(forgotten)].sum())
      parts.append(f"{taken:,} of {total:,} {when} ({percent(taken / total)})")
  which = "the class to forget" if len(forgotten) == 1 else "a class to forget"
  return f"Test examples of kept classes taken for {which}: {', '.join(parts)}." if parts else ""
