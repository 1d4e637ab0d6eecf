"""Files of a run, local or in an object store (gs://), which can neither rename nor lock.

A reader, or a kill at any moment, never sees half of a file. Hashes name the very arrays that a
record is about.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import fnmatch
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from mnemonic_jax._records import array_sha256 as array_sha256
from mnemonic_jax._records import params_sha256 as params_sha256
from mnemonic_jax._records import plain as plain
from mnemonic_jax._records import to_host as to_host
from mnemonic_jax.errors import MnemonicError
from mnemonic_jax.multihost import processes

# Errors of a folder on a file system where folders cannot be flushed.
_NO_FLUSH = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EACCES)
UNFINISHED = ".unfinished-"  # starts the names of folders that are not whole yet


def is_remote(path: os.PathLike[str] | str) -> bool:
  """Tell whether a path lies in an object store.

  >>> is_remote(epath.Path("gs://bucket/run")), is_remote("runs/a")
  (True, False)
  """
  return "://" in os.fspath(path)


def absolute(path: os.PathLike[str] | str) -> epath.Path:
  """Make a path absolute, as Orbax wants it; `epath` would put the working directory before gs://.

  >>> str(absolute("gs://bucket/run"))
  'gs://bucket/run'
  """
  found = epath.Path(path)
  return found if is_remote(found) else found.absolute()


def children(folder: epath.Path, pattern: str) -> list[epath.Path]:
  """What lies in a folder under names of a pattern; nothing if there is no such folder.

  Not `epath`'s own glob, which would take the folder's path for a pattern too.

  >>> children(epath.Path("no such folder"), "*")
  []
  """
  return (
    [path for path in folder.iterdir() if fnmatch.fnmatchcase(path.name, pattern)]
    if folder.is_dir()
    else []
  )


@contextlib.contextmanager
def written(path: epath.PathLike) -> Iterator[epath.Path]:
  """Write `path` atomically: the body writes a temporary file, which is flushed, then renamed.

  One process at a time: hold the run's lock. A temporary file that a killed process left is
  replaced. For an object store the temporary file is a local one: one write of all bytes is atomic
  there.
  """
  path = epath.Path(path)
  if is_remote(path):
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
  """Make the folder `final`, whole or not at all, from what `fill` writes.

  `fill` writes into `.unfinished-NAME` beside it, which is flushed, then renamed. Whatever a killed
  process left there is deleted first; a living one keeps it, and this one is refused. In an object
  store, and where several processes write, `fill` writes into `final` itself: that is whole when
  the last file of `fill` is there.
  """
  final = epath.Path(final)
  with _failing_as(final):
    if is_remote(final) or processes.several():
      final.mkdir(parents=True, exist_ok=True)
      fill(final)
      return
    final.parent.mkdir(parents=True, exist_ok=True)
    _to_disk(final.parent.parent)
    with _own_folder(final.with_name(f"{UNFINISHED}{final.name}")) as temporary:
      fill(temporary)
      for folder, _, names in os.walk(temporary):
        for name in names:
          _to_disk(epath.Path(folder) / name)
        _to_disk(epath.Path(folder))
      os.rename(temporary, final)
      _to_disk(final.parent)


@contextlib.contextmanager
def _own_folder(path: epath.Path) -> Iterator[epath.Path]:
  """Give an empty folder that no other process has; delete it at the end, if it is still there.

  Ownership is a lock on the folder itself, which dies with its process. Where the file system has
  no such locks, only a folder that is new is ours.
  """
  try:
    os.mkdir(path, 0o755)
    is_new = True
  except FileExistsError:
    is_new = False
  descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
  try:
    if not _is_ours(path, descriptor, is_new):
      raise MnemonicError(
        f"{path}: another mnemonic process is writing there. Wait for it to end; if there is none, "
        "delete that folder."
      )
    for entry in path.iterdir():
      shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    try:
      yield path
    finally:
      # Threads of a failed write may still add to it: the next process to own it deletes the rest.
      shutil.rmtree(path, ignore_errors=True)
  finally:
    os.close(descriptor)


def _is_ours(path: epath.Path, descriptor: int, is_new: bool) -> bool:
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError:
    return is_new
  # Another process may have renamed or deleted the folder before we locked it.
  with contextlib.suppress(FileNotFoundError):
    return os.path.samestat(os.stat(path), os.fstat(descriptor))
  return False


def _to_disk(path: epath.Path) -> None:
  """Flush a file, or the names in a folder, so that a power cut does not lose them."""
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
  """Return JSON text; NaN and infinities, which JSON does not have, become null.

  >>> dumps({"accuracy": float("nan")})
  '{"accuracy": null}'
  """
  return json.dumps(plain(value), indent=indent, allow_nan=False)
