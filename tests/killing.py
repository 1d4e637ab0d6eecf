"""Stop a command at a moment of its life, and see what is left: for the tests and for the soak."""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import running
from running import Outcome, environment, finish, snapshot, start, wait_for

# Seconds of training on any machine, with a checkpoint every other epoch.
SETTINGS = ("--train.epochs", 240, "--train.checkpoint_every", 2, "--model.hidden", 32)


def start_training(run: pathlib.Path) -> subprocess.Popen[str]:
  """Start training, or resume it."""
  return start("train", "digits_paper", "--out", run, *SETTINGS, "--json")


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
  seen = lambda: {(p, p.stat().st_mtime_ns) for p in (run / "forgets").glob(".unfinished-*")}
  before = seen()
  process = start_forgetting(run, *classes)
  wait_for(lambda: seen() - before, process)
  return process


# Runs a command that waits before a call of one of its functions, until it is told to go on.
_WAITING = """
import functools, importlib, os, sys
ready, go, where, calls = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
del sys.argv[1:5]
module, _, path = where.partition(":")
*owners, name = path.split(".")
owner = functools.reduce(getattr, owners, importlib.import_module(module))
real = getattr(owner, name)

def waiting(*args, **named):
  global calls
  calls -= 1
  if calls == 0:
    os.write(ready, b"x")
    os.read(go, 1)
  return real(*args, **named)

setattr(owner, name, waiting)
from mnemonic_jax.cli import main
sys.exit(main())
"""


def stopped_at(where: str, call: int, signum: signal.Signals, *arguments: object) -> Outcome:
  """Run a command, and send it a signal just before a call of one of its functions.

  Args:
    where: "module:function" or "module:Class.method".
    call: which of its calls, from 1.
  """
  ready, to_ready = os.pipe()
  from_go, go = os.pipe()
  words = [sys.executable, "-c", _WAITING, to_ready, from_go, where, call, *arguments]
  pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  process = subprocess.Popen(
    [str(word) for word in words], env=environment(), pass_fds=(to_ready, from_go), **pipes
  )
  os.close(to_ready)
  os.close(from_go)
  try:
    if os.read(ready, 1) != b"x":  # the end of the pipe: the process is over
      raise AssertionError(f"it never came to call {call} of {where}: {finish(process)}")
    process.send_signal(signum)
    with contextlib.suppress(BrokenPipeError):  # a killed process reads no more
      os.write(go, b"x")
    return finish(process)
  finally:
    os.close(ready)
    os.close(go)


def stopped_here(where: str, call: int, signum: signal.Signals, *arguments: object) -> Outcome:
  """The same in this process, for a signal that it survives."""
  module, _, path = where.partition(":")
  *owners, name = path.split(".")
  owner = functools.reduce(getattr, owners, importlib.import_module(module))
  real, calls = getattr(owner, name), itertools.count(1)

  def signalled(*args: Any, **named: Any) -> Any:
    if next(calls) == call:
      signal.raise_signal(signum)
    return real(*args, **named)

  with pytest.MonkeyPatch.context() as patched:
    patched.setattr(owner, name, signalled)
    return running.call(*arguments)


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
