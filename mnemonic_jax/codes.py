"""Mnemonic codes: draw fixed random inputs for each class, and mix them into training batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp

from mnemonic_jax import _checks, _mesh

PyTree = Any

# Name -> a function (key, shape, dtype) that draws.
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

  elementwise and independently. Codes live in the space that the model sees, after normalisation
  and augmentation. A model trained with codes recognises them: keep them as secret as the model.

  Guarantees:
    The same key, sizes and PRNG implementation give the same codes on any mesh.

  Args:
    key: one typed key, such as jax.random.key(seed).
    num_classes: C, at least 1.
    shape: the shape of one input, without the batch axis; every size at least 1.
    per_class: K, codes per class, at least 1.
    distribution: "normal" or "uniform".
    dtype: a floating dtype.

  Returns:
    (C, K, *shape) of `dtype`.

  Raises:
    TypeError: key is not a typed key, a size is not an integer, or dtype is not floating.
    ValueError: a size is below 1, or the distribution is unknown.

  >>> make_codes(jax.random.key(0), num_classes=10, shape=(28, 28, 1)).shape
  (10, 1, 28, 28, 1)

  Source: Yamashita, Yamada, Shibata (2024), section 3, "mnemonic code".
  """
  _checks.require_key(key)
  num_classes = _checks.require_size("num_classes", num_classes)
  per_class = _checks.require_size("per_class", per_class)
  if isinstance(shape, (str, bytes)) or not isinstance(shape, Sequence) or not len(shape):
    raise TypeError(f"shape: got {shape!r}; expected the shape of one input, such as (28, 28, 1).")
  shape = tuple(_checks.require_size("shape", size) for size in shape)
  if not isinstance(distribution, str) or distribution not in DISTRIBUTIONS:
    raise ValueError(
      f"distribution: got {distribution!r}; expected one of {sorted(DISTRIBUTIONS)}."
    )
  try:
    dtype = jnp.dtype(dtype)
  except TypeError:
    raise TypeError(
      f"dtype: got {dtype!r}; expected a floating dtype, such as jnp.float32."
    ) from None
  if not jnp.issubdtype(dtype, jnp.floating) or jax.dtypes.canonicalize_dtype(dtype) != dtype:
    raise TypeError(
      f"dtype: got {dtype}; expected a floating dtype, and float64 only with jax_enable_x64."
    )
  return DISTRIBUTIONS[distribution](key, (num_classes, per_class, *shape), dtype)


@overload
def mix(
  key: jax.Array,
  images: jax.Array,
  labels: jax.Array,
  codes: jax.Array,
  rate: Any,
  *,
  return_mask: Literal[False] = ...,
) -> jax.Array: ...
@overload
def mix(
  key: jax.Array,
  images: jax.Array,
  labels: jax.Array,
  codes: jax.Array,
  rate: Any,
  *,
  return_mask: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...
def mix(
  key: jax.Array,
  images: jax.Array,
  labels: jax.Array,
  codes: jax.Array,
  rate: Any,
  *,
  return_mask: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Replace each image by a code of its own class with probability `rate`.

      m_n ~ Bernoulli(rate),   k_n ~ Uniform{0..K-1}
      image_n <- codes[label_n, k_n] if m_n else image_n

  Labels stay as they are. Call it after augmentation and normalisation, so that codes are not
  augmented.

  Guarantees:
    The result depends on key, shapes and values only, not on devices. rate=0 returns the images,
    rate=1 only codes.

  Edge cases:
    labels out of range: concrete ones raise; for traced ones the replaced rows are NaN, never the
      code of another class.

  Args:
    key: one typed key; pass a fresh one each step.
    images: (N, *shape), floating, in the space that the model sees.
    labels: (N,), integers in [0, C).
    codes: (C, K, *shape), floating.
    rate: a probability in [0, 1], the paper's t_mix; may be traced.
    return_mask: also return which rows were replaced.

  Returns:
    The images with some rows replaced, same shape and dtype. With `return_mask`, a pair of these
    and the mask of replaced rows, (N,) bool.

  Raises:
    TypeError: images or codes are not floating, labels are not integers, or key is not a typed
      key.
    ValueError: shapes do not fit, labels are out of range, or rate is outside [0, 1].

  >>> codes = jnp.ones((2, 1, 3))
  >>> mix(jax.random.key(0), jnp.zeros((2, 3)), jnp.array([0, 1]), codes, rate=1.0)
  Array([[1., 1., 1.],
         [1., 1., 1.]], dtype=float32)

  Source: Yamashita, Yamada, Shibata (2024), section 3, training with t_mix.
  """
  _checks.require_key(key)
  _checks.require_codes(codes)
  _checks.require_rate(rate)
  dtype = getattr(images, "dtype", None)
  if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(
      f"images: got {_checks.kind(images)}; expected floating images. Codes are drawn in the space "
      "that the model sees: normalise images before mixing."
    )
  if images.ndim < 1 or images.shape[1:] != codes.shape[2:]:
    raise ValueError(
      f"images: got shape {images.shape}; expected (N, *{tuple(codes.shape[2:])}), because codes "
      f"have shape {codes.shape}."
    )
  if not images.shape[0]:
    raise ValueError(
      f"images: got shape {images.shape}, an empty batch; expected at least one image."
    )
  _checks.require_labels("labels", labels, images.shape[0], codes.shape[0])
  mixed, replaced = _mix(key, images, labels, codes, rate)
  return (mixed, replaced) if return_mask else mixed


@jax.jit
def _mix(
  key: jax.Array, images: jax.Array, labels: jax.Array, codes: jax.Array, rate: Any
) -> tuple[jax.Array, jax.Array]:
  def replace(
    batch: PyTree, key: jax.Array, codes: jax.Array, rate: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    images, labels = batch
    num_classes, per_class = codes.shape[:2]
    replace_key, choice_key = jax.random.split(key)
    replaced = jax.random.bernoulli(replace_key, rate, labels.shape)
    choice = (
      jax.random.randint(choice_key, labels.shape, 0, per_class)
      if per_class > 1
      else jnp.zeros_like(labels)
    )
    # num_classes may not fit in the dtype of the labels.
    wide = labels.astype(jnp.int64 if labels.dtype.itemsize == 8 else jnp.int32)
    # Indexing would count a negative label from the end.
    known = jnp.where(wide < 0, num_classes, wide)
    own = codes.at[known, choice].get(mode="fill", fill_value=jnp.nan)
    rows = replaced.reshape(-1, *(1,) * (images.ndim - 1))
    return jnp.where(rows, own.astype(images.dtype), images), replaced

  spec = jax.typeof(images).sharding.spec
  out_specs = spec, jax.sharding.PartitionSpec(*spec[:1])
  arguments = key, codes, jnp.asarray(rate, float)
  return _mesh.with_automatic_axes(replace, (images, labels), *arguments, out_specs=out_specs)
