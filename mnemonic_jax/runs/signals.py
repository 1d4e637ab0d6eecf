"""Ctrl-C and SIGTERM: long work ends in good order, after a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mnemonic_jax.errors import Interrupted


class StopFlag:
  """Remembers the first SIGINT or SIGTERM until the work reaches a point where it can stop."""

  def __init__(self) -> None:
    self.signum = 0

  def stop_if_asked(self, message: str) -> None:
    """Raise Interrupted when a signal came."""
    if self.signum:
      raise Interrupted(message, self.signum)


@contextmanager
def deferred() -> Iterator[StopFlag]:
  """Within, the first signal sets the flag, and a second Ctrl-C stops at once."""
  flag = StopFlag()

  def handle(signum: int, frame: FrameType | None) -> None:
    if flag.signum and signum == signal.SIGINT:
      raise KeyboardInterrupt
    flag.signum = flag.signum or signum

  previous = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield flag
  finally:
    for signum, handler in previous.items():
      signal.signal(signum, handler)


def raise_on_sigterm() -> None:
  """Make SIGTERM unwind the stack as Ctrl-C does, so that temporary files go away and locks are released."""

  def handle(signum: int, frame: FrameType | None) -> None:
    raise Interrupted("stopped by SIGTERM; nothing that was finished is lost.", signum)

  signal.signal(signal.SIGTERM, handle)
