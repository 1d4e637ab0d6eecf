"""Feed a training: this process's part of the batches of some steps, on the host."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import jax
import numpy as np

from mnemonic_jax import training
from mnemonic_jax.data.split import Split
from mnemonic_jax.data.stream import Batch, Stream
from mnemonic_jax.runs.config import Config

Feed = Callable[[int, int], Iterator[Batch]]  # (first step, last step) -> the batches in between


def make_feed(
  split: Split | Stream,
  config: Config,
  key: jax.Array,
  steps: tuple[int, int],
  process: tuple[int, int],
  stack: ExitStack,
) -> Feed:
  """Feed a range of steps, which are asked for in order.

  The order of a stored set depends on the train state's `key`, that of a stream on `train.seed`.
  `process` is (index, count). `stack` ends the threads and processes that decode a stream.
  """
  size, (first, last) = config.train.batch_size, steps
  if isinstance(split, Split):
    return StoredFeed(split, key, size, process)
  stream = stack.enter_context(
    split.training_batches(
      config.train.seed,
      size,
      first_step=first,
      last_step=last,
      workers=config.execution.workers,
      process=process,
    )
  )
  return lambda first, last: itertools.islice(stream, last - first)


class StoredFeed:
  """Batches of a set in memory, in the order of `training.epoch_rows`."""

  def __init__(
    self, split: Split, key: jax.Array, batch_size: int, process: tuple[int, int] = (0, 1)
  ) -> None:
    self._split, self._key, self._size, self._process = split, key, batch_size, process
    self._epoch, self._rows = -1, np.zeros((0, 0), np.int32)

  def __call__(self, first: int, last: int) -> Iterator[Batch]:
    """Give the batch of each step."""
    index, count = self._process
    for step in range(first, last):
      epoch, inside = divmod(step, self._split.num_examples // self._size)
      rows = self._rows_of(epoch)[inside].reshape(count, -1)[index]
      yield Batch(self._split.images[rows], self._split.labels[rows], rows)

  def _rows_of(self, epoch: int) -> np.ndarray:
    if epoch != self._epoch:
      rows = training.epoch_rows(self._key, epoch, self._split.num_examples, self._size)
      self._epoch, self._rows = epoch, np.asarray(rows)
    return self._rows
