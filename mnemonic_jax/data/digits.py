"""The 1,797 real handwritten digits, 8x8, that scikit-learn ships (Alpaydin and Kaynak, 1998)."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from mnemonic_jax.data.split import Split

_TEST_SHARE = 0.2
_SPLIT_SEED = 0  # one split for every training seed


def load() -> tuple[Split, Split, tuple[str, ...]]:
  """Return train and test, stratified by class, and the class names."""
  digits = load_digits()
  images = digits.images[..., None].astype(np.uint8)
  labels = digits.target.astype(np.int32)
  train_images, test_images, train_labels, test_labels = train_test_split(
    images, labels, test_size=_TEST_SHARE, stratify=labels, random_state=_SPLIT_SEED
  )
  return (
    Split(train_images, train_labels),
    Split(test_images, test_labels),
    tuple(str(i) for i in range(10)),
  )
