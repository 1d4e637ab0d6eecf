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

  def asked(self, step: int) -> bool:
    """Tell, to all processes at the same step, whether one of them was asked to stop. Call it after every step."""
    from jax.experimental import multihost_utils  # imports jax: not for --help

    if multihost_utils.reached_preemption_sync_point(step):  # never in a single process
      self.signum = signal.SIGTERM
    return bool(self.signum)

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
    os.write(
      2,
      f"mnemonic: stopped by {_NAMES[signal.Signals(signum)]}; nothing that was finished is lost.\n".encode(),
    )
    os._exit(128 + signum)

  for signum in _heeded():
    signal.signal(signum, handle)


@contextmanager
def deferred() -> Iterator[StopFlag]:
  """Within, the first signal sets the flag, and a second Ctrl-C does what it did before.

  With several processes SIGTERM is left to the handler that JAX's runtime put when `processes.initialize` was called, by
  which all of them agree on a step (`StopFlag.asked`), and Ctrl-C is handed on to it. So call `exit_at_once` before
  `processes.initialize`; what it set is back after the block.
  """
  from mnemonic_jax.multihost import processes  # imports jax: not for --help

  flag, several, heard = StopFlag(), processes.several(), 0
  previous = {signum: signal.getsignal(signum) for signum in _heeded()}

  def handle(signum: int, frame: FrameType | None) -> None:
    nonlocal heard
    if heard and signum == signal.SIGINT:
      signal.signal(signum, previous[signal.SIGINT])
      signal.raise_signal(signum)
    heard = heard or signum
    if several:
      signal.raise_signal(signal.SIGTERM)
    else:
      flag.signum = heard

  for signum in previous:
    if not several or signum == signal.SIGINT:
      signal.signal(signum, handle)
  try:
    yield flag
  finally:
    for signum, handler in previous.items():
      signal.signal(signum, handler)
  if flag.signum and not several:
    signal.raise_signal(flag.signum)  # it came after the last point where the work could stop


def _heeded() -> list[signal.Signals]:
  """The signals that whoever started us did not ask us to ignore, as a shell does for background jobs."""
  return [signum for signum in _NAMES if signal.getsignal(signum) is not signal.SIG_IGN]
