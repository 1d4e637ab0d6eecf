"""Writing files so that a reader, or a kill at any moment, never sees half of one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from mnemonic_jax.errors import MnemonicError
from mnemonic_jax.multihost import paths, processes

# What a folder that cannot be flushed, or not be read, answers.
_NO_FLUSH = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EACCES)
UNFINISHED = ".unfinished-"  # what the names of folders start with that are not whole yet


@contextlib.contextmanager
def written(path: epath.PathLike) -> Iterator[epath.Path]:
  """Write `path` atomically: the body writes the temporary file beside it, which is flushed to disk, then renamed.

  One process at a time: hold the run's lock. What a killed one left behind is replaced. In an object store the temporary
  file is a local one: one write of all bytes is atomic there.
  """
  path = epath.Path(path)
  if paths.is_remote(path):
    with _failing_as(path), tempfile.TemporaryDirectory() as folder:
      yield (local := epath.Path(folder) / path.name)
      path.write_bytes(local.read_bytes())
    return
  temporary = path.with_name(f".{path.name}.unfinished")
  try:
    with _failing_as(path):
      temporary.unlink(missing_ok=True)
      yield temporary
      _to_disk(temporary)
      os.replace(temporary, path)
      _to_disk(path.parent)
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink()


@contextlib.contextmanager
def _failing_as(path: epath.Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise MnemonicError(f"{path}: cannot be written: {error.strerror or error}.") from error


def write_text(path: epath.PathLike, text: str) -> None:
  """Write `text` to `path`, atomically; of several processes, process 0 does."""
  if not processes.is_writer():
    return
  with written(path) as temporary, open(temporary, "x", encoding="utf-8") as file:
    file.write(text)


def make_folder(final: epath.PathLike, fill: Callable[[epath.Path], None]) -> None:
  """Make the folder `final`: `fill` writes into a temporary folder beside it, which is renamed when it is whole.

  What earlier, killed attempts at the same folder left behind is swept away first. In an object store, and where several
  processes write, `fill` writes into `final` itself: it is whole when what `fill` writes last is there.
  """
  final = epath.Path(final)
  if paths.is_remote(final) or processes.several():
    with _failing_as(final):
      final.mkdir(parents=True, exist_ok=True)
      fill(final)
    return
  parent = final.parent
  with contextlib.ExitStack() as lock:
    with _failing_as(parent):
      parent.mkdir(parents=True, exist_ok=True)
      _to_disk(parent.parent)
      for leftover in paths.children(parent, f"{UNFINISHED}{glob.escape(final.name)}-*"):
        with (
          contextlib.suppress(OSError),
          _lock(leftover) as got,
        ):  # what is not ours, or no folder, stays
          if got:
            shutil.rmtree(leftover)
      temporary = _new_folder(final, lock)
    _fill(temporary, final, fill)


def _new_folder(final: epath.Path, lock: contextlib.ExitStack) -> epath.Path:
  """Make a temporary folder beside `final`, locked for as long as this process lives or `lock` is open."""
  while True:
    temporary = epath.Path(tempfile.mkdtemp(prefix=f"{UNFINISHED}{final.name}-", dir=final.parent))
    with contextlib.suppress(FileNotFoundError):  # swept by another process before it was locked
      got = lock.enter_context(_lock(temporary))
      if got is not False and temporary.exists():
        return temporary


@contextlib.contextmanager
def _lock(folder: epath.Path) -> Iterator[bool | None]:
  """Lock a folder itself: False where a live process holds it, None where the file system has no such locks."""
  descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
      got: bool | None = True
    except BlockingIOError:
      got = False
    except OSError:
      got = None
    yield got
  finally:
    os.close(descriptor)


def _fill(temporary: epath.Path, final: epath.Path, fill: Callable[[epath.Path], None]) -> None:
  try:
    with _failing_as(final):
      fill(temporary)
      os.chmod(temporary, 0o755)
      for folder, _, names in os.walk(temporary):
        for name in names:
          _to_disk(epath.Path(folder) / name)
        _to_disk(epath.Path(folder))
      os.rename(temporary, final)
      _to_disk(final.parent)
  finally:
    _remove(temporary)


def _to_disk(path: epath.Path) -> None:
  """Flush a file, or the names in a folder where its file system has that, so that they outlive a power cut."""
  is_folder = path.is_dir()
  try:
    descriptor = os.open(path, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)
  except OSError as error:
    if not (is_folder and error.errno in _NO_FLUSH):
      raise


def _remove(folder: epath.Path) -> None:
  """Delete a folder, into which threads of a failed write may still be writing."""
  for _ in range(20):
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
      return
    time.sleep(0.1)


def write_json(path: epath.PathLike, value: Any) -> None:
  """Write `value` as JSON, atomically."""
  write_text(path, dumps(value, indent=2) + "\n")


def read_json(path: epath.PathLike, remedy: str) -> Any:
  """Read a JSON file, or say what is wrong with it and what to do."""
  try:
    return json.loads(epath.Path(path).read_text("utf-8"))
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
