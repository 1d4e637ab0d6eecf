"""Run folders and small disks to try commands on.

A pytest plugin: modules that need it say `pytest_plugins = ["run_fixtures"]`.
"""

from __future__ import annotations

import pathlib
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from running import TINY, call


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A finished tiny training on the digits; copy it, do not write to it."""
  folder = tmp_path_factory.mktemp("runs") / "trained"
  outcome = call("train", "digits_paper", "--out", folder, *TINY, "--json")
  assert outcome.json["epochs"] == 3
  return folder


@pytest.fixture(scope="session")
def forgotten_once(
  trained_once: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
  """The same, with class 3 forgotten; copy it, do not write to it."""
  folder = tmp_path_factory.mktemp("runs") / "forgotten"
  shutil.copytree(trained_once, folder)
  assert call("forget", folder, "--classes", 3, "--json").json["classes"] == [3]
  return folder


@pytest.fixture
def trained(trained_once: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  """A finished tiny training of this test's own."""
  return pathlib.Path(shutil.copytree(trained_once, tmp_path / "trained"))


@pytest.fixture
def forgotten(forgotten_once: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  """A tiny training with class 3 forgotten, of this test's own."""
  return pathlib.Path(shutil.copytree(forgotten_once, tmp_path / "forgotten"))


@pytest.fixture(scope="session")
def learned_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, dict]:
  """`mnemonic run` without codes in training: it learns them. Copy it, do not write to it.

  Its first kernel is just large enough to be split over a mesh.
  """
  folder = tmp_path_factory.mktemp("runs") / "learned"
  words = ("--codes.rate", 0, "--train.epochs", 8, "--model.hidden", 128, "--forget.method", "")
  words += ("--train.learning_rate", 0.1, "--out", folder, "--json")
  return folder, call("run", "digits", *words).json


class Disk:
  """A small file system in memory."""

  def __init__(self, path: pathlib.Path) -> None:
    self.path = path

  def remount(self, options: str) -> None:
    """Change its size or make it read-only."""
    subprocess.run(
      ["mount", "-o", f"remount,{options}", str(self.path)], check=True, capture_output=True
    )

  def leave(self, kibibytes: int) -> pathlib.Path:
    """Fill it up to what is left free; remove the file returned to make room again."""
    filler = self.path / "filler"
    filler.write_bytes(b"\0" * (shutil.disk_usage(self.path).free - kibibytes * 1024))
    return filler


@pytest.fixture
def disk(tmp_path: pathlib.Path) -> Iterator[Disk]:
  """A disk of 4 MiB."""
  path = tmp_path / "disk"
  path.mkdir()
  try:
    subprocess.run(
      ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(path)], check=True, capture_output=True
    )
  except (OSError, subprocess.CalledProcessError):
    pytest.skip("needs the right to mount a tmpfs")
  try:
    yield Disk(path)
  finally:
    subprocess.run(["umount", "--lazy", str(path)], check=True, capture_output=True)
