"""Handle Ctrl-C and SIGTERM: stop at once, or, while training, after a checkpoint."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mnemonic_jax.errors import Interrupted

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class StopFlag:
  """Remember the first SIGINT or SIGTERM until the work reaches a point where it can stop."""

  def __init__(self) -> None:
    self.signum = 0

  def asked(self, step: int) -> bool:
    """Tell whether any process was asked to stop; all of them learn it at the same step.

    Call it after every step.
    """
    from jax.experimental import multihost_utils  # imports jax: not for --help

    if multihost_utils.reached_preemption_sync_point(step):  # never in a single process
      self.signum = signal.SIGTERM
    return bool(self.signum)

  def stop_if_asked(self, message: str) -> None:
    """Raise Interrupted when a signal came."""
    if self.signum:
      raise Interrupted(message, self.signum)


def exit_at_once() -> None:
  """Make Ctrl-C and SIGTERM end the process at once, with one line on stderr and 128 + signal.

  No exception is raised: it could land in an import or a garbage collection, and show a traceback,
  get lost, or crash. None is needed: files are renamed when they are whole, locks die with the
  process, and the next command deletes the rest.
  """

  def handle(signum: int, frame: FrameType | None) -> None:
    name = _NAMES[signal.Signals(signum)]
    os.write(2, f"mnemonic: stopped by {name}; nothing that was finished is lost.\n".encode())
    os._exit(128 + signum)

  for signum in _heeded():
    signal.signal(signum, handle)


@contextmanager
def deferred() -> Iterator[StopFlag]:
  """Set a flag at the first signal, within the block; a second Ctrl-C does what it did before.

  With several processes SIGTERM is left to the handler that JAX's runtime installed in
  `processes.initialize`, with which all of them agree on a step (`StopFlag.asked`); Ctrl-C is
  passed on to it. So call `exit_at_once` before `processes.initialize`. The earlier handlers are
  back after the block.
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
  """Return the signals to handle; a shell asks its background jobs to ignore some."""
  return [signum for signum in _NAMES if signal.getsignal(signum) is not signal.SIG_IGN]
