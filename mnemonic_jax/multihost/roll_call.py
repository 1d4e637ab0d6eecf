"""Processes meet at the coordinator's port before JAX does; all hear by name which does not fit.

JAX's own runtime ends a process of a wrong count with a page of its log, and lets the others wait.
"""

from __future__ import annotations

import contextlib
import socket
import time

from mnemonic_jax.errors import MnemonicError, UsageError

_PAUSE = 0.2  # seconds between two tries to reach process 0
_SLOW = 5.0  # seconds for one line over a connection that stands
_LINE = 2000  # bytes


def roll_call(coordinator: str, process_id: int, num_processes: int, timeout: float) -> None:
  """Return when all processes are there and were started with the same count.

  Process 0 listens at `coordinator`, "host:port"; the others say who they are, and all hear the
  verdict.

  Raises:
    UsageError: the address is none, or the id is no id.
    MnemonicError: on every process, when one is missing, is there twice or has another count, or
      process 0 cannot be reached within `timeout` seconds.
  """
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise UsageError(
      f"--coordinator: got {coordinator}; expected host:port of process 0, "
      "for example 10.0.0.1:8476."
    )
  if not 0 <= process_id < num_processes:
    raise UsageError(
      f"--process-id: got {process_id} with --num-processes {num_processes}; "
      f"expected 0 to {num_processes - 1}, another one on each process."
    )
  deadline = time.monotonic() + timeout
  if process_id == 0:
    verdict = _listen(int(port), num_processes, deadline, timeout)
  else:
    verdict = _report(
      host.strip("[]"), int(port), f"{process_id} {num_processes}", deadline, timeout
    )
  if verdict:
    raise MnemonicError(f"--coordinator {coordinator}: {verdict}")


def _listen(port: int, num_processes: int, deadline: float, timeout: float) -> str:
  """What is wrong, or nothing; the others that are there are told."""
  try:
    both = socket.has_dualstack_ipv6()
    server = socket.create_server(
      ("", port),
      family=socket.AF_INET6 if both else socket.AF_INET,
      backlog=num_processes,
      dualstack_ipv6=both,
    )
  except OSError as error:
    return (
      f"process 0 cannot listen at port {port} ({error.strerror or error}). "
      "Choose another port on all processes."
    )
  present: dict[int, socket.socket] = {}
  strays = []
  verdict = ""
  with server, contextlib.ExitStack() as connections:
    while not verdict and len(present) < num_processes - 1:
      server.settimeout(max(deadline - time.monotonic(), 0.01))
      try:
        connection = connections.enter_context(server.accept()[0])
      except TimeoutError:
        absent = ", ".join(str(i) for i in range(1, num_processes) if i not in present)
        verdict = (
          f"of {num_processes} processes, {absent} did not come within {timeout:g} s "
          f"(--startup-timeout). Start all of them with --num-processes {num_processes} and a "
          "--process-id of their own, and see their logs."
        )
        break
      connection.settimeout(_SLOW)
      who = _read_line(connection).split()
      if len(who) != 2 or not all(word.isdecimal() for word in who):
        continue  # a stranger
      index, count = map(int, who)
      if count != num_processes:
        verdict = (
          f"process {index} was started with --num-processes {count}, process 0 with "
          f"{num_processes}. Start all with the same number."
        )
      elif not 0 < index < num_processes or index in present:
        verdict = (
          f"two processes were started with --process-id {index}. "
          f"Give each its own, 0 to {num_processes - 1}."
        )
      if verdict:
        strays.append(connection)
      else:
        present[index] = connection
    for connection in (*present.values(), *strays):
      with contextlib.suppress(OSError):  # it went away; JAX's runtime will miss it
        connection.sendall(f"{verdict or 'well'}\n".encode())
        connection.recv(1)  # it closes first: then the port is free at once
  return verdict


def _report(host: str, port: int, who: str, deadline: float, timeout: float) -> str:
  """Tell process 0 who we are, and return what it says is wrong, or nothing."""
  reason = "no answer"
  while (left := deadline - time.monotonic()) > 0:
    try:
      with socket.create_connection((host, port), timeout=left) as connection:
        connection.sendall(f"{who}\n".encode())
        connection.settimeout(timeout + _SLOW)  # process 0 waits for the others
        if answer := _read_line(connection):
          return "" if answer == "well" else answer
    except OSError as error:
      reason = error.strerror or str(error)
    time.sleep(_PAUSE)
  return (
    f"process {who.split()[0]} of {who.split()[1]} could not reach process 0 within {timeout:g} s "
    f"(--startup-timeout): {reason}. Check that process 0 runs on that host and that the port is "
    "open."
  )


def _read_line(connection: socket.socket) -> str:
  """One line of text; "" where none comes."""
  line = b""
  with contextlib.suppress(OSError):
    while not line.endswith(b"\n") and len(line) < _LINE and (more := connection.recv(_LINE)):
      line += more
  return line.decode(errors="replace").strip()
