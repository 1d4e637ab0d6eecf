"""`mnemonic train`: train with codes, checkpoint, resume."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax import pretrained, training
from mnemonic_jax.checkpoints import Checkpoints
from mnemonic_jax.data import Dataset, augmentation
from mnemonic_jax.errors import MnemonicError
from mnemonic_jax.progress import Progress
from mnemonic_jax.runs import setup, signals
from mnemonic_jax.runs.folder import RunFolder
from mnemonic_jax.runs.hashing import params_sha256
from mnemonic_jax.runs.inference import predict
from mnemonic_jax.runs.signals import StopFlag
from mnemonic_jax.training import TrainState


def train(run: RunFolder, dataset: Dataset) -> dict[str, Any]:
  """Train the run to its last epoch from wherever it is, and return a summary.

  A checkpoint is written every `train.checkpoint_every` epochs, at the end, and on Ctrl-C or SIGTERM. A resumed
  training continues bit for bit as if it had never stopped, in the middle of an epoch too (whose line in metrics.jsonl
  then averages over the steps since).
  """
  config, settings = run.config, run.config.train
  start = setup.make(config, dataset, run.prng_impl)
  with run.locked(), Checkpoints(run.checkpoints) as checkpoints:
    state, codes, steps = start.state, start.codes, start.steps_per_epoch
    if checkpoints.latest_step() is not None:
      state, codes = checkpoints.restore(state, codes)
    elif config.model.pretrained:
      params, model_state = pretrained.load(
        config.model.pretrained,
        config.model.name,
        state.params,
        state.model_state,
        new_head=config.model.new_head,
      )
      state = training.init_train_state(params, model_state, start.optimizer, state.key)
    resumed_from = int(state.step) / steps
    run.rewind_metrics(int(state.step))
    step = training.make_train_step(
      start.model.apply, start.optimizer, codes, rate=config.codes.rate, blend=setup.make_blend(settings)
    )
    stored_step = training.make_stored_step(step, dataset.preprocess, augmentation.NAMES[config.data.augment])
    # On CPU, convolutions inside a loop of XLA's are many times slower than one step a call.
    stepwise = jax.default_backend() == "cpu" and config.model.name != "mlp"
    examples = jnp.asarray(dataset.train.images), jnp.asarray(dataset.train.labels)
    at_once = _epoch_at_once(stored_step, *examples, settings.batch_size)
    one_by_one = _steps_of_an_epoch(stored_step, *examples, settings.batch_size)
    started = time.perf_counter()
    total, unit = (settings.epochs * steps, "steps") if stepwise else (settings.epochs, "epochs")
    initial = int(state.step) if stepwise else int(resumed_from)
    with signals.deferred() as stop, Progress("train", total, unit, initial) as progress:
      while int(state.step) < settings.epochs * steps:
        epoch_started, first = time.perf_counter(), int(state.step)
        if stepwise or first % steps:  # a checkpoint from inside an epoch may come from another machine
          state, values = one_by_one(state, stop, progress if stepwise else None)
        else:
          state, values = at_once(state)
        seconds, last = time.perf_counter() - epoch_started, int(state.step)
        rate = (last - first) * settings.batch_size / seconds
        number, rest = divmod(last, steps)
        if not np.isfinite(values["loss"]):
          raise MnemonicError(
            f"training: the loss of epoch {number + bool(rest)} is {values['loss']}; expected a finite one. Use a smaller "
            "train.learning_rate. The last checkpoint is from before that."
          )
        if not rest:
          record = {"epoch": number, "step": last, **values, "images_per_second": rate, "seconds": seconds}
          run.append_metrics(record)
        whole = rest or number % settings.checkpoint_every == 0 or number == settings.epochs or bool(stop.signum)
        if whole:
          checkpoints.save(state, codes)
        if not stepwise:
          progress.update(1, **values, images_per_second=rate)
        if whole:  # a signal that came since is for the next epoch, whose checkpoint it will find written
          stop.stop_if_asked(
            f"stopped after epoch {last / steps:.4g} of {settings.epochs}; the checkpoint is written. Resume with the "
            "same command."
          )
    seconds = time.perf_counter() - started
    logits_fn = start.model.logits_fn(state.model_state)
    test = predict(logits_fn, state.params, dataset.test, dataset.preprocess)
    return {
      "run": str(run.path),
      "config": run.config.name,
      "epochs": settings.epochs,
      "steps": int(state.step),
      "resumed_from_epoch": int(resumed_from) if resumed_from == int(resumed_from) else resumed_from,
      "loss": run.metrics()[-1]["loss"] if run.metrics() else None,
      "test_accuracy": float(np.mean(test.predictions == dataset.test.labels)),
      "seconds": seconds,
      "checkpoint": str(run.checkpoints / str(int(state.step))),
      "codes_sha256": setup.array_sha256(codes),
      "params_sha256": params_sha256(jax.device_get(state.params)),
    }


def _epoch_at_once(
  stored_step: training.StoredStep, images: jax.Array, labels: jax.Array, batch_size: int
) -> Callable[[TrainState], tuple[TrainState, dict[str, float]]]:
  """Run a whole epoch in one call."""
  epoch = training.make_epoch(stored_step, batch_size=batch_size)

  def run_epoch(state: TrainState) -> tuple[TrainState, dict[str, float]]:
    state, metrics = epoch(state, images, labels)
    return state, {name: float(value) for name, value in metrics.items()}

  return run_epoch


def _steps_of_an_epoch(
  stored_step: training.StoredStep, images: jax.Array, labels: jax.Array, batch_size: int
) -> Callable[[TrainState, StopFlag, Progress | None], tuple[TrainState, dict[str, float]]]:
  """Run the rest of an epoch, a step a call; end early when a signal comes."""
  one_step = jax.jit(stored_step, donate_argnums=0)

  def run_epoch(state: TrainState, stop: StopFlag, progress: Progress | None) -> tuple[TrainState, dict[str, float]]:
    steps = len(images) // batch_size
    number, done = divmod(int(state.step), steps)
    rows = training.epoch_rows(state.key, number, len(images), batch_size)
    seen: list[dict[str, float]] = []
    started = time.perf_counter()
    for index in range(done, steps):
      state, metrics = one_step(state, images, labels, rows[index], number)
      seen.append({name: float(value) for name, value in metrics.items()})
      if progress is not None:
        rate = len(seen) * batch_size / (time.perf_counter() - started)
        progress.update(1, **seen[-1], images_per_second=rate)
      if stop.signum:
        break
    return state, {name: float(np.mean([values[name] for values in seen])) for name in seen[0]}

  return run_epoch
