"""Run a model over real data, score it, and gather what the page of a forget shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mnemonic_jax import evaluation
from mnemonic_jax._types import LogitsFn
from mnemonic_jax.data import Dataset, Split, Stream
from mnemonic_jax.evaluation import Predictions, Preprocess, Scores
from mnemonic_jax.multihost.processes import Watchdog, is_writer
from mnemonic_jax.multihost.sharding import Layout
from mnemonic_jax.progress import Progress
from mnemonic_jax.runs.config import Config
from mnemonic_jax.runs.files import to_host

# At once on a device, of small pictures and of large ones.
_ROWS, _LEAST_ROWS, _VALUES = 1000, 32, 1000 * 32 * 32 * 3
_SHOWN_LOSSES = 2000  # per distribution in the report
_MOVED = 0.01  # a weight moved if it changed by more than this part of its layer's RMS weight

Predict = Callable[[list[Any], Split | Stream], list[Predictions]]  # several params on one split


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
    placed = batches(split, layout, watchdog)
    return evaluation.predict(logits_fn, candidates, placed, preprocess=preprocess)


def batches(
  split: Split | Stream,
  layout: Layout,
  watchdog: Watchdog,
  rows_of_device: int = _ROWS,
  *,
  of: str = "an evaluation",
) -> Iterator[tuple[Any, Any, np.ndarray]]:
  """Give (images, labels, mask) in order, all of one size: one program is compiled.

  On a mesh each process decodes its part. `rows_of_device`: at most so many at once on a device;
  `of`: what they are for.
  """
  if not split.num_examples:
    return
  (index, count), total = layout.process, split.num_examples
  rows_at_once = max(_LEAST_ROWS, min(rows_of_device, _VALUES // int(np.prod(split.shape))))
  size = -(-min(total, rows_at_once * layout.size) // layout.size) * layout.size
  rows = np.arange(-(-total // size) * size).reshape(-1, size)
  mine = np.minimum(rows.reshape(len(rows), count, -1)[:, index].ravel(), total - 1)
  watchdog.phase(f"the first batch of {of}")
  quiet = isinstance(split, Split) or not is_writer()
  title = "evaluate" if of == "an evaluation" else "read images"
  with Progress(title, total, "images", quiet=quiet) as progress:
    local = watchdog.inputs(split.part(mine).batches(size // count))
    for number, (batch, places) in enumerate(zip(local, rows, strict=True), start=1):
      mask = places < total
      yield *layout.place(batch), mask
      progress.update(int(mask.sum()))
      watchdog.phase(f"what follows batch {number} of {len(rows)} of {of}")


class Scored(NamedTuple):
  """Hold the scores of one set of params on real data.

  Confusion, counts and scores are of the test examples; losses are of the forgotten classes only.
  """

  confusion: np.ndarray
  counts: np.ndarray  # of test examples of each class, those without an answer (NaN) too
  scores: Scores
  test_losses: np.ndarray
  train_losses: np.ndarray


def scored(
  predict: Predict, candidates: list[Any], dataset: Dataset, classes: Sequence[int]
) -> list[Scored]:
  """Score each of several params, in one pass over the data."""
  num_classes = len(dataset.class_names)
  part = dataset.train.of_classes(classes, _SHOWN_LOSSES)
  on_test, on_train = (predict(candidates, split) for split in (dataset.test, part))
  found = []
  for test, train in zip(on_test, on_train, strict=True):
    confusion = evaluation.confusion_matrix(test.labels, test.predictions, num_classes)
    counts = np.bincount(test.labels, minlength=num_classes)
    scores = evaluation.scores_from_counts(confusion.diagonal(), counts, classes)
    losses = test.losses[np.isin(test.labels, classes)][:_SHOWN_LOSSES]
    found.append(Scored(confusion, counts, scores, losses, train.losses))
  return found


def gather(
  config: Config, dataset: Dataset, before: Any, after: Any, scores: Sequence[Scored]
) -> dict[str, Any]:
  """Make the evidence of a forget, see `schema.EVIDENCE`.

  Args:
    before, after: the params.
    scores: of `before`, of `after`, and of the head edit, the control.
  """
  *both, hidden = scores
  pair = dict(zip(("before", "after"), both, strict=True))
  return {
    "class_names": list(dataset.class_names),
    "config": config.name,
    "dataset": dataset.name,
    "model": config.model.name,
    "num_test_examples": dataset.test.num_examples,
    **{f"confusion_{when}": one.confusion for when, one in pair.items()},
    "unanswered": {when: int(one.counts.sum() - one.confusion.sum()) for when, one in pair.items()},
    "losses": {
      f"{split}_{when}": getattr(one, f"{split}_losses")
      for split in ("train", "test")
      for when, one in pair.items()
    },
    "layers": _layer_changes(before, after),
    "controls": [
      {
        "name": "Head edit",
        "retain_accuracy": hidden.scores.retain_accuracy,
        "forget_error": hidden.scores.forget_error,
        "note": "sets the output bias of the forgotten classes to -1e9; the features stay",
      }
    ],
  }


def _layer_changes(before: Any, after: Any) -> list[dict[str, Any]]:
  """Say how far each parameter tensor moved."""
  layers = []
  pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
  for (path, old), new in pairs:
    old, new = to_host(old).astype(np.float64), to_host(new).astype(np.float64)
    change = np.abs(new - old)
    rms = np.sqrt(np.mean(old**2))
    layers.append(
      {
        "path": jax.tree_util.keystr(path),
        "shape": list(old.shape),
        "size": old.size,
        "norm_before": float(np.linalg.norm(old)),
        "norm_change": float(np.linalg.norm(change)),
        "max_change": float(change.max(initial=0.0)),
        "share_changed": float(np.mean(change > _MOVED * rms)),
      }
    )
  return layers
