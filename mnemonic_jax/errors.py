"""Errors that the command line shows as one message, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_FEW = 20  # up to so many names, a message lists them all


class MnemonicError(Exception):
  """Report a failure that the user can act on; exit code 1."""

  exit_code = 1


class UsageError(MnemonicError):
  """Report that the command or the config asks for something that does not exist; exit code 2."""

  exit_code = 2


class Interrupted(MnemonicError):
  """Report that a signal ended the command in good order; exit code 128 + signal."""

  def __init__(self, message: str, signum: int) -> None:
    super().__init__(message)
    self.exit_code = 128 + signum


def nearest(name: str, known: Iterable[str]) -> str:
  """End a message about an unknown name: suggest the nearest one, and list all if they are few.

  >>> nearest("epoch", ["epochs", "seed"])
  'Did you mean epochs? Known: epochs, seed.'
  """
  known = sorted(known)
  close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  listed = f"Known: {', '.join(known)}." if len(known) <= _FEW or not close else ""
  return (f"Did you mean {close[0]}? " if close else "") + listed
