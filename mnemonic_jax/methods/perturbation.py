"""The paper's method: perturb the weights that matter to the forgotten classes alone."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax import _checks, _trees
from mnemonic_jax.methods import search
from mnemonic_jax.methods.problem import CodeScores, Problem
from mnemonic_jax.methods.protocol import Info, method

PyTree = Any

# The paper's grid.
_LAMBDA1 = tuple(10.0**e for e in range(-6, 1))
_LAMBDA2 = tuple(10.0**e for e in range(-1, 6))


@method
@dataclasses.dataclass(frozen=True)
class Perturbation:
  """Move the weights along the ratio of two Fishers, in the direction that suits the codes better.

      eta = f_F / f_R                 alpha_l = min(lambda1, lambda2 / max_{i in layer l} eta[i])
      w+ = w + alpha_l eta            w- = w - alpha_l eta
      keep the one with the larger accuracy on remain codes + error on forget codes

  lambda1 bounds the scale, lambda2 the largest change of a weight. Two arrays (S,) are strengths to
  try in pairs: the one with the largest A_R + E_F on the codes is kept, and of equals the one with
  the smallest ||alpha eta||.

  Edge cases:
    a tie between the signs: the larger loss of the forget codes minus that of the remain codes
      wins, then plus.
    a candidate with non-finite params or logits loses.
    zero Fishers: see `amplitude`.
    several strengths: codes are few and easily told apart, so most strengths are equal on them. The
      weakest that forgets the codes may leave test examples of the class remembered.

  Raises:
    TypeError: not a number. ValueError: negative, NaN or infinite, or arrays that are no pairs.

  Without numbers those of the paper's grid (powers of ten from 1e-6 to 1 and from 0.1 to 1e5) and
  both signs are searched by judges.

  >>> Perturbation(lambda1=1e-3, lambda2=10.0)
  Perturbation(lambda1=0.001, lambda2=10.0)

  Source: Yamashita, Yamada, Shibata (2024), section 3.2.
  """

  lambda1: Any = None
  lambda2: Any = None

  def __post_init__(self) -> None:
    if self.lambda1 is None and self.lambda2 is None:
      return
    for name in ("lambda1", "lambda2"):
      if _checks.is_concrete(value := getattr(self, name)):
        _checks.require_finite_number(name, value)
    shapes = jnp.shape(self.lambda1), jnp.shape(self.lambda2)
    if shapes[0] != shapes[1] or len(shapes[0]) > 1 or 0 in shapes[0]:
      raise ValueError(
        f"lambda1, lambda2: got shapes {shapes[0]} and {shapes[1]}; expected two numbers, or two "
        "arrays (S,) of strengths to try in pairs."
      )

  @property
  def to_search(self) -> tuple[str, ...]:
    """The settings that a search chooses."""
    return ("lambda1", "lambda2") if self.lambda1 is None else ()

  def step(self, problem: Problem) -> tuple[PyTree, Info]:
    """Forget. `info` holds the "sign" that was kept, and the "method" if there were several."""
    if self.to_search:
      search.require_judges(problem, "lambda1, lambda2")
    axes = problem.layer_axes
    eta = _amplitudes(axes, problem.fishers())
    if self.to_search:
      return _searched(problem, eta)
    resolution = _resolution(problem.forget, problem.remain, problem.codes.shape[1])

    def better_sign(strength: Perturbation) -> tuple[jax.Array, CodeScores]:
      score = lambda sign: problem.scores(_moved(axes, strength, problem.params, eta, sign))
      return _better_sign(problem.map(score, np.array([1, -1])), resolution)

    strength, info = self, {}
    if jnp.ndim(self.lambda1):
      _, scores = problem.map(better_sign, self)
      sizes = problem.map(lambda one: _size(axes, one, eta), self)
      best = _weakest_of_the_best(scores, sizes, resolution)
      best = int(best) if _checks.is_concrete(best) else best
      info["method"] = strength = jax.tree.map(lambda x: jnp.asarray(x)[best], self)
    info["sign"], _ = better_sign(strength)
    return _moved(axes, strength, problem.params, eta, info["sign"]), info


def _searched(problem: Problem, eta: PyTree) -> tuple[PyTree, Info]:
  """Try the grid of the paper's strengths in both directions, and keep what judges like best."""
  axes, params = problem.layer_axes, problem.params
  pairs = np.array([(a, b, sign) for a in _LAMBDA1 for b in _LAMBDA2 for sign in (1, -1)])
  lambda1, lambda2, signs = pairs.T
  strengths = Perturbation(lambda1.astype(np.float32), lambda2.astype(np.float32))
  signs = signs.astype(np.int32)
  sizes = np.asarray(problem.map(lambda one: _size(axes, one, eta), strengths))
  moved = lambda one: _moved(axes, one[0], params, eta, one[1])
  index, curve = search.best(problem, "lambda1, lambda2", (strengths, signs), moved, sizes)
  found = Perturbation(float(lambda1[index]), float(lambda2[index]))
  sign = signs[index]
  return _moved(axes, found, params, eta, sign), {"method": found, "sign": sign, **curve}


