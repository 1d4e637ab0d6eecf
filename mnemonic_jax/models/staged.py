"""What every model here is: named stages, pooled features, and a linear head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


class Staged(nnx.Module):
  """A classifier whose stages can be read by name; a stage that nobody reads is not kept.

  Subclasses define `stages` and `head`.
  """

  head: nnx.Linear

  def stages(self, inputs: jax.Array) -> dict[str, jax.Array]:
    """Outputs by name, (N, H, W, F) or (N, T, F) each, and "features" (N, F), what the head sees."""
    raise NotImplementedError

  def features(self, inputs: jax.Array) -> jax.Array:
    """What the head sees, (N, F)."""
    return self.stages(inputs)["features"]

  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Logits (N, C), float32 at least, for inputs (N, *shape)."""
    logits = self.head(self.features(inputs))
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
