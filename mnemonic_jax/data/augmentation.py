"""Augmentation of small images on the device, inside the jitted train step; one key per image."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

_PADDING = 4  # pixels on each side, usual for 32 x 32 images

# (keys (N,), images (N, H, W, C)) -> images (N, H, W, C), same dtype.
Augment = Callable[[jax.Array, jax.Array], jax.Array]


def crop(keys: jax.Array, images: jax.Array) -> jax.Array:
  """Pad each image with 4 black pixels on all sides and cut a window of its size at random.

  >>> crop(jax.random.split(jax.random.key(0), 2), jnp.ones((2, 8, 8, 1), jnp.uint8)).shape
  (2, 8, 8, 1)
  """

  def one(key: jax.Array, image: jax.Array) -> jax.Array:
    padded = jnp.pad(image, ((_PADDING, _PADDING), (_PADDING, _PADDING), (0, 0)))
    top, left = jax.random.randint(key, (2,), 0, 2 * _PADDING + 1)
    return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)

  return jax.vmap(one)(keys, images)


def flip(keys: jax.Array, images: jax.Array) -> jax.Array:
  """Mirror each image left to right with probability one half."""
  mirrored = jax.vmap(lambda key: jax.random.bernoulli(key))(keys)
  return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def crop_and_flip(keys: jax.Array, images: jax.Array) -> jax.Array:
  """Crop and flip, the usual recipe for CIFAR."""
  crop_keys, flip_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
  return flip(flip_keys, crop(crop_keys, images))


# Streamed sets cut random resized crops as they decode; only flipping is left for the device.
STREAMED: dict[str, Augment | None] = {"resized_crop": None, "resized_crop_flip": flip}
NAMES: dict[str, Augment | None] = {
  "none": None,
  "flip": flip,
  "crop": crop,
  "crop_flip": crop_and_flip,
  **STREAMED,
}
