"""Backward passes over microbatches: where they run, how much memory they take, and in what range their squares are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache, partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax import _checks, _mesh, _trees
from mnemonic_jax.fisher import loss_checks, taps, uses

PyTree = Any
Function = Callable[[PyTree, PyTree, PyTree], jax.Array]

# Bytes that one backward pass may take when no microbatch is given and the device does not tell its memory.
_PASS_BYTES = 2**31
# The largest cotangent of the logits is brought to about 2**this (float16 logits or params: the second number) before
# it is pulled back, so that squares of gradients stay in range.
_TARGET_EXPONENTS = (30, 6)
# Cotangents below 2**this are not brought up further, lest the scale itself overflow.
_LOWEST_EXPONENT = -126


@dataclasses.dataclass(frozen=True)
class Objective:
  """What is differentiated, per example: `function`, or a `loss` of what it returns. Static under jit.

  With a `loss`, the cotangents of `function` are brought into range by a power of two before they are pulled back.
  """

  function: Function  # (params, inputs, labels) -> (N,) losses, or (N, ...) values
  chosen: tuple[bool, ...]  # one per leaf of params: whether it takes part
  precision: str | None
  loss: Callable[[jax.Array, PyTree], jax.Array] | None = None  # (values, labels) -> (N,)
  disjoint: bool = False  # whether each example has a weight in one group at most
  placements: tuple[Any, ...] | None = (
    None  # for the sums: a NamedSharding per leaf that takes part, or none at all
  )
  platform: str | None = None  # where it runs, if that is known while tracing; see `platform_of`
  weighed: bool = False  # whether some example is known to have a weight

  @property
  def spread(self) -> _mesh.Spread | None:
    """How examples and sums lie on a mesh."""
    return _mesh.spread_of(self.placements)


class SquaredGradients(NamedTuple):
  """Sums of squared gradients, one (G, *leaf.shape) per leaf that takes part, in units of 2**exponent."""

  sums: list[jax.Array]  # float32 at least
  exponent: jax.Array  # (), int32


def squared_gradients(
  objective: Objective,
  params: PyTree,
  batch: tuple[PyTree, PyTree],
  weights: jax.Array,
  microbatch: int | None,
  *,
  shift: jax.Array | int = 0,
  one_pass: Callable[..., SquaredGradients] | None = None,
) -> SquaredGradients:
  """The engine behind `diagonal_fisher` and `forget`: weights (G, N), no checks, a microbatch at a time.

  Args:
    shift: with a loss, the cotangents are brought 2**shift higher than usual.
    one_pass: `jitted_program` compiled for one microbatch; concrete calls only.
  """
  num_examples = weights.shape[-1]
  microbatch = examples_at_once(objective, params, batch, weights, microbatch)
  if one_pass is None:
    concrete = _checks.is_concrete((params, batch, weights, shift))
    one_program = jitted_program if concrete else _program
    if microbatch == num_examples or not (concrete and _mesh.on_one_device((params, batch))):
      return one_program(objective, microbatch, params, batch, weights, shift)
    one_pass = partial(jitted_program, objective, microbatch)
  # A step a call, from Python: on CPU a convolution inside a loop of XLA's is many times slower.
  starts: Sequence[int] = range(0, num_examples, microbatch)
  if objective.weighed:  # the others have no say, and their values may be anything
    active = np.any(np.asarray(weights), axis=0)
    starts = [start for start in starts if np.any(active[start : start + microbatch])]
  parts = (one_pass(params, *take(batch, weights, start, microbatch), shift) for start in starts)
  return reduce(_jitted_add, parts)


def _program(
  objective: Objective,
  microbatch: int,
  params: PyTree,
  batch: tuple[PyTree, PyTree],
  weights: jax.Array,
  shift: jax.Array | int,
) -> SquaredGradients:
  """All microbatches in one program, placed as the objective says."""
  placements, spread = objective.placements, objective.spread

  def passes(batch: Any, params: PyTree, weights: jax.Array, shift: jax.Array) -> SquaredGradients:
    count = -(-weights.shape[-1] // microbatch)
    if spread is None:
      part_of = lambda index: take(batch, weights, index * microbatch, microbatch)
    else:
      parts, part_weights = dealt(batch, count, spread), dealt_weights(weights, count, spread)
      part_of = lambda index: (part(parts, index, spread), part_weights[:, :, index])
    weighed = objective.weighed and count == 1  # of several parts, some may have none
    one_pass = lambda index: _one_pass(objective, params, *part_of(index), shift, weighed)
    if count == 1:
      return one_pass(0)
    empty = jax.tree.map(lambda x: _mesh.zeros(x.shape, x.dtype, x), jax.eval_shape(one_pass, 0))
    empty = empty._replace(exponent=empty.exponent + _LOWEST_EXPONENT)
    return jax.lax.scan(
      lambda total, index: (_add(total, one_pass(index)), None), empty, jnp.arange(count)
    )[0]

  if placements is None:
    specs: Any = jax.sharding.PartitionSpec()
  else:
    specs = SquaredGradients([p.spec for p in placements], jax.sharding.PartitionSpec())  # type: ignore[arg-type]
  sums, exponent = _mesh.with_automatic_axes(
    passes, batch, params, weights, jnp.asarray(shift), out_specs=specs
  )
  if placements is not None and not placements[0].mesh.explicit_axes:
    sums = [jax.lax.with_sharding_constraint(x, p) for x, p in zip(sums, placements, strict=True)]
  return SquaredGradients(sums, exponent)


jitted_program = jax.jit(_program, static_argnums=(0, 1))


def _add(a: SquaredGradients, b: SquaredGradients) -> SquaredGradients:
  """The sum of two, in units of the larger of their powers of two."""
  exponent = jnp.maximum(a.exponent, b.exponent)

  def shrunk(x: jax.Array, by: jax.Array) -> jax.Array:
    factor = _trees.power_of_two(jnp.maximum(by, jnp.finfo(x.dtype).minexp), x.dtype)
    return x * factor * factor

  sums = [
    shrunk(x, a.exponent - exponent) + shrunk(y, b.exponent - exponent)
    for x, y in zip(a.sums, b.sums, strict=True)
  ]
  return SquaredGradients(sums, exponent)


_jitted_add = jax.jit(_add, donate_argnums=0)


def take(batch: PyTree, weights: jax.Array, start: Any, size: int) -> tuple[PyTree, jax.Array]:
  """`size` examples and their weights; those beyond the end repeat the last one at weight zero."""
  num_examples = weights.shape[-1]
  if size == num_examples:
    return batch, weights
  rows = jnp.minimum(start + jnp.arange(size), num_examples - 1)
  real = start + jnp.arange(size) < num_examples
  return jax.tree.map(lambda x: x[rows], batch), jnp.where(real, weights[:, rows], 0)


def dealt(batch: PyTree, count: int, spread: _mesh.Spread) -> PyTree:
  """Arrays (N, ...) as (size, count, ...): `count` parts of equal size, to which every device deals its own examples.

  Filled up by repeating the last example.
  """

  def deal(x: jax.Array) -> jax.Array:
    missing = _part_size(len(x), count, spread) * count - len(x)
    filled = spread.examples(jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)]))
    return spread.examples(filled.reshape(-1, count, *x.shape[1:]))

  return jax.tree.map(deal, batch)


def dealt_weights(weights: jax.Array, count: int, spread: _mesh.Spread) -> jax.Array:
  """Weights (G, N) as (G, size, count), zero for what `dealt` filled up."""
  missing = _part_size(weights.shape[1], count, spread) * count - weights.shape[1]
  return jnp.pad(weights, ((0, 0), (0, missing))).reshape(len(weights), -1, count)


def part(parts: PyTree, index: Any, spread: _mesh.Spread) -> PyTree:
  """One part of what `dealt` made."""
  return jax.tree.map(lambda x: spread.examples(x[:, index]), parts)


def _part_size(num_examples: int, count: int, spread: _mesh.Spread) -> int:
  return -(-num_examples // (count * spread.mesh.size)) * spread.mesh.size


def _one_pass(
  objective: Objective,
  params: PyTree,
  batch: tuple[PyTree, PyTree],
  weights: jax.Array,
  shift: jax.Array,
  weighed: bool,
) -> SquaredGradients:
  """All examples of a batch at once; `weighed`: some of these are known to have a weight."""
  leaves, treedef = _trees.flatten(params)
  chosen = objective.chosen
  # What the function closes over may vary along more axes than its arguments do.
  axes = _mesh.varying_axes((weights, params, jax.eval_shape(objective.function, params, *batch)))
  live = [
    _mesh.varying(leaf, axes) for leaf, takes_part in zip(leaves, chosen, strict=True) if takes_part
  ]
  weights = _mesh.varying(weights, axes)
  # An example that no group weighs is replaced by one that some group does: nothing of it can reach the result.
  active = jnp.any(weights != 0, axis=0)
  stand_in = jnp.argmax(active)
  along = lambda mask, x: mask.reshape(-1, *(1,) * (x.ndim - 1))

  def pick(x: jax.Array) -> jax.Array:
    if objective.spread is None:
      taken = x[stand_in]
    else:  # a sum, for a row at a traced place would bring all examples to every device
      taken = jnp.sum(
        jnp.where(along(jnp.arange(len(x)) == stand_in, x), x, 0), axis=0, dtype=x.dtype
      )
    return jnp.where(along(active, x), x, taken)

  batch = jax.tree.map(pick, batch)

  def function(live_leaves: list[jax.Array], example: PyTree) -> jax.Array:
    replacements = iter(live_leaves)
    params = treedef.unflatten(
      [next(replacements) if c else leaf for c, leaf in zip(chosen, leaves, strict=True)]
    )
    return loss_checks.of_one(
      objective.function, params, *jax.tree.map(lambda x: x[None], example)
    )[0]

  def cotangents(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    if objective.loss is None:
      return jnp.ones_like(values), _mesh.varying(jnp.int32(0), axes)
    loss = objective.loss
    residuals = jax.vmap(jax.grad(lambda value, label: loss(value[None], label)[0]))(
      values, jax.tree.map(lambda x: x[:, None], batch[1])
    )
    half = any(x.dtype == jnp.float16 for x in (*live, values))
    target = jnp.asarray(_TARGET_EXPONENTS[half] + shift, jnp.int32)
    wide = residuals.astype(_trees.at_least_float32(residuals.dtype))
    largest = jnp.max(jnp.abs(wide), initial=0.0)
    exponent = jnp.where(jnp.isfinite(largest), jnp.frexp(largest)[1], 0) - target
    exponent = jnp.where(
      largest == 0, _LOWEST_EXPONENT, jnp.clip(exponent, _LOWEST_EXPONENT, -_LOWEST_EXPONENT)
    )
    return (wide * _trees.power_of_two(-exponent, wide.dtype)).astype(residuals.dtype), exponent

  with loss_checks.matmul_precision(objective.precision):
    sums, exponent = taps.squared_gradients(
      function,
      cotangents,
      live,
      batch,
      weights,
      disjoint=objective.disjoint,
      platform=objective.platform,
      spread=objective.spread,
    )
  if weighed:
    return SquaredGradients(sums, exponent)
  # Where all are without weight there is none to stand in: neither their values nor their range may count.
  some = jnp.any(active)
  return SquaredGradients(
    [jnp.where(some, x, 0) for x in sums], jnp.where(some, exponent, _LOWEST_EXPONENT)
  )


def examples_at_once(
  objective: Objective,
  params: PyTree,
  batch: tuple[PyTree, PyTree],
  weights: jax.Array,
  microbatch: int | None,
) -> int:
  """The microbatch: the one asked for, or one that keeps a pass within the memory it may take."""
  num_examples = weights.shape[-1]
  if microbatch is not None:
    return min(microbatch, num_examples)
  shapes, treedef = jax.tree.flatten(jax.tree.map(_abstract, (params, batch)))
  activations, copies, convolves = _bytes_per_example(
    objective.function, objective.chosen, tuple(shapes), treedef
  )
  if (
    convolves
    and jax.default_backend() == "cpu"
    and not _checks.is_concrete((params, batch, weights))
  ):
    return num_examples
  stats = jax.devices()[0].memory_stats() or {}
  allowed = stats["bytes_limit"] // 4 if "bytes_limit" in stats else _PASS_BYTES
  allowed *= 1 if objective.spread is None else objective.spread.mesh.size
  most = max(1, min(num_examples, allowed // max(activations + copies, 1)))
  passes = -(-num_examples // most)
  return -(-num_examples // passes)  # passes of equal size, for the last one is filled up


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))


@lru_cache(maxsize=64)
def _bytes_per_example(
  function: Function, chosen: tuple[bool, ...], shapes: tuple[Any, ...], treedef: Any
) -> tuple[int, int, bool]:
  """What a pass holds for each example, about: activations, gradients of leaves that are not contracted; convolutions?"""
  params, batch = treedef.unflatten(shapes)
  closed = _trace_one(function, params, batch)
  convolves = any(
    equation.primitive.name == "conv_general_dilated"
    for equation in loss_checks.equations_in(closed.jaxpr)
  )
  copies = sum(use.bytes for use in _uses_in(closed, chosen) if use.rule == "per example")
  # XLA fuses about half of what the equations compute, or more, and never stores it.
  return uses.activation_bytes(closed.jaxpr) // 2, copies, convolves


def uses_of(objective: Objective, params: PyTree, batch: tuple[PyTree, PyTree]) -> list[uses.Use]:
  """How the function of one example uses the leaves that take part; arrays may be abstract."""
  return _uses_in(_trace_one(objective.function, params, batch), objective.chosen)


def _uses_in(closed: Any, chosen: tuple[bool, ...]) -> list[uses.Use]:
  kinds: list[Any] = [
    frozenset([index]) if takes_part else "const" for index, takes_part in enumerate(chosen)
  ]
  return uses.survey(
    closed.jaxpr, closed.consts, kinds + ["data"] * (len(closed.jaxpr.invars) - len(kinds))
  )


def _trace_one(function: Function, params: PyTree, batch: tuple[PyTree, PyTree]) -> Any:
  example = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((1, *jnp.shape(x)[1:]), jnp.result_type(x)), batch
  )
  return jax.make_jaxpr(partial(loss_checks.of_one, function))(params, *example)
