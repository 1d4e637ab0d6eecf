"""Writing files so that a reader, or a kill at any moment, never sees half of one."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
from typing import Any

from mnemonic_jax.errors import MnemonicError


def write_text(path: pathlib.Path, text: str) -> None:
  """Write `text` to `path` atomically: a temporary file beside it, flushed to disk, then renamed.

  One process at a time: hold the run's lock. What a killed one left behind is replaced.
  """
  temporary = path.with_name(f".{path.name}.unfinished")
  try:
    temporary.unlink(missing_ok=True)
    with open(temporary, "x", encoding="utf-8") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError as error:
    with contextlib.suppress(OSError):
      temporary.unlink()
    raise MnemonicError(f"{path}: cannot be written: {error.strerror or error}.") from error


def write_json(path: pathlib.Path, value: Any) -> None:
  """Write `value` as JSON, atomically."""
  write_text(path, dumps(value, indent=2) + "\n")


def read_json(path: pathlib.Path, remedy: str) -> Any:
  """Read a JSON file, or say what is wrong with it and what to do."""
  try:
    return json.loads(path.read_text("utf-8"))
  except OSError as error:
    raise MnemonicError(f"{path}: cannot be read: {error.strerror or error}. {remedy}") from error
  except ValueError as error:
    raise MnemonicError(f"{path}: is not whole JSON ({error}). {remedy}") from error


def dumps(value: Any, indent: int | None = None) -> str:
  """JSON text in which a NaN or an infinity, which JSON has not, is null.

  >>> dumps({"accuracy": float("nan")})
  '{"accuracy": null}'
  """
  return json.dumps(plain(value), indent=indent, allow_nan=False)


def plain(value: Any) -> Any:
  """`value` in the types that JSON has; NaN and infinities become None."""
  if isinstance(value, dict):
    return {str(key): plain(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(item) for item in value]
  if hasattr(value, "tolist"):
    return plain(value.tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
