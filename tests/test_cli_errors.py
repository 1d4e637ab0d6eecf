"""Bad input to the commands: an exit code, one message, nothing lost, and the next one works."""

from __future__ import annotations

import json
import pathlib
import shutil
import socket
import subprocess
import sys

import pytest
from running import (
  COMMAND,
  HANG,
  TINY,
  call,
  command,
  environment,
  finish,
  snapshot,
  start,
  wait_for,
)

from mnemonic_jax.cli import commands

pytest_plugins = ["run_fixtures"]
# Callbacks of Orbax's threads after a failed read or write; the commands hush them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def train(run: object, *overrides: object) -> tuple[object, ...]:
  return ("train", "digits_paper", "--out", run, *TINY, *overrides, "--json")


# ---- what is asked for


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (("--train.epoch", 5), "unknown field train.epoch. Did you mean train.epochs?"),
    (("--trian.epochs", 5), "Did you mean train.epochs?"),
    (("--train.epochs",), "--train.epochs: expected a value"),
    (("--train.epochs", 0), "train.epochs: got 0; expected a number of at least 1"),
    (("--train.epochs", 2.5), "train.epochs: got 2.5; expected a whole number"),
    (("--train.epochs", "many"), "train.epochs: got 'many'; expected a whole number"),
    (("--train.seed", -1), "train.seed: got -1; expected a number from 0 to 4294967295"),
    (("--train.seed", 2**32), "train.seed: got 4294967296"),
    (("--codes.rate", 1.5), "codes.rate: got 1.5; expected a number from 0 to 1"),
    (("--codes.rate=nan",), "codes.rate: got nan"),
    (("--train.warmup_steps", 2**31), "train.warmup_steps: got 2147483648"),
    (("--codes.distribution", "gauss"), "expected one of normal, uniform"),
    (("--forget.settings.lambda1", "inf"), "forget.settings.lambda1: got inf"),
    (("--forget.settings.lambda1", "1e39"), "got 1e+39; expected a number of at least 0, at most"),
    (("--forget.settings.lambda1", "1" + 400 * "0"), "forget.settings.lambda1: got"),
    (("--forget.settings.lamda1", 1), "unknown setting of perturbation. Did you mean lambda"),
    (("--forget.lambda1", 1), "Did you mean forget.settings.lambda1?"),
    (("--forget.method", "perturb"), "Did you mean perturbation?"),
    (("--epochs", 5), "unknown argument --epochs"),
    (("extra",), "unknown argument extra"),
  ],
)
def test_a_bad_override_is_refused_before_anything_is_made(words, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert message in call("train", "digits_paper", "--out", "x", *words).refusal(2)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("train", "digit", "--out", "x"), "Did you mean digits?"),
    (("train", "no/such.toml", "--out", "x"), "no such named config and no such file"),
    (("configs", "digit"), "Did you mean digits?"),
    (("evaluate", "x", "--train.epochs", 5), "mnemonic evaluate takes no train.epochs"),
  ],
)
def test_bad_usage_is_refused_before_anything_is_made(arguments, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert message in call(*arguments).refusal(2)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  "arguments",
  [
    (),
    ("unlearn",),
    ("train", "digits"),
    ("forget", "x"),
    ("forget", "x", "--classes"),
    ("report",),
  ],
)
def test_argparse_refuses_the_rest(arguments):
  outcome = call(*arguments)
  assert outcome.code == 2 and "usage: mnemonic" in outcome.err and outcome.out == ""


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("[train\n", "is not TOML"),
    ("[trian]\nepochs = 3\n", "unknown section [trian]. Did you mean train?"),
    ("[train]\nepoch = 3\n", "unknown field train.epoch. Did you mean train.epochs?"),
    ("train = 3\n", "expected a table [train]"),
    ("[forget]\nclasses = [true]\n", "forget.classes: got True; expected class indices or names"),
    ("[train]\nepochs = true\n", "train.epochs: got True; expected a whole number"),
    ("\xff", "cannot be read"),
  ],
)
def test_a_bad_config_file_is_refused(text, message, tmp_path):
  file = tmp_path / "mine.toml"
  file.write_bytes(text.encode("latin-1"))
  assert message in call("train", file, "--out", tmp_path / "run").refusal(2)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("classes", "message"),
  [
    ((10,), "classes: got 10; expected an index from 0 to 9"),
    ((-1,), "classes: got -1"),
    ((3, 3), "expected each class once"),
    (range(10), "one must stay"),
    ((0, 1, 2, 4, 5, 6, 7, 8, 9), "with those forgotten before are all 10"),
  ],
)
def test_classes_that_cannot_be_forgotten(classes, message, forgotten_once):
  before = snapshot(forgotten_once)
  assert message in call("forget", forgotten_once, "--classes", *classes).refusal(2)
  assert snapshot(forgotten_once) == before


