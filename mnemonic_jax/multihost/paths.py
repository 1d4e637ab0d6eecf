"""Paths of run folders: local, or in object stores (gs://), which cannot rename or lock."""

from __future__ import annotations

import fnmatch
import os

from etils import epath


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
