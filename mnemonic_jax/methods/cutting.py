"""Cut the forgotten classes out of what a model's kernels write: one pass through its program.

At each site, in the order of the data, the codes' mean array of each class gives a cut P = 1 - D W
(see `directions`). The kernels that write there are edited so that they write P times what they
wrote, and the pass goes on with the array that the edited kernels give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from mnemonic_jax.fisher import plan, sites, sums
from mnemonic_jax.fisher.evaluate import Data, Engine, on_batch
from mnemonic_jax.fisher.jaxprs import bind
from mnemonic_jax.fisher.plan import Plan, Step
from mnemonic_jax.methods import directions, places
from mnemonic_jax.methods.places import Channels, Inside, Places

_HIGHEST = jax.lax.Precision.HIGHEST

# From a change of a rearranged weight to the changes of the inputs of the plan that it is made of.
Back = Callable[[jax.Array], list[tuple[int, jax.Array]]]


class Weight(NamedTuple):
  """A rearrangement of params."""

  value: jax.Array
  back: Back
  inputs: frozenset[int]  # of the plan


class Offset(NamedTuple):
  """A weight that is added to what a kernel writes."""

  weight: Weight
  scale: jax.Array  # (F,), what it is multiplied by on its way to the site


class Term(NamedTuple):
  """What one kernel has written: scale * kernel(x) + shift, channel by channel."""

  linear: jax.Array  # (N, *shape), scale * kernel(x)
  scale: jax.Array  # (F,)
  shift: jax.Array  # (F,)
  offset: Offset | None  # the last weight in shift
  kernel: Weight
  rule: Any


class Written(NamedTuple):
  """An array that kernels write into, and other data too."""

  value: jax.Array  # (N, *shape)
  channels: Channels
  terms: tuple[Term, ...]


class Found(NamedTuple):
  """What is found at the sites; arrays (S,) in the order of the data."""

  rank: jax.Array  # int32, the number of directions, the largest of all groups of channels
  cut: jax.Array  # the share of the groups that were cut


class Reader(NamedTuple):
  """The contraction that makes the logits, where its kernel is cut by what it reads."""

  step: Step
  vectors: jax.Array | None  # (N, F), what it reads in the model as it was


def cut_writes(
  planned: Plan,
  found: Places,
  leaves: Sequence[jax.Array],
  examples: Sequence[jax.Array],
  weights: directions.Weights,
  sides: tuple[jax.Array, jax.Array],
  active: jax.Array,
  bypassed: bool = True,
  reader: Step | None = None,
) -> tuple[dict[int, jax.Array], Found]:
  """Return the changes of leaves by their index, and what was found at the sites.

  A forgotten class's part of the codes does not reach the head once earlier sites are cut, a
  picture's still does. So the head's kernel is cut by what it reads in the model as it was.

  Args:
    planned: the plan of the function of one example; inputs are leaves, then the example's.
    found: its sites.
    leaves: the leaves of params, in order.
    examples: arrays with leading axis N.
    weights: what each example counts for.
    sides: (C,) bool each, the classes to forget and to keep.
    active: (S,) bool, the sites to cut.
    bypassed: whether sites that other arrays bypass may be active; if not, they cost nothing.
    reader: the head's contraction, if its kernel is to be cut too.
  """

  def walk(active: jax.Array, reader: Reader | None) -> _Walk:
    one = _Walk(found, weights, sides, active, bypassed, reader)
    args: list[Any] = [*leaves, *map(Data, examples)]
    for index, leaf in enumerate(leaves):
      if planned.inputs[index] != "const":
        args[index] = _input(index, leaf)
    one.evaluate(planned, args)
    return one

  if reader is None:
    done = walk(active, None)
  else:
    before = walk(jnp.zeros_like(active), Reader(reader, None))
    done = walk(active, Reader(reader, before.read))
  return done.changes, done.found_at()


def _input(index: int, value: jax.Array) -> Weight:
  return Weight(value, lambda change: [(index, change)], frozenset([index]))


class _Walk(Engine):
  """Follows a plan forward, and cuts at its sites."""

  def __init__(
    self,
    found: Places,
    weights: directions.Weights,
    sides: tuple[jax.Array, jax.Array],
    active: jax.Array,
    bypassed: bool,
    reader: Reader | None = None,
  ) -> None:
    super().__init__(sums.Groups(weights.mean.astype(jnp.float32)))
    self.weights, self.places, self.sides, self.active = weights, found, sides, active
    self.bypassed, self.reader = bypassed, reader
    self.read: jax.Array | None = None  # (N, F), by the reader
    self.changes: dict[int, jax.Array] = {}  # of the inputs of the plan
    self.found: dict[int, tuple[jax.Array, jax.Array]] = {}  # at some sites, or at one

  def found_at(self) -> Found:
    """What was found, in the order of the sites."""
    parts = [self.found[at] for at in sorted(self.found)]
    if not parts:
      return Found(jnp.zeros(0, jnp.int32), jnp.zeros(0))
    return Found(
      *(jnp.concatenate([jnp.atleast_1d(x) for x in xs]) for xs in zip(*parts, strict=True))
    )

  def tracks(self, step: Step, env: Mapping[Any, Any]) -> bool:
    """Operations on weights and on what kernels have written are followed one by one."""
    atoms = (atom for atom in step.equation.invars if not isinstance(atom, jex.Literal))
    return any(isinstance(env.get(atom), (Weight, Written)) for atom in atoms)

  def copied(self, param: Any) -> Any:
    """A param that is used in another way is a weight like any."""
    return param

  def tie(self, tie: Any, param: Any) -> Any:
    """One that is read at several places is a constant."""
    return _Constant()

  def follow(self, step: Step, run: Callable[..., Any], args: list[Any]) -> list[Any]:
    """Evaluate one equation, and cut where its result is a site."""
    outs = self._followed(step, run, args)
    for index, (var, out) in enumerate(zip(step.equation.outvars, outs, strict=True)):
      if isinstance(out, Written) and var in self.places.ends:
        outs[index] = self._ended(out, var)
    return outs

  def _ended(self, written: Written, var: Any) -> Data:
    """Cut where writing ends, if that is a site that may be active."""
    at = self.places.sites.get(var)
    if at is None:
      return Data(written.value)
    if self.bypassed or self.places.main[var]:
      return self._cut(written, at)
    self.found[at] = jnp.int32(0), jnp.float32(0)
    return Data(written.value)

  def _followed(self, step: Step, run: Callable[..., Any], args: list[Any]) -> list[Any]:
    if (inside := self.places.inner.get(id(step.equation))) is not None:
      return (
        self._scanned(step, inside, args) if inside.scanned else self._nested(step, inside, args)
      )
    kinds = [_kind(arg) for arg in args]
    if self.reader is not None and step.equation is self.reader.step.equation:
      args = self._read(step, args)
    if step.how == plan.CONTRACTED:
      if (channels := self.places.channels.get(step.equation.outvars[0])) is not None:
        return [self._contracted(step, run, args, channels)]
      return on_batch(run, list(map(_plain, args)))
    has_weights = any(isinstance(kind, plan.Params) for kind in kinds)
    if has_weights and plan.gives_params(step.equation, kinds):
      return _rearranged(step.equation, args)
    if (channels := places.result(step, kinds)) is not None:
      return [self._carried(step, run, args, channels)]
    return on_batch(run, list(map(_plain, args)))

  def _read(self, step: Step, args: list[Any]) -> list[Any]:
    """Cut the kernel of the head by what it reads; without means, only look at that."""
    rule, (weight, data) = step.rule, (args[step.rule.index], args[step.rule.data_index])
    wide = sites.mean_over_positions(_value(data), rule.read or ())
    self.read = wide
    if self.reader is None or self.reader.vectors is None or rule.groups > 1:
      return args
    one = directions.cut(self.reader.vectors, self.weights, *self.sides)
    inputs = rule.leaf_axes[0]
    last = range(-len(inputs), 0)
    kernel = jnp.moveaxis(weight.value.astype(jnp.float32), inputs, last)
    flat = kernel.reshape(*kernel.shape[: kernel.ndim - len(inputs)], -1)
    change = jnp.moveaxis(-one.taken_back(flat).reshape(kernel.shape), last, inputs)
    self._change(weight, change)
    edited = weight._replace(value=(weight.value + change).astype(weight.value.dtype))
    return [edited if arg is weight else arg for arg in args]

  def _contracted(
    self, step: Step, run: Callable[..., Any], args: list[Any], channels: Channels
  ) -> Written:
    """What a kernel writes."""
    (output,) = on_batch(run, list(map(_plain, args)))
    width = math.prod(output.value.shape[1:][slice(*channels)])
    ones, zeros = jnp.ones(width, jnp.float32), jnp.zeros(width, jnp.float32)
    term = Term(output.value, ones, zeros, None, args[step.rule.index], step.rule)
    return Written(output.value, channels, (term,))

  def _carried(
    self, step: Step, run: Callable[..., Any], args: list[Any], channels: Channels
  ) -> Written:
    """What becomes of it in an operation that leaves each channel to itself."""
    name = step.equation.primitive.name
    (output,) = on_batch(run, list(map(_plain, args)))
    written = [arg for arg in args if isinstance(arg, Written)]
    first, at = written[0], next(i for i, arg in enumerate(args) if isinstance(arg, Written))
    if name in places.ADDING:
      signs = (1, -1 if name == "sub" else 1)
      pairs = [(arg, sign) for arg, sign in zip(args, signs, strict=True)]
      own = [(term, sign) for arg, sign in pairs if isinstance(arg, Written) for term in arg.terms]
      terms = [term if sign == 1 else _negated(term) for term, sign in own]
      other, sign = pairs[1 - at]
      if len(written) == 1 and not isinstance(other, Data):
        offset = step.equation.invars[1 - at]
        terms[0] = self._shifted(terms[0], other, sign, first, offset)
      return Written(output.value, channels, tuple(terms))
    if name in places.SCALING:
      factor = jnp.asarray(_value(args[1 - at]), jnp.float32)
      factor = _per_channel(factor, first)
      factor = 1 / factor if name == "div" else factor
      terms = [_times(term, factor) for term in first.terms]
    else:
      terms = [_times(term, -1 if name == "neg" else 1) for term in first.terms]
    through = lambda linear: (
      on_batch(run, [Data(linear) if i == at else _plain(arg) for i, arg in enumerate(args)])[
        0
      ].value
    )
    terms = [
      term._replace(linear=through(old.linear))
      for term, old in zip(terms, first.terms, strict=True)
    ]
    return Written(output.value, channels, tuple(terms))

  def _shifted(self, term: Term, other: Any, sign: int, written: Written, atom: Any) -> Term:
    """A term to which a constant or a weight is added, if that is the same at all positions."""
    value = jnp.asarray(_value(other), jnp.float32)
    if not places.is_per_channel(value.shape, written.channels):
      return term
    added = sign * _per_channel(value, written)
    term = term._replace(shift=term.shift + added)
    if not isinstance(other, Weight) or value.size != added.size:
      return term
    if atom not in self.places.alone:
      return term
    return term._replace(offset=Offset(other, jnp.full(added.shape, sign, jnp.float32)))

  def _cut(self, written: Written, at: int) -> Data:
    """Cut at one site."""
    wide = _channels_last(written.value, written.channels)
    groups = math.lcm(*(term.rule.groups for term in written.terms))
    one = directions.cut(wide.mean(1), self.weights, *self.sides, groups)
    active = self.active[at]
    taken = jnp.zeros_like(wide)
    for term in written.terms:
      live = jnp.where(active, term.scale != 0, 0).astype(jnp.float32)
      own = _channels_last(term.linear, written.channels)
      own = own if term.offset is None else own + term.shift
      taken = taken + live * one.taken(own)
      self._edit(term, one, live)
    rank, width = one.rank, one.directions.shape[1]
    share = jnp.mean((rank > 0) & (rank < width), dtype=jnp.float32)
    self.found[at] = jnp.where(active, rank.max(), 0), jnp.where(active, share, 0)
    left = _channels_back(wide - taken, written.value.shape, written.channels)
    return Data(left.astype(written.value.dtype))

  def _edit(self, term: Term, one: directions.Cut, live: jax.Array) -> None:
    """Edit the kernel and the offset of a term."""
    outputs = term.rule.leaf_axes[1]
    last = range(-len(outputs), 0)
    kernel = jnp.moveaxis(term.kernel.value.astype(jnp.float32), outputs, last)
    safe = jnp.where(term.scale == 0, 1, term.scale)
    flat = kernel.reshape(*kernel.shape[: kernel.ndim - len(outputs)], -1)
    change = (-live * one.taken(flat * term.scale) / safe).reshape(kernel.shape)
    self._change(term.kernel, jnp.moveaxis(change, last, outputs))
    if term.offset is not None:
      weight, scale = term.offset
      change = -live * one.taken(term.shift) / jnp.where(scale == 0, 1, scale)
      self._change(weight, change.reshape(weight.value.shape))

  def _change(self, weight: Weight, change: jax.Array) -> None:
    for index, part in weight.back(change.astype(jnp.float32)):
      self.changes[index] = self.changes[index] + part if index in self.changes else part

  def _inside(self, inside: Inside, active: jax.Array) -> _Walk:
    return _Walk(inside.places, self.weights, self.sides, active, self.bypassed)

  def _take(self, inside: Inside, args: list[Any], changes: Any, found: Found) -> None:
    """Take over what was found inside a step whose operands are `args`."""
    for index, change in changes.items():
      self._change(args[index], change)
    self.found[inside.first] = found.rank.reshape(-1), found.cut.reshape(-1)

  def _nested(self, step: Step, inside: Inside, args: list[Any]) -> list[Any]:
    """Follow what is inside a remat; nothing is pulled back, so nothing is computed again."""
    (body,), count = step.inner, inside.places.count
    walk = self._inside(inside, self.active[inside.first : inside.first + count])
    outs = walk.evaluate(body, [_outer(body, i, arg) for i, arg in enumerate(args)])
    self._take(inside, args, walk.changes, walk.found_at())
    return [_plain(out) for out in outs]

  def _scanned(self, step: Step, inside: Inside, args: list[Any]) -> list[Any]:
    """Follow what is inside a scan; every iteration has sites and weights of its own."""
    params, (body,) = step.equation.params, step.inner
    num_consts, num_carry = params["num_consts"], params["num_carry"]
    count, length = inside.places.count, inside.iterations
    fixed, carry, xs = (
      args[:num_consts],
      [self.batched(_plain(arg)) for arg in args[num_consts : num_consts + num_carry]],
      args[num_consts + num_carry :],
    )
    active = self.active[inside.first : inside.first + count * length].reshape(length, count)
    in_order = (lambda x: x[::-1]) if params["reverse"] else (lambda x: x)  # of the data
    stacked = [jnp.moveaxis(x.value, 1, 0) if isinstance(x, Data) else _value(x) for x in xs]

    def iterate(carry: list[jax.Array], x: Any) -> Any:
      slices, active = x
      walk = self._inside(inside, active)
      of_scan = [Data(s) if isinstance(x, Data) else s for s, x in zip(slices, xs, strict=True)]
      inner = [*map(_plain, fixed), *map(Data, carry), *of_scan]
      outs = walk.evaluate(body, [_outer(body, i, arg) for i, arg in enumerate(inner)])
      outs = [walk.batched(_plain(out)) for out in outs]
      return outs[:num_carry], (outs[num_carry:], walk.changes, walk.found_at())

    names = ("length", "reverse", "unroll", "_split_transpose")
    settings = {name: params[name] for name in names if name in params}
    end, (ys, changes, found) = jax.lax.scan(
      iterate, carry, (stacked, in_order(active)), **settings
    )
    self._take(inside, args, changes, Found(*map(in_order, found)))
    return [*map(Data, end), *(Data(jnp.moveaxis(y, 0, 1)) for y in ys)]


class _Constant:
  def use(self, step: Step, run: Callable[..., Any], args: list[Any]) -> list[Any]:
    """Evaluate one of the uses of a tied param, which is not edited."""
    return on_batch(run, list(map(_plain, args)))


def _outer(body: Plan, index: int, arg: Any) -> Any:
  """An operand of a step as an input of the plan inside it."""
  if isinstance(body.inputs[index], plan.Params):
    return _input(index, _value(arg))
  return _plain(arg)


def _plain(arg: Any) -> Any:
  """As the engine knows values: those that differ between examples are Data."""
  if isinstance(arg, Weight):
    return arg.value
  return Data(arg.value) if isinstance(arg, Written) else arg


def _value(arg: Any) -> Any:
  return arg.value if isinstance(arg, (Weight, Written, Data)) else arg


def _kind(arg: Any) -> places.Kind:
  if isinstance(arg, Weight):
    return plan.Params(arg.inputs)
  if isinstance(arg, Written):
    return arg.channels
  return "data" if isinstance(arg, Data) else "const"


def _rearranged(equation: Any, args: list[Any]) -> list[Any]:
  """Rearrange weights, and remember the way back."""
  weights = [arg for arg in args if isinstance(arg, Weight)]
  inputs = frozenset().union(*(weight.inputs for weight in weights))
  name, rearrange = equation.primitive.name, bind(equation)
  outs = rearrange(*map(_value, args))
  if name in places.UNCHANGED | places.SCALING:
    (weight,) = weights
    factor = _factor(equation, args)
    back: Back = lambda change: weight.back(change / factor)
    return [Weight(outs[0], back, inputs)]
  wide = [jax.ShapeDtypeStruct(weight.value.shape, jnp.float32) for weight in weights]
  transposed = jax.linear_transpose(rearrange, *wide)

  def back_from(index: int) -> Back:
    def back(change: jax.Array) -> list[tuple[int, jax.Array]]:
      changes = [
        change if i == index else jnp.zeros(out.shape, jnp.float32) for i, out in enumerate(outs)
      ]
      parts = zip(weights, transposed(changes), strict=True)
      return [pair for weight, part in parts for pair in weight.back(part)]

    return back

  return [Weight(out, back_from(index), inputs) for index, out in enumerate(outs)]


def _factor(equation: Any, args: list[Any]) -> float:
  """What a weight is multiplied by."""
  name = equation.primitive.name
  if name not in places.SCALING:
    return -1.0 if name == "neg" else 1.0
  (factor,) = (float(arg) for arg in args if not isinstance(arg, Weight))
  return factor if name == "mul" else 1 / factor


def _times(term: Term, factor: Any) -> Term:
  """A term times a factor, one number or one for each channel, but for its array."""
  offset = term.offset and Offset(term.offset.weight, term.offset.scale * factor)
  return term._replace(scale=term.scale * factor, shift=term.shift * factor, offset=offset)


def _negated(term: Term) -> Term:
  return _times(term._replace(linear=-term.linear), -1)


def _per_channel(value: jax.Array, written: Written) -> jax.Array:
  """(F,) of an operand that is the same at all positions of what is written."""
  sizes = written.value.shape[1:][slice(*written.channels)]
  if value.ndim:
    value = value.reshape(value.shape[slice(*written.channels)])
  return jnp.broadcast_to(value, sizes).reshape(-1)


def _channels_last(x: jax.Array, channels: Channels) -> jax.Array:
  """(N, *shape) -> (N, positions, F), float32."""
  axes = range(1 + channels.start, 1 + channels.stop)
  moved = jnp.moveaxis(x, axes, range(-len(axes), 0))
  width = math.prod(x.shape[axis] for axis in axes)
  return moved.reshape(len(x), -1, width).astype(jnp.float32)


def _channels_back(x: jax.Array, shape: Sequence[int], channels: Channels) -> jax.Array:
  """The way back from `_channels_last`."""
  axes = range(1 + channels.start, 1 + channels.stop)
  rest = [size for axis, size in enumerate(shape) if axis not in axes]
  moved = x.reshape(*rest, *(shape[axis] for axis in axes))
  return jnp.moveaxis(moved, range(-len(axes), 0), axes)
