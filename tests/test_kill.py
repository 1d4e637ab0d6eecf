"""Ctrl-C, SIGTERM and kill -9: the next command goes on, and nothing finished is lost.

Each signal is sent when the command has come to a certain point; `make soak` tries dozens of random
moments. A training that ends by itself may run in this process; a forget is ended at once.
"""

from __future__ import annotations

import pathlib
import shutil
from signal import SIGINT, SIGKILL, SIGTERM

import pytest
from killing import finished_forgets, stopped_at, stopped_here
from running import call, snapshot

pytest_plugins = ["run_fixtures"]

# Where a command waits for its signal.
EPOCH_DONE = "mnemonic_jax.progress:Progress.update"
DATA_LOADED = "mnemonic_jax.runs.train:train"
FIRST_CHECKPOINT = "mnemonic_jax.runs.checkpoints:Checkpoints.save"
CHECKPOINT_BEGUN = "mnemonic_jax.runs.checkpoints:Checkpoints.wait"
PARAMS = "mnemonic_jax.runs.forget:save_params"
REPORT = "mnemonic_jax.runs.files:write_json"  # what a forget writes last
RENAMING = "os:rename"


def training(run: pathlib.Path, epochs: int = 12) -> tuple[object, ...]:
  settings = ("--train.epochs", epochs, "--train.checkpoint_every", 2, "--model.hidden", 32)
  return ("train", "digits_paper", "--out", run, *settings, "--json")


def test_a_training_stopped_in_every_way_ends_as_if_nothing_had_happened(tmp_path):
  run = tmp_path / "run"
  for stopped, signum, code, stands in (
    (stopped_at, SIGINT, 130, 3),
    (stopped_here, SIGTERM, 143, 6),
  ):
    # It learns of the signal after three more epochs, and ends there.
    message = stopped(EPOCH_DONE, 3, signum, *training(run)).refusal(code)
    assert f"stopped after epoch {stands} of 12; the checkpoint is written." in message
    assert "Resume with the same command." in message
    assert (run / "checkpoints" / str(44 * stands)).is_dir()
  assert stopped_at(EPOCH_DONE, 2, SIGKILL, *training(run)).code == -SIGKILL
  assert "training stands at epoch" in call("forget", run, "--classes", 1).refusal()
  result = call(*training(run)).json
  assert result["resumed_from_epoch"] >= 6
  undisturbed = call(*training(tmp_path / "undisturbed")).json
  assert result["params_sha256"] == undisturbed["params_sha256"]
  assert len((run / "metrics.jsonl").read_text().splitlines()) == 12


@pytest.mark.long
@pytest.mark.parametrize("where", [FIRST_CHECKPOINT, DATA_LOADED])
def test_a_killed_first_epoch_starts_again(where, tmp_path):
  run = tmp_path / "run"
  assert stopped_at(where, 1, SIGKILL, *training(run, 1)).code == -SIGKILL
  assert (run / "config.json").exists()
  assert "checkpoint yet" in call("forget", run, "--classes", 1).refusal()
  other = ("--train.epochs", 1, "--model.hidden", 16)  # will do: nothing is there yet
  assert call("train", "digits_paper", "--out", run, *other, "--json").json["epochs"] == 1


@pytest.mark.long
def test_a_training_killed_inside_a_checkpoint_goes_on_from_the_one_before(tmp_path):
  run = tmp_path / "run"
  outcome = stopped_at(CHECKPOINT_BEGUN, 1, SIGKILL, *training(run, 4))
  assert outcome.code == -SIGKILL
  assert call(*training(run, 4)).json["resumed_from_epoch"] in (2, 4)


@pytest.mark.long
@pytest.mark.parametrize("signum", [SIGINT, SIGTERM])
@pytest.mark.parametrize("where", ["mnemonic_jax.runs.setup:load_data", DATA_LOADED])
def test_a_command_stopped_while_it_starts(where, signum, tmp_path):
  outcome = stopped_at(where, 1, signum, *training(tmp_path / "run"))
  assert "stopped" in outcome.refusal(128 + signum)


def test_a_forget_stopped_in_every_way_leaves_nothing_and_the_next_one_works(forgotten, tmp_path):
  copy = pathlib.Path(shutil.copytree(forgotten, tmp_path / "copy"))
  checkpoints, earlier = snapshot(forgotten / "checkpoints"), finished_forgets(forgotten)
  forget = ("forget", forgotten, "--classes", 5, "--json")
  for signum, where in ((SIGINT, PARAMS), (SIGTERM, REPORT), (SIGKILL, RENAMING)):
    outcome = stopped_at(where, 1, signum, *forget)
    if signum == SIGKILL:
      assert outcome.code == -SIGKILL
    else:
      assert "nothing that was finished is lost" in outcome.refusal(128 + signum)
    assert finished_forgets(forgotten) == earlier
    assert list((forgotten / "forgets").glob(".unfinished-*"))
    assert snapshot(forgotten / "checkpoints") == checkpoints
    assert call("evaluate", forgotten).code == 0
  result = call(*forget).json
  undisturbed = call("forget", copy, "--classes", 5, "--json").json
  assert result["params_sha256_after"] == undisturbed["params_sha256_after"]
  assert result["classes"] == [3, 5]
  assert not list((forgotten / "forgets").glob(".*"))  # what the killed ones left is swept away
