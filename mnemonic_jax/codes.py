"""Mnemonic codes: one fixed random signal per class, drawn once and kept with the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mnemonic_jax import _validation

# The two distributions in use; each draws (key, shape, dtype).
DISTRIBUTIONS = {"normal": jax.random.normal, "uniform": jax.random.uniform}


def make_codes(
  key: jax.Array,
  num_classes: int,
  shape: Sequence[int],
  *,
  per_class: int = 1,
  distribution: str = "normal",
  dtype: Any = jnp.float32,
) -> jax.Array:
  """Draw the mnemonic codes of every class.

      xi_{c,k} ~ N(0, 1)  ("normal", the paper's)   or   U(0, 1)  ("uniform")

  elementwise and independently. Codes live in the space the model sees, after normalisation and augmentation. They
  trigger their classes: store them like a secret of the model.

  Guarantees:
    The same key, sizes and PRNG implementation give the same codes on any device count and any mesh.

  Args:
    key: one typed key, `jax.random.key(seed)`.
    num_classes: C, at least 1.
    shape: the shape of one input, without batch axis, each size at least 1.
    per_class: K, codes a class, at least 1.
    distribution: "normal" or "uniform".
    dtype: a floating dtype.

  Returns:
    (C, K, *shape) of `dtype`.

  Raises:
    TypeError: key is no typed key, a size is no integer, or dtype is not floating.
    ValueError: a size below one, or an unknown distribution.

  >>> make_codes(jax.random.key(0), num_classes=10, shape=(28, 28, 1)).shape
  (10, 1, 28, 28, 1)

  Source: Yamashita, Yamada, Shibata (2024), section 3, "mnemonic code".
  """
  _validation.require_key(key)
  num_classes = _validation.require_size("num_classes", num_classes)
  per_class = _validation.require_size("per_class", per_class)
  if isinstance(shape, (str, bytes)) or not isinstance(shape, Sequence) or not len(shape):
    raise TypeError(f"shape: got {shape!r}; expected the shape of one input, such as (28, 28, 1).")
  shape = tuple(_validation.require_size("shape", size) for size in shape)
  if not isinstance(distribution, str) or distribution not in DISTRIBUTIONS:
    raise ValueError(f"distribution: got {distribution!r}; expected one of {sorted(DISTRIBUTIONS)}.")
  try:
    dtype = jnp.dtype(dtype)
  except TypeError:
    raise TypeError(f"dtype: got {dtype!r}; expected a floating dtype, such as jnp.float32.") from None
  if not jnp.issubdtype(dtype, jnp.floating) or jax.dtypes.canonicalize_dtype(dtype) != dtype:
    raise TypeError(f"dtype: got {dtype}; expected a floating dtype that jax has on: float64 needs jax_enable_x64.")
  return DISTRIBUTIONS[distribution](key, (num_classes, per_class, *shape), dtype)
