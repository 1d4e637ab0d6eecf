"""Scores: accuracy on kept classes, error on forgotten ones. Nothing else counts them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax import _checks, _functions, _mesh, losses
from mnemonic_jax._types import LogitsFn

PyTree = Any
Preprocess = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Scores:
  """Scores of one model on one set of examples, fractions in [0, 1].

  Attributes:
    retain_accuracy: right predictions among the examples of the kept classes (A_R); NaN without
      such examples.
    forget_error: wrong predictions among the examples of the forgotten classes (E_F); NaN without
      such examples.
    per_class: (C,) float64, the accuracy on each class; NaN for a class without examples.
  """

  retain_accuracy: float
  forget_error: float
  per_class: np.ndarray


class Predictions(NamedTuple):
  """What one model answers to each of N examples."""

  predictions: np.ndarray  # (N,) int32, the predicted classes; -1 where a logit is NaN
  losses: np.ndarray  # (N,) float32, softmax cross-entropy in nats
  labels: np.ndarray  # (N,) int32, the true classes


def evaluate(
  logits_fn: LogitsFn,
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
    batches: yields (inputs, labels) or (inputs, labels, mask): labels (N,) integers in [0, C), mask
      (N,) bool, True for the rows that count (padding is False).
    classes: the forgotten classes, integers in [0, C).

  Returns:
    `Scores`.

  Raises:
    TypeError, ValueError: bad classes, labels that are not integers or do not fit, an empty batch,
      no batches, logits that are not (N, C).

  >>> batches = [(jnp.eye(3), jnp.array([0, 1, 1]))]
  >>> evaluate(lambda params, inputs: inputs, None, batches, classes=[0])
  Scores(retain_accuracy=0.5, forget_error=0.0, per_class=array([1. , 0.5, nan]))

  Source: Yamashita, Yamada, Shibata (2024), section 4, A_R and E_F.
  """
  model = _model(logits_fn)
  if isinstance(classes, Iterable) and not isinstance(classes, (str, bytes)):
    classes = list(classes)
  right = total = np.zeros(0, np.int64)
  for batch in batches_of(batches):
    num_classes = model.num_classes(params, batch)
    if not len(total):
      _checks.require_classes("classes", classes, num_classes)
      right, total = np.zeros(num_classes, np.int64), np.zeros(num_classes, np.int64)
    if num_classes != len(total):
      raise ValueError(
        f"logits_fn: returned {num_classes} classes; expected {len(total)}, as for the first batch."
      )
    found = model.predictions(params, batch, num_classes)
    right += np.bincount(_right(found), minlength=num_classes)
    total += np.bincount(found.labels, minlength=num_classes)
  if not len(total):
    raise ValueError("batches: yielded nothing; expected at least one batch (inputs, labels).")
  return scores_from_counts(right, total, classes)


def predict(
  logits_fn: LogitsFn,
  candidates: Sequence[PyTree],
  batches: Iterable[tuple[Any, ...]],
  *,
  preprocess: Preprocess | None = None,
) -> list[Predictions]:
  """Run a model with each of several params over the data, in one pass.

  Guarantees:
    The results are whole on every process of a mesh: under `jax.set_mesh` each batch may be arrays
    that lie on all its devices.

  Args:
    logits_fn: as in `evaluate`.
    candidates: params, one after the other.
    batches: as in `evaluate`; masked rows are left out of the results.
    preprocess: maps inputs to what logits_fn takes, in the same compiled program.

  Returns:
    `Predictions` of each of the params, over all batches.

  Raises:
    TypeError, ValueError: as `evaluate`.

  >>> batches = [(jnp.eye(2), jnp.array([0, 0]))]
  >>> (found,) = predict(lambda w, inputs: inputs @ w, [jnp.eye(2)], batches)
  >>> found.predictions
  array([0, 1], dtype=int32)
  """
  model = _model(logits_fn, preprocess)
  found: list[list[Predictions]] = [[] for _ in candidates]
  for batch in batches_of(batches):
    for params, parts in zip(candidates, found, strict=True):
      parts.append(model.predictions(params, batch, model.num_classes(params, batch)))
  return [_joined(parts) for parts in found]


def scores(found: Predictions, num_classes: int, classes: Iterable[int]) -> Scores:
  """Score a model by its answers.

  >>> scores(Predictions(np.array([0, -1]), np.zeros(2), np.array([0, 1])), 2, classes=[1])
  Scores(retain_accuracy=1.0, forget_error=1.0, per_class=array([1., 0.]))
  """
  right = np.bincount(_right(found), minlength=num_classes)
  return scores_from_counts(right, np.bincount(found.labels, minlength=num_classes), classes)


def scores_from_counts(right: np.ndarray, total: np.ndarray, classes: Iterable[int]) -> Scores:
  """Make `Scores` from the (C,) counts of right predictions and of examples of each class."""
  right, total = np.asarray(right), np.asarray(total)
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
  """Count examples by true class (row) and predicted class (column), (C, C).

  A prediction of -1 is in no column.

  >>> confusion_matrix([0, 1, 1], [0, 0, 1], 2)
  array([[1, 0],
         [1, 1]])
  """
  labels, predictions = np.asarray(labels, np.int64), np.asarray(predictions, np.int64)
  cells = (labels * num_classes + predictions)[predictions >= 0]
  return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def predicted_classes(logits: jax.Array) -> jax.Array:
  """(N, C) logits -> (N,) predicted classes; -1, which is no class, where a logit is NaN.

  >>> predicted_classes(jnp.array([[0.0, 1.0], [jnp.nan, 1.0]]))
  Array([ 1, -1], dtype=int32)
  """
  return jnp.where(jnp.any(jnp.isnan(logits), axis=-1), -1, jnp.argmax(logits, axis=-1))


