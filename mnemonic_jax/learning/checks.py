"""Checks of the arguments of `learn_codes`; the cheap ones come first."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax import _checks, _trees
from mnemonic_jax.learning.reads import Arrays, Functions, Unfit

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Settings:
  """The numbers of a call of `learn_codes`, checked."""

  num_classes: int
  per_class: int
  recall: int
  num_judges: int
  min_members: int
  steps: int
  recall_steps: int
  learning_rate: float

  def __post_init__(self) -> None:
    for name in ("num_classes", "per_class", "min_members", "steps", "recall_steps"):
      object.__setattr__(self, name, _checks.require_size(name, getattr(self, name)))
    for name in ("recall", "num_judges"):
      object.__setattr__(self, name, _require_count(name, getattr(self, name)))
    if self.num_classes < 2:
      raise ValueError(
        f"num_classes: got {self.num_classes}; expected at least 2, one to forget and one to keep."
      )
    _checks.require_finite_number("learning_rate", self.learning_rate)
    if np.ndim(self.learning_rate) or not self.learning_rate > 0:
      raise ValueError(
        f"learning_rate: got {self.learning_rate!r}; expected one positive number, a share of "
        "input_range such as 0.05."
      )


def _require_count(name: str, value: Any) -> int:
  """Return an integer of at least 0."""
  try:
    count = operator.index(value)
  except TypeError:
    raise TypeError(f"{name}: got {value!r}; expected an integer of at least 0.") from None
  if isinstance(value, bool) or count < 0:
    raise ValueError(f"{name}: got {value!r}; expected an integer of at least 0.")
  return count


def require_functions(logits_fn: Any, features_fn: Any, statistics_fn: Any) -> None:
  """Refuse what is no function."""
  _checks.require_callable("logits_fn", logits_fn, "(params, inputs) -> (N, C) logits")
  if features_fn is not None:
    _checks.require_callable("features_fn", features_fn, "(params, inputs) -> {name: (N, ..., F)}")
  if statistics_fn is not None:
    signature = "(params, inputs) -> {name: (values (N, ..., F), mean (F,), variance (F,))}"
    _checks.require_callable("statistics_fn", statistics_fn, signature)


def require_source(batches: Any, shape: Any, features_fn: Any) -> tuple[int, ...] | None:
  """Return the shape of one input, if it is given; without data it must be."""
  if batches is None and shape is None:
    raise ValueError(
      "shape: got None with batches=None; expected the shape of one input, such as (32, 32, 3), to "
      "recall codes of. Or pass batches to learn them from."
    )
  if batches is None and features_fn is not None:
    raise ValueError(
      "features_fn: got a function with batches=None; expected None, because recalled codes match "
      "no features. Pass batches, or statistics_fn."
    )
  if batches is not None and not isinstance(batches, Iterable):
    raise TypeError(
      f"batches: got {_checks.kind(batches)}; expected an iterable of (inputs, labels), or None to "
      "recall codes without data."
    )
  if shape is None:
    return None
  if isinstance(shape, (str, bytes)) or not isinstance(shape, Sequence) or not len(shape):
    raise TypeError(f"shape: got {shape!r}; expected the shape of one input, such as (28, 28, 1).")
  return tuple(_checks.require_size("shape", size) for size in shape)


def require_range(input_range: Any, shape: tuple[int, ...] | None) -> tuple[np.ndarray, np.ndarray]:
  """Return (low, high), each broadcast to the shape of an input, or to each other."""
  if not isinstance(input_range, (tuple, list)) or len(input_range) != 2:
    raise TypeError(
      f"input_range: got {input_range!r}; expected a pair (low, high), such as (0.0, 1.0)."
    )
  try:
    if shape is None:
      shape = np.broadcast_shapes(*map(np.shape, input_range))
    low, high = (np.broadcast_to(np.asarray(bound, np.float32), shape) for bound in input_range)
  except (TypeError, ValueError):
    raise ValueError(
      f"input_range: got {input_range!r}; expected numbers, or arrays that broadcast to the shape "
      f"{shape} of one input."
    ) from None
  if not (np.all(np.isfinite(low)) and np.all(np.isfinite(high)) and np.all(low < high)):
    raise ValueError(
      f"input_range: got {input_range!r}; expected finite numbers with low < high everywhere."
    )
  return low, high


def require_params(params: PyTree) -> None:
  """Refuse leaves that are not floating, or not finite."""
  _trees.mask_leaves(None, params)
  if _finite(params):
    return
  paths = zip(_trees.leaf_paths(params), jax.tree.leaves(params), strict=True)
  bad = [path for path, leaf in paths if not _finite(leaf)]
  raise ValueError(
    f"params: NaN or inf in {', '.join(bad[:3])}; expected finite params. Restore an earlier "
    "checkpoint."
  )


_all_finite = jax.jit(_trees.all_finite)


def _finite(tree: PyTree) -> bool:
  return bool(_all_finite(tree))


def require_statistics(functions: Functions, arrays: Arrays, inputs: jax.Array) -> None:
  """Refuse running statistics of the wrong shape, negative or not finite."""
  if functions.statistics is None:
    return
  kept = _running(functions, arrays, inputs)
  for name, (mean, variance) in kept.items():
    if not np.all(np.isfinite(mean)) or not np.all(np.isfinite(variance)):
      raise ValueError(
        f"statistics_fn: NaN or inf in the running statistics of {name!r}; expected finite ones. "
        "Restore an earlier checkpoint."
      )
    if np.any(np.asarray(variance) < 0):
      raise ValueError(
        f"statistics_fn: the running variance of {name!r} has {float(np.min(variance)):.3g}; "
        "expected variances, which are not negative. Were they in another order than (values, mean,"
        " variance)?"
      )


@partial(jax.jit, static_argnums=0)
def _running(functions: Functions, arrays: Arrays, inputs: jax.Array) -> dict[str, Any]:
  """The running statistics, {name: (mean, variance)}."""
  assert functions.statistics is not None
  named = functions.statistics(arrays.statistics)(arrays.params, inputs)
  if not isinstance(named, dict) or not named:
    raise Unfit(
      f"statistics_fn: returned {type(named).__name__}; expected a dict {{name: (values, mean, "
      "variance)} with at least one layer. Pass None for a model without running statistics."
    )
  for name, entry in named.items():
    if not isinstance(entry, (tuple, list)) or len(entry) != 3:
      raise Unfit(
        f"statistics_fn: {name!r} is a {type(entry).__name__}; expected three arrays, (values, "
        "mean, variance)."
      )
    shapes = [tuple(jnp.shape(x)) for x in entry]
    values, *others = shapes
    if len(values) < 2 or values[0] != len(inputs) or math.prod(values) == 0:
      raise Unfit(
        f"statistics_fn: values of {name!r} have shape {values} for {len(inputs)} inputs; expected "
        f"({len(inputs)}, ..., F), the batch axis first and channels last."
      )
    if others != [values[-1:]] * 2:
      raise Unfit(
        f"statistics_fn: mean and variance of {name!r} have shapes {others[0]} and {others[1]}; "
        f"expected {values[-1:]}, one number for each channel of the values {values}."
      )
  return {name: (entry[1], entry[2]) for name, entry in named.items()}
