"""Run folders in an object store.

epath's mock stands over a folder that refuses to rename, append and lock, as a bucket would.
"""

from __future__ import annotations

import pytest
from etils import epath
from etils.epath import testing

from mnemonic_jax.errors import MnemonicError
from mnemonic_jax.runs import config as configs
from mnemonic_jax.runs import files
from mnemonic_jax.runs.folder import RunFolder

BUCKET = "gs://bucket"
RUN = f"{BUCKET}/run[1]"  # no pattern, though it looks like one


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """Where the bucket's objects lie on disk."""
  monkeypatch.chdir(tmp_path)  # a path that was not understood would be made here
  there = tmp_path / "there"
  there.mkdir()

  def moved(path):
    return str(path).replace(BUCKET, str(there), 1)

  def on(original, path, *rest, **options):
    return original(moved(path), *rest, **options)

  def opened(original, path, mode):
    assert "a" not in mode, "an object cannot be appended to"
    return original(moved(path), mode)

  def refused(original, path, target):
    raise AssertionError(f"{path} is renamed to {target}")

  functions = dict.fromkeys(
    ("exists", "isdir", "listdir", "makedirs", "mkdir", "remove", "rmtree", "stat"), on
  )
  with testing.mock_epath(**functions, open=opened, rename=refused, replace=refused):
    yield there
  assert [path.name for path in tmp_path.iterdir()] == ["there"]


def whole_forget(folder):
  files.write_json(folder / "evidence.json", {})
  files.write_json(folder / "report.json", {"classes": [3]})


def test_a_run_in_a_bucket_is_made_logged_resumed_and_forgets(bucket):
  config = configs.load("digits")
  run = RunFolder.create(epath.Path(RUN), config)
  assert str(run.checkpoints) == str(files.absolute(run.checkpoints)) == f"{RUN}/checkpoints"
  with run.locked(), run.metric_log(0) as log:
    for step in (1, 2, 3):
      log({"step": step, "loss": 0.5})
  run.rewind_metrics(2)
  with run.metric_log(2) as log:
    log({"step": 3, "loss": 0.25})
  assert [record["loss"] for record in RunFolder.open(RUN).metrics()] == [0.5, 0.5, 0.25]
  assert sorted(path.name for path in (bucket / "run[1]").iterdir()) == [
    "config.json",
    "metrics.jsonl",
    "tensorboard",
  ]
  assert all(path.stat().st_size for path in (bucket / "run[1]" / "tensorboard").iterdir())

  def killed(folder):
    files.write_json(folder / "evidence.json", {})
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    run.add_forget(killed)
  assert run.forgets() == [] and run.forgotten_classes() == []
  assert str(run.add_forget(whole_forget)) == f"{RUN}/forgets/0002"
  assert [path.name for path in run.forgets()] == ["0002"] and run.forgotten_classes() == [3]


def test_other_settings_are_refused_there_too(bucket):
  RunFolder.create(epath.Path(RUN), configs.load("digits"))
  (bucket / "run[1]" / "checkpoints" / "44").mkdir(parents=True)
  with pytest.raises(MnemonicError, match="holds a run with other settings"):
    RunFolder.create(epath.Path(RUN), configs.load("mnist_mlp"))
