"""`mnemonic train`: train with codes, checkpoint, resume."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax import training
from mnemonic_jax.data import Dataset, augmentation
from mnemonic_jax.data.stream import Stream
from mnemonic_jax.errors import MnemonicError
from mnemonic_jax.models import pretrained
from mnemonic_jax.progress import Progress
from mnemonic_jax.runs import setup, signals
from mnemonic_jax.runs.checkpoints import Checkpoints
from mnemonic_jax.runs.config import Config
from mnemonic_jax.runs.folder import RunFolder
from mnemonic_jax.runs.hashing import params_sha256
from mnemonic_jax.runs.inference import predict
from mnemonic_jax.runs.signals import StopFlag
from mnemonic_jax.training import TrainState

# (key of the state, epoch, steps done in it) -> (images, labels, rows) of each step that is left of the epoch
Batches = Callable[[jax.Array, int, int], Iterator[tuple[Any, Any, Any]]]


def train(run: RunFolder, dataset: Dataset) -> dict[str, Any]:
  """Train the run to its last step from wherever it is, and return a summary.

  A checkpoint is written every `train.checkpoint_every` epochs (and `train.checkpoint_steps` steps), at the end, and on
  Ctrl-C or SIGTERM; training goes on while it is written. A resumed training continues bit for bit as if it had never
  stopped, in the middle of an epoch too (whose line in metrics.jsonl then averages over the steps since).
  """
  config, settings = run.config, run.config.train
  start = setup.make(config, dataset, run.prng_impl)
  with ExitStack() as stack:
    stack.enter_context(run.locked())
    run.require_config()
    checkpoints = stack.enter_context(Checkpoints(run.checkpoints, keep=settings.keep_checkpoints))
    state, codes = _first_state(config, start, checkpoints)
    first, steps, total = int(state.step), start.steps_per_epoch, start.total_steps
    run.rewind_metrics(first)
    log = stack.enter_context(run.metric_log(first))
    step = setup.make_step(config, start.model, start.optimizer, codes)
    augment, split, size = (
      augmentation.NAMES[config.data.augment],
      dataset.train,
      settings.batch_size,
    )
    at_once = None
    # On CPU, convolutions inside a loop of XLA's are many times slower than one step a call.
    stepwise = isinstance(split, Stream) or (
      jax.default_backend() == "cpu" and config.model.name != "mlp"
    )
    if isinstance(split, Stream):
      batch_step = training.make_batch_step(step, dataset.preprocess, augment)
      seed, workers = settings.seed, config.execution.workers
      loader = split.training_batches(
        seed, size, first_step=first, last_step=total, workers=workers
      )
      batches = _streamed(stack.enter_context(loader), steps)
    else:
      batch_step = training.make_stored_step(step, dataset.preprocess, augment)
      images, labels = jnp.asarray(split.images), jnp.asarray(split.labels)
      batches = _stored(images, labels, size)
      if not stepwise:
        at_once = _epoch_at_once(batch_step, images, labels, size)
    one_by_one = _steps_one_by_one(batch_step, batches, steps, size)
    started = time.perf_counter()
    amount, unit, initial = (
      (total, "steps", first) if stepwise else (-(-total // steps), "epochs", first // steps)
    )
    with signals.deferred() as stop, Progress("train", amount, unit, initial) as progress:
      while (before := int(state.step)) < total:
        stretch_started, inside = time.perf_counter(), before % steps
        if at_once is None or inside or before + steps > total:
          end = int(
            min(total, before - inside + steps, _next_multiple(before, settings.checkpoint_steps))
          )
          state, values = one_by_one(state, end - before, stop, progress if stepwise else None)
        else:  # not inside an epoch, where a checkpoint from another machine may stand
          state, values = at_once(state)
        seconds, done = time.perf_counter() - stretch_started, int(state.step)
        rate = (done - before) * settings.batch_size / seconds
        if not np.isfinite(values["loss"]):
          raise MnemonicError(
            f"training: the loss of epoch {-(-done // steps)} is {values['loss']}; expected a finite one. Use a smaller "
            "train.learning_rate. The last checkpoint is from before that."
          )
        epoch, rest = divmod(done, steps)
        due = settings.checkpoint_steps and done % settings.checkpoint_steps == 0
        last = done == total
        if not rest or due or last:
          log(
            {
              "epoch": _plain(done / steps),
              "step": done,
              **values,
              "images_per_second": rate,
              "seconds": seconds,
            }
          )
        saved = due or last or stop.signum or (not rest and epoch % settings.checkpoint_every == 0)
        if saved:
          checkpoints.save(state, codes)
        if not stepwise:
          progress.update(1, **values, images_per_second=rate)
        if saved and stop.signum:  # one that came since a checkpoint is for the next stretch
          checkpoints.wait()
          stop.stop_if_asked(
            f"stopped after epoch {done / steps:.4g} of {_plain(total / steps)}; the checkpoint is written. Resume with the "
            "same command."
          )
      checkpoints.wait()
    seconds = time.perf_counter() - started
    test = predict(
      start.model.logits_fn(state.model_state), state.params, dataset.test, dataset.preprocess
    )
    return {
      "run": str(run.path),
      "config": run.config.name,
      "epochs": _plain(total / steps),
      "steps": int(state.step),
      "resumed_from_epoch": _plain(first / steps),
      "loss": run.metrics()[-1]["loss"] if run.metrics() else None,
      "test_accuracy": float(np.mean(test.predictions == test.labels)),
      "seconds": seconds,
      "checkpoint": str(run.checkpoints / str(int(state.step))),
      "codes_sha256": setup.array_sha256(codes),
      "params_sha256": params_sha256(jax.device_get(state.params)),
    }


def _first_state(
  config: Config, start: setup.Setup, checkpoints: Checkpoints
) -> tuple[TrainState, jax.Array]:
  """State and codes of the newest checkpoint, else of the pretrained file, else fresh ones."""
  if checkpoints.latest_step() is not None:
    return checkpoints.restore(start.state, start.codes)
  if not config.model.pretrained:
    return start.state, start.codes
  params, model_state = pretrained.load(
    config.model.pretrained,
    config.model.name,
    start.state.params,
    start.state.model_state,
    new_head=config.model.new_head,
  )
  return training.init_train_state(
    params, model_state, start.optimizer, start.state.key
  ), start.codes


def _streamed(stream: Iterator[Any], steps_per_epoch: int) -> Batches:
  """The stream goes on from epoch to epoch by itself."""
  return lambda key, epoch, done: itertools.islice(stream, steps_per_epoch - done)


def _stored(images: jax.Array, labels: jax.Array, batch_size: int) -> Batches:
  """All images each time, and which rows of them a step sees."""

  def batches(key: jax.Array, epoch: int, done: int) -> Iterator[tuple[Any, Any, Any]]:
    for rows in training.epoch_rows(key, epoch, len(images), batch_size)[done:]:
      yield images, labels, rows

  return batches


def _epoch_at_once(
  stored_step: training.BatchStep, images: jax.Array, labels: jax.Array, batch_size: int
) -> Callable[[TrainState], tuple[TrainState, dict[str, float]]]:
  """Run a whole epoch in one call."""
  epoch = training.make_epoch(stored_step, batch_size=batch_size)

  def run_epoch(state: TrainState) -> tuple[TrainState, dict[str, float]]:
    state, metrics = epoch(state, images, labels)
    return state, {name: float(value) for name, value in metrics.items()}

  return run_epoch


def _steps_one_by_one(
  step: training.BatchStep, batches: Batches, steps_per_epoch: int, batch_size: int
) -> Callable[[TrainState, int, StopFlag, Progress | None], tuple[TrainState, dict[str, float]]]:
  """Run some steps of one epoch, each a call; end early when a signal comes."""
  one_step = jax.jit(step, donate_argnums=0)

  def run_steps(
    state: TrainState, count: int, stop: StopFlag, progress: Progress | None
  ) -> tuple[TrainState, dict[str, float]]:
    epoch, done = divmod(int(state.step), steps_per_epoch)
    seen: list[dict[str, float]] = []
    started = time.perf_counter()

    def show(metrics: training.Metrics) -> None:
      seen.append({name: float(value) for name, value in metrics.items()})
      if progress is not None:
        rate = len(seen) * batch_size / (time.perf_counter() - started)
        progress.update(1, **seen[-1], images_per_second=rate)

    running: training.Metrics = {}
    for images, labels, rows in itertools.islice(batches(state.key, epoch, done), count):
      state, metrics = one_step(state, images, labels, rows, epoch)
      if running:  # reading waits for the step: read while the next one runs
        show(running)
      running = metrics
      if stop.signum:
        break
    show(running)
    return state, {name: float(np.mean([values[name] for values in seen])) for name in seen[0]}

  return run_steps


def _next_multiple(step: int, every: int) -> float:
  """The first multiple of `every` above `step`; without end for 0."""
  return (step // every + 1) * every if every else float("inf")


def _plain(number: float) -> float:
  """As an integer where it is one."""
  return int(number) if number == int(number) else number
