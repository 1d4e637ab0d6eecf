"""One-shot forgetting from the codes alone: Fishers, amplitude, scale, and the better of the two signs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax import _checks, _code_fishers, _trees
from mnemonic_jax._code_fishers import LogitsFn, PerExampleLoss
from mnemonic_jax.fisher import Execution, loss_checks, passes
from mnemonic_jax.methods import choosing, perturbation
from mnemonic_jax.methods.choosing import ForgetInfo
from mnemonic_jax.methods.perturbation import Strength

PyTree = Any


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

  @property
  def method(self) -> Any:  # stand-in
    from mnemonic_jax.methods import Perturbation

    return Perturbation(self.strength.lambda1, self.strength.lambda2)

  @property
  def info(self) -> dict[str, Any]:  # stand-in
    return {"sign": self.sign}


def forget(
  logits_fn: LogitsFn,
  params: PyTree,
  codes: jax.Array,
  classes: Iterable[int],
  *,
  strength: Strength | None = None,
  method: Any = None,
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
  if method is not None:
    strength = Strength(method.lambda1, method.lambda2)
  perturbation.require_strength(strength)
  for name, value in (("params", params), ("codes", codes), ("strength", strength)):
    if not _checks.is_concrete(value):
      raise TypeError(
        f"{name}: got traced values; forget looks at them. Inside jit, vmap or grad call forget_step."
      )
  options = _code_fishers.Options.make(params, codes, loss, mask, layer_axis, precision, execution)
  num_classes = _check_arguments(logits_fn, params, codes, loss)
  chosen = _checks.require_classes("classes", classes, num_classes)
  earlier = _checks.require_classes("forgotten", forgotten, num_classes, proper=False)
  if common := sorted(set(chosen) & set(earlier)):
    raise ValueError(
      f"forgotten: classes {common} are also in classes; expected each class in one of the two."
    )
  if len(chosen) + len(earlier) == num_classes:
    raise ValueError(
      f"classes: {list(chosen)} and forgotten {list(earlier)} are all {num_classes} classes; expected one to keep."
    )
  codes = _beside(jnp.asarray(codes), params)
  strength = Strength(float(strength.lambda1), float(strength.lambda2))
  indices = np.arange(num_classes)
  sides = jnp.asarray(np.isin(indices, chosen)), jnp.asarray(~np.isin(indices, chosen + earlier))
  _check_finite(logits_fn, options, params, codes, sides)
  inputs, labels = _code_fishers.flatten_codes(codes)
  loss_checks.check_loss(
    _loss_fn(logits_fn, options.loss), params, inputs, labels, precision, cancels=loss is not None
  )

  seconds = {"compile": 0.0}
  fishers = _code_fishers.class_fishers_in_range(logits_fn, options, params, codes, sides, seconds)
  moved, info = _timed(
    seconds, "perturb", _update_jit, (logits_fn, options), params, codes, *sides, fishers, strength
  )
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
  settings = {"loss": loss, "mask": mask, "precision": precision, "execution": execution}
  fishers = code_fishers(logits_fn, params, codes, forget, remain, **settings)
  return update_step(
    logits_fn, params, codes, forget, remain, fishers, strength, layer_axis=layer_axis, **settings
  )


def code_fishers(
  logits_fn: LogitsFn,
  params: PyTree,
  codes: jax.Array,
  forget: jax.Array,
  remain: jax.Array,
  *,
  loss: PerExampleLoss | None = None,
  mask: PyTree = None,
  precision: str | None = "highest",
  execution: Execution | None = None,
) -> PyTree:
  """The first half of `forget_step`: the Fishers of the codes to forget and of those to keep, from one pass.

  Guarantees:
    Both are in units of one power of two, chosen so that squares stay in range; `amplitude`'s ratio does not see it.

  Args and errors: those of `forget_step`.

  Returns:
    A tree like params, every leaf (2, *leaf.shape), float32 at least: f_F, then f_R; None where mask is False.

  >>> codes = jax.random.uniform(jax.random.key(0), (3, 1, 8))
  >>> forget = jnp.array([True, False, False])
  >>> code_fishers(lambda w, x: x @ w, codes[:, 0].T, codes, forget, ~forget).shape
  (2, 8, 3)
  """
  options, codes, forget, remain = _checked(
    logits_fn, params, codes, forget, remain, loss, mask, None, precision, execution
  )
  inputs, labels = _code_fishers.flatten_codes(codes)
  loss_checks.check_loss(
    _loss_fn(logits_fn, options.loss), params, inputs, labels, precision, cancels=loss is not None
  )
  return _code_fishers.class_fishers(logits_fn, options, params, codes, forget, remain)


def update_step(
  logits_fn: LogitsFn,
  params: PyTree,
  codes: jax.Array,
  forget: jax.Array,
  remain: jax.Array,
  fishers: PyTree,
  strength: Strength,
  *,
  loss: PerExampleLoss | None = None,
  mask: PyTree = None,
  layer_axis: PyTree = None,
  precision: str | None = "highest",
  execution: Execution | None = None,
) -> tuple[PyTree, ForgetInfo]:
  """The second half of `forget_step`: from the Fishers to the better of both directions, judged on the codes.

  With a `Strength` of two arrays (S,), tried in pairs, it also searches the strength, and nothing leaves the devices in
  between: the largest A_R + E_F on the codes is kept, and of equals the smallest ||alpha eta||.

  Edge cases:
    codes are few and easily told apart, so that most strengths are equal on them: a search keeps the weakest that forgets
      the codes, which may leave test examples of the class remembered. Where data may still be read, judge there.

  Args:
    fishers: as `code_fishers` returns them; any factor that both have in common is left out.
    The other arguments, and errors, are those of `forget_step`.

  Returns:
    (params, `ForgetInfo`), whose strength is the one kept.

  >>> codes = jax.random.uniform(jax.random.key(0), (3, 1, 8))
  >>> logits_fn, kernel, forget = lambda w, x: x @ w, codes[:, 0].T, jnp.array([True, False, False])
  >>> fishers = code_fishers(logits_fn, kernel, codes, forget, ~forget)
  >>> grid = Strength(jnp.array([1e-3, 0.1, 10.0]), jnp.array([10.0, 10.0, 10.0]))
  >>> _, info = update_step(logits_fn, kernel, codes, forget, ~forget, fishers, grid)
  >>> float(info.code_forget_error), bool(info.strength.lambda1 < 10)
  (1.0, True)
  """
  perturbation.require_strengths(strength)
  options, codes, forget, remain = _checked(
    logits_fn, params, codes, forget, remain, loss, mask, layer_axis, precision, execution
  )
  _check_fishers(fishers, params, options.mask)
  concrete = _checks.is_concrete((params, codes, forget, remain, fishers, strength))
  update = _update_jit if concrete else choosing.update
  return update(logits_fn, options, params, codes, forget, remain, fishers, strength)


def _checked(
  logits_fn: LogitsFn,
  params: PyTree,
  codes: jax.Array,
  forget: jax.Array,
  remain: jax.Array,
  loss: PerExampleLoss | None,
  mask: PyTree,
  layer_axis: PyTree,
  precision: str | None,
  execution: Execution | None,
) -> tuple[_code_fishers.Options, jax.Array, jax.Array, jax.Array]:
  """The static options, the codes and both masks, once all is well that can be told without values."""
  options = _code_fishers.Options.make(params, codes, loss, mask, layer_axis, precision, execution)
  num_classes = _check_arguments(logits_fn, params, codes, loss)
  return options, jnp.asarray(codes), *_check_masks(forget, remain, num_classes)


_update_jit = jax.jit(choosing.update, static_argnums=(0, 1))


@lru_cache(maxsize=64)
def _loss_fn(logits_fn: LogitsFn, loss: PerExampleLoss) -> loss_checks.LossFn:
  """The loss on codes as `diagonal_fisher` takes it; one object per pair, so that jit recognises it."""
  return lambda params, inputs, labels: loss(logits_fn(params, inputs), labels)


def _check_arguments(logits_fn: Any, params: PyTree, codes: Any, loss: Any) -> int:
  """Check what needs no values; return C."""
  _checks.require_callable("logits_fn", logits_fn, "(params, inputs) -> (N, C) logits")
  if loss is not None:
    _checks.require_callable("loss", loss, "(logits, labels) -> (N,) losses")
  _checks.require_codes(codes)
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


def _check_fishers(fishers: PyTree, params: PyTree, mask: tuple[bool, ...]) -> None:
  """Refuse Fishers that are not those of two sides for these params under this mask."""
  leaves, treedef = _trees.flatten(params)
  live = treedef.unflatten(
    [leaf if takes_part else None for leaf, takes_part in zip(leaves, mask, strict=True)]
  )
  remedy = "Pass what code_fishers returned for the same params and mask."
  try:
    found = _trees.require_like("fishers", fishers, "params under mask", live)
  except ValueError as error:
    raise ValueError(f"{error} {remedy}") from None
  for path, leaf, fisher in zip(_trees.leaf_paths(live), jax.tree.leaves(live), found, strict=True):
    if jnp.shape(fisher) != (2, *jnp.shape(leaf)):
      raise ValueError(
        f"fishers{path}: got shape {jnp.shape(fisher)}; expected {(2, *jnp.shape(leaf))}, those to forget and those to "
        f"keep. {remedy}"
      )


def _check_masks(forget: Any, remain: Any, num_classes: int) -> tuple[jax.Array, jax.Array]:
  """Both class masks as arrays; concrete ones must name a class each and none in common."""
  for name, side in (("forget", forget), ("remain", remain)):
    if getattr(side, "dtype", None) != np.dtype(bool) or side.shape != (num_classes,):
      raise ValueError(
        f"{name}: got {_checks.kind(side)}; expected a bool mask of shape ({num_classes},), one per class."
      )
    if _checks.is_concrete(side) and not np.any(np.asarray(side)):
      raise ValueError(f"{name}: got no class; expected at least one True.")
  if _checks.is_concrete((forget, remain)) and np.any(np.asarray(forget) & np.asarray(remain)):
    common = np.flatnonzero(np.asarray(forget) & np.asarray(remain)).tolist()
    raise ValueError(
      f"remain: classes {common} are also in forget; expected masks without a common class."
    )
  return jnp.asarray(forget), jnp.asarray(remain)


def _check_finite(
  logits_fn: LogitsFn,
  options: _code_fishers.Options,
  params: PyTree,
  codes: jax.Array,
  sides: tuple[jax.Array, jax.Array],
) -> None:
  """Refuse NaN and inf in params, codes and the logits on the codes."""
  if not bool(_all_finite(codes)):
    raise ValueError(
      "codes: got NaN or inf; expected finite codes, those that the model was trained with."
    )
  if not bool(_all_finite(params)):
    paths = zip(_trees.leaf_paths(params), jax.tree.leaves(params), strict=True)
    bad = [path for path, leaf in paths if not bool(_all_finite(leaf))]
    raise ValueError(
      f"params: NaN or inf in {', '.join(bad[:3])}; expected finite params. Restore an earlier checkpoint."
    )
  objective, (inputs, labels), weights = _code_fishers.fisher_problem(
    logits_fn, options, params, codes, *sides
  )
  objective = dataclasses.replace(
    objective, placements=None
  )  # on a mesh too, each device computes all of a part
  size = passes.examples_at_once(
    objective, params, (inputs, labels), weights, options.execution.microbatch
  )
  parts = (passes.take(inputs, weights, start, size)[0] for start in range(0, len(inputs), size))
  if not all(bool(_all_finite(_logits_jit(logits_fn, params, part))) for part in parts):
    raise ValueError(
      "logits_fn: NaN or inf in the logits on the codes; expected finite logits from finite params."
    )


_all_finite = jax.jit(_trees.all_finite)
_logits_jit = jax.jit(lambda logits_fn, params, inputs: logits_fn(params, inputs), static_argnums=0)


def _timed(
  seconds: dict[str, float], name: str, function: Any, static: tuple[Any, ...], *arguments: Any
) -> Any:
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
      return jax.device_put(
        codes, jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
      )
  return codes


def _placed_like(new: jax.Array, old: Any) -> Any:
  """`new` on the devices of `old`; a plain number that mask left out stays one."""
  if not hasattr(old, "dtype"):
    return old
  return jax.device_put(new, old.sharding) if isinstance(old, jax.Array) else new
