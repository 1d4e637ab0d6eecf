"""End a process whose peers are dead or stuck: nothing else can interrupt what JAX waits for."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, NamedTuple

import jax

from mnemonic_jax.errors import MnemonicError, UsageError
from mnemonic_jax.multihost import processes

_BROKEN = re.compile(
  r"gloo|nccl|coordination service|heartbeat|connection (closed|reset)", re.IGNORECASE
)


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
    if processes.several():
      threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    if self._ending:
      time.sleep(2 * processes.LAST)  # all is said, and the process on its way out
    self._over.set()
    if (
      processes.several()
      and isinstance(error, (RuntimeError, ValueError))
      and _BROKEN.search(str(error))
    ):
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
        processes.end(1, last=processes.is_writer(), message=message)
