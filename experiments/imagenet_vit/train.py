"""Train a config with codes on all devices there are: examples over the whole mesh, params over its axis fsdp.

Command:  python experiments/imagenet_vit/train.py imagenet_vit_s16_90ep --data-dir DIR --out RUN [--execution.fsdp 8]

Any config of a streamed set will do, and any of its fields can be overridden; the weights of `model.pretrained` go from the
file straight to the shards. The run folder is that of `mnemonic train`, and the data order too: stop it, and go on with
another number of devices or processes. Forget with forget.py beside this file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import jax
import job as jobs
import numpy as np
from job import Job

from mnemonic_jax import training
from mnemonic_jax.data import Dataset, augmentation
from mnemonic_jax.errors import MnemonicError
from mnemonic_jax.models import Model, pretrained
from mnemonic_jax.multihost import processes, sharding
from mnemonic_jax.runs import setup, signals
from mnemonic_jax.runs.checkpoints import Checkpoints
from mnemonic_jax.runs.config import Config
from mnemonic_jax.training import TrainState


class Program(NamedTuple):
  """What is compiled, and the abstract arrays, with their shardings, that it is compiled for."""

  model: Model
  init: Any  # () -> (state, codes), each device its own shards
  restart: Any  # (params, model_state, key) -> the state before the first step; params are donated
  step: Any  # (state, codes, images, labels, rows, epoch) -> (state, metrics); the state is donated
  state: TrainState
  codes: jax.ShapeDtypeStruct
  batch: tuple[jax.ShapeDtypeStruct, ...]  # images uint8, labels, rows
  steps_per_epoch: int
  total_steps: int


def make_program(
  config: Config, dataset: Dataset, mesh: jax.sharding.Mesh, prng_impl: str | None = None
) -> Program:
  """Plan the training of a config on a mesh; computes nothing and takes no memory."""
  sharding.require_batch(mesh, "train.batch_size", config.train.batch_size)
  sharding.require_batch(
    mesh, "train.batch_size / train.accumulate", config.train.batch_size // config.train.accumulate
  )
  model, optimizer, steps_per_epoch, total_steps = setup.plan(config, dataset)
  first = lambda: setup.first_state(config, dataset, model, optimizer, prng_impl)
  state, codes = jax.eval_shape(first)
  copied, batch = sharding.replicated(mesh), sharding.batch_sharding(mesh)
  placements = sharding.tree_shardings(mesh, state)
  augment = augmentation.NAMES[config.data.augment]

  def restart(params: Any, model_state: Any, key: Any) -> TrainState:
    return training.init_train_state(params, model_state, optimizer, key)

  def step(
    state: TrainState, codes: Any, images: Any, labels: Any, rows: Any, epoch: Any
  ) -> tuple[TrainState, Any]:
    one_step = setup.make_step(config, model, optimizer, codes)
    return training.make_batch_step(one_step, dataset.preprocess, augment)(
      state, images, labels, rows, epoch
    )

  size = config.train.batch_size
  shapes = (((size, *dataset.shape), np.uint8), ((size,), np.int32), ((size,), np.int32))
  return Program(
    model,
    jax.jit(first, out_shardings=(placements, copied)),
    jax.jit(restart, out_shardings=placements, donate_argnums=0),
    jax.jit(
      step,
      in_shardings=(placements, copied, batch, batch, batch, copied),
      out_shardings=(placements, copied),
      donate_argnums=0,
    ),
    jobs.abstract(state, placements),
    jax.ShapeDtypeStruct(codes.shape, codes.dtype, sharding=copied),
    tuple(jax.ShapeDtypeStruct(shape, dtype, sharding=batch) for shape, dtype in shapes),
    steps_per_epoch,
    total_steps,
  )


def first_state(config: Config, program: Program) -> tuple[TrainState, jax.Array]:
  """State and codes before the first step, with the weights of the pretrained file if there is one; as in `mnemonic train`."""
  settings = config.model
  if settings.pretrained:  # a wrong file is told before anything is compiled
    processes.together(partial(pretrained.check, settings.pretrained, settings.name))
  state, codes = program.init()
  if settings.pretrained:
    params, model_state, key = state.params, state.model_state, state.key
    del state  # the optimizer's makes room for the weights
    params, model_state = processes.together(
      partial(
        pretrained.load,
        settings.pretrained,
        settings.name,
        params,
        model_state,
        new_head=settings.new_head,
      )
    )
    state = program.restart(params, model_state, key)
  return state, codes


def train(job: Job) -> dict[str, Any]:
  """Train to the last step from wherever the run is; see `mnemonic_jax.runs.train` for what a checkpoint promises."""
  config, mesh, run, dataset = job.config, job.mesh, job.run, job.dataset
  settings = config.train
  program = make_program(config, dataset, mesh, run.prng_impl)
  with ExitStack() as stack:
    stack.enter_context(run.locked())
    run.require_config()
    checkpoints = stack.enter_context(Checkpoints(run.checkpoints, keep=settings.keep_checkpoints))
    job.watchdog.phase("making or restoring the first state")
    if checkpoints.latest_step() is None:
      state, codes = first_state(config, program)
    else:
      state, codes = checkpoints.restore(program.state, program.codes)
    first, total = int(state.step), program.total_steps
    run.rewind_metrics(first)
    log = stack.enter_context(run.metric_log(first))
    batches = stack.enter_context(
      dataset.train.training_batches(
        settings.seed,
        settings.batch_size,
        first_step=first,
        last_step=total,
        workers=config.execution.workers,
        process=(jax.process_index(), jax.process_count()),
      )
    )
    stop = stack.enter_context(signals.deferred())
    meter = jobs.Meter(job, 3 * jobs.forward_flops(config, dataset))
    every_epoch = settings.checkpoint_every * program.steps_per_epoch
    traced = range(min(first + 5, total - 1), min(first + 10, total)) if job.profile else range(0)
    placed = meter.waiting(job.watchdog.inputs(_placed(batches, mesh)))
    job.watchdog.phase("the first step, with its compilation,")
    epoch: Any = None
    running: Any = None
    for step, (images, labels, rows) in zip(range(first, total), placed, strict=True):
      if epoch is None or step % program.steps_per_epoch == 0:
        epoch = jax.device_put(np.int32(step // program.steps_per_epoch), sharding.replicated(mesh))
      if traced and step == traced.start:
        jax.profiler.start_trace(str(run.path / "profile"))
      with jax.transfer_guard_host_to_device("disallow"):  # all it reads was placed on purpose
        state, metrics = program.step(state, codes, images, labels, rows, epoch)
      if traced and step == traced.stop - 1:
        jax.block_until_ready(metrics)
        jax.profiler.stop_trace()
      if running is not None:  # the step before: this one runs meanwhile
        jax.block_until_ready(running)
        job.watchdog.beat(step)
      running, done = metrics, step + 1
      last = done == total
      asked = stop.asked(done)
      due = last or asked or (settings.checkpoint_steps and done % settings.checkpoint_steps == 0)
      saved = due or done % every_epoch == 0
      if saved or done % job.log_every == 0:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not np.isfinite(values["loss"]):
          raise MnemonicError(
            f"training: the loss of step {done} is {values['loss']}; expected a finite one. Use a smaller "
            "train.learning_rate. The last checkpoint is from before that."
          )
        log(
          {
            "epoch": done / program.steps_per_epoch,
            "step": done,
            **values,
            **meter.read(done, total, values),
          }
        )
      if saved:
        job.watchdog.phase(f"the checkpoint of step {done}")
        with meter.paused("checkpoint"):
          checkpoints.save(state, codes)
          if asked or last:
            checkpoints.wait()
        if asked:
          stop.stop_if_asked(
            f"stopped after step {done} of {total}; the checkpoint is written. Resume with the same command."
          )
        if not last:
          job.watchdog.beat(done)  # a step is waited for again
    (test,) = jobs.predict(job, program.model, [state.params], state.model_state, dataset.test)
  return {
    "run": str(run.path),
    "config": config.name,
    "steps": int(state.step),
    "resumed_from_step": first,
    "mesh": dict(mesh.shape),
    "processes": jax.process_count(),
    "test_accuracy": float(np.mean(test.predictions == test.labels)),
    "checkpoint": str(run.checkpoints / str(int(state.step))),
    "codes_sha256": setup.array_sha256(codes),
  }


def _placed(batches: Iterator[Any], mesh: jax.sharding.Mesh) -> Iterator[tuple[jax.Array, ...]]:
  """Each process's part of a batch as part of one global array."""
  spread = sharding.batch_sharding(mesh)
  for images, labels, rows in batches:
    parts = (images, labels, rows.astype(np.int32))
    yield tuple(jax.make_array_from_process_local_data(spread, part) for part in parts)


if __name__ == "__main__":
  jobs.main(train, __doc__, sys.argv[1:])