@pytest.mark.parametrize(
  ("overrides", "code", "message"),
  [
    (("--forget.classes", 3, 12), 2, "classes: got 12"),
    (("--forget.classes", "[]"), 2, "classes: got none"),
    (("--codes.rate", 0.1), 2, "to mnemonic run: --forget.method perturbation"),
  ],
)
def test_run_refuses_before_it_trains(overrides, code, message, tmp_path):
  assert message in call("run", "digits", "--out", tmp_path / "run", *overrides).refusal(code)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("field", ["train.epochs", "forget.classes", "data.name"])
def test_a_forget_takes_only_its_own_fields(field, forgotten_once):
  assert f"--{field}" in call("forget", forgotten_once, "--classes", 1, f"--{field}", 1).refusal(2)


def test_the_forget_that_is_not_there(forgotten_once, trained_once):
  assert "this run has 1" in call("report", forgotten_once, "--number", 7).refusal(2)
  assert "has no finished forget" in call("report", trained_once).refusal()


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (("--set", "lambda1=1e300"), "forget.settings.lambda1: got 1e+300"),
    (("--set", "lambda1=much"), "forget.settings.lambda1: got 'much'; expected a number"),
    (("--set", "lambda1"), "--set: got 'lambda1'; expected NAME=VALUE"),
    (("--set", "=1"), "--set: got '=1'; expected NAME=VALUE"),
    (("--set", "lambda=1"), "unknown setting of perturbation. Did you mean lambda"),
    (("--method", "scissors"), "forget.method: got 'scissors'"),
  ],
)
def test_a_method_that_cannot_be_used(words, message, trained_once):
  assert message in call("forget", trained_once, "--classes", 3, *words).refusal(2)
  assert not (trained_once / "forgets").exists()


def test_a_training_that_diverges_says_so(tmp_path):
  message = call(*train(tmp_path / "run", "--train.learning_rate", 1e30)).refusal()
  assert "Use a smaller train.learning_rate" in message
  # Nothing was finished, so the same folder serves the next try.
  assert call(*train(tmp_path / "run")).json["epochs"] == 3


def test_a_batch_larger_than_the_data(tmp_path):
  assert (
    "train.batch_size: got 5000"
    in call(*train(tmp_path / "run", "--train.batch_size", 5000)).refusal()
  )
  assert call(*train(tmp_path / "run")).json["epochs"] == 3


# ---- run folders


@pytest.mark.parametrize(
  "verb", [("forget", "--classes", 1), ("evaluate",), ("report",)], ids=lambda verb: verb[0]
)
def test_a_run_folder_that_is_missing(verb, tmp_path):
  assert "no such run folder" in call(verb[0], tmp_path / "nothing", *verb[1:]).refusal()
  (tmp_path / "empty").mkdir()
  assert "config.json: cannot be read" in call(verb[0], tmp_path / "empty", *verb[1:]).refusal()
  (tmp_path / "file").write_text("")
  assert "no such run folder" in call(verb[0], tmp_path / "file", *verb[1:]).refusal()


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", "is not whole JSON"),
    ('{"format": 1, "config": {"na', "is not whole JSON"),
    ("[]", "no run record"),
    ('{"format": 3, "config": {}}', "format 3; this mnemonic reads formats 1 and 2"),
    ('{"format": [], "config": {}}', "is a run record of format []"),
    ('{"format": 1, "config": {"name": "x", "train": {"epoch": 3}}}', "unknown field train.epoch"),
    ('{"format": 1, "config": {"name": "x", "train": {"epochs": "3"}}}', "train.epochs: got '3'"),
    ("\xff", "is not whole JSON"),
    ('{"format": 1, "config": {"name": "x"}, "prng_impl": "dice"}', "prng_impl: got 'dice'"),
  ],
)
def test_a_damaged_config_json(text, message, forgotten):
  whole = (forgotten / "config.json").read_bytes()
  (forgotten / "config.json").write_bytes(text.encode("latin-1"))
  for outcome in (
    call(*train(forgotten)),
    call("forget", forgotten, "--classes", 1),
    call("evaluate", forgotten),
  ):
    assert message in (refusal := outcome.refusal()) and "config.json" in refusal
  (forgotten / "config.json").write_bytes(whole)
  assert call("evaluate", forgotten, "--json").json["classes"] == [3]


