"""Small CUB, Cars and ImageNet sets, prepared by TFDS's own builders.

A pytest plugin: modules that need it say `pytest_plugins = ["stream_fixtures"]`.
"""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest
from prepared_sets import CLASSES
from running import environment


@pytest.fixture(scope="session")
def prepared_sets(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A folder of prepared sets. Read it, do not write to it."""
  for module in ("tensorflow_datasets", "grain"):
    pytest.importorskip(module)
  folder = tmp_path_factory.mktemp("prepared")
  program = pathlib.Path(__file__).with_name("prepared_sets.py")
  done = subprocess.run(
    [sys.executable, str(program), str(folder), *CLASSES],
    text=True,
    capture_output=True,
    env=environment(),
  )
  assert done.returncode == 0, done.stderr
  return folder