def right_counts(logits: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
  """Count the right predictions of each class, (C,) int32; traceable, so `vmap` maps over models.

  >>> right_counts(jnp.eye(3), jnp.array([0, 1, 1]), 3)
  Array([1, 1, 0], dtype=int32)
  """
  right = predicted_classes(logits) == labels
  return jax.ops.segment_sum(right.astype(jnp.int32), labels, num_classes)


def retain_and_forget(
  logits: jax.Array, labels: jax.Array, forget: jax.Array, remain: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Score logits by class masks, traceably: (A_R, E_F) as `evaluate` counts them.

  Edge cases:
    examples of a class in neither mask count on no side. A side without examples is NaN.

  Args:
    logits: (N, C), floating.
    labels: (N,), integers in [0, C).
    forget, remain: (C,) bool.

  Returns:
    The retain accuracy and the forget error, scalars in [0, 1], float32 at least.

  >>> forget = jnp.array([True, False, False])
  >>> a_r, e_f = retain_and_forget(jnp.eye(3), jnp.array([0, 1, 1]), forget, ~forget)
  >>> float(a_r), float(e_f)
  (0.5, 0.0)
  """
  right = predicted_classes(logits).astype(labels.dtype) == labels

  def share(classes: jax.Array, values: jax.Array) -> jax.Array:
    side = classes[labels]
    return jnp.sum(values & side, dtype=float) / jnp.sum(side, dtype=float)

  return share(remain, right), share(forget, ~right)


class Batch(NamedTuple):
  """One batch; labels that lie on several processes stay there.

  The mask is False for rows that do not count.
  """

  inputs: Any
  labels: Any
  mask: np.ndarray


class _Model(NamedTuple):
  """A logits function taken apart for `jit`, and what goes before it."""

  static: _functions.Static
  preprocess: Preprocess | None
  arrays: list[Any]

  def num_classes(self, params: PyTree, batch: Batch) -> int:
    """Tell how many classes the logits have, and refuse what is no logits."""
    logits = _logits.eval_shape(*self, params, batch.inputs)
    shape, size = getattr(logits, "shape", None), len(batch.mask)
    if shape is None or len(shape) != 2 or shape[0] != size:
      raise ValueError(
        f"logits_fn: returned {shape or type(logits).__name__}; expected logits of shape "
        f"({size}, C)."
      )
    return int(shape[1])

  def predictions(self, params: PyTree, batch: Batch, num_classes: int) -> Predictions:
    """Predict one batch, and leave out its masked rows."""
    _, labels, mask = batch
    refuse = lambda labels: _checks.require_labels(
      "labels", labels[mask], int(mask.sum()), num_classes
    )
    if isinstance(labels, np.ndarray):
      refuse(labels)
    answers = [np.asarray(x) for x in _answers(*self, params, batch.inputs, labels)]
    if not isinstance(labels, np.ndarray):  # no process has them all before
      refuse(answers[2])
    return Predictions(*(values[mask] for values in answers))


def _model(logits_fn: LogitsFn, preprocess: Preprocess | None = None) -> _Model:
  _checks.require_callable("logits_fn", logits_fn, "(params, inputs) -> (N, C) logits")
  static, arrays = _functions.split(logits_fn)
  return _Model(static, preprocess, arrays)


@partial(jax.jit, static_argnums=(0, 1))
def _logits(static: Any, preprocess: Any, arrays: Any, params: PyTree, inputs: Any) -> Any:
  return static(arrays)(params, inputs if preprocess is None else preprocess(inputs))


@partial(jax.jit, static_argnums=(0, 1))
def _answers(
  static: Any, preprocess: Any, arrays: Any, params: PyTree, inputs: Any, labels: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
  logits = _logits(static, preprocess, arrays, params, inputs)
  labels = labels.astype(jnp.int32)
  loss = losses.softmax_cross_entropy(logits, labels)
  return _mesh.gathered((predicted_classes(logits), loss, labels))


def _right(found: Predictions) -> np.ndarray:
  """The classes of the examples that are predicted right."""
  return found.labels[found.predictions == found.labels]


def _joined(parts: list[Predictions]) -> Predictions:
  if not parts:
    return Predictions(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int32))
  return Predictions(*map(np.concatenate, zip(*parts, strict=True)))


def batches_of(batches: Any) -> Iterable[Batch]:
  """Check each batch, (inputs, labels) or (inputs, labels, mask), as it comes.

  >>> next(iter(batches_of([(np.zeros((2, 3)), [0, 1])]))).mask
  array([ True,  True])
  """
  if not isinstance(batches, Iterable):
    raise TypeError(
      f"batches: got {_checks.kind(batches)}; expected an iterable of (inputs, labels)."
    )
  return map(_unpack, batches)


def _unpack(batch: Any) -> Batch:
  """Check one batch; its mask is all True where none is given."""
  if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
    raise ValueError(
      f"batches: yielded {type(batch).__name__}; expected (inputs, labels) or (inputs, labels, "
      "mask)."
    )
  inputs, labels = batch[:2]
  if getattr(labels, "is_fully_addressable", True):
    labels = np.asarray(labels)
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
  return Batch(inputs, labels, mask)
