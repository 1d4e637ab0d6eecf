"""Any other use of a leaf: each example has a copy of its own, whose cotangent is its gradient."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp

from mnemonic_jax.fisher.sums import Groups

NAME = "per example"


def held_each(shape: tuple[int, ...]) -> int:
  """Numbers held for each example of the microbatch."""
  return math.prod(shape)


def flops(shape: tuple[int, ...]) -> int:
  """Of one example: the square and the sum."""
  return 2 * math.prod(shape)


@partial(jax.jit, static_argnums=0)
def contract(shape: tuple[int, ...], data: jax.Array, g: jax.Array, groups: Groups) -> jax.Array:
  """Sums (G, *shape) of the gradients (N, *shape) squared; `data` is not looked at."""
  return groups.weighted_sum(jnp.square(g.astype(groups.weights.dtype)))
