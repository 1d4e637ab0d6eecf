"""What a backward pass does where a param meets data: sum_n w_n (d loss_n / d param)^2, with no gradient ever stored.

Each operation takes, beside the param, a dummy `squares` (G, *param.shape) of zeros, on which its result does not depend
and whose *cotangent is defined* to be the weighted sum of squared per-example gradients. `jax.grad` with respect to the
dummies then is the Fisher, and scan, remat and cond need no rules of their own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from mnemonic_jax import _mesh, _trees

# Bytes of per-example gradients of one param that a contraction holds at once, where it takes several examples a step.
_CHUNK_BYTES = 2**26
# Numbers up to which a weighted sum is no matrix product.
_SMALL = 2**17
# Examples up to which it is none either: a TPU multiplies blocks of many rows, however few there are.
_FEW = 4
# Examples a step of a matrix product whose groups each visit their own examples.
_STEP = 128
# Multiplications up to which that is not worth its loop.
_LITTLE = 2**25


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
  """Which examples count, and how much, in each group; and where this is computed."""

  weights: jax.Array  # (G, N)
  # Where no example is in two groups: the examples group by group, the group of each of these, and where each group
  # begins and ends among them.
  order: jax.Array | None = None  # (N,)
  group: jax.Array | None = None  # (N,)
  starts: jax.Array | None = None  # (G,)
  stops: jax.Array | None = None  # (G,)
  # "cpu", "gpu" or "tpu" where it is known.
  platform: str | None = dataclasses.field(default=None, metadata={"static": True})
  spread: _mesh.Spread | None = dataclasses.field(default=None, metadata={"static": True})

  @staticmethod
  def make(
    weights: jax.Array,
    disjoint: bool,
    platform: str | None = None,
    spread: _mesh.Spread | None = None,
  ) -> Groups:
    """Groups with these weights (G, N); examples without any weight come last."""
    if not disjoint:
      return Groups(weights, platform=platform, spread=spread)
    active = weights != 0
    group = jnp.where(jnp.any(active, axis=0), jnp.argmax(active, axis=0), len(weights))
    stops = jnp.cumsum(jnp.sum(active, axis=1))
    order = jnp.argsort(group)
    starts = jnp.concatenate([jnp.zeros_like(stops[:1]), stops[:-1]])
    return Groups(weights, order, group[order], starts, stops, platform, spread)

  def copies_of(self, value: jax.Array) -> jax.Array:
    """One for every example, (N, *shape), where the examples are."""
    copied = jnp.broadcast_to(value, (self.weights.shape[1], *value.shape))
    return self.spread.examples(copied) if self.spread else copied


# (data (N, ...), cotangent (N, ...), groups) -> sums of squares (G, *param.shape).
Contraction = Callable[[jax.Array, jax.Array, Groups], jax.Array]


def summed(
  contract: Contraction, shape: Sequence[int], data: jax.Array, g: jax.Array, groups: Groups
) -> jax.Array:
  """`contract`, whose result has `shape` (G, *param.shape), wherever the examples lie.

  On a mesh each device contracts its own examples, and the sum over devices goes straight to their parts of the result:
  only one param at a time is whole anywhere.
  """
  spread = groups.spread
  if spread is None:
    return contract(data, g, groups)
  names = spread.mesh.axis_names
  copied = tuple(name for name in names if name not in spread.sums)
  parts = math.prod(spread.mesh.shape[name] for name in spread.sums)
  axes = [axis for axis in range(1, len(shape)) if shape[axis] % parts == 0]
  axis = max(axes, key=lambda axis: shape[axis], default=None) if parts > 1 else None

  def local(data: jax.Array, g: jax.Array, weights: jax.Array) -> jax.Array:
    disjoint = groups.order is not None
    total = contract(data, g, Groups.make(weights, disjoint, groups.platform))
    if axis is None:
      return jax.lax.psum(total, names)
    return jax.lax.psum(
      jax.lax.psum_scatter(total, spread.sums, scatter_dimension=axis, tiled=True), copied
    )

  examples, whole = PartitionSpec(names), PartitionSpec(None, names)
  result = PartitionSpec(*[None] * axis, spread.sums) if axis is not None else PartitionSpec()
  mapped = jax.shard_map(
    local, mesh=spread.mesh, in_specs=(examples, examples, whole), out_specs=result
  )
  return mapped(data, g, groups.weights)


@jax.custom_vjp
def copies(value: jax.Array, squares: jax.Array, groups: Groups) -> jax.Array:
  """Give every example a copy of its own of a param, (N, *shape): the copy's cotangent is that example's gradient."""
  return groups.copies_of(value)


def _copies_forward(value: jax.Array, squares: jax.Array, groups: Groups) -> tuple[jax.Array, Any]:
  return groups.copies_of(value), dataclasses.replace(
    groups, weights=groups.weights.astype(squares.dtype)
  )


def _copies_backward(groups: Groups, g: jax.Array) -> tuple[Any, ...]:
  contract = lambda _, g, groups: _weighted_sum(
    groups.weights, jnp.square(g.astype(groups.weights.dtype))
  )
  return None, summed(contract, (len(groups.weights), *g.shape[1:]), g, g, groups), None


copies.defvjp(_copies_forward, _copies_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def tap(
  contract: Contraction, output: jax.Array, data: jax.Array, squares: jax.Array, groups: Groups
) -> jax.Array:
  """Return `output`; its cotangent and `data` are contracted into the cotangent of `squares` on the way back."""
  return output


def _tap_forward(
  contract: Contraction, output: Any, data: Any, squares: Any, groups: Groups
) -> tuple[jax.Array, Any]:
  return output, (data, dataclasses.replace(groups, weights=groups.weights.astype(squares.dtype)))


def _tap_backward(contract: Contraction, residuals: Any, g: jax.Array) -> tuple[Any, ...]:
  return g, None, contract(residuals[0], g, residuals[1]), None


tap.defvjp(_tap_forward, _tap_backward)


@partial(jax.jit, static_argnums=(3, 4, 5, 6))
def dot_general(
  data: jax.Array,
  g: jax.Array,
  groups: Groups,
  shape: Sequence[int],
  numbers: Any,
  param_first: bool,
  precision: Any,
) -> jax.Array:
  """The `Contraction` of a `dot_general` equation of one example, whose param has `shape`."""
  (left, right), (left_batch, right_batch) = numbers
  if param_first:
    left, right, left_batch, right_batch = right, left, right_batch, left_batch
  free = [i for i in range(len(shape)) if i not in (*right, *right_batch)]
  sizes = lambda axes: [shape[i] for i in axes]
  batch, width, outputs = (math.prod(sizes(axes)) for axes in (right_batch, right, free))

  def inputs_of(data: jax.Array) -> jax.Array:
    """(N, batch, positions, width)."""
    positions = [i for i in range(data.ndim - 1) if i not in (*left, *left_batch)]
    data = data.transpose(0, *(1 + i for i in (*left_batch, *positions, *left)))
    return data.reshape(len(data), batch, -1, width)

  if param_first:  # the output is (batch, free, positions)
    num_batch, num_free = 1 + len(right_batch), len(free)
    g = g.transpose(
      *range(num_batch),
      *range(num_batch + num_free, g.ndim),
      *range(num_batch, num_batch + num_free),
    )
  total = _squared_products(
    inputs_of, width, data, g.reshape(len(g), batch, -1, outputs), groups, precision
  )
  order = (*right_batch, *right, *free)
  total = total.reshape(len(total), *sizes(order))
  return total.transpose(0, *(1 + int(i) for i in np.argsort(order)))


class ConvGeometry(NamedTuple):
  """The settings of a `conv_general_dilated` equation whose batch_group_count is 1; see `jax.lax`."""

  numbers: Any
  parts: int  # feature_group_count
  stride: tuple[int, ...]
  padding: tuple[tuple[int, int], ...]
  input_dilation: tuple[int, ...]
  kernel_dilation: tuple[int, ...]
  precision: Any

  @staticmethod
  def of(equation: Any) -> ConvGeometry:
    """Read the settings of an equation."""
    names = (
      "dimension_numbers",
      "feature_group_count",
      "window_strides",
      "padding",
      "lhs_dilation",
      "rhs_dilation",
    )
    return ConvGeometry(*(equation.params[name] for name in (*names, "precision")))


@partial(jax.jit, static_argnums=(3, 4))
def convolution(
  data: jax.Array, g: jax.Array, groups: Groups, shape: Sequence[int], geometry: ConvGeometry
) -> jax.Array:
  """The `Contraction` of a convolution of one example whose kernel has `shape`."""
  numbers, parts, stride, dilation = (
    geometry.numbers,
    geometry.parts,
    geometry.stride,
    geometry.kernel_dilation,
  )
  outputs, part_features, *spatial = (shape[i] for i in numbers.rhs_spec)
  features, taps = part_features * parts, math.prod(spatial)
  padding = [
    (low, high, d - 1)
    for (low, high), d in zip(geometry.padding, geometry.input_dilation, strict=True)
  ]
  offsets = np.array(
    [[o * d for o, d in zip(tap, dilation, strict=True)] for tap in np.ndindex(*spatial)], np.int32
  )

  def inputs_of(data: jax.Array) -> jax.Array:
    """Patches (N, parts, positions, taps * part_features), tap by tap: no convolution stands inside a loop."""
    x = _channels_last(data, numbers.lhs_spec)
    x = jax.lax.pad(
      x.reshape(-1, *x.shape[2:]), jnp.zeros((), x.dtype), [(0, 0, 0), *padding, (0, 0, 0)]
    )
    reach = [(k - 1) * d for k, d in zip(spatial, dilation, strict=True)]
    window = [
      (size - r - 1) // s * s + 1 for size, r, s in zip(x.shape[1:], reach, stride, strict=False)
    ]

    def put(index: jax.Array, patches: jax.Array) -> jax.Array:
      start, zero = _row(jnp.asarray(offsets), index)[0], jnp.int32(0)
      from_start = {"allow_negative_indices": False}
      seen = jax.lax.dynamic_slice(
        x, (zero, *start, zero), (len(x), *window, features), **from_start
      )
      seen = jax.lax.slice(seen, [0] * seen.ndim, seen.shape, (1, *stride, 1)).reshape(
        len(x), -1, 1, features
      )
      return jax.lax.dynamic_update_slice(patches, seen, (zero, zero, index, zero), **from_start)

    positions = math.prod((w - 1) // s + 1 for w, s in zip(window, stride, strict=True))
    if tuple(spatial) == tuple(stride) and all(
      d == 1 for d in dilation
    ):  # side by side, as a ViT's
      counts = [size // k for size, k in zip(x.shape[1:], spatial, strict=False)]
      x = x[(slice(None), *(slice(n * k) for n, k in zip(counts, spatial, strict=True)))]
      x = x.reshape(
        len(x), *(size for pair in zip(counts, spatial, strict=True) for size in pair), features
      )
      axes = range(1, 1 + 2 * len(spatial))
      patches = x.transpose(0, *axes[::2], *axes[1::2], x.ndim - 1).reshape(
        len(x), positions, taps, features
      )
    else:
      patches = _mesh.zeros((len(x), positions, taps, features), x.dtype, x)
      patches = (
        put(jnp.int32(0), patches)
        if taps == 1
        else jax.lax.fori_loop(jnp.int32(0), jnp.int32(taps), put, patches)
      )
    if parts == 1:
      return patches.reshape(len(data), 1, -1, taps * features)
    patches = patches.reshape(len(data), -1, taps, parts, part_features)
    return patches.transpose(0, 3, 1, 2, 4).reshape(len(data), parts, -1, taps * part_features)

  g = _channels_last(g, numbers.out_spec)
  g = jnp.moveaxis(g.reshape(len(g), -1, parts, outputs // parts), 2, 1)
  total = _squared_products(inputs_of, taps * part_features, data, g, groups, geometry.precision)
  # The axes (G, parts, *spatial, part_features, outputs / parts) in the order of the kernel's, parts beside outputs.
  total = total.reshape(len(total), parts, *spatial, part_features, outputs // parts)
  last = total.ndim - 1
  axes = {numbers.rhs_spec[0]: (1, last), numbers.rhs_spec[1]: (last - 1,)}
  axes |= {axis: (2 + index,) for index, axis in enumerate(numbers.rhs_spec[2:])}
  return total.transpose(0, *(i for axis in range(len(shape)) for i in axes[axis])).reshape(
    len(total), *shape
  )


@partial(jax.jit, static_argnums=3)
def lookup(data: jax.Array, g: jax.Array, groups: Groups, shape: Sequence[int]) -> jax.Array:
  """The `Contraction` of taking rows `data` (N, T) of a table of `shape` (rows, *row): repeats in an example add up.

  The row `rows`, which is not there, has no gradient.
  """

  def add(total: jax.Array, example: Any) -> tuple[jax.Array, None]:
    taken, g, weights = example
    same = taken[:, None] == taken[None]
    first = jnp.argmax(same, axis=1) == jnp.arange(len(taken))
    sums = jnp.matmul(same.astype(total.dtype), g, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.where(first[:, None], jnp.square(sums), 0)
    return total.at[:, taken].add(weights[:, None, None] * squares, mode="drop"), None

  weights, rows, width = groups.weights, shape[0], math.prod(shape[1:])
  g = g.reshape(*data.shape, width).astype(weights.dtype)
  total, _ = jax.lax.scan(
    add, _mesh.zeros((len(weights), rows, width), weights.dtype, (weights, g)), (data, g, weights.T)
  )
  return total.reshape(len(weights), *shape)


def _squared_products(
  inputs_of: Callable[[jax.Array], jax.Array],
  width: int,
  data: jax.Array,
  g: jax.Array,
  groups: Groups,
  precision: Any,
) -> jax.Array:
  """sum_n w_n (A_n^T g_n)^2 with A = inputs_of(data) (N, B, T, K = width) and g (N, B, T, O): (G, B, K, O).

  One position: the square of a product is the product of squares, one matrix product for all examples. Several: the
  gradient of this one param, one example (on CPU, where it stays in the cache) or a few at a time.
  """
  num, batch, positions, outputs = g.shape
  shape, wide = (batch, width, outputs), groups.weights.dtype
  zeros = lambda num_groups: _mesh.zeros((num_groups, *shape), wide, (groups, data, g))

  def at_once(data: jax.Array, g: jax.Array, groups: Groups) -> jax.Array:
    inputs, cotangents = (jnp.square(x[:, :, 0]) for x in (inputs_of(data), g))
    return _weighted_outer_products(groups.weights, inputs, cotangents)

  def by_group(data: jax.Array, g: jax.Array, groups: Groups) -> jax.Array:
    """Each group visits its own examples, some at a time; one that holds nearly all has one product over all examples."""
    counts = groups.stops - groups.starts  # type: ignore[operator]
    largest = jnp.argmax(counts)
    whole = 4 * jnp.max(counts) >= 3 * num
    steps = jnp.where((jnp.arange(len(counts)) == largest) & whole, 0, -(-counts // _STEP))
    ends = jnp.sum(
      jnp.where(jnp.tri(len(steps), dtype=bool), steps, 0), axis=1
    )  # of each group's steps among all
    taken = lambda x, rows: x.at[rows].get(mode="promise_in_bounds")

    def add(step: jax.Array, total: jax.Array) -> jax.Array:
      group = jnp.sum(step >= ends)
      at = groups.stops[group] + (step - ends[group]) * _STEP + jnp.arange(_STEP)  # type: ignore[index]
      rows = taken(groups.order, jnp.maximum(at, 0))  # none before the group's own weighs in it
      weights = jnp.where(at >= 0, taken(_row(groups.weights, group)[0], rows), 0)
      added = at_once(taken(data, rows), taken(g, rows), Groups(weights[None]))
      return _with_row(total, _row(total, group) + added, group)

    of_largest = lambda: at_once(data, g, Groups(_row(groups.weights, largest)))
    empty = zeros(len(groups.weights))
    once = jax.lax.fori_loop(
      0, whole.astype(jnp.int32), lambda _, total: _with_row(total, of_largest(), largest), empty
    )
    return jax.lax.fori_loop(0, ends[-1], add, once)

  def squares(data: jax.Array, g: jax.Array) -> jax.Array:
    """Of each example's gradient, (n, *shape)."""
    gradients = jnp.einsum(
      "nbtk,nbto->nbko", inputs_of(data), g, precision=precision, preferred_element_type=wide
    )
    return jnp.square(gradients)

  def by_example(data: jax.Array, g: jax.Array, groups: Groups) -> jax.Array:
    """One example after the other, added to the groups it belongs to."""

    def add(index: jax.Array, total: jax.Array) -> jax.Array:
      row = index if groups.order is None else _row(groups.order, index)[0]
      added = squares(_row(data, row), _row(g, row))
      weights = _row(groups.weights, row, axis=1)  # (G, 1)
      if groups.order is None:
        return total + weights[:, :, None, None] * added
      group = _row(groups.group, index)[0]
      return _with_row(total, _row(total, group) + _row(weights, group)[0, 0] * added, group)

    stop = num if groups.stops is None else groups.stops[-1]
    return jax.lax.fori_loop(0, stop, add, zeros(len(groups.weights)))

  def in_chunks(data: jax.Array, g: jax.Array, groups: Groups) -> jax.Array:
    """As many examples at a time as the chunk holds gradients of."""
    chunk = max(1, min(num, _CHUNK_BYTES // (wide.itemsize * math.prod(shape))))
    padding = -num % chunk  # rows of zeros, at weight zero
    cut = lambda x: jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)).reshape(
      -1, chunk, *x.shape[1:]
    )
    add = lambda total, part: (total + _weighted_sum(part[2].T, squares(part[0], part[1])), None)
    return jax.lax.scan(
      add, zeros(len(groups.weights)), (cut(data), cut(g), cut(groups.weights.T))
    )[0]

  if positions == 1:
    data, g = _of_like_size(data.astype(wide), g.astype(wide))
  little = num <= _STEP or num * len(groups.weights) * math.prod(shape) <= _LITTLE
  if positions == 1 and (little or groups.order is None or len(groups.weights) == 1):
    return at_once(data, g, groups)
  cpu, default = (by_group, at_once) if positions == 1 else (by_example, in_chunks)
  if groups.platform is None:
    return jax.lax.platform_dependent(data, g, groups, cpu=cpu, default=default)
  return (cpu if groups.platform == "cpu" else default)(data, g, groups)  # half the tracing


