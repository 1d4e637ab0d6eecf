"""From Fishers to forgotten params: both directions of one or many strengths, judged on the codes."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mnemonic_jax import _code_fishers, _mesh, _trees
from mnemonic_jax._code_fishers import LogitsFn
from mnemonic_jax.fisher import loss_checks, passes
from mnemonic_jax.methods import perturbation
from mnemonic_jax.methods.perturbation import Strength

PyTree = Any


class CodeScores(NamedTuple):
  """How one candidate does on the codes; scalar arrays."""

  retain_accuracy: jax.Array  # accuracy on the codes of the kept classes, in [0, 1]
  forget_error: jax.Array  # error on the codes of the forgotten classes, in [0, 1]
  loss_gap: jax.Array  # mean loss of the forget codes minus that of the remain codes


class ForgetInfo(NamedTuple):
  """What `forget_step` found, as scalar arrays."""

  sign: jax.Array  # int32, +1 or -1
  strength: Strength
  code_retain_accuracy: jax.Array  # in [0, 1], on the codes, after forgetting
  code_forget_error: jax.Array


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
    resolution: accuracies closer than this are equal; half the step 1 / (forget codes * remain codes) hides rounding.

  Returns:
    int32 scalar, +1 or -1.

  >>> score = lambda accuracy, error, gap: CodeScores(jnp.array(accuracy), jnp.array(error), jnp.array(gap))
  >>> int(choose_sign(score(1.0, 0.0, 5.0), score(0.9, 1.0, 0.0))), int(choose_sign(score(1.0, 1.0, 0.5), score(1.0, 1.0, 2.0)))
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


def update(
  logits_fn: LogitsFn,
  options: _code_fishers.Options,
  params: PyTree,
  codes: jax.Array,
  forget: jax.Array,
  remain: jax.Array,
  fishers: PyTree,
  strength: Strength,
) -> tuple[PyTree, ForgetInfo]:
  """Amplitude, scale, both candidates, and the better one."""
  live_axes = [
    axis for axis, takes_part in zip(options.layer_axes, options.mask, strict=True) if takes_part
  ]
  layer_axis = _trees.flatten(fishers)[1].unflatten(live_axes)
  f_forget, f_remain = jax.tree.map(lambda x: x[0], fishers), jax.tree.map(lambda x: x[1], fishers)
  eta = perturbation.amplitude(f_forget, f_remain, layer_axis=layer_axis)
  pairs = jnp.sum(forget, dtype=float) * jnp.sum(remain, dtype=float) * codes.shape[1] ** 2
  resolution = 0.5 / jnp.maximum(pairs, 1)
  on_mesh = _mesh.spread_of(options.execution.shardings) is not None

  def better_sign(strength: Strength) -> tuple[jax.Array, CodeScores]:
    scale = perturbation.layer_scale(eta, strength, layer_axis=layer_axis)
    score = lambda sign: _score(
      logits_fn, options, perturbation.perturb(params, eta, scale, sign), codes, forget, remain
    )
    if on_mesh:  # one candidate in memory at a time
      both = jax.lax.map(score, jnp.array([1, -1]))
      plus, minus = jax.tree.map(lambda x: x[0], both), jax.tree.map(lambda x: x[1], both)
    else:
      plus, minus = score(1), score(-1)
    sign = choose_sign(plus, minus, resolution=resolution)
    return sign, jax.tree.map(lambda a, b: jnp.where(sign > 0, a, b), plus, minus)

  if jnp.ndim(strength.lambda1):
    _, scores = jax.lax.map(better_sign, strength)
    sizes = jax.lax.map(
      lambda one: _size(perturbation.layer_scale(eta, one, layer_axis=layer_axis), eta), strength
    )
    total = scores.retain_accuracy + scores.forget_error
    total = jnp.where(jnp.isnan(total), -jnp.inf, total)
    among = total >= jnp.max(total) - resolution
    best = jnp.argmin(jnp.where(among, sizes, jnp.inf))
    strength = jax.tree.map(lambda x: x[best], strength)
  sign, kept = better_sign(strength)
  info = ForgetInfo(sign, strength, kept.retain_accuracy, kept.forget_error)
  scale = perturbation.layer_scale(eta, strength, layer_axis=layer_axis)
  return perturbation.perturb(params, eta, scale, sign), info


def _size(scale: PyTree, eta: PyTree) -> jax.Array:
  """||alpha eta||^2, how far the weights move."""
  square = lambda alpha, eta: jnp.sum(jnp.square(alpha * eta), dtype=float)
  return sum(jax.tree.leaves(jax.tree.map(square, scale, eta)), jnp.zeros(()))


def _score(
  logits_fn: LogitsFn,
  options: _code_fishers.Options,
  params: PyTree,
  codes: jax.Array,
  forget: jax.Array,
  remain: jax.Array,
) -> CodeScores:
  """How a candidate does on the codes of both sides."""
  objective, (inputs, labels), weights = _code_fishers.fisher_problem(
    logits_fn, options, params, codes, forget, remain
  )
  spread, microbatch = objective.spread, options.execution.microbatch
  explicit = any(jax.typeof(codes).sharding.spec)  # split over axes that no loop can cut
  if spread is None and not explicit:  # as many codes at a time as in the Fisher
    microbatch = passes.examples_at_once(objective, params, (inputs, labels), weights, microbatch)
  microbatch = min(microbatch or len(inputs), len(inputs))
  with loss_checks.matmul_precision(options.precision):
    if spread is not None:
      count = -(-len(inputs) // microbatch)
      parts = passes.dealt(inputs, count, spread)
      some = lambda index: logits_fn(params, passes.part(parts, index, spread))
      logits = (
        jax.lax.map(some, jnp.arange(count)) if count > 1 else some(0)[None]
      )  # (count, size, C)
      logits = jnp.swapaxes(logits, 0, 1).reshape(-1, logits.shape[-1])[: len(inputs)]
    elif microbatch == len(inputs):
      logits = logits_fn(params, inputs)
    else:
      logits = jax.lax.map(lambda x: logits_fn(params, x[None])[0], inputs, batch_size=microbatch)
  logits = logits.astype(_trees.at_least_float32(logits.dtype))
  right = (jnp.argmax(logits, axis=-1) == labels).astype(logits.dtype)
  code_losses = options.loss(logits, labels)
  finite = jnp.all(jnp.isfinite(logits)) & _trees.all_finite(params)

  def mean(side: jax.Array, values: jax.Array) -> jax.Array:
    chosen = jnp.repeat(side, codes.shape[1])
    total = jnp.sum(jnp.where(chosen, values, 0)) / jnp.sum(chosen, dtype=values.dtype)
    return jnp.where(finite, total, jnp.nan)

  return CodeScores(
    retain_accuracy=mean(remain, right),
    forget_error=mean(forget, 1 - right),
    loss_gap=mean(forget, code_losses) - mean(remain, code_losses),
  )
