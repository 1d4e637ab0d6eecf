"""Checks of arguments that several modules share; checks of values are skipped for tracers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


def is_concrete(tree: PyTree) -> bool:
  """Return whether every leaf has values to check: none is traced or a `ShapeDtypeStruct`."""
  return not any(
    isinstance(leaf, (jax.core.Tracer, jax.ShapeDtypeStruct)) for leaf in jax.tree.leaves(tree)
  )


def require_size(name: str, value: Any, least: int = 1) -> int:
  """Return `value` as an int; refuse anything but an integer of at least `least`."""
  expected = f"expected an integer of at least {least}."
  if isinstance(value, (bool, np.bool_)):
    raise TypeError(f"{name}: got {value!r}; {expected}")
  try:
    size = operator.index(value)
  except TypeError:
    raise TypeError(f"{name}: got {value!r}; {expected}") from None
  if size < least:
    raise ValueError(f"{name}: got {size}; {expected}")
  return size


def require_key(key: Any) -> jax.Array:
  """Return `key`; refuse anything but one typed PRNG key."""
  if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    raise TypeError(
      f"key: got {kind(key)}; expected a typed PRNG key. "
      "Make one with jax.random.key(seed), or wrap an old one with jax.random.wrap_key_data."
    )
  if key.ndim:
    raise ValueError(
      f"key: got an array of {key.shape} keys; expected one key. Pass one of them, or vmap over "
      "them."
    )
  return key


def require_rate(rate: Any) -> Any:
  """Return `rate`; refuse anything but a number in [0, 1]. A traced scalar passes."""
  if isinstance(rate, (bool, np.bool_, str, bytes)) or np.ndim(rate):
    raise TypeError(f"rate: got {rate!r}; expected one number in [0, 1].")
  if isinstance(rate, jax.core.Tracer):
    return rate
  try:
    value = float(rate)
  except (TypeError, ValueError):
    raise TypeError(f"rate: got {rate!r}; expected one number in [0, 1].") from None
  if not 0.0 <= value <= 1.0:
    raise ValueError(
      f"rate: got {value}; expected a probability in [0, 1], the share of examples to replace by "
      "codes."
    )
  return rate


def require_classes(
  name: str, classes: Iterable[Any], num_classes: int, *, proper: bool = True
) -> tuple[int, ...]:
  """Return `classes` as ints; refuse any that are repeated or outside [0, num_classes).

  `proper` also refuses an empty list and a list of all classes.
  """
  if isinstance(classes, (str, bytes)) or not isinstance(classes, Iterable):
    raise TypeError(f"{name}: got {classes!r}; expected a list of class indices, such as [0].")
  checked: list[int] = []
  for value in classes:
    scalar_array = (
      hasattr(value, "dtype") and np.ndim(value) == 0 and jnp.issubdtype(value.dtype, jnp.integer)
    )
    if isinstance(value, bool) or not (isinstance(value, int) or scalar_array):
      raise TypeError(
        f"{name}: got {value!r} of type {type(value).__name__}; expected integer class indices, "
        "such as [0, 3]. Bools and floats are not accepted."
      )
    index = int(value)
    if not 0 <= index < num_classes:
      raise ValueError(
        f"{name}: got {index}; expected integers in [0, {num_classes}), one per class of the model."
      )
    if index in checked:
      raise ValueError(
        f"{name}: class {index} is repeated in {[*checked, index]}; expected each class once."
      )
    checked.append(index)
  if proper and not checked:
    raise ValueError(f"{name}: got none; expected at least one class out of [0, {num_classes}).")
  if proper and len(checked) == num_classes:
    raise ValueError(f"{name}: got all {num_classes} classes; expected at least one class to keep.")
  return tuple(checked)


def require_labels(name: str, labels: Any, num_examples: int, num_classes: int) -> None:
  """Refuse labels other than integers (num_examples,) in [0, num_classes)."""
  dtype = getattr(labels, "dtype", None)
  if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
    raise TypeError(
      f"{name}: got {kind(labels)}; expected an integer array of shape ({num_examples},)."
    )
  if labels.shape != (num_examples,):
    raise ValueError(
      f"{name}: got shape {labels.shape}; expected ({num_examples},), one label per image."
    )
  if num_examples and is_concrete(labels):
    host = np.asarray(labels)
    low, high = int(host.min()), int(host.max())
    if low < 0 or high >= num_classes:
      raise ValueError(
        f"{name}: got values from {low} to {high}; expected integers in [0, {num_classes})."
      )


def require_codes(codes: Any) -> None:
  """Refuse anything but a floating array (C, K, *shape) with at least two classes."""
  dtype = getattr(codes, "dtype", None)
  if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(
      f"codes: got {kind(codes)}; expected a floating array (C, K, *shape). "
      "Make one with mnemonic_jax.make_codes."
    )
  if codes.ndim < 3 or 0 in codes.shape:
    raise ValueError(
      f"codes: got shape {codes.shape}; expected (C, K, *shape): K codes for each of C classes, "
      "each of the shape of an input. Make them with mnemonic_jax.make_codes."
    )
  if codes.shape[0] < 2:
    raise ValueError(
      f"codes: got shape {codes.shape} with one class; expected at least two, one to forget and "
      "one to keep."
    )


def require_callable(name: str, value: Any, signature: str) -> Callable[..., Any]:
  """Return `value`; refuse what cannot be called or hashed. jit finds compiled programs by hash."""
  if not callable(value):
    raise TypeError(f"{name}: got {kind(value)}; expected a function {signature}.")
  try:
    hash(value)
  except TypeError:
    raise TypeError(
      f"{name}: got an unhashable {type(value).__name__}; expected a function {signature}. "
      "Wrap it in a def or lambda."
    ) from None
  return value


def require_finite_number(name: str, value: Any) -> None:
  """Refuse a number, or array of numbers, that is negative or not finite in float32."""
  array = np.asarray(value)
  if array.dtype == bool or not (
    np.issubdtype(array.dtype, np.number) or jnp.issubdtype(array.dtype, jnp.floating)
  ):
    raise TypeError(f"{name}: got {value!r}; expected a number, finite and not negative.")
  if np.issubdtype(array.dtype, np.complexfloating):
    raise TypeError(f"{name}: got {value!r}; expected a real number, finite and not negative.")
  with np.errstate(over="ignore"):
    numbers = array.astype(np.float32)
  if not np.all(np.isfinite(numbers)) or np.any(numbers < 0):
    raise ValueError(
      f"{name}: got {value!r}; expected a number, finite in float32 and not negative, such as 1e-3."
    )


def kind(value: Any) -> str:
  """Describe `value` for a message: its dtype and shape, or its value and type."""
  if hasattr(value, "dtype") and hasattr(value, "shape"):
    return f"an array of dtype {value.dtype} and shape {value.shape}"
  return f"{value!r} of type {type(value).__name__}"
