"""The engine of `diagonal_fisher`: squared per-example gradients out of one batched backward pass.

The function of one example is traced, and its equations are evaluated on the whole batch with params taken
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

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from mnemonic_jax import _mesh
from mnemonic_jax.fisher import contractions, uses
from mnemonic_jax.fisher.contractions import Groups


class Param(NamedTuple):
  """A param, or a rearrangement of some."""

  value: Any  # (*shape)
  squares: Any  # (G, *shape), the dummy


class Data(NamedTuple):
  """A value that differs between examples."""

  value: Any  # (N, *shape)


_CONTRACTIONS = {
  "product": contractions.dot_general,
  "convolution": contractions.convolution,
  "lookup": contractions.lookup,
}


def squared_gradients(
  function: Callable[[Any, Any], Any],
  cotangents: Callable[[jax.Array], tuple[jax.Array, Any]],
  leaves: Sequence[jax.Array],
  examples: Any,
  weights: jax.Array,
  *,
  disjoint: bool = False,
  platform: str | None = None,
  spread: _mesh.Spread | None = None,
) -> tuple[list[jax.Array], Any]:
  """Per leaf, sum_n w_n (d function_n / d leaf . cotangent_n)^2, (G, *leaf.shape), and what `cotangents` says.

  Args:
    function: (leaves, example) -> an array, of one example.
    cotangents: the function's values (N, ...) -> (the cotangents (N, ...) to pull back, anything); ones for a loss.
    leaves: floating arrays.
    examples: a tree of arrays with leading axis N.
    weights: (G, N).
    disjoint: whether each example has a weight in one group at most; contractions are then done once per example.
    platform: where it will run, if that is known.
    spread: how examples and sums lie on a mesh.
  """
  one = jax.tree.map(lambda x: jax.eval_shape(lambda x: x[0], x), examples)
  closed = jax.make_jaxpr(function)(list(leaves), one)
  groups = Groups.make(weights, disjoint, platform, spread)
  dummies = [contractions.dummy(leaf, weights) for leaf in leaves]

  def outputs(dummies: list[jax.Array]) -> jax.Array:
    args = [*map(Param, leaves, dummies), *map(Data, jax.tree.leaves(examples))]
    (out,) = _evaluate(closed.jaxpr, closed.consts, groups, args)
    return _batched(out, groups)

  values, pull_back = jax.vjp(outputs, dummies)
  pulled, aux = cotangents(values)
  return pull_back(pulled)[0], aux


def _evaluate(jaxpr: Any, consts: Sequence[Any], groups: Groups, args: Sequence[Any]) -> list[Any]:
  """Evaluate the jaxpr of one example on all: args and results are Param, Data, or plain where all examples agree."""
  jaxpr, consts = uses.without_jits(jaxpr, consts)
  reasons = uses.plan(jaxpr, [_kind(arg) for arg in args])
  env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
  for index, (var, arg) in enumerate(zip(jaxpr.invars, args, strict=True)):
    if index in reasons:
      arg = Data(contractions.copies(arg.value, arg.squares, groups))
    env[var] = arg
  if uses.mutates(jaxpr):
    return _on_batch(
      jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, consts)), [env[var] for var in jaxpr.invars]
    )
  read = lambda atom: atom.val if isinstance(atom, jex.Literal) else env[atom]
  waiting: list[Any] = []  # equations of data alone, which are mapped over the examples together

  def catch_up() -> None:
    if waiting:
      reads, writes, run = uses.stretch(jaxpr, waiting)
      env.update(zip(writes, _on_batch(run, [env[var] for var in reads]), strict=True))
      waiting.clear()

  for equation in jaxpr.eqns:
    kinds = {
      _kind(env[atom]) if atom in env else "data"
      for atom in equation.invars
      if not isinstance(atom, jex.Literal)
    }
    if "data" in kinds and "param" not in kinds:
      waiting.append(equation)
      continue
    if "data" in kinds:
      catch_up()
    outs = _evaluate_equation(jaxpr, equation, [read(atom) for atom in equation.invars], groups)
    env.update(zip(equation.outvars, outs, strict=True))
  catch_up()
  return [read(atom) for atom in jaxpr.outvars]


def _kind(value: Any) -> str:
  return "param" if isinstance(value, Param) else "data" if isinstance(value, Data) else "const"


def _evaluate_equation(jaxpr: Any, equation: Any, args: list[Any], groups: Groups) -> list[Any]:
  name, run = equation.primitive.name, _runner(jaxpr, equation)
  params = [arg for arg in args if isinstance(arg, Param)]
  if not params or name == "stop_gradient":
    return _on_batch(run, args)
  if name in uses.IDENTITIES:
    return [params[0]._replace(value=run(params[0].value)[0])]
  if name in uses.REARRANGING or name == "broadcast_in_dim":
    wide = max((param.squares.dtype for param in params), key=lambda dtype: dtype.itemsize)
    squares = jax.vmap(_bind(equation))(*(param.squares.astype(wide) for param in params))
    values = run(*(param.value for param in params))
    return list(map(Param, values, squares))
  if name in ("mul", "div") and len(params) == 1 and not any(isinstance(arg, Data) for arg in args):
    (value,) = run(*(arg.value if isinstance(arg, Param) else arg for arg in args))
    factor = float(next(arg for arg in args if not isinstance(arg, Param))) ** 2
    return [Param(value, params[0].squares * (factor if name == "mul" else 1 / factor))]
  if name == "scan":
    return _evaluate_scan(equation, args, groups)
  if name == "cond":
    branches = [
      partial(_evaluate_all, branch.jaxpr, branch.consts) for branch in equation.params["branches"]
    ]
    return list(map(Data, jax.lax.switch(args[0], branches, groups, *args[1:])))
  if name in uses.REMAT:
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
  rule, settings, _ = uses.rule_of(equation, index)
  shape = param.value.shape
  if 0 in (data.size, output.value.size, *shape):
    return output  # without a tap, the dummy's cotangent is zero
  if rule == "lookup":
    data = data.reshape(len(data), -1)
    clipped = jnp.clip(data, 0, min(shape[0] - 1, int(jnp.iinfo(data.dtype).max)))
    if equation.params["mode"] != jax.lax.GatherScatterMode.CLIP:  # a row that is not there
      clipped = jnp.where(data == clipped, clipped.astype(jnp.int32), shape[0])
    data = clipped.astype(jnp.int32)
  contract = lambda data, g, groups: _CONTRACTIONS[rule](data, g, groups, shape, *settings)
  summed = partial(contractions.summed, contract, param.squares.shape)
  return Data(contractions.tap(summed, output.value, data, param.squares, groups))


def _evaluate_all(jaxpr: Any, consts: Sequence[Any], groups: Groups, *args: Any) -> list[jax.Array]:
  """As `_evaluate`, every result with its batch axis."""
  return [_batched(out, groups) for out in _evaluate(jaxpr, consts, groups, args)]


def _evaluate_scan(equation: Any, args: list[Any], groups: Groups) -> list[Any]:
  """A scan whose stacked params are scanned with their dummies; every carry has a batch axis."""
  params = equation.params
  inner, num_consts, num_carry = params["jaxpr"], params["num_consts"], params["num_carry"]
  consts, carry, xs = (
    args[:num_consts],
    args[num_consts : num_consts + num_carry],
    args[num_consts + num_carry :],
  )

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
    value.value
    if isinstance(value, Data)
    else jnp.broadcast_to(value, (groups.weights.shape[1], *jnp.shape(value)))
  )


def _runner(jaxpr: Any, equation: Any) -> Callable[..., list[Any]]:
  """Evaluate one equation on values of all its operands, literals among them."""
  reads, _, function = uses.stretch(jaxpr, [equation])

  def run(*args: Any) -> list[Any]:
    values = {
      atom: arg
      for atom, arg in zip(equation.invars, args, strict=True)
      if not isinstance(atom, jex.Literal)
    }
    outs = iter(function(*(values[atom] for atom in reads)))
    return [
      jnp.zeros(()) if isinstance(var, jex.DropVar) else next(outs) for var in equation.outvars
    ]

  return run


def _bind(equation: Any) -> Callable[..., list[Any]]:
  """Evaluate a rearranging equation on arrays of another dtype than it was traced with."""

  def rearrange(*args: Any) -> list[Any]:
    outs = equation.primitive.bind(*args, **equation.params)
    return list(outs) if equation.primitive.multiple_results else [outs]

  return rearrange
