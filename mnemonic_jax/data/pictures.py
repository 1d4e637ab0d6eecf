"""From an encoded picture to pixels: decoding, and the two ways of cutting a square out of it."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image

_AREA = (0.08, 1.0)  # of a random crop, as a share of the picture
_RATIO = (3 / 4, 4 / 3)  # width over height
_TRIES = 10
_KEPT = 7 / 8  # of the shorter side, in a central crop


def decode(encoded: bytes, shape: tuple[int, ...]) -> np.ndarray:
  """Pixels (H, W, C) uint8 of an encoded picture that should be of `shape`; raises ValueError for another one."""
  with Image.open(io.BytesIO(encoded)) as picture:
    pixels = np.asarray(picture)
  pixels = pixels if pixels.ndim == 3 else pixels[..., None]
  if pixels.shape != shape or pixels.dtype != np.uint8:
    raise ValueError(
      f"a picture is {pixels.dtype} {pixels.shape}; expected uint8 {shape}, height, width and channels"
    )
  return pixels


def random_resized_crop(encoded: bytes, side: int, random: np.random.Generator) -> np.ndarray:
  """Cut a rectangle of random place, area (8 to 100 %) and shape (3:4 to 4:3) out, and scale it: (side, side, 3) uint8.

  Source: Szegedy et al. (2015), section 6, as torchvision and timm draw it.
  """
  with Image.open(io.BytesIO(encoded)) as picture:
    box = _random_box(*picture.size, random)
    return _scaled(picture, box, side, decode_small=True)


def central_crop(encoded: bytes, side: int) -> np.ndarray:
  """Cut the central square of 7/8 of the shorter side out, and scale it: (side, side, 3) uint8."""
  with Image.open(io.BytesIO(encoded)) as picture:
    width, height = picture.size
    edge = _KEPT * min(width, height)
    left, top = (width - edge) / 2, (height - edge) / 2
    return _scaled(picture, (left, top, left + edge, top + edge), side, decode_small=False)


def _random_box(
  width: int, height: int, random: np.random.Generator
) -> tuple[float, float, float, float]:
  """Left, top, right, bottom; the largest central rectangle of an allowed shape if no draw fits."""
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
  picture: Image.Image, box: tuple[float, ...], side: int, *, decode_small: bool
) -> np.ndarray:
  """The box as RGB, `side` pixels wide and high; `decode_small` lets a JPEG decode at 1/2, 1/4 or 1/8 of its size."""
  if decode_small:
    width, height = picture.size
    left, top, right, bottom = box
    picture.draft(
      "RGB", (math.ceil(side * width / (right - left)), math.ceil(side * height / (bottom - top)))
    )
    x, y = picture.size[0] / width, picture.size[1] / height
    box = (left * x, top * y, right * x, bottom * y)
  resized = picture.convert("RGB").resize(
    (side, side), Image.Resampling.BILINEAR, box=(box[0], box[1], box[2], box[3])
  )
  return np.asarray(resized)
