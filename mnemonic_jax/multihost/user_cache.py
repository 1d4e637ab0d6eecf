"""Where the user's cache folder is: whatever lies in it can be made again, and deleting it is always safe."""

from __future__ import annotations

import os
import pathlib


def folder() -> pathlib.Path | None:
  """Our part of $XDG_CACHE_HOME, else of ~/.cache, not made here; None for a user without a home."""
  try:
    return (
      pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
      / "mnemonic_jax"
    )
  except RuntimeError:
    return None
