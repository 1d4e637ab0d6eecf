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
    levels: the largest pixel value.
    mean, std: per channel of pixels / levels; the model sees (pixels / levels - mean) / std.
  """

  name: str
  train: Split
  test: Split
  class_names: tuple[str, ...]
  levels: int
  mean: tuple[float, ...] = (0.0,)
  std: tuple[float, ...] = (1.0,)

  def preprocess(self, images: jax.Array) -> jax.Array:
    """Stored pixels to what the model sees, float32; traceable."""
    mean, std = (jnp.asarray(values, jnp.float32) for values in (self.mean, self.std))
    return (images.astype(jnp.float32) / self.levels - mean) / std

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of one image."""
    return self.train.images.shape[1:]

  def without(self, classes: tuple[int, ...]) -> Dataset:
    """The same set with the training examples of `classes` left out, for training from scratch without them."""
    kept = ~np.isin(self.train.labels, classes)
    return dataclasses.replace(self, train=Split(self.train.images[kept], self.train.labels[kept]))


# Mean and standard deviation of the training pictures' channels, as is usual for colour pictures; the others stay in [0, 1].
_CHANNELS = {
  "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
  "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def load(name: str, data_dir: str = "") -> Dataset:
  """Load a data set by name: "digits" ships with scikit-learn, the others are read from prepared TFDS folders."""
  if name == "digits":
    return Dataset("digits", *digits.load(), levels=16)
  if name in prepared.NAMES:
    return Dataset(name, *prepared.load(name, data_dir), 255, *_CHANNELS.get(name, ()))
  raise UsageError(f"data.name: unknown data set {name!r}. {nearest(name, ('digits', *prepared.NAMES))}")
