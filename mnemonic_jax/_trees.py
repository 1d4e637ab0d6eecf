"""Small helpers on pytrees: paths, prefixes and the leaves that take part."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


def flatten(tree: PyTree) -> tuple[list[Any], Any]:
  """Leaves and tree definition, the latter typed loosely because jaxlib ships no stub for it."""
  leaves, treedef = jax.tree.flatten(tree)
  return leaves, treedef


def at_least_float32(dtype: Any) -> Any:
  """`dtype`, or float32 where it has fewer bits: what sums of its squares are kept in."""
  return dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.dtype(jnp.float32)


def power_of_two(exponent: jax.Array, dtype: Any) -> jax.Array:
  """Exactly 2**exponent for an exponent in the normal range, built from bits (exp2 rounds on some backends)."""
  info = jnp.finfo(dtype)
  integer = jnp.int64 if info.bits == 64 else jnp.int32
  biased = exponent.astype(integer) + (info.maxexp - 1)
  return jax.lax.bitcast_convert_type(biased << info.nmant, dtype)


def exponent(x: jax.Array) -> jax.Array:
  """The exponent of 2 in numbers that are not negative, int32; of 0 the smallest one, of inf and NaN the largest."""
  info = jnp.finfo(x.dtype)
  bits = jax.lax.bitcast_convert_type(x, jnp.int64 if info.bits == 64 else jnp.int32)
  return (bits >> info.nmant).astype(jnp.int32) - (info.maxexp - 1)


def like(tree: PyTree, leaves: Iterable[Any]) -> PyTree:
  """Make a tree like `tree` from other leaves, in leaf order; they may be None."""
  return flatten(tree)[1].unflatten(leaves)


def leaf_paths(tree: PyTree) -> list[str]:
  """The path of every leaf as `jax.tree_util.keystr` writes it, in leaf order."""
  return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def by_path(tree: PyTree) -> dict[str, Any]:
  """The leaves by their dotted paths.

  >>> by_path({"hidden": {"bias": 1, "kernel": 2}})
  {'hidden.bias': 1, 'hidden.kernel': 2}
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def prefix_leaves(name: str, prefix: PyTree, tree: PyTree) -> tuple[Hashable, ...]:
  """Spread a tree prefix over `tree` and return one value per leaf; None is a value in `prefix`, nothing in `tree`."""
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
  """() bool: whether no floating leaf has a NaN or inf."""
  leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)]
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))


def mask_leaves(mask: PyTree, params: PyTree) -> tuple[bool, ...]:
  """One bool per leaf of `params`: True where the leaf takes part. Refuses leaves that cannot be differentiated."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  if not leaves:
    raise ValueError("params: got a tree without leaves; expected at least one floating array.")
  chosen = prefix_leaves("mask", True if mask is None else mask, params)
  for value in chosen:
    if not isinstance(value, (bool, np.bool_)):
      raise TypeError(
        f"mask: got {value!r}; expected bools, True where a leaf of params may be perturbed."
      )
  if not any(chosen):
    raise ValueError("mask: leaves out every leaf of params; expected True for at least one.")
  for (path, leaf), takes_part in zip(leaves, chosen, strict=True):
    dtype = getattr(leaf, "dtype", None)
    if takes_part and (dtype is None or not jnp.issubdtype(dtype, jnp.floating)):
      what = f"dtype {dtype}" if dtype is not None else f"{leaf!r} of type {type(leaf).__name__}"
      raise TypeError(
        f"params{jax.tree_util.keystr(path)}: got {what}; expected floating arrays only. Close over constants and "
        "running statistics in the function, or leave the leaf out with mask."
      )
    if takes_part and jax.dtypes.canonicalize_dtype(dtype) != dtype:
      raise TypeError(
        f"params{jax.tree_util.keystr(path)}: got dtype {dtype} while jax_enable_x64 is off; jax would halve it. "
        "Cast params to float32, or enable x64."
      )
  return tuple(bool(value) for value in chosen)


def axis_leaves(layer_axis: PyTree, params: PyTree) -> tuple[int | None, ...]:
  """One layer axis (or None) per leaf of `params`, as a non-negative int."""
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
        f"layer_axis: got {axis} for params{where} of shape {np.shape(leaf)}; expected an axis of that leaf."
      )
    axes.append(int(axis) % np.ndim(leaf))
  return tuple(axes)


def require_like(name: str, tree: PyTree, reference_name: str, reference: PyTree) -> list[Any]:
  """Leaves of `tree` in the order of `reference`; None where a masked leaf was left out."""
  treedef: Any = jax.tree.structure(reference)
  try:
    leaves = treedef.flatten_up_to(tree)
  except (ValueError, TypeError) as error:
    raise ValueError(f"{name}: its tree does not match that of {reference_name}: {error}") from None
  for path, leaf in zip(leaf_paths(reference), leaves, strict=True):
    if leaf is not None and not hasattr(leaf, "shape") and not isinstance(leaf, (int, float)):
      raise ValueError(
        f"{name}: its tree does not match that of {reference_name} at {path}: got {type(leaf).__name__}."
      )
  return list(leaves)
