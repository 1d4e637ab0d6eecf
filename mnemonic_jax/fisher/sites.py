"""What each contraction of a model reads and writes, on average over groups of examples.

The plan of one example is followed forward on all examples. Where a leaf of params meets data in a
product or a convolution is a site: the data it reads and the result it writes are averaged over all
axes that are neither examples nor channels, and over the examples of each group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mnemonic_jax.fisher import plan, sums
from mnemonic_jax.fisher.evaluate import Data, Engine, Param, on_batch
from mnemonic_jax.fisher.plan import Plan, Step


class Site(NamedTuple):
  """One contraction. In the body of a scan both arrays have a first axis of its iterations."""

  leaves: frozenset[int]  # of params, by their place in leaf order; several of a concatenation
  rule: str  # "product" or "convolution"
  reads: Any  # (G, F): several contracted axes are flattened into one
  writes: Any  # (G, O)


def sites(
  planned: Plan, leaves: Sequence[jax.Array], examples: Sequence[jax.Array], weights: jax.Array
) -> list[Site]:
  """Find the sites of a plan in the order of the data, and what they read and write.

  A leaf that is used in another way (broadcast, at several places, normalised) is no site, nor is
  one inside a cond.

  Args:
    planned: the plan of the function of one example; inputs are leaves, then the example's.
    leaves: the leaves of params, in order.
    examples: arrays with leading axis N.
    weights: (G, N), those of each group's mean.
  """
  walk = Walk(sums.Groups(weights))
  walk.evaluate_all(planned, *arguments(planned, leaves, examples, weights))
  mean = lambda x: jnp.einsum("gn,...nf->...gf", weights, x, precision=jax.lax.Precision.HIGHEST)
  pairs = zip(known(planned), walk.found, strict=True)
  return [Site(*site, *map(mean, arrays)) for site, arrays in pairs]


def known(planned: Plan) -> Iterator[tuple[frozenset[int], str]]:
  """What is known of each site without its arrays."""
  for step in planned.steps or ():
    if step.how == plan.CONTRACTED and step.rule.read is not None:
      yield planned.leaves(step.params), step.rule.name
    if step.how in (plan.SCAN, plan.REMATERIALISED):
      yield from known(step.inner[0])


def reads(
  planned: Plan, leaves: Sequence[jax.Array], examples: Sequence[jax.Array]
) -> tuple[list[jax.Array], list[jax.Array]]:
  """Find what each contraction reads of each example, in the order of the data.

  Each use of a leaf counts as a contraction, and so does each iteration of a scan. What stands
  inside a cond is not looked at.

  Args:
    planned, leaves, examples: as for `sites`.

  Returns:
    One array (N, F) a contraction, averaged over positions and float32 at least; and the results
    of the function, each with its axis of examples.
  """
  weights = jnp.zeros((1, len(examples[0])))
  walk = _Reading(sums.Groups(weights))
  results = walk.evaluate_all(planned, *arguments(planned, leaves, examples, weights))
  return [read for read, _ in walk.found], results


def arguments(
  planned: Plan, leaves: Sequence[jax.Array], examples: Sequence[jax.Array], weights: jax.Array
) -> list[Any]:
  """The inputs of a plan as the engine takes them."""
  args: list[Any] = [*leaves, *map(Data, examples)]
  for index, leaf in enumerate(leaves):
    if planned.inputs[index] != "const":
      args[index] = Param(leaf, *sums.dummies(leaf, weights))
  return args


class Walk(Engine):
  """Follows a plan forward and keeps what contractions read (..., N, F) and write (..., N, O)."""

  def __init__(self, groups: sums.Groups) -> None:
    super().__init__(groups)
    self.found: list[tuple[jax.Array, jax.Array]] = []

  def contracted(self, step: Step, run: Callable[..., Any], args: list[Any]) -> list[Any]:
    """Evaluate the operation, and keep its mean arrays."""
    (output,), rule = on_batch(run, args), step.rule
    if rule.read is not None and rule.written is not None:
      read = mean_over_positions(args[rule.data_index].value, rule.read)
      self.found.append((read, mean_over_positions(output.value, rule.written)))
    return [output]

  def copied(self, param: Param) -> Any:
    """A leaf that is used in another way is a constant here."""
    return param.value

  def tie(self, tie: Any, param: Param) -> Any:
    """So is one that is read at several places."""
    return _Untied()

  def cond(self, step: Step, run: Callable[..., Any], args: list[Any]) -> list[Any]:
    """And what a branch of a cond does with params is not looked at."""
    return on_batch(run, args)

  def rematerialised(self, step: Step, _: Any, args: list[Any]) -> list[Any]:
    """Nothing is pulled back, so nothing need be computed again."""
    return list(map(Data, self.evaluate_all(step.inner[0], *args)))

  def scan(self, step: Step, run: Callable[..., Any], args: list[Any]) -> list[Any]:
    """Keep what the body finds apart until all iterations are done."""
    outside, self.found = self.found, []
    outs = super().scan(step, run, args)
    self.found = outside + self.found
    return outs

  def harvest(self) -> Any:
    """What an iteration has found."""
    found, self.found = self.found, []
    return found

  def keep(self, found: Any) -> None:
    """All iterations' mean arrays, which have a first axis of iterations now."""
    self.found = [tuple(pair) for pair in found]


