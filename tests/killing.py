"""Stop a command at a moment of its life, and see what is left: for the tests and for the soak."""

from __future__ import annotations

import json
import pathlib
import signal
import subprocess
import time

from running import Outcome, finish, snapshot, start, wait_for

# Seconds of training on any machine, with a checkpoint every other epoch.
SETTINGS = ("--train.epochs", 240, "--train.checkpoint_every", 2, "--model.hidden", 32)


def start_training(run: pathlib.Path) -> subprocess.Popen[str]:
  """Start training, or resume it."""
  return start("train", "digits", "--out", run, *SETTINGS, "--json")


def begin_training(run: pathlib.Path) -> subprocess.Popen[str]:
  """The same; return when it has done an epoch."""
  metrics = run / "metrics.jsonl"
  before = metrics.stat().st_ino if metrics.exists() else None
  process = start_training(run)
  # A resumed training first replaces the file by the lines up to its checkpoint.
  wait_for(lambda: metrics.exists() and metrics.stat().st_ino != before, process)
  size = metrics.stat().st_size
  wait_for(lambda: before is None or metrics.stat().st_size > size, process)
  return process


def begin_checkpointing(run: pathlib.Path, seconds: float = 0.0) -> subprocess.Popen[str]:
  """The same, and train for some seconds more; return while it writes a checkpoint."""
  process = begin_training(run)
  time.sleep(seconds)
  folder = run / "checkpoints"
  wait_for(lambda: any("tmp" in path.name for path in folder.glob("*") if path.is_dir()), process)
  return process


def start_forgetting(run: pathlib.Path, *classes: int) -> subprocess.Popen[str]:
  """Start to forget."""
  return start("forget", run, "--classes", *classes, "--json")


def begin_forgetting(run: pathlib.Path, *classes: int) -> subprocess.Popen[str]:
  """The same; return when it has begun to write."""
  before = set((run / "forgets").glob(".unfinished-*"))
  process = start_forgetting(run, *classes)
  wait_for(lambda: set((run / "forgets").glob(".unfinished-*")) - before, process)
  return process


def stop(process: subprocess.Popen[str], signum: signal.Signals, seconds: float = 0.0) -> Outcome:
  """Send a signal after some seconds, and wait for the end."""
  time.sleep(seconds)
  process.send_signal(signum)
  return finish(process)


def finished_forgets(run: pathlib.Path) -> dict[str, dict[str, str]]:
  """Every file of every finished forget, hashed; what is there must be whole."""
  found = {}
  for folder in sorted((run / "forgets").glob("[0-9]*")):
    for name in ("report.json", "evidence.json"):
      json.loads((folder / name).read_text())
    assert "</html>" in (folder / "report.html").read_text()[-20:]
    assert (folder / "params" / "_METADATA").exists()
    found[folder.name] = snapshot(folder)
  return found
