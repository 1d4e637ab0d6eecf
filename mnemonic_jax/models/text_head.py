"""A head that scores against fixed text-embedding vectors, in the style of CLIP (Radford et al., 2021)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class Fixed(nnx.Variable):
  """An array that is neither trained nor perturbed."""


class TextHead(nnx.Module):
  """logits = exp(log_scale) normalize(W x) . normalize(text_c) + bias_c, the cosine of picture and text.

  `log_scale` starts at log(1 / 0.07) and is learned. CLIP has no bias: this one starts at zero and is a param like the
  others, so that whatever acts on a head's bias, the head edit for one, works here as on a linear head.

  Args:
    num_features: of x.
    text: (C, E), a vector for each class, not zero.
  """

  def __init__(self, num_features: int, text: Any, *, dtype: Any = None, rngs: nnx.Rngs):
    text = jnp.asarray(text, jnp.float32)
    self.projection = nnx.Linear(
      num_features, text.shape[1], use_bias=False, dtype=dtype, rngs=rngs
    )
    self.log_scale = nnx.Param(jnp.asarray(math.log(1 / 0.07), jnp.float32))
    self.bias = nnx.Param(jnp.zeros(len(text), jnp.float32))
    self.text = Fixed(_normalized(text))

  def __call__(self, x: jax.Array) -> jax.Array:
    """(N, F) -> (N, C), float32 at least."""
    x = self.projection(x)
    x = _normalized(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    return jnp.exp(self.log_scale[...]) * (x @ self.text[...].T) + self.bias[...]


def attach(
  make_module: Callable[[nnx.Rngs], Any], head: str, text: Any, *, dtype: Any = None
) -> Callable[[nnx.Rngs], Any]:
  """The same model with a `TextHead` in the place of its linear layer `head`; all other params are made as before."""

  def make(rngs: nnx.Rngs) -> Any:
    module = make_module(rngs)
    setattr(module, head, TextHead(getattr(module, head).in_features, text, dtype=dtype, rngs=rngs))
    return module

  return make


def _normalized(x: jax.Array) -> jax.Array:
  """Rows of length one; rows shorter than 1e-12 are left shorter, with a gradient that is finite."""
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), 1e-24))
