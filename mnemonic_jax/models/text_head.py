"""A head that scores features against text embeddings, as CLIP does (Radford et al., 2021)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class Fixed(nnx.Variable):
  """An array that neither training nor forgetting changes."""


class TextHead(nnx.Module):
  """Score an image by the cosine of its projected features and each class's text embedding.

      logit_c = exp(log_scale) normalize(W x) . normalize(text_c) + bias_c

  `log_scale` is learned and starts at log(1 / 0.07). CLIP has no bias. Ours starts at zero, so that
  methods that edit the bias of a head, such as the head edit, work here too.

  Args:
    num_features: the size of x.
    text: (C, E), one nonzero vector per class.
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
    """Map features (N, F) to logits (N, C), float32 or wider."""
    x = self.projection(x)
    x = _normalized(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    return jnp.exp(self.log_scale[...]) * (x @ self.text[...].T) + self.bias[...]


def attach(
  make_module: Callable[[nnx.Rngs], Any], head: str, text: Any, *, dtype: Any = None
) -> Callable[[nnx.Rngs], Any]:
  """Replace the linear layer `head` by a `TextHead`; all other params are initialised as before."""

  def make(rngs: nnx.Rngs) -> Any:
    module = make_module(rngs)
    setattr(module, head, TextHead(getattr(module, head).in_features, text, dtype=dtype, rngs=rngs))
    return module

  return make


def _normalized(x: jax.Array) -> jax.Array:
  """Scale rows to length one; rows below 1e-12 stay shorter, so that gradients are finite."""
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), 1e-24))