def test_a_folder_of_something_else(tmp_path):
  (tmp_path / "thesis.txt").write_text("mine")
  assert "is not empty and no run (found thesis.txt)" in call(*train(tmp_path)).refusal()
  assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
  assert "cannot be used as a run folder" in call(*train(tmp_path / "thesis.txt")).refusal()


def test_a_run_of_another_config_is_not_touched(trained_once):
  before = snapshot(trained_once)
  message = call(*train(trained_once, "--train.seed", 5)).refusal()
  assert "train.seed 0 there, 5 here" in message
  assert snapshot(trained_once) == before


def test_where_the_data_lie_and_how_to_forget_may_change(trained_once):
  result = call(
    *train(
      trained_once,
      "--forget.settings.lambda1",
      0.5,
      "--execution.microbatch",
      2,
      "--data.data_dir",
      "x",
    )
  ).json
  assert result["resumed_from_epoch"] == 3


def _whole_folder(run: pathlib.Path) -> None:
  shutil.rmtree(run / "checkpoints" / "132")
  (run / "checkpoints" / "132").mkdir()


def _arrays(run: pathlib.Path) -> None:
  for file in (run / "checkpoints" / "132").rglob("d/*"):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _some_files(run: pathlib.Path) -> None:
  for file in (run / "checkpoints" / "132").rglob("manifest.ocdbt"):
    file.unlink()


def _metadata(run: pathlib.Path) -> None:
  for file in (run / "checkpoints" / "132").rglob("_METADATA"):
    file.write_text("{")


@pytest.mark.parametrize("damage", [_whole_folder, _arrays, _some_files, _metadata])
def test_a_damaged_checkpoint_says_how_to_go_on(damage, forgotten):
  whole = call(*train(forgotten)).json["params_sha256"]
  damage(forgotten)
  before = snapshot(forgotten)
  for outcome in (
    call(*train(forgotten)),
    call("forget", forgotten, "--classes", 1),
    call("evaluate", forgotten),
  ):
    message = outcome.refusal()
    assert "132: cannot be restored" in message and "Move" in message
  assert snapshot(forgotten) == before
  shutil.move(
    forgotten / "checkpoints" / "132", forgotten.parent / "damaged"
  )  # as the message says
  result = call(*train(forgotten)).json
  assert (result["resumed_from_epoch"], result["params_sha256"]) == (2, whole)
  assert call("forget", forgotten, "--classes", 1, "--json").json["classes"] == [1, 3]


@pytest.mark.parametrize("gone", ["checkpoints", "checkpoints/*"])
def test_a_run_without_checkpoints(gone, trained):
  for path in trained.glob(gone):
    shutil.rmtree(path)
  for verb in (("forget", trained, "--classes", 1), ("evaluate", trained)):
    message = call(*verb).refusal()
    assert "checkpoint yet. Finish it first: mnemonic train digits_paper --out" in message
  assert call(*train(trained)).json["resumed_from_epoch"] == 0


def test_a_run_whose_checkpoints_are_gone_keeps_its_forgets(forgotten):
  shutil.rmtree(forgotten / "checkpoints")
  before = snapshot(forgotten)
  message = call(*train(forgotten, "--train.seed", 5)).refusal()
  assert "train.seed 0 there, 5 here" in message and snapshot(forgotten) == before
  message = call("report", forgotten).refusal()
  assert "--hide-codes" in message and "Train first" not in message
  assert call("report", forgotten, "--hide-codes").code == 0


def test_params_that_are_not_those_of_the_report(forgotten):
  assert call("forget", forgotten, "--classes", 5).code == 0
  params = forgotten / "forgets" / "0002" / "params"
  shutil.rmtree(params)
  shutil.copytree(forgotten / "forgets" / "0001" / "params", params)
  message = call("evaluate", forgotten).refusal()
  assert "0002/params: is not what report.json says" in message and "Forget again" in message
  report = forgotten / "forgets" / "0001" / "report.json"
  (forgotten / "forgets" / "0002" / "report.json").write_text("[]")
  assert "has no list of classes" in call("evaluate", forgotten, "--classes", 3).refusal()
  shutil.rmtree(forgotten / "forgets" / "0002")
  report.write_text(json.dumps(json.loads(report.read_text()) | {"params_sha256_before": "0" * 64}))
  assert "is not the checkpoint that was forgotten from" in call("evaluate", forgotten).refusal()


