"""Join the other processes of a command that runs on many hosts."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from mnemonic_jax.multihost import processes
from mnemonic_jax.multihost.watchdog import Watchdog


@contextmanager
def joined(options: argparse.Namespace) -> Iterator[Watchdog]:
  """Join the other processes, if there are any, and watch them for the length of the block."""
  processes.initialize(
    options.coordinator,
    options.process_id,
    options.num_processes,
    startup_timeout=options.startup_timeout,
    peer_timeout=options.peer_timeout,
  )
  with Watchdog(options.peer_timeout, options.startup_timeout) as watchdog:
    yield watchdog
