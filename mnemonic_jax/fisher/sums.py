"""Sums of squared per-example gradients of one leaf: what a backward pass does where it meets data.

Each operation on a leaf and data takes two dummies beside the leaf, on which its result does not
depend. The cotangent of `squares` (G, *leaf.shape) is *defined* to be the weighted sum of squared
per-example gradients, in units of 4**e; that of `unit` is e. So `jax.vjp` with respect to the
dummies is the Fisher, and scan, remat and cond need no rules of their own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mnemonic_jax import _mesh, _trees

# Bytes of per-example gradients, and of what they are made from, that a contraction holds at once.
CHUNK_BYTES = 2**26
# Numbers up to which a weighted sum is no matrix product, which compiles slower.
_SMALL = 2**17
# Examples up to which it is none either: a TPU multiplies blocks of many rows, even for a few.
_FEW = 4
# Examples a step of a matrix product whose groups each visit their own examples.
_STEP = 128
# Multiplications up to which that is not worth its loop.
_LITTLE = 2**25
# The product of an example's largest data and cotangent is brought to about 2**this: its square
# leaves room for sums above, and below for products of 2**-100 of it.
_TARGET = 40
# The unit of a leaf that no contraction has reached.
LOWEST_UNIT = -2048


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
  """Which examples count, and how much, in each group; and where this is computed."""

  weights: jax.Array  # (G, N)
  # Where no example is in two groups: the examples group by group, the group of each of these, and
  # where each group begins and ends among them.
  order: jax.Array | None = None  # (N,)
  group: jax.Array | None = None  # (N,)
  starts: jax.Array | None = None  # (G,)
  stops: jax.Array | None = None  # (G,)
  # "cpu", "gpu" or "tpu" where it is known.
  platform: str | None = dataclasses.field(default=None, metadata={"static": True})
  spread: _mesh.Spread | None = dataclasses.field(default=None, metadata={"static": True})
  # Mesh axes over which a maximum is taken, inside a shard_map of ours.
  axes: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})

  @staticmethod
  def make(weights: jax.Array, disjoint: bool, **settings: Any) -> Groups:
    """Make groups with these weights (G, N); examples without any weight come last."""
    if not disjoint:
      return Groups(weights, **settings)
    active = weights != 0
    group = jnp.where(jnp.any(active, axis=0), jnp.argmax(active, axis=0), len(weights))
    stops = jnp.cumsum(jnp.sum(active, axis=1))
    order = jnp.argsort(group)
    starts = jnp.concatenate([jnp.zeros_like(stops[:1]), stops[:-1]])
    return Groups(weights, order, group[order], starts, stops, **settings)

  def copies_of(self, value: jax.Array) -> jax.Array:
    """Return one for every example, (N, *shape), where the examples are."""
    copied = jnp.broadcast_to(value, (self.weights.shape[1], *value.shape))
    return self.spread.examples(copied) if self.spread else copied

  def only_active(self, x: jax.Array) -> jax.Array:
    """Return x (N, ...) with 0 for examples without any weight, whatever they hold."""
    active = jnp.any(self.weights != 0, axis=0)
    return jnp.where(active.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)

  def weighted_sum(self, squares: jax.Array) -> jax.Array:
    """Return sum_n w_gn s_n: (N, ...) -> (G, ...)."""
    squares = self.only_active(squares)
    if squares.size <= _SMALL or len(squares) <= _FEW:
      shape = *self.weights.shape, *(1,) * (squares.ndim - 1)
      return jnp.sum(self.weights.reshape(shape) * squares[None], axis=1)
    return jnp.einsum("gn,n...->g...", self.weights, squares, precision=jax.lax.Precision.HIGHEST)


# (data (N, ...), cotangent (N, ...), groups) -> sums (G, *leaf.shape).
Contraction = Callable[[jax.Array, jax.Array, Groups], jax.Array]


def in_range(contract: Contraction, fixed: bool) -> Any:
  """Give `contract` numbers in the middle of the range, and say in which unit it then sums.

  Each example's data and cotangent are brought there by powers of two of their own, which its
  weights undo. Returns a function (data, g, groups) -> (sums, e), the sums in units of 4**e.

  Args:
    fixed: whether e must be 0; then numbers stay as they are.
  """

  def scaled(data: jax.Array, g: jax.Array, groups: Groups) -> tuple[jax.Array, jax.Array]:
    if fixed:
      return contract(data, g, groups), jnp.zeros((), jnp.int32)
    data, g, unit = brought(data, g)
    groups, largest = weighed_in(groups, unit)
    return contract(data, g, groups), largest

  return scaled


def brought(data: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Bring each example's data and cotangent into the middle of the range; and the units (N,)."""
  if not jnp.issubdtype(data.dtype, jnp.floating):
    return data, *_brought_to(_TARGET, g)
  g, unit = _brought_to(_TARGET // 2, g)
  data, more = _brought_to(_TARGET // 2, data)
  return data, g, unit + more


def weighed_in(groups: Groups, unit: jax.Array) -> tuple[Groups, jax.Array]:
  """Weigh examples whose gradients are in units (N,) so that all are in the largest of them."""
  active = jnp.any(groups.weights != 0, axis=0)
  largest = jnp.max(jnp.where(active, unit, LOWEST_UNIT))
  largest = jax.lax.pmax(largest, groups.axes) if groups.axes else largest
  weights = groups.weights
  factors = jnp.square(_factors(unit - largest, weights.dtype))
  return dataclasses.replace(groups, weights=weights * factors[None]), largest


def shrunk(x: jax.Array, by: jax.Array) -> jax.Array:
  """Each example of x (N, ...) times 2**by, with by (N,) <= 0."""
  factors = _factors(by, _trees.at_least_float32(x.dtype)).astype(x.dtype)
  return x * factors.reshape(-1, *(1,) * (x.ndim - 1))


def _factors(by: jax.Array, dtype: Any) -> jax.Array:
  """2**by, and 0 where its square is out of range."""
  lowest = jnp.finfo(dtype).minexp // 2
  return jnp.where(by < lowest, 0, _trees.power_of_two(jnp.clip(by, lowest, 0), dtype))


def _brought_to(exponent: int, x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Bring each example's largest number near 2**exponent; also the exponents (N,) that undo it."""
  if x.dtype == jnp.float16:  # its range is too small to move in
    x = x.astype(jnp.float32)
  size = jnp.abs(x)
  finite = jnp.where(jnp.isfinite(size), size, 0).astype(_trees.at_least_float32(x.dtype))
  largest = jnp.max(finite, axis=tuple(range(1, x.ndim)), initial=0.0)
  by = jnp.clip(exponent - _trees.exponent(largest), -126, 126)
  factor = _trees.power_of_two(by, largest.dtype).astype(x.dtype)
  return x * factor.reshape(-1, *(1,) * (x.ndim - 1)), -by


def summed(
  contract: Any, shape: Sequence[int], data: jax.Array, g: jax.Array, groups: Groups
) -> tuple[jax.Array, jax.Array]:
  """Contract, wherever the examples lie: sums of `shape` (G, *leaf.shape), and their unit.

  On a mesh each device contracts its own examples, and the sum over devices goes straight to their
  parts of the result: only one leaf at a time is whole anywhere.
  """
  spread = groups.spread
  if spread is None:
    return contract(data, g, groups)
  names = spread.mesh.axis_names
  copied = tuple(name for name in names if name not in spread.sums)
  parts = math.prod(spread.mesh.shape[name] for name in spread.sums)
  axes = [axis for axis in range(1, len(shape)) if shape[axis] % parts == 0]
  axis = max(axes, key=lambda axis: shape[axis], default=None) if parts > 1 else None

  def local(data: jax.Array, g: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    disjoint = groups.order is not None
    own = Groups.make(weights, disjoint, platform=groups.platform, axes=tuple(names))
    total, unit = contract(data, g, own)
    if axis is None:
      return jax.lax.psum(total, names), unit
    scattered = jax.lax.psum_scatter(total, spread.sums, scatter_dimension=axis, tiled=True)
    return jax.lax.psum(scattered, copied), unit

  examples, whole = PartitionSpec(names), PartitionSpec(None, names)
  result = PartitionSpec(*[None] * axis, spread.sums) if axis is not None else PartitionSpec()
  mapped = jax.shard_map(
    local,
    mesh=spread.mesh,
    in_specs=(examples, examples, whole),
    out_specs=(result, PartitionSpec()),
  )
  return mapped(data, g, groups.weights)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def tap(
  contract: Any, output: jax.Array, data: jax.Array, squares: Any, unit: Any, groups: Groups
) -> jax.Array:
  """Return `output`; on the way back its cotangent and `data` become those of the dummies."""
  return output


def _tap_forward(
  contract: Any, output: Any, data: Any, squares: Any, unit: Any, groups: Groups
) -> tuple[jax.Array, Any]:
  groups = dataclasses.replace(groups, weights=groups.weights.astype(squares.dtype))
  return output, (data, groups, jnp.shape(unit))


def _tap_backward(contract: Any, residuals: Any, g: jax.Array) -> tuple[Any, ...]:
  data, groups, shape = residuals
  sums, unit = contract(data, g, groups)
  return g, None, sums, as_cotangent(unit, shape, g), None


tap.defvjp(_tap_forward, _tap_backward)


def as_cotangent(unit: jax.Array, shape: tuple[int, ...], g: jax.Array) -> jax.Array:
  """The cotangent of a dummy `unit`, which is 0 for a leaf that nothing has reached."""
  above = jnp.broadcast_to(unit - LOWEST_UNIT, shape).astype(jnp.float32)
  return _mesh.varying(above, _mesh.varying_axes(g))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def copies(contract: Any, value: jax.Array, squares: Any, unit: Any, groups: Groups) -> jax.Array:
  """Give every example a copy of its own of a leaf, (N, *shape).

  The cotangent of a copy is the gradient of its example, which `contract` squares and sums.
  """
  return groups.copies_of(value)


def _copies_forward(
  contract: Any, value: Any, squares: Any, unit: Any, groups: Groups
) -> tuple[jax.Array, Any]:
  groups = dataclasses.replace(groups, weights=groups.weights.astype(squares.dtype))
  return groups.copies_of(value), (groups, jnp.shape(unit))


def _copies_backward(contract: Any, residuals: Any, g: jax.Array) -> tuple[Any, ...]:
  groups, shape = residuals
  sums, unit = contract(jnp.zeros(len(g), jnp.int32), g, groups)
  return None, sums, as_cotangent(unit, shape, g), None


copies.defvjp(_copies_forward, _copies_backward)


def dummies(leaf: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Make the zeros that go with a leaf: `squares`, and a `unit` per slice of its first axis."""
  squares = (len(weights), *leaf.shape), _trees.at_least_float32(leaf.dtype)
  like = leaf, weights
  return _mesh.zeros(*squares, like), _mesh.zeros(leaf.shape[:1], jnp.float32, like)


def outer_products(data: jax.Array, g: jax.Array, groups: Groups) -> jax.Array:
  """sum_n w_n (a_n b_n^T)^2 with a (N, B, K) and b (N, B, O): (G, B, K, O).

  The square of a product is the product of squares: one matrix product for all examples. Where no
  example is in two groups each group visits its own, on CPU, and one that holds nearly all has one
  product over all.
  """
  num, batch, width = data.shape
  outputs, wide, num_groups = g.shape[2], groups.weights.dtype, len(groups.weights)
  little = num <= _STEP or num * num_groups * batch * width * outputs <= _LITTLE

  def at_once(data: jax.Array, g: jax.Array, groups: Groups) -> jax.Array:
    squares = (groups.only_active(jnp.square(x)) for x in (data, g))
    return _weighted_outer_products(groups.weights, *squares)

  def by_group(data: jax.Array, g: jax.Array, groups: Groups) -> jax.Array:
    counts = groups.stops - groups.starts  # type: ignore[operator]
    largest = jnp.argmax(counts)
    whole = 4 * jnp.max(counts) >= 3 * num
    steps = jnp.where((jnp.arange(num_groups) == largest) & whole, 0, -(-counts // _STEP))
    # Where each group's steps end among all.
    ends = jnp.sum(jnp.where(jnp.tri(num_groups, dtype=bool), steps, 0), axis=1)
    taken = lambda x, rows: x.at[rows].get(mode="promise_in_bounds")

    def add(step: jax.Array, total: jax.Array) -> jax.Array:
      group = jnp.sum(step >= ends)
      first = groups.stops[group] + (step - ends[group]) * _STEP  # type: ignore[index]
      at = first + jnp.arange(_STEP)
      rows = taken(groups.order, jnp.maximum(at, 0))  # none before the group's own weighs in it
      weights = jnp.where(at >= 0, taken(row(groups.weights, group)[0], rows), 0)
      added = at_once(taken(data, rows), taken(g, rows), Groups(weights[None]))
      return with_row(total, row(total, group) + added, group)

    of_largest = lambda: at_once(data, g, Groups(row(groups.weights, largest)))
    empty = _mesh.zeros((num_groups, batch, width, outputs), wide, (groups, data, g))
    put = lambda _, total: with_row(total, of_largest(), largest)
    once = jax.lax.fori_loop(0, whole.astype(jnp.int32), put, empty)
    return jax.lax.fori_loop(0, ends[-1], add, once)

  data, g = data.astype(wide), g.astype(wide)
  if little or groups.order is None or num_groups == 1:
    return at_once(data, g, groups)
  return on_platform(groups, by_group, at_once, data, g)


def accumulate(
  gradients: Callable[[Any, jax.Array], jax.Array],
  data: Any,
  g: jax.Array,
  groups: Groups,
  shape: Sequence[int],
  bytes_each: int,
) -> jax.Array:
  """sum_n w_n gradients(data_n, g_n)^2: (G, *shape), a few examples at a time.

  Args:
    gradients: (data (n, ...), g (n, ...)) -> (n, *shape), of each example.
    data: an array, or a tree of arrays, with leading axis N.
    bytes_each: what the gradient of one example takes, with what it is made from. On CPU there is
      one at a time, which stays in the cache; elsewhere as many as `CHUNK_BYTES` holds.
  """
  num, wide = len(g), groups.weights.dtype
  zeros = _mesh.zeros((len(groups.weights), *shape), wide, (groups, data, g))
  squares = lambda data, g: jnp.square(gradients(data, g).astype(wide))
  along = lambda weights: weights.reshape(-1, *(1,) * len(shape))

  def by_example(data: Any, g: jax.Array, groups: Groups) -> jax.Array:
    def add(index: jax.Array, total: jax.Array) -> jax.Array:
      at = index if groups.order is None else row(groups.order, index)[0]
      added = squares(jax.tree.map(lambda x: row(x, at), data), row(g, at))
      weights = row(groups.weights, at, axis=1)  # (G, 1)
      if groups.order is None:
        return total + jnp.where(along(weights) == 0, 0, along(weights) * added)
      group = row(groups.group, index)[0]
      return with_row(total, row(total, group) + row(weights, group)[0, 0] * added, group)

    stop = num if groups.stops is None else groups.stops[-1]
    return jax.lax.fori_loop(0, stop, add, zeros)

  def in_chunks(data: Any, g: jax.Array, groups: Groups) -> jax.Array:
    chunk = max(1, min(num, CHUNK_BYTES // max(bytes_each, 1)))
    padding = -num % chunk  # rows of zeros, at weight zero

    def cut(x: jax.Array) -> jax.Array:
      padded = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
      return padded.reshape(-1, chunk, *x.shape[1:])

    def add(total: jax.Array, part: Any) -> tuple[jax.Array, None]:
      data, g, weights = part
      return total + Groups(weights.T).weighted_sum(squares(data, g)), None

    parts = jax.tree.map(cut, (data, g, groups.weights.T))
    return jax.lax.scan(add, zeros, parts)[0]

  return on_platform(groups, by_example, in_chunks, data, g)


def on_platform(groups: Groups, cpu: Any, default: Any, data: Any, g: jax.Array) -> jax.Array:
  """Contract in the way of the platform; half the tracing where that is known."""
  if groups.platform is None:
    return jax.lax.platform_dependent(data, g, groups, cpu=cpu, default=default)
  return (cpu if groups.platform == "cpu" else default)(data, g, groups)


def _weighted_outer_products(weights: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
  """sum_n w_gn a_nbk b_nbo: (G, N), (N, B, K), (N, B, O) -> (G, B, K, O), as it is computed."""
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


# No index here counts from the end, so the program need not ask; there are many, and each asks.
row = partial(jax.lax.dynamic_index_in_dim, allow_negative_indices=False)
with_row = partial(jax.lax.dynamic_update_index_in_dim, axis=0, allow_negative_indices=False)
