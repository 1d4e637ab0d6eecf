"""Matrix products, and all that `dot_general` is: a leaf multiplied with data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax.fisher import sums
from mnemonic_jax.fisher.sums import Groups


class Product:
  """The contraction of a `dot_general` equation of one example, whose operand `index` is a leaf.

  The leaf is seen as (batch, width, outputs), the data as (batch, positions, width).
  """

  name = "product"

  def __init__(self, equation: Any, index: int) -> None:
    self.index, self.data_index = index, 1 - index
    self.shape = tuple(equation.invars[index].aval.shape)
    self.precision = equation.params["precision"]
    contracted, batched = equation.params["dimension_numbers"]
    # Contracted axes in the order of the leaf's, whatever that of the equation.
    pairs = sorted(zip(contracted[index], contracted[1 - index], strict=True))
    self._width_axes, self.read = [axis for axis, _ in pairs], [axis for _, axis in pairs]
    self._batch_axes, self.data_batch = batched[index], batched[1 - index]
    taken = (*self._width_axes, *self._batch_axes)
    self._free = [axis for axis in range(len(self.shape)) if axis not in taken]
    sizes = lambda axes: [self.shape[axis] for axis in axes]
    self._order = (*self._batch_axes, *self._width_axes, *self._free)
    self.batch, self.width, self.outputs = (
      math.prod(sizes(axes)) for axes in (self._batch_axes, self._width_axes, self._free)
    )
    data = equation.invars[1 - index].aval.shape
    self.positions = math.prod(data) // max(self.batch * self.width, 1)
    # The result is (batch, left free, right free): where the channels that the leaf makes are.
    first = len(self._batch_axes) if index == 0 else equation.outvars[0].aval.ndim - len(self._free)
    self.written = range(first, first + len(self._free))

  @staticmethod
  def fits(equation: Any, params: Sequence[int], kinds: Sequence[Any]) -> bool:
    """Whether the equation multiplies one leaf with data."""
    return len(params) == 1 and kinds[1 - params[0]] == "data"

  misfit = "multiplied with no data"

  @property
  def groups(self) -> int:
    """Groups of channels that do not mix."""
    return self.batch

  @property
  def leaf_axes(self) -> tuple[list[int], list[int]]:
    """The axes of the leaf that are contracted, and those that stay."""
    return self._width_axes, self._free

  @property
  def held(self) -> int:
    """Numbers held at a time, whatever the microbatch."""
    return 0 if self.positions == 1 else math.prod(self.shape)

  def held_each(self, num_groups: int) -> int:
    """Numbers held for each example of the microbatch."""
    smaller = min(self.width, self.outputs) * self.batch
    return num_groups * smaller if self.positions == 1 else 0

  @property
  def flops(self) -> int:
    """Of one example: its gradient, the square and the sum."""
    return 2 * math.prod(self.shape) * (self.positions + 1)

  def gradients(self, data: jax.Array, g: jax.Array) -> jax.Array:
    """(n, *data), (n, *result) -> (n, *shape), the gradient of each example."""
    made = jnp.einsum(
      "nbtk,nbto->nbko",
      self._inputs(data),
      self._outputs(g),
      precision=self.precision,
      preferred_element_type=jnp.promote_types(g.dtype, jnp.float32),
    )
    return self._as_leaf(made)

  def data_of(self, operand: jax.Array) -> jax.Array:
    """What is kept of the data's operand (N, ...)."""
    return operand

  def contract(self, data: jax.Array, g: jax.Array, groups: Groups) -> jax.Array:
    """Sums (G, *shape) over examples (N, ...)."""
    return _contract(self, data, g, groups)

  def _inputs(self, data: jax.Array) -> jax.Array:
    """(n, *data) -> (n, batch, positions, width)."""
    taken = (*self.read, *self.data_batch)
    positions = [axis for axis in range(data.ndim - 1) if axis not in taken]
    data = data.transpose(0, *(1 + axis for axis in (*self.data_batch, *positions, *self.read)))
    return data.reshape(len(data), self.batch, -1, self.width)

  def _outputs(self, g: jax.Array) -> jax.Array:
    """(n, *result) -> (n, batch, positions, outputs)."""
    if self.index == 0:  # the result is (batch, free, positions)
      batch, free = 1 + len(self._batch_axes), len(self._free)
      free_axes, rest = range(batch, batch + free), range(batch + free, g.ndim)
      g = g.transpose(*range(batch), *rest, *free_axes)
    return g.reshape(len(g), self.batch, -1, self.outputs)

  def _as_leaf(self, made: jax.Array) -> jax.Array:
    """(n, batch, width, outputs) -> (n, *shape)."""
    made = made.reshape(len(made), *(self.shape[axis] for axis in self._order))
    return made.transpose(0, *(1 + int(axis) for axis in np.argsort(self._order)))

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Product) and vars(self) == vars(other)

  def __hash__(self) -> int:
    return hash((self.shape, self.index, self._order))


@partial(jax.jit, static_argnums=0)
def _contract(rule: Product, data: jax.Array, g: jax.Array, groups: Groups) -> jax.Array:
  if rule.positions > 1:
    bytes_each = rule.held * groups.weights.dtype.itemsize
    return sums.accumulate(rule.gradients, data, g, groups, rule.shape, bytes_each)
  inputs, outputs = rule._inputs(data)[:, :, 0], rule._outputs(g)[:, :, 0]
  return rule._as_leaf(sums.outer_products(inputs, outputs, groups))
