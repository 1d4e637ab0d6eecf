"""Lookups: whole rows of a table taken by number, as an embedding does, in any batching."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mnemonic_jax import _mesh
from mnemonic_jax.fisher import sums
from mnemonic_jax.fisher.sums import Groups

_CLIPS = jax.lax.GatherScatterMode.CLIP


class Lookup:
  """The contraction of a gather, or a dynamic slice, of whole rows of a leaf.

  Its data are the rows (tokens,) of an example. The row `rows` does not exist: no gradient.
  """

  name = "lookup"
  read = written = None
  groups = 1
  leaf_axes: tuple[list[int], list[int]] = ([], [])  # no channels are mixed
  index, data_index = 0, 1
  positions = 1

  def __init__(self, equation: Any, index: int) -> None:
    table, out = equation.invars[0].aval, equation.outvars[0].aval
    self.shape = tuple(table.shape)
    self.rows, self.width = self.shape[0], math.prod(self.shape[1:])
    self.tokens = math.prod(out.shape) // max(self.width, 1)
    self._clips, self._row_of_index, self._slice_axes = True, None, tuple(range(out.ndim))
    if equation.primitive.name == "gather":
      numbers = equation.params["dimension_numbers"]
      self._clips = equation.params["mode"] == _CLIPS
      self._row_of_index = tuple(numbers.start_index_map).index(0)
      self._slice_axes = tuple(numbers.offset_dims)

  @staticmethod
  def fits(equation: Any, params: Sequence[int], kinds: Sequence[Any]) -> bool:
    """Whether the equation takes whole rows of one leaf, at places that are data."""
    if params != [0] or kinds[1] != "data":
      return False
    sizes, table = tuple(equation.params["slice_sizes"]), equation.invars[0].aval
    whole_rows = bool(table.shape) and sizes == (1, *table.shape[1:])
    if equation.primitive.name == "dynamic_slice":
      return whole_rows
    numbers = equation.params["dimension_numbers"]
    places = tuple(numbers.start_index_map)
    # An index into an axis that is taken whole can only be 0, if it is clipped.
    settled = places == (0,) or (0 in places and equation.params["mode"] == _CLIPS)
    return whole_rows and settled and not numbers.operand_batching_dims

  misfit = "gathered from in an unusual way"

  @property
  def held(self) -> int:
    """Numbers held at a time, whatever the microbatch."""
    return min(self.rows, 3 * self.tokens) * self.width

  def held_each(self, num_groups: int) -> int:
    """Numbers held for each example of the microbatch."""
    return 0

  @property
  def flops(self) -> int:
    """Of one example: its gradient, the square and the sum."""
    return 4 * min(self.rows, self.tokens) * self.width

  def data_of(self, operand: jax.Array) -> jax.Array:
    """(n, *indices) -> (n, tokens) int32, the row `rows` for one that is not there."""
    if self._row_of_index is not None:
      operand = operand[..., self._row_of_index]
    operand = operand.reshape(len(operand), -1)
    largest = min(self.rows - 1, int(jnp.iinfo(operand.dtype).max))
    clipped = jnp.clip(operand, 0, jnp.asarray(largest, operand.dtype))
    there = clipped.astype(jnp.int32)
    if self._clips:
      return there
    return jnp.where(operand == clipped, there, jnp.int32(self.rows))

  def gradients(self, data: jax.Array, g: jax.Array) -> jax.Array:
    """(n, tokens), (n, *result) -> (n, *shape), the gradient of each example."""
    g, tables = self._outputs(g), jnp.zeros((self.rows, self.width), g.dtype)
    add = lambda taken, g: tables.at[taken].add(g, mode="drop")
    return jax.vmap(add)(data, g).reshape(-1, *self.shape)

  def contract(self, data: jax.Array, g: jax.Array, groups: Groups) -> jax.Array:
    """Sums (G, *shape) over examples (N, ...)."""
    return _contract(self, data, g, groups)

  def _outputs(self, g: jax.Array) -> jax.Array:
    """(n, *result) -> (n, tokens, width)."""
    slices = [1 + axis for axis in self._slice_axes]
    others = [axis for axis in range(1, g.ndim) if axis not in slices]
    return g.transpose(0, *others, *slices).reshape(len(g), -1, self.width)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Lookup) and vars(self) == vars(other)

  def __hash__(self) -> int:
    return hash((self.shape, self.tokens, self._clips, self._slice_axes))


@partial(jax.jit, static_argnums=0)
def _contract(rule: Lookup, data: jax.Array, g: jax.Array, groups: Groups) -> jax.Array:
  weights = groups.weights
  if rule.rows <= 2 * rule.tokens:  # a whole gradient is no larger than what is looked up
    bytes_each = rule.held * weights.dtype.itemsize
    wide = g.astype(weights.dtype)
    return sums.accumulate(rule.gradients, data, wide, groups, rule.shape, bytes_each)
  g = rule._outputs(g).astype(weights.dtype)

  def add(total: jax.Array, example: Any) -> tuple[jax.Array, None]:
    """Sum what an example has for the same row, then square: its rows sorted, run by run."""
    taken, g, weights = example
    order = jnp.argsort(taken)
    taken = taken[order]
    starts = jnp.concatenate([jnp.ones(1, bool), taken[1:] != taken[:-1]])
    run = jnp.cumsum(starts) - 1
    of_run = jnp.zeros_like(g).at[run].add(g[order])
    row = jnp.full_like(taken, rule.rows).at[run].set(taken)
    weights = weights[:, None, None]
    squares = jnp.where(weights == 0, 0, weights * jnp.square(of_run)[None])
    return total.at[:, row].add(squares, mode="drop"), None

  shape = len(weights), rule.rows, rule.width
  empty = _mesh.zeros(shape, weights.dtype, (weights, g))
  total, _ = jax.lax.scan(add, empty, (data, g, weights.T))
  return total.reshape(len(weights), *rule.shape)
