"""The command line of codes.py and forget.py: a run, the mesh, and the other processes."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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

# Examples that a device sees at once, where execution.microbatch does not say how many all see.
EXAMPLES_PER_DEVICE = 16


@dataclasses.dataclass(frozen=True)
class Job:
  """What a script works on."""

  config: Config
  dataset: Dataset
  mesh: jax.sharding.Mesh
  run: RunFolder
  options: argparse.Namespace = dataclasses.field(default_factory=argparse.Namespace)
  watchdog: Watchdog = dataclasses.field(default_factory=Watchdog)


class Script(NamedTuple):
  """What a script does, and what its command line takes."""

  work: Callable[[Job], dict[str, Any]]
  description: str
  add_flags: Callable[[argparse.ArgumentParser], None]
  sections: tuple[str, ...]  # of the config, whose fields may differ from the run's
  overrides: Callable[[argparse.Namespace], dict[str, Any]] = lambda options: {}  # flags as fields
  trains: Callable[[argparse.Namespace], bool] = lambda options: False  # reads training examples


def main(script: Script, arguments: Sequence[str]) -> None:
  """Read the command line, join the other processes, do the work, print one JSON object."""
  compilation_cache.enable()
  signals.exit_at_once()
  try:
    overrides, rest = dotted_overrides(arguments)
    options = _make_parser(script).parse_args(rest)
    with commands.joined(options) as watchdog:
      # Also where several processes would agree on a step: there is none.
      signals.exit_at_once()
      job = _planned(script, options, overrides | script.overrides(options), watchdog)
      with jax.set_mesh(job.mesh):
        result = script.work(job)
  except (MnemonicError, ValueError) as error:
    print(f"mnemonic: {error}", file=sys.stderr, flush=True)
    code = getattr(error, "exit_code", 1)
    processes.leave(code)
    sys.exit(code)
  if processes.is_writer():
    result |= {"mesh": dict(job.mesh.shape), "processes": jax.process_count()}
    print(files.dumps(result, indent=2))


def _make_parser(script: Script) -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description=script.description, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("run", type=epath.Path, help="the folder of a finished run")
  script.add_flags(parser)
  parser.add_argument(
    "--data-dir", default="", help="folder of prepared TFDS sets (else TFDS_DATA_DIR)"
  )
  add_job_flags(parser)
  return parser


def _planned(
  script: Script, options: argparse.Namespace, overrides: dict[str, str], watchdog: Watchdog
) -> Job:
  """Make the job that the command line asks for."""
  run = RunFolder.open(options.run)
  if wrong := [field for field in overrides if field.split(".")[0] not in script.sections]:
    allowed = " and ".join(f"[{section}]" for section in script.sections)
    raise UsageError(f"--{wrong[0]}: the run's own config is used; only {allowed} may differ.")
  config = configs.build(run.config.name, configs.as_dict(run.config), overrides)
  try:
    mesh = sharding.make_mesh(config.execution.data or None, config.execution.fsdp or None)
  except ValueError as error:
    raise UsageError(f"execution.data, execution.fsdp: {error}") from None
  watchdog.phase(f"opening the data set {config.data.name}")
  dataset = setup.load_data(config, options.data_dir, training=script.trains(options))
  watchdog.phase("opening the run folder and planning the work")
  return Job(config, dataset, mesh, run, options, watchdog)
