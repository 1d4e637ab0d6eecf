"""The `mnemonic` command: train, learn codes, forget, evaluate, report."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from mnemonic_jax.errors import MnemonicError
from mnemonic_jax.runs import signals


def main(arguments: Sequence[str] | None = None) -> int:
  """Run one command and return its exit code.

  0 is done, 1 failed, 2 bad usage, 130 Ctrl-C, 143 SIGTERM.

  With MNEMONIC_DEBUG set in the environment, errors keep their traceback.
  """
  signals.exit_at_once()
  if sys.stderr is None:  # the caller closed it; print(file=None) would go to stdout
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
  try:
    from mnemonic_jax.cli.parser import parse

    options = parse(sys.argv[1:] if arguments is None else arguments)
    from mnemonic_jax.cli import commands  # imports jax: not for --help

    commands.run(options)
    return 0
  except MnemonicError as error:
    return _fail(str(error), error, error.exit_code)
  except BrokenPipeError:
    _drop_output()  # the reader of our output went away
    return 1
  except (ValueError, TypeError) as error:
    # The core's own checks: each names the argument and the remedy.
    return _fail(str(error), error, 1)
  except OSError as error:
    _drop_output()
    return _fail(f"{error}.", error, 1)
  except ImportError as error:
    return _fail(f"{error}. A package is missing: BUILD.md says which extra brings it.", error, 1)
  except Exception as error:
    return _fail(
      f"unexpected {type(error).__name__}: {error} (MNEMONIC_DEBUG=1 shows where)", error, 1
    )


def _drop_output() -> None:
  """Drop what stdout still holds: Python would try to write it at exit, and exit with 120."""
  if sys.stdout is sys.__stdout__:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _fail(message: str, error: BaseException, code: int) -> int:
  if os.environ.get("MNEMONIC_DEBUG"):
    raise error
  print(f"mnemonic: {message}", file=sys.stderr, flush=True)
  if "jax" in sys.modules:
    from mnemonic_jax.multihost import processes  # imports jax: not for --help

    processes.leave(code)
  return code
