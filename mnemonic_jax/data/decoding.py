"""Decode images, and cut random or central squares out of them."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image

_AREA = (0.08, 1.0)  # of a random crop, as a share of the image
_RATIO = (3 / 4, 4 / 3)  # width over height of a random crop
_TRIES = 10
_KEPT = 7 / 8  # side of a central crop, as a share of the image's shorter side


def decode(encoded: bytes, shape: tuple[int, ...]) -> np.ndarray:
  """Decode an image to pixels (H, W, C) uint8; raise ValueError unless it has this shape."""
  with Image.open(io.BytesIO(encoded)) as image:
    pixels = np.asarray(image)
  pixels = pixels if pixels.ndim == 3 else pixels[..., None]
  if pixels.shape != shape or pixels.dtype != np.uint8:
    raise ValueError(
      f"an image is {pixels.dtype} {pixels.shape}; "
      f"expected uint8 {shape}: height, width and channels"
    )
  return pixels


def random_resized_crop(encoded: bytes, side: int, random: np.random.Generator) -> np.ndarray:
  """Cut out a random rectangle and scale it to (side, side, 3) uint8.

  Its area is 8 to 100 % of the image, and its width is 3/4 to 4/3 of its height.

  Source: Szegedy et al. (2015), section 6, as torchvision and timm draw it.
  """
  with Image.open(io.BytesIO(encoded)) as image:
    box = _random_box(*image.size, random)
    return _scaled(image, box, side, decode_small=True)


def central_crop(encoded: bytes, side: int) -> np.ndarray:
  """Cut out the central square, 7/8 of the shorter side, and scale it to (side, side, 3) uint8."""
  with Image.open(io.BytesIO(encoded)) as image:
    width, height = image.size
    edge = _KEPT * min(width, height)
    left, top = (width - edge) / 2, (height - edge) / 2
    return _scaled(image, (left, top, left + edge, top + edge), side, decode_small=False)


def _random_box(
  width: int, height: int, random: np.random.Generator
) -> tuple[float, float, float, float]:
  """Draw (left, top, right, bottom); if no draw fits, return the largest allowed central box."""
  for _ in range(_TRIES):
    area = width * height * random.uniform(*_AREA)
    ratio = math.exp(random.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
    w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if 0 < w <= width and 0 < h <= height:
      left, top = random.integers(0, width - w + 1), random.integers(0, height - h + 1)
      return float(left), float(top), float(left + w), float(top + h)
  x, y = (width - min(width, height * _RATIO[1])) / 2, (height - min(height, width / _RATIO[0])) / 2
  return x, y, width - x, height - y


def _scaled(
  image: Image.Image, box: tuple[float, ...], side: int, *, decode_small: bool
) -> np.ndarray:
  """Cut the box out as RGB, scaled to (side, side, 3).

  `decode_small` lets Pillow decode a JPEG at 1/2, 1/4 or 1/8 of its size, which is faster.
  """
  if decode_small:
    width, height = image.size
    left, top, right, bottom = box
    image.draft(
      "RGB", (math.ceil(side * width / (right - left)), math.ceil(side * height / (bottom - top)))
    )
    x, y = image.size[0] / width, image.size[1] / height
    box = (left * x, top * y, right * x, bottom * y)
  resized = image.convert("RGB").resize(
    (side, side), Image.Resampling.BILINEAR, box=(box[0], box[1], box[2], box[3])
  )
  return np.asarray(resized)
