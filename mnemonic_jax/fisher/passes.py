"""Backward passes over microbatches: where they run, how much memory they take, in what range."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache, partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mnemonic_jax import _checks, _mesh, _trees
from mnemonic_jax.fisher import evaluate, loss_checks, plan, sums
from mnemonic_jax.fisher.jaxprs import activation_bytes, equations_in

PyTree = Any
Function = Callable[[PyTree, PyTree, PyTree], jax.Array]
Batch = tuple[PyTree, PyTree]  # inputs and labels

# Bytes that one backward pass may take when no microbatch is given and the device does not tell.
_PASS_BYTES = 2**31
# The largest cotangent of the logits is brought to about 2**this (float16 logits or params: the
# second number) before it is pulled back, so that gradients stay in range.
_TARGET_EXPONENTS = (30, 6)
# Cotangents below 2**this are not brought up further, lest the scale itself overflow.
_LOWEST_EXPONENT = -126


@dataclasses.dataclass(frozen=True)
class Objective:
  """What is differentiated, per example: `function`, or a `loss` of what it returns. Static in jit.

  With a `loss`, the cotangents of `function` are brought into range by a power of two before they
  are pulled back.
  """

  function: Function  # (params, inputs, labels) -> (N,) losses, or (N, ...) values
  mask: tuple[bool, ...]  # one per leaf of params: whether it takes part
  precision: str | None
  loss: Callable[[jax.Array, PyTree], jax.Array] | None = None  # (values, labels) -> (N,)
  disjoint: bool = False  # whether each example is known to have a weight in one group at most
  placement: _mesh.Placement = _mesh.NOWHERE


class SquaredGradients(NamedTuple):
  """Sums of squared gradients, one (G, *leaf.shape) per leaf under the mask, in units of 4**e."""

  sums: list[jax.Array]  # float32 at least
  units: list[jax.Array]  # e, int32, for each slice of a leaf's first axis

  def in_range(self) -> list[jax.Array]:
    """The sums themselves, which may leave the range of their dtype."""

    def plain(total: jax.Array, unit: jax.Array) -> jax.Array:
      lowest, highest = jnp.finfo(total.dtype).minexp, jnp.finfo(total.dtype).maxexp - 1
      half = _along(jnp.clip(unit, 2 * lowest, 2 * highest), total)
      for part in (half // 2, half - half // 2):
        factor = _trees.power_of_two(jnp.clip(part, lowest, highest), total.dtype)
        total = total * factor * factor
      return total

    return [plain(*pair) for pair in zip(self.sums, self.units, strict=True)]


def squared_gradients(
  objective: Objective, params: PyTree, batch: Batch, weights: jax.Array, microbatch: int | None
) -> SquaredGradients:
  """The engine behind `diagonal_fisher` and `forget`: weights (G, N), a microbatch at a time."""
  num_examples = weights.shape[-1]
  microbatch = examples_at_once(objective, params, batch, weights, microbatch)
  whole = microbatch == num_examples
  concrete = _checks.is_concrete((params, batch, weights))
  if whole or not (concrete and _mesh.on_one_device((params, batch))):
    return fisher_program(objective, microbatch, params, batch, weights)
  # A step a call, from Python: on CPU a convolution inside a loop of XLA's is many times slower.
  parts = (_take(batch, weights, at, microbatch) for at in range(0, num_examples, microbatch))
  one_pass = partial(fisher_program, objective, microbatch, params)
  return reduce(_jitted_add, (one_pass(*part) for part in parts))


@partial(jax.jit, static_argnums=(0, 1))
def fisher_program(
  objective: Objective, microbatch: int, params: PyTree, batch: Batch, weights: jax.Array
) -> SquaredGradients:
  """All microbatches in one program, placed as the objective says."""
  spread = objective.placement.spread
  placed = objective.placement.of_sums(objective.mask)

  def passes(batch: Batch, params: PyTree, weights: jax.Array) -> SquaredGradients:
    count = -(-weights.shape[-1] // microbatch)
    if spread is None:
      part_of = lambda index: _take(batch, weights, index * microbatch, microbatch)
    else:
      parts, part_weights = dealt(batch, count, spread), _dealt_weights(weights, count, spread)
      part_of = lambda index: (part(parts, index, spread), part_weights[:, :, index])
    one_pass = lambda index: _one_pass(objective, params, *part_of(index))
    if count == 1:
      return one_pass(0)
    shapes = jax.eval_shape(one_pass, 0)
    empty = SquaredGradients(
      [_mesh.zeros(x.shape, x.dtype, x) for x in shapes.sums],
      [_mesh.zeros(x.shape, x.dtype, x) + sums.LOWEST_UNIT for x in shapes.units],
    )
    add = lambda total, index: (_add(total, one_pass(index)), None)
    return jax.lax.scan(add, empty, jnp.arange(count))[0]

  everywhere = jax.sharding.PartitionSpec()
  specs: Any = everywhere
  if placed is not None:
    units: list[Any] = [everywhere] * len(placed)
    totals: list[Any] = [p.spec for p in placed]
    specs = SquaredGradients(totals, units)
  found = _mesh.with_automatic_axes(passes, batch, params, weights, out_specs=specs)
  if placed is None or objective.placement.mesh.explicit_axes:
    return found
  pairs = zip(found.sums, placed, strict=True)
  return found._replace(sums=[jax.lax.with_sharding_constraint(x, p) for x, p in pairs])


def _add(a: SquaredGradients, b: SquaredGradients) -> SquaredGradients:
  """The sum of two, each leaf in the larger of its units."""
  units = [jnp.maximum(*pair) for pair in zip(a.units, b.units, strict=True)]

  def shrunk(x: jax.Array, unit: jax.Array, to: jax.Array) -> jax.Array:
    by = jnp.maximum(unit - to, jnp.finfo(x.dtype).minexp)
    factor = _trees.power_of_two(_along(by, x), x.dtype)
    return x * factor * factor

  both = [
    [shrunk(*parts) for parts in zip(one.sums, one.units, units, strict=True)] for one in (a, b)
  ]
  return SquaredGradients([x + y for x, y in zip(*both, strict=True)], units)


_jitted_add = jax.jit(_add, donate_argnums=0)


def _along(unit: jax.Array, total: jax.Array) -> jax.Array:
  """A unit for each slice of a leaf's first axis, as it broadcasts to sums (G, *leaf.shape)."""
  return unit.reshape(1, *unit.shape, *(1,) * (total.ndim - 1 - unit.ndim))


