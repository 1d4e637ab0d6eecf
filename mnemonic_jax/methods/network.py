"""What a method that edits weights must know of a model: its sites by name, and its head."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax import _checks, _trees
from mnemonic_jax.errors import nearest
from mnemonic_jax.fisher import loss_checks, passes, plan
from mnemonic_jax.fisher.plan import Plan, Step
from mnemonic_jax.methods import behind, cutting, directions, places
from mnemonic_jax.methods import head as heads
from mnemonic_jax.methods.problem import Problem, class_weights, plan_of

PyTree = Any

_STAGES = 2  # forks that a model has at least if they are where its stages start


@dataclasses.dataclass(frozen=True)
class Site:
  """An array that kernels write into.

  Attributes:
    name: the dotted path of the first kernel that writes there, with the layer in brackets where
      layers are stacked.
    kernels: the dotted paths of all of them.
    depth: how many such arrays lie from here to the head, this one included; None where other
      arrays bypass this one, so that `depth` does not count it.
  """

  name: str
  kernels: tuple[str, ...]
  depth: int | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outline:
  """What a compiled program remembers of the model that it was traced with."""

  depths: int = dataclasses.field(metadata={"static": True})
  has_bias: bool = dataclasses.field(metadata={"static": True})

  def require_margin(self, remain: Any) -> None:
    """Refuse to drop rows where a forgotten class would score as the only kept one."""
    if not self.has_bias and _checks.is_concrete(remain) and np.sum(remain) == 1:
      raise ValueError(
        "drop_row: the head has no bias, and there is one kept class: a forgotten class would "
        "score as much. Expected two kept classes, or a head with a bias."
      )


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
  """The program of a model, and where it can be edited."""

  planned: Plan
  places: places.Places
  sites: tuple[Site, ...]  # in the order of the data
  head: heads.Head | None
  why: str  # why the head cannot be dropped; empty where it can
  reader: Step | None  # the contraction that makes the logits

  @property
  def outline(self) -> Outline:
    """What does not depend on values."""
    return Outline(self.depths, self.head is not None and self.head.bias is not None)

  @property
  def depths(self) -> int:
    """The largest depth."""
    return max((site.depth for site in self.sites if site.depth is not None), default=0)

  def at_depth(self, depth: Any) -> jax.Array:
    """(S,) bool: the sites up to a depth, which may be traced."""
    never = self.depths + 1
    return jnp.asarray([never if s.depth is None else s.depth for s in self.sites], int) <= depth

  def named(self, names: tuple[str, ...]) -> jax.Array:
    """(S,) bool: the sites of these names."""
    known = [site.name for site in self.sites]
    for name in names:
      if name not in known:
        raise ValueError(
          f"sites: got {name!r}, which is no site of this model. {nearest(name, known)}"
        )
    return jnp.asarray([name in names for name in known], bool)

  def used_from(self, active: jax.Array, params: PyTree) -> list[jax.Array]:
    """For each leaf: whether the model uses it from the first active site on.

    Bools that broadcast to the leaf. The kernels that write into that site count.
    """
    first = jnp.where(jnp.any(active), jnp.argmax(active), len(self.sites) + 1)
    found = _used(params, behind.arrays_before(self.planned, self.places), first)
    for index, site in enumerate(places.known(self.places)):
      for leaf in site.leaves:  # that the program may use before another site
        if not found[leaf].ndim or max(found[leaf].shape) == 1:
          found[leaf] = found[leaf] | active[index]
    return found

  def stage(self, depth: int, params: PyTree) -> list[jax.Array]:
    """The same for the stage that starts `depth` forks from the head, the head left out.

    In a model with fewer than two forks, `depth` sites from the head. The first of all starts at
    the input.
    """
    forks = behind.forks(self.planned)
    starts = [-1, *range(forks.count)]
    before = behind.arrays_before(self.planned, forks)
    if forks.count < _STAGES:
      starts = [-1, *(i for i, site in enumerate(self.sites) if site.depth is not None)]
      before = behind.arrays_before(self.planned, self.places)
    if depth > len(starts):
      raise ValueError(
        f"depth: got {depth}; this model has {len(starts)} arrays behind which a stage can start."
      )
    head = self.require_head()
    for row in (head.kernel, head.bias):
      if row is not None:
        before.pop(row.leaf)
    return _used(params, before, starts[-depth] + 1)

  def require_head(self) -> heads.Head:
    """The head, or a ValueError that says why its row cannot be dropped."""
    if self.head is None:
      raise ValueError(
        f"drop_row: the head of this model cannot be dropped: {self.why}. Pass "
        "mnemonic_jax.Projection(drop_row=False), which edits its kernel like the others."
      )
    return self.head


def _used(params: PyTree, before: dict[int, np.ndarray], first: Any) -> list[jax.Array]:
  """Whether at least `first` arrays come before each leaf, where it is used."""
  found = []
  for index, leaf in enumerate(jax.tree.leaves(params)):
    use = before.get(index, np.asarray(-1))
    use = use.reshape(use.shape + (1,) * (jnp.ndim(leaf) - use.ndim))
    found.append(jnp.asarray(use) >= first)
  return found


def look(problem: Problem) -> Network:
  """Find the sites and the head of a problem's model; nothing is computed."""
  return of_plan(plan_of(problem), problem.params)


