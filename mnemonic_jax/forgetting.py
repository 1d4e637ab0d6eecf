"""One-shot forgetting from the codes alone: Fishers, amplitude, scale, and the better of the two signs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax import _code_fishers, _loss_checks, _passes, _trees, _validation, perturbation
from mnemonic_jax._code_fishers import LogitsFn, PerExampleLoss
from mnemonic_jax.fisher import Execution
from mnemonic_jax.perturbation import Strength

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


@dataclasses.dataclass(frozen=True)
class ForgetResult:
  """What `forget` returns.

  Attributes:
    params: the forgotten params; structure, shapes, dtypes and shardings of the params given.
    sign: +1 or -1, the direction kept.
    strength: the strength used, as plain numbers.
    code_retain_accuracy: accuracy on the codes of the kept classes afterwards, in [0, 1].
    code_forget_error: error on the codes of the forgotten classes afterwards, in [0, 1].
    seconds: wall-clock seconds of "compile", "fisher", "perturb" (with the choice of sign) and "total".
  """

  params: PyTree
  sign: int
  strength: Strength
  code_retain_accuracy: float
  code_forget_error: float
  seconds: Mapping[str, float]


def forget(
  logits_fn: LogitsFn,
  params: PyTree,
  codes: jax.Array,
  classes: Iterable[int],
  *,
  strength: Strength,
  loss: PerExampleLoss | None = None,
  forgotten: Iterable[int] = (),
  mask: PyTree = None,
  layer_axis: PyTree = None,
  precision: str | None = "highest",
  execution: Execution | None = None,
) -> ForgetResult:
  """Forget classes in one shot, from their mnemonic codes alone.

      f_F = mean over forget codes of (d loss / d w)^2        f_R = mean over remain codes of (d loss / d w)^2
      eta = f_F / f_R                                         alpha_l = min(lambda1, lambda2 / max_l eta)
      w+ = w + alpha_l eta                                    w- = w - alpha_l eta
      keep the one with the larger accuracy on remain codes + error on forget codes

  Guarantees:
    `params` is not modified. The same arguments give the same result on any device count, up to rounding. Gradients
    are brought into range by powers of two, so codes that the model classifies with gradients of 1e-20 count rightly.

  Edge cases:
    a tie between the signs: the larger loss of the forget codes minus loss of the remain codes wins, then plus.
    a candidate with non-finite params or logits loses; if both have them, an error asks for a smaller strength.
    zero Fishers: see `amplitude`. A caller's own loss must keep its gradient for confident codes: float32
      logsumexp(l) - l_y has a gradient of exactly 0 at a margin of 17; see `losses.softmax_cross_entropy`.

  Args:
    logits_fn: pure function (params, inputs) -> (N, C) logits, in evaluation mode. What it closes over is a constant.
    params: a tree of floating arrays: what may be perturbed.
    codes: (C, K, *shape), floating: those that the model was trained with.
    classes: the classes to forget, integers in [0, C).
    strength: lambda1 and lambda2.
    loss: (logits, labels) -> (N,) losses; softmax cross-entropy if not given.
    forgotten: classes forgotten earlier, which belong to neither side.
    mask: a tree prefix of bools; False leaves a leaf as it is.
    layer_axis: a tree prefix of ints or None; the layer axis of stacked leaves.
    precision: matmul precision of the Fishers and of the choice of sign.
    execution: microbatch; changes rounding only.

  Returns:
    A `ForgetResult`.

  Raises:
    TypeError, ValueError: each names the argument, its value, what was expected and what to do.

  >>> codes = jax.random.uniform(jax.random.key(0), (3, 1, 8))  # three classes, one code of eight numbers each
  >>> kernel = codes[:, 0].T  # a linear model that knows its codes by heart
  >>> result = forget(lambda kernel, x: x @ kernel, kernel, codes, [0], strength=Strength(lambda1=1.0, lambda2=10.0))
  >>> result.sign, result.code_retain_accuracy, result.code_forget_error
  (-1, 1.0, 1.0)

  Source: Yamashita, Yamada, Shibata (2024), section 3.2.
  """
  started = time.perf_counter()
  perturbation.require_strength(strength)
  options = _code_fishers.Options.make(params, codes, loss, mask, layer_axis, precision, execution)
  num_classes = _check_arguments(logits_fn, params, codes, loss)
  chosen = _validation.require_classes("classes", classes, num_classes)
  earlier = _validation.require_classes("forgotten", forgotten, num_classes, proper=False)
  if common := sorted(set(chosen) & set(earlier)):
    raise ValueError(f"forgotten: classes {common} are also in classes; expected each class in one of the two.")
  if len(chosen) + len(earlier) == num_classes:
    raise ValueError(
      f"classes: {list(chosen)} and forgotten {list(earlier)} are all {num_classes} classes; expected one to keep."
    )
  codes = _beside(jnp.asarray(codes), params)
  strength = Strength(float(strength.lambda1), float(strength.lambda2))
  _check_finite(logits_fn, params, codes)
  inputs, labels = _code_fishers.flatten_codes(codes)
  _loss_checks.check_loss(
    _loss_fn(logits_fn, options.loss), params, inputs, labels, precision, cancels=loss is not None
  )

  indices = np.arange(num_classes)
  sides = jnp.asarray(np.isin(indices, chosen)), jnp.asarray(~np.isin(indices, chosen + earlier))
  seconds = {"compile": 0.0}
  fishers = _code_fishers.class_fishers_in_range(logits_fn, options, params, codes, sides, seconds)
  moved, info = _timed(seconds, "perturb", _update_jit, (logits_fn, options), params, codes, *sides, fishers, strength)
  if not (np.isfinite(info.code_retain_accuracy) and bool(_all_finite(moved))):
    raise ValueError(
      f"strength: {strength} drives params or logits to NaN or inf in both directions; use a smaller one."
    )
  moved = jax.tree.map(_placed_like, moved, params)
  seconds["total"] = time.perf_counter() - started
  return ForgetResult(
    params=moved,
    sign=int(info.sign),
    strength=strength,
    code_retain_accuracy=float(info.code_retain_accuracy),
    code_forget_error=float(info.code_forget_error),
    seconds=seconds,
  )


def forget_step(
  logits_fn: LogitsFn,
  params: PyTree,
  codes: jax.Array,
  forget: jax.Array,
  remain: jax.Array,
  strength: Strength,
  *,
  loss: PerExampleLoss | None = None,
  mask: PyTree = None,
  layer_axis: PyTree = None,
  precision: str | None = "highest",
  execution: Execution | None = None,
) -> tuple[PyTree, ForgetInfo]:
  """Forget classes, traceably: the heart of `forget`, for use under `jit` and `vmap`.

  Class masks and strength are traced, so another class or another strength never recompiles; `vmap` over masks shares
  the per-example gradients between all of them.

  Edge cases:
    a class in neither mask was forgotten before: it counts on no side.
    a traced mask without any class: the params come back unchanged, and the accuracy of that side is NaN.
    traced values are not checked: NaN in params or codes gives NaN scores.

  Args:
    forget, remain: (C,) bool masks without a common class.
    The other arguments are those of `forget`.

  Returns:
    (params, `ForgetInfo`).

  Raises:
    TypeError, ValueError: as `forget`, for what can be told without values.

  >>> codes = jax.random.uniform(jax.random.key(0), (3, 1, 8))
  >>> kernel, strength = codes[:, 0].T, Strength(1.0, 10.0)
  >>> step = jax.jit(lambda forget: forget_step(lambda w, x: x @ w, kernel, codes, forget, ~forget, strength))
  >>> _, info = jax.vmap(step)(jnp.eye(3, dtype=bool))  # each class in turn, all in one call
  >>> info.code_forget_error
  Array([1., 1., 1.], dtype=float32)

  Source: Yamashita, Yamada, Shibata (2024), section 3.2.
  """
  perturbation.require_strength(strength)
  options = _code_fishers.Options.make(params, codes, loss, mask, layer_axis, precision, execution)
  num_classes = _check_arguments(logits_fn, params, codes, loss)
  forget, remain = _check_masks(forget, remain, num_classes)
  codes = jnp.asarray(codes)
  inputs, labels = _code_fishers.flatten_codes(codes)
  _loss_checks.check_loss(
    _loss_fn(logits_fn, options.loss), params, inputs, labels, precision, cancels=loss is not None
  )
  concrete = _validation.is_concrete((params, codes, forget, remain, strength))
  update_step = _update_jit if concrete else _update
  fishers = _code_fishers.class_fishers(logits_fn, options, params, codes, forget, remain)
  return update_step(logits_fn, options, params, codes, forget, remain, fishers, strength)


def choose_sign(plus: CodeScores, minus: CodeScores, resolution: jax.Array | float = 0.0) -> jax.Array:
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
  advantage = (plus.retain_accuracy + plus.forget_error) - (minus.retain_accuracy + minus.forget_error)
  tie = jnp.abs(advantage) <= resolution
  by_scores = jnp.where(tie, minus.loss_gap > plus.loss_gap, advantage < 0)
  take_minus = jnp.where(lost(plus) | lost(minus), lost(plus) & ~lost(minus), by_scores)
  return jnp.where(take_minus, -1, 1).astype(jnp.int32)


def _update(
  logits_fn: LogitsFn,
  options: _code_fishers.Options,
  params: PyTree,
  codes: jax.Array,
  forget: jax.Array,
  remain: jax.Array,
  fishers: tuple[PyTree, PyTree],
  strength: Strength,
) -> tuple[PyTree, ForgetInfo]:
  """Amplitude, scale, both candidates, and the better one."""
  live_axes = [axis for axis, takes_part in zip(options.layer_axes, options.mask, strict=True) if takes_part]
  layer_axis = _trees.flatten(fishers[0])[1].unflatten(live_axes)
  eta = perturbation.amplitude(*fishers, layer_axis=layer_axis)
  scale = perturbation.layer_scale(eta, strength, layer_axis=layer_axis)
  plus, minus = (
    _score(logits_fn, options, perturbation.perturb(params, eta, scale, direction), codes, forget, remain)
    for direction in (1, -1)
  )
  pairs = jnp.sum(forget, dtype=float) * jnp.sum(remain, dtype=float) * codes.shape[1] ** 2
  sign = choose_sign(plus, minus, resolution=0.5 / jnp.maximum(pairs, 1))
  kept = jax.tree.map(lambda a, b: jnp.where(sign > 0, a, b), plus, minus)
  info = ForgetInfo(sign, strength, kept.retain_accuracy, kept.forget_error)
  return perturbation.perturb(params, eta, scale, sign), info


_update_jit = jax.jit(_update, static_argnums=(0, 1))


def _score(
  logits_fn: LogitsFn,
  options: _code_fishers.Options,
  params: PyTree,
  codes: jax.Array,
  forget: jax.Array,
  remain: jax.Array,
) -> CodeScores:
  """How a candidate does on the codes of both sides."""
  inputs, labels = _code_fishers.flatten_codes(codes)
  spread = _passes.spread_of(options.execution.shardings)
  microbatch = min(options.execution.microbatch or len(inputs), len(inputs))
  with _loss_checks.matmul_precision(options.precision):
    if spread is not None:
      count = -(-len(inputs) // microbatch)
      parts = _passes.dealt(inputs, count, spread)
      some = lambda index: logits_fn(params, _passes.part(parts, index, spread))
      logits = jax.lax.map(some, jnp.arange(count)) if count > 1 else some(0)[None]  # (count, size, C)
      logits = jnp.swapaxes(logits, 0, 1).reshape(-1, logits.shape[-1])[: len(inputs)]
    elif microbatch == len(inputs):
      logits = logits_fn(params, inputs)
    else:
      logits = jax.lax.map(lambda x: logits_fn(params, x[None])[0], inputs, batch_size=microbatch)
  logits = logits.astype(_trees.at_least_float32(logits.dtype))
  right = (jnp.argmax(logits, axis=-1) == labels).astype(logits.dtype)
  code_losses = options.loss(logits, labels)
  finite = jnp.all(jnp.isfinite(logits)) & _all_finite(params)

  def mean(side: jax.Array, values: jax.Array) -> jax.Array:
    chosen = jnp.repeat(side, codes.shape[1])
    total = jnp.sum(jnp.where(chosen, values, 0)) / jnp.sum(chosen, dtype=values.dtype)
    return jnp.where(finite, total, jnp.nan)

  return CodeScores(
    retain_accuracy=mean(remain, right),
    forget_error=mean(forget, 1 - right),
    loss_gap=mean(forget, code_losses) - mean(remain, code_losses),
  )


@lru_cache(maxsize=64)
def _loss_fn(logits_fn: LogitsFn, loss: PerExampleLoss) -> _loss_checks.LossFn:
  """The loss on codes as `diagonal_fisher` takes it; one object per pair, so that jit recognises it."""
  return lambda params, inputs, labels: loss(logits_fn(params, inputs), labels)


def _check_arguments(logits_fn: Any, params: PyTree, codes: Any, loss: Any) -> int:
  """Check what needs no values; return C."""
  _validation.require_callable("logits_fn", logits_fn, "(params, inputs) -> (N, C) logits")
  if loss is not None:
    _validation.require_callable("loss", loss, "(logits, labels) -> (N,) losses")
  _validation.require_codes(codes)
  num_classes, per_class = codes.shape[:2]
  inputs = jax.ShapeDtypeStruct((num_classes * per_class, *codes.shape[2:]), codes.dtype)
  try:
    logits = jax.eval_shape(logits_fn, params, inputs)
  except Exception as error:
    raise ValueError(
      f"codes: logits_fn fails on codes of shape {codes.shape} as a batch of {inputs.shape}: {error} "
      "Pass the codes that the model was trained with, and the params that belong to logits_fn."
    ) from error
  shape = getattr(logits, "shape", None)
  if shape != (inputs.shape[0], num_classes) or not jnp.issubdtype(logits.dtype, jnp.floating):
    got = f"shape {shape} and dtype {logits.dtype}" if shape is not None else type(logits).__name__
    raise ValueError(
      f"logits_fn: returned {got}; expected floating logits ({inputs.shape[0]}, {num_classes}), because codes "
      f"{codes.shape} hold {num_classes} classes of {per_class}."
    )
  return num_classes


def _check_masks(forget: Any, remain: Any, num_classes: int) -> tuple[jax.Array, jax.Array]:
  """Both class masks as arrays; concrete ones must name a class each and none in common."""
  for name, side in (("forget", forget), ("remain", remain)):
    if getattr(side, "dtype", None) != np.dtype(bool) or side.shape != (num_classes,):
      raise ValueError(
        f"{name}: got {_validation.kind(side)}; expected a bool mask of shape ({num_classes},), one per class."
      )
    if _validation.is_concrete(side) and not np.any(np.asarray(side)):
      raise ValueError(f"{name}: got no class; expected at least one True.")
  if _validation.is_concrete((forget, remain)) and np.any(np.asarray(forget) & np.asarray(remain)):
    common = np.flatnonzero(np.asarray(forget) & np.asarray(remain)).tolist()
    raise ValueError(f"remain: classes {common} are also in forget; expected masks without a common class.")
  return jnp.asarray(forget), jnp.asarray(remain)


def _check_finite(logits_fn: LogitsFn, params: PyTree, codes: jax.Array) -> None:
  """Refuse NaN and inf in params, codes and the logits on the codes."""
  if not bool(_all_finite(codes)):
    raise ValueError("codes: got NaN or inf; expected finite codes, those that the model was trained with.")
  if not bool(_all_finite(params)):
    paths = zip(_trees.leaf_paths(params), jax.tree.leaves(params), strict=True)
    bad = [path for path, leaf in paths if not bool(_all_finite(leaf))]
    raise ValueError(
      f"params: NaN or inf in {', '.join(bad[:3])}; expected finite params. Restore an earlier checkpoint."
    )
  if not bool(_all_finite(_logits_jit(logits_fn, params, _code_fishers.flatten_codes(codes)[0]))):
    raise ValueError("logits_fn: NaN or inf in the logits on the codes; expected finite logits from finite params.")


@jax.jit
def _all_finite(tree: PyTree) -> jax.Array:
  leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)]
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))


_logits_jit = jax.jit(lambda logits_fn, params, inputs: logits_fn(params, inputs), static_argnums=0)


def _timed(seconds: dict[str, float], name: str, function: Any, static: tuple[Any, ...], *arguments: Any) -> Any:
  """Compile and run apart, and add the seconds of both."""
  start = time.perf_counter()
  compiled = function.lower(*static, *arguments).compile()
  seconds["compile"] += time.perf_counter() - start
  start = time.perf_counter()
  result = jax.block_until_ready(compiled(*arguments))
  seconds[name] = time.perf_counter() - start
  return result


def _beside(codes: jax.Array, params: PyTree) -> jax.Array:
  """Codes on the devices of the params, replicated, when those live on a mesh."""
  for leaf in jax.tree.leaves(params):
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, jax.sharding.NamedSharding):
      return jax.device_put(codes, jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec()))
  return codes


def _placed_like(new: jax.Array, old: Any) -> Any:
  """`new` on the devices of `old`; a plain number that mask left out stays one."""
  if not hasattr(old, "dtype"):
    return old
  return jax.device_put(new, old.sharding) if isinstance(old, jax.Array) else new