@partial(jax.jit, static_argnums=2)
def _resolution(forget: jax.Array, remain: jax.Array, per_class: int) -> jax.Array:
  """Half the smallest difference of A_R + E_F on the codes that is no rounding."""
  pairs = jnp.sum(forget, dtype=float) * jnp.sum(remain, dtype=float) * per_class**2
  return 0.5 / jnp.maximum(pairs, 1)


@jax.jit
def _better_sign(both: CodeScores, resolution: jax.Array) -> tuple[jax.Array, CodeScores]:
  """The sign to keep and its scores, from those of plus and minus along the first axis."""
  plus, minus = (jax.tree.map(lambda x, i=i: x[i], both) for i in range(2))
  sign = choose_sign(plus, minus, resolution=resolution)
  return sign, jax.tree.map(lambda a, b: jnp.where(sign > 0, a, b), plus, minus)


@partial(jax.jit, static_argnums=0)
def _amplitudes(axes: tuple[int | None, ...], fishers: PyTree) -> PyTree:
  forget, remain = (jax.tree.map(lambda x, i=i: x[i], fishers) for i in range(2))
  return amplitude(forget, remain, layer_axis=_trees.like(forget, axes))


@partial(jax.jit, static_argnums=0)
def _moved(
  axes: tuple[int | None, ...], strength: Perturbation, params: PyTree, eta: PyTree, sign: jax.Array
) -> PyTree:
  """The params moved by one strength in one direction."""
  scale = layer_scale(eta, strength, layer_axis=_trees.like(eta, axes))
  return perturb(params, eta, scale, sign)


@partial(jax.jit, static_argnums=0)
def _size(axes: tuple[int | None, ...], strength: Perturbation, eta: PyTree) -> jax.Array:
  """||alpha eta||^2, how far the weights move."""
  scale = layer_scale(eta, strength, layer_axis=_trees.like(eta, axes))
  square = lambda alpha, eta: jnp.sum(jnp.square(alpha * eta), dtype=float)
  return sum(jax.tree.leaves(jax.tree.map(square, scale, eta)), jnp.zeros(()))


@jax.jit
def _weakest_of_the_best(scores: CodeScores, sizes: jax.Array, resolution: jax.Array) -> jax.Array:
  """Index of the strength with the best scores that moves the weights least."""
  total = scores.retain_accuracy + scores.forget_error
  total = jnp.where(jnp.isnan(total), -jnp.inf, total)
  among = total >= jnp.max(total) - resolution
  return jnp.argmin(jnp.where(among, sizes, jnp.inf))


