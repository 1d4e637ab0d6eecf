"""The run folder: config.json, metrics.jsonl, checkpoints/, forgets/NNNN/."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import filelock
import jax
from etils import epath

import mnemonic_jax
from mnemonic_jax.errors import MnemonicError, UsageError
from mnemonic_jax.multihost import paths, processes
from mnemonic_jax.runs import config as configs
from mnemonic_jax.runs import files
from mnemonic_jax.runs.config import Config

_FORMAT = 1
# Fields that say where or how, not what: they may differ between the commands of one run.
_FREE_FIELDS = (("data", "data_dir"), ("train", "keep_checkpoints"), ("execution",), ("forget",))


class RunFolder:
  """Paths and records of one run. Everything in it is written whole or not at all.

  Of several processes, which share the folder, process 0 writes the records; all of them call the same functions.
  """

  def __init__(self, path: epath.PathLike, config: Config, prng_impl: str) -> None:
    self.path, self.config, self.prng_impl = epath.Path(path), config, prng_impl

  @classmethod
  def create(cls, path: epath.PathLike, config: Config) -> RunFolder:
    """Open the run at `path` for training by `config`, making the folder if it is new.

    Raises:
      MnemonicError: the folder holds something else, or a run of another config.
    """
    run = cls(path, config, str(jax.random.key_impl(jax.random.key(0))))
    processes.on_writer(run._create)
    if not (run.path / "config.json").exists():  # process 0 made it
      raise MnemonicError(
        f"{path}: process {jax.process_index()} does not see what process 0 wrote. Put the run on a file system that all "
        "processes share, or in an object store (gs://)."
      )
    run.prng_impl = cls.open(path).prng_impl
    return run

  def _create(self) -> None:
    """Make the folder and its config.json, or see that they fit."""
    path = self.path
    try:
      path.mkdir(parents=True, exist_ok=True)
      found = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError as error:
      raise MnemonicError(
        f"{path}: cannot be used as a run folder: {error.strerror or error}."
      ) from error
    if found and "config.json" not in found:
      raise MnemonicError(
        f"{path}: is not empty and no run (found {found[0]}). Choose a new folder for --out."
      )
    with self._lock():
      if (path / "config.json").exists():
        old = RunFolder.open(path)
        if _identity(old.config) == _identity(self.config):
          return
        if paths.children(self.checkpoints, "[0-9]*") or self._numbered_forgets():
          raise MnemonicError(
            f"{path}: holds a run with other settings ({_difference(old.config, self.config)}). Nothing was changed; "
            "choose another --out, or repeat the settings of that run to resume it."
          )
      record = {
        "format": _FORMAT,
        "config": configs.as_dict(self.config),
        "prng_impl": self.prng_impl,
        "versions": versions(),
      }
      files.write_json(path / "config.json", record)

  def require_config(self) -> None:
    """Refuse to train when the folder meanwhile belongs to another config; call with the run locked."""

    def check() -> None:
      there = RunFolder.open(self.path).config
      if _identity(there) != _identity(self.config):
        raise MnemonicError(
          f"{self.path}: another command has made it a run with other settings ({_difference(there, self.config)}). Nothing "
          "was changed; choose another --out."
        )

    processes.on_writer(check)

  @classmethod
  def open(cls, path: epath.PathLike) -> RunFolder:
    """Open an existing run."""
    path = epath.Path(path)
    if not path.is_dir():
      raise MnemonicError(
        f"{path}: no such run folder. Make one with: mnemonic train CONFIG --out {path}"
      )
    remedy = "It is no run folder, or a damaged one; train into a new folder with: mnemonic train CONFIG --out RUN"
    record = files.read_json(path / "config.json", remedy)
    if (
      not isinstance(record, dict)
      or record.get("format") != _FORMAT
      or not isinstance(record.get("config"), dict)
    ):
      raise MnemonicError(f"{path / 'config.json'}: is no run record of format {_FORMAT}. {remedy}")
    try:
      config = configs.build(str(record["config"].get("name", path.name)), record["config"])
    except UsageError as error:
      raise MnemonicError(f"{path / 'config.json'}: {error} {remedy}") from error
    prng_impl = record.get("prng_impl", "threefry2x32")
    try:
      jax.random.key(0, impl=str(prng_impl))
    except ValueError:
      raise MnemonicError(
        f"{path / 'config.json'}: prng_impl: got {prng_impl!r}; expected one that JAX knows. {remedy}"
      ) from None
    return cls(path, config, str(prng_impl))

  @property
  def checkpoints(self) -> epath.Path:
    """Where Orbax keeps the train states."""
    return self.path / "checkpoints"

  @contextmanager
  def locked(self) -> Iterator[None]:
    """Hold the run for writing; a second command is told so at once. The lock dies with its process.

    An object store has no locks: there, do not start two commands on one run.
    """
    with ExitStack() as held:
      processes.on_writer(lambda: held.enter_context(self._lock()))
      yield

  @contextmanager
  def _lock(self) -> Iterator[None]:
    if paths.is_remote(self.path):
      yield
      return
    lock = filelock.FileLock(self.path / ".lock")
    try:
      lock.acquire(blocking=False)
    except filelock.Timeout:
      raise MnemonicError(
        f"{self.path}: another mnemonic process is writing to this run. Wait for it to end."
      ) from None
    except OSError as error:
      raise MnemonicError(f"{self.path}: cannot be written: {error.strerror or error}.") from error
    try:
      yield
    finally:
      lock.release()

  @contextmanager
  def metric_log(self, step: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Give a function that adds a record to metrics.jsonl and to TensorBoard's files, from after `step`.

    In an object store, where nothing can be appended to, each record writes the files again.
    """
    if not processes.is_writer():
      yield lambda record: None
      return
    from tensorboardX.event_file_writer import EventsWriter  # half a second
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary

    board: Any = None
    remote = paths.is_remote(self.path)

    def log(record: dict[str, Any]) -> None:
      nonlocal board
      scalars = {
        name: value
        for name, value in files.plain(record).items()
        if name != "step" and value is not None
      }
      summary = Summary(
        value=[Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
      )
      with self._writing_metrics():
        with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
          file.write(files.dumps(record) + "\n")
        if board is None:
          (folder / "tensorboard").mkdir(exist_ok=True)
          board = EventsWriter(str(folder / "tensorboard" / "events"))
          # Tells TensorBoard to drop what a killed training wrote after its last checkpoint.
          start = SessionLog(status=SessionLog.START)
          board.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))
        board.write_event(Event(wall_time=time.time(), step=record["step"], summary=summary))
        board.flush()
        if remote:
          for file in (folder / "metrics.jsonl", *(folder / "tensorboard").iterdir()):
            target = self.path / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())

    with ExitStack() as stack:
      folder = self.path
      if remote:
        folder = epath.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "metrics.jsonl").write_text(
          "".join(files.dumps(record) + "\n" for record in self.metrics())
        )
      try:
        yield log
      finally:
        if board is not None:
          with contextlib.suppress(OSError):  # all that was logged is flushed
            board.close()

  @contextmanager
  def _writing_metrics(self) -> Iterator[None]:
    try:
      yield
    except OSError as error:
      raise MnemonicError(
        f"{self.path}: metrics cannot be written: {error.strerror or error}."
      ) from error

  def metrics(self) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl; one cut by a kill, or that says of no step, is left out."""
    path = self.path / "metrics.jsonl"
    records = []
    for line in path.read_bytes().decode("utf-8", "replace").splitlines() if path.exists() else []:
      with contextlib.suppress(ValueError):
        record = json.loads(line)
        if (
          isinstance(record, dict)
          and _is_number(record.get("epoch", 1))
          and _is_step(record.get("step"))
        ):
          records.append(record)
    return records

  def rewind_metrics(self, step: int) -> None:
    """Drop the lines after `step`, which a resumed training writes again."""
    records = self.metrics()
    kept = [record for record in records if record.get("step", 0) <= step]
    if (self.path / "metrics.jsonl").exists():
      files.write_text(
        self.path / "metrics.jsonl", "".join(files.dumps(record) + "\n" for record in kept)
      )

  def forgets(self) -> list[epath.Path]:
    """Folders of the finished forgets, those that have a report.json, oldest first."""
    numbered = self._numbered_forgets()
    finished = [path for path in numbered if (path / "report.json").exists()]
    for path in numbered:
      # The page is written just before the record; a killed job of several processes leaves neither behind.
      if path not in finished and (path / "report.html").exists():
        raise MnemonicError(
          f"{path}: has no report.json, which says what classes were forgotten there. Put it back, or move the folder "
          "away and forget its classes again."
        )
    return finished

  def _numbered_forgets(self) -> list[epath.Path]:
    """forgets/NNNN, finished or not, by number."""
    numbered = [
      path for path in paths.children(self.path / "forgets", "[0-9]*") if path.name.isdecimal()
    ]
    return sorted(numbered, key=lambda path: int(path.name))

  def forgotten_classes(self) -> list[int]:
    """The union of all classes that finished forgets asked for."""
    finished = self.forgets()
    if not finished:
      return []
    return self.report_of(finished[-1])["classes"]

  def report_of(self, finished: epath.Path) -> dict[str, Any]:
    """The record of a finished forget, of which only the list of classes is checked."""
    remedy = "Move that folder away, and forget its classes again."
    report = files.read_json(finished / "report.json", remedy)
    classes = report.get("classes") if isinstance(report, dict) else None
    if not isinstance(classes, list) or not all(type(c) is int for c in classes):
      raise MnemonicError(f"{finished / 'report.json'}: has no list of classes. {remedy}")
    return report

  def finished_forget(self, number: int | None = None) -> epath.Path:
    """Folder of the latest finished forget, or of the one numbered so."""
    finished = {int(path.name): path for path in self.forgets()}
    if not finished:
      raise MnemonicError(
        f"{self.path}: has no finished forget. Make one with: mnemonic forget {self.path} --classes 0"
      )
    chosen = max(finished) if number is None else number
    if chosen not in finished:
      raise UsageError(f"--number: got {chosen}; this run has {', '.join(map(str, finished))}.")
    return finished[chosen]

  def add_forget(self, fill: Callable[[epath.Path], None]) -> epath.Path:
    """Make forgets/NNNN, whole or not at all, from what `fill` writes, report.json last.

    Call with the run locked. Where nothing can be renamed (`files.make_folder`), what a killed forget left behind stays,
    without a report.json, and the next number is taken.
    """
    parent = self.path / "forgets"
    number = max((int(path.name) for path in self._numbered_forgets()), default=0) + 1
    final = parent / f"{number:04d}"
    processes.barrier("all have seen the same number")
    files.make_folder(final, fill)
    return final


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_step(value: Any) -> bool:
  return type(value) is int and value > 0


def versions() -> dict[str, str]:
  """Versions of what a result depends on."""
  packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
  return {
    "mnemonic_jax": mnemonic_jax.__version__,
    "python": platform.python_version(),
    **{name: importlib.metadata.version(name) for name in packages},
    "backend": jax.default_backend(),
  }


def _identity(config: Config) -> dict[str, Any]:
  """The config without the fields that may differ between commands."""
  tree = configs.as_dict(config)
  tree.pop("name")
  for section, *field in _FREE_FIELDS:
    if field:
      tree[section].pop(field[0])
    else:
      tree.pop(section)
  return tree


def _difference(old: Config, new: Config) -> str:
  """The fields that differ, as `train.epochs 5 there, 6 here`."""
  pairs = []
  for section, table in _identity(old).items():
    for field, value in table.items():
      other = _identity(new)[section][field]
      if value != other:
        pairs.append(f"{section}.{field} {value!r} there, {other!r} here")
  return "; ".join(pairs)
