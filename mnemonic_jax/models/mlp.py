"""The paper's MLP: one hidden layer of sigmoid units."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

# Kernels and biases start in U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as in the paper.
_kernel_init = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _linear(fan_in: int, fan_out: int, rngs: nnx.Rngs, dtype: Any) -> nnx.Linear:
  bound = fan_in**-0.5

  def bias_init(
    key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32
  ) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return nnx.Linear(
    fan_in, fan_out, kernel_init=_kernel_init, bias_init=bias_init, dtype=dtype, rngs=rngs
  )


class MLP(nnx.Module):
  """Compute logits = W2 sigmoid(W1 x + b1) + b2 of flattened inputs."""

  def __init__(
    self, num_inputs: int, hidden: int, num_classes: int, *, dtype: Any = None, rngs: nnx.Rngs
  ):
    self.hidden = _linear(num_inputs, hidden, rngs, dtype)
    self.output = _linear(hidden, num_classes, rngs, dtype)

  def stages(self, inputs: jax.Array) -> dict[str, jax.Array]:
    """Return {"features": hidden activations (N, hidden)}."""
    return {"features": self.features(inputs)}

  def features(self, inputs: jax.Array) -> jax.Array:
    """Return the hidden activations (N, hidden)."""
    return jax.nn.sigmoid(self.hidden(inputs.reshape(len(inputs), -1)))

  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Return logits (N, C), float32 or wider, for inputs (N, *shape)."""
    logits = self.output(self.features(inputs))
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
