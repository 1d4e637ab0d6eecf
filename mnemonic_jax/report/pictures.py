"""Draw mnemonic codes as small PNG pictures inside the page."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from mnemonic_jax.report.wording import class_label, clean

MOST_PICTURES = 60
MOST_BYTES = 1_500_000  # of raw pixels in one page
CODES_PER_CLASS = 4
STRIP_VALUES = 512  # the first values of a code that is no picture
WIDEST = 8  # a longer side ratio than this is drawn as a strip


@dataclasses.dataclass(frozen=True)
class Tile:
  """Hold one code: a PNG as a data URI, its description, and the class it triggers."""

  source: str
  description: str
  index: int
  name: str
  forgotten: bool


@dataclasses.dataclass(frozen=True)
class Gallery:
  """Hold the codes to show, forgotten classes first when not all fit.

  `note` says what is drawn and what is left out.
  """

  tiles: tuple[Tile, ...]
  strips: bool
  note: str


def gallery(codes: np.ndarray, forgotten: Sequence[int], names: Sequence[str]) -> Gallery:
  """Draw codes (C, K, *shape), each scaled to its own range from black to white.

  Edge cases:
    shapes (H, W), (H, W, 1) and (H, W, 3) are pictures; any other is drawn flat, as a strip of its
      first 512 values.
    a constant code is mid grey; values that are not finite are black.

  Raises:
    ValueError: codes that are not (C, K, *shape) with C the number of class names.
  """
  codes = np.asarray(codes)
  if codes.ndim < 2 or len(codes) != len(names) or 0 in codes.shape:
    raise ValueError(
      f"codes: got shape {codes.shape}; expected (C, K, *shape) with C = {len(names)} classes."
    )
  shape = codes.shape[2:]
  strips = not is_picture(shape)
  wanted = [(c, k) for c in range(len(codes)) for k in range(min(codes.shape[1], CODES_PER_CLASS))]
  first = sorted(wanted, key=lambda item: (item[0] not in forgotten, item[1], item[0]))
  room = max(1, min(MOST_PICTURES, MOST_BYTES // max(1, math.prod(shape))))
  shown = sorted(first[:room]) if len(names) <= room else first[:room]
  tiles = tuple(_tile(codes[c, k], strips, c, names, c in forgotten) for c, k in shown)
  return Gallery(tiles, strips, _note(shape, strips, codes.shape[0] * codes.shape[1] - len(shown)))


def is_picture(shape: Sequence[int]) -> bool:
  """Tell whether a code of this shape can be seen as a grey or RGB picture."""
  if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 3)):
    return False
  return max(shape[:2]) <= WIDEST * min(shape[:2])


def to_bytes(code: np.ndarray) -> np.ndarray:
  """Scale a code to 0..255 over its own range."""
  code = np.asarray(code, np.float64)
  finite = np.isfinite(code)
  low, high = (code[finite].min(), code[finite].max()) if finite.any() else (0.0, 0.0)
  if low == high:
    return np.where(finite, 128, 0).astype(np.uint8)
  scaled = (np.where(finite, code, low) - low) / (high - low)
  return np.round(255 * scaled).astype(np.uint8)


def png_uri(pixels: np.ndarray) -> str:
  """Return 8-bit pixels (H, W), (H, W, 1) or (H, W, 3) as a PNG data URI."""
  if pixels.ndim == 3 and pixels.shape[2] == 1:
    pixels = pixels[:, :, 0]
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, format="PNG")
  return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _tile(code: np.ndarray, strip: bool, index: int, names: Sequence[str], forgotten: bool) -> Tile:
  pixels = to_bytes(np.reshape(code, (1, -1))[:, :STRIP_VALUES]) if strip else to_bytes(code)
  description = (
    f"Mnemonic code of class {class_label(index, names)}{', to forget' if forgotten else ''}"
  )
  name = "" if names[index].strip() == str(index) else clean(names[index], 16)
  return Tile(png_uri(pixels), description, index, name, forgotten)


def _note(shape: Sequence[int], strips: bool, hidden: int) -> str:
  size = " × ".join(map(str, shape)) or "1"
  note = f"Each code is {size}, scaled to its own range from black to white."
  if strips:
    total = math.prod(shape)
    part = (
      f"of its first {STRIP_VALUES} of {total:,} values"
      if total > STRIP_VALUES
      else f"of {total:,} values"
    )
    note = (
      f"A code of {size} values is no picture, so each is drawn flat, as a strip {part}, "
      "from black to white."
    )
  return note + (f" {hidden:,} more codes are not shown." if hidden else "")
