"""Jobs of several processes on this machine."""

from __future__ import annotations

import pathlib
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from running import HANG, Outcome, environment

ROOT = pathlib.Path(__file__).parent.parent


def free_address() -> str:
  """An address that nobody listens at."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    return f"127.0.0.1:{server.getsockname()[1]}"


def start_job(
  program: Sequence[object], count: int, **variables: str
) -> list[subprocess.Popen[str]]:
  """Start `count` processes of a program, with flags that say who they are; one alone gets none."""
  address = free_address()
  options: dict[str, Any] = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
  options["env"] = environment() | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | variables
  processes = []
  for index in range(count):
    flags = (
      ()
      if count == 1
      else ("--coordinator", address, "--process-id", index, "--num-processes", count)
    )
    processes.append(subprocess.Popen([sys.executable, *map(str, (*program, *flags))], **options))
  return processes


def finish_job(processes: Sequence[subprocess.Popen[str]], seconds: float = HANG) -> list[Outcome]:
  """Wait for all of them; none outlives this."""
  try:
    ends = [process.communicate(timeout=seconds) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [
    Outcome(process.returncode, out, err)
    for process, (out, err) in zip(processes, ends, strict=True)
  ]
