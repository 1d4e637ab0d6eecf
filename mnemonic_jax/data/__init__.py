"""Data sets by name: small ones decoded once and kept in memory, large ones streamed from disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from mnemonic_jax.data import augmentation, prepared
from mnemonic_jax.data.split import Batch, Split, Stream, require_labels
from mnemonic_jax.errors import MnemonicError, UsageError, nearest

__all__ = [
  "NAMES",
  "NORMALIZATIONS",
  "Batch",
  "Dataset",
  "Split",
  "Stream",
  "absent",
  "load",
]


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A labelled image set.

  Attributes:
    train, test: images (N, H, W, C) uint8 and labels (N,) int32, in memory or streamed.
    class_names: one per class, in label order.
    levels: the largest pixel value.
    mean, std: per channel, of pixels / levels. The model sees (pixels / levels - mean) / std.
  """

  name: str
  train: Split | Stream
  test: Split | Stream
  class_names: tuple[str, ...]
  levels: int
  mean: tuple[float, ...] = (0.0,)
  std: tuple[float, ...] = (1.0,)

  def preprocess(self, images: jax.Array) -> jax.Array:
    """Turn stored pixels into what the model sees, float32; traceable."""
    mean, std = (jnp.asarray(values, jnp.float32) for values in (self.mean, self.std))
    return (images.astype(jnp.float32) / self.levels - mean) / std

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of one image."""
    return self.train.shape

  def without(self, classes: Sequence[int]) -> Dataset:
    """Leave the training examples of `classes` out; the test examples stay."""
    return dataclasses.replace(self, train=self.train.without(classes))


# Colour images are normalised by the mean and standard deviation of the training images' channels,
# as is usual. All other images stay in [0, 1].
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CHANNELS = {
  "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
  "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
} | dict.fromkeys(prepared.STREAMED, _IMAGENET)
NAMES = ("digits", *prepared.NAMES)
NORMALIZATIONS = ("dataset", "half")
_TEST_SHARE = 0.2  # of the digits
_SPLIT_SEED = 0  # one split of the digits for every training seed


def load(
  name: str,
  data_dir: str = "",
  *,
  side: int = 224,
  augment: str = "none",
  normalization: str = "dataset",
  training: bool = True,
) -> Dataset:
  """Load a data set by name: the digits of scikit-learn, or a set that TFDS has prepared.

  Args:
    name: one of `NAMES`.
    data_dir: the folder of prepared sets.
    side: height and width of streamed images, in pixels.
    augment: one of `augmentation.NAMES`. Streamed sets cut their random crops as they decode.
    normalization: "dataset": by the mean and standard deviation of the set's channels. "half": to
      [-1, 1], as AugReg's ViTs expect.
    training: True refuses a set where a class has no training example. Pass False to evaluate or to
      forget: the training images of a class to forget may be deleted by then.

  Raises:
    UsageError: an unknown name, or an augmentation that the set does not have.
    MnemonicError: the set is missing, damaged, or has labels that do not fit its classes.
  """
  if name not in NAMES:
    raise UsageError(f"data.name: unknown data set {name!r}. {nearest(name, NAMES)}")
  if augment in augmentation.STREAMED and name not in prepared.STREAMED:
    raise UsageError(
      f"data.augment: got {augment!r} for {name}; "
      f"it needs a streamed set ({', '.join(prepared.STREAMED)})."
    )
  channels = ((0.5,), (0.5,)) if normalization == "half" else _CHANNELS.get(name, ((0.0,), (1.0,)))
  if name == "digits":
    return Dataset(name, *_digits(), 16, *channels)
  parts = prepared.load(name, data_dir, side=side, crop=augment in augmentation.STREAMED)
  dataset = Dataset(name, *parts, 255, *channels)
  _check_classes(dataset, training)
  return dataset


def _digits() -> tuple[Split, Split, tuple[str, ...]]:
  """Split the 1,797 real handwritten digits, 8x8, that scikit-learn ships, stratified by class.

  Source: Alpaydin and Kaynak (1998).
  """
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


def absent(name: str, shape: Sequence[int], num_classes: int) -> Dataset:
  """Make a set without examples, for images (H, W, C) of `shape` and classes named by number."""
  nothing = Split(np.zeros((0, *shape), np.uint8), np.zeros(0, np.int32))
  return Dataset(name, nothing, nothing, tuple(map(str, range(num_classes))), 255)


def _check_classes(dataset: Dataset, training: bool) -> None:
  """Check known labels: none outside the classes and, for training, no class without examples."""
  num_classes = len(dataset.class_names)
  for part in dataset.train, dataset.test:
    if part.labels is not None:
      require_labels(repr(dataset.name), part.labels, num_classes)
  labels = dataset.train.labels
  if not training or labels is None:
    return
  if (empty := np.flatnonzero(np.bincount(labels, minlength=num_classes) == 0)).size:
    raise MnemonicError(
      f"data set {dataset.name!r}: class {empty[0]} ({dataset.class_names[empty[0]]}) has no "
      "training example, so training would never see its code. Prepare the whole set again."
    )
