"""Augmentation on the device, inside the jitted train step: of single images, or mixing neighbours.

Crops and flips take one key per image. Mixup and CutMix mix each example of a batch with the next
one, image and target alike.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mnemonic_jax import _checks, _mesh, _trees

_PADDING = 4  # pixels on each side, usual for 32 x 32 images

# (keys (N,), images (N, H, W, C)) -> images (N, H, W, C), same dtype.
Augment = Callable[[jax.Array, jax.Array], jax.Array]
# (key, (N, H, W), alpha) -> the weight of the next example in each pixel: (N, H, W) or (N, 1, 1),
# in [0, 1].
DrawWeights = Callable[[jax.Array, tuple[int, ...], jax.Array], jax.Array]


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


def mixup(
  key: jax.Array, images: jax.Array, targets: jax.Array, alpha: Any
) -> tuple[jax.Array, jax.Array]:
  """Replace each example by a weighted mean of itself and the next one.

      lambda_n ~ Beta(alpha, alpha)
      image_n  <- lambda_n image_n  + (1 - lambda_n) image_{n+1}
      target_n <- lambda_n target_n + (1 - lambda_n) target_{n+1}

  The first example follows the last. In a shuffled batch the next example is a random one.

  Guarantees:
    The result depends on key, shapes and values only, not on devices. Targets that sum to 1 still
    do, up to rounding.

  Edge cases:
    a batch of one: the example is its own next one and stays as it is.

  Args:
    key: one typed key; pass a fresh one each step.
    images: (N, H, W, C), floating.
    targets: (N, classes), floating: probabilities.
    alpha: positive and finite. Small values give weights near 0 and 1, alpha = 1 uniform ones. May
      be traced.

  Returns:
    (images, targets), same shapes and dtypes.

  Raises:
    TypeError: images or targets are not floating, key is not a typed key, or alpha is no number.
    ValueError: the shapes do not fit, or alpha is not positive and finite.

  >>> images, targets = jnp.arange(2.0).reshape(2, 1, 1, 1), jnp.eye(2)
  >>> mixed, weights = mixup(jax.random.key(0), images, targets, alpha=1.0)
  >>> bool(jnp.allclose(mixed[:, 0, 0, 0], weights[:, 1]))  # class 0 is black, class 1 is white
  True

  Source: Zhang, Cisse, Dauphin, Lopez-Paz (2018), mixup: Beyond Empirical Risk Minimization, with
  one weight per example.
  """
  _check(key, images, targets, alpha)
  return _mixed(_mixup_weights, key, images, targets, alpha)


def cutmix(
  key: jax.Array, images: jax.Array, targets: jax.Array, alpha: Any
) -> tuple[jax.Array, jax.Array]:
  """Paste a box of the next example into each, and weigh the targets by the share of pixels pasted.

      lambda_n ~ Beta(alpha, alpha),  centre_n ~ Uniform over the image
      box_n    = pixels within half of sqrt(1 - lambda_n) (H, W) of the centre, along each axis
      image_n  <- image_{n+1} inside box_n, image_n outside
      target_n <- (1 - share_n) target_n + share_n target_{n+1},   share_n = |box_n| / (H W)

  The first example follows the last. The edge of the image cuts boxes off, and only the pixels that
  were really pasted count for the share.

  Guarantees, Args, Returns, Raises: as `mixup`.

  >>> images, targets = jnp.arange(2.0)[:, None, None, None] * jnp.ones((2, 8, 8, 1)), jnp.eye(2)
  >>> pasted, weights = cutmix(jax.random.key(0), images, targets, alpha=1.0)
  >>> bool((pasted.mean((1, 2, 3)) == weights[:, 1]).all())  # class 0 is black, class 1 is white
  True

  Source: Yun, Han, Oh, Chun, Choe, Yoo (2019), CutMix, equations 1 and 2, with one box per example.
  """
  _check(key, images, targets, alpha)
  return _mixed(_cutmix_weights, key, images, targets, alpha)


def _mixup_weights(key: jax.Array, shape: tuple[int, ...], alpha: jax.Array) -> jax.Array:
  return 1 - jax.random.beta(key, alpha, alpha, (shape[0], 1, 1), jnp.float32)


def _cutmix_weights(key: jax.Array, shape: tuple[int, ...], alpha: jax.Array) -> jax.Array:
  size_key, *centre_keys = jax.random.split(key, 3)
  side = jnp.sqrt(1 - jax.random.beta(size_key, alpha, alpha, (shape[0], 1), jnp.float32))

  def inside(key: jax.Array, pixels: int) -> jax.Array:
    centre = pixels * jax.random.uniform(key, (shape[0], 1), jnp.float32)
    return jnp.abs(jnp.arange(pixels, dtype=jnp.float32)[None] + 0.5 - centre) < pixels * side / 2

  rows, columns = (inside(key, pixels) for key, pixels in zip(centre_keys, shape[1:], strict=True))
  return (rows[:, :, None] & columns[:, None, :]).astype(jnp.float32)


@partial(jax.jit, static_argnums=0)
def _mixed(
  draw_weights: DrawWeights, key: jax.Array, images: jax.Array, targets: jax.Array, alpha: Any
) -> tuple[jax.Array, jax.Array]:
  def mix(
    batch: tuple[jax.Array, jax.Array], key: jax.Array, alpha: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    images, targets = batch
    # Every device draws for all examples: beta rejects samples in a loop, and split over devices
    # they would have to agree in each round.
    weights = _mesh.gathered(draw_weights(key, images.shape[:3], alpha))
    shares = weights.mean((1, 2))
    return _lerp(images, weights[..., None]), _lerp(targets, shares[:, None])

  arguments = key, jnp.asarray(alpha, jnp.float32)
  out_specs = jax.typeof(images).sharding.spec, jax.typeof(targets).sharding.spec
  return _mesh.with_automatic_axes(mix, (images, targets), *arguments, out_specs=out_specs)


def _lerp(x: jax.Array, weight: jax.Array) -> jax.Array:
  """Return (1 - weight) x_n + weight x_{n+1}, computed in float32 or wider."""
  wide = x.astype(_trees.at_least_float32(x.dtype))
  weight = weight.astype(wide.dtype)
  return ((1 - weight) * wide + weight * jnp.roll(wide, -1, axis=0)).astype(x.dtype)


def _check(key: Any, images: Any, targets: Any, alpha: Any) -> None:
  _checks.require_key(key)
  for name, value in (("images", images), ("targets", targets)):
    dtype = getattr(value, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
      raise TypeError(f"{name}: got {_checks.kind(value)}; expected a floating array.")
  if images.ndim != 4 or 0 in images.shape:
    raise ValueError(f"images: got shape {images.shape}; expected (N, H, W, C), none of them 0.")
  if targets.ndim != 2 or len(targets) != len(images):
    raise ValueError(
      f"targets: got shape {targets.shape} for {len(images)} images; "
      f"expected ({len(images)}, classes) probabilities. Make them from labels with jax.nn.one_hot."
    )
  if isinstance(alpha, jax.core.Tracer):
    return
  _checks.require_finite_number("alpha", alpha)
  if jnp.ndim(alpha) or not alpha > 0:
    raise ValueError(
      f"alpha: got {alpha!r}; expected one number above 0, such as 0.2 (mixup) or 1.0 (cutmix)."
    )
