"""Swin transformers (Liu et al., 2021): attention in windows that every other block shifts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mnemonic_jax.models import transformer
from mnemonic_jax.models.staged import Staged
from mnemonic_jax.models.transformer import Attention, FeedForward, Linear


class _Block(nnx.Module):
  """A block on (N, H, W, F). Where its shift wraps around the edge, no attention crosses it."""

  def __init__(
    self,
    width: int,
    heads: int,
    size: tuple[int, int],
    window: int,
    shift: int,
    rngs: nnx.Rngs,
    *,
    dtype: Any,
  ):
    self.size, self.window, self.shift, self.heads = size, window, shift, heads
    self.norm1 = nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
    self.attention = Attention(width, heads, rngs, dtype=dtype)
    self.norm2 = nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
    self.feed_forward = FeedForward(width, rngs, dtype=dtype)
    # One bias per head and per offset between two positions of a window.
    self.position_bias = nnx.Param(
      transformer.kernel_init(rngs.params(), ((2 * window - 1) ** 2, heads), jnp.float32)
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    shift, (height, width) = self.shift, x.shape[1:3]
    y = jnp.roll(self.norm1(x), (-shift, -shift), (1, 2)) if shift else self.norm1(x)
    windows = _windows(y, self.window)  # (N, windows, T, F)
    tokens = windows.reshape(-1, *windows.shape[2:])
    y = self.attention(tokens, self._bias(len(x), x.dtype)).reshape(windows.shape)
    y = _unwindows(y, self.window, height, width)
    x = x + (jnp.roll(y, (shift, shift), (1, 2)) if shift else y)
    return x + self.feed_forward(self.norm2(x))

  def _bias(self, num: int, dtype: Any) -> jax.Array:
    """Return the bias of the scores, (1 or N * windows, heads, T, T)."""
    bias = self.position_bias[...][_relative_positions(self.window)].transpose(2, 0, 1)[None]
    if self.shift:
      may_attend = _same_region(self.size, self.window, self.shift)
      hidden = np.where(may_attend, 0.0, -100.0).astype(np.float32)
      bias = jnp.tile(bias + hidden[:, None], (num, 1, 1, 1))
    return bias.astype(dtype)


class Swin(Staged):
  """A Swin transformer with stages "patches" and "stage1" to "stage4", each (N, H, W, F).

  The defaults are Swin-T's.

  Args:
    image: height and width of an image in pixels. Both must be equal, and multiples of
      4 * 2**(stages - 1) * window: 224 for the defaults.
    remat: recompute the activations inside a block in the backward pass.
  """

  def __init__(
    self,
    num_classes: int,
    *,
    image: tuple[int, int],
    channels: int = 3,
    width: int = 96,
    depths: Sequence[int] = (2, 2, 6, 2),
    heads: Sequence[int] = (3, 6, 12, 24),
    window: int = 7,
    remat: bool = False,
    dtype: Any = None,
    rngs: nnx.Rngs,
  ):
    smallest = 4 * 2 ** (len(depths) - 1) * window
    if image[0] != image[1] or image[0] % smallest:
      raise ValueError(
        f"image: got {image}; expected a square whose side is a multiple of {smallest}."
      )
    self.remat, self.depths = remat, tuple(depths)
    self.patches = nnx.Conv(
      channels, width, (4, 4), (4, 4), padding="VALID", dtype=dtype, rngs=rngs
    )
    self.patches_norm = nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
    height, breadth = (side // 4 for side in image)
    for stage, (depth, num_heads) in enumerate(zip(depths, heads, strict=True), 1):
      if stage > 1:  # 2x2 neighbours become one position, twice as wide
        setattr(
          self, f"stage{stage}_norm", nnx.LayerNorm(4 * width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        )
        merge = Linear(4 * width, 2 * width, use_bias=False, dtype=dtype, rngs=rngs)
        setattr(self, f"stage{stage}_merge", merge)
        height, breadth, width = height // 2, breadth // 2, 2 * width
      for index in range(depth):
        shift = window // 2 if index % 2 and min(height, breadth) > window else 0
        block = _Block(width, num_heads, (height, breadth), window, shift, rngs, dtype=dtype)
        setattr(self, f"stage{stage}_block{index + 1}", block)
    self.norm = nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
    self.head = Linear(width, num_classes, dtype=dtype, rngs=rngs)

  def stages(self, inputs: jax.Array) -> dict[str, jax.Array]:
    """See `Staged`."""
    x = self.patches_norm(self.patches(inputs))
    outputs = {"patches": x}
    for stage, depth in enumerate(self.depths, 1):
      if stage > 1:
        n, h, w, features = x.shape
        x = x.reshape(n, h // 2, 2, w // 2, 2, features).transpose(0, 1, 3, 4, 2, 5)
        x = x.reshape(n, h // 2, w // 2, 4 * features)
        x = getattr(self, f"stage{stage}_merge")(getattr(self, f"stage{stage}_norm")(x))
      for index in range(1, depth + 1):
        x = transformer.run(getattr(self, f"stage{stage}_block{index}"), x, remat=self.remat)
      outputs[f"stage{stage}"] = x
    return outputs | {"features": self.norm(x).mean((1, 2))}


def _windows(x: Any, window: int) -> Any:
  """Cut (N, H, W, F) into windows: (N, windows, window^2, F)."""
  n, h, w, features = x.shape
  x = x.reshape(n, h // window, window, w // window, window, features).swapaxes(2, 3)
  return x.reshape(n, -1, window**2, features)


def _unwindows(x: jax.Array, window: int, height: int, width: int) -> jax.Array:
  """Put windows (N, windows, window^2, F) together again: (N, H, W, F)."""
  n, _, _, features = x.shape
  x = x.reshape(n, height // window, width // window, window, window, features).swapaxes(2, 3)
  return x.reshape(n, height, width, features)


def _relative_positions(window: int) -> np.ndarray:
  """Return, for each pair of positions of a window, its row in the bias table: (T, T)."""
  points = np.stack(np.meshgrid(np.arange(window), np.arange(window), indexing="ij")).reshape(2, -1)
  rows, columns = points[:, :, None] - points[:, None] + window - 1
  return rows * (2 * window - 1) + columns


def _same_region(size: tuple[int, int], window: int, shift: int) -> np.ndarray:
  """Return which pairs of positions lie on the same side of the wrapped edge: (windows, T, T)."""
  regions = np.zeros((1, *size, 1), int)
  parts = (slice(-window), slice(-window, -shift), slice(-shift, None))
  for row, rows in enumerate(parts):
    for column, columns in enumerate(parts):
      regions[:, rows, columns] = 3 * row + column
  regions = _windows(regions, window)[0, :, :, 0]
  return regions[:, :, None] == regions[:, None]
