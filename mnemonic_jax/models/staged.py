"""What every model here is: named stages, pooled features, and a linear head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


def pooled(stages: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """The mean of each stage's output over its positions (and tokens, the class token among them).

  Args:
    stages: as `Model.stages` returns them, (N, ..., F) each.

  Returns:
    By the same names, (N, F) each, float32 at least.

  >>> pooled({"stage1": jnp.arange(6.0).reshape(1, 3, 2)})
  {'stage1': Array([[2., 3.]], dtype=float32)}
  """
  mean = lambda x: jnp.mean(
    x, axis=tuple(range(1, x.ndim - 1)), dtype=jnp.promote_types(x.dtype, jnp.float32)
  )
  return {name: mean(x) for name, x in stages.items()}


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
