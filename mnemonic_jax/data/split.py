"""One split of a data set: decoded and in memory, or streamed from disk.

Grain's workers decode the images of a stream as they are needed.
"""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mnemonic_jax.data import decoding
from mnemonic_jax.errors import MnemonicError
from mnemonic_jax.progress import Progress

_AHEAD = 4  # threads of each process, and batches that it decodes ahead
_ORDER, _CROP = 0, 1  # branches of the seed


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


class Batch(NamedTuple):
  """One batch of training examples."""

  images: np.ndarray  # (B, H, W, 3) uint8
  labels: np.ndarray  # (B,) int32
  rows: np.ndarray  # (B,) int64, which rows of the split these are


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
  """A split of a data set on disk: encoded images and their labels.

  Attributes:
    name: the name in error messages.
    source: random access to {"image": encoded bytes, "label": int}; must be picklable.
    places: (N,) the index of each example in the source.
    labels: (N,) int32; None if reading them all would take long.
    num_classes: C; labels are in [0, C).
    side: images are cropped and scaled to (side, side, 3) pixels.
    crop: training sees random resized crops instead of central ones.
  """

  name: str
  source: Any
  places: np.ndarray
  labels: np.ndarray | None
  num_classes: int
  side: int
  crop: bool = False

  @property
  def num_examples(self) -> int:
    """The number of examples, N."""
    return len(self.places)

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of one image."""
    return self.side, self.side, 3

  def batches(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (central crops, labels) in order, `size` at a time; the last batch may be smaller."""
    grain = _import_grain()
    loader = grain.MapDataset.source(np.arange(self.num_examples)).map(self._central)
    with _Closing(
      loader.batch(size, batch_fn=_stack).to_iter_dataset(_read_options(grain))
    ) as batches:
      for batch in batches:
        yield batch.images, batch.labels

  def training_batches(
    self,
    seed: int,
    batch_size: int,
    *,
    first_step: int,
    last_step: int,
    workers: int = 0,
    process: tuple[int, int] = (0, 1),
  ) -> _Closing:
    """Open an iterator over the `Batch` of each step in [first_step, last_step); a context manager.

    Step s of an epoch sees rows [s batch_size, (s + 1) batch_size) of that epoch's permutation,
    however many workers and processes there are. The crop of an example depends on the seed, the
    epoch and its row only.

    Args:
      seed: the seed of the order and the crops.
      batch_size: examples per step, over all processes.
      first_step, last_step: counted from the start of training.
      workers: how many processes decode; 0: threads of this process do.
      process: (index, count) of this process, which gets batch_size / count rows of each batch.

    Raises:
      MnemonicError: batch_size is not a multiple of the number of processes.
    """
    index, count = process
    if batch_size % count:
      raise MnemonicError(
        f"train.batch_size: got {batch_size} for {count} processes; expected a multiple of that."
      )
    local = batch_size // count
    steps = self.num_examples // batch_size

    def example(position: int) -> tuple[np.ndarray, int, int]:
      step, slot = divmod(int(position), local)
      epoch, step = divmod(step, steps)
      row = _permutation(seed, epoch, self.num_examples)[step * batch_size + index * local + slot]
      return self._training(seed, epoch, int(row))

    grain = _import_grain()
    positions = grain.MapDataset.source(range(first_step * local, last_step * local))
    loader = (
      positions.map(example).batch(local, batch_fn=_stack).to_iter_dataset(_read_options(grain))
    )
    if workers:
      _parse_no_flags()
      options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_AHEAD)
      loader = loader.mp_prefetch(options, worker_init_fn=_follow_parent)
    return _Closing(loader)

  def of_classes(self, classes: Sequence[int], at_most: int) -> Stream:
    """Keep the first examples of these classes only; none if the labels are not known."""
    if self.labels is None:
      return self.part(np.zeros(0, np.int64))
    return self.part(np.flatnonzero(np.isin(self.labels, classes))[:at_most])

  def without(self, classes: Sequence[int]) -> Stream:
    """Leave out the examples of these classes."""
    labels = (
      read_labels(self.name, self.source, self.num_classes) if self.labels is None else self.labels
    )
    labelled = dataclasses.replace(self, labels=labels)
    return labelled.part(np.flatnonzero(~np.isin(labels, classes)))

  def part(self, rows: np.ndarray) -> Stream:
    """Keep these rows only."""
    labels = None if self.labels is None else self.labels[rows]
    return dataclasses.replace(self, places=self.places[rows], labels=labels)

  def _central(self, row: int) -> tuple[np.ndarray, int, int]:
    return self._decoded(int(row), lambda encoded: decoding.central_crop(encoded, self.side))

  def _training(self, seed: int, epoch: int, row: int) -> tuple[np.ndarray, int, int]:
    if not self.crop:
      return self._central(row)
    random = np.random.default_rng((seed, _CROP, epoch, row))
    return self._decoded(
      row, lambda encoded: decoding.random_resized_crop(encoded, self.side, random)
    )

  def _decoded(
    self, row: int, decode: Callable[[bytes], np.ndarray]
  ) -> tuple[np.ndarray, int, int]:
    """Read one example: (image, label, row)."""
    place = int(self.places[row])
    try:
      example = self.source[place]
      label = int(example["label"])
      image = decode(example["image"])
    except Exception as error:  # damaged records and images raise many kinds
      raise _damaged(self.name, f"example {place}", error) from None
    require_labels(self.name, [label], self.num_classes)
    return image, label, row


