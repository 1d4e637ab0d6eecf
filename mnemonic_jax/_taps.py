"""The engine of `diagonal_fisher`: squared per-example gradients out of one batched backward pass.

The function of one example is traced, and its equations are evaluated on the whole batch, one by one, with params taken
out of ordinary differentiation: where a param meets data, an operation of `_contractions` puts sum_n w_n (d / d param)^2
into the cotangent of a dummy. One backward pass to the dummies is the Fisher.

A param goes one of two ways, and both are exact.
  contracted: it reaches one product, convolution or lookup with data, once, through operations that only rearrange or
    scale it. There the operation's input and its output's cotangent become the sum of squares.
  per example: any other use (broadcast, used twice, tied, normalised, inside a custom rule). Each example gets a copy of
    its own, and the copy's cotangent is that example's gradient.
In the body of a scan over layers the slice of a stacked param goes its own way in each iteration; in remat and cond too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from mnemonic_jax import _contractions
from mnemonic_jax._contractions import Groups


class Param(NamedTuple):
  """A param, or a rearrangement of some."""

  value: Any  # (*shape)
  squares: Any  # (G, *shape), the dummy


class Data(NamedTuple):
  """A value that differs between examples."""

  value: Any  # (N, *shape)


class Use(NamedTuple):
  """How an equation uses leaves, for one example."""

  leaves: frozenset[int]
  rule: str  # "product", "convolution", "lookup" or "per example"
  reason: str  # why it is not contracted; empty where it is
  flops: int  # of the gradient (of its operation, for "per example" of the square alone) and its square
  bytes: int  # of gradient that is held


# Of an atom in a plan: "data", "const" (the same for all examples), or the params that it rearranges.
_Kind = str | frozenset[int]

# Each element of the result is one element of an operand, and none is there twice.
_REARRANGING = frozenset(
  {"reshape", "transpose", "squeeze", "expand_dims", "rev", "slice", "split", "concatenate", "copy", "copy_p"}
)
# These are the identity to a squared gradient; the dummies keep their own sign, precision and placement.
_IDENTITIES = frozenset({"neg", "convert_element_type", "reduce_precision", "sharding_constraint", "layout_constraint"})
# Factors beyond these, or not known while tracing, could take squares out of range that the gradient itself is in.
_SMALLEST_FACTOR, _LARGEST_FACTOR = 2.0**-16, 2.0**16
_STATE_EFFECTS = ("ReadEffect", "WriteEffect", "AccumEffect")
_JIT = ("jit", "pjit")
_REMAT = ("remat2", "remat", "checkpoint")

_CONTRACTIONS = {
  "product": _contractions.dot_general,
  "convolution": _contractions.convolution,
  "lookup": _contractions.lookup,
}


def squared_gradients(
  function: Callable[[Any, Any], Any],
  cotangents: Callable[[jax.Array], tuple[jax.Array, Any]],
  leaves: Sequence[jax.Array],
  examples: Any,
  weights: jax.Array,
  *,
  disjoint: bool = False,
) -> tuple[list[jax.Array], Any]:
  """Per leaf, sum_n w_n (d function_n / d leaf . cotangent_n)^2, (G, *leaf.shape), and what `cotangents` says.

  Args:
    function: (leaves, example) -> an array, of one example.
    cotangents: the function's values (N, ...) -> (the cotangents (N, ...) to pull back, anything); ones for a loss.
    leaves: floating arrays.
    examples: a tree of arrays with leading axis N.
    weights: (G, N).
    disjoint: whether each example has a weight in one group at most; contractions are then done once per example.
  """
  one = jax.tree.map(lambda x: jax.eval_shape(lambda x: x[0], x), examples)
  closed = jax.make_jaxpr(function)(list(leaves), one)
  groups = Groups.make(weights, disjoint)

  def outputs(dummies: list[jax.Array]) -> jax.Array:
    args = [*map(Param, leaves, dummies), *map(Data, jax.tree.leaves(examples))]
    (out,) = _evaluate(closed.jaxpr, closed.consts, groups, args)
    return _batched(out, groups)

  values, pull_back = jax.vjp(outputs, [_contractions.dummy(leaf, groups.weights) for leaf in leaves])
  pulled, aux = cotangents(values)
  return pull_back(pulled)[0], aux


def survey(jaxpr: Any, consts: Sequence[Any], operands: Sequence[_Kind]) -> list[Use]:
  """How each leaf is used by the jaxpr of one example, whose inputs are "data", "const", or the leaves they are."""
  jaxpr, _ = _without_jits(jaxpr, consts)
  reasons = plan(jaxpr, ["param" if isinstance(kind, frozenset) else kind for kind in operands])
  env: dict[Any, _Kind] = dict.fromkeys(jaxpr.constvars, "const")
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
    out: _Kind = "data" if params or "data" in kinds else "const"
    if params and name == "stop_gradient":
      out = "const"
    elif params and _keeps_elements(equation, kinds):
      out = params
    elif params and name in ("scan", "cond", *_REMAT):
      found += _survey_inner(equation, kinds)
    elif params:
      index = next(i for i, kind in enumerate(kinds) if isinstance(kind, frozenset))
      rule, _, positions = _rule(equation, index)
      size = math.prod(equation.invars[index].aval.shape)
      held = 0 if positions == 1 else size * _wide_bytes(equation.invars[index])
      found.append(Use(params, rule, "", 2 * size * (positions + 1), held))
    env.update(dict.fromkeys(equation.outvars, out))
  return found


def _survey_inner(equation: Any, kinds: list[_Kind]) -> list[Use]:
  """The uses in the body of a scan (for all its iterations), a remat or the branches of a cond."""
  params = equation.params
  if equation.primitive.name == "scan":
    carry = slice(params["num_consts"], params["num_consts"] + params["num_carry"])
    kinds[carry] = ["data"] * params["num_carry"]
    again = lambda use: use._replace(flops=use.flops * params["length"])
    return list(map(again, survey(params["jaxpr"].jaxpr, params["jaxpr"].consts, kinds)))
  if equation.primitive.name == "cond":
    return [use for branch in params["branches"] for use in survey(branch.jaxpr, branch.consts, kinds[1:])]
  inner = params["jaxpr"]
  return survey(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), kinds)


def _wide_bytes(atom: Any) -> int:
  return max(4, atom.aval.dtype.itemsize)


def activation_bytes(jaxpr: Any) -> int:
  """Bytes of all values that a jaxpr computes, about what its backward pass finds in memory."""
  total = 0
  for equation in jaxpr.eqns:
    inner = [x for value in equation.params.values() for x in (value if isinstance(value, tuple) else (value,))]
    inner = [getattr(x, "jaxpr", x) for x in inner]
    inside = max((activation_bytes(x) for x in inner if hasattr(x, "eqns")), default=0)
    if equation.primitive.name in _REMAT:  # computed again when it is needed
      inside = 0
    total += inside * equation.params.get("length", 1) if equation.primitive.name == "scan" else inside
    shaped: list[Any] = [var.aval for var in equation.outvars if hasattr(var.aval, "shape")]
    total += sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in shaped)
  return total


def plan(jaxpr: Any, kinds: Sequence[str]) -> dict[int, str]:
  """Index of each param input (kind "param") that every example must have its own copy of, and why."""
  if _mutates(jaxpr):
    return {index: "used beside mutable arrays" for index, kind in enumerate(kinds) if kind == "param"}
  copied: dict[int, str] = {}
  while more := _conflicts(jaxpr, kinds, copied):  # a copied param is data, which may free or bind others
    copied.update(more)
  return copied


def _mutates(jaxpr: Any) -> bool:
  """Whether it reads or writes mutable arrays, whose equations cannot be taken one by one."""
  return any(type(effect).__name__ in _STATE_EFFECTS for equation in jaxpr.eqns for effect in equation.effects)


def _conflicts(jaxpr: Any, kinds: Sequence[str], copied: dict[int, str]) -> dict[int, str]:
  """The params that cannot be contracted if those in `copied` are not."""
  env: dict[Any, _Kind] = dict.fromkeys(jaxpr.constvars, "const")
  for index, (var, kind) in enumerate(zip(jaxpr.invars, kinds, strict=True)):
    env[var] = kind if kind != "param" else "data" if index in copied else frozenset([index])
  windows: dict[Any, list[Any]] = {}
  found: dict[int, str] = {}

  def look(atom: Any) -> _Kind:
    return "const" if isinstance(atom, jex.Literal) else env[atom]

  def blame(params: _Kind, why: str) -> None:
    for param in params if isinstance(params, frozenset) else ():
      found.setdefault(param, why)

  for equation in jaxpr.eqns:
    operands = [look(atom) for atom in equation.invars]
    params = _params_of(operands)
    out: _Kind = "data" if params or "data" in operands else "const"
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


def _keeps_elements(equation: Any, operands: Sequence[_Kind]) -> bool:
  """Whether each element of the result is one element of a param, possibly times a constant, and none is there twice."""
  name = equation.primitive.name
  if name == "broadcast_in_dim":
    return math.prod(equation.params["shape"]) == math.prod(equation.invars[0].aval.shape)
  if name in _IDENTITIES:
    return bool(jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating))
  if name in ("mul", "div"):
    factor = equation.invars[0 if name == "mul" and isinstance(operands[1], frozenset) else 1]
    moderate = isinstance(factor, jex.Literal) and _SMALLEST_FACTOR <= abs(factor.val) <= _LARGEST_FACTOR
    return moderate and jnp.shape(factor.val) == ()
  return name in _REARRANGING and all(isinstance(kind, frozenset) for kind in operands)


def _objection(equation: Any, operands: Sequence[_Kind]) -> tuple[_Kind, str]:
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
  if name in _REMAT or (name == "cond" and operands[0] == "const"):
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


def _params_of(operands: Iterable[_Kind]) -> frozenset[int]:
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


def _evaluate(jaxpr: Any, consts: Sequence[Any], groups: Groups, args: Sequence[Any]) -> list[Any]:
  """Evaluate the jaxpr of one example on all: args and results are Param, Data, or plain where all examples agree."""
  jaxpr, consts = _without_jits(jaxpr, consts)
  reasons = plan(jaxpr, [_kind(arg) for arg in args])
  env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
  for index, (var, arg) in enumerate(zip(jaxpr.invars, args, strict=True)):
    if index in reasons:
      arg = Data(_contractions.copies(arg.value, arg.squares, groups))
    env[var] = arg
  if _mutates(jaxpr):
    return _on_batch(jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, consts)), [env[var] for var in jaxpr.invars])
  read = lambda atom: atom.val if isinstance(atom, jex.Literal) else env[atom]
  for equation in jaxpr.eqns:
    outs = _evaluate_equation(jaxpr, equation, [read(atom) for atom in equation.invars], groups)
    env.update(zip(equation.outvars, outs, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _kind(value: Any) -> str:
  return "param" if isinstance(value, Param) else "data" if isinstance(value, Data) else "const"


def _evaluate_equation(jaxpr: Any, equation: Any, args: list[Any], groups: Groups) -> list[Any]:
  name, run = equation.primitive.name, _runner(jaxpr, equation)
  params = [arg for arg in args if isinstance(arg, Param)]
  if not params or name == "stop_gradient":
    return _on_batch(run, args)
  if name in _IDENTITIES:
    return [params[0]._replace(value=run(params[0].value)[0])]
  if name in _REARRANGING or name == "broadcast_in_dim":
    squares = jax.vmap(_bind(equation))(*(param.squares for param in params))
    values = run(*(param.value for param in params))
    return list(map(Param, values, squares))
  if name in ("mul", "div") and len(params) == 1 and not any(isinstance(arg, Data) for arg in args):
    (value,) = run(*(arg.value if isinstance(arg, Param) else arg for arg in args))
    factor = float(next(arg for arg in args if not isinstance(arg, Param))) ** 2
    return [Param(value, params[0].squares * (factor if name == "mul" else 1 / factor))]
  if name == "scan":
    return _evaluate_scan(equation, args, groups)
  if name == "cond":
    branches = [partial(_evaluate_all, branch.jaxpr, branch.consts) for branch in equation.params["branches"]]
    return list(map(Data, jax.lax.switch(args[0], branches, groups, *args[1:])))
  if name in _REMAT:
    inner = equation.params["jaxpr"]
    again = partial(_evaluate_all, getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()))
    settings = {key: equation.params[key] for key in ("prevent_cse", "policy")}
    return list(map(Data, jax.checkpoint(again, **settings)(groups, *args)))
  return [_contracted(equation, run, args, groups)]


def _contracted(equation: Any, run: Callable[..., Any], args: list[Any], groups: Groups) -> Data:
  """The one operation on a param and data, with its tap."""
  index = next(index for index, arg in enumerate(args) if isinstance(arg, Param))
  param, data = args[index], args[1 - index].value
  (output,) = _on_batch(run, args)
  rule, settings, _ = _rule(equation, index)
  shape = param.value.shape
  if 0 in (data.size, output.value.size, *shape):
    return output  # without a tap, the dummy's cotangent is zero
  if rule == "lookup":
    data = data.reshape(len(data), -1).astype(jnp.int32)
    if equation.params["mode"] == jax.lax.GatherScatterMode.CLIP:
      data = jnp.clip(data, 0, shape[0] - 1)
  contract = lambda data, g, groups: _CONTRACTIONS[rule](data, g, groups, shape, *settings)
  return Data(_contractions.tap(contract, output.value, data, param.squares, groups))


def _rule(equation: Any, index: int) -> tuple[str, tuple[Any, ...], int]:
  """The contraction for an equation whose operand `index` is a param, its settings, and its positions per example."""
  params, name = equation.params, equation.primitive.name
  if name == "gather":
    return "lookup", (), 1
  if name == "conv_general_dilated":
    geometry = _contractions.ConvGeometry.of(equation)
    batch, _, *spatial = (equation.outvars[0].aval.shape[i] for i in geometry.numbers.out_spec)
    return "convolution", (geometry,), math.prod((batch, *spatial))
  numbers = params["dimension_numbers"]
  data, other = equation.invars[1 - index].aval.shape, 1 - index
  summed = math.prod(data[i] for i in (*numbers[0][other], *numbers[1][other]))
  return "product", (numbers, index == 0, params["precision"]), math.prod(data) // max(summed, 1)


def _evaluate_all(jaxpr: Any, consts: Sequence[Any], groups: Groups, *args: Any) -> list[jax.Array]:
  """As `_evaluate`, every result with its batch axis."""
  return [_batched(out, groups) for out in _evaluate(jaxpr, consts, groups, args)]


def _evaluate_scan(equation: Any, args: list[Any], groups: Groups) -> list[Any]:
  """A scan whose stacked params are scanned with their dummies; every carry has a batch axis."""
  params = equation.params
  inner, num_consts, num_carry = params["jaxpr"], params["num_consts"], params["num_carry"]
  consts, carry, xs = args[:num_consts], args[num_consts : num_consts + num_carry], args[num_consts + num_carry :]

  def scanned_axis_first(x: Any) -> Any:
    if isinstance(x, Param):
      return x._replace(squares=jnp.moveaxis(x.squares, 1, 0))
    return Data(jnp.moveaxis(x.value, 1, 0)) if isinstance(x, Data) else x

  def body(carry: list[jax.Array], x: list[Any]) -> tuple[list[jax.Array], list[jax.Array]]:
    outs = _evaluate_all(inner.jaxpr, inner.consts, groups, *consts, *map(Data, carry), *x)
    return outs[:num_carry], outs[num_carry:]

  settings = {name: params[name] for name in ("length", "reverse", "unroll")}
  start = [_batched(value, groups) for value in carry]
  end, stacked = jax.lax.scan(body, start, [scanned_axis_first(x) for x in xs], **settings)
  return [*map(Data, end), *(Data(jnp.moveaxis(y, 0, 1)) for y in stacked)]


def _on_batch(run: Callable[..., list[Any]], args: Sequence[Any]) -> list[Any]:
  """Evaluate an equation of one example on all of them; params count as constants."""
  values = [arg.value if isinstance(arg, (Data, Param)) else arg for arg in args]
  axes = tuple(0 if isinstance(arg, Data) else None for arg in args)
  return [Data(out) for out in jax.vmap(run, axes)(*values)] if 0 in axes else run(*values)


def _batched(value: Any, groups: Groups) -> jax.Array:
  """With a batch axis, whatever it was."""
  return (
    value.value if isinstance(value, Data) else jnp.broadcast_to(value, (groups.weights.shape[1], *jnp.shape(value)))
  )


def _runner(jaxpr: Any, equation: Any) -> Callable[..., list[Any]]:
  """Evaluate one equation, through the public evaluation of a jaxpr that holds nothing else."""
  atoms = list(dict.fromkeys(atom for atom in equation.invars if not isinstance(atom, jex.Literal)))
  kept = [var for var in equation.outvars if not isinstance(var, jex.DropVar)]
  alone = jaxpr.replace(constvars=[], invars=atoms, outvars=kept, eqns=[equation], effects=equation.effects)
  function = jex.jaxpr_as_fun(jex.ClosedJaxpr(alone, ()))

  def run(*args: Any) -> list[Any]:
    values = {atom: arg for atom, arg in zip(equation.invars, args, strict=True) if not isinstance(atom, jex.Literal)}
    outs = iter(function(*(values[atom] for atom in atoms)))
    return [jnp.zeros(()) if isinstance(var, jex.DropVar) else next(outs) for var in equation.outvars]

  return run


def _bind(equation: Any) -> Callable[..., list[Any]]:
  """Evaluate a rearranging equation on arrays of another dtype than it was traced with."""

  def rearrange(*args: Any) -> list[Any]:
    outs = equation.primitive.bind(*args, **equation.params)
    return list(outs) if equation.primitive.multiple_results else [outs]

  return rearrange


def _without_jits(jaxpr: Any, consts: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
  """The same jaxpr with the equations of inner jits in their place."""
  if not any(equation.primitive.name in _JIT for equation in jaxpr.eqns):
    return jaxpr, consts

  def run(jaxpr: Any, consts: Sequence[Any], *args: Any) -> list[Any]:
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    read = lambda atom: atom.val if isinstance(atom, jex.Literal) else env[atom]
    for equation in jaxpr.eqns:
      values = [read(atom) for atom in equation.invars]
      inner = equation.params["jaxpr"] if equation.primitive.name in _JIT else None
      outs = _runner(jaxpr, equation)(*values) if inner is None else run(inner.jaxpr, inner.consts, *values)
      env.update(zip(equation.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]

  flat = jax.make_jaxpr(partial(run, jaxpr, consts))(*(var.aval for var in jaxpr.invars))
  return flat.jaxpr, flat.consts
