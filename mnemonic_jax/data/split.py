"""One split of a data set, decoded and in memory, and the check of its labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mnemonic_jax.errors import MnemonicError


def require_labels(name: str, labels: Iterable[int], num_classes: int) -> None:
  """Refuse labels of the data set `name` outside [0, num_classes)."""
  if outside := sorted({int(label) for label in labels if not 0 <= label < num_classes}):
    raise MnemonicError(
      f"data set {name}: holds the label {outside[0]}; expected 0 to {num_classes - 1}."
    )


class Split(NamedTuple):
  """A split of a data set, in memory."""

  images: np.ndarray  # (N, H, W, C) uint8
  labels: np.ndarray  # (N,) int32

  @property
  def num_examples(self) -> int:
    """The number of examples, N."""
    return len(self.labels)

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of one image."""
    return self.images.shape[1:]

  def batches(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (images, labels) in order, `size` at a time; the last batch may be smaller."""
    for start in range(0, self.num_examples, size):
      yield self.images[start : start + size], self.labels[start : start + size]

  def of_classes(self, classes: Sequence[int], at_most: int) -> Split:
    """Keep the first examples of these classes only, `at_most` so many."""
    return self.part(np.flatnonzero(np.isin(self.labels, classes))[:at_most])

  def without(self, classes: Sequence[int]) -> Split:
    """Leave out the examples of these classes."""
    return self.part(np.flatnonzero(~np.isin(self.labels, classes)))

  def part(self, rows: np.ndarray) -> Split:
    """Keep these rows only."""
    return Split(self.images[rows], self.labels[rows])
