"""Which params a model uses behind an array: those that may change without changing what it holds.

"Behind" is meant in the order of the program. The arrays are sites (see `places`), or forks: those
that feed two or more kernels, as the input of a ResNet's stage does.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from jax.extend import core as jex

from mnemonic_jax.fisher import plan
from mnemonic_jax.fisher.plan import Plan, Step
from mnemonic_jax.methods.places import RESHAPING, UNCHANGED

_FEEDING = 2  # kernels that a fork feeds at least


class Arrays(Protocol):
  """Arrays of a plan that are counted: `places.Places`, or `Forks`."""

  @property
  def sites(self) -> Mapping[Any, int]:
    """Variable -> its place in the order of the data, among those of this plan."""

  @property
  def inner(self) -> Mapping[int, Any]:
    """Id of an equation -> what is inside it, see `places.Inside`."""

  @property
  def count(self) -> int:
    """How many there are, those inside included."""


@dataclasses.dataclass(frozen=True)
class Forks:
  """The arrays of a plan that feed two or more kernels."""

  sites: Mapping[Any, int]
  inner: Mapping[int, Inside]
  count: int


@dataclasses.dataclass(frozen=True)
class Inside:
  """The forks in the body of a step."""

  first: int
  iterations: int
  scanned: bool
  places: Forks


def forks(planned: Plan) -> Forks:
  """Find the forks of a plan; its inputs may be some."""
  made, feeds = {}, Counter[Any]()
  for step in planned.steps or ():
    made.update(dict.fromkeys(step.equation.outvars, step))
    if step.how in (plan.CONTRACTED, plan.TIED):
      feeds[_origin(step.equation.invars[step.rule.data_index], made)] += 1
  sites: dict[Any, int] = {}
  inner: dict[int, Inside] = {}
  for var in planned.jaxpr.invars:
    if feeds[var] >= _FEEDING:
      sites[var] = len(sites)
  count = len(sites)
  for step in planned.steps or ():
    if step.how in (plan.SCAN, plan.REMATERIALISED):
      scanned, body = step.how == plan.SCAN, forks(step.inner[0])
      inside = Inside(count, step.equation.params["length"] if scanned else 1, scanned, body)
      if body.count:
        inner[id(step.equation)] = inside
        count += body.count * inside.iterations
    for var in step.equation.outvars:
      if feeds[var] >= _FEEDING:
        sites[var] = count
        count += 1
  return Forks(sites, inner, count)


def _origin(var: Any, made: Mapping[Any, Step]) -> Any:
  """The array that a cast, reshaped or transposed one is of."""
  while (step := made.get(var)) is not None:
    (first, *others), name = step.equation.invars, step.equation.primitive.name
    if others or name not in UNCHANGED | RESHAPING | {"transpose"}:
      break
    var = first
  return var


def arrays_before(
  planned: Plan, places: Arrays, of_data: frozenset[int] | None = None
) -> dict[int, np.ndarray]:
  """For each input of a plan that is used: how many of the arrays come before its first use.

  An array () int; or (layers,), for each slice of a leaf that is scanned along its first axis. An
  input is used where it meets data: a cast, or a product with other params, goes on as the input.

  `of_data`: the inputs that depend on data; by default those that are no params.
  """
  found: dict[int, np.ndarray] = {}
  inputs = {var: frozenset([index]) for index, var in enumerate(planned.jaxpr.invars)}
  if of_data is None:
    of_data = frozenset(i for i, kind in enumerate(planned.inputs) if kind == "data")
  data = {planned.jaxpr.invars[index] for index in of_data}
  plain = set(planned.jaxpr.invars)  # inputs, and casts of them: of the same axes
  count = sum(var in places.sites for var in planned.jaxpr.invars)
  for step in planned.steps or ():
    atoms = list(map(_variable, step.equation.invars))
    used = [inputs.get(atom, frozenset()) for atom in atoms]
    if data.isdisjoint(atoms):
      inputs.update(dict.fromkeys(step.equation.outvars, frozenset().union(*used)))
      if step.equation.primitive.name in UNCHANGED and atoms[0] in plain:
        plain.update(step.equation.outvars)
      continue
    data.update(step.equation.outvars)
    inside = places.inner.get(id(step.equation))
    if inside is None:
      for index in frozenset[int]().union(*used):
        _note(found, index, np.asarray(count))
    else:
      meeting = frozenset(i for i, atom in enumerate(atoms) if atom in data)
      apart = frozenset(i for i, atom in enumerate(atoms) if atom in plain)
      for position, first in _inside(step, inside, meeting, apart):
        for index in used[position]:
          _note(found, index, first)
      count += inside.places.count * inside.iterations
    count += sum(var in places.sites for var in step.equation.outvars)
  return found


def _inside(
  step: Step, inside: Any, of_data: frozenset[int], plain: frozenset[int]
) -> Iterator[tuple[int, np.ndarray]]:
  """The same for the operands of a step, from the uses inside it."""
  (body,), params = step.inner, step.equation.params
  if not inside.scanned:
    for position, first in arrays_before(body, inside.places, of_data).items():
      yield position, inside.first + first
    return
  first_slice = params["num_consts"] + params["num_carry"]
  of_data |= set(range(params["num_consts"], first_slice))
  for position, first in arrays_before(body, inside.places, of_data).items():
    each = inside.first + inside.places.count * np.arange(inside.iterations) + first.min()
    each = each[::-1] if params["reverse"] else each
    yield position, each if position >= first_slice and position in plain else each.min()


def _note(found: dict[int, np.ndarray], index: int, first: Any) -> None:
  found[index] = np.minimum(found[index], first) if index in found else np.asarray(first)


def _variable(atom: Any) -> Any:
  return None if isinstance(atom, jex.Literal) else atom
