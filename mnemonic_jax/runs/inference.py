"""Predictions and losses of a model on a whole split."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax import losses
from mnemonic_jax.data.split import Split

_ROWS = 1000


class Predictions(NamedTuple):
  """Per example: the predicted class and the loss on the true one."""

  predictions: np.ndarray  # (N,) int
  losses: np.ndarray  # (N,) float32, nats


def predict(
  logits_fn: Callable[[Any, jax.Array], jax.Array],
  params: Any,
  split: Split,
  preprocess: Callable[[jax.Array], jax.Array],
) -> Predictions:
  """Run the model over a split, a thousand rows at a time; the last rows are padded, so one shape compiles."""
  predictions, values = [], []
  for start in range(0, len(split.labels), _ROWS):
    images, labels = split.images[start : start + _ROWS], split.labels[start : start + _ROWS]
    padding = (-len(labels)) % min(_ROWS, len(split.labels))
    images = np.concatenate([images, np.zeros((padding, *images.shape[1:]), images.dtype)])
    padded_labels = np.concatenate([labels, np.zeros(padding, labels.dtype)])
    predicted, loss = _predict(logits_fn, preprocess, params, images, padded_labels)
    predictions.append(np.asarray(predicted)[: len(labels)])
    values.append(np.asarray(loss)[: len(labels)])
  return Predictions(np.concatenate(predictions), np.concatenate(values))


@partial(jax.jit, static_argnums=(0, 1))
def _predict(
  logits_fn: Any, preprocess: Any, params: Any, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
  logits = logits_fn(params, preprocess(images))
  return jnp.argmax(logits, axis=-1), losses.softmax_cross_entropy(logits, labels)