def choose_sign(
  plus: CodeScores, minus: CodeScores, resolution: jax.Array | float = 0.0
) -> jax.Array:
  """Choose the direction of the perturbation from how both candidates do on the codes.

      sign = +1 if A_R + E_F is larger for w+, -1 if it is larger for w-

  Edge cases:
    a tie (difference within `resolution`): the larger loss_gap wins; equal or NaN gaps: +1.
    a candidate with NaN accuracy has non-finite params or logits and loses; both NaN: +1.

  Args:
    plus, minus: `CodeScores` of the two candidates.
    resolution: accuracies closer than this are equal; half the step
      1 / (forget codes * remain codes) hides rounding.

  Returns:
    int32 scalar, +1 or -1.

  >>> def score(accuracy, error, gap):
  ...   return CodeScores(jnp.array(accuracy), jnp.array(error), jnp.array(gap))
  >>> by_accuracy = choose_sign(score(1.0, 0.0, 5.0), score(0.9, 1.0, 0.0))
  >>> by_gap = choose_sign(score(1.0, 1.0, 0.5), score(1.0, 1.0, 2.0))
  >>> int(by_accuracy), int(by_gap)
  (-1, -1)

  Source: Yamashita, Yamada, Shibata (2024), section 3.2; the tie break is ours.
  """
  lost = lambda scores: jnp.isnan(scores.retain_accuracy + scores.forget_error)
  advantage = (plus.retain_accuracy + plus.forget_error) - (
    minus.retain_accuracy + minus.forget_error
  )
  tie = jnp.abs(advantage) <= resolution
  by_scores = jnp.where(tie, minus.loss_gap > plus.loss_gap, advantage < 0)
  take_minus = jnp.where(lost(plus) | lost(minus), lost(plus) & ~lost(minus), by_scores)
  return jnp.where(take_minus, -1, 1).astype(jnp.int32)


def amplitude(fisher_forget: PyTree, fisher_remain: PyTree, layer_axis: PyTree = None) -> PyTree:
  """Divide the forget Fisher by the remain Fisher.

      eta[i] = f_F[i] / f_R[i]

  Guarantees:
    Finite and non-negative for finite, non-negative Fishers. Unchanged when both Fishers are
    multiplied by one number.

  Edge cases:
    f_F = 0, f_R > 0: eta = 0. The weight does not matter to the forgotten classes.
    f_F = 0, f_R = 0: eta = 0. No information: the weight is left alone.
    f_F > 0, f_R = 0: eta = the layer's largest finite ratio; so also where the ratio overflows its
      dtype.
    no finite ratio but 0 in a layer: eta = 0 there. Nothing says how far to go, so the layer is
      left alone.
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


def layer_scale(eta: PyTree, method: Perturbation, layer_axis: PyTree = None) -> PyTree:
  """Compute the scale of each layer's perturbation.

      alpha_l = min(lambda1, lambda2 / max_{i in layer l} eta[i])

  A layer is one leaf, or one slice of a stacked leaf along `layer_axis`.

  Edge cases:
    max eta = 0: alpha = lambda1, and the perturbation is 0 all the same.
    lambda2 / max eta below 1e-38: alpha = 0 where the backend flushes subnormals, and the layer is
      left alone.

  Args:
    eta: amplitudes, as `amplitude` returns them.
    method: a `Perturbation` of two numbers; they may be traced.
    layer_axis: as for `amplitude`.

  Returns:
    A tree like eta: scalars, or arrays that broadcast to the leaf along its layer axis.

  >>> layer_scale(jnp.array([0.5, 100.0]), Perturbation(lambda1=1e-1, lambda2=5.0))
  Array(0.05, dtype=float32)

  Source: Yamashita, Yamada, Shibata (2024), section 3.2.
  """
  if not isinstance(method, Perturbation) or jnp.ndim(method.lambda1):
    raise TypeError(
      f"method: got {method!r}; expected mnemonic_jax.Perturbation with two numbers. Use vmap for "
      "several."
    )
  leaves, treedef = _trees.flatten(eta)
  axes = _trees.axis_leaves(layer_axis, eta)

  def scale(leaf: jax.Array, axis: int | None) -> jax.Array:
    leaf = jnp.asarray(leaf)
    leaf = leaf.astype(
      _trees.at_least_float32(leaf.dtype)
      if jnp.issubdtype(leaf.dtype, jnp.floating)
      else jnp.float32
    )
    lambda1, lambda2 = (jnp.asarray(x, leaf.dtype) for x in (method.lambda1, method.lambda2))
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
        f"params{path}: got dtype {leaf.dtype}; "
        "expected floating arrays only where eta is not None."
      )
    if (
      jnp.shape(leaf_eta) != leaf.shape
      or leaf_scale is None
      or not _broadcasts(jnp.shape(leaf_scale), leaf.shape)
    ):
      raise ValueError(
        f"eta{path}: got shape {jnp.shape(leaf_eta)} "
        f"(scale: {None if leaf_scale is None else jnp.shape(leaf_scale)}); "
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