def read_labels(name: str, source: Any, num_classes: int) -> np.ndarray:
  """Read the label of every record, (N,) int32, without decoding the images."""
  labels = np.empty(len(source), np.int32)
  with Progress(f"read labels of {name}", len(source), "records") as progress:
    for start in range(0, len(source), 1000):
      rows = list(range(start, min(start + 1000, len(source))))
      try:
        labels[rows] = [int(example["label"]) for example in source.__getitems__(rows)]
      except Exception as error:
        raise _damaged(name, f"one of the examples {rows[0]} to {rows[-1]}", error) from None
      progress.update(len(rows))
  require_labels(name, labels, num_classes)
  return labels


def _damaged(name: str, what: str, error: Exception) -> MnemonicError:
  return MnemonicError(
    f"data set {name}: {what} cannot be read ({type(error).__name__}: {error}). "
    "The prepared files are damaged: delete that folder and prepare it again."
  )


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
  return np.random.default_rng((seed, _ORDER, epoch)).permutation(num_examples)


def _stack(examples: Sequence[tuple[np.ndarray, int, int]]) -> Batch:
  images, labels, rows = zip(*examples, strict=True)
  return Batch(np.stack(images), np.asarray(labels, np.int32), np.asarray(rows, np.int64))


def _read_options(grain: Any) -> Any:
  return grain.ReadOptions(num_threads=_AHEAD, prefetch_buffer_size=_AHEAD)


class _Closing:
  """Iterate over a Grain data set; exiting the context ends its threads and processes."""

  def __init__(self, loader: Any) -> None:
    self._iterator = iter(loader)

  def __enter__(self) -> Iterator[Batch]:
    return self._iterator

  def __exit__(self, *_: object) -> None:
    self._iterator.close()


def _follow_parent(index: int, count: int) -> None:
  """End this worker when the training process ends, even if it is killed.

  Ctrl-C reaches every process. Workers ignore it and leave it to the training process.
  """
  del index, count
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  threading.Thread(
    target=_exit_after, args=(multiprocessing.parent_process(),), daemon=True
  ).start()


def _exit_after(process: Any) -> None:
  process.join()
  os._exit(1)


def _parse_no_flags() -> None:
  """Mark absl's flags as parsed: Grain's workers read them, and our commands never parse them."""
  from absl import flags

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


def _import_grain() -> Any:
  try:
    import grain
  except ImportError as error:
    raise MnemonicError(
      f"streamed data sets need the data extra ({error}); "
      "install it with: pip install 'mnemonic-jax[data]'"
    ) from None
  return grain


def require_labels(name: str, labels: Iterable[int], num_classes: int) -> None:
  """Refuse labels of the data set `name` outside [0, num_classes)."""
  if outside := sorted({int(label) for label in labels if not 0 <= label < num_classes}):
    raise MnemonicError(
      f"data set {name}: holds the label {outside[0]}; expected 0 to {num_classes - 1}."
    )
