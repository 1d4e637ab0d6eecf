"""The user's cache folder. Its files can be made again, so deleting it is always safe."""

from __future__ import annotations

import os
import pathlib


def folder() -> pathlib.Path | None:
  """Return our folder in $XDG_CACHE_HOME, else in ~/.cache; None for a user without a home.

  The folder may not exist yet.
  """
  try:
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  except RuntimeError:
    return None
  return pathlib.Path(cache) / "mnemonic_jax"
