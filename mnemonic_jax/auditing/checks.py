"""Checks of the arguments of `audit`; they come before anything is measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mnemonic_jax import _checks, _trees
from mnemonic_jax.auditing import subjects
from mnemonic_jax.auditing.panel import METRICS
from mnemonic_jax.auditing.subjects import Data, Reader, Subject
from mnemonic_jax.errors import nearest
from mnemonic_jax.learning import LearnedCodes

PyTree = Any


def require_metrics(metrics: Any) -> tuple[str, ...]:
  """Return the metrics to measure, in the order of the panel; "outputs" is always one."""
  if metrics is None:
    return METRICS
  if isinstance(metrics, (str, bytes)) or not isinstance(metrics, Iterable):
    raise TypeError(f"metrics: got {metrics!r}; expected a list of names, or None for all.")
  chosen = list(metrics)
  for name in chosen:
    if name not in METRICS:
      raise ValueError(f"metrics: got {name!r}. {nearest(str(name), METRICS)}")
  return tuple(name for name in METRICS if name in (*chosen, "outputs"))


def require_models(
  logits_fn: Any, before: Any, after: Any, retrained: Any, features_fn: Any
) -> dict[str, Subject]:
  """Return the models by name; refuse params of another architecture than `before`."""
  if isinstance(retrained, (Mapping, Subject)) or not isinstance(retrained, Sequence):
    raise TypeError(
      f"retrained: got {type(retrained).__name__}; expected a list of models, each params or a "
      "mnemonic_jax.Subject. Put a single one in a list."
    )
  given = {"before": before, "after": after}
  given |= {f"retrained {index}": model for index, model in enumerate(retrained)}
  models = {
    name: model if isinstance(model, Subject) else Subject(logits_fn, model, features_fn)
    for name, model in given.items()
  }
  for name, model in models.items():
    _checks.require_callable("logits_fn", model.logits_fn, "(params, inputs) -> (N, C) logits")
    if model.features_fn is not None:
      signature = "(params, inputs) -> {name: (N, ..., F)}"
      _checks.require_callable("features_fn", model.features_fn, signature)
    _trees.mask_leaves(None, model.params)
    _require_same(name, model.params, models["before"].params)
    if not bool(_finite(model.params)):
      raise ValueError(f"{name}: NaN or inf in params; expected finite ones.")
  return models


_finite = jax.jit(_trees.all_finite)


def _require_same(name: str, params: PyTree, before: PyTree) -> None:
  """Refuse a tree that differs in structure, shapes or dtypes."""
  leaves = _trees.require_like(name, params, "before", before)
  for path, new, old in zip(
    _trees.leaf_paths(before), leaves, jax.tree.leaves(before), strict=True
  ):
    layout = lambda x: (str(getattr(x, "dtype", type(x).__name__)), getattr(x, "shape", ()))
    if layout(new) != layout(old):
      raise ValueError(
        f"{name}: params{path} is {layout(new)}, and {layout(old)} before; "
        "expected the same architecture and the same classes. A Retrain keeps an output for each "
        "forgotten class."
      )


def require_data(before: Subject, train: Any, test: Any, classes: Any) -> tuple[Data, np.ndarray]:
  """Return the examples with all their labels, and the first batch of test inputs."""
  first, test_labels = _labels("test", test)
  _, train_labels = _labels("train", train)
  logits = jax.eval_shape(before.logits_fn, before.params, first)
  shape = getattr(logits, "shape", None)
  if shape is None or len(shape) != 2 or shape[0] != len(first):
    raise ValueError(
      f"logits_fn: returned {shape or type(logits).__name__}; expected logits ({len(first)}, C)."
    )
  count = int(shape[1])
  if isinstance(classes, Iterable) and not isinstance(classes, (str, bytes)):
    classes = list(classes)
  gone = _checks.require_classes("classes", classes, count)
  for name, labels in (("test", test_labels), ("train", train_labels)):
    _checks.require_labels(name, labels, len(labels), count)
    if missing := sorted(set(gone) - set(labels.tolist())):
      raise ValueError(
        f"{name}: holds no example of classes {missing}; expected some of every forgotten class, "
        "which the audit looks for."
      )
    if set(labels.tolist()) <= set(gone):
      raise ValueError(f"{name}: holds forgotten classes alone; expected kept ones too.")
  return Data(test, train, test_labels, train_labels, gone, count), first


def _labels(name: str, batches: Any) -> tuple[np.ndarray, np.ndarray]:
  """The first batch of inputs, and all labels that count."""
  if not isinstance(batches, Iterable):
    raise TypeError(f"{name}: got {_checks.kind(batches)}; expected batches (inputs, labels).")
  if isinstance(batches, Iterator):
    raise TypeError(
      f"{name}: got an iterator, which can be read once; expected batches that can be read again "
      f"and again, such as a list: {name}=list(batches)."
    )
  first, labels = None, []
  for inputs, own, mask in subjects.same_order(batches, None, name):
    first = np.asarray(inputs) if first is None else first
    labels.append(np.asarray(own)[mask])
  if first is None:
    raise ValueError(f"{name}: yielded nothing; expected at least one batch (inputs, labels).")
  return first, np.concatenate(labels)


def require_outputs(readers: Mapping[str, Reader], inputs: np.ndarray) -> None:
  """Refuse a model that fails on the inputs, has other classes, or gives NaN on the first batch."""
  for reader in readers.values():
    reader.logits(inputs)


def require_stages(readers: Mapping[str, Reader], inputs: np.ndarray) -> tuple[str, ...]:
  """Return the names of the stages; refuse models that differ in them."""
  found = {name: reader.widths(inputs) for name, reader in readers.items()}
  wanted = found["before"]
  if not wanted:
    raise ValueError(
      "features_fn: got None, and no kernel of this model writes into an array that can be read; "
      "expected (params, inputs) -> {name: (N, ..., F)}."
    )
  for name, widths in found.items():
    if list(widths.items()) != list(wanted.items()):
      raise ValueError(
        f"{name}: its stages are {widths}, and {wanted} before; expected the same architecture, "
        "and features_fn that give the same names."
      )
  return tuple(wanted)


def require_codes(codes: Any, inputs: np.ndarray, num_classes: int) -> np.ndarray | None:
  """Return codes (C, K, *shape) of all classes, for inputs of this shape."""
  if codes is None:
    return None
  codes = codes.codes if isinstance(codes, LearnedCodes) else codes
  _checks.require_codes(codes)
  if codes.shape[0] != num_classes or codes.shape[2:] != inputs.shape[1:]:
    raise ValueError(
      f"codes: got shape {codes.shape}; expected ({num_classes}, K, "
      f"{', '.join(map(str, inputs.shape[1:]))}), codes of the model before."
    )
  return np.asarray(codes)


def require_distinct(hashes: Mapping[str, str]) -> None:
  """Refuse a Retrain that is given twice: it would make Retrains look more alike than they are."""
  known: dict[str, str] = {}
  for name, made in hashes.items():
    if name.startswith("retrained") and (first := known.setdefault(made, name)) != name:
      raise ValueError(
        f"{name}: has the same params as {first}; expected Retrains of different seeds."
      )


def require_unseen(name: str, result: Mapping[str, Any], data: Data) -> None:
  """Refuse a Retrain that knows a forgotten class: its accuracy there is above chance."""
  for label in data.classes:
    accuracy, low, _ = result["per_class"][label]
    if low > 1 / data.num_classes:
      raise ValueError(
        f"{name}: gets {accuracy:.0%} of class {label} right, so it was trained on it; expected a "
        "model that was trained without the forgotten classes."
      )


def require_done(done: Any) -> dict[str, Any]:
  """Return a copy of earlier results; refuse what is none."""
  if not isinstance(done, Mapping) or not all(
    isinstance(key, str) and isinstance(value, Mapping) for key, value in done.items()
  ):
    raise TypeError(
      f"done: got {type(done).__name__} with other values than results; expected a dict of those "
      "that on_metric was given, or None."
    )
  return dict(done)
