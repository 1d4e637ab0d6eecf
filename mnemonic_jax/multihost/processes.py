"""Many processes: start them together, let one of them write, end them together.

A watchdog ends a process whose peers are dead or stuck: nothing else can interrupt what JAX waits
for.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, NamedTuple, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from mnemonic_jax.errors import MnemonicError, UsageError
from mnemonic_jax.multihost.roll_call import roll_call

Result = TypeVar("Result")

_LONGEST = 2000  # bytes of a message from one process to the others
_LAST = 2.0  # seconds that process 0 outlives the others
_BROKEN = re.compile(
  r"gloo|nccl|coordination service|heartbeat|connection (closed|reset)", re.IGNORECASE
)


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
    peer_timeout: seconds of `Watchdog` for a step; JAX's own heartbeat gets twice that.

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
    time.sleep(_LAST)
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


class PeerLost(MnemonicError):
  """This process cannot go on: another one is dead or stuck, or it waits for something (`why`)."""

  def __init__(self, what: str, why: str = "", remedy: str = "") -> None:
    why = why or "another process is dead or stuck; its own log says more"
    super().__init__(
      f"{what}: {why}. This is process {jax.process_index()} of {jax.process_count()}. "
      f"Resume with the same command on all hosts{remedy}."
    )


class _Limit(NamedTuple):
  """Until when the next sign of life must come."""

  deadline: float
  what: str  # is waited for, and how long
  flag: str
  why: str  # it may not come, besides another process that is dead or stuck


class Watchdog:
  """Ends the process when a step takes too long: a collective waits for a dead peer for ever.

  Whatever `phase` announces must be over within `startup_timeout` seconds: all that comes before
  the first step, compilation, checkpoints, a batch of an evaluation. After a `beat`, a finished
  step, the next one must end within `timeout` seconds. A collective that fails because a peer went
  away raises `PeerLost` at the end of the block. Without peers nothing is watched.

  >>> with Watchdog(60.0, startup_timeout=300.0) as watchdog:
  ...   for step in range(3):
  ...     watchdog.beat(step)
  ...   watchdog.phase("the checkpoint")
  ...   watchdog.beat(step)  # it is written; a step is waited for again
  """

  def __init__(self, timeout: float = 60.0, startup_timeout: float = 300.0) -> None:
    for flag, seconds in (("--peer-timeout", timeout), ("--startup-timeout", startup_timeout)):
      if not seconds > 0:
        raise UsageError(f"{flag}: got {seconds}; expected seconds above 0.")
    self._timeout, self._startup_timeout, self._step = timeout, startup_timeout, 0
    self._waits_for_input, self._ending = False, False
    self._over = threading.Event()
    self.phase("start-up")

  def __enter__(self) -> Watchdog:
    self.phase("start-up")
    if several():
      threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    if self._ending:
      time.sleep(2 * _LAST)  # all is said, and the process on its way out
    self._over.set()
    if several() and isinstance(error, (RuntimeError, ValueError)) and _BROKEN.search(str(error)):
      raise PeerLost(
        f"cut off after step {self._step} ({str(error).splitlines()[0][:200]})"
      ) from error

  def beat(self, step: int) -> None:
    """Say that `step` is finished, its results read on the host, and that the next one runs."""
    self._step = step
    what = f"no step finished for {self._timeout:g} s after step {step}"
    self._limit = _Limit(
      time.monotonic() + self._timeout, what, "--peer-timeout", "waits for its input"
    )

  def phase(self, what: str) -> None:
    """Say that all before is finished and what begins now, until the next `phase` or `beat`."""
    what = f"{what} did not end within {self._startup_timeout:g} s"
    why = "this one takes that long by itself"
    self._limit = _Limit(time.monotonic() + self._startup_timeout, what, "--startup-timeout", why)

  def inputs(self, batches: Iterable[Any]) -> Iterator[Any]:
    """The same batches; who waits for one too long says so, and does not blame its peers."""
    iterator, end = iter(batches), object()
    while True:
      self._waits_for_input = True
      try:
        batch = next(iterator, end)
      finally:
        self._waits_for_input = False
      if batch is end:
        return
      yield batch

  def _watch(self) -> None:
    while not self._over.wait(min(self._timeout / 10, self._startup_timeout / 10, 1.0)):
      limit = self._limit
      if time.monotonic() > limit.deadline:
        self._ending = True
        why = f"another process is dead or stuck, or {limit.why}; its own log says more"
        if self._waits_for_input:
          why = "this process waits for its next batch, so its input is stuck or too slow"
        remedy = f", and with a larger {limit.flag} if all was well and only slow"
        message = str(PeerLost(f"{limit.what} ({limit.flag})", why, remedy))
        end(1, last=is_writer(), message=message)
