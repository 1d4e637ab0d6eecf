"""The engine: squared per-example gradients out of one batched backward pass.

The function of one example is traced, and its equations are evaluated on the whole batch with the
leaves of params taken out of ordinary differentiation: where a leaf meets data, a tap of `sums` puts
sum_n w_n (d / d leaf)^2 into the cotangent of a dummy. One backward pass to the dummies is the Fisher.

A leaf goes one of two ways, and both are exact.
  contracted: it reaches one product, convolution or lookup with data, once, through operations that
    only rearrange or scale it. There the operation's input and its output's cotangent become the
    sum of squares.
  per example: any other use (broadcast, used twice, normalised, inside a custom rule). Each example
    gets a copy of its own, and the copy's cotangent is that example's gradient.
In the body of a scan over layers the slice of a stacked leaf goes its own way in each iteration; in
remat and cond too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from mnemonic_jax import _mesh
from mnemonic_jax.fisher import per_example, sums
from mnemonic_jax.fisher.jaxprs import REMAT, mutates, runner, stretch, without_jits
from mnemonic_jax.fisher.plan import IDENTITIES, REARRANGING, plan
from mnemonic_jax.fisher.rules import contractor
from mnemonic_jax.fisher.sums import Groups


class Param(NamedTuple):
  """A leaf, or a rearrangement of some."""

  value: Any  # (*shape)
  squares: Any  # (G, *shape), the dummy
  unit: Any  # the dummy of its power of two, one for each slice of a stacked leaf; None: fixed at 0
  leaves: frozenset[int] = frozenset()
  rearranged: bool = False  # so that the first axis may no longer be that of `unit`


class Data(NamedTuple):
  """A value that differs between examples."""

  value: Any  # (N, *shape)


jax.tree_util.register_pytree_node(
  Param, lambda param: (param[:3], param[3:]), lambda aux, children: Param(*children, *aux)
)


def squared_gradients(
  closed: Any,
  cotangents: Callable[[jax.Array], tuple[jax.Array, Any]],
  leaves: Sequence[jax.Array],
  examples: Sequence[jax.Array],
  groups: Groups,
) -> tuple[list[jax.Array], list[jax.Array], Any]:
  """Per leaf, sum_n w_n (d function_n / d leaf . cotangent_n)^2, and its power of two.

  Args:
    closed: the closed jaxpr of the function of one example; inputs are leaves, then the example's.
    cotangents: the function's values (N, ...) -> (the cotangents (N, ...) to pull back, anything).
    leaves: floating arrays.
    examples: arrays with leading axis N.
    groups: weights (G, N), and where this runs.

  Returns:
    sums (G, *leaf.shape); units e, int32 for each slice of a leaf's first axis, the sums being in
    units of 4**e; and what `cotangents` says.
  """
  dummies = [sums.dummies(leaf, groups.weights) for leaf in leaves]
  engine = _Engine(groups)

  def outputs(dummies: Any) -> jax.Array:
    params = [
      Param(leaf, squares, unit, frozenset([index]))
      for index, (leaf, (squares, unit)) in enumerate(zip(leaves, dummies, strict=True))
    ]
    (out,) = engine.evaluate(closed.jaxpr, closed.consts, [*params, *map(Data, examples)])
    return engine.batched(out)

  values, pull_back = jax.vjp(outputs, dummies)
  pulled, aux = cotangents(values)
  pairs = pull_back(pulled)[0]

  def unit_of(index: int, unit: jax.Array) -> jax.Array:
    fixed = index in engine.fixed
    return jnp.zeros_like(unit, jnp.int32) if fixed else unit.astype(jnp.int32) + sums.LOWEST_UNIT

  units = [unit_of(index, unit) for index, (_, unit) in enumerate(pairs)]
  return [total for total, _ in pairs], units, aux


class _Engine:
  """Evaluates the jaxpr of one example on all of them."""

  def __init__(self, groups: Groups) -> None:
    self.groups = groups
    self.fixed: set[int] = set()  # leaves that are read in parts, whose unit is 0

  def evaluate(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Args and results are Param, Data, or plain where all examples agree."""
    jaxpr, consts = without_jits(jaxpr, consts)
    copied = plan(jaxpr, [_kind(arg) for arg in args])
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    for index, (var, arg) in enumerate(zip(jaxpr.invars, args, strict=True)):
      env[var] = self.copied(arg) if index in copied else arg
    if mutates(jaxpr):
      whole = jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, consts))
      return _on_batch(whole, [env[var] for var in jaxpr.invars])
    read = lambda atom: atom.val if isinstance(atom, jex.Literal) else env[atom]
    waiting: list[Any] = []  # equations of data alone, which are mapped over the examples together

    def catch_up() -> None:
      if waiting:
        reads, writes, run = stretch(jaxpr, waiting)
        env.update(zip(writes, _on_batch(run, [env[var] for var in reads]), strict=True))
        waiting.clear()

    for equation in jaxpr.eqns:
      atoms = [atom for atom in equation.invars if not isinstance(atom, jex.Literal)]
      kinds = {_kind(env[atom]) if atom in env else "data" for atom in atoms}
      if "data" in kinds and "param" not in kinds:
        waiting.append(equation)
        continue
      if "data" in kinds:
        catch_up()
      outs = self.equation(jaxpr, equation, [read(atom) for atom in equation.invars])
      env.update(zip(equation.outvars, outs, strict=True))
    catch_up()
    return [read(atom) for atom in jaxpr.outvars]

  def equation(self, jaxpr: Any, equation: Any, args: list[Any]) -> list[Any]:
    """Evaluate one equation, which has params among its operands or only constants."""
    name, run = equation.primitive.name, runner(jaxpr, equation)
    params = [arg for arg in args if isinstance(arg, Param)]
    if not params or name == "stop_gradient":
      return _on_batch(run, args)
    if name in IDENTITIES:
      return [params[0]._replace(value=run(params[0].value)[0])]
    if name in REARRANGING or name == "broadcast_in_dim":
      return self.rearranged(equation, run, params)
    if name in ("mul", "div") and not any(isinstance(arg, Data) for arg in args):
      (value,) = run(*(arg.value if isinstance(arg, Param) else arg for arg in args))
      factor = float(next(arg for arg in args if not isinstance(arg, Param))) ** 2
      factor = factor if name == "mul" else 1 / factor
      return [params[0]._replace(value=value, squares=params[0].squares * factor)]
    if name == "scan":
      return self.scan(equation, args)
    if name == "cond":
      branches = equation.params["branches"]
      whole = [partial(self.evaluate_all, branch.jaxpr, branch.consts) for branch in branches]
      return list(map(Data, jax.lax.switch(args[0], whole, *args[1:])))
    if name in REMAT:
      inner = equation.params["jaxpr"]
      again = partial(
        self.evaluate_all, getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
      )
      settings = {key: equation.params[key] for key in ("prevent_cse", "policy")}
      return list(map(Data, jax.checkpoint(again, **settings)(*args)))
    return [self.contracted(equation, run, args)]

  def copied(self, param: Param) -> Data:
    """Give every example a copy of its own of a param."""
    contract = partial(per_example.contract, tuple(param.value.shape))
    ready = self._ready(contract, param)
    unit = self._unit(param)
    return Data(sums.copies(ready, param.value, param.squares, unit, self.groups))

  def rearranged(self, equation: Any, run: Callable[..., Any], params: list[Param]) -> list[Any]:
    """Rearrange params and their dummies alike."""
    wide = max((param.squares.dtype for param in params), key=lambda dtype: dtype.itemsize)
    squares = jax.vmap(_bind(equation))(*(param.squares.astype(wide) for param in params))
    values = run(*(param.value for param in params))
    unit, leaves = params[0].unit, frozenset().union(*(param.leaves for param in params))
    if equation.primitive.name in ("slice", "split", "concatenate"):
      self.fixed |= leaves
      unit = None
    pairs = zip(values, squares, strict=True)
    return [Param(value, square, unit, leaves, True) for value, square in pairs]

  def contracted(self, equation: Any, run: Callable[..., Any], args: list[Any]) -> Data:
    """Evaluate the one operation on a param and data, with its tap."""
    index = next(index for index, arg in enumerate(args) if isinstance(arg, Param))
    rule, param = contractor(equation, index), args[index]
    data = args[rule.data_index].value
    (output,) = _on_batch(run, args)
    if 0 in (data.size, output.value.size, *param.value.shape):
      return output  # without a tap, the dummy's cotangent is zero
    ready = self._ready(rule.contract, param)
    unit = self._unit(param)
    tapped = sums.tap(ready, output.value, rule.data_of(data), param.squares, unit, self.groups)
    return Data(tapped)

  def _unit(self, param: Param) -> Any:
    return _mesh.zeros((), jnp.float32, param.squares) if param.unit is None else param.unit

  def _ready(self, contract: Any, param: Param) -> Any:
    """A contraction in range, wherever the examples lie."""
    ready = sums.in_range(contract, fixed=param.unit is None)
    return partial(sums.summed, ready, param.squares.shape)

  def evaluate_all(self, jaxpr: Any, consts: Sequence[Any], *args: Any) -> list[jax.Array]:
    """As `evaluate`, every result with its axis of examples."""
    return [self.batched(out) for out in self.evaluate(jaxpr, consts, args)]

  def scan(self, equation: Any, args: list[Any]) -> list[Any]:
    """A scan whose stacked params are scanned with their dummies; carries have an examples' axis."""
    params = equation.params
    inner, num_consts, num_carry = params["jaxpr"], params["num_consts"], params["num_carry"]
    consts, rest = args[:num_consts], args[num_consts:]
    carry, xs = rest[:num_carry], rest[num_carry:]

    def scanned_axis_first(x: Any) -> Any:
      if isinstance(x, Param):
        unit = x.unit
        if unit is None or x.rearranged or unit.ndim == 0:
          self.fixed |= x.leaves
          unit = None
        return x._replace(squares=jnp.moveaxis(x.squares, 1, 0), unit=unit)
      return Data(jnp.moveaxis(x.value, 1, 0)) if isinstance(x, Data) else x

    def body(carry: list[jax.Array], x: list[Any]) -> tuple[list[jax.Array], list[jax.Array]]:
      outs = self.evaluate_all(inner.jaxpr, inner.consts, *consts, *map(Data, carry), *x)
      return outs[:num_carry], outs[num_carry:]

    names = ("length", "reverse", "unroll", "_split_transpose")
    settings = {name: params[name] for name in names if name in params}
    start = [self.batched(value) for value in carry]
    end, stacked = jax.lax.scan(body, start, [scanned_axis_first(x) for x in xs], **settings)
    return [*map(Data, end), *(Data(jnp.moveaxis(y, 0, 1)) for y in stacked)]

  def batched(self, value: Any) -> jax.Array:
    """With an axis of examples, whatever it was."""
    if isinstance(value, Data):
      return value.value
    return jnp.broadcast_to(value, (self.groups.weights.shape[1], *jnp.shape(value)))


def _kind(value: Any) -> str:
  return "param" if isinstance(value, Param) else "data" if isinstance(value, Data) else "const"


def _on_batch(run: Callable[..., list[Any]], args: Sequence[Any]) -> list[Any]:
  """Evaluate equations of one example on all of them; params count as constants."""
  values = [arg.value if isinstance(arg, (Data, Param)) else arg for arg in args]
  axes = tuple(0 if isinstance(arg, Data) else None for arg in args)
  return [Data(out) for out in jax.vmap(run, axes)(*values)] if 0 in axes else run(*values)


def _bind(equation: Any) -> Callable[..., list[Any]]:
  """Evaluate a rearranging equation on arrays of another dtype than it was traced with."""

  def rearrange(*args: Any) -> list[Any]:
    outs = equation.primitive.bind(*args, **equation.params)
    return list(outs) if equation.primitive.multiple_results else [outs]

  return rearrange
