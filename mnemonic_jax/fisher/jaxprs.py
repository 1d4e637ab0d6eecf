"""Jaxprs taken apart and put together again, through JAX's public evaluation of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

_STATE_EFFECTS = ("ReadEffect", "WriteEffect", "AccumEffect")
_JIT = ("jit", "pjit")
REMAT = ("remat2", "remat", "checkpoint")
# The parameters of the equations that the engine builds anew. One with others is left as it is.
_KNOWN = {
  "scan": {
    *("jaxpr", "num_consts", "num_carry", "length", "reverse", "unroll"),
    *("linear", "_split_transpose"),
  },
  "cond": {"branches"},
  **{name: {"jaxpr", "prevent_cse", "policy", "differentiated"} for name in REMAT},
}


def can_be_rebuilt(equation: Any) -> bool:
  """Whether the engine can build a scan, cond or remat anew and keep all that it says.

  A cond that switches on the platform has branches that may not even lower elsewhere.
  """
  known = _KNOWN.get(equation.primitive.name, set())
  said = {name for name, value in equation.params.items() if value is not None}
  return said <= known


def mutates(jaxpr: Any) -> bool:
  """Whether it reads or writes mutable arrays, whose equations cannot be taken one by one."""
  effects = (effect for equation in jaxpr.eqns for effect in equation.effects)
  return any(type(effect).__name__ in _STATE_EFFECTS for effect in effects)


def equations_in(jaxpr: Any) -> Iterator[Any]:
  """Every equation of a jaxpr and of the jaxprs inside it."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in inner_jaxprs(equation):
      yield from equations_in(inner)


def inner_jaxprs(equation: Any) -> list[Any]:
  """The jaxprs among the parameters of an equation."""
  values = equation.params.values()
  parts = [x for value in values for x in (value if isinstance(value, (tuple, list)) else (value,))]
  return [inner for x in parts if hasattr(inner := getattr(x, "jaxpr", x), "eqns")]


def activation_bytes(jaxpr: Any) -> int:
  """Bytes of all values that a jaxpr computes, about what its backward pass finds in memory."""
  total = 0
  for equation in jaxpr.eqns:
    inside = max(map(activation_bytes, inner_jaxprs(equation)), default=0)
    if equation.primitive.name in REMAT:  # computed again when it is needed
      inside = 0
    total += (
      inside * equation.params.get("length", 1) if equation.primitive.name == "scan" else inside
    )
    shaped: list[Any] = [var.aval for var in equation.outvars if hasattr(var.aval, "shape")]
    total += sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in shaped)
  return total


class Stretch(NamedTuple):
  """Some equations of a jaxpr as a function."""

  reads: list[Any]  # the variables it takes
  writes: list[Any]  # and those it returns
  run: Callable[..., list[Any]]


def stretch(jaxpr: Any, equations: Sequence[Any]) -> Stretch:
  """Evaluate some equations through the public evaluation of a jaxpr that holds nothing else."""
  outs = [var for equation in equations for var in equation.outvars]
  kept = [var for var in outs if not isinstance(var, jex.DropVar)]
  written = set(kept)
  atoms = [atom for equation in equations for atom in equation.invars]
  read = [atom for atom in atoms if not isinstance(atom, jex.Literal) and atom not in written]
  reads = list(dict.fromkeys(read))
  effects = frozenset().union(*(equation.effects for equation in equations))
  alone = jaxpr.replace(
    constvars=[], invars=reads, outvars=kept, eqns=list(equations), effects=effects
  )
  return Stretch(reads, kept, jex.jaxpr_as_fun(jex.ClosedJaxpr(alone, ())))


def runner(jaxpr: Any, equation: Any) -> Callable[..., list[Any]]:
  """Evaluate one equation on values of all its operands, literals among them."""
  reads, _, function = stretch(jaxpr, [equation])

  def run(*args: Any) -> list[Any]:
    pairs = zip(equation.invars, args, strict=True)
    values = {atom: arg for atom, arg in pairs if not isinstance(atom, jex.Literal)}
    outs = iter(function(*(values[atom] for atom in reads)))
    dropped = lambda var: isinstance(var, jex.DropVar)
    return [jnp.zeros(()) if dropped(var) else next(outs) for var in equation.outvars]

  return run


def bind(equation: Any) -> Callable[..., list[Any]]:
  """Evaluate a rearranging equation on arrays of another dtype than it was traced with."""

  def rearrange(*args: Any) -> list[Any]:
    outs = equation.primitive.bind(*args, **equation.params)
    return list(outs) if equation.primitive.multiple_results else [outs]

  return rearrange


def without_jits(jaxpr: Any, consts: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
  """The same jaxpr with the equations of inner jits in their place."""
  if not any(equation.primitive.name in _JIT for equation in jaxpr.eqns):
    return jaxpr, consts

  def run(jaxpr: Any, consts: Sequence[Any], *args: Any) -> list[Any]:
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    read = lambda atom: atom.val if isinstance(atom, jex.Literal) else env[atom]
    is_jit = lambda equation: equation.primitive.name in _JIT
    for inlined, equations in itertools.groupby(jaxpr.eqns, is_jit):
      if inlined:
        for equation in equations:
          inner = equation.params["jaxpr"]
          outs = run(inner.jaxpr, inner.consts, *map(read, equation.invars))
          env.update(zip(equation.outvars, outs, strict=True))
      else:
        reads, writes, run_them = stretch(jaxpr, list(equations))
        env.update(zip(writes, run_them(*map(read, reads)), strict=True))
    return [read(atom) for atom in jaxpr.outvars]

  flat = jax.make_jaxpr(partial(run, jaxpr, consts))(*(var.aval for var in jaxpr.invars))
  return flat.jaxpr, flat.consts
