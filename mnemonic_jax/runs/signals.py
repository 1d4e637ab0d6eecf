"""Ctrl-C and SIGTERM: at once where nothing can be lost, after a checkpoint in training."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mnemonic_jax.errors import Interrupted

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class StopFlag:
  """Remembers the first SIGINT or SIGTERM until the work reaches a point where it can stop."""

  def __init__(self) -> None:
    self.signum = 0

  def stop_if_asked(self, message: str) -> None:
    """Raise Interrupted when a signal came."""
    if self.signum:
      raise Interrupted(message, self.signum)


def exit_at_once() -> None:
  """From now on, Ctrl-C and SIGTERM end the process on the spot, with one line on stderr and 128 + signal.

  Nothing is unwound: an exception raised by a signal can land in an import or a garbage collection, where it shows a
  traceback, is lost, or crashes. Nothing needs to be: whatever is written is renamed when it is whole, locks die with
  the process, and the next command sweeps the rest.
  """

  def handle(signum: int, frame: FrameType | None) -> None:
    os.write(2, f"mnemonic: stopped by {_NAMES[signal.Signals(signum)]}; nothing that was finished is lost.\n".encode())
    os._exit(128 + signum)

  for signum in _heeded():
    signal.signal(signum, handle)


@contextmanager
def deferred() -> Iterator[StopFlag]:
  """Within, the first signal sets the flag, and a second Ctrl-C does what it did before."""
  flag = StopFlag()

  def handle(signum: int, frame: FrameType | None) -> None:
    if flag.signum and signum == signal.SIGINT:
      signal.signal(signum, previous[signal.SIGINT])
      signal.raise_signal(signum)
    flag.signum = flag.signum or signum

  previous = {signum: signal.signal(signum, handle) for signum in _heeded()}
  try:
    yield flag
  finally:
    for signum, handler in previous.items():
      signal.signal(signum, handler)
  if flag.signum:
    signal.raise_signal(flag.signum)  # it came after the last point where the work could stop


def _heeded() -> list[signal.Signals]:
  """The signals that whoever started us did not ask us to ignore, as a shell does for background jobs."""
  return [signum for signum in _NAMES if signal.getsignal(signum) is not signal.SIG_IGN]
