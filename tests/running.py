"""Commands run in this process or in one of their own."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from mnemonic_jax.cli import main

# A shell starts background jobs with Ctrl-C ignored, and ours inherit that; these tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)

TINY = ("--train.epochs", "3", "--train.checkpoint_every", "1", "--model.hidden", "32")
COMMAND = (sys.executable, "-c", "import sys; from mnemonic_jax.cli import main; sys.exit(main())")
HANG = 900  # seconds that only what hangs takes
# What the JSON of a forget promises.
FORGET_KEYS = {
  *(
    f"{key}_{when}"
    for key in ("retain_accuracy", "forget_error", "per_class_accuracy", "params_sha256")
    for when in ("before", "after")
  ),
  *("requested", "classes", "class_names", "time", "read", "method", "info"),
  *("verdict", "verdicts", "seconds", "checkpoint", "codes_sha256", "versions"),
}


@dataclasses.dataclass(frozen=True)
class Outcome:
  code: int
  out: str
  err: str

  @property
  def json(self) -> Any:
    """The one JSON object of a command that went well."""
    assert self.code == 0, self.err
    return json.loads(self.out)

  def refusal(self, code: int = 1) -> str:
    """The one message of a command that did not."""
    assert self.code == code, (self.code, self.err)
    assert self.out == ""
    for word in ("Traceback", "Exception ignored", "unexpected"):
      assert word not in self.err, self.err
    lines = self.err.splitlines()
    ours = [line for line in lines if line.startswith("mnemonic:")]
    assert len(ours) == 1, self.err
    assert len(ours[0]) < 700, self.err
    strays = [
      line for line in lines[: lines.index(ours[0])] if not line.startswith(("train: ", "read "))
    ]
    assert not strays, strays  # what follows it is its second line
    return self.err[self.err.index("mnemonic:") :]


def call(*arguments: object) -> Outcome:
  """Run a command in this process."""
  out, err = io.StringIO(), io.StringIO()
  handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
  levels = {name: logging.getLogger(name).level for name in ("absl", "asyncio")}
  hook = sys.unraisablehook
  try:
    with _compiling_once(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      code = main([str(argument) for argument in arguments])
  except SystemExit as exit:
    code = int(exit.code or 0)
  finally:
    sys.unraisablehook = hook
    for signum, handler in handlers.items():
      signal.signal(signum, handler)
    for name, level in levels.items():
      logging.getLogger(name).setLevel(level)
  return Outcome(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _compiling_once() -> Iterator[None]:
  """Keep what XLA compiles for the next command: most of a command's time on tiny models."""
  settings = {
    "jax_compilation_cache_dir": _compiled("here"),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
  }
  before = {name: getattr(jax.config, name) for name in settings}
  try:
    for name, value in settings.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()


def _compiled(kind: str) -> str:
  """A folder for all workers; where one reads what another is writing, JAX compiles again."""
  return os.path.join(os.environ.get("COMPILED_BY_TESTS") or _temporary(), kind)


@functools.cache
def _temporary() -> str:
  folder = tempfile.TemporaryDirectory()
  atexit.register(folder.cleanup)
  return folder.name


def environment() -> dict[str, str]:
  """Ours, without what would change results, with a cache of compiled programs for all commands."""
  kept = {
    key: value
    for key, value in os.environ.items()
    if not key.startswith(("JAX_", "XLA_", "TFDS_", "MNEMONIC_", "PYTHON"))
  }
  return kept | {"XDG_CACHE_HOME": _compiled("home")}


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
  """Start a command in a process of its own."""
  words = [*COMMAND, *map(str, arguments)]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
  return subprocess.Popen(words, text=True, **{"env": environment(), **pipes, **options})


def finish(process: subprocess.Popen[str]) -> Outcome:
  """Wait for it."""
  out, err = process.communicate(timeout=HANG)
  return Outcome(process.returncode, out, err)


def command(*arguments: object, **options: Any) -> Outcome:
  """Run a command in a process of its own."""
  return finish(start(*arguments, **options))


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> bool:
  """Wait until the condition holds; False if the process ended before."""
  while process.poll() is None:
    if condition():
      return True
    time.sleep(0.002)
  return False


def snapshot(folder: pathlib.Path) -> dict[str, str]:
  """SHA-256 of every file below a folder."""
  files = sorted(path for path in folder.rglob("*") if path.is_file())
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
  }
