"""Keep compiled programs between commands: the second request of a kind starts warm."""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform
import shutil
import warnings
from typing import Any

import jax

from mnemonic_jax.multihost import user_cache

# Oldest programs go when the folder holds more than this.
_MAX_BYTES = 2**30


def enable() -> None:
  """Keep what XLA compiles in the user's cache folder.

  Nothing changes where JAX was told of another cache, or where the folder belongs to somebody else.
  A cache that cannot be written or read costs time and nothing else.
  """
  if getattr(jax.config, "jax_compilation_cache_dir", None) or not getattr(
    jax.config, "jax_enable_compilation_cache", 1
  ):
    return
  if (ours := user_cache.folder()) is None:
    return
  folder = ours / f"compiled-{_processor()}"
  try:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or not os.access(folder, os.W_OK):
      return  # programs that somebody else may have put there
    _prune(folder)
  except OSError:
    return
  jax.config.update("jax_compilation_cache_dir", str(folder))
  # Small programs too: they are half of a warm request.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
  _start_afresh_on_errors(folder)


def _processor() -> str:
  """Name the processor: a program compiled for one CPU may not run on another."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    described = next(line for line in lines if line.startswith(("flags", "Features")))
  except (OSError, StopIteration):
    described = platform.processor()
  return hashlib.sha256(f"{platform.machine()} {described}".encode()).hexdigest()[:12]


def _prune(folder: pathlib.Path) -> None:
  """Delete the oldest programs beyond the allowed size."""
  files = sorted(
    ((path.stat(), path) for path in folder.iterdir()),
    key=lambda pair: pair[0].st_mtime,
    reverse=True,
  )
  total = 0
  for stat, path in files:
    total += stat.st_size
    if total > _MAX_BYTES:
      path.unlink(missing_ok=True)


def _start_afresh_on_errors(folder: pathlib.Path) -> None:
  """Empty the folder when a program in it cannot be read.

  A kill can cut a program short. Without this, every later command would warn of it.
  """
  show = warnings.showwarning

  def show_or_empty(message: Any, *details: Any, **named: Any) -> None:
    if "persistent compilation cache" not in str(message):
      show(message, *details, **named)
    elif "Error reading" in str(message):
      shutil.rmtree(folder, ignore_errors=True)
      folder.mkdir(mode=0o700, parents=True, exist_ok=True)

  warnings.showwarning = show_or_empty
