"""The plan of the jaxpr of one example: what becomes of each equation that a param is in.

`make` is the only place that decides it. `evaluate` follows the plan, and `Plan.uses` counts what
that costs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend import core as jex

from mnemonic_jax.fisher import per_example
from mnemonic_jax.fisher.jaxprs import REMAT, can_be_rebuilt, mutates, without_jits
from mnemonic_jax.fisher.rules import BY_PRIMITIVE, Contractor, contractor
from mnemonic_jax.fisher.tied import Contracting, Tie


class Params(NamedTuple):
  """What an atom of a jaxpr is that rearranges params."""

  indices: frozenset[int]  # among the leaves of params; inside a plan, among its inputs
  whole: bool = True  # whether its first axis is that of a leaf, which has a unit for each slice


# Of an atom: "data" (each example has its own), "const" (the same for all), or params.
Kind = str | Params

# Each element of the result is one element of an operand, and none is there twice.
_REARRANGING = frozenset(
  {"reshape", "transpose", "squeeze", "expand_dims", "rev", "slice", "split", "concatenate"}
  | {"copy", "copy_p"}
)
IN_PARTS = ("slice", "split", "concatenate")
# These are the identity to a squared gradient; the dummies keep their own sign and precision.
_IDENTITIES = frozenset(
  {"neg", "convert_element_type", "reduce_precision", "sharding_constraint", "layout_constraint"}
)
# Factors beyond these, or not known while tracing, could take squares out of range although the
# gradient itself is in range.
_SMALLEST_FACTOR, _LARGEST_FACTOR = 2.0**-16, 2.0**16

# What becomes of an equation. MAPPED evaluates it on all examples, with params as constants; the
# next three give params again; in CONTRACTED a param meets data, in TIED as one of several times;
# the others have plans inside.
MAPPED, SAME, REARRANGED, SCALED = "mapped", "same", "rearranged", "scaled"
CONTRACTED, TIED = "contracted", "tied"
SCAN, COND, REMATERIALISED = "scan", "cond", "rematerialised"


class Step(NamedTuple):
  """An equation, and what becomes of it."""

  equation: Any
  kinds: tuple[Kind, ...]  # of its operands
  how: str
  inner: tuple[Plan, ...] = ()

  @property
  def params(self) -> frozenset[int]:
    """The params among its operands."""
    return _params_of(self.kinds)

  @property
  def rule(self) -> Contractor:
    """The contraction of its param."""
    return contractor(self.equation, [isinstance(kind, Params) for kind in self.kinds].index(True))

  @property
  def read_in_parts(self) -> frozenset[int]:
    """The params that it cuts up, or scans along an axis for which they have no units."""
    if self.how == REARRANGED and self.equation.primitive.name in IN_PARTS:
      return self.params
    if self.how == SCAN:
      return _params_of(kind for kind in self.kinds if isinstance(kind, Params) and not kind.whole)
    return frozenset()


class Use(NamedTuple):
  """How an equation uses leaves, for one example."""

  leaves: frozenset[int]
  rule: str  # the name of a contraction, or "per example"
  reason: str  # why it is not contracted; empty where it is
  flops: int  # of the gradient (for "per example" of the square alone), its square and the sum
  bytes: int  # held at a time, whatever the microbatch
  bytes_each: int  # held for each example of the microbatch


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """A jaxpr, of which of its inputs each example has a copy and why, and what the rest becomes."""

  jaxpr: Any
  consts: Sequence[Any]
  inputs: Sequence[Kind]
  copied: dict[int, str]  # index among the inputs -> why
  tied: dict[int, Tie]  # index among the inputs -> its contractions
  steps: Sequence[Step] | None  # None: mutable arrays, beside which equations are not taken alone

  def leaves(self, params: Iterable[int]) -> frozenset[int]:
    """The leaves of params that some inputs are."""
    return _params_of(self.inputs[index] for index in params)

  @property
  def fixed(self) -> frozenset[int]:
    """The leaves that are somewhere read in parts, whose unit is 0."""
    steps = self.steps or ()
    here = self.leaves(index for step in steps for index in step.read_in_parts)
    return here.union(*(inner.fixed for step in steps for inner in step.inner))

  def uses(self, num_groups: int = 1) -> Iterator[Use]:
    """How leaves are used, and what that costs."""
    for index, why in self.copied.items():
      var = self.jaxpr.invars[index]
      shape, leaves = tuple(var.aval.shape), self.leaves([index])
      held = per_example.held_each(shape) * _wide_bytes(var)
      yield Use(leaves, per_example.NAME, why, per_example.flops(shape), 0, held)
    for step in self.steps or ():
      if step.how == CONTRACTED:
        rule = step.rule
        size = _wide_bytes(step.equation.invars[rule.index])
        held, each = rule.held * size, rule.held_each(num_groups) * size
        yield Use(self.leaves(step.params), rule.name, "", rule.flops, held, each)
      if step.how == TIED:
        tie, rule = self.tied[min(step.params)], step.rule
        held = tie.held * _wide_bytes(tie.leaf)
        yield Use(self.leaves(step.params), rule.name, "", rule.flops, held, 0)
      times = step.equation.params["length"] if step.how == SCAN else 1
      for use in (use for inner in step.inner for use in inner.uses(num_groups)):
        yield use._replace(flops=use.flops * times)


def make(jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Kind]) -> Plan:
  """Plan the jaxpr of one example, whose inputs are data, constants or leaves of params."""
  jaxpr, consts = without_jits(jaxpr, consts)
  if mutates(jaxpr):
    params = (index for index, kind in enumerate(inputs) if isinstance(kind, Params))
    why = dict.fromkeys(params, "used beside mutable arrays")
    return Plan(jaxpr, consts, inputs, why, {}, None)
  copied: dict[int, str] = {}
  while True:  # a copied param is data, which may free or bind others
    steps, conflicts, reused = _walk(jaxpr, inputs, copied)
    found = {index: _tie(jaxpr.invars[index], index, steps) for index in reused - conflicts.keys()}
    tied = {index: tie for index, tie in found.items() if tie}
    conflicts |= dict.fromkeys(found.keys() - tied.keys(), "used more than once")
    if not conflicts:
      break
    copied |= conflicts
  outside = Plan(jaxpr, consts, inputs, copied, tied, None)
  planned = [step._replace(inner=tuple(_plans_inside(outside, step))) for step in steps]
  ties = lambda step: step.how == CONTRACTED and step.params <= tied.keys()
  planned = [step._replace(how=TIED) if ties(step) else step for step in planned]
  return dataclasses.replace(outside, steps=planned)


def _tie(var: Any, index: int, steps: Sequence[Step]) -> Tie | None:
  """The contractions of a param that is used more than once, if there is nothing else."""
  own = [step for step in steps if index in step.params]
  own = [step for step in own if step.equation.primitive.name != "stop_gradient"]
  uses = [Contracting(step.equation, step.rule) for step in own if step.how == CONTRACTED]
  rearranging = [step.equation for step in own if step.how in (SAME, REARRANGED, SCALED)]
  alone = all(sum(isinstance(kind, Params) for kind in step.kinds) == 1 for step in own)
  alone = alone and all(step.params == {index} for step in own)
  if not alone or len(own) > len(uses) + len(rearranging) or len(uses) < 2:
    return None
  return Tie(var, rearranging, uses) if all(use.is_carried for use in uses) else None


def _walk(
  jaxpr: Any, inputs: Sequence[Kind], copied: dict[int, str]
) -> tuple[list[Step], dict[int, str], set[int]]:
  """Decide what becomes of each equation; which params to copy too, and why; those used twice."""
  env: dict[Any, Kind] = dict.fromkeys(jaxpr.constvars, "const")
  for index, (var, kind) in enumerate(zip(jaxpr.invars, inputs, strict=True)):
    if isinstance(kind, Params):
      kind = "data" if index in copied else kind._replace(indices=frozenset([index]))
    env[var] = kind
  read = lambda atom: "const" if isinstance(atom, jex.Literal) else env[atom]
  windows: dict[Any, list[Any]] = {}
  found: dict[int, str] = {}
  reused: set[int] = set()
  steps = []

  def blame(params: Iterable[int], why: str) -> None:
    for param in params:
      found.setdefault(param, why)

  for equation in jaxpr.eqns:
    operands = tuple(map(read, equation.invars))
    how, objectors, why = _treatment(equation, operands)
    step = Step(equation, operands, how)
    steps.append(step)
    blame(objectors, why)
    env.update(dict.fromkeys(equation.outvars, _result(step)))
    for atom, operand in zip(equation.invars, operands, strict=True):
      if isinstance(operand, Params) and equation.primitive.name != "stop_gradient":
        windows.setdefault(atom, []).append(_window(equation))
  for atom in jaxpr.outvars:
    blame(_params_of([read(atom)]), "returned as it is")
  for var, seen in windows.items():
    if len(seen) > 1 and not _apart(seen):
      reused |= _params_of([env[var]])
  return steps, found, reused


def _result(step: Step) -> Kind:
  """What the results of an equation are."""
  if step.how in (SAME, REARRANGED, SCALED):
    kinds = [kind for kind in step.kinds if isinstance(kind, Params)]
    return Params(step.params, step.how != REARRANGED and kinds[0].whole)
  if step.equation.primitive.name == "stop_gradient" and step.params:
    return "const"
  return "data" if step.params or "data" in step.kinds else "const"


def _treatment(equation: Any, operands: Sequence[Kind]) -> tuple[str, frozenset[int], str]:
  """What becomes of an equation; the params that it cannot take as they are, and why."""
  name, everything, nothing = equation.primitive.name, _params_of(operands), frozenset[int]()
  if not everything or name == "stop_gradient":
    return MAPPED, nothing, ""
  if how := gives_params(equation, operands):
    return how, nothing, ""
  if rule := BY_PRIMITIVE.get(name):
    params = [index for index, kind in enumerate(operands) if isinstance(kind, Params)]
    fits = rule.fits(equation, params, operands)
    return (CONTRACTED, nothing, "") if fits else (MAPPED, everything, rule.misfit)
  if name in ("scan", "cond", *REMAT) and not can_be_rebuilt(equation):
    return MAPPED, everything, f"used in a {name} with unusual settings"
  if name == "scan":
    shared = equation.params["num_consts"] + equation.params["num_carry"]
    return SCAN, _params_of(operands[:shared]), "shared by the iterations of a scan"
  if name == "cond" and operands[0] == "const":
    return COND, nothing, ""
  if name in REMAT:
    return REMATERIALISED, nothing, ""
  return MAPPED, everything, f"used in {name}"


def gives_params(equation: Any, operands: Sequence[Kind]) -> str | None:
  """How each element of the result is one of a param, none there twice; None if it is not."""
  name = equation.primitive.name
  if name == "broadcast_in_dim":
    same = math.prod(equation.params["shape"]) == math.prod(equation.invars[0].aval.shape)
    return REARRANGED if same else None
  if name in _IDENTITIES:
    return SAME if jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating) else None
  if name in ("mul", "div"):
    factor = equation.invars[0 if name == "mul" and isinstance(operands[1], Params) else 1]
    if not isinstance(factor, jex.Literal) or jnp.shape(factor.val):
      return None
    return SCALED if _SMALLEST_FACTOR <= abs(float(factor.val)) <= _LARGEST_FACTOR else None
  rearranges = name in _REARRANGING and all(isinstance(kind, Params) for kind in operands)
  return REARRANGED if rearranges else None


def _plans_inside(outside: Plan, step: Step) -> Iterator[Plan]:
  """Plan the body of a scan or a remat, or the branches of a cond."""
  params = step.equation.params
  kinds: list[Kind] = [
    Params(outside.leaves(kind.indices), kind.whole and step.how != SCAN)
    if isinstance(kind, Params)
    else kind
    for kind in step.kinds
  ]
  if step.how == SCAN:
    carry = slice(params["num_consts"], params["num_consts"] + params["num_carry"])
    kinds[carry] = ["data"] * params["num_carry"]
  if step.how in (SCAN, REMATERIALISED):
    body = params["jaxpr"]
    yield make(getattr(body, "jaxpr", body), getattr(body, "consts", ()), kinds)
  elif step.how == COND:
    yield from (make(branch.jaxpr, branch.consts, kinds[1:]) for branch in params["branches"])


def _params_of(operands: Iterable[Kind]) -> frozenset[int]:
  return frozenset().union(*(kind.indices for kind in operands if isinstance(kind, Params)))


def _window(equation: Any) -> tuple[Sequence[int], Sequence[int]] | None:
  """What a slice reads, as (starts, limits); None for the whole."""
  if equation.primitive.name != "slice":
    return None
  return equation.params["start_indices"], equation.params["limit_indices"]


def read_apart(equations: Sequence[Any]) -> bool:
  """Whether equations that read one variable are slices without a common element."""
  return _apart([_window(equation) for equation in equations])


def _apart(windows: Sequence[Any]) -> bool:
  """Whether no element is in two windows."""
  below = lambda a, b: any(high <= low for high, low in zip(a[1], b[0], strict=True))
  pairs = ((a, b) for index, a in enumerate(windows) for b in windows[:index])
  return None not in windows and all(below(a, b) or below(b, a) for a, b in pairs)


def _wide_bytes(atom: Any) -> int:
  return max(4, atom.aval.dtype.itemsize)
