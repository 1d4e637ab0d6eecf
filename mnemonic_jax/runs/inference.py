"""Run a model over a whole split, on one device or on a mesh."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mnemonic_jax import evaluation
from mnemonic_jax._types import LogitsFn
from mnemonic_jax.data.split import Split
from mnemonic_jax.data.stream import Stream
from mnemonic_jax.evaluation import Predictions, Preprocess
from mnemonic_jax.multihost import processes
from mnemonic_jax.multihost.sharding import Layout
from mnemonic_jax.multihost.watchdog import Watchdog
from mnemonic_jax.progress import Progress

# At once on a device, of small pictures and of large ones.
_ROWS, _LEAST_ROWS, _VALUES = 1000, 32, 1000 * 32 * 32 * 3


def predict_each(
  logits_fn: LogitsFn,
  candidates: Sequence[Any],
  split: Split | Stream,
  preprocess: Preprocess,
  layout: Layout | None = None,
  watchdog: Watchdog | None = None,
) -> list[Predictions]:
  """Run the model with each of several params over a split, in one pass: pictures are decoded once.

  On a mesh each process decodes its part, and all processes get all results.
  """
  layout, watchdog = layout or Layout(), watchdog or Watchdog()
  with layout.used():
    batches = _batches(split, layout, watchdog)
    return evaluation.predict(logits_fn, candidates, batches, preprocess=preprocess)


def _batches(
  split: Split | Stream, layout: Layout, watchdog: Watchdog
) -> Iterator[tuple[Any, Any, np.ndarray]]:
  """Give (images, labels, mask) in order, all of one size: one program is compiled."""
  if not split.num_examples:
    return
  (index, count), total = layout.process, split.num_examples
  rows_at_once = max(_LEAST_ROWS, min(_ROWS, _VALUES // int(np.prod(split.shape))))
  size = -(-min(total, rows_at_once * layout.size) // layout.size) * layout.size
  rows = np.arange(-(-total // size) * size).reshape(-1, size)
  mine = np.minimum(rows.reshape(len(rows), count, -1)[:, index].ravel(), total - 1)
  watchdog.phase("the first batch of an evaluation")
  quiet = isinstance(split, Split) or not processes.is_writer()
  with Progress("evaluate", total, "images", quiet=quiet) as progress:
    local = watchdog.inputs(split.part(mine).batches(size // count))
    for number, (batch, places) in enumerate(zip(local, rows, strict=True), start=1):
      mask = places < total
      yield *layout.place(batch), mask
      progress.update(int(mask.sum()))
      watchdog.phase(f"what follows batch {number} of {len(rows)} of an evaluation")
