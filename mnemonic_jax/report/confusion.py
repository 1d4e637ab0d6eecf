"""Draw confusion before and after: two shaded matrices, or lists where there are many classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mnemonic_jax.report.wording import class_label, clean, percent

MOST_CLASSES = 30  # above this the matrices become lists
LISTS_SHOWN = 8  # forgotten classes that get a list
ANSWERS_SHOWN = 8  # predicted classes in each list
DARKEST = 0.62  # opacity of a full cell: dark text stays readable on it


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
