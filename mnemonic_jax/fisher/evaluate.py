"""The engine: squared per-example gradients out of one batched backward pass.

The function of one example is traced, and its equations are evaluated on the whole batch with the
leaves of params taken out of ordinary differentiation: where a leaf meets data, a tap of `sums`
puts sum_n w_n (d / d leaf)^2 into the cotangent of a dummy. One backward pass to the dummies is the
Fisher.

A leaf goes one of two ways, and both are exact.
  contracted: it reaches products, convolutions or lookups with data through operations that only
    rearrange or scale it. There the operation's input and its output's cotangent become the sum of
    squares; those of several such operations meet in the first (see `tied`).
  per example: any other use (broadcast, normalised, inside a custom rule, or beside such a use).
    Each example gets a copy of its own, and the copy's cotangent is that example's gradient.
In the body of a scan over layers the slice of a stacked leaf goes its own way in each iteration; in
remat and cond too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from mnemonic_jax import _mesh
from mnemonic_jax.fisher import per_example, plan, sums, tied
from mnemonic_jax.fisher.jaxprs import bind, runner, stretch
from mnemonic_jax.fisher.plan import Plan, Step
from mnemonic_jax.fisher.sums import Groups


class Param(NamedTuple):
  """A leaf, or a rearrangement of some."""

  value: Any  # (*shape)
  squares: Any  # (G, *shape), the dummy
  unit: Any  # the dummy of its power of two, one for each slice of a stacked leaf; None: fixed at 0


class Data(NamedTuple):
  """A value that differs between examples."""

  value: Any  # (N, *shape)


def squared_gradients(
  planned: Plan,
  cotangents: Callable[[jax.Array], tuple[jax.Array, Any]],
  leaves: Sequence[jax.Array],
  examples: Sequence[jax.Array],
  groups: Groups,
) -> tuple[list[jax.Array], list[jax.Array], Any]:
  """Per leaf, sum_n w_n (d function_n / d leaf . cotangent_n)^2, and its power of two.

  Args:
    planned: the plan of the function of one example; inputs are leaves, then the example's.
    cotangents: the function's values (N, ...) -> (the cotangents (N, ...) to pull back, anything).
    leaves: the leaves of params, in order; those that the plan takes for constants have no sum.
    examples: arrays with leading axis N.
    groups: weights (G, N), and where this runs.

  Returns:
    sums (G, *leaf.shape); units e, int32 for each slice of a leaf's first axis, the sums being in
    units of 4**e; and what `cotangents` says.
  """
  fixed = planned.fixed
  under_mask = [index for index, _ in enumerate(leaves) if planned.inputs[index] != "const"]
  dummies = {index: sums.dummies(leaves[index], groups.weights) for index in under_mask}

  def outputs(dummies: Any) -> jax.Array:
    args: list[Any] = [*leaves, *map(Data, examples)]
    for index, (squares, unit) in dummies.items():
      args[index] = Param(leaves[index], squares, None if index in fixed else unit)
    (out,) = Engine(groups).evaluate_all(planned, *args)
    return out

  values, pull_back = jax.vjp(outputs, dummies)
  pulled, aux = cotangents(values)
  pairs = pull_back(pulled)[0]

  def unit_of(index: int) -> jax.Array:
    unit = pairs[index][1].astype(jnp.int32)
    return unit if index in fixed else unit + sums.LOWEST_UNIT

  return [pairs[index][0] for index in under_mask], [unit_of(index) for index in under_mask], aux


class Engine:
  """Evaluates the plan of one example on all of them."""

  def __init__(self, groups: Groups) -> None:
    self.groups = groups

  def evaluate(self, planned: Plan, args: Sequence[Any]) -> list[Any]:
    """Args and results are Param, Data, or plain where all examples agree."""
    jaxpr = planned.jaxpr
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, planned.consts, strict=True))
    for index, (var, arg) in enumerate(zip(jaxpr.invars, args, strict=True)):
      env[var] = self.copied(arg) if index in planned.copied else arg
    if planned.steps is None:
      whole = jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, planned.consts))
      return on_batch(whole, [env[var] for var in jaxpr.invars])
    read = lambda atom: atom.val if isinstance(atom, jex.Literal) else env[atom]
    ties = {index: self.tie(tie, args[index]) for index, tie in planned.tied.items()}
    waiting: list[Any] = []  # equations of data alone, which are mapped over the examples together

    def catch_up() -> None:
      if waiting:
        reads, writes, run = stretch(jaxpr, waiting)
        env.update(zip(writes, on_batch(run, [env[var] for var in reads]), strict=True))
        waiting.clear()

    for step in planned.steps:
      if "data" in step.kinds and not step.params and not self.tracks(step, env):
        waiting.append(step.equation)
        continue
      if "data" in step.kinds:
        catch_up()
      run, operands = runner(jaxpr, step.equation), [read(atom) for atom in step.equation.invars]
      follow = ties[min(step.params)].use if step.how == plan.TIED else self.follow
      env.update(zip(step.equation.outvars, follow(step, run, operands), strict=True))
    catch_up()
    return [read(atom) for atom in jaxpr.outvars]

  def evaluate_all(self, planned: Plan, *args: Any) -> list[jax.Array]:
    """As `evaluate`, every result with its axis of examples."""
    return [self.batched(out) for out in self.evaluate(planned, args)]

  def follow(self, step: Step, run: Callable[..., Any], args: list[Any]) -> list[Any]:
    """Evaluate one equation in the way of the plan; `run` evaluates it for one example."""
    ways = {
      plan.SAME: _same,
      plan.REARRANGED: _rearranged,
      plan.SCALED: _scaled,
      plan.CONTRACTED: self.contracted,
      plan.SCAN: self.scan,
      plan.COND: self.cond,
      plan.REMATERIALISED: self.rematerialised,
    }
    return ways[step.how](step, run, args) if step.how in ways else on_batch(run, args)

  def tie(self, tie: tied.Tie, param: Param) -> Any:
    """What evaluates the uses of a param that several contractions read."""
    return _Tied(self, tie, param)

  def tracks(self, step: Step, env: Mapping[Any, Any]) -> bool:
    """Whether `follow` must see an equation of data by itself."""
    return False

  def harvest(self) -> Any:
    """What an iteration of a scan has found, beside its results: nothing here."""
    return ()

  def keep(self, found: Any) -> None:
    """Take what all iterations of a scan have found, along a first axis of iterations."""

  def copied(self, param: Param) -> Any:
    """Give every example a copy of its own of a param."""
    contract = partial(per_example.contract, tuple(param.value.shape))
    ready, unit = self.ready(sums.in_range(contract, fixed=param.unit is None), param)
    return Data(sums.copies(ready, param.value, param.squares, unit, self.groups))

  def contracted(self, step: Step, run: Callable[..., Any], args: list[Any]) -> list[Any]:
    """Evaluate the one operation on a param and data, with its tap."""
    rule = step.rule
    param, data = args[rule.index], args[rule.data_index].value
    (output,) = on_batch(run, args)
    if 0 in (data.size, output.value.size, *param.value.shape):
      return [output]  # without a tap, the dummy's cotangent is zero
    ready, unit = self.ready(sums.in_range(rule.contract, fixed=param.unit is None), param)
    data = rule.data_of(data)
    return [Data(sums.tap(ready, output.value, data, param.squares, unit, self.groups))]

  def ready(self, contract: Any, param: Param) -> tuple[Any, Any]:
    """A contraction wherever the examples lie; and the dummy of its unit."""
    unit = _mesh.zeros((), jnp.float32, param.squares) if param.unit is None else param.unit
    return partial(sums.summed, contract, param.squares.shape), unit

  def cond(self, step: Step, _: Any, args: list[Any]) -> list[Any]:
    """Evaluate a cond on constants."""
    branches = [partial(self.evaluate_all, inner) for inner in step.inner]
    return list(map(Data, jax.lax.switch(args[0], branches, *args[1:])))

  def rematerialised(self, step: Step, _: Any, args: list[Any]) -> list[Any]:
    """Evaluate a `jax.checkpoint` as one."""
    settings = {key: step.equation.params[key] for key in ("prevent_cse", "policy")}
    again = jax.checkpoint(partial(self.evaluate_all, step.inner[0]), **settings)
    return list(map(Data, again(*args)))

  def scan(self, step: Step, _: Any, args: list[Any]) -> list[Any]:
    """Scan stacked params together with their dummies; the carries have an axis of examples."""
    params = step.equation.params
    num_consts, num_carry = params["num_consts"], params["num_carry"]
    consts, rest = args[:num_consts], args[num_consts:]
    carry, xs = rest[:num_carry], rest[num_carry:]

    def scanned_axis_first(x: Any) -> Any:
      if isinstance(x, Param):
        return x._replace(squares=jnp.moveaxis(x.squares, 1, 0))
      return Data(jnp.moveaxis(x.value, 1, 0)) if isinstance(x, Data) else x

    def body(carry: list[jax.Array], x: list[Any]) -> tuple[list[jax.Array], Any]:
      outs = self.evaluate_all(step.inner[0], *consts, *map(Data, carry), *x)
      return outs[:num_carry], (outs[num_carry:], self.harvest())

    names = ("length", "reverse", "unroll", "_split_transpose")
    settings = {name: params[name] for name in names if name in params}
    start = [self.batched(value) for value in carry]
    scanned = [scanned_axis_first(x) for x in xs]
    end, (stacked, found) = jax.lax.scan(body, start, scanned, **settings)
    self.keep(found)
    return [*map(Data, end), *(Data(jnp.moveaxis(y, 0, 1)) for y in stacked)]

  def batched(self, value: Any) -> jax.Array:
    """With an axis of examples, whatever it was."""
    if isinstance(value, Data):
      return value.value
    return jnp.broadcast_to(value, (self.groups.weights.shape[1], *jnp.shape(value)))


class _Tied:
  """A param that is tied, while the equations of a plan are evaluated."""

  def __init__(self, engine: Engine, tie: tied.Tie, param: Param) -> None:
    self.engine, self.tie, self.param = engine, tie, param
    self.carriers: list[Any] | None = None

  def use(self, step: Step, run: Callable[..., Any], args: list[Any]) -> list[Any]:
    """Evaluate the operation on the param and data that is next."""
    (output,) = on_batch(run, args)
    data = step.rule.data_of(args[step.rule.data_index].value)
    if self.carriers is not None:
      return [Data(tied.later(output.value, data, self.carriers.pop(0)))]
    squares, fixed = self.param.squares, self.param.unit is None
    ready, unit = self.engine.ready(partial(self.tie.contract, fixed), self.param)
    tapped = tied.first(self.tie, ready, output.value, data, squares, unit, self.engine.groups)
    self.carriers = tapped[1]
    return [Data(tapped[0])]


def _same(_: Step, run: Callable[..., Any], args: list[Any]) -> list[Any]:
  """The identity, to a squared gradient."""
  (param,) = args
  return [param._replace(value=run(param.value)[0])]


def _rearranged(step: Step, run: Callable[..., Any], params: list[Any]) -> list[Any]:
  """Rearrange params and their dummies alike."""
  wide = max((param.squares.dtype for param in params), key=lambda dtype: dtype.itemsize)
  squares = jax.vmap(bind(step.equation))(*(param.squares.astype(wide) for param in params))
  pairs = zip(run(*(param.value for param in params)), squares, strict=True)
  return [Param(value, square, params[0].unit) for value, square in pairs]


def _scaled(step: Step, run: Callable[..., Any], args: list[Any]) -> list[Any]:
  """Multiply a param by a number, or divide it."""
  (param,) = (arg for arg in args if isinstance(arg, Param))
  (factor,) = (float(arg) for arg in args if not isinstance(arg, Param))
  squared = factor**2 if step.equation.primitive.name == "mul" else 1 / factor**2
  (value,) = run(*(arg.value if isinstance(arg, Param) else arg for arg in args))
  return [param._replace(value=value, squares=param.squares * squared)]


def on_batch(run: Callable[..., list[Any]], args: Sequence[Any]) -> list[Any]:
  """Evaluate equations of one example on all of them; params count as constants."""
  values = [arg.value if isinstance(arg, (Data, Param)) else arg for arg in args]
  axes = tuple(0 if isinstance(arg, Data) else None for arg in args)
  return [Data(out) for out in jax.vmap(run, axes)(*values)] if 0 in axes else run(*values)
