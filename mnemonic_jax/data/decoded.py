"""Cache decoded sets on disk: decoding one takes a minute, reading it back a second."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
from collections.abc import Callable

import numpy as np

from mnemonic_jax.data.split import Split
from mnemonic_jax.multihost import user_cache


def kept(source: pathlib.Path, name: str, decode: Callable[[], Split]) -> Split:
  """Read the cached copy of what `decode` makes of the folder `source`, or decode and cache it.

  A copy is valid while names, sizes and times of the files in `source` stay the same. A damaged
  copy is made again. If the cache cannot be written, the set is decoded every time.
  """
  if (ours := user_cache.folder()) is None:
    return decode()
  folder = ours / "decoded"
  stats = sorted(
    (file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in source.iterdir()
  )
  fingerprint = hashlib.sha256(repr((str(source.resolve()), stats)).encode()).hexdigest()[:16]
  copy = folder / f"{name}-{fingerprint}.npz"
  damaged = contextlib.suppress(Exception)  # zipfile and NumPy raise many kinds
  with damaged, open(copy, "rb") as file, np.load(file, allow_pickle=False) as arrays:
    return Split(arrays["images"], arrays["labels"])
  split = decode()
  with contextlib.suppress(OSError):
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for older in [*folder.glob(f"{name}-*"), *folder.glob(f".{name}-*")]:
      older.unlink()
    unfinished = folder / f".{name}-{os.getpid()}"
    try:
      with open(unfinished, "xb") as target:
        np.savez(target, images=split.images, labels=split.labels, source=str(source.resolve()))
      unfinished.replace(copy)
    finally:
      unfinished.unlink(missing_ok=True)
  return split


def drop_orphans() -> None:
  """Delete the cached copies of sets that were deleted, so that no images stay behind."""
  ours = user_cache.folder()
  for copy in (ours / "decoded").glob("*.npz") if ours else ():
    source = None
    damaged = contextlib.suppress(Exception)
    with damaged, open(copy, "rb") as file, np.load(file, allow_pickle=False) as arrays:
      source = pathlib.Path(str(arrays["source"]))
    with contextlib.suppress(OSError):
      if source is None or not source.exists():
        copy.unlink()
