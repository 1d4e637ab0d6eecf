"""Mixup and CutMix: each example of a batch is blended with the next one, in picture and in target."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mnemonic_jax import _checks, _mesh, _trees

# (key, (N, H, W), alpha) -> how much of the next example each pixel becomes: (N, H, W) or (N, 1, 1), in [0, 1]
Draw = Callable[[jax.Array, tuple[int, ...], jax.Array], jax.Array]


def mixup(
  key: jax.Array, images: jax.Array, targets: jax.Array, alpha: Any
) -> tuple[jax.Array, jax.Array]:
  """Replace each example by a mean of itself and the next one, with a weight of its own.

      lambda_n ~ Beta(alpha, alpha)
      image_n  <- lambda_n image_n  + (1 - lambda_n) image_{n+1}
      target_n <- lambda_n target_n + (1 - lambda_n) target_{n+1}

  where the last example is followed by the first. In a shuffled batch the next example is a random one.

  Guarantees:
    The result depends on key, shapes and values alone, not on devices. Targets that sum to 1 still do, up to rounding.

  Edge cases:
    a batch of one: its example is its own next one, and stays.

  Args:
    key: one typed key; a fresh one each step.
    images: (N, H, W, C), floating.
    targets: (N, classes), floating: probabilities.
    alpha: above 0 and finite; small ones give weights near 0 and 1, alpha 1 uniform ones. May be traced.

  Returns:
    (images, targets), same shapes and dtypes.

  Raises:
    TypeError: images or targets not floating, key not a typed key, alpha not a number.
    ValueError: shapes that do not fit, an alpha that is not above 0 and finite.

  >>> images, targets = jnp.arange(2.0).reshape(2, 1, 1, 1), jnp.eye(2)
  >>> mixed, weights = mixup(jax.random.key(0), images, targets, alpha=1.0)
  >>> bool(jnp.allclose(mixed[:, 0, 0, 0], weights[:, 1]))  # the picture of class 1 is 1, that of class 0 is 0
  True

  Source: Zhang, Cisse, Dauphin, Lopez-Paz (2018), mixup: Beyond Empirical Risk Minimization, with a weight per example.
  """
  _check(key, images, targets, alpha)
  return _blend(_mean, key, images, targets, alpha)


def cutmix(
  key: jax.Array, images: jax.Array, targets: jax.Array, alpha: Any
) -> tuple[jax.Array, jax.Array]:
  """Paste a box of the next example into each, and weigh the targets by the share of pixels pasted.

      lambda_n ~ Beta(alpha, alpha),  centre_n ~ Uniform over the picture
      box_n    = pixels within half of sqrt(1 - lambda_n) (H, W) of the centre, along each axis
      image_n  <- image_{n+1} inside box_n, image_n outside
      target_n <- (1 - share_n) target_n + share_n target_{n+1},   share_n = |box_n| / (H W)

  where the last example is followed by the first. A box that reaches over the edge is cut there, and the share is that of
  the pixels that were really pasted.

  Guarantees, Args, Returns, Raises: as `mixup`.

  >>> images, targets = jnp.arange(2.0)[:, None, None, None] * jnp.ones((2, 8, 8, 1)), jnp.eye(2)
  >>> pasted, weights = cutmix(jax.random.key(0), images, targets, alpha=1.0)
  >>> bool((pasted.mean((1, 2, 3)) == weights[:, 1]).all())  # the pictures of class 1 are ones, those of class 0 zeros
  True

  Source: Yun, Han, Oh, Chun, Choe, Yoo (2019), CutMix, equations 1 and 2, with a box per example.
  """
  _check(key, images, targets, alpha)
  return _blend(_box, key, images, targets, alpha)


def _mean(key: jax.Array, shape: tuple[int, ...], alpha: jax.Array) -> jax.Array:
  return 1 - jax.random.beta(key, alpha, alpha, (shape[0], 1, 1), jnp.float32)


def _box(key: jax.Array, shape: tuple[int, ...], alpha: jax.Array) -> jax.Array:
  size_key, *centre_keys = jax.random.split(key, 3)
  side = jnp.sqrt(1 - jax.random.beta(size_key, alpha, alpha, (shape[0], 1), jnp.float32))

  def inside(key: jax.Array, pixels: int) -> jax.Array:
    centre = pixels * jax.random.uniform(key, (shape[0], 1), jnp.float32)
    return jnp.abs(jnp.arange(pixels, dtype=jnp.float32)[None] + 0.5 - centre) < pixels * side / 2

  rows, columns = (inside(key, pixels) for key, pixels in zip(centre_keys, shape[1:], strict=True))
  return (rows[:, :, None] & columns[:, None, :]).astype(jnp.float32)


@partial(jax.jit, static_argnums=0)
def _blend(
  draw: Draw, key: jax.Array, images: jax.Array, targets: jax.Array, alpha: Any
) -> tuple[jax.Array, jax.Array]:
  def blend(
    batch: tuple[jax.Array, jax.Array], key: jax.Array, alpha: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    images, targets = batch
    # All devices draw for all examples: they would have to agree in every round of beta's rejections.
    share = _mesh.gathered(draw(key, images.shape[:3], alpha))
    return _lerp(images, share[..., None]), _lerp(targets, share.mean((1, 2))[:, None])

  arguments = key, jnp.asarray(alpha, jnp.float32)
  out_specs = jax.typeof(images).sharding.spec, jax.typeof(targets).sharding.spec
  return _mesh.with_automatic_axes(blend, (images, targets), *arguments, out_specs=out_specs)


def _lerp(x: jax.Array, share: jax.Array) -> jax.Array:
  """(1 - share) of each row and `share` of the next one."""
  wide = x.astype(_trees.at_least_float32(x.dtype))
  share = share.astype(wide.dtype)
  return ((1 - share) * wide + share * jnp.roll(wide, -1, axis=0)).astype(x.dtype)


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
      f"targets: got shape {targets.shape} for {len(images)} images; expected ({len(images)}, classes) probabilities. "
      "Make them from labels with jax.nn.one_hot."
    )
  if isinstance(alpha, jax.core.Tracer):
    return
  _checks.require_finite_number("alpha", alpha)
  if jnp.ndim(alpha) or not alpha > 0:
    raise ValueError(
      f"alpha: got {alpha!r}; expected one number above 0, such as 0.2 (mixup) or 1.0 (cutmix)."
    )
