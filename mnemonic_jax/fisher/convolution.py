"""Convolutions: a kernel convolved with data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax import _mesh
from mnemonic_jax.fisher import sums
from mnemonic_jax.fisher.sums import Groups


class Convolution:
  """The contraction of a `conv_general_dilated` equation of one example, whose kernel is a leaf.

  The kernel is seen as (parts, taps * features of a part, outputs of a part), and the data as the
  patches (parts, positions, taps * features of a part) that it meets.
  """

  name = "convolution"

  def __init__(self, equation: Any, index: int) -> None:
    params = equation.params
    self.index, self.data_index = index, 1 - index
    self.shape = tuple(equation.invars[index].aval.shape)
    self.numbers, self.precision = params["dimension_numbers"], params["precision"]
    self.parts, self.stride = params["feature_group_count"], params["window_strides"]
    self.padding, self.dilation = params["padding"], params["rhs_dilation"]
    self.input_dilation = params["lhs_dilation"]
    self.read, self.written = (self.numbers.lhs_spec[1],), (self.numbers.out_spec[1],)
    outputs, self.part_features, *self.spatial = (self.shape[i] for i in self.numbers.rhs_spec)
    self.part_outputs = outputs // self.parts
    self.taps, self.features = math.prod(self.spatial), self.part_features * self.parts
    batch, _, *positions = (equation.outvars[0].aval.shape[i] for i in self.numbers.out_spec)
    self.positions = math.prod((batch, *positions))

  @staticmethod
  def fits(equation: Any, params: Sequence[int], kinds: Sequence[Any]) -> bool:
    """Whether the equation convolves data with one leaf as the kernel."""
    return params == [1] and kinds[0] == "data" and equation.params["batch_group_count"] == 1

  misfit = "convolved in an unusual way"

  @property
  def groups(self) -> int:
    """Groups of channels that do not mix."""
    return self.parts

  @property
  def leaf_axes(self) -> tuple[list[int], list[int]]:
    """The axes of the leaf that count features, and outputs."""
    return [self.numbers.rhs_spec[1]], [self.numbers.rhs_spec[0]]

  @property
  def held(self) -> int:
    """Numbers held at a time for any microbatch: a gradient, and the patches it is made of."""
    return math.prod(self.shape) + self._taps_at_once(1) * self.positions * self.features

  def held_each(self, num_groups: int) -> int:
    """Numbers held for each example of the microbatch."""
    return num_groups * math.prod(self.shape) if self.positions == 1 else 0

  @property
  def flops(self) -> int:
    """Of one example: its gradient, the square and the sum."""
    return 2 * math.prod(self.shape) * (self.positions + 1)

  def data_of(self, operand: jax.Array) -> jax.Array:
    """What is kept of the data's operand (N, ...)."""
    return operand

  def contract(self, data: jax.Array, g: jax.Array, groups: Groups) -> jax.Array:
    """Sums (G, *shape) over examples (N, ...)."""
    return _contract(self, data, g, groups)

  def gradients(self, data: jax.Array, g: jax.Array) -> jax.Array:
    """(n, *data), (n, *result) -> (n, *shape), the gradient of each example.

    As many taps at a time are computed as keep their patches small.
    """
    padded, g = self._padded(data), self._outputs(g)
    wide = jnp.promote_types(g.dtype, jnp.float32)
    some = self._taps_at_once(len(data))

    def of_taps(patches: jax.Array) -> jax.Array:
      return jnp.einsum(
        "nbtk,nbto->nbko", patches, g, precision=self.precision, preferred_element_type=wide
      )

    if self._is_side_by_side or some == self.taps:
      return self._as_leaf(of_taps(self._patches(padded, len(data), 0, self.taps)))
    steps = -(-self.taps // some)
    made = jax.lax.map(
      lambda step: of_taps(self._patches(padded, len(data), step * some, some)),
      jnp.arange(steps, dtype=jnp.int32),
    )  # (steps, n, parts, some * features, outputs)
    shape = steps, len(data), self.parts, some, self.part_features, self.part_outputs
    made = jnp.moveaxis(made.reshape(shape), 0, 2)
    made = made.reshape(len(data), self.parts, -1, self.part_features, self.part_outputs)
    made = made[:, :, : self.taps]  # the last step may have run over the end
    return self._as_leaf(made.reshape(len(data), self.parts, -1, self.part_outputs))

  @property
  def _is_side_by_side(self) -> bool:
    """Whether windows lie side by side, as a ViT's."""
    return tuple(self.spatial) == tuple(self.stride) and all(d == 1 for d in self.dilation)

  def _taps_at_once(self, num_examples: int) -> int:
    each = num_examples * self.positions * self.features * 4
    return max(1, min(self.taps, sums.CHUNK_BYTES // max(each, 1)))

  def _padded(self, data: jax.Array) -> jax.Array:
    """(n, *data) -> (n * batch, *spatial, features), padded."""
    spec = self.numbers.lhs_spec
    x = data.transpose(0, 1 + spec[0], *(1 + i for i in spec[2:]), 1 + spec[1])
    pairs = zip(self.padding, self.input_dilation, strict=True)
    padding = [(low, high, d - 1) for (low, high), d in pairs]
    zero = jnp.zeros((), x.dtype)
    return jax.lax.pad(x.reshape(-1, *x.shape[2:]), zero, [(0, 0, 0), *padding, (0, 0, 0)])

  def _patches(self, x: jax.Array, num_examples: int, first: Any, count: int) -> jax.Array:
    """Patches of some taps, (n, parts, positions, count * features of a part)."""
    patches = self._tiles(x) if self._is_side_by_side else self._windows(x, first, count)
    if self.parts == 1:
      return patches.reshape(num_examples, 1, -1, count * self.features)
    shape = num_examples, -1, count, self.parts, self.part_features
    patches = patches.reshape(shape).transpose(0, 3, 1, 2, 4)
    return patches.reshape(num_examples, self.parts, -1, count * self.part_features)

  def _tiles(self, x: jax.Array) -> jax.Array:
    counts = [size // k for size, k in zip(x.shape[1:], self.spatial, strict=False)]
    pairs = list(zip(counts, self.spatial, strict=True))
    x = x[(slice(None), *(slice(n * k) for n, k in pairs))]
    x = x.reshape(len(x), *(size for pair in pairs for size in pair), self.features)
    axes = range(1, 1 + 2 * len(self.spatial))
    x = x.transpose(0, *axes[::2], *axes[1::2], x.ndim - 1)
    return x.reshape(len(x), math.prod(counts), self.taps, self.features)

  def _windows(self, x: jax.Array, first: Any, count: int) -> jax.Array:
    """What each tap sees, tap by tap: no convolution stands inside a loop."""
    taps = np.ndindex(*self.spatial)
    starts = [[o * d for o, d in zip(tap, self.dilation, strict=True)] for tap in taps]
    offsets = jnp.asarray(np.array(starts, np.int32).reshape(self.taps, len(self.spatial)))
    reach = [(k - 1) * d for k, d in zip(self.spatial, self.dilation, strict=True)]
    steps = zip(x.shape[1:], reach, self.stride, strict=False)
    window = [(size - r - 1) // s * s + 1 for size, r, s in steps]
    from_start = {"allow_negative_indices": False}

    def put(index: jax.Array, patches: jax.Array) -> jax.Array:
      tap, zero = jnp.minimum(first + index, self.taps - 1), jnp.int32(0)
      start = sums.row(offsets, tap)[0]
      size = len(x), *window, self.features
      seen = jax.lax.dynamic_slice(x, (zero, *start, zero), size, **from_start)
      seen = jax.lax.slice(seen, [0] * seen.ndim, seen.shape, (1, *self.stride, 1))
      seen = seen.reshape(len(x), -1, 1, self.features)
      return jax.lax.dynamic_update_slice(patches, seen, (zero, zero, index, zero), **from_start)

    positions = math.prod((w - 1) // s + 1 for w, s in zip(window, self.stride, strict=True))
    patches = _mesh.zeros((len(x), positions, count, self.features), x.dtype, x)
    if count == 1:
      return put(jnp.int32(0), patches)
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(count), put, patches)

  def _outputs(self, g: jax.Array) -> jax.Array:
    """(n, *result) -> (n, parts, positions, outputs of a part)."""
    spec = self.numbers.out_spec
    g = g.transpose(0, 1 + spec[0], *(1 + i for i in spec[2:]), 1 + spec[1])
    return jnp.moveaxis(g.reshape(len(g), -1, self.parts, self.part_outputs), 2, 1)

  def _as_leaf(self, made: jax.Array) -> jax.Array:
    """(n, parts, taps * features, outputs) -> (n, *shape), parts beside outputs."""
    made = made.reshape(len(made), self.parts, *self.spatial, self.part_features, self.part_outputs)
    last, spec = made.ndim - 1, self.numbers.rhs_spec
    axes = {spec[0]: (1, last), spec[1]: (last - 1,)}
    axes |= {axis: (2 + index,) for index, axis in enumerate(spec[2:])}
    order = [i for axis in range(len(self.shape)) for i in axes[axis]]
    return made.transpose(0, *order).reshape(len(made), *self.shape)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Convolution) and vars(self) == vars(other)

  def __hash__(self) -> int:
    return hash((self.shape, self.stride, self.padding, self.positions))


@partial(jax.jit, static_argnums=0)
def _contract(rule: Convolution, data: jax.Array, g: jax.Array, groups: Groups) -> jax.Array:
  if rule.positions > 1:
    bytes_each = rule.held * groups.weights.dtype.itemsize
    return sums.accumulate(rule.gradients, data, g, groups, rule.shape, bytes_each)
  patches = rule._patches(rule._padded(data), len(data), 0, rule.taps)[:, :, 0]
  return rule._as_leaf(sums.outer_products(patches, rule._outputs(g)[:, :, 0], groups))