@pytest.mark.parametrize("name", ["run[1]", pytest.param("lr=[0.1,2]", marks=pytest.mark.long)])
def test_a_path_that_orbax_takes_for_a_pattern(name, trained, tmp_path):
  message = call(*train(tmp_path / name)).refusal()
  assert "[" in message and "pattern" in message and not (tmp_path / name / "checkpoints").exists()
  plain = (
    "--config",
    "digits_paper",
    "--model.hidden",
    32,
    "--classes",
    3,
    "--out",
    tmp_path / name,
  )
  message = call("forget", trained / "checkpoints" / "132" / "default", *plain).refusal()
  assert "pattern" in message
  moved = tmp_path / name / "run"
  shutil.rmtree(tmp_path / name, ignore_errors=True)
  shutil.copytree(trained, moved)
  assert call("evaluate", moved).code == 0
  assert "pattern" in call("forget", moved, "--classes", 3).refusal()


def test_a_package_that_is_missing(monkeypatch):
  def run(options):
    raise ImportError("Please install gcsfs to access Google Storage")

  monkeypatch.setattr(commands, "run", run)
  assert "install gcsfs" in (message := call("configs").refusal()) and "BUILD.md" in message


def test_stderr_is_closed(trained):
  words = [
    "sh",
    "-c",
    'exec "$@" 2>&-',
    "sh",
    *COMMAND,
    "forget",
    str(trained),
    "--classes",
    "3",
    "--json",
  ]
  outcome = subprocess.run(
    words, stdout=subprocess.PIPE, env=environment(), check=True, timeout=HANG
  )
  assert json.loads(outcome.stdout)["classes"] == [3]


def test_a_training_that_is_not_finished(trained):
  shutil.rmtree(trained / "checkpoints" / "132")
  assert (
    "training stands at epoch 2 of 3. Finish it"
    in call("forget", trained, "--classes", 1).refusal()
  )
  assert call(*train(trained)).json["resumed_from_epoch"] == 2
  assert call("forget", trained, "--classes", 1).code == 0


@pytest.mark.parametrize(
  "text", ["", '{"classes": [3', "[]", '{"classes": "all"}', '{"classes": [true]}']
)
def test_a_damaged_report_of_a_forget(text, forgotten):
  (forgotten / "forgets" / "0001" / "report.json").write_text(text)
  for verb in (("forget", forgotten, "--classes", 1), ("evaluate", forgotten)):
    message = call(*verb).refusal()
    assert "0001/report.json" in message and "Move that folder away" in message
  assert call("report", forgotten).refusal()
  shutil.move(forgotten / "forgets" / "0001", forgotten.parent / "damaged")
  assert call("forget", forgotten, "--classes", 3, "--json").json["classes"] == [3]


def test_a_report_of_classes_that_do_not_exist(forgotten):
  file = forgotten / "forgets" / "0001" / "report.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"classes": [3, 77]}))
  assert "77" in call("forget", forgotten, "--classes", 1).refusal()
  assert "77" in call("evaluate", forgotten).refusal(2)


def test_damaged_params_of_a_forget(forgotten):
  for file in (forgotten / "forgets" / "0001" / "params").rglob("d/*"):
    file.write_bytes(b"")
  message = call("evaluate", forgotten).refusal()
  assert "0001/params: cannot be restored" in message and "Forget again" in message
  again = call(
    "forget", forgotten, "--classes", 3, "--json"
  ).json  # a forget starts from the checkpoint
  assert again["classes"] == [3]
  assert call("evaluate", forgotten).code == 0


def test_two_processes_on_one_run(tmp_path):
  run = tmp_path / "run"
  settings = (
    "--out",
    run,
    "--model.hidden",
    32,
    "--train.epochs",
    100000,
    "--train.checkpoint_every",
    100000,
  )
  first = start("train", "digits_paper", *settings)
  try:
    assert wait_for(lambda: (run / "metrics.jsonl").exists(), first)
    before = (run / "config.json").read_bytes()
    for overrides in ((), ("--train.seed", 1)):  # neither resumes nor replaces it
      assert (
        "another mnemonic process" in call("train", "digits_paper", *settings, *overrides).refusal()
      )
    assert "another mnemonic process" in call("forget", run, "--classes", 1).refusal()
    assert (run / "config.json").read_bytes() == before
  finally:
    first.terminate()
    finish(first).refusal(143)
  assert len(list((run / "checkpoints").iterdir())) == 1  # of the moment it was stopped
  assert "training stands at epoch" in call("forget", run, "--classes", 1).refusal()


