"""Vision transformers (Dosovitskiy et al., 2021) with learned positions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mnemonic_jax.models import transformer
from mnemonic_jax.models.staged import Staged
from mnemonic_jax.models.transformer import Attention, FeedForward, Linear

# Size -> width, depth, heads.
SIZES = {
  "ti": (192, 12, 3),
  "s": (384, 12, 6),
  "b": (768, 12, 12),
  "l": (1024, 24, 16),
  "h": (1280, 32, 16),
}


class _Block(nnx.Module):
  def __init__(self, width: int, heads: int, rngs: nnx.Rngs, *, dtype: Any):
    self.norm1 = nnx.LayerNorm(width, epsilon=1e-6, dtype=dtype, rngs=rngs)
    self.attention = Attention(width, heads, rngs, dtype=dtype)
    self.norm2 = nnx.LayerNorm(width, epsilon=1e-6, dtype=dtype, rngs=rngs)
    self.feed_forward = FeedForward(width, rngs, dtype=dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x + self.attention(self.norm1(x))
    return x + self.feed_forward(self.norm2(x))


class ViT(Staged):
  """A ViT with stages "patches", "block1", "block2" and so on, each (N, T, F).

  Args:
    size: "ti", "s", "b", "l" or "h".
    image: height and width of an image in pixels, multiples of `patch`.
    pool: "token": the head reads the class token. "mean": it reads the mean over patches, and there
      is no class token.
    scan: stack the blocks' params along a leading axis and compile one block, in a `lax.scan`.
    remat: recompute the activations inside a block in the backward pass.
  """

  def __init__(
    self,
    size: str,
    num_classes: int,
    *,
    image: tuple[int, int],
    channels: int = 3,
    patch: int = 16,
    pool: str = "token",
    scan: bool = False,
    remat: bool = False,
    dtype: Any = None,
    rngs: nnx.Rngs,
  ):
    width, self.depth, heads = SIZES[size]
    if any(side % patch for side in image):
      raise ValueError(f"image: got {image}; expected multiples of the patch, {patch}.")
    self.scan, self.remat = scan, remat
    self.patches = nnx.Conv(
      channels,
      width,
      (patch, patch),
      (patch, patch),
      padding="VALID",
      dtype=dtype,
      kernel_init=jax.nn.initializers.lecun_normal(),
      rngs=rngs,
    )
    tokens = (image[0] // patch) * (image[1] // patch)
    if pool == "token":
      self.class_token = nnx.Param(jnp.zeros((1, 1, width), jnp.float32))
      tokens += 1
    self.pool = pool
    self.positions = nnx.Param(
      transformer.kernel_init(rngs.params(), (1, tokens, width), jnp.float32)
    )
    make_block = lambda: _Block(width, heads, rngs, dtype=dtype)
    if scan:
      self.blocks = transformer.stack(make_block, self.depth)
    else:
      for index in range(1, self.depth + 1):
        setattr(self, f"block{index}", make_block())
    self.norm = nnx.LayerNorm(width, epsilon=1e-6, dtype=dtype, rngs=rngs)
    self.head = Linear(width, num_classes, dtype=dtype, rngs=rngs)

  def _run(self, inputs: jax.Array, keep: bool) -> dict[str, jax.Array]:
    x = self.patches(inputs)
    x = x.reshape(len(x), -1, x.shape[-1])
    if self.pool == "token":
      token = self.class_token[...].astype(x.dtype)
      x = jnp.concatenate([jnp.broadcast_to(token, (len(x), *token.shape[1:])), x], axis=1)
    x = x + self.positions[...].astype(x.dtype)
    outputs = {"patches": x}
    if self.scan:
      x, layers = transformer.scan(self.blocks, x, remat=self.remat, keep=keep)
      if layers is not None:
        outputs |= {f"block{index + 1}": layers[index] for index in range(self.depth)}
    else:
      for index in range(1, self.depth + 1):
        x = transformer.run(getattr(self, f"block{index}"), x, remat=self.remat)
        outputs[f"block{index}"] = x
    x = self.norm(x)
    return outputs | {"features": x[:, 0] if self.pool == "token" else x.mean(1)}

  def stages(self, inputs: jax.Array) -> dict[str, jax.Array]:
    """See `Staged`."""
    return self._run(inputs, keep=True)

  def features(self, inputs: jax.Array) -> jax.Array:
    """See `Staged`."""
    return self._run(inputs, keep=False)["features"]
