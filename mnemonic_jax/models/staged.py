"""The interface of every image model: named stages, pooled features and a linear head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


def pooled(stages: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Average each stage's output over its positions or tokens; a class token counts as a token.

  Args:
    stages: {name: (N, ..., F)}, as `Model.stages` returns them.

  Returns:
    {name: (N, F)}, float32 or wider.

  >>> pooled({"stage1": jnp.arange(6.0).reshape(1, 3, 2)})
  {'stage1': Array([[2., 3.]], dtype=float32)}
  """
  mean = lambda x: jnp.mean(
    x, axis=tuple(range(1, x.ndim - 1)), dtype=jnp.promote_types(x.dtype, jnp.float32)
  )
  return {name: mean(x) for name, x in stages.items()}


class Staged(nnx.Module):
  """A classifier whose stages can be read by name. Subclasses define `stages` and `head`."""

  head: nnx.Linear

  def stages(self, inputs: jax.Array) -> dict[str, jax.Array]:
    """Return each stage's output, (N, H, W, F) or (N, T, F), and "features" (N, F)."""
    raise NotImplementedError

  def features(self, inputs: jax.Array) -> jax.Array:
    """Return the input of the head, (N, F)."""
    return self.stages(inputs)["features"]

  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Return logits (N, C), float32 or wider, for inputs (N, *shape)."""
    logits = self.head(self.features(inputs))
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