# ---- disks


@pytest.mark.parametrize("keep", [1, 2])
def test_the_disk_is_full_while_checkpointing(keep, disk, tmp_path):
  run = disk.path / "run"
  filler = disk.leave(110)  # one checkpoint, not two
  outcome = command(*train(run, "--train.keep_checkpoints", keep))
  message = outcome.refusal()
  assert "cannot write the checkpoint" in message and "No space left on device" in message
  saved = [path.name for path in (run / "checkpoints").iterdir() if path.name.isdigit()]
  assert saved, "make it fail later"
  filler.unlink()
  whole = call(*train(tmp_path / "whole")).json
  resumed = call(*train(run)).json
  assert resumed["resumed_from_epoch"] == int(saved[-1]) // 44
  assert resumed["params_sha256"] == whole["params_sha256"]


@pytest.mark.parametrize("free", [0, 4, 8])
def test_the_disk_is_full_from_the_start(free, disk):
  filler = disk.leave(free)
  assert "No space left on device" in call(*train(disk.path / "run")).refusal()
  filler.unlink()
  assert call(*train(disk.path / "run")).json["epochs"] == 3


@pytest.mark.parametrize(
  "free",
  [0, pytest.param(12, marks=pytest.mark.long), 40, pytest.param(72, marks=pytest.mark.long), 100],
)
def test_the_disk_is_full_while_forgetting(free, disk, forgotten_once):
  run = pathlib.Path(shutil.copytree(forgotten_once, disk.path / "run"))
  before = snapshot(run)
  filler = disk.leave(free)
  assert "No space left on device" in call("forget", run, "--classes", 5).refusal()
  assert snapshot(run) == before
  assert [path.name for path in (run / "forgets").glob("[!.]*")] == ["0001"]
  filler.unlink()
  assert call("forget", run, "--classes", 5, "--json").json["classes"] == [3, 5]
  assert sorted(path.name for path in (run / "forgets").iterdir()) == ["0001", "0002"]


def test_the_disk_is_full_while_reporting(disk, forgotten_once):
  run = pathlib.Path(shutil.copytree(forgotten_once, disk.path / "run"))
  before = snapshot(run)
  filler = disk.leave(8)
  assert (
    "report.html: cannot be written: No space left" in call("report", run, "--hide-codes").refusal()
  )
  assert snapshot(run) == before
  assert call("evaluate", run).code == 0  # needs no room
  filler.unlink()
  assert call("report", run, "--hide-codes").code == 0


def test_a_read_only_folder(disk, forgotten_once):
  run = pathlib.Path(shutil.copytree(forgotten_once, disk.path / "run"))
  disk.remount("ro")
  for verb in (
    train(run),
    train(disk.path / "new"),
    ("forget", run, "--classes", 5),
    ("report", run),
  ):
    assert "Read-only file system" in call(*verb).refusal()
  assert call("evaluate", run, "--json").json["classes"] == [3]
  disk.remount("rw")
  assert call("forget", run, "--classes", 5, "--json").json["classes"] == [3, 5]


def test_output_that_cannot_be_written():
  if not pathlib.Path("/dev/full").exists():
    pytest.skip("has no /dev/full")
  with open("/dev/full", "w") as full:
    outcome = command("configs", stdout=full)
  assert outcome.code == 1
  told = "configs itself is done, only its result could not be printed"
  assert outcome.err == f"mnemonic: stdout: [Errno 28] No space left on device; {told}.\n"


# ---- data


def test_a_data_set_that_is_missing_is_not_downloaded(tmp_path, monkeypatch):
  pytest.importorskip("tensorflow_datasets")

  def no_network(*_: object) -> None:
    raise AssertionError("asked the network")

  for name in ("connect", "connect_ex"):
    monkeypatch.setattr(socket.socket, name, no_network)
  monkeypatch.setattr(socket, "getaddrinfo", no_network)
  folder = tmp_path / "data"
  folder.mkdir()
  outcome = call("train", "mnist_mlp", "--data-dir", folder, "--out", tmp_path / "run")
  message = outcome.refusal()
  assert (
    "'mnist': not found, or not complete, at" in message and "download_and_prepare()" in message
  )
  assert "network" not in message and list(folder.iterdir()) == []
  # The same folder serves the next command.
  assert call(*train(tmp_path / "run")).json["epochs"] == 3


def test_tensorflow_datasets_is_not_installed(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  message = call("train", "mnist_mlp", "--out", tmp_path / "run").refusal()
  assert "pip install 'mnemonic-jax[data]'" in message
