"""A model under audit, and what is read of it: batch by batch, features one group at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax import _functions, _trees, evaluation
from mnemonic_jax._types import LogitsFn
from mnemonic_jax.auditing import outputs, stages
from mnemonic_jax.auditing.stages import Stages
from mnemonic_jax.evaluation import Predictions

PyTree = Any
FeaturesFn = Callable[[PyTree, jax.Array], dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
  """A model to audit that needs functions of its own.

  A model that was trained apart has BatchNorm statistics of its own, which are part of its
  functions.

  Attributes:
    logits_fn: pure function (params, inputs) -> (N, C) logits, in evaluation mode.
    params: what it takes; floating arrays.
    features_fn: (params, inputs) -> {name: (N, ..., F)}, features by stage in the order of the
      data. None: the arrays at the sites of `Projection`, and the head's input.

  >>> Subject(lambda params, inputs: inputs @ params, jnp.eye(2)).features_fn is None
  True
  """

  logits_fn: LogitsFn
  params: PyTree
  features_fn: FeaturesFn | None = None


class Data(NamedTuple):
  """The examples of an audit, which are read again and again in one order."""

  test: Iterable[Any]
  train: Iterable[Any]
  test_labels: np.ndarray  # (N,), of the rows that count
  train_labels: np.ndarray
  classes: tuple[int, ...]
  num_classes: int


class Answered(NamedTuple):
  """What one pass over the test examples gives."""

  found: Predictions
  head_only: Predictions  # with the forgotten classes masked
  forgotten_logits: np.ndarray  # (M, C), of the forgotten classes' examples
  forgotten_labels: np.ndarray  # (M,)


class Reader:
  """Reads one model; what several metrics need is kept."""

  def __init__(self, name: str, subject: Subject, data: Data) -> None:
    self.name, self.subject, self.data = name, subject, data
    self.logits_fn = _functions.split(subject.logits_fn)
    self.features_fn = _functions.split(subject.features_fn) if subject.features_fn else None

  def logits(
    self, inputs: Any, params: PyTree = None, mask: np.ndarray | slice = slice(None)
  ) -> np.ndarray:
    """(N, C) logits of a batch's rows, of the subject's params or of others; refuses NaN."""
    static, arrays = self.logits_fn
    params = self.subject.params if params is None else params
    found = np.asarray(_logits(static, arrays, params, inputs))[mask]
    if found.ndim != 2 or found.shape[1] != self.data.num_classes:
      raise ValueError(
        f"{self.name}: logits of shape {found.shape}; expected (N, {self.data.num_classes}), as of "
        "the model before."
      )
    if np.isnan(found).any() or (found == np.inf).any():
      raise ValueError(
        f"{self.name}: NaN or inf among the logits; expected numbers (-inf is one here). Did its "
        "training diverge, or was the forgetting too strong?"
      )
    return found

  @cached_property
  def test(self) -> Answered:
    """The pass over the test examples."""
    found, head_only, logits_of, labels_of = [], [], [], []
    for inputs, labels, mask in same_order(self.data.test, self.data.test_labels, "test"):
      logits, own = self.logits(inputs, mask=mask), labels[mask]
      found.append(outputs.answers(logits, own))
      head_only.append(outputs.answers(outputs.head_only(logits, self.data.classes), own))
      gone = np.isin(own, self.data.classes)
      logits_of.append(logits[gone])
      labels_of.append(own[gone])
    return Answered(
      _joined(found), _joined(head_only), np.concatenate(logits_of), np.concatenate(labels_of)
    )

  @cached_property
  def train(self) -> Predictions:
    """The answers to the training examples."""
    batches = same_order(self.data.train, self.data.train_labels, "train")
    return _joined([outputs.answers(self.logits(x, mask=mask), y[mask]) for x, y, mask in batches])

  def answers(self, inputs: Sequence[Any], labels: np.ndarray, params: PyTree) -> Predictions:
    """The answers of other params to inputs in batches of one size, the last one filled up."""
    found = np.concatenate([self.logits(batch, params) for batch in inputs])[: len(labels)]
    return outputs.answers(found, labels)

  def widths(self, inputs: Any) -> dict[str, int]:
    """The stages in order, and how many features each has; nothing is computed."""
    found = _stages.eval_shape(*self._of_stages, inputs)
    return {name: x.shape[-1] for name, x in zip(found.names, found.arrays, strict=True)}

  def features(self, split: str, names: Sequence[str]) -> dict[str, np.ndarray]:
    """(N, F) float32 of each of some stages, for all examples of "train" or "test"."""
    batches = getattr(self.data, split), getattr(self.data, f"{split}_labels"), split
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for inputs, _, mask in same_order(*batches):
      of_batch = _stages(*self._of_stages, inputs)
      for name, x in zip(of_batch.names, of_batch.arrays, strict=True):
        if name in found:
          found[name].append(np.asarray(x)[mask])
    return {name: np.concatenate(parts) for name, parts in found.items()}

  def head_input(self, inputs: Any) -> np.ndarray:
    """(N, F), what the head reads."""
    return np.asarray(_head_input(*self.logits_fn, self.subject.params, inputs))

  @property
  def _of_stages(self) -> tuple[Any, ...]:
    if self.features_fn is None:
      return stages.of_program, *self.logits_fn, self.subject.params
    return stages.of_function, *self.features_fn, self.subject.params


@partial(jax.jit, static_argnums=0)
def _logits(static: Any, arrays: Any, params: PyTree, inputs: Any) -> jax.Array:
  logits = static(arrays)(params, inputs)
  return logits.astype(_trees.at_least_float32(logits.dtype))


@partial(jax.jit, static_argnums=(0, 1))
def _stages(read: Any, static: Any, arrays: Any, params: PyTree, inputs: Any) -> Stages:
  found: Stages = read(static, arrays, params, inputs)
  return dataclasses.replace(found, arrays=tuple(x.astype(jnp.float32) for x in found.arrays))


@partial(jax.jit, static_argnums=0)
def _head_input(static: Any, arrays: Any, params: PyTree, inputs: Any) -> jax.Array:
  """Only what the head needs is computed: XLA leaves the rest out."""
  return stages.of_program(static, arrays, params, inputs).arrays[-1]


def same_order(
  batches: Iterable[Any], labels: np.ndarray | None, name: str
) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
  """Go through batches once: (inputs, labels, mask), all as large as the largest up to then.

  A smaller one is filled up with its last row, which the mask leaves out, so that one program
  serves all.

  Args:
    batches: as `mj.evaluate` takes them.
    labels: those of all rows that count, as they were the first time; None the first time.
    name: of the argument.

  Raises:
    ValueError: other labels than the first time.

  >>> batches = [(np.ones(2), [0, 1]), (np.ones(1), [0])]
  >>> [mask.tolist() for *_, mask in same_order(batches, None, "test")]
  [[True, True], [True, False]]
  """
  size, seen = 0, 0
  for inputs, own, mask in evaluation.batches_of(batches):
    if labels is not None and not np.array_equal(own[mask], labels[seen : seen + mask.sum()]):
      raise ValueError(
        f"{name}: yielded other labels than the first time; expected the same examples in the same "
        "order each time. Turn shuffling off."
      )
    seen, size = seen + int(mask.sum()), max(size, len(mask))
    yield filled(inputs, size), filled(own, size), np.pad(mask, (0, size - len(mask)))
  if labels is not None and seen != len(labels):
    raise ValueError(
      f"{name}: yielded {seen} examples, and {len(labels)} the first time; expected the same each "
      "time. Pass a list, or an object that can be iterated again from the start."
    )


def filled(x: Any, size: int) -> Any:
  """Repeat the last row up to `size` rows.

  >>> filled(np.array([1, 2]), 4)
  array([1, 2, 2, 2])
  """
  missing = size - len(x)
  return np.concatenate([x, np.repeat(np.asarray(x[-1:]), missing, axis=0)]) if missing else x


def gathered(batches: Iterable[Any], labels: np.ndarray, rows: Any, name: str) -> np.ndarray:
  """Fetch the inputs of some examples by their positions among those that count, in that order.

  >>> gathered([(np.arange(3.0), [0, 0, 0])], np.zeros(3, int), [2, 0, 2], "train")
  array([2., 0., 2.])
  """
  rows = np.asarray(rows)
  wanted, found, seen = np.unique(rows), [], 0
  for inputs, _, mask in same_order(batches, labels, name):
    here = wanted[(wanted >= seen) & (wanted < seen + mask.sum())] - seen
    if len(here):
      found.append(np.asarray(inputs)[np.flatnonzero(mask)[here]])
    seen += int(mask.sum())
  return np.concatenate(found)[np.searchsorted(wanted, rows)]


def _joined(parts: Sequence[Predictions]) -> Predictions:
  return Predictions(*map(np.concatenate, zip(*parts, strict=True)))
