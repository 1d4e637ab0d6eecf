"""Data sets that fit in memory: decoded once, uint8, split in train and test."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax.data import digits, prepared
from mnemonic_jax.data.split import Split
from mnemonic_jax.errors import UsageError, nearest


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A labelled image set.

  Attributes:
    train, test: images (N, H, W, C) uint8 and labels (N,) int32.
    class_names: one per class, in label order.
    levels: the largest pixel value; the model sees pixels / levels, in [0, 1].
  """

  name: str
  train: Split
  test: Split
  class_names: tuple[str, ...]
  levels: int

  def preprocess(self, images: jax.Array) -> jax.Array:
    """Stored pixels to what the model sees, float32 in [0, 1]; traceable."""
    return images.astype(jnp.float32) / self.levels

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of one image."""
    return self.train.images.shape[1:]

  def without(self, classes: tuple[int, ...]) -> Dataset:
    """The same set with the training examples of `classes` left out, for training from scratch without them."""
    kept = ~np.isin(self.train.labels, classes)
    return dataclasses.replace(self, train=Split(self.train.images[kept], self.train.labels[kept]))


def load(name: str, data_dir: str = "") -> Dataset:
  """Load a data set by name: "digits" ships with scikit-learn, "mnist" is read from a prepared TFDS folder."""
  if name == "digits":
    return Dataset("digits", *digits.load(), levels=16)
  if name in prepared.NAMES:
    return Dataset(name, *prepared.load(name, data_dir), levels=255)
  raise UsageError(f"data.name: unknown data set {name!r}. {nearest(name, ('digits', *prepared.NAMES))}")