def _take(batch: Batch, weights: jax.Array, start: Any, size: int) -> tuple[Batch, jax.Array]:
  """`size` examples and their weights; those beyond the end repeat the last one at weight zero."""
  num_examples = weights.shape[-1]
  if size == num_examples:
    return batch, weights
  rows = jnp.minimum(start + jnp.arange(size), num_examples - 1)
  real = start + jnp.arange(size) < num_examples
  return jax.tree.map(lambda x: x[rows], batch), jnp.where(real, weights[:, rows], 0)


def dealt(batch: PyTree, count: int, spread: _mesh.Spread) -> PyTree:
  """Arrays (N, ...) as (size, count, ...), to which every device deals its own examples.

  These are `count` parts of equal size, filled up by repeating the last example.
  """

  def deal(x: jax.Array) -> jax.Array:
    missing = _part_size(len(x), count, spread) * count - len(x)
    filled = spread.examples(jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)]))
    return spread.examples(filled.reshape(-1, count, *x.shape[1:]))

  return jax.tree.map(deal, batch)


def _dealt_weights(weights: jax.Array, count: int, spread: _mesh.Spread) -> jax.Array:
  """Weights (G, N) as (G, size, count), zero for what `dealt` filled up."""
  missing = _part_size(weights.shape[1], count, spread) * count - weights.shape[1]
  return jnp.pad(weights, ((0, 0), (0, missing))).reshape(len(weights), -1, count)


def part(parts: PyTree, index: Any, spread: _mesh.Spread) -> PyTree:
  """One part of what `dealt` made."""
  return jax.tree.map(lambda x: spread.examples(x[:, index]), parts)


def spread_out(batch: PyTree, weights: jax.Array, spread: _mesh.Spread) -> tuple[PyTree, jax.Array]:
  """A whole batch and its weights (G, N), each device its part; those that fill it up weigh 0."""
  return part(dealt(batch, 1, spread), 0, spread), _dealt_weights(weights, 1, spread)[:, :, 0]


