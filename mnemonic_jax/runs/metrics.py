"""Keep metrics.jsonl and TensorBoard's files of a run."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from etils import epath

from mnemonic_jax.errors import MnemonicError
from mnemonic_jax.multihost import processes
from mnemonic_jax.runs import files

_NAME = "metrics.jsonl"


def read(run: epath.Path) -> list[dict[str, Any]]:
  """Return the whole records of metrics.jsonl.

  A line that a kill cut, or one without a step, is left out.
  """
  path = run / _NAME
  records = []
  for line in path.read_bytes().decode("utf-8", "replace").splitlines() if path.exists() else []:
    with contextlib.suppress(ValueError):
      record = json.loads(line)
      if _is_record(record):
        records.append(record)
  return records


def _is_record(record: Any) -> bool:
  if not isinstance(record, dict):
    return False
  step, epoch = record.get("step"), record.get("epoch", 1)
  is_number = isinstance(epoch, (int, float)) and not isinstance(epoch, bool)
  return is_number and type(step) is int and step > 0


def rewind(run: epath.Path, step: int) -> None:
  """Drop the records after `step`, which a resumed training writes again."""
  if (run / _NAME).exists():
    kept = [record for record in read(run) if record["step"] <= step]
    files.write_text(run / _NAME, "".join(files.dumps(record) + "\n" for record in kept))


@contextmanager
def log(run: epath.Path, step: int) -> Iterator[Callable[[dict[str, Any]], None]]:
  """Give a function that adds a record to metrics.jsonl and to TensorBoard's files.

  Of several processes, process 0 writes. Nothing can be appended to in an object store: there each
  record writes the files again, from a local folder.

  Args:
    step: the step that training starts from.
  """
  if not processes.is_writer():
    yield lambda record: None
    return
  with ExitStack() as stack:
    folder = run
    if files.is_remote(run):
      folder = epath.Path(stack.enter_context(tempfile.TemporaryDirectory()))
      lines = (files.dumps(record) + "\n" for record in read(run))
      (folder / _NAME).write_text("".join(lines))
    board = _Board(folder / "tensorboard", step)
    stack.callback(board.close)

    def add(record: dict[str, Any]) -> None:
      try:
        with open(folder / _NAME, "a", encoding="utf-8") as file:
          file.write(files.dumps(record) + "\n")
        board.add(record)
        if folder != run:
          _copy([folder / _NAME, *(folder / "tensorboard").iterdir()], folder, run)
      except OSError as error:
        reason = error.strerror or error
        raise MnemonicError(f"{run}: metrics cannot be written: {reason}.") from error

    yield add


def _copy(written: list[epath.Path], folder: epath.Path, run: epath.Path) -> None:
  for file in written:
    target = run / file.relative_to(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(file.read_bytes())


class _Board:
  """Write scalars for TensorBoard; the file is made with the first record."""

  def __init__(self, folder: epath.Path, step: int) -> None:
    self._folder, self._step, self._writer = folder, step, None

  def add(self, record: dict[str, Any]) -> None:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    scalars = [
      Summary.Value(tag=name, simple_value=value)
      for name, value in files.plain(record).items()
      if name != "step" and value is not None
    ]
    writer = self._open()
    summary = Summary(value=scalars)
    writer.write_event(Event(wall_time=time.time(), step=record["step"], summary=summary))
    writer.flush()

  def _open(self) -> Any:
    if self._writer is None:
      from tensorboardX.event_file_writer import EventsWriter  # takes half a second
      from tensorboardX.proto.event_pb2 import Event, SessionLog

      self._folder.mkdir(exist_ok=True)
      writer: Any = EventsWriter(str(self._folder / "events"))
      # Tells TensorBoard to drop what a killed training wrote after its last checkpoint.
      start = SessionLog(status=SessionLog.START)
      writer.write_event(Event(wall_time=time.time(), step=self._step + 1, session_log=start))
      self._writer = writer
    return self._writer

  def close(self) -> None:
    if self._writer is not None:
      with contextlib.suppress(OSError):  # all that was logged is flushed
        self._writer.close()
