"""The command line of forget.py: a run, the mesh, and the other processes."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath

from mnemonic_jax.cli import commands, compilation_cache
from mnemonic_jax.cli.parser import add_job_flags, dotted_overrides
from mnemonic_jax.data import Dataset
from mnemonic_jax.errors import MnemonicError, UsageError
from mnemonic_jax.multihost import processes, sharding
from mnemonic_jax.multihost.processes import Watchdog
from mnemonic_jax.runs import config as configs
from mnemonic_jax.runs import files, setup, signals
from mnemonic_jax.runs.config import Config
from mnemonic_jax.runs.folder import RunFolder


@dataclasses.dataclass(frozen=True)
class Job:
  """What the script works on."""

  config: Config
  dataset: Dataset
  mesh: jax.sharding.Mesh
  run: RunFolder
  classes: tuple[int | str, ...] = ()
  search: bool = False  # for the strength
  watchdog: Watchdog = dataclasses.field(default_factory=Watchdog)


def main(work: Callable[[Job], dict[str, Any]], description: str, arguments: Sequence[str]) -> None:
  """Read the command line, join the other processes, do the work, print one JSON object."""
  overrides, rest = dotted_overrides(arguments)
  options = _make_parser(description).parse_args(rest)
  compilation_cache.enable()
  signals.exit_at_once()
  try:
    with commands.joined(options) as watchdog:
      # Also where several processes would agree on a step: there is none.
      signals.exit_at_once()
      job = _planned(options, overrides, watchdog)
      with jax.set_mesh(job.mesh):
        result = work(job)
  except (MnemonicError, ValueError) as error:
    print(f"mnemonic: {error}", file=sys.stderr, flush=True)
    code = getattr(error, "exit_code", 1)
    processes.leave(code)
    sys.exit(code)
  if processes.is_writer():
    print(files.dumps(result, indent=2))


def _make_parser(description: str) -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description=description, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("run", type=epath.Path, help="the folder of a finished run")
  parser.add_argument("--classes", nargs="+", required=True, help="indices or names")
  parser.add_argument(
    "--search", action="store_true", help="choose the strength from the paper's grid, on the codes"
  )
  parser.add_argument(
    "--data-dir", default="", help="folder of prepared TFDS sets (else TFDS_DATA_DIR)"
  )
  add_job_flags(parser)
  return parser


def _planned(options: argparse.Namespace, overrides: dict[str, str], watchdog: Watchdog) -> Job:
  """Make the job that the command line asks for."""
  run = RunFolder.open(options.run)
  allowed = ("forget.", "execution.")
  if wrong := [field for field in overrides if not field.startswith(allowed)]:
    raise UsageError(
      f"--{wrong[0]}: a forget uses the run's own config; only {' and '.join(allowed)} may differ."
    )
  config = configs.build(run.config.name, configs.as_dict(run.config), overrides)
  try:
    mesh = sharding.make_mesh(config.execution.data or None, config.execution.fsdp or None)
  except ValueError as error:
    raise UsageError(f"execution.data, execution.fsdp: {error}") from None
  watchdog.phase(f"opening the data set {config.data.name}")
  dataset = setup.load_data(config, options.data_dir, training=False)
  watchdog.phase("opening the run folder and planning the work")
  return Job(config, dataset, mesh, run, tuple(options.classes), options.search, watchdog)
