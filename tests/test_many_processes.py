"""`mnemonic train` as several processes: the same training, whatever is killed and restarted."""

from __future__ import annotations

import json
import pathlib
import shutil
from signal import SIGKILL, SIGTERM
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jobs import ROOT, finish_job, start_job
from running import HANG, call, snapshot, wait_for
from safetensors.numpy import load_file
from weight_files import as_augreg

from mnemonic_jax import _trees, models
from mnemonic_jax.runs.checkpoints import newest, restore_parts, stored_shapes

pytest_plugins = ["stream_fixtures"]

TRAIN = ("-c", "import sys; from mnemonic_jax.cli import main; sys.exit(main())", "train", "--json")
SCRIPTS = ROOT / "experiments" / "imagenet_vit"
STEPS, DEVICES = 12, 4
CONFIG = f"""
[data]
name = "imagenet2012"
side = 32
augment = "resized_crop_flip"
[model]
name = "vit_ti16"
pool = "mean"
scan = true
[codes]
rate = 0.3
[train]
steps = {STEPS}
batch_size = 4
optimizer = "adamw"
learning_rate = 1e-3
warmup_steps = 2
checkpoint_steps = 4
"""
# Four processes of a ViT on a small machine mostly compile.
FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def start_on(devices, words, count, flags=""):
  """Start `count` processes of one command, which share so many devices."""
  return start_job(words, count, XLA_FLAGS=flags, JAX_NUM_CPU_DEVICES=str(devices // count))


PATIENCE = ("--startup-timeout", HANG, "--peer-timeout", HANG)


@pytest.fixture(scope="module")
def digits_runs(tmp_path_factory):
  """Folder and JSON of a training on the digits by one process, and by two with two devices each.

  Without epochs in one call: each process places its rows of each batch. The first kernel is just
  large enough to be split.
  """
  words = ("digits_paper", "--model.hidden", 128, "--train.epochs", 2, "--log-every", 20)
  found, folder = [], tmp_path_factory.mktemp("digits")
  for devices, count in ((1, 1), (4, 2)):
    out = folder / f"{devices} devices"
    first, *others = finish_job(start_on(devices, (*TRAIN, *words, *PATIENCE, "--out", out), count))
    assert first.json["processes"] == count
    assert [other.out for other in others] == [""] * len(others)
    found.append((out, first.json))
  return found


def test_two_processes_train_a_stored_set_as_one_device_does(digits_runs):
  losses = []
  for out, _ in digits_runs:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 40, 44, 60, 80, 88]
    losses.append([line["loss"] for line in lines])
  (_, alone), (_, together) = digits_runs
  assert alone["mesh"] is None and together["mesh"] == {"data": 2, "fsdp": 2}
  np.testing.assert_allclose(*losses, rtol=1e-4)
  assert together["codes_sha256"] == alone["codes_sha256"]
  assert together["test_accuracy"] == pytest.approx(alone["test_accuracy"], abs=0.006)


def as_two(script, run, *words):
  """Run a script of experiments/imagenet_vit as two processes with two devices each."""
  started = start_on(4, (SCRIPTS / f"{script}.py", run, *words, *PATIENCE), 2, FAST)
  first, other = finish_job(started)
  assert first.json["processes"] == 2 and other.out == "", other.err
  return first.json


def codes_in(run):
  return load_file(run / "codes" / "learned.safetensors")


@pytest.fixture
def run_of_two(digits_runs, tmp_path):
  return shutil.copytree(digits_runs[1][0], tmp_path / "run")


def test_two_processes_learn_the_codes_that_one_device_does(run_of_two, tmp_path):
  """Each reads its part of the digits."""
  alone = shutil.copytree(run_of_two, tmp_path / "alone")
  assert as_two("codes", run_of_two)["read"] == ["params", "training examples"]
  assert call("codes", alone).code == 0
  found = codes_in(run_of_two)
  for name, expected in codes_in(alone).items():
    np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.long
def test_two_processes_recall_codes_and_forget_from_them_as_one_device_does(run_of_two, tmp_path):
  assert as_two("codes", run_of_two, "--recall", "--per-class", 2)["read"] == ["params"]
  assert codes_in(run_of_two)["codes"].shape == (10, 2, 8, 8, 1)
  alone = shutil.copytree(run_of_two, tmp_path / "alone")
  words = ("--classes", 3, "--method", "projection", "--set", "depth=1")
  found, expected = (
    as_two("forget", run_of_two, *words),
    call("forget", alone, *words, "--json").json,
  )
  for key in ("classes", "method", "info", "predicted", "codes_sha256", "params_sha256_before"):
    assert found[key] == expected[key], key
  for key in ("retain_accuracy_after", "forget_error_after", "per_class_accuracy_after"):
    assert found[key] == expected[key], key
  found, expected = (forgotten_params(pathlib.Path(one["folder"])) for one in (found, expected))
  for path, leaf in expected.items():
    atol = 1e-5 * np.max(np.abs(leaf))
    np.testing.assert_allclose(found[path], leaf, rtol=0, atol=atol, err_msg=path)


def forgotten_params(folder):
  return _trees.by_path(restore_parts(folder / "params", stored_shapes(folder / "params")))


class Lab(NamedTuple):
  config: pathlib.Path
  data: pathlib.Path
  folder: pathlib.Path

  def start(self, words, count, *arguments):
    """Start a command as `count` processes, four devices in all, all of them in the axis fsdp."""
    settings = ("--data-dir", self.data, "--execution.fsdp", DEVICES)
    return start_on(DEVICES, (*words, *arguments, *settings), count, FAST)

  def start_training(self, name, count, *more):
    return self.start(
      TRAIN, count, self.config, "--out", self.folder / name, "--log-every", 1, *more
    )

  def train(self, name, count):
    outcomes = finish_job(self.start_training(name, count))
    assert [outcome.code for outcome in outcomes] == [0] * count, outcomes
    assert [outcome.out for outcome in outcomes[1:]] == [""] * (count - 1)
    assert json.loads(outcomes[0].out)["processes"] == count
    return self.found(name)

  def stopped(self, name, count, signum, victim):
    """Train until step 6, send one of the processes a signal, and return how all of them ended."""
    processes = self.start_training(name, count)
    metrics = self.folder / name / "metrics.jsonl"
    try:
      assert wait_for(
        lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 6, processes[0]
      )
      processes[victim].send_signal(signum)
    finally:
      outcomes = finish_job(processes)
    return outcomes

  def found(self, name):
    """Losses and final params of a run."""
    run = self.folder / name
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert len({path.name.split(".")[-1] for path in (run / "tensorboard").iterdir()}) == 1
    checkpoint = newest(run / "checkpoints")
    assert checkpoint.parent.name == str(STEPS)
    parts = {"params": stored_shapes(checkpoint)["params"]}
    return [record["loss"] for record in records], _trees.by_path(restore_parts(checkpoint, parts))


@pytest.fixture(scope="module")
def lab(prepared_sets, tmp_path_factory):
  folder = tmp_path_factory.mktemp("many")
  (folder / "tiny.toml").write_text(CONFIG)
  return Lab(folder / "tiny.toml", prepared_sets, folder)


@pytest.fixture(scope="module")
def alone(lab):
  return lab.train("alone", 1)


def assert_same(found, expected):
  """Equal up to the order of float32 sums.

  AdamW divides by the root of a second moment and magnifies the difference where that is small.
  """
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
  assert found[1].keys() == expected[1].keys()
  for path, leaf in expected[1].items():
    np.testing.assert_allclose(found[1][path], leaf, rtol=0, atol=5e-5, err_msg=path)


@pytest.mark.long
def test_two_processes_train_as_one_and_as_if_none_had_been_killed(lab, alone):
  losses, params = lab.train("two", 2)
  assert_same((losses, params), alone)
  other, killed = lab.stopped("killed", 2, SIGKILL, 1)
  assert killed.code == -SIGKILL and other.code == 1
  assert (
    "another process is dead or stuck" in other.err and "Resume with the same command" in other.err
  )
  again, restarted = lab.train("killed", 2)
  assert again == losses
  for path, leaf in params.items():
    np.testing.assert_array_equal(restarted[path], leaf)


@pytest.mark.long
def test_four_processes_stop_together_and_two_go_on(lab, alone):
  outcomes = lab.stopped("four", 4, SIGTERM, 2)
  assert [outcome.code for outcome in outcomes] == [143] * 4, outcomes
  messages = {
    line
    for outcome in outcomes
    for line in outcome.err.splitlines()
    if line.startswith("mnemonic:")
  }
  (message,) = messages
  assert "; the checkpoint is written. Resume with the same command." in message
  assert_same(lab.train("four", 2), alone)


@pytest.mark.long
def test_two_processes_start_from_a_file_as_one(lab):
  model = models.make("vit_ti16", shape=(32, 32, 3), num_classes=5, pool="mean")
  file, rng = lab.folder / "augreg.npz", np.random.default_rng(0)
  draw = lambda leaf: rng.normal(0, 0.02, leaf.shape).astype(np.float32)
  np.savez(file, **as_augreg(jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(0))[0])))
  flags = (
    "--model.pretrained",
    file,
    "--model.new_head",
    "true",
    "--train.steps",
    1,
    "--log-every",
    1,
  )
  losses = []
  for count in (1, 2):
    run = lab.folder / f"from a file, {count}"
    outcomes = finish_job(lab.start(TRAIN, count, lab.config, "--out", run, *flags))
    assert [outcome.code for outcome in outcomes] == [0] * count, outcomes
    losses.append(json.loads((run / "metrics.jsonl").read_text())["loss"])
  assert losses[1] == pytest.approx(losses[0], rel=1e-5)
  flags = ("--out", lab.folder / "refused", "--model.pretrained", lab.folder / "absent.npz")
  for outcome in finish_job(lab.start(TRAIN, 2, lab.config, *flags)):
    assert outcome.code == 1 and "absent.npz: no such file" in outcome.err


