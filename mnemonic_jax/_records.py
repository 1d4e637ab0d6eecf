"""What records hold of values: the types that JSON has, and hashes that name arrays."""

from __future__ import annotations

import hashlib
import math
import sys
from typing import Any

import jax
import numpy as np


def plain(value: Any) -> Any:
  """Return `value` in the types that JSON has; NaN and infinities become None."""
  if isinstance(value, dict):
    return {str(key): plain(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(item) for item in value]
  if hasattr(value, "tolist"):
    return plain(value.tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def to_host(array: Any) -> np.ndarray:
  """Copy an array to the host.

  An array spread over several processes is gathered from all of them: then all must call this.
  """
  if (
    isinstance(array, jax.Array)
    and not array.is_fully_addressable
    and not array.is_fully_replicated
  ):
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
  return np.asarray(array)


def params_sha256(params: Any) -> str:
  """Hash the leaves in the order of their paths, one leaf at a time.

  SHA-256 of, for each leaf: its path as `jax.tree_util.keystr` writes it, its dtype name and
  str(shape), each as UTF-8 with a NUL byte after it; then its bytes, little-endian, in C order.
  """
  digest = hashlib.sha256()
  leaves = {
    jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  for path in sorted(leaves):
    array = to_host(leaves[path])
    for text in (path, array.dtype.name, str(array.shape)):
      digest.update(text.encode("utf-8") + b"\0")
    array = np.ascontiguousarray(array)
    digest.update((array.byteswap() if sys.byteorder == "big" else array).tobytes())
  return digest.hexdigest()


def array_sha256(array: Any) -> str:
  """Hash an array's bytes in C order."""
  return hashlib.sha256(np.ascontiguousarray(to_host(array)).tobytes()).hexdigest()