def _of_like_size(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
  """a (N, ...) and b (N, ...), each example's times a power of two and over it, so that the squares of both are in range.

  Their products stay as they are. One that is all zero counts as the smallest: the other comes far down.
  """
  exponent = lambda x: _trees.exponent(jnp.max(jnp.abs(x), axis=tuple(range(1, x.ndim))))
  half = jnp.clip((exponent(b) - exponent(a)) >> 1, -126, 126)
  times = lambda x, power: x * _trees.power_of_two(power, x.dtype).reshape(-1, *[1] * (x.ndim - 1))
  return times(a, half), times(b, -half)


def _weighted_outer_products(weights: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
  """sum_n w_gn a_nbk b_nbo: (G, N), (N, B, K), (N, B, O) -> (G, B, K, O), in the layout it is computed in."""
  product = lambda a, b: jax.lax.dot_general(
    a, b, (((0,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST
  )
  weigh = lambda x: weights.T[:, None, :, None] * x[:, :, None]  # (N, B, G, ...)
  if b.shape[2] < a.shape[2]:  # weigh the smaller one
    return jnp.moveaxis(jax.vmap(product, 1)(a, weigh(b)), 2, 0)
  weighted = weigh(a)
  if a.shape[1] == 1:
    return product(weighted[:, 0], b[:, 0])[:, None]
  return jnp.swapaxes(jax.vmap(product, 1)(weighted, b), 0, 1)


# Where it is known that no index counts from the end, the program need not ask; there are many, and each asks.
_row = partial(jax.lax.dynamic_index_in_dim, allow_negative_indices=False)
_with_row = partial(jax.lax.dynamic_update_index_in_dim, axis=0, allow_negative_indices=False)


def _channels_last(x: jax.Array, spec: Sequence[int]) -> jax.Array:
  """(N, ...) in the layout `spec` of one example -> (N, batch, *spatial, features)."""
  return x.transpose(0, 1 + spec[0], *(1 + i for i in spec[2:]), 1 + spec[1])


def _weighted_sum(weights: jax.Array, squares: jax.Array) -> jax.Array:
  """sum_n w_gn s_n: (G, N), (N, ...) -> (G, ...)."""
  if (
    squares.size <= _SMALL or len(squares) <= _FEW
  ):  # one loop: compiles faster, and a product of few rows is slow
    return jnp.sum(
      weights.reshape(*weights.shape, *(1,) * (squares.ndim - 1)) * squares[None], axis=1
    )
  return jnp.einsum("gn,n...->g...", weights, squares, precision=jax.lax.Precision.HIGHEST)


def dummy(leaf: jax.Array, weights: jax.Array) -> jax.Array:
  """The zeros (G, *leaf.shape) that go with a param, of the dtype that its squares are summed in."""
  return _mesh.zeros(
    (len(weights), *leaf.shape), _trees.at_least_float32(leaf.dtype), (leaf, weights)
  )
