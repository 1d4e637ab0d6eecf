"""One part of a data set that is decoded and in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Split(NamedTuple):
  """Images and their labels."""

  images: np.ndarray  # (N, H, W, C) uint8
  labels: np.ndarray  # (N,) int32

  @property
  def num_examples(self) -> int:
    """N."""
    return len(self.labels)

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of one image."""
    return self.images.shape[1:]

  def batches(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images (size, H, W, C) and labels (size,) in order; the last batch may be smaller."""
    for start in range(0, self.num_examples, size):
      yield self.images[start : start + size], self.labels[start : start + size]

  def of_classes(self, classes: Sequence[int], at_most: int) -> Split:
    """The first examples of these classes."""
    rows = np.flatnonzero(np.isin(self.labels, classes))[:at_most]
    return Split(self.images[rows], self.labels[rows])

  def without(self, classes: Sequence[int]) -> Split:
    """All examples but those of these classes."""
    kept = ~np.isin(self.labels, classes)
    return Split(self.images[kept], self.labels[kept])
