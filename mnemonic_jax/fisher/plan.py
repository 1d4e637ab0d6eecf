"""Which way each leaf of params goes: contracted where it meets data, or copied for every example."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend import core as jex

from mnemonic_jax.fisher import per_example
from mnemonic_jax.fisher.jaxprs import (
  REMAT,
  can_be_rebuilt,
  mutates,
  without_jits,
)
from mnemonic_jax.fisher.rules import BY_PRIMITIVE, contractor

# Of an atom: "data", "const" (the same for all examples), or the leaves that it rearranges.
Kind = str | frozenset[int]
# Each element of the result is one element of an operand, and none is there twice.
REARRANGING = frozenset(
  {
    *("reshape", "transpose", "squeeze", "expand_dims", "rev", "slice", "split", "concatenate"),
    *("copy", "copy_p"),
  }
)
# These are the identity to a squared gradient; the dummies keep their own sign and precision.
IDENTITIES = frozenset(
  {"neg", "convert_element_type", "reduce_precision", "sharding_constraint", "layout_constraint"}
)
# Factors beyond these, or not known while tracing, could take squares out of range that the gradient
# itself is in.
_SMALLEST_FACTOR, _LARGEST_FACTOR = 2.0**-16, 2.0**16


class Use(NamedTuple):
  """How an equation uses leaves, for one example."""

  leaves: frozenset[int]
  rule: str  # the name of a contraction, or "per example"
  reason: str  # why it is not contracted; empty where it is
  flops: int  # of the gradient (for "per example" of the square alone), its square and the sum
  bytes: int  # held at a time, whatever the microbatch
  bytes_each: int  # held for each example of the microbatch


def plan(jaxpr: Any, kinds: Sequence[str]) -> dict[int, str]:
  """Index of each input of kind "param" that every example must have its own copy of, and why."""
  if mutates(jaxpr):
    params = (index for index, kind in enumerate(kinds) if kind == "param")
    return dict.fromkeys(params, "used beside mutable arrays")
  copied: dict[int, str] = {}
  while more := _conflicts(jaxpr, kinds, copied):  # a copy is data, which may free or bind others
    copied.update(more)
  return copied


def _conflicts(jaxpr: Any, kinds: Sequence[str], copied: dict[int, str]) -> dict[int, str]:
  """The leaves that cannot be contracted if those in `copied` are not."""
  env: dict[Any, Kind] = dict.fromkeys(jaxpr.constvars, "const")
  for index, (var, kind) in enumerate(zip(jaxpr.invars, kinds, strict=True)):
    env[var] = kind if kind != "param" else "data" if index in copied else frozenset([index])
  windows: dict[Any, list[Any]] = {}
  found: dict[int, str] = {}
  look = lambda atom: "const" if isinstance(atom, jex.Literal) else env[atom]

  def blame(leaves: Kind, why: str) -> None:
    for leaf in leaves if isinstance(leaves, frozenset) else ():
      found.setdefault(leaf, why)

  for equation in jaxpr.eqns:
    operands = [look(atom) for atom in equation.invars]
    leaves = leaves_of(operands)
    out: Kind = "data" if leaves or "data" in operands else "const"
    if leaves and equation.primitive.name == "stop_gradient":
      env.update(dict.fromkeys(equation.outvars, "const"))
      continue
    if leaves:
      if keeps_elements(equation, operands):
        out = leaves
      else:
        blame(*_objection(equation, operands))
      for atom, operand in zip(equation.invars, operands, strict=True):
        if isinstance(operand, frozenset):
          windows.setdefault(atom, []).append(_window(equation))
    env.update(dict.fromkeys(equation.outvars, out))
  for atom in jaxpr.outvars:
    blame(look(atom), "returned as it is")
  for var, seen in windows.items():
    if len(seen) > 1 and not _apart(seen):
      blame(env[var], "used more than once")
  return found


def keeps_elements(equation: Any, operands: Sequence[Kind]) -> bool:
  """Whether each element of the result is one of a leaf, perhaps times a constant, none twice."""
  name = equation.primitive.name
  if name == "broadcast_in_dim":
    return math.prod(equation.params["shape"]) == math.prod(equation.invars[0].aval.shape)
  if name in IDENTITIES:
    return bool(jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating))
  if name in ("mul", "div"):
    factor = equation.invars[0 if name == "mul" and isinstance(operands[1], frozenset) else 1]
    if not isinstance(factor, jex.Literal) or jnp.shape(factor.val):
      return False
    return _SMALLEST_FACTOR <= abs(float(factor.val)) <= _LARGEST_FACTOR
  return name in REARRANGING and all(isinstance(kind, frozenset) for kind in operands)


def _objection(equation: Any, operands: Sequence[Kind]) -> tuple[Kind, str]:
  """The leaves that this equation cannot take as they are, and why; none if it can take all."""
  name, everything = equation.primitive.name, leaves_of(operands)
  if rule := BY_PRIMITIVE.get(name):
    params = [index for index, kind in enumerate(operands) if isinstance(kind, frozenset)]
    return ("const", "") if rule.fits(equation, params, operands) else (everything, rule.misfit)
  if name in ("scan", "cond", *REMAT) and not can_be_rebuilt(equation):
    return everything, f"used in a {name} with unusual settings"
  if name == "scan":
    shared = equation.params["num_consts"] + equation.params["num_carry"]
    return leaves_of(operands[:shared]), "shared by the iterations of a scan"
  if name in REMAT or (name == "cond" and operands[0] == "const"):
    return "const", ""
  return everything, f"used in {name}"


def leaves_of(operands: Iterable[Kind]) -> frozenset[int]:
  """All leaves among operands."""
  return frozenset(leaf for kind in operands if isinstance(kind, frozenset) for leaf in kind)


def _window(equation: Any) -> tuple[Sequence[int], Sequence[int]] | None:
  """What a slice reads, as (starts, limits); None for the whole."""
  if equation.primitive.name != "slice":
    return None
  return equation.params["start_indices"], equation.params["limit_indices"]


def _apart(windows: Sequence[Any]) -> bool:
  """Whether no element is in two windows."""
  below = lambda a, b: any(high <= low for high, low in zip(a[1], b[0], strict=True))
  pairs = ((a, b) for index, a in enumerate(windows) for b in windows[:index])
  return None not in windows and all(below(a, b) or below(b, a) for a, b in pairs)


def survey(
  jaxpr: Any, consts: Sequence[Any], operands: Sequence[Kind], num_groups: int = 1
) -> list[Use]:
  """How each leaf is used by the jaxpr of one example, and what that costs.

  Inputs are "data", "const", or the leaves they are.
  """
  jaxpr, _ = without_jits(jaxpr, consts)
  reasons = plan(jaxpr, ["param" if isinstance(kind, frozenset) else kind for kind in operands])
  env: dict[Any, Kind] = dict.fromkeys(jaxpr.constvars, "const")
  found = []
  for index, (var, kind) in enumerate(zip(jaxpr.invars, operands, strict=True)):
    if index in reasons and isinstance(kind, frozenset):
      shape = tuple(var.aval.shape)
      held = per_example.held_each(shape) * _wide_bytes(var)
      flops = per_example.flops(shape)
      found.append(Use(kind, per_example.NAME, reasons[index], flops, 0, held))
      kind = "data"
    env[var] = kind
  for equation in jaxpr.eqns:
    kinds = ["const" if isinstance(atom, jex.Literal) else env[atom] for atom in equation.invars]
    leaves, name = leaves_of(kinds), equation.primitive.name
    out: Kind = "data" if leaves or "data" in kinds else "const"
    if leaves and name == "stop_gradient":
      out = "const"
    elif leaves and keeps_elements(equation, kinds):
      out = leaves
    elif leaves and name in ("scan", "cond", *REMAT):
      found += _survey_inner(equation, kinds, num_groups)
    elif leaves:
      index = next(i for i, kind in enumerate(kinds) if isinstance(kind, frozenset))
      made, size = contractor(equation, index), _wide_bytes(equation.invars[index])
      held, each = made.held * size, made.held_each(num_groups) * size
      found.append(Use(leaves, made.name, "", made.flops, held, each))
    env.update(dict.fromkeys(equation.outvars, out))
  return found


def _survey_inner(equation: Any, kinds: list[Kind], num_groups: int) -> list[Use]:
  """The uses in the body of a scan (for all its iterations), a remat or the branches of a cond."""
  params = equation.params
  if equation.primitive.name == "scan":
    carry = slice(params["num_consts"], params["num_consts"] + params["num_carry"])
    kinds[carry] = ["data"] * params["num_carry"]
    body = params["jaxpr"]
    uses = survey(body.jaxpr, body.consts, kinds, num_groups)
    return [use._replace(flops=use.flops * params["length"]) for use in uses]
  bodies = params.get("branches", (params.get("jaxpr"),))
  kinds = kinds[1:] if "branches" in params else kinds
  closed = [(getattr(body, "jaxpr", body), getattr(body, "consts", ())) for body in bodies]
  return [use for body in closed for use in survey(*body, kinds, num_groups)]


def _wide_bytes(atom: Any) -> int:
  return max(4, atom.aval.dtype.itemsize)