@pytest.mark.long
def test_two_processes_forget_as_one(lab, alone):
  run = lab.folder / "alone"
  before = snapshot(run / "checkpoints")
  reports, params = [], []
  for count in (2, 1):
    words = (SCRIPTS / "forget.py", run, "--classes", 1, "--forget.method", "perturbation")
    numbers = ("--forget.settings.lambda1", 1e-3, "--forget.settings.lambda2", 10.0)
    outcomes = finish_job(lab.start(words, count, *numbers))
    assert [outcome.code for outcome in outcomes] == [0] * count, outcomes
    folder = run / "forgets" / f"{len(reports) + 1:04d}"
    assert {path.name for path in folder.iterdir()} == {
      "params",
      "report.json",
      "report.html",
      "evidence.json",
    }
    reports.append(json.loads((folder / "report.json").read_text()))
    params.append(forgotten_params(folder))
  assert snapshot(run / "checkpoints") == before
  for key in (
    "classes",
    "info",
    "params_sha256_before",
    "codes_sha256",
    "retain_accuracy_after",
    "forget_error_after",
  ):
    assert reports[0][key] == reports[1][key], key
  for path, leaf in params[1].items():
    np.testing.assert_allclose(params[0][path], leaf, rtol=0, atol=1e-4, err_msg=path)
