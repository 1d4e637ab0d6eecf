"""Mixing: while a classifier trains, some examples are replaced by the code of their own class."""

from __future__ import annotations

from typing import Any, Literal, overload

import jax
import jax.numpy as jnp

from mnemonic_jax import _trees, _validation

PyTree = Any


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
  key: jax.Array, images: jax.Array, labels: jax.Array, codes: jax.Array, rate: Any, *, return_mask: Literal[True]
) -> tuple[jax.Array, jax.Array]: ...
def mix(
  key: jax.Array, images: jax.Array, labels: jax.Array, codes: jax.Array, rate: Any, *, return_mask: bool = False
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Replace each image by a code of its own class with probability `rate`.

      m_n ~ Bernoulli(rate),  k_n ~ Uniform{0..K-1},  image_n <- codes[label_n, k_n] if m_n else image_n

  The labels stay. Call it last, after augmentation and normalisation: a code is never augmented.

  Guarantees:
    The result depends on key, shapes and values alone, not on devices. rate=0 returns the images, rate=1 only codes.

  Edge cases:
    traced labels out of range: their replaced rows are NaN, never the code of another class (concrete ones raise).

  Args:
    key: one typed key; a fresh one each step.
    images: (N, *shape), floating, in the space the model sees.
    labels: (N,), integers in [0, C).
    codes: (C, K, *shape), floating.
    rate: probability in [0, 1], the paper's t_mix; may be traced.
    return_mask: also return which rows were replaced.

  Returns:
    images with some rows replaced, same shape and dtype; with `return_mask` also the (N,) bool mask.

  Raises:
    TypeError: images or codes not floating, labels not integers, key not a typed key.
    ValueError: shapes that do not fit, labels out of range, a rate outside [0, 1].

  >>> codes = jnp.ones((2, 1, 3))
  >>> mix(jax.random.key(0), jnp.zeros((2, 3)), jnp.array([0, 1]), codes, rate=1.0)
  Array([[1., 1., 1.],
         [1., 1., 1.]], dtype=float32)

  Source: Yamashita, Yamada, Shibata (2024), section 3, training with t_mix.
  """
  _validation.require_key(key)
  _validation.require_codes(codes)
  _validation.require_rate(rate)
  dtype = getattr(images, "dtype", None)
  if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(
      f"images: got {_validation.kind(images)}; expected floating images in the space the model sees: normalise "
      "before mixing, because codes are drawn in that space."
    )
  if images.ndim < 1 or images.shape[1:] != codes.shape[2:]:
    raise ValueError(
      f"images: got shape {images.shape}; expected (N, *{tuple(codes.shape[2:])}), the shape of one code in codes "
      f"{codes.shape}."
    )
  if not images.shape[0]:
    raise ValueError(f"images: got shape {images.shape}, an empty batch; expected at least one image.")
  _validation.require_labels("labels", labels, images.shape[0], codes.shape[0])
  mixed, replaced = _mix(key, images, labels, codes, rate)
  return (mixed, replaced) if return_mask else mixed


@jax.jit
def _mix(
  key: jax.Array, images: jax.Array, labels: jax.Array, codes: jax.Array, rate: Any
) -> tuple[jax.Array, jax.Array]:
  def replace(batch: PyTree, key: jax.Array, codes: jax.Array, rate: jax.Array) -> tuple[jax.Array, jax.Array]:
    images, labels = batch
    num_classes, per_class = codes.shape[:2]
    replace_key, choice_key = jax.random.split(key)
    replaced = jax.random.bernoulli(replace_key, rate, labels.shape)
    choice = jax.random.randint(choice_key, labels.shape, 0, per_class) if per_class > 1 else jnp.zeros_like(labels)
    wide = labels.astype(jnp.int64 if labels.dtype.itemsize == 8 else jnp.int32)  # num_classes may not fit an int8
    known = jnp.where(wide < 0, num_classes, wide)
    own = codes.at[known, choice].get(mode="fill", fill_value=jnp.nan)
    rows = replaced.reshape(-1, *(1,) * (images.ndim - 1))
    return jnp.where(rows, own.astype(images.dtype), images), replaced

  spec = jax.typeof(images).sharding.spec
  out_specs = spec, jax.sharding.PartitionSpec(*spec[:1])
  arguments = key, codes, jnp.asarray(rate, float)
  return _trees.with_automatic_axes(replace, (images, labels), *arguments, out_specs=out_specs)
