"""Ctrl-C, SIGTERM and kill -9 at several moments: the next command goes on, and nothing finished is lost.

One random moment of each here; `make soak` tries dozens.
"""

from __future__ import annotations

import pathlib
import random
import shutil
from signal import SIGINT, SIGKILL, SIGTERM

import pytest
from killing import (
  begin_forgetting,
  begin_training,
  finished_forgets,
  start_forgetting,
  start_training,
  stop,
)
from running import call, finish, snapshot, start, wait_for

pytest_plugins = ["run_fixtures"]

TRIALS = 1


def test_a_training_stopped_in_every_way_ends_as_if_nothing_had_happened(tmp_path):
  run = tmp_path / "run"
  undisturbed = start_training(tmp_path / "undisturbed")
  for signum, code in ((SIGINT, 130), (SIGTERM, 143)):
    message = stop(begin_training(run), signum).refusal(code)
    epoch = int(message.split("stopped after epoch ")[1].split()[0])
    assert "the checkpoint is written. Resume with the same command." in message
    assert (run / "checkpoints" / str(44 * epoch)).is_dir()
  randomness = random.Random(0)
  for _ in range(TRIALS):
    outcome = stop(begin_training(run), SIGKILL, randomness.uniform(0, 0.5))
    assert outcome.code == -SIGKILL, "the training was over: give it more epochs"
    assert "training stands at epoch" in call("forget", run, "--classes", 1).refusal()
  result = finish(start_training(run)).json
  assert result["resumed_from_epoch"] >= epoch
  assert result["params_sha256"] == finish(undisturbed).json["params_sha256"]
  lines = (run / "metrics.jsonl").read_text().splitlines()
  assert len(lines) == 240


@pytest.mark.long
def test_a_killed_first_epoch_starts_again(tmp_path):
  run = tmp_path / "run"
  process = start("train", "digits", "--out", run, "--model.hidden", 32, "--train.epochs", 1)
  wait_for(lambda: (run / "config.json").exists(), process)
  assert stop(process, SIGKILL).code == -SIGKILL
  assert "no checkpoint yet" in call("forget", run, "--classes", 1).refusal()
  settings = (
    "--train.epochs",
    1,
    "--model.hidden",
    16,
  )  # other settings will do: nothing is there yet
  assert call("train", "digits", "--out", run, *settings, "--json").json["epochs"] == 1


@pytest.mark.long
@pytest.mark.parametrize(
  ("signum", "seconds"), [(SIGINT, 0.4), (SIGINT, 1.2), (SIGTERM, 0.8), (SIGTERM, 1.6)]
)
def test_a_command_stopped_while_it_starts(signum, seconds, tmp_path):
  run = tmp_path / "run"
  process = start("train", "digits", "--out", run, "--train.epochs", 100000, "--model.hidden", 32)
  assert "stopped" in stop(process, signum, seconds).refusal(128 + signum)


def test_a_forget_stopped_in_every_way_leaves_nothing_and_the_next_one_works(forgotten, tmp_path):
  copy = pathlib.Path(shutil.copytree(forgotten, tmp_path / "copy"))
  undisturbed = start_forgetting(copy, 5)
  checkpoints, earlier = snapshot(forgotten / "checkpoints"), finished_forgets(forgotten)

  def check() -> None:
    assert snapshot(forgotten / "checkpoints") == checkpoints
    assert finished_forgets(forgotten).items() >= earlier.items()
    assert call("evaluate", forgotten).code == 0

  for signum in (SIGINT, SIGTERM):
    message = stop(begin_forgetting(forgotten, 5), signum).refusal(128 + signum)
    assert "nothing that was finished is lost" in message
    assert list(finished_forgets(forgotten)) == ["0001"]
    check()
  randomness = random.Random(1)
  for begin, longest in ((start_forgetting, 3.0), (begin_forgetting, 0.1), (begin_forgetting, 0.1))[
    :TRIALS
  ]:
    stop(begin(forgotten, 5), SIGKILL, randomness.uniform(0, longest))
    check()
  result = finish(start_forgetting(forgotten, 5)).json
  assert result["params_sha256_after"] == finish(undisturbed).json["params_sha256_after"]
  assert result["classes"] == [3, 5]
  assert not list((forgotten / "forgets").glob(".*"))  # what the killed ones left is swept away
  check()
