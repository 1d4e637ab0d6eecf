"""From the arguments of a forget to a problem: everything is checked here, once."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax import _checks, _functions, _mesh, _trees, losses
from mnemonic_jax._types import LogitsFn, PerExampleLoss
from mnemonic_jax.fisher import Execution, door, loss_checks
from mnemonic_jax.learning import LearnedCodes
from mnemonic_jax.methods.problem import Judges, Problem, Request, WrongLogits, logits_program

PyTree = Any

# Differences of logits that are rounding, relative to the largest logit of the same code.
_ROUNDING = 0.05

all_finite = jax.jit(_trees.all_finite)
_both_finite = jax.jit(lambda *trees: tuple(map(_trees.all_finite, trees)))
_rows = jax.jit(lambda x, rows: x[rows])


def resolve(
  logits_fn: LogitsFn,
  params: PyTree,
  codes: jax.Array | LearnedCodes,
  sides: tuple[Any, Any],
  loss: PerExampleLoss | None,
  mask: PyTree,
  layer_axis: PyTree,
  precision: str | None,
  execution: Execution | None,
  kept: Any = None,
) -> Problem:
  """Check what needs no values, and gather it as a problem."""
  _checks.require_callable("logits_fn", logits_fn, "(params, inputs) -> (N, C) logits")
  plain, judges, recalled = taken_apart(codes)
  _checks.require_codes(plain)
  if recalled is not None:
    _require_recalled(recalled, plain)
  sides = _check_masks(*sides, plain.shape[0])
  if loss is not None:
    _checks.require_callable("loss", loss, "(logits, labels) -> (N,) losses")
  execution = door.require_execution(execution)
  function, constants = _functions.split(logits_fn)
  request = Request(
    function,
    plain.shape[0],
    losses.softmax_cross_entropy if loss is None else loss,
    _trees.mask_leaves(mask, params),
    _trees.axis_leaves(layer_axis, params),
    precision,
    execution.microbatch,
    _mesh.Placement.of(params, (plain, sides), execution.shardings),
  )
  judges = judges and Judges(_beside(judges.inputs, params), *judges[1:])
  beside = lambda x: _beside(jnp.asarray(x), params)
  problem = Problem(
    request,
    constants,
    params,
    beside(plain),
    *sides,
    judges=judges,
    recalled=None if recalled is None else beside(recalled),
    kept=None if kept is None else beside(kept_examples(kept, plain, sides[1])),
  )
  _check_functions(problem)
  return problem


def taken_apart(codes: jax.Array | LearnedCodes) -> tuple[Any, Judges | None, Any]:
  """Codes as an array, their judges and what was recalled from the model alone, if there are any.

  Where no data was read, the codes themselves are recalled ones.
  """
  if not isinstance(codes, LearnedCodes):
    return codes, None, None
  recalled = codes.recalled if codes.recalled.shape[1] else None
  if not codes.judges.shape[1]:
    return codes.codes, None, codes.codes if recalled is None else recalled
  measured = codes.judge_weights, codes.judge_accuracy, codes.judge_spread
  judges = Judges(codes.judges, *measured)
  return codes.codes, judges, recalled


def _require_recalled(recalled: Any, codes: Any) -> None:
  """Refuse recalled codes that do not fit the codes."""
  wanted = codes.shape[0], *codes.shape[2:]
  if recalled.ndim != codes.ndim or (recalled.shape[0], *recalled.shape[2:]) != wanted:
    raise ValueError(
      f"codes: recalled ones have shape {recalled.shape}, the others {codes.shape}; expected the "
      "same classes and inputs."
    )
  if not jnp.issubdtype(recalled.dtype, jnp.floating):
    raise TypeError(f"codes: recalled ones are {recalled.dtype}; expected floats.")
  if _checks.is_concrete(recalled) and not bool(all_finite(recalled)):
    raise ValueError("codes: recalled ones hold NaN or inf; expected finite codes.")


def kept_examples(kept: Any, codes: jax.Array, remain: Any) -> np.ndarray:
  """The inputs (M, *shape) of all batches of examples, which must be of kept classes."""
  expected = "expected batches (inputs, labels) of kept classes"
  inputs, allowed = [], len(np.asarray(remain))
  try:
    batches = iter(kept)
  except TypeError:
    raise TypeError(f"kept: got {_checks.kind(kept)}; {expected}.") from None
  for batch in batches:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
      raise TypeError(f"kept: yielded {_checks.kind(batch)}; {expected}.")
    some, labels = map(np.asarray, batch)
    if some.shape[1:] != codes.shape[2:] or labels.shape != some.shape[:1]:
      raise ValueError(
        f"kept: yielded inputs {some.shape} with labels {labels.shape}; expected (N, "
        f"{', '.join(map(str, codes.shape[2:]))}) and (N,)."
      )
    if not (jnp.issubdtype(some.dtype, jnp.floating) and np.isfinite(some).all()):
      raise ValueError(f"kept: inputs are {some.dtype} or not finite; expected finite floats.")
    if not np.issubdtype(labels.dtype, np.integer):
      raise TypeError(f"kept: labels are {labels.dtype}; expected integers in [0, {allowed}).")
    if others := sorted(set(labels.tolist()) - set(np.flatnonzero(remain).tolist())):
      raise ValueError(
        f"kept: holds examples of classes {others[:5]}, which are not kept; {expected} alone."
      )
    inputs.append(some)
  if not sum(map(len, inputs)):
    raise ValueError(f"kept: holds no example; {expected}, or None.")
  return np.concatenate(inputs)


def sides_of(codes: Any, classes: Any, forgotten: Any) -> tuple[np.ndarray, np.ndarray]:
  """The classes of a request as masks (C,) of those to forget and those to keep."""
  codes, *_ = taken_apart(codes)
  _checks.require_codes(codes)
  num_classes = codes.shape[0]
  chosen = _checks.require_classes("classes", classes, num_classes)
  earlier = _checks.require_classes("forgotten", forgotten, num_classes, proper=False)
  if common := sorted(set(chosen) & set(earlier)):
    raise ValueError(
      f"forgotten: classes {common} are also in classes; expected each class in one of the two."
    )
  if len(chosen) + len(earlier) == num_classes:
    raise ValueError(
      f"classes: {list(chosen)} and forgotten {list(earlier)} are all {num_classes} classes; "
      "expected one to keep."
    )
  indices = np.arange(num_classes)
  return np.isin(indices, chosen), ~np.isin(indices, chosen + earlier)


def _check_masks(forget: Any, remain: Any, num_classes: int) -> tuple[jax.Array, jax.Array]:
  """Return both masks as arrays; concrete ones must name a class each and none in common."""
  for name, side in (("forget", forget), ("remain", remain)):
    if getattr(side, "dtype", None) != np.dtype(bool) or side.shape != (num_classes,):
      raise ValueError(
        f"{name}: got {_checks.kind(side)}; expected a bool mask of shape ({num_classes},), one "
        "per class."
      )
    if _checks.is_concrete(side) and not np.any(np.asarray(side)):
      raise ValueError(f"{name}: got no class; expected at least one True.")
  if _checks.is_concrete((forget, remain)) and np.any(np.asarray(forget) & np.asarray(remain)):
    common = np.flatnonzero(np.asarray(forget) & np.asarray(remain)).tolist()
    raise ValueError(
      f"remain: classes {common} are also in forget; expected masks without a common class."
    )
  return jnp.asarray(forget), jnp.asarray(remain)


def _check_functions(problem: Problem) -> None:
  """Refuse a model or a loss of the wrong shape, and a model that communicates."""
  codes, request = problem.codes, problem.request
  inputs, labels = jax.eval_shape(lambda: (problem.inputs, problem.labels))
  num_codes = inputs.shape[0]
  program = partial(logits_program, request, num_codes)
  try:
    arguments = problem.constants, problem.params, inputs
    jaxpr, logits = jax.make_jaxpr(program, return_shape=True)(*arguments)
  except WrongLogits as error:
    num_classes, per_class = codes.shape[:2]
    raise ValueError(
      f"{error}, because codes {codes.shape} hold {num_classes} classes of {per_class}."
    ) from None
  except Exception as error:
    raise ValueError(_why_it_fails(codes.shape, inputs.shape, error)) from error
  loss_checks.refuse_collectives("logits_fn", jaxpr)
  loss_checks.require_losses("loss", jax.eval_shape(request.loss, logits, labels), num_codes)


def _why_it_fails(codes: tuple[int, ...], inputs: tuple[int, ...], error: Exception) -> str:
  """Say what a model that fails on the codes may need."""
  what = f"codes: logits_fn fails on codes of shape {codes} as a batch of {inputs}: {error} "
  if type(error).__name__ == "TraceContextError":  # Flax NNX, where a call changes the model
    return (
      f"{what} The call changes the model's own state, as BatchNorm and dropout do in training "
      "mode. Call model.eval() first, and let logits_fn take its params as an argument."
    )
  return (
    f"{what} Pass the codes that the model was trained with, and the params that belong to "
    "logits_fn."
  )


def check_values(problem: Problem, *, reads_codes: bool = True) -> None:
  """Refuse NaN and inf, and examples that depend on each other; warn of codes without meaning."""
  codes_are, params_are = _both_finite(problem.codes, problem.params)
  if not codes_are:
    raise ValueError("codes: got NaN or inf; expected finite codes, those of the training.")
  if not params_are:
    paths = zip(_trees.leaf_paths(problem.params), jax.tree.leaves(problem.params), strict=True)
    bad = [path for path, leaf in paths if not bool(all_finite(leaf))]
    raise ValueError(
      f"params: NaN or inf in {', '.join(bad[:3])}; expected finite params. Restore an earlier "
      "checkpoint."
    )
  if not reads_codes:
    return
  if removed := np.flatnonzero(_removed(problem.codes, problem.forget)).tolist():
    raise ValueError(
      f"classes: got {removed}, whose codes are all zeros: they were removed, and the model had "
      "to forget them before that. Expected classes that have codes."
    )
  logits = problem.logits(problem.params)
  scores = problem.scores_of(logits, problem.params)
  if np.isnan(accuracy := float(scores.retain_accuracy)):
    raise ValueError(
      "logits_fn: NaN or inf in the logits on the codes; expected finite logits from finite params."
    )
  _check_independence(problem, logits)
  chance = 1 / problem.request.num_classes
  if accuracy <= chance:
    warnings.warn(
      f"The model classifies {accuracy:.0%} of the codes of the kept classes right, no more than "
      f"chance ({chance:.0%}): the codes say nothing about its classes. Pass the codes that it was "
      "trained with.",
      stacklevel=3,
    )


def _check_independence(problem: Problem, logits: jax.Array) -> None:
  """Compare the logits of codes with those in another batch, where half the places are doubles."""
  num_codes = logits.shape[0]
  if num_codes == 1:
    return
  places = np.arange(num_codes)
  order = (places - places % 2 - 1) % num_codes
  loss = problem.request.loss
  if loss is not losses.softmax_cross_entropy:
    of_logits = lambda params, logits, labels: loss(logits, labels)
    loss_checks.check_loss(of_logits, (), logits, problem.labels, None)
  again = problem.logits(problem.params, _rows(problem.inputs, order))
  difference = float(_largest_difference(logits, again, order))
  if difference > _ROUNDING:
    raise ValueError(
      f"logits_fn: examples depend on each other: the logits of a code change by {difference:.0%} "
      "with the codes around it. Likely causes: (a) BatchNorm or dropout in training mode: call "
      "model.eval(), or pass use_running_average=True and deterministic=True; (b) a mean over the "
      "batch inside the model."
    )


@jax.jit
def _removed(codes: jax.Array, asked: jax.Array) -> jax.Array:
  """(C,) bool: the classes asked for whose codes are zeros where others' are not."""
  has = jnp.any(codes != 0, axis=tuple(range(1, codes.ndim)))
  return asked & ~has & jnp.any(has)


@jax.jit
def _largest_difference(logits: jax.Array, again: jax.Array, order: jax.Array) -> jax.Array:
  wanted = logits[order]
  size = jnp.max(jnp.abs(wanted), axis=-1)
  change = jnp.max(jnp.abs(again - wanted), axis=-1)
  return jnp.max(jnp.where(size > jnp.finfo(size.dtype).tiny, change / size, 0))


def _beside(codes: jax.Array, params: PyTree) -> jax.Array:
  """Return codes copied to all devices of the params, where those lie on a mesh."""
  for leaf in jax.tree.leaves(params):
    sharding = getattr(leaf, "sharding", None)
    if _checks.is_concrete(codes) and isinstance(sharding, jax.sharding.NamedSharding):
      copied = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
      return jax.device_put(codes, copied)
  return codes
