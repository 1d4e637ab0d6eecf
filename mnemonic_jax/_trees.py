"""Helpers on pytrees: paths, tree prefixes and masks of leaves."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


def flatten(tree: PyTree) -> tuple[list[Any], Any]:
  """Return leaves and tree definition, the latter as Any because jaxlib has no stub for it."""
  leaves, treedef = jax.tree.flatten(tree)
  return leaves, treedef


def at_least_float32(dtype: Any) -> Any:
  """Return the dtype to sum squares of `dtype` in: itself, or float32 if it has fewer bits."""
  return dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.dtype(jnp.float32)


def power_of_two(exponent: jax.Array, dtype: Any) -> jax.Array:
  """Return exactly 2**exponent, for a normal result; jnp.exp2 rounds on some backends."""
  info = jnp.finfo(dtype)
  integer = jnp.int64 if info.bits == 64 else jnp.int32
  biased = exponent.astype(integer) + (info.maxexp - 1)
  return jax.lax.bitcast_convert_type(biased << info.nmant, dtype)


def exponent(x: jax.Array) -> jax.Array:
  """Return floor(log2(x)) of nonnegative normal numbers, int32.

  Zero and subnormal numbers give the smallest exponent, inf and NaN the largest.
  """
  info = jnp.finfo(x.dtype)
  bits = jax.lax.bitcast_convert_type(x, jnp.int64 if info.bits == 64 else jnp.int32)
  return (bits >> info.nmant).astype(jnp.int32) - (info.maxexp - 1)


def like(tree: PyTree, leaves: Iterable[Any]) -> PyTree:
  """Make a tree like `tree` from other leaves, in leaf order; leaves may be None."""
  return flatten(tree)[1].unflatten(leaves)


def leaf_paths(tree: PyTree) -> list[str]:
  """Return the path of every leaf, as `jax.tree_util.keystr` writes it, in leaf order."""
  return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def by_path(tree: PyTree) -> dict[str, Any]:
  """Return the leaves by their dotted paths.

  >>> by_path({"hidden": {"bias": 1, "kernel": 2}})
  {'hidden.bias': 1, 'hidden.kernel': 2}
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def prefix_leaves(name: str, prefix: PyTree, tree: PyTree) -> tuple[Hashable, ...]:
  """Spread a tree prefix over `tree`: one value per leaf. None is a value in `prefix`."""
  values: list[Hashable] = []
  spread = lambda value, subtree: values.extend([value] * len(jax.tree.leaves(subtree)))
  try:
    jax.tree.map(spread, prefix, tree, is_leaf=lambda x: x is None)
  except ValueError as error:
    raise ValueError(
      f"{name}: got {prefix!r}; expected one value, or a tree prefix of params. {error}"
    ) from None
  return tuple(values)


def all_finite(tree: PyTree) -> jax.Array:
  """Return whether every floating leaf is finite, () bool; traceable."""
  leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)]
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))


def mask_leaves(mask: PyTree, params: PyTree) -> tuple[bool, ...]:
  """Spread `mask` over `params`, one bool per leaf; refuse a leaf that is True and not floating."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  if not leaves:
    raise ValueError("params: got a tree without leaves; expected at least one floating array.")
  values = prefix_leaves("mask", True if mask is None else mask, params)
  for value in values:
    if not isinstance(value, (bool, np.bool_)):
      raise TypeError(
        f"mask: got {value!r}; expected bools, True where a leaf of params may be perturbed."
      )
  if not any(values):
    raise ValueError("mask: leaves out every leaf of params; expected True for at least one.")
  for (path, leaf), value in zip(leaves, values, strict=True):
    if not value:
      continue
    name, dtype = f"params{jax.tree_util.keystr(path)}", getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
      what = f"dtype {dtype}" if dtype is not None else f"{leaf!r} of type {type(leaf).__name__}"
      raise TypeError(
        f"{name}: got {what}; expected floating arrays only. Close over constants and running "
        "statistics in the function, or leave the leaf out with mask."
      )
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
      raise TypeError(
        f"{name}: got dtype {dtype} while jax_enable_x64 is off, so jax would cast it to fewer "
        "bits. Cast params to float32, or enable x64."
      )
  return tuple(bool(value) for value in values)


def axis_leaves(layer_axis: PyTree, params: PyTree) -> tuple[int | None, ...]:
  """Spread `layer_axis` over `params`: one nonnegative axis, or None, per leaf."""
  axes: list[int | None] = []
  spread = prefix_leaves("layer_axis", layer_axis, params)
  for (path, leaf), axis in zip(jax.tree_util.tree_leaves_with_path(params), spread, strict=True):
    if axis is None:
      axes.append(None)
      continue
    if isinstance(axis, (bool, np.bool_)) or not isinstance(axis, (int, np.integer)):
      raise TypeError(f"layer_axis: got {axis!r}; expected an int or None for each leaf of params.")
    if not -np.ndim(leaf) <= axis < np.ndim(leaf):
      where = jax.tree_util.keystr(path)
      raise ValueError(
        f"layer_axis: got {axis} for params{where} of shape {np.shape(leaf)}; "
        "expected an axis of that leaf."
      )
    axes.append(int(axis) % np.ndim(leaf))
  return tuple(axes)


def require_like(name: str, tree: PyTree, reference_name: str, reference: PyTree) -> list[Any]:
  """Return the leaves of `tree` in the order of `reference`; a leaf left out by a mask is None."""
  treedef: Any = jax.tree.structure(reference)
  try:
    leaves = treedef.flatten_up_to(tree)
  except (ValueError, TypeError) as error:
    raise ValueError(f"{name}: its tree does not match that of {reference_name}: {error}") from None
  for path, leaf in zip(leaf_paths(reference), leaves, strict=True):
    if leaf is not None and not hasattr(leaf, "shape") and not isinstance(leaf, (int, float)):
      raise ValueError(
        f"{name}: its tree does not match that of {reference_name} at {path}: "
        f"got {type(leaf).__name__}."
      )
  return list(leaves)