class _Reading(Walk):
  """Keeps one read a contraction, in the order of the data; the writes stand beside them."""

  def tie(self, tie: Any, param: Param) -> Any:
    """Each use of a leaf is a contraction."""
    return _Used(self)

  def rematerialised(self, step: Step, _: Any, args: list[Any]) -> list[Any]:
    """Compute again what a `jax.checkpoint` would: codes are learned by a gradient of the reads.

    On a mesh it keeps the layers that were gathered from being kept.
    """
    outside, self.found = self.found, []

    def inside(*args: Any) -> tuple[list[jax.Array], Any]:
      return self.evaluate_all(step.inner[0], *args), self.harvest()

    settings = {key: step.equation.params[key] for key in ("prevent_cse", "policy")}
    outs, found = jax.checkpoint(inside, **settings)(*args)
    self.found = outside + [tuple(pair) for pair in found]
    return list(map(Data, outs))

  def scan(self, step: Step, run: Callable[..., Any], args: list[Any]) -> list[Any]:
    """Give each iteration its own place."""
    outside, self.found = self.found, []
    outs = Engine.scan(self, step, run, args)
    length, backward = step.equation.params["length"], step.equation.params["reverse"]
    order = reversed(range(length)) if backward else range(length)
    apart = [(read[index], written[index]) for index in order for read, written in self.found]
    self.found = outside + apart
    return outs


class _Used:
  def __init__(self, walk: Walk) -> None:
    self.walk = walk

  def use(self, step: Step, run: Callable[..., Any], args: list[Any]) -> list[Any]:
    """Evaluate one of the uses, and keep what it reads."""
    return self.walk.contracted(step, run, args)


class _Untied:
  def use(self, step: Step, run: Callable[..., Any], args: list[Any]) -> list[Any]:
    """Evaluate one of the uses, with the param as a constant."""
    return on_batch(run, args)


def mean_over_positions(x: jax.Array, axes: Sequence[int]) -> jax.Array:
  """(N, *shape) -> (N, F): the mean over all axes of one example but `axes`, flattened."""
  others = [axis for axis in range(x.ndim - 1) if axis not in axes]
  ordered = x.transpose(0, *(1 + axis for axis in (*others, *axes)))
  width = math.prod(x.shape[1 + axis] for axis in axes)
  wide = ordered.astype(jnp.promote_types(x.dtype, jnp.float32))
  return wide.reshape(len(x), -1, width).mean(1)
