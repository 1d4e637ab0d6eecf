"""Predictions and losses of a model on a whole split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from mnemonic_jax import evaluation, losses
from mnemonic_jax.data.split import Split
from mnemonic_jax.data.stream import Stream
from mnemonic_jax.progress import Progress

_ROWS = 1000  # at once, of small pictures
_VALUES = 1000 * 32 * 32 * 3  # at once, of large ones
_LEAST_ROWS = 32


class Predictions(NamedTuple):
  """Per example: the predicted class, the loss on the true one, and the true one."""

  predictions: np.ndarray  # (N,) int; -1 where a logit is NaN
  losses: np.ndarray  # (N,) float32, nats
  labels: np.ndarray  # (N,) int32


def predict(
  logits_fn: Callable[[Any, jax.Array], jax.Array],
  params: Any,
  split: Split | Stream,
  preprocess: Callable[[jax.Array], jax.Array],
) -> Predictions:
  """Run the model over a split, batch by batch; the last rows are padded, so one shape compiles."""
  return predict_each(logits_fn, [params], split, preprocess)[0]


def predict_each(
  logits_fn: Callable[[Any, jax.Array], jax.Array],
  candidates: Sequence[Any],
  split: Split | Stream,
  preprocess: Callable[[jax.Array], jax.Array],
) -> list[Predictions]:
  """The same for several params, in one pass over the split: a streamed one is decoded once."""
  if not split.num_examples:
    return [Predictions(np.zeros(0, int), np.zeros(0, np.float32), np.zeros(0, np.int32))] * len(
      candidates
    )
  size = min(split.num_examples, max(_LEAST_ROWS, min(_ROWS, _VALUES // int(np.prod(split.shape)))))
  parts: list[list[Predictions]] = [[] for _ in candidates]
  with Progress(
    "evaluate", split.num_examples, "images", quiet=isinstance(split, Split)
  ) as progress:
    for images, labels in split.batches(size):
      padding = size - len(labels)
      images = np.concatenate([images, np.zeros((padding, *images.shape[1:]), images.dtype)])
      padded_labels = np.concatenate([labels, np.zeros(padding, labels.dtype)])
      for params, seen in zip(candidates, parts, strict=True):
        predicted, loss = _predict(logits_fn, preprocess, params, images, padded_labels)
        seen.append(
          Predictions(np.asarray(predicted)[: len(labels)], np.asarray(loss)[: len(labels)], labels)
        )
      progress.update(len(labels))
  return [Predictions(*map(np.concatenate, zip(*seen, strict=True))) for seen in parts]


@partial(jax.jit, static_argnums=(0, 1))
def _predict(
  logits_fn: Any, preprocess: Any, params: Any, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
  logits = logits_fn(params, preprocess(images))
  return evaluation.predicted_classes(logits), losses.softmax_cross_entropy(logits, labels)
