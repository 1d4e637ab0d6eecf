"""Evaluation: accuracy on kept classes, error on forgotten ones, per class, over examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax import _checks

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Scores:
  """Scores of one model on one set of examples, fractions in [0, 1].

  Attributes:
    retain_accuracy: right predictions among the examples of the kept classes (A_R); NaN without such examples.
    forget_error: wrong predictions among the examples of the forgotten classes (E_F); NaN without such examples.
    per_class: (C,) float64, the accuracy on each class; NaN for a class without examples.
  """

  retain_accuracy: float
  forget_error: float
  per_class: np.ndarray


def evaluate(
  logits_fn: Callable[[PyTree, jax.Array], jax.Array],
  params: PyTree,
  batches: Iterable[tuple[Any, ...]],
  classes: Iterable[int],
) -> Scores:
  """Score a model on batches of examples.

      A_R = right examples of kept classes / examples of kept classes
      E_F = wrong examples of forgotten classes / examples of forgotten classes

  Accuracies are over examples, not means of class accuracies.

  Edge cases:
    masked rows count nowhere, whatever their label. A class without examples is NaN in per_class.
    NaN logits are wrong predictions.

  Args:
    logits_fn: pure function (params, inputs) -> (N, C) logits. Batches of one shape compile once.
    params: what logits_fn takes.
    batches: yields (inputs, labels) or (inputs, labels, mask): labels (N,) integers in [0, C), mask (N,) bool, True
      for the rows that count (padding is False).
    classes: the forgotten classes, integers in [0, C).

  Returns:
    `Scores`.

  Raises:
    TypeError, ValueError: bad classes, labels that are not integers or do not fit, an empty batch, no batches, logits
      that are not (N, C).

  >>> batches = [(jnp.eye(3), jnp.array([0, 1, 1]))]
  >>> evaluate(lambda params, inputs: inputs, None, batches, classes=[0])
  Scores(retain_accuracy=0.5, forget_error=0.0, per_class=array([1. , 0.5, nan]))

  Source: Yamashita, Yamada, Shibata (2024), section 4, A_R and E_F.
  """
  _checks.require_callable("logits_fn", logits_fn, "(params, inputs) -> (N, C) logits")
  classes = (
    list(classes)
    if isinstance(classes, Iterable) and not isinstance(classes, (str, bytes))
    else classes
  )
  if not isinstance(batches, Iterable):
    raise TypeError(
      f"batches: got {_checks.kind(batches)}; expected an iterable of (inputs, labels)."
    )
  right = total = np.zeros(0, np.int64)
  for batch in batches:
    inputs, labels, mask = _unpack(batch)
    num_classes = _num_classes(logits_fn, params, inputs, len(mask))
    if not len(total):
      _checks.require_classes("classes", classes, num_classes)
      right, total = np.zeros(num_classes, np.int64), np.zeros(num_classes, np.int64)
    if num_classes != len(total):
      raise ValueError(
        f"logits_fn: returned {num_classes} classes; expected {len(total)}, as for the first batch."
      )
    _checks.require_labels("labels", labels[mask], int(mask.sum()), num_classes)
    predictions = np.asarray(_predict(logits_fn, params, inputs))[mask]
    labels = labels[mask].astype(np.int64)
    right += np.bincount(labels[predictions == labels], minlength=num_classes)
    total += np.bincount(labels, minlength=num_classes)
  if not len(total):
    raise ValueError("batches: yielded nothing; expected at least one batch (inputs, labels).")
  return scores_from_counts(right, total, classes)


def predicted_classes(logits: jax.Array) -> jax.Array:
  """(N, C) logits -> (N,) predicted classes; -1, which is no class, where a logit is NaN.

  >>> predicted_classes(jnp.array([[0.0, 1.0], [jnp.nan, 1.0]]))
  Array([ 1, -1], dtype=int32)
  """
  return jnp.where(jnp.any(jnp.isnan(logits), axis=-1), -1, jnp.argmax(logits, axis=-1))


def scores_from_counts(right: np.ndarray, total: np.ndarray, classes: Iterable[int]) -> Scores:
  """Make `Scores` from the (C,) counts of right predictions and of examples of each class."""
  forgotten = np.isin(np.arange(len(total)), list(classes))
  ratio = lambda part, whole: float(part / whole) if whole else float("nan")
  with np.errstate(invalid="ignore"):
    per_class = np.where(total > 0, right / np.maximum(total, 1), np.nan)
  return Scores(
    retain_accuracy=ratio(right[~forgotten].sum(), total[~forgotten].sum()),
    forget_error=ratio((total - right)[forgotten].sum(), total[forgotten].sum()),
    per_class=per_class,
  )


def confusion_matrix(labels: Any, predictions: Any, num_classes: int) -> np.ndarray:
  """Count (C, C) examples by true class (row) and predicted class (column); a prediction of -1 is in no column.

  >>> confusion_matrix([0, 1, 1], [0, 0, 1], 2)
  array([[1, 0],
         [1, 1]])
  """
  labels, predictions = np.asarray(labels, np.int64), np.asarray(predictions, np.int64)
  cells = (labels * num_classes + predictions)[predictions >= 0]
  return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def _unpack(batch: Any) -> tuple[jax.Array, np.ndarray, np.ndarray]:
  """(inputs, labels, mask) of one batch, the mask all True where none is given."""
  if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
    raise ValueError(
      f"batches: yielded {type(batch).__name__}; expected (inputs, labels) or (inputs, labels, mask)."
    )
  inputs, labels = batch[0], np.asarray(batch[1])
  size = np.shape(inputs)[0] if np.ndim(inputs) else 0
  if not size:
    raise ValueError("batches: an empty batch; expected at least one example in each.")
  mask = np.asarray(batch[2]) if len(batch) == 3 else np.ones(size, bool)
  if mask.dtype != bool or mask.shape != (size,):
    raise ValueError(
      f"mask: got dtype {mask.dtype} and shape {mask.shape}; expected bool of shape ({size},)."
    )
  if labels.shape != (size,):
    raise ValueError(f"labels: got shape {labels.shape}; expected ({size},), one label per image.")
  return inputs, labels, mask


def _num_classes(logits_fn: Any, params: PyTree, inputs: Any, size: int) -> int:
  logits = jax.eval_shape(logits_fn, params, inputs)
  shape = getattr(logits, "shape", None)
  if shape is None or len(shape) != 2 or shape[0] != size:
    raise ValueError(
      f"logits_fn: returned {shape or type(logits).__name__}; expected logits of shape ({size}, C)."
    )
  return int(shape[1])


_predict = jax.jit(
  lambda logits_fn, params, inputs: predicted_classes(logits_fn(params, inputs)), static_argnums=0
)
