"""The Fishers of the codes to forget and of those to keep, in range whatever the size of the gradients."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax import _checks, _mesh, _trees, losses
from mnemonic_jax.fisher import Execution, door, passes

PyTree = Any
LogitsFn = Callable[[PyTree, jax.Array], jax.Array]  # (params, inputs) -> (N, C)
PerExampleLoss = Callable[[jax.Array, jax.Array], jax.Array]  # (logits, labels) -> (N,)

# The squares of a leaf are in range while their largest is finite and above the first number; else they are computed
# again, with cotangents brought 2**shift higher or lower.
_SMALLEST_MAXIMUM = 2.0**10
_SHIFTS_UP, _SHIFTS_DOWN = (40, 80), (-50, -100)


@dataclasses.dataclass(frozen=True)
class Options:
  """The static options, hashable: trees are one value per leaf, in leaf order."""

  loss: PerExampleLoss
  mask: tuple[bool, ...]
  layer_axes: tuple[int | None, ...]
  precision: str | None
  execution: Execution

  @staticmethod
  def make(
    params: PyTree,
    codes: Any,
    loss: Any,
    mask: PyTree,
    layer_axis: PyTree,
    precision: Any,
    execution: Any,
  ) -> Options:
    return Options(
      loss=losses.softmax_cross_entropy if loss is None else loss,
      mask=_trees.mask_leaves(mask, params),
      layer_axes=_trees.axis_leaves(layer_axis, params),
      precision=precision,
      execution=door.on_mesh(door.require_execution(execution), params, codes),
    )


def flatten_codes(codes: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(C, K, *shape) -> inputs (C * K, *shape) and labels (C * K,)."""
  num_classes, per_class = codes.shape[:2]
  return codes.reshape(-1, *codes.shape[2:]), jnp.repeat(jnp.arange(num_classes), per_class)


def class_fishers(
  logits_fn: LogitsFn,
  options: Options,
  params: PyTree,
  codes: jax.Array,
  forget: jax.Array,
  remain: jax.Array,
) -> PyTree:
  """(f_F, f_R) along a leading axis of every leaf, in units of one power of two, which their ratio does not see."""
  objective, batch, weights = fisher_problem(logits_fn, options, params, codes, forget, remain)
  sums = passes.squared_gradients(
    objective, params, batch, weights, options.execution.microbatch
  ).sums
  return _as_fishers(sums, options, params)


def class_fishers_in_range(
  logits_fn: LogitsFn,
  options: Options,
  params: PyTree,
  codes: jax.Array,
  sides: tuple[jax.Array, jax.Array],
  seconds: dict[str, float],
) -> PyTree:
  """As `class_fishers`, on concrete values; a leaf whose squares leave the range gets a power of two of its own."""
  objective, batch, weights = fisher_problem(logits_fn, options, params, codes, *sides)
  microbatch = passes.examples_at_once(
    objective, params, batch, weights, options.execution.microbatch
  )
  first = passes.take(batch, weights, 0, microbatch)
  start = time.perf_counter()
  one_pass = passes.jitted_program.lower(objective, microbatch, params, *first, 0).compile()
  seconds["compile"] += time.perf_counter() - start
  start = time.perf_counter()
  run = lambda shift: (
    passes.squared_gradients(
      objective, params, batch, weights, microbatch, shift=shift, one_pass=one_pass
    ).sums
  )
  best = run(0)
  largest = np.asarray(_largest_jit(best))
  is_small = lambda largest: largest <= _SMALLEST_MAXIMUM
  is_large = lambda largest: ~np.isfinite(largest)
  for is_out, shifts in ((is_small, _SHIFTS_UP), (is_large, _SHIFTS_DOWN)):
    for shift in shifts:
      if not np.any(is_out(largest)):
        break
      again = run(shift)
      found = np.asarray(_largest_jit(again))
      better = is_out(largest) & np.isfinite(found) & (found > 0)
      best = [new if take else old for new, old, take in zip(again, best, better, strict=True)]
      largest = np.where(better, found, largest)
  jax.block_until_ready(best)
  seconds["fisher"] = time.perf_counter() - start
  return _as_fishers(best, options, params)


def fisher_problem(
  logits_fn: LogitsFn,
  options: Options,
  params: PyTree,
  codes: jax.Array,
  forget: jax.Array,
  remain: jax.Array,
) -> tuple[passes.Objective, tuple[jax.Array, jax.Array], jax.Array]:
  """What is differentiated, the codes with their classes, and the weights (2, N) of the two sides."""
  weights = jnp.stack([_mean_weights(side, codes.shape[1]) for side in (forget, remain)])
  known = _checks.is_concrete((forget, remain))  # then each mask names a class, and none is in both
  objective = passes.Objective(
    _values_fn(logits_fn),
    options.mask,
    options.precision,
    options.loss,
    disjoint=known,
    placements=_mesh.placements_of(options.execution.shardings, options.mask),
    platform=_mesh.platform_of(params),
    weighed=known,
  )
  return objective, flatten_codes(codes), weights


def _as_fishers(sums: list[jax.Array], options: Options, params: PyTree) -> PyTree:
  """Sums (2, *leaf.shape) of the leaves that take part -> a tree like params, None where a leaf does not."""
  _, treedef = _trees.flatten(params)
  filled = iter(sums)
  return treedef.unflatten([next(filled) if takes_part else None for takes_part in options.mask])


_largest_jit = jax.jit(
  lambda leaves: jnp.stack([jnp.max(leaf, initial=0.0).astype(jnp.float32) for leaf in leaves])
)


@lru_cache(maxsize=64)
def _values_fn(logits_fn: LogitsFn) -> Callable[[PyTree, jax.Array, jax.Array], jax.Array]:
  """The logits as `passes.Objective` takes them; one object per function, so that jit recognises it."""
  return lambda params, inputs, labels: logits_fn(params, inputs)


def _mean_weights(side: jax.Array, per_class: int) -> jax.Array:
  """(C,) bool -> (C * K,) weights that average over the codes of these classes; all 0 where there are none."""
  chosen = jnp.repeat(side, per_class).astype(float)
  return chosen / jnp.maximum(jnp.sum(chosen), 1)
