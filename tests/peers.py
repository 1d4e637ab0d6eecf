"""One process of a job of several: a tiny training with `multihost`, for test_distributed.py."""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import threading
import time
import types
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mnemonic_jax import training
from mnemonic_jax.cli.commands import joined
from mnemonic_jax.errors import MnemonicError
from mnemonic_jax.multihost import processes
from mnemonic_jax.multihost.processes import Watchdog
from mnemonic_jax.runs import config as configs
from mnemonic_jax.runs import files, signals
from mnemonic_jax.runs.checkpoints import Checkpoints
from mnemonic_jax.runs.folder import RunFolder

GROWTH = 0.5  # of a weight, per step and device
QUICKER = 200  # the watchdogs' clock, once something is stuck on purpose


def main() -> int:
  parser = argparse.ArgumentParser()
  parser.add_argument("run", type=pathlib.Path)
  parser.add_argument("--coordinator")
  parser.add_argument("--process-id", type=int)
  parser.add_argument("--num-processes", type=int)
  parser.add_argument("--startup-timeout", type=float, default=600)
  parser.add_argument("--peer-timeout", type=float, default=600)
  parser.add_argument("--steps", type=int, default=4)
  parser.add_argument("--seconds", type=float, default=0.0)
  parser.add_argument(
    "--fails", type=int, default=-1, help="the process that cannot read what all read"
  )
  parser.add_argument(
    "--stuck",
    default="",
    help="where process 1 stops for ever, alive: start-up, input or checkpoint",
  )
  options = parser.parse_args()
  hurry_when_stuck(options)
  outlive_the_others(options)
  try:
    signals.exit_at_once()
    with joined(options) as watchdog:
      train(options, watchdog)
    return 0
  except MnemonicError as error:
    say(error)
    return error.exit_code


def stuck_file(run: pathlib.Path) -> pathlib.Path:
  """The file that says that something is stuck on purpose."""
  return run.parent / f"{run.name}-is-stuck"


def hurry_when_stuck(options: argparse.Namespace) -> None:
  """Let the watchdogs' clock run as ours, and faster once something is stuck on purpose.

  So their limits may be long enough for a busy machine, and a test need not wait for them.
  """
  noticed = []

  def monotonic() -> float:
    now = time.monotonic()
    if not noticed and stuck_file(options.run).exists():
      noticed.append(now)
    return noticed[0] + QUICKER * (now - noticed[0]) if noticed else now

  clock = types.SimpleNamespace(monotonic=monotonic, sleep=time.sleep)
  processes.time = clock  # type: ignore[attr-defined]


def outlive_the_others(options: argparse.Namespace) -> None:
  """Let process 0 end when the others have, which it otherwise gives `processes.LAST` seconds."""
  file = lambda index: options.run.parent / f"{options.run.name}-pid-{index}"
  others = range(1, options.num_processes or 1)
  if options.process_id in others:
    file(options.process_id).write_text(str(os.getpid()))

  def runs(index: int) -> bool:
    try:  # the state follows the name, which is in parentheses
      stat = pathlib.Path("/proc", file(index).read_text(), "stat").read_text()
    except OSError:
      return False
    return stat.rsplit(")", 1)[1].split()[0] not in "TZX"  # neither stopped nor dead

  def sleep(seconds: float) -> None:
    if seconds != processes._LAST:
      time.sleep(seconds)
      return
    while any(map(runs, others)):
      time.sleep(0.01)

  # The clock stays that of `hurry_when_stuck`.
  clock = types.SimpleNamespace(monotonic=processes.time.monotonic, sleep=sleep)
  processes.time = clock  # type: ignore[attr-defined]


def pass_or_stick(options: argparse.Namespace, where: str) -> None:
  """Let process 1 stop here for ever, once process 0 has come here too and passed."""
  if options.stuck != where:
    return
  passed = options.run.parent / f"{options.run.name}-passed"
  if jax.process_index() != 1:
    passed.touch()
    return
  while not passed.exists():
    time.sleep(0.01)
  stuck_file(options.run).touch()
  threading.Event().wait()


def read_or_fail(options: argparse.Namespace) -> None:
  if options.fails == jax.process_index():
    raise MnemonicError(f"file: no such file on host {options.fails}")


def batches(options: argparse.Namespace, sharding: NamedSharding) -> Iterator[jax.Array]:
  while True:
    yield jax.make_array_from_process_local_data(
      sharding, np.full(jax.local_device_count(), GROWTH, np.float32)
    )
    pass_or_stick(options, "input")


def say(error: MnemonicError) -> None:
  print(f"mnemonic: {error}", file=sys.stderr, flush=True)


def train(options: argparse.Namespace, watchdog: Watchdog) -> None:
  try:
    processes.together(lambda: read_or_fail(options))
  except MnemonicError as error:
    say(error)  # and go on to what fails next
  run = RunFolder.create(options.run, configs.load("digits"))
  mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
  split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
  optimizer = optax.sgd(1.0)

  @jax.jit
  def first() -> tuple[training.TrainState, jax.Array]:
    params = {"w": jax.lax.with_sharding_constraint(jnp.arange(24.0), split)}
    return training.init_train_state(params, {}, optimizer, jax.random.key(0)), jnp.ones((2, 1, 3))

  @jax.jit
  def one_step(
    state: training.TrainState, batch: jax.Array
  ) -> tuple[training.TrainState, jax.Array]:
    params = {"w": state.params["w"] + batch.sum()}
    return state._replace(params=params, step=state.step + 1), jax.lax.with_sharding_constraint(
      params["w"].sum(), whole
    )

  pass_or_stick(options, "start-up")
  state, codes = first()
  with run.locked(), Checkpoints(run.checkpoints) as checkpoints:
    if checkpoints.latest_step() is not None:
      state, codes = checkpoints.restore(state, codes)
    assert state.params["w"].sharding.is_equivalent_to(split, 1)
    done = int(state.step)
    run.rewind_metrics(done)
    inputs = watchdog.inputs(batches(options, split))
    with run.metric_log(done) as log, signals.deferred() as stop:
      while done < options.steps:
        batch = next(inputs)
        state, total = one_step(state, batch)
        done = int(state.step)
        log({"step": done, "total": float(total)})
        watchdog.beat(done)
        if (asked := stop.asked(done)) or done == options.steps:
          watchdog.phase(f"the checkpoint of step {done}")
          pass_or_stick(options, "checkpoint")
          checkpoints.save(state, codes)
          checkpoints.wait()
          if asked:
            stop.stop_if_asked(f"stopped after step {done}; the checkpoint is written.")
        time.sleep(options.seconds)
  processes.barrier("trained")
  print(files.dumps({"steps": done, "total": float(total), "devices": jax.device_count()}))


if __name__ == "__main__":
  code = main()
  processes.leave(code)
  sys.exit(code)
