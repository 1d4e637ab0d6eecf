"""Where the jaxpr of one example uses its params, and which of them every example must have its own copy of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from mnemonic_jax.fisher import contractions

# Of an atom in a plan: "data", "const" (the same for all examples), or the params that it rearranges.
Kind = str | frozenset[int]
# Each element of the result is one element of an operand, and none is there twice.
REARRANGING = frozenset(
  {
    "reshape",
    "transpose",
    "squeeze",
    "expand_dims",
    "rev",
    "slice",
    "split",
    "concatenate",
    "copy",
    "copy_p",
  }
)
# These are the identity to a squared gradient; the dummies keep their own sign, precision and placement.
IDENTITIES = frozenset(
  {"neg", "convert_element_type", "reduce_precision", "sharding_constraint", "layout_constraint"}
)
# Factors beyond these, or not known while tracing, could take squares out of range that the gradient itself is in.
_SMALLEST_FACTOR, _LARGEST_FACTOR = 2.0**-16, 2.0**16
_STATE_EFFECTS = ("ReadEffect", "WriteEffect", "AccumEffect")
_JIT = ("jit", "pjit")
REMAT = ("remat2", "remat", "checkpoint")


class Use(NamedTuple):
  """How an equation uses leaves, for one example."""

  leaves: frozenset[int]
  rule: str  # "product", "convolution", "lookup" or "per example"
  reason: str  # why it is not contracted; empty where it is
  flops: (
    int  # of the gradient (of its operation, for "per example" of the square alone) and its square
  )
  bytes: int  # of gradient that is held


def plan(jaxpr: Any, kinds: Sequence[str]) -> dict[int, str]:
  """Index of each param input (kind "param") that every example must have its own copy of, and why."""
  if mutates(jaxpr):
    return {
      index: "used beside mutable arrays" for index, kind in enumerate(kinds) if kind == "param"
    }
  copied: dict[int, str] = {}
  while more := _conflicts(
    jaxpr, kinds, copied
  ):  # a copied param is data, which may free or bind others
    copied.update(more)
  return copied


def _conflicts(jaxpr: Any, kinds: Sequence[str], copied: dict[int, str]) -> dict[int, str]:
  """The params that cannot be contracted if those in `copied` are not."""
  env: dict[Any, Kind] = dict.fromkeys(jaxpr.constvars, "const")
  for index, (var, kind) in enumerate(zip(jaxpr.invars, kinds, strict=True)):
    env[var] = kind if kind != "param" else "data" if index in copied else frozenset([index])
  windows: dict[Any, list[Any]] = {}
  found: dict[int, str] = {}

  def look(atom: Any) -> Kind:
    return "const" if isinstance(atom, jex.Literal) else env[atom]

  def blame(params: Kind, why: str) -> None:
    for param in params if isinstance(params, frozenset) else ():
      found.setdefault(param, why)

  for equation in jaxpr.eqns:
    operands = [look(atom) for atom in equation.invars]
    params = _params_of(operands)
    out: Kind = "data" if params or "data" in operands else "const"
    if params and equation.primitive.name == "stop_gradient":
      env.update(dict.fromkeys(equation.outvars, "const"))
      continue
    if params:
      if _keeps_elements(equation, operands):
        out = params
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


def _keeps_elements(equation: Any, operands: Sequence[Kind]) -> bool:
  """Whether each element of the result is one element of a param, possibly times a constant, and none is there twice."""
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
  """The params that this equation cannot take as they are, and why; none if it can take all."""
  name = equation.primitive.name
  params = [index for index, kind in enumerate(operands) if isinstance(kind, frozenset)]
  everything = _params_of(operands)
  if name == "dot_general":
    fits = len(params) == 1 and operands[1 - params[0]] == "data"
    return ("const", "") if fits else (everything, "multiplied with no data")
  if name == "conv_general_dilated":
    fits = params == [1] and operands[0] == "data" and equation.params["batch_group_count"] == 1
    return ("const", "") if fits else (everything, "convolved in an unusual way")
  if name == "gather":
    fits = params == [0] and operands[1] == "data" and _takes_rows(equation)
    return ("const", "") if fits else (everything, "gathered from in an unusual way")
  if name == "scan":
    shared = equation.params["num_consts"] + equation.params["num_carry"]
    return _params_of(operands[:shared]), "shared by the iterations of a scan"
  if name in REMAT or (name == "cond" and operands[0] == "const"):
    return "const", ""
  return everything, f"used in {name}"


def _takes_rows(equation: Any) -> bool:
  """Whether a gather takes whole rows of its operand, as an embedding does."""
  numbers, table = equation.params["dimension_numbers"], equation.invars[0].aval
  rank = equation.outvars[0].aval.ndim
  return (
    tuple(equation.params["slice_sizes"]) == (1, *table.shape[1:])
    and tuple(numbers.collapsed_slice_dims) == tuple(numbers.start_index_map) == (0,)
    and tuple(numbers.offset_dims) == tuple(range(rank - table.ndim + 1, rank))
  )


def _params_of(operands: Iterable[Kind]) -> frozenset[int]:
  return frozenset(param for kind in operands if isinstance(kind, frozenset) for param in kind)


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


def mutates(jaxpr: Any) -> bool:
  """Whether it reads or writes mutable arrays, whose equations cannot be taken one by one."""
  return any(
    type(effect).__name__ in _STATE_EFFECTS
    for equation in jaxpr.eqns
    for effect in equation.effects
  )


def rule_of(equation: Any, index: int) -> tuple[str, tuple[Any, ...], int]:
  """The contraction for an equation whose operand `index` is a param, its settings, and its positions per example."""
  params, name = equation.params, equation.primitive.name
  if name == "gather":
    return "lookup", (), 1
  if name == "conv_general_dilated":
    geometry = contractions.ConvGeometry.of(equation)
    batch, _, *spatial = (equation.outvars[0].aval.shape[i] for i in geometry.numbers.out_spec)
    return "convolution", (geometry,), math.prod((batch, *spatial))
  numbers = params["dimension_numbers"]
  data, other = equation.invars[1 - index].aval.shape, 1 - index
  summed = math.prod(data[i] for i in (*numbers[0][other], *numbers[1][other]))
  return "product", (numbers, index == 0, params["precision"]), math.prod(data) // max(summed, 1)


def survey(jaxpr: Any, consts: Sequence[Any], operands: Sequence[Kind]) -> list[Use]:
  """How each leaf is used by the jaxpr of one example, whose inputs are "data", "const", or the leaves they are."""
  jaxpr, _ = without_jits(jaxpr, consts)
  reasons = plan(jaxpr, ["param" if isinstance(kind, frozenset) else kind for kind in operands])
  env: dict[Any, Kind] = dict.fromkeys(jaxpr.constvars, "const")
  found = []
  for index, (var, kind) in enumerate(zip(jaxpr.invars, operands, strict=True)):
    if index in reasons and isinstance(kind, frozenset):
      size = math.prod(var.aval.shape)
      found.append(Use(kind, "per example", reasons[index], 2 * size, size * _wide_bytes(var)))
      kind = "data"
    env[var] = kind
  for equation in jaxpr.eqns:
    kinds = ["const" if isinstance(atom, jex.Literal) else env[atom] for atom in equation.invars]
    params, name = _params_of(kinds), equation.primitive.name
    out: Kind = "data" if params or "data" in kinds else "const"
    if params and name == "stop_gradient":
      out = "const"
    elif params and _keeps_elements(equation, kinds):
      out = params
    elif params and name in ("scan", "cond", *REMAT):
      found += _survey_inner(equation, kinds)
    elif params:
      index = next(i for i, kind in enumerate(kinds) if isinstance(kind, frozenset))
      rule, _, positions = rule_of(equation, index)
      size = math.prod(equation.invars[index].aval.shape)
      held = 0 if positions == 1 else size * _wide_bytes(equation.invars[index])
      found.append(Use(params, rule, "", 2 * size * (positions + 1), held))
    env.update(dict.fromkeys(equation.outvars, out))
  return found


def _survey_inner(equation: Any, kinds: list[Kind]) -> list[Use]:
  """The uses in the body of a scan (for all its iterations), a remat or the branches of a cond."""
  params = equation.params
  if equation.primitive.name == "scan":
    carry = slice(params["num_consts"], params["num_consts"] + params["num_carry"])
    kinds[carry] = ["data"] * params["num_carry"]
    again = lambda use: use._replace(flops=use.flops * params["length"])
    return list(map(again, survey(params["jaxpr"].jaxpr, params["jaxpr"].consts, kinds)))
  if equation.primitive.name == "cond":
    return [
      use for branch in params["branches"] for use in survey(branch.jaxpr, branch.consts, kinds[1:])
    ]
  inner = params["jaxpr"]
  return survey(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), kinds)


def _wide_bytes(atom: Any) -> int:
  return max(4, atom.aval.dtype.itemsize)


def activation_bytes(jaxpr: Any) -> int:
  """Bytes of all values that a jaxpr computes, about what its backward pass finds in memory."""
  total = 0
  for equation in jaxpr.eqns:
    inner = [
      x
      for value in equation.params.values()
      for x in (value if isinstance(value, tuple) else (value,))
    ]
    inner = [getattr(x, "jaxpr", x) for x in inner]
    inside = max((activation_bytes(x) for x in inner if hasattr(x, "eqns")), default=0)
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
  kept = [
    var for equation in equations for var in equation.outvars if not isinstance(var, jex.DropVar)
  ]
  written = set(kept)
  atoms = (
    atom for equation in equations for atom in equation.invars if not isinstance(atom, jex.Literal)
  )
  reads = list(dict.fromkeys(atom for atom in atoms if atom not in written))
  effects = frozenset().union(*(equation.effects for equation in equations))
  alone = jaxpr.replace(
    constvars=[], invars=reads, outvars=kept, eqns=list(equations), effects=effects
  )
  return Stretch(reads, kept, jex.jaxpr_as_fun(jex.ClosedJaxpr(alone, ())))


def without_jits(jaxpr: Any, consts: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
  """The same jaxpr with the equations of inner jits in their place."""
  if not any(equation.primitive.name in _JIT for equation in jaxpr.eqns):
    return jaxpr, consts

  def run(jaxpr: Any, consts: Sequence[Any], *args: Any) -> list[Any]:
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    read = lambda atom: atom.val if isinstance(atom, jex.Literal) else env[atom]
    for is_jit, equations in itertools.groupby(
      jaxpr.eqns, lambda equation: equation.primitive.name in _JIT
    ):
      if is_jit:
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
