"""The layers that ViT and Swin share, and how to run blocks: unrolled, scanned or with remat."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mnemonic_jax import _mesh

kernel_init = jax.nn.initializers.truncated_normal(0.02)
Linear = partial(nnx.Linear, kernel_init=kernel_init)


class Attention(nnx.Module):
  """Self-attention over the tokens of (N, T, F)."""

  def __init__(self, width: int, heads: int, rngs: nnx.Rngs, *, dtype: Any):
    self.heads = heads
    self.qkv = Linear(width, 3 * width, dtype=dtype, rngs=rngs)
    self.out = Linear(width, width, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Map (N, T, F) to (N, T, F), adding `bias` (N or 1, heads, T, T) to the scores."""
    q, k, v = jnp.moveaxis(self.qkv(x).reshape(*x.shape[:-1], 3, self.heads, -1), -3, 0)
    return self.out(jax.nn.dot_product_attention(q, k, v, bias).reshape(x.shape))


class FeedForward(nnx.Module):
  """Two dense layers with GELU in between, where they are four times as wide."""

  def __init__(self, width: int, rngs: nnx.Rngs, *, dtype: Any):
    self.hidden = Linear(width, 4 * width, dtype=dtype, rngs=rngs)
    self.out = Linear(4 * width, width, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Map (..., F) to (..., F)."""
    return self.out(jax.nn.gelu(self.hidden(x), approximate=False))


def run(block: nnx.Module, x: jax.Array, *, remat: bool) -> jax.Array:
  """Call a block that holds params only; `remat` recomputes activations in the backward pass."""
  graph, params = nnx.split(block)
  call = lambda params, x: nnx.merge(graph, _mesh.gathered(params))(x)
  return (jax.checkpoint(call) if remat else call)(params, x)


def stack(make_block: Callable[[], nnx.Module], depth: int) -> nnx.Module:
  """Make `depth` blocks and stack their params along a new leading axis, as one block."""
  graph, first = nnx.split(make_block())
  rest = [nnx.split(make_block())[1] for _ in range(depth - 1)]
  return nnx.merge(graph, jax.tree.map(lambda *layers: jnp.stack(layers), first, *rest))


def scan(
  stacked: nnx.Module, x: jax.Array, *, remat: bool, keep: bool
) -> tuple[jax.Array, jax.Array | None]:
  """Scan over stacked blocks; with `keep`, also return each output, (layers, *x.shape)."""
  graph, params = nnx.split(stacked)

  def layer(x: jax.Array, params: Any) -> tuple[jax.Array, jax.Array | None]:
    x = run(nnx.merge(graph, params), x, remat=remat)
    return x, x if keep else None

  return jax.lax.scan(layer, x, params)
