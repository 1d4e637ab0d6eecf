"""What rivals are given: a model and its training data, each example on its side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax import _checks, _trees, evaluation
from mnemonic_jax._types import LogitsFn
from mnemonic_jax.methods.relearn import FoldFn, TrainFn

PyTree = Any

KEPT, FORGOTTEN, ALL, NOTHING = "kept", "forgotten", "all", "nothing"
_SIDES = {KEPT: (KEPT,), FORGOTTEN: (FORGOTTEN,), ALL: (KEPT, FORGOTTEN), NOTHING: ()}


class NotApplicable(ValueError):
  """Why a rival cannot forget in a model.

  >>> raise NotApplicable("the head has no bias")
  Traceback (most recent call last):
    ...
  mnemonic_jax.rivals.request.NotApplicable: the head has no bias
  """


class Examples(NamedTuple):
  """Training examples on the host, in the space that the model sees."""

  inputs: np.ndarray  # (N, *shape), floating
  labels: np.ndarray  # (N,) int32


class Request(NamedTuple):
  """A model and its training data. `make_request` makes one and checks it.

  Attributes:
    logits_fn: pure function (params, inputs) -> (N, C) logits, in evaluation mode.
    params: what may be changed.
    num_classes: C.
    shape: of one input.
    kept, forgotten: the training examples of both sides; None where there are none to read.
    key: what random numbers are drawn from.
    epochs: how long a rival trains that has no number of epochs of its own.
    batch_size: examples a step.
    train_fn, fold_fn, statistics: training mode, as `Relearn` takes them; None: rivals train in
      evaluation mode.
    train_some: (names of submodules) -> `train_fn` with those alone in training mode, for rivals
      that train the last stages: `Model.train_fn`.
    fresh: newly initialised params, for rivals that learn stages anew.
    codes: (C, K, *shape), the codes that the training mixed in, for rivals that need them.
  """

  logits_fn: LogitsFn
  params: PyTree
  num_classes: int
  shape: tuple[int, ...]
  kept: Examples | None
  forgotten: Examples | None
  key: jax.Array
  epochs: int
  batch_size: int
  train_fn: TrainFn | None
  fold_fn: FoldFn | None
  statistics: PyTree
  train_some: Callable[[tuple[str, ...]], TrainFn] | None
  fresh: PyTree
  codes: np.ndarray | None

  def side(self, name: str) -> Examples:
    """The examples of a side, or of both."""
    parts = [getattr(self, part) for part in _SIDES[name]]
    given = [part for part in parts if part is not None]
    if not given or len(given) < len(parts):
      raise NotApplicable(f"it reads {name} examples, and there are none to read")
    return Examples(*map(np.concatenate, zip(*given, strict=True))) if given[1:] else given[0]


def make_request(
  logits_fn: LogitsFn,
  params: PyTree,
  kept: Any = None,
  forgotten: Any = None,
  *,
  key: jax.Array,
  shape: tuple[int, ...] | None = None,
  epochs: int = 1,
  batch_size: int = 128,
  train_fn: TrainFn | None = None,
  fold_fn: FoldFn | None = None,
  statistics: PyTree = None,
  train_some: Callable[[tuple[str, ...]], TrainFn] | None = None,
  fresh: PyTree = None,
  codes: Any = None,
) -> Request:
  """Gather a model and its training data, for `Rival.prepare` and `Rival.forget`.

  Args:
    kept, forgotten: (inputs, labels), or an iterable of batches as `evaluate` takes them, of each
      side; inputs are floating, in the space that the model sees. None: a rival that reads them
      does not apply.
    shape: of one input, where no examples are given.
    logits_fn, params, key, epochs, batch_size, train_fn, fold_fn, statistics, train_some, fresh,
      codes: see `Request`.

  Raises:
    TypeError, ValueError: params that are not floating or not those of `logits_fn`, examples that
      do not fit each other, one of `train_fn` and `fold_fn` without the other, no shape.

  >>> images, labels = np.eye(4, dtype="float32"), np.array([0, 1, 2, 1])
  >>> request = make_request(
  ...   lambda w, x: x @ w, jnp.zeros((4, 3)), (images, labels), key=jax.random.key(0))
  >>> request.num_classes, request.shape, request.forgotten
  (3, (4,), None)
  """
  _checks.require_callable("logits_fn", logits_fn, "(params, inputs) -> (N, C) logits")
  _checks.require_key(key)
  _trees.mask_leaves(None, params)
  if (train_fn is None) != (fold_fn is None) or (train_fn is None) != (statistics is None):
    raise ValueError("train_fn: expected train_fn, fold_fn and statistics together, or none.")
  sides = _gathered("kept", kept), _gathered("forgotten", forgotten)
  shapes = {x.inputs.shape[1:] for x in sides if x is not None}
  shapes |= {tuple(shape)} if shape is not None else set()
  if len(shapes) != 1:
    raise ValueError(f"shape: got {sorted(shapes)}; expected examples of one shape, or `shape`.")
  (shape,) = shapes
  num_classes = _num_classes(logits_fn, params, shape)
  for name, examples in zip((KEPT, FORGOTTEN), sides, strict=True):
    if examples is not None:
      _checks.require_labels(name, examples.labels, len(examples.inputs), num_classes)
  if codes is not None:
    _checks.require_codes(codes)
    codes = np.asarray(codes)
  epochs = _checks.require_size("epochs", epochs)
  batch_size = _checks.require_size("batch_size", batch_size)
  return Request(
    logits_fn, params, num_classes, shape, *sides, key, epochs, batch_size,
    train_fn, fold_fn, statistics, train_some, fresh, codes,
  )  # fmt: skip


def _gathered(name: str, given: Any) -> Examples | None:
  """Examples of arrays, or of batches."""
  if given is None:
    return None
  arrays = isinstance(given, tuple) and len(given) == 2 and hasattr(given[0], "dtype")
  batches = list(evaluation.batches_of([given] if arrays else given))
  if not batches:
    raise ValueError(f"{name}: got no batches (inputs, labels); expected at least one, or None.")
  parts = [(np.asarray(b.inputs)[b.mask], np.asarray(b.labels)[b.mask]) for b in batches]
  inputs, labels = map(np.concatenate, zip(*parts, strict=True))
  if not jnp.issubdtype(inputs.dtype, jnp.floating):
    raise TypeError(
      f"{name}: got inputs of dtype {inputs.dtype}; expected floats, in the space that the model "
      "sees (after normalisation)."
    )
  if not len(inputs):
    raise ValueError(f"{name}: got no examples; expected at least one, or None.")
  if not np.issubdtype(labels.dtype, np.integer):
    raise TypeError(f"{name}: got labels of dtype {labels.dtype}; expected integers.")
  return Examples(inputs, labels.astype(np.int32))


def _num_classes(logits_fn: LogitsFn, params: PyTree, shape: tuple[int, ...]) -> int:
  """The number of classes of the logits; refuses params of another model."""
  try:
    logits = jax.eval_shape(logits_fn, params, jax.ShapeDtypeStruct((2, *shape), jnp.float32))
    examples, num_classes = logits.shape
  except Exception as error:
    raise ValueError(
      f"logits_fn: fails on params and inputs (2, {', '.join(map(str, shape))}): {error} Expected "
      "the params of this model, and logits (N, C)."
    ) from error
  if examples != 2:
    raise ValueError(f"logits_fn: returned {logits.shape} for 2 inputs; expected (2, C).")
  return int(num_classes)