def _part_size(num_examples: int, count: int, spread: _mesh.Spread) -> int:
  return -(-num_examples // (count * spread.mesh.size)) * spread.mesh.size


def _one_pass(
  objective: Objective, params: PyTree, batch: Batch, weights: jax.Array
) -> SquaredGradients:
  """All examples of a batch at once."""
  mask, placement = objective.mask, objective.placement
  leaves, treedef = _trees.flatten(params)
  with loss_checks.matmul_precision(objective.precision):
    axes = _mesh.varying_axes((weights, params, batch))
    if jax.sharding.get_abstract_mesh().manual_axes:
      # What the function closes over may vary along more axes than its arguments do.
      axes |= _mesh.varying_axes(jax.eval_shape(objective.function, params, *batch))
    pairs = zip(leaves, mask, strict=True)
    leaves = [_mesh.varying(leaf, axes) if kept else leaf for leaf, kept in pairs]
    weights, by = _at_most_one(_mesh.varying(weights, axes))
    planned = plan_of(objective.function, mask, treedef.unflatten(leaves), batch)
    live = [leaf for leaf, kept in zip(leaves, mask, strict=True) if kept]
    cotangents = partial(_cotangents, objective.loss, batch[1], live, axes)
    settings = {"platform": placement.platform, "spread": placement.spread}
    groups = sums.Groups.make(weights, objective.disjoint, **settings)
    examples = [jnp.expand_dims(x, 1) for x in jax.tree.leaves(batch)]
    totals, units, exponent = evaluate.squared_gradients(
      planned, cotangents, leaves, examples, groups
    )
  # A part without any weight sums to 0; its range has no say either.
  unit_of_all = jnp.where(jnp.any(weights != 0), exponent + by, 2 * sums.LOWEST_UNIT)
  units = [jnp.maximum(unit + unit_of_all, sums.LOWEST_UNIT) for unit in units]
  return SquaredGradients(totals, units)


def _at_most_one(weights: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Weights in units of 4**e, so that the largest is near 1; and e."""
  floating = weights if jnp.issubdtype(weights.dtype, jnp.floating) else weights.astype(jnp.float32)
  wide = floating.astype(_trees.at_least_float32(floating.dtype))
  by = jnp.clip(_trees.exponent(jnp.max(jnp.abs(wide))) >> 1, -62, 62)
  return wide * jnp.square(_trees.power_of_two(-by, wide.dtype)), by


def _cotangents(
  loss: Any, labels: PyTree, live: list[jax.Array], axes: frozenset[str], values: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """What to pull back from values (N, 1, ...), in units of 2**exponent, and that exponent."""
  if loss is None:
    return jnp.ones_like(values), _mesh.varying(jnp.int32(0), axes)
  of_one = lambda value, label: loss(value, label)[0]
  residuals = jax.vmap(jax.grad(of_one))(values, jax.tree.map(lambda x: x[:, None], labels))
  half = any(x.dtype == jnp.float16 for x in (*live, values))
  wide = residuals.astype(_trees.at_least_float32(residuals.dtype))
  size = jnp.abs(wide)
  largest = jnp.max(jnp.where(jnp.isfinite(size), size, 0), initial=0.0)
  exponent = jnp.frexp(largest)[1] - _TARGET_EXPONENTS[half]
  exponent = jnp.clip(exponent, _LOWEST_EXPONENT, -_LOWEST_EXPONENT)
  exponent = jnp.where(largest == 0, _LOWEST_EXPONENT, exponent)
  return (wide * _trees.power_of_two(-exponent, wide.dtype)).astype(residuals.dtype), exponent


def examples_at_once(
  objective: Objective, params: PyTree, batch: Batch, weights: jax.Array, microbatch: int | None
) -> int:
  """The microbatch: the one asked for, or one that keeps a pass within the memory it may take."""
  num_groups, num_examples = weights.shape
  if microbatch is not None:
    return min(microbatch, num_examples)
  shapes, treedef = jax.tree.flatten(jax.tree.map(_abstract, (params, batch)))
  what = Objective(objective.function, objective.mask, objective.precision)
  held, each, convolves = _bytes_of_a_pass(what, tuple(shapes), treedef, num_groups)
  concrete = _checks.is_concrete((params, batch, weights))
  if convolves and jax.default_backend() == "cpu" and not concrete:
    return num_examples
  stats = jax.local_devices()[0].memory_stats() or {}
  allowed = stats["bytes_limit"] // 4 if "bytes_limit" in stats else _PASS_BYTES
  spread = objective.placement.spread
  allowed = max(allowed - held, 0) * (1 if spread is None else spread.mesh.size)
  most = max(1, min(num_examples, allowed // max(each, 1)))
  passes = -(-num_examples // most)
  return -(-num_examples // passes)  # passes of equal size, for the last one is filled up


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
  aval = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
  return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)


@lru_cache(maxsize=64)
def _bytes_of_a_pass(
  objective: Objective, shapes: tuple[Any, ...], treedef: Any, groups: int
) -> tuple[int, int, bool]:
  """What a pass holds, about: whatever its examples, for each example; whether it convolves."""
  params, batch = treedef.unflatten(shapes)
  with loss_checks.matmul_precision(objective.precision):
    planned = plan_of(objective.function, objective.mask, params, batch)
  names = {equation.primitive.name for equation in equations_in(planned.jaxpr)}
  uses = list(planned.uses(groups))
  held = max((use.bytes for use in uses), default=0)
  # XLA fuses about half of what the equations compute, or more, and never stores it.
  each = activation_bytes(planned.jaxpr) // 2 + sum(use.bytes_each for use in uses)
  return held, each, "conv_general_dilated" in names


def plan_of(function: Function, mask: tuple[bool, ...], params: PyTree, batch: Batch) -> plan.Plan:
  """Plan the function of a batch of one example; arrays may be abstract."""
  of_one = lambda x: jax.eval_shape(lambda x: x[:1], x)
  closed = loss_checks.traced_on_one(function, params, *jax.tree.map(of_one, batch))
  leaf = lambda index: plan.Params(frozenset([index]))
  kinds: list[plan.Kind] = [leaf(index) if kept else "const" for index, kept in enumerate(mask)]
  kinds += ["data"] * (len(closed.jaxpr.invars) - len(kinds))
  return plan.make(closed.jaxpr, closed.consts, kinds)