def of_plan(planned: Plan, params: PyTree) -> Network:
  """Find the sites and the head in the plan of the logits of one example."""
  why, found = "", None
  try:
    found = heads.find(planned)
  except heads.NoHead as error:
    why = str(error)
  reader = found.step if found else _last_contraction(planned)
  without = planned.leaves(reader.params) if reader else frozenset()
  at = places.find(planned, without)
  paths = list(_trees.by_path(params))
  known = list(places.known(at))
  layers, depth = Counter(site.leaves[0] for site in known), 0
  left, sites = Counter(layers), []
  for site in reversed(known):
    depth += site.main
    kernels, first = tuple(paths[leaf] for leaf in site.leaves), site.leaves[0]
    left[first] -= 1
    layer = f"[{left[first]}]" if layers[first] > 1 else ""
    sites.append(Site(kernels[0] + layer, kernels, depth if site.main else None))
  return Network(planned, at, tuple(sites[::-1]), found, why, reader)


def _last_contraction(planned: Plan) -> Step | None:
  """The operation in which a kernel meets data, if nothing after it mixes channels again."""
  alone = places.alone(planned)
  for step in reversed(planned.steps or ()):
    if step.how == plan.CONTRACTED:
      return step if step.equation.invars[step.rule.index] in alone else None
    mixes = step.how in (plan.SCAN, plan.COND, plan.REMATERIALISED, plan.TIED)
    if mixes or step.equation.primitive.name in ("dot_general", "conv_general_dilated"):
      return None
  return None


def _shown(problem: Problem) -> tuple[tuple[jax.Array, jax.Array], directions.Weights]:
  """Codes, then judges; (inputs, labels) and what each counts for.

  Codes give the means. Judges show how their classes spread; in a class without one, codes do.
  """
  inputs, labels, mean = problem.inputs, jnp.asarray(problem.labels), class_weights(problem)
  if problem.judges is None:
    return (inputs, labels), directions.Weights(mean, mean)
  judges, shares = problem.judges.inputs, problem.judges.weights.astype(mean.dtype)
  num_classes, count = shares.shape
  of_class = jnp.repeat(jnp.eye(num_classes, dtype=mean.dtype), count, axis=1)
  judged = jnp.sum(shares, axis=1, keepdims=True) > 0
  spread = jnp.concatenate([jnp.where(judged, 0, mean), of_class * shares.reshape(1, -1)], axis=1)
  mean = jnp.concatenate([mean, jnp.zeros_like(of_class)], axis=1)
  inputs = jnp.concatenate([inputs, judges.reshape(-1, *judges.shape[2:]).astype(inputs.dtype)])
  labels = jnp.concatenate([labels, jnp.repeat(jnp.arange(num_classes, dtype=labels.dtype), count)])
  return (inputs, labels), directions.Weights(mean, spread)


def edit(
  problem: Problem, network: Network, active: jax.Array, *, head: str, bypassed: bool
) -> tuple[PyTree, cutting.Found]:
  """Cut at the active sites (S,); traceable.

  `head`: "drop" its rows, "cut" its kernel too, or "leave" it. `bypassed`: whether `active` may
  hold sites that other arrays bypass.
  """
  leaves, treedef = _trees.flatten(problem.params)
  sides, devices = (problem.forget, problem.remain), problem.request.placement.spread
  examples, weights = _shown(problem)
  if devices is not None:  # each device its part of the codes
    stacked = jnp.concatenate(weights)
    examples, stacked = passes.spread_out(examples, stacked, devices)
    weights = directions.Weights(*jnp.split(stacked, 2))
  with loss_checks.matmul_precision(problem.request.precision):
    changes, found = cutting.cut_writes(
      network.planned,
      network.places,
      [*leaves, *problem.constants],
      [jnp.expand_dims(x, 1) for x in examples],
      weights,
      sides,
      active,
      bypassed,
      network.reader if head == "cut" else None,
    )
  for index, change in changes.items():
    leaf = leaves[index]
    leaves[index] = (leaf + change.astype(_trees.at_least_float32(leaf.dtype))).astype(leaf.dtype)
  if head == "drop":
    new = network.require_head().dropped(leaves, *sides)
    leaves = [new.get(index, leaf) for index, leaf in enumerate(leaves)]
  return treedef.unflatten(leaves), found
