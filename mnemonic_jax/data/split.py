"""One part of a data set."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Split(NamedTuple):
  """Images and their labels, decoded and in memory."""

  images: np.ndarray  # (N, H, W, C) uint8
  labels: np.ndarray  # (N,) int32
