"""Many processes: start them together, let one of them write, end them together."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from mnemonic_jax.errors import MnemonicError, UsageError
from mnemonic_jax.multihost.roll_call import roll_call

Result = TypeVar("Result")

_LONGEST = 2000  # bytes of a message from one process to the others
LAST = 2.0  # seconds that process 0 outlives the others


def initialize(
  coordinator: str | None = None,
  process_id: int | None = None,
  num_processes: int | None = None,
  *,
  startup_timeout: float = 300.0,
  peer_timeout: float = 60.0,
) -> None:
  """Join the other processes of this job, before anything else of JAX runs.

  Arguments left out come from the environment: `jax.distributed.initialize` knows TPU pods, SLURM,
  Open MPI and Kubernetes jobs. A single process (nothing is said anywhere, or `num_processes` is 1)
  joins nothing.

  Args:
    coordinator: "host:port" of process 0.
    process_id: from 0 to num_processes - 1, another one on each process.
    startup_timeout: seconds until all processes must be there.
    peer_timeout: seconds of `watchdog.Watchdog` for a step; JAX's own heartbeat gets twice that.

  Raises:
    UsageError: only some of the three are given, or one is out of range.
    MnemonicError: a process is missing or does not fit, on every process.
  """
  given = {
    "--coordinator": coordinator,
    "--process-id": process_id,
    "--num-processes": num_processes,
  }
  if num_processes == 1 or jax.distributed.is_initialized():
    return
  missing = [flag for flag, value in given.items() if value is None]
  if 0 < len(missing) < len(given):
    raise UsageError(
      f"{missing[0]}: missing; pass {', '.join(given)} on every process, or none of them."
    )
  started = time.monotonic()
  if coordinator is not None and process_id is not None and num_processes is not None:
    roll_call(coordinator, process_id, num_processes, startup_timeout)
  late = (
    f"the processes of this job did not come together within {startup_timeout:g} s "
    "(--startup-timeout). Start as many as the job has, and see their logs; on one machine alone, "
    "pass --num-processes 1."
  )
  # JAX's own timeout is the longer one: it ends the process with a page of its log.
  with _deadline(startup_timeout - (time.monotonic() - started), late, last=not process_id):
    try:
      jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        initialization_timeout=int(startup_timeout) + 30,
        heartbeat_timeout_seconds=max(int(2 * peer_timeout), 10),
        shutdown_timeout_seconds=max(int(2 * peer_timeout), 10),
      )
    except ValueError as error:
      if coordinator is None and "coordinator_address should be defined" in str(error):
        return  # no cluster: a single process
      raise MnemonicError(f"jax.distributed.initialize: {error}") from error
    except RuntimeError as error:
      if coordinator is None and "must be called before" in str(error):
        return  # JAX runs already, as in a notebook: this is no process of a job
      raise MnemonicError(
        f"jax.distributed.initialize: {error} Pass --coordinator, --process-id and "
        "--num-processes by hand; on one machine alone, --num-processes 1."
      ) from error
    jax.devices()  # here all processes wait for each other's list
  if several() and jax.default_backend() == "cpu":
    _keep_stdout_for_python()


def several() -> bool:
  """Tell whether this process has peers."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def is_writer() -> bool:
  """Tell whether this process writes what only one may write: process 0.

  >>> is_writer()
  True
  """
  return not several() or jax.process_index() == 0


def barrier(name: str) -> None:
  """Wait until all processes are here; `name` is the same on all, and told when they are not."""
  if several():
    multihost_utils.sync_global_devices(name)


def on_writer(work: Callable[[], None]) -> None:
  """Run `work` on the writer alone; all wait for it, and all fail when it does.

  Raises:
    MnemonicError: on the others, what the writer raised.
  """
  together(lambda: work() if is_writer() else None)


def together(work: Callable[[], Result]) -> Result:
  """Run `work` on all processes; when it fails on one, fail on all rather than wait for it later.

  No process may wait for another inside `work`.

  Raises:
    MnemonicError: on those that did not fail, what the first one raised that did.
  """
  result, failure = None, None
  try:
    result = work()
  except Exception as error:
    failure = error
  if several():
    text = "" if failure is None else str(failure) or type(failure).__name__
    page = np.frombuffer(text.encode()[:_LONGEST].ljust(_LONGEST, b"\0"), np.uint8)
    pages = [found.tobytes().rstrip(b"\0") for found in multihost_utils.process_allgather(page)]
    told = next((found.decode(errors="replace") for found in pages if found), "")
    if told and failure is None:
      raise MnemonicError(told)
  if failure is not None:
    raise failure
  return cast(Result, result)


def leave(code: int) -> None:
  """End a process that failed and has peers, which may never come to a common end.

  Without peers, or without a failure, nothing happens.
  """
  if code and several():
    end(code, last=is_writer())


def end(code: int, *, last: bool, message: str = "") -> None:
  """End the process at once: nothing interrupts a stuck collective, and JAX's exit waits for all.

  The process that hosts JAX's coordination service goes last, after the others have printed their
  message: without it JAX's runtime ends them in its own words.
  """
  if message:
    os.write(2, f"mnemonic: {message}\n".encode())  # past Python, whatever it does meanwhile
  sys.stdout.flush()
  sys.stderr.flush()
  if last:
    time.sleep(LAST)
  os._exit(code)


@contextlib.contextmanager
def _deadline(seconds: float, message: str, *, last: bool) -> Iterator[None]:
  """End the process with a message when the block, which nothing can interrupt, takes longer."""
  timer = threading.Timer(seconds, end, kwargs={"code": 1, "last": last, "message": message})
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def _keep_stdout_for_python() -> None:
  """Send what C++ prints to stderr: gloo greets its peers on stdout, which is for results."""
  sys.stdout.flush()
  sys.stdout = open(os.dup(1), "w", encoding=sys.stdout.encoding)  # noqa: SIM115
  os.dup2(2, 1)
