"""One perturbation of the weights that matter to the forgotten classes and not to the others."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax import _checks, _trees

PyTree = Any


@jax.tree_util.register_pytree_with_keys_class
class Strength:
  """How far a forget may move the weights: lambda1 bounds the scale, lambda2 the largest change of a weight.

      alpha = min(lambda1, lambda2 / max eta)    per layer, so |change| <= lambda2

  A pytree of two numbers, so a traced strength never recompiles; arrays make a batch of strengths to vmap over. Values
  are checked when a Strength is made, not when jax rebuilds one.

  Raises:
    TypeError: not a number. ValueError: negative, NaN or infinite.

  >>> Strength(lambda1=1e-3, lambda2=10.0)
  Strength(lambda1=0.001, lambda2=10.0)
  """

  __slots__ = ("lambda1", "lambda2")
  lambda1: Any
  lambda2: Any

  def __init__(self, lambda1: Any, lambda2: Any) -> None:
    for name, value in (("lambda1", lambda1), ("lambda2", lambda2)):
      if _checks.is_concrete(value):
        _checks.require_finite_number(f"strength.{name}", value)
      object.__setattr__(self, name, value)

  def __setattr__(self, name: str, value: Any) -> None:
    raise AttributeError(f"Strength is immutable; make a new one instead of setting {name}.")

  def __repr__(self) -> str:
    return f"Strength(lambda1={self.lambda1!r}, lambda2={self.lambda2!r})"

  def __eq__(self, other: object) -> Any:
    if not isinstance(other, Strength):
      return NotImplemented
    return self.lambda1 == other.lambda1 and self.lambda2 == other.lambda2

  def __hash__(self) -> int:
    return hash((self.lambda1, self.lambda2))

  def __reduce__(self) -> tuple[Any, ...]:
    return Strength, (self.lambda1, self.lambda2)

  def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], None]:
    """Children with their names, as jax asks for them."""
    return tuple(
      (jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in self.__slots__
    ), None

  @classmethod
  def tree_unflatten(cls, _: None, children: tuple[Any, Any]) -> Strength:
    """Rebuild without checks: jax passes placeholders through here."""
    strength = object.__new__(cls)
    for name, value in zip(cls.__slots__, children, strict=True):
      object.__setattr__(strength, name, value)
    return strength


def require_strength(strength: Any) -> Strength:
  """Return `strength` when it is a Strength of scalars."""
  _require_kind(strength)
  for name in Strength.__slots__:
    if jnp.ndim(getattr(strength, name)):
      shape = jnp.shape(getattr(strength, name))
      raise ValueError(
        f"strength.{name}: got an array of shape {shape}; expected one number. Use vmap for a batch."
      )
  return strength


def require_strengths(strength: Any) -> Strength:
  """Return `strength` when it is a Strength of scalars, or of two arrays (S,)."""
  _require_kind(strength)
  shapes = jnp.shape(strength.lambda1), jnp.shape(strength.lambda2)
  if shapes[0] != shapes[1] or len(shapes[0]) > 1 or 0 in shapes[0]:
    raise ValueError(
      f"strength: got lambda1 of shape {shapes[0]} and lambda2 of {shapes[1]}; expected two numbers, or two arrays (S,)."
    )
  return strength


def _require_kind(strength: Any) -> None:
  """Refuse what is no Strength."""
  if isinstance(strength, str):
    raise ValueError(
      f"strength: got the unknown name {strength!r}; expected mnemonic_jax.Strength(lambda1=..., lambda2=...)."
    )
  if not isinstance(strength, Strength):
    raise TypeError(
      f"strength: got {strength!r}; expected mnemonic_jax.Strength(lambda1=..., lambda2=...)."
    )


def amplitude(fisher_forget: PyTree, fisher_remain: PyTree, layer_axis: PyTree = None) -> PyTree:
  """Divide the forget Fisher by the remain Fisher.

      eta[i] = f_F[i] / f_R[i]

  Guarantees:
    Finite and non-negative for finite, non-negative Fishers. Unchanged when both Fishers are multiplied by one number.

  Edge cases:
    f_F = 0, f_R > 0: eta = 0. The weight does not matter to the forgotten classes.
    f_F = 0, f_R = 0: eta = 0. No information: the weight is left alone.
    f_F > 0, f_R = 0: eta = the layer's largest finite ratio; so also where the ratio overflows its dtype.
    no finite ratio but 0 in a layer: eta = 0 there. Nothing says how far to go, so the layer is left alone.
    NaN: propagates.

  Args:
    fisher_forget, fisher_remain: trees of equal shapes; None leaves (masked out) stay None.
    layer_axis: a tree prefix of ints or None: the axis of a stacked leaf whose slices are layers.

  Returns:
    eta, a tree like the Fishers.

  Raises:
    ValueError: trees or shapes that do not match, or an axis that a leaf does not have.

  >>> amplitude(jnp.array([1.0, 0.0, 2.0]), jnp.array([4.0, 1.0, 0.0]))
  Array([0.25, 0.  , 0.25], dtype=float32)

  Source: Yamashita, Yamada, Shibata (2024), section 3.2.
  """
  remain_leaves = _trees.require_like(
    "fisher_remain", fisher_remain, "fisher_forget", fisher_forget
  )
  axes = _trees.axis_leaves(layer_axis, fisher_forget)
  leaves, treedef = _trees.flatten(fisher_forget)
  etas = []
  for path, forget, remain, axis in zip(
    _trees.leaf_paths(fisher_forget), leaves, remain_leaves, axes, strict=True
  ):
    if remain is None or jnp.shape(forget) != jnp.shape(remain):
      got = "None" if remain is None else f"shape {jnp.shape(remain)}"
      raise ValueError(
        f"fisher_remain{path}: got {got}; expected shape {jnp.shape(forget)}, as in fisher_forget."
      )
    etas.append(_leaf_amplitude(jnp.asarray(forget), jnp.asarray(remain), axis))
  return treedef.unflatten(etas)


def _leaf_amplitude(forget: jax.Array, remain: jax.Array, axis: int | None) -> jax.Array:
  ratio = forget / jnp.where(forget == 0, jnp.where(remain == 0, 1, remain), remain)
  boundless = jnp.isinf(ratio)
  largest = _layer_max(jnp.where(boundless, 0, ratio), axis)
  return jnp.where(boundless, largest, ratio)


def layer_scale(eta: PyTree, strength: Strength, layer_axis: PyTree = None) -> PyTree:
  """Compute the scale of each layer's perturbation.

      alpha_l = min(lambda1, lambda2 / max_{i in layer l} eta[i])

  A layer is one leaf, or one slice of a stacked leaf along `layer_axis`.

  Edge cases:
    max eta = 0: alpha = lambda1, and the perturbation is 0 all the same.
    lambda2 / max eta below 1e-38: alpha = 0 where the backend flushes subnormals, and the layer is left alone.

  Args:
    eta: amplitudes, as `amplitude` returns them.
    strength: lambda1 and lambda2, scalars; may be traced.
    layer_axis: as for `amplitude`.

  Returns:
    A tree like eta: scalars, or arrays that broadcast to the leaf along its layer axis.

  >>> layer_scale(jnp.array([0.5, 100.0]), Strength(lambda1=1e-1, lambda2=5.0))
  Array(0.05, dtype=float32)

  Source: Yamashita, Yamada, Shibata (2024), section 3.2.
  """
  require_strength(strength)
  leaves, treedef = _trees.flatten(eta)
  axes = _trees.axis_leaves(layer_axis, eta)

  def scale(leaf: jax.Array, axis: int | None) -> jax.Array:
    leaf = jnp.asarray(leaf)
    leaf = leaf.astype(
      _trees.at_least_float32(leaf.dtype)
      if jnp.issubdtype(leaf.dtype, jnp.floating)
      else jnp.float32
    )
    lambda1, lambda2 = (jnp.asarray(x, leaf.dtype) for x in (strength.lambda1, strength.lambda2))
    largest = _layer_max(leaf, axis)
    return jnp.where(largest == 0, lambda1, jnp.minimum(lambda1, lambda2 / largest))

  return treedef.unflatten([scale(leaf, axis) for leaf, axis in zip(leaves, axes, strict=True)])


def perturb(params: PyTree, eta: PyTree, scale: PyTree, sign: Any) -> PyTree:
  """Move the weights.

      w <- w + sign * alpha_l * eta

  computed in float32 at least, then rounded once to the leaf's dtype.

  Args:
    params: a tree of floating arrays.
    eta: a tree like params; None leaves the leaf as it is.
    scale: a tree like eta, broadcastable to its leaves.
    sign: +1 or -1; may be traced.

  Returns:
    A tree like params, same shapes and dtypes.

  Raises:
    TypeError: a leaf to be moved that is not floating.
    ValueError: trees or shapes that do not match, or a concrete sign other than +1 and -1.

  >>> perturb(jnp.array([1.0, 1.0]), jnp.array([0.0, 2.0]), jnp.array(0.25), sign=-1)
  Array([1. , 0.5], dtype=float32)

  Source: Yamashita, Yamada, Shibata (2024), section 3.2.
  """
  if _checks.is_concrete(sign) and (np.ndim(sign) or np.asarray(sign).item() not in (1, -1)):
    raise ValueError(f"sign: got {sign!r}; expected +1 or -1.")
  leaves, treedef = _trees.flatten(params)
  etas = _trees.require_like("eta", eta, "params", params)
  scales = _trees.require_like("scale", scale, "params", params)
  moved = []
  for path, leaf, leaf_eta, leaf_scale in zip(
    _trees.leaf_paths(params), leaves, etas, scales, strict=True
  ):
    if leaf_eta is None:
      moved.append(leaf)
      continue
    leaf = jnp.asarray(leaf)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise TypeError(
        f"params{path}: got dtype {leaf.dtype}; expected floating arrays only where eta is not None."
      )
    if (
      jnp.shape(leaf_eta) != leaf.shape
      or leaf_scale is None
      or not _broadcasts(jnp.shape(leaf_scale), leaf.shape)
    ):
      raise ValueError(
        f"eta{path}: got shape {jnp.shape(leaf_eta)} (scale: {None if leaf_scale is None else jnp.shape(leaf_scale)}); "
        f"expected {leaf.shape}, as in params, and a scale that broadcasts to it."
      )
    dtype = _trees.at_least_float32(leaf.dtype)
    change = jnp.asarray(sign, dtype) * leaf_scale * leaf_eta
    moved.append((leaf.astype(dtype) + change).astype(leaf.dtype))
  return treedef.unflatten(moved)


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
  return len(shape) <= len(to) and all(
    a in (1, b) for a, b in zip(shape[::-1], to[::-1], strict=False)
  )


def _layer_max(leaf: jax.Array, axis: int | None) -> jax.Array:
  """Maximum over a layer; NaN propagates, an empty layer has 0."""
  if axis is None:
    return jnp.max(leaf, initial=0.0)
  others = tuple(i for i in range(leaf.ndim) if i != axis)
  return jnp.max(leaf, axis=others, keepdims=True, initial=0.0)
