"""Kill -9 training and forgetting at random moments; one line per trial, exit 1 on any loss.

Run it with `make soak` or `python tests/soak_kill.py [TRAININGS [FORGETS]]`, 50 and 20 if not
given. Every other training is killed while it writes a checkpoint. Forty minutes on two busy cores.
"""

from __future__ import annotations

import pathlib
import random
import shutil
import sys
import tempfile
import time
from signal import SIGKILL

from killing import (
  begin_checkpointing,
  begin_forgetting,
  begin_training,
  finished_forgets,
  start_forgetting,
  start_training,
  stop,
)
from running import finish, snapshot


def main(trainings: int, forgets: int) -> int:
  """Run all trials; return the exit code."""
  randomness = random.Random(trainings)
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    whole = folder / "whole"
    started = time.monotonic()
    trained = finish(begin_training(whole)).json
    seconds = trained["seconds"]
    total = time.monotonic() - started
    print(f"undisturbed: {trained['epochs']} epochs in {seconds:.1f} s, {total:.1f} s in all")
    losses = killed = 0
    for number in range(1, trainings + 1):
      moment = randomness.uniform(0, 0.9 * seconds)
      problems, line, hit = training_trial(
        folder / "run", moment, (0.0, randomness.uniform(1e-4, 0.02))[number % 2], trained
      )
      losses, killed = losses + bool(problems), killed + hit
      print(f"train  {number:2d}: {line}: {'; '.join(problems) or 'nothing lost'}", flush=True)
    assert finish(start_forgetting(whole, 3)).code == 0
    copy = shutil.copytree(whole, folder / "copy")
    started = time.monotonic()
    forgotten = finish(start_forgetting(copy, 5)).json
    longest = time.monotonic() - started
    for number in range(1, forgets + 1):
      run = shutil.copytree(whole, folder / "run")
      # Half of the moments anywhere, half while it writes.
      begin, span = ((start_forgetting, longest), (begin_forgetting, 0.3))[number % 2]
      problems, line, hit = forgetting_trial(run, begin, randomness.uniform(0, span), forgotten)
      losses, killed = losses + bool(problems), killed + hit
      print(f"forget {number:2d}: {line}: {'; '.join(problems) or 'nothing lost'}", flush=True)
  print(
    f"{trainings + forgets} trials, {killed} killed before they were done, {losses} with a loss"
  )
  return 1 if losses else 0


def training_trial(
  run: pathlib.Path, moment: float, writing: float, expected: dict
) -> tuple[list[str], str, bool]:
  """Kill a training, `writing` seconds into a checkpoint if not 0; run it again, and compare."""
  process = begin_checkpointing(run, moment) if writing else begin_training(run)
  outcome = stop(process, SIGKILL, writing or moment)
  steps = sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
  again = finish(start_training(run))
  problems = []
  if again.code:
    problems.append(f"the next command exits {again.code}: {again.err.strip()}")
  else:
    result = again.json
    if result["params_sha256"] != expected["params_sha256"]:
      problems.append("other params than undisturbed")
    if steps and 44 * result["resumed_from_epoch"] < steps[-1]:
      problems.append(
        f"resumed from epoch {result['resumed_from_epoch']} though checkpoint {steps[-1]} was there"
      )
  if "Traceback" in again.err:
    problems.append("a traceback")
  where = f"{1000 * writing:2.0f} ms into a checkpoint, " if writing else ""
  line = f"killed {where}{moment:4.1f} s in, checkpoints {steps or 'none'}, exit {outcome.code}"
  shutil.rmtree(run)
  return problems, line, outcome.code == -SIGKILL


def forgetting_trial(
  run: pathlib.Path, begin, delay: float, expected: dict
) -> tuple[list[str], str, bool]:
  """Kill a forget, forget again, and compare with the undisturbed one."""
  checkpoints, earlier = snapshot(run / "checkpoints"), finished_forgets(run)
  outcome = stop(begin(run, 5), SIGKILL, delay)
  left = sorted(path.name.split("-")[0] for path in (run / "forgets").iterdir())
  problems = []
  try:
    if not finished_forgets(run).items() >= earlier.items():
      problems.append("a finished forget changed")
  except (AssertionError, OSError, ValueError) as error:
    problems.append(f"half a forget is visible: {error!r}")
  again = finish(start_forgetting(run, 5))
  if again.code:
    problems.append(f"the next command exits {again.code}: {again.err.strip()}")
  elif again.json["params_sha256_after"] != expected["params_sha256_after"]:
    problems.append("other params than undisturbed")
  if "Traceback" in again.err:
    problems.append("a traceback")
  if snapshot(run / "checkpoints") != checkpoints:
    problems.append("a checkpoint changed")
  if not finished_forgets(run).items() >= earlier.items() or list((run / "forgets").glob(".*")):
    problems.append("the next forget left the folder in disorder")
  began = begin.__name__.replace("_", " ")
  line = f"killed {delay:4.2f} s after {began}, left {left}, exit {outcome.code}"
  shutil.rmtree(run)
  return problems, line, outcome.code == -SIGKILL


if __name__ == "__main__":
  sys.exit(main(*map(int, (sys.argv[1:] + ["50", "20"][len(sys.argv) - 1 :])[:2])))
