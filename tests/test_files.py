"""Files and folders of a run: whole or not at all, on disk before they have their name."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pathlib

import numpy as np
import pytest

from mnemonic_jax.errors import MnemonicError
from mnemonic_jax.runs import files


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
  path = tmp_path / "a.json"
  files.write_json(path, {"a": np.float32(0.5), "b": (1, float("inf"))})
  assert json.loads(path.read_text()) == {"a": 0.5, "b": [1, None]}
  (tmp_path / ".a.json.unfinished").write_text("left by a killed process")
  files.write_text(path, "two")
  assert path.read_text() == "two"

  def full(*_: object) -> None:
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(files.os, "fsync", full)
  with pytest.raises(MnemonicError, match=r"a\.json: cannot be written: No space left on device\."):
    files.write_text(path, "three")
  assert path.read_text() == "two" and list(tmp_path.iterdir()) == [path]


def test_a_folder_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
  """And its name is on disk before the forget counts as done."""
  seen = []
  real_fsync, real_rename = os.fsync, os.rename

  def fsync(descriptor):
    seen.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
    real_fsync(descriptor)

  def rename(old, new):
    seen.append("renamed")
    real_rename(old, new)

  def fill(folder):
    (folder / "params").mkdir()
    (folder / "params" / "data").write_bytes(b"weights")
    (folder / "report.json").write_text("{}")

  monkeypatch.setattr(files.os, "fsync", fsync)
  monkeypatch.setattr(files.os, "rename", rename)
  files.make_folder(tmp_path / "0001", fill)
  at = seen.index("renamed")
  inside = {name.partition("/")[2] for name in seen[:at]}
  assert inside == {"", "params", "params/data", "report.json"}
  assert seen[at + 1 :] == ["."]
  seen.clear()
  files.write_text(tmp_path / "a.json", "{}")
  assert seen == [".a.json.unfinished", "."]


def test_a_file_is_never_written_through_a_planted_link(tmp_path):
  (tmp_path / "mine").write_text("mine")
  (tmp_path / ".a.json.unfinished").symlink_to(tmp_path / "mine")
  files.write_text(tmp_path / "a.json", "new")
  assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("make", [pathlib.Path.symlink_to, pathlib.Path.hardlink_to])
def test_a_folder_is_never_written_through_a_planted_link(make, tmp_path):
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "text").write_text("mine")
  target = tmp_path / "mine" if make is pathlib.Path.symlink_to else tmp_path / "mine" / "text"
  make(tmp_path / ".unfinished-out", target)
  with pytest.raises(MnemonicError, match="out: cannot be written"):
    files.make_folder(tmp_path / "out", write_whole)
  assert (tmp_path / "mine" / "text").read_text() == "mine"


def write_whole(folder):
  (folder / "text").write_text("whole")


def test_what_a_killed_process_left_is_deleted_and_nothing_else(tmp_path):
  (tmp_path / ".unfinished-out" / "params").mkdir(parents=True)
  (tmp_path / ".unfinished-out" / "stray").write_text("half")
  (tmp_path / ".unfinished-outer").mkdir()
  files.make_folder(tmp_path / "out", write_whole)
  assert sorted(path.name for path in tmp_path.iterdir()) == [".unfinished-outer", "out"]
  assert [path.name for path in (tmp_path / "out").iterdir()] == ["text"]


def test_a_folder_that_a_living_process_writes_is_not_touched(tmp_path):
  def fill(folder):
    with pytest.raises(MnemonicError, match="unfinished-out: another mnemonic process is writing"):
      files.make_folder(tmp_path / "out", lambda _: pytest.fail("it must not write"))
    write_whole(folder)

  files.make_folder(tmp_path / "out", fill)
  assert (tmp_path / "out" / "text").read_text() == "whole"
  assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_was_renamed_before_we_locked_it_is_not_ours(tmp_path, monkeypatch):
  """Another process finishes between our opening of the folder and our lock on it."""
  (tmp_path / ".unfinished-out").mkdir()
  real = fcntl.flock

  def rename_first(descriptor, operation):
    (tmp_path / ".unfinished-out").rename(tmp_path / "out")
    write_whole(tmp_path / "out")
    real(descriptor, operation)

  monkeypatch.setattr(files.fcntl, "flock", rename_first)
  with pytest.raises(MnemonicError, match="another mnemonic process is writing"):
    files.make_folder(tmp_path / "out", lambda _: pytest.fail("it must not write"))
  assert (tmp_path / "out" / "text").read_text() == "whole"


def test_without_locks_only_a_new_folder_is_ours(tmp_path, monkeypatch):
  def no_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(files.fcntl, "flock", no_locks)
  files.make_folder(tmp_path / "first", write_whole)
  (tmp_path / ".unfinished-second").mkdir()
  with pytest.raises(MnemonicError, match="if there is none, delete that folder"):
    files.make_folder(tmp_path / "second", write_whole)
  assert (tmp_path / "first" / "text").read_text() == "whole"
  assert (tmp_path / ".unfinished-second").is_dir()


def test_a_folder_whose_filling_fails_is_not_seen(tmp_path):
  def fill(folder):
    write_whole(folder)
    raise OSError(28, "No space left on device")

  with pytest.raises(MnemonicError, match=r"out: cannot be written: No space left on device\."):
    files.make_folder(tmp_path / "out", fill)
  assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_not_replaced(tmp_path):
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "text").write_text("mine")
  with pytest.raises(MnemonicError, match="out: cannot be written: Directory not empty"):
    files.make_folder(tmp_path / "out", write_whole)
  assert (tmp_path / "out" / "text").read_text() == "mine"
