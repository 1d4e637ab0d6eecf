"""The run folder: config.json, metrics.jsonl, checkpoints/, forgets/NNNN/."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import filelock
import jax
from etils import epath

import mnemonic_jax
from mnemonic_jax.errors import MnemonicError, UsageError
from mnemonic_jax.multihost import processes
from mnemonic_jax.runs import config as configs
from mnemonic_jax.runs import files, format1, metrics
from mnemonic_jax.runs.config import Config

_FORMAT = 2
# Fields that say where or how, not what: they may differ between the commands of one run.
_FREE_FIELDS = (("data", "data_dir"), ("train", "keep_checkpoints"), ("execution",), ("forget",))


class RunFolder:
  """Hold the paths and records of one run. Each file in it is written whole or not at all.

  Several processes share the folder: process 0 writes the records, and all call the same functions.
  """

  def __init__(self, path: epath.PathLike, config: Config, prng_impl: str) -> None:
    self.path, self.config, self.prng_impl = epath.Path(path), config, prng_impl

  @classmethod
  def create(cls, path: epath.PathLike, config: Config) -> RunFolder:
    """Open the run at `path` for training by `config`; make the folder if it is new.

    Raises:
      MnemonicError: the folder holds something else, or a run of another config.
    """
    run = cls(path, config, str(jax.random.key_impl(jax.random.key(0))))
    processes.on_writer(run._create)
    if not (run.path / "config.json").exists():  # process 0 made it
      raise MnemonicError(
        f"{path}: process {jax.process_index()} does not see what process 0 wrote. Put the run on "
        "a file system that all processes share, or in an object store (gs://)."
      )
    run.prng_impl = cls.open(path).prng_impl
    return run

  def _create(self) -> None:
    """Make the folder and its config.json, or check that the ones there fit."""
    path = self.path
    try:
      path.mkdir(parents=True, exist_ok=True)
      found = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError as error:
      reason = error.strerror or error
      raise MnemonicError(f"{path}: cannot be used as a run folder: {reason}.") from error
    if found and "config.json" not in found:
      raise MnemonicError(
        f"{path}: is not empty and no run (found {found[0]}). Choose a new folder for --out."
      )
    with self._lock():
      if (path / "config.json").exists():
        old = RunFolder.open(path)
        if _identity(old.config) == _identity(self.config):
          return
        if files.children(self.checkpoints, "[0-9]*") or self._numbered_forgets():
          raise MnemonicError(
            f"{path}: holds a run with other settings ({_difference(old.config, self.config)}). "
            "Nothing was changed; choose another --out, or repeat the settings of that run to "
            "resume it."
          )
      record = {
        "format": _FORMAT,
        "config": configs.as_dict(self.config),
        "prng_impl": self.prng_impl,
        "versions": versions(),
      }
      files.write_json(path / "config.json", record)

  def require_config(self) -> None:
    """Refuse to train when the folder now belongs to another config; call with the run locked."""

    def check() -> None:
      there = RunFolder.open(self.path).config
      if _identity(there) != _identity(self.config):
        raise MnemonicError(
          f"{self.path}: another command has made it a run with other settings "
          f"({_difference(there, self.config)}). Nothing was changed; choose another --out."
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
    where = path / "config.json"
    remedy = (
      "It is no run folder, or a damaged one; train into a new folder with: mnemonic train CONFIG "
      "--out RUN"
    )
    record = files.read_json(where, remedy)
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
      raise MnemonicError(f"{where}: is no run record. {remedy}")
    if (version := record.get("format")) not in (1, _FORMAT):
      raise MnemonicError(
        f"{where}: is a run record of format {version!r}; this mnemonic reads formats 1 and "
        f"{_FORMAT}. {remedy}"
      )
    tables = format1.config(record["config"]) if version == 1 else record["config"]
    try:
      config = configs.build(str(tables.get("name", path.name)), tables)
    except UsageError as error:
      raise MnemonicError(f"{where}: {error} {remedy}") from error
    prng_impl = record.get("prng_impl", "threefry2x32")
    try:
      jax.random.key(0, impl=str(prng_impl))
    except ValueError:
      raise MnemonicError(
        f"{where}: prng_impl: got {prng_impl!r}; expected one that JAX knows. {remedy}"
      ) from None
    return cls(path, config, str(prng_impl))

  @property
  def checkpoints(self) -> epath.Path:
    """Return the folder where Orbax keeps the train states."""
    return self.path / "checkpoints"

  @contextmanager
  def locked(self) -> Iterator[None]:
    """Lock the run for writing; a second command is refused at once.

    The lock dies with its process. An object store has no locks: there, do not start two commands
    on one run.
    """
    with ExitStack() as held:
      processes.on_writer(lambda: held.enter_context(self._lock()))
      yield

  @contextmanager
  def _lock(self) -> Iterator[None]:
    if files.is_remote(self.path):
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

  def metric_log(self, step: int) -> AbstractContextManager[Callable[[dict[str, Any]], None]]:
    """Log metrics from after `step`; see `metrics.log`."""
    return metrics.log(self.path, step)

  def metrics(self) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl; see `metrics.read`."""
    return metrics.read(self.path)

  def rewind_metrics(self, step: int) -> None:
    """Drop the records after `step`; see `metrics.rewind`."""
    metrics.rewind(self.path, step)

  def forgets(self) -> list[epath.Path]:
    """List the folders of the finished forgets, those with a report.json, oldest first."""
    numbered = self._numbered_forgets()
    finished = [path for path in numbered if (path / "report.json").exists()]
    for path in numbered:
      # The page is written just before the record; a killed job leaves neither.
      if path not in finished and (path / "report.html").exists():
        raise MnemonicError(
          f"{path}: has no report.json, which says what classes were forgotten there. Put it back, "
          "or move the folder away and forget its classes again."
        )
    return finished

  def _numbered_forgets(self) -> list[epath.Path]:
    """List forgets/NNNN, finished or not, by number."""
    numbered = [
      path for path in files.children(self.path / "forgets", "[0-9]*") if path.name.isdecimal()
    ]
    return sorted(numbered, key=lambda path: int(path.name))

  def forgotten_classes(self) -> list[int]:
    """Return the union of all classes that finished forgets asked for."""
    finished = self.forgets()
    return self.report_of(finished[-1])["classes"] if finished else []

  def report_of(self, finished: epath.Path) -> dict[str, Any]:
    """Read the report.json of a finished forget; only its list of classes is checked."""
    remedy = "Move that folder away, and forget its classes again."
    report = files.read_json(finished / "report.json", remedy)
    classes = report.get("classes") if isinstance(report, dict) else None
    if not isinstance(classes, list) or not all(type(c) is int for c in classes):
      raise MnemonicError(f"{finished / 'report.json'}: has no list of classes. {remedy}")
    return report

  def finished_forget(self, number: int | None = None) -> epath.Path:
    """Return the folder of a finished forget: the latest, or the one with this number."""
    finished = {int(path.name): path for path in self.forgets()}
    if not finished:
      raise MnemonicError(
        f"{self.path}: has no finished forget. Make one with: mnemonic forget {self.path} "
        "--classes 0"
      )
    chosen = max(finished) if number is None else number
    if chosen not in finished:
      raise UsageError(f"--number: got {chosen}; this run has {', '.join(map(str, finished))}.")
    return finished[chosen]

  def add_forget(self, fill: Callable[[epath.Path], None]) -> epath.Path:
    """Make forgets/NNNN, whole or not at all, from what `fill` writes, report.json last.

    Call with the run locked. Where nothing can be renamed (`files.make_folder`), what a killed
    forget left stays, without a report.json, and the next number is taken.
    """
    parent = self.path / "forgets"
    number = max((int(path.name) for path in self._numbered_forgets()), default=0) + 1
    final = parent / f"{number:04d}"
    processes.barrier("all have seen the same number")
    files.make_folder(final, fill)
    return final


def versions() -> dict[str, str]:
  """Return the versions of what a result depends on."""
  packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
  return {
    "mnemonic_jax": mnemonic_jax.__version__,
    "python": platform.python_version(),
    **{name: importlib.metadata.version(name) for name in packages},
    "backend": jax.default_backend(),
  }


def _identity(config: Config) -> dict[str, Any]:
  """Return the config without the fields that may differ between commands."""
  tree = configs.as_dict(config)
  tree.pop("name")
  for section, *field in _FREE_FIELDS:
    if field:
      tree[section].pop(field[0])
    else:
      tree.pop(section)
  return tree


def _difference(old: Config, new: Config) -> str:
  """Name the fields that differ, as `train.epochs 5 there, 6 here`."""
  pairs = []
  for section, table in _identity(old).items():
    for field, value in table.items():
      other = _identity(new)[section][field]
      if value != other:
        pairs.append(f"{section}.{field} {value!r} there, {other!r} here")
  return "; ".join(pairs)
