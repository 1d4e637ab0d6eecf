"""`mnemonic train`: train with codes, checkpoint, resume."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax import training
from mnemonic_jax.checkpoints import Checkpoints
from mnemonic_jax.data import Dataset
from mnemonic_jax.errors import MnemonicError
from mnemonic_jax.progress import Progress
from mnemonic_jax.runs import setup, signals
from mnemonic_jax.runs.folder import RunFolder
from mnemonic_jax.runs.hashing import params_sha256
from mnemonic_jax.runs.inference import predict


def train(run: RunFolder, dataset: Dataset) -> dict[str, Any]:
  """Train the run to its last epoch from wherever it is, and return a summary.

  A checkpoint is written every `train.checkpoint_every` epochs, at the end, and on Ctrl-C or SIGTERM. A resumed
  training continues bit for bit as if it had never stopped.
  """
  settings = run.config.train
  start = setup.make(run.config, dataset, run.prng_impl)
  with run.locked(), Checkpoints(run.checkpoints) as checkpoints:
    state, codes, steps = start.state, start.codes, start.steps_per_epoch
    if checkpoints.latest_step() is not None:
      state, codes = checkpoints.restore(state, codes)
    resumed_from = int(state.step) // steps
    run.rewind_metrics(int(state.step))
    step = training.make_train_step(start.model.apply, start.optimizer, codes, rate=run.config.codes.rate)
    epoch = training.make_epoch(step, dataset.preprocess, batch_size=settings.batch_size)
    images, labels = jnp.asarray(dataset.train.images), jnp.asarray(dataset.train.labels)
    started = time.perf_counter()
    with signals.deferred() as stop, Progress("train", settings.epochs, "epochs", initial=resumed_from) as progress:
      for number in range(resumed_from + 1, settings.epochs + 1):
        epoch_started = time.perf_counter()
        state, metrics = epoch(state, images, labels)
        values = {name: float(value) for name, value in metrics.items()}
        seconds = time.perf_counter() - epoch_started
        rate = steps * settings.batch_size / seconds
        if not np.isfinite(values["loss"]):
          raise MnemonicError(
            f"training: the loss of epoch {number} is {values['loss']}; expected a finite one. Use a smaller "
            "train.learning_rate. The last checkpoint is from before that."
          )
        record = {"epoch": number, "step": int(state.step), **values, "images_per_second": rate, "seconds": seconds}
        run.append_metrics(record)
        whole = number % settings.checkpoint_every == 0 or number == settings.epochs or bool(stop.signum)
        if whole:
          checkpoints.save(state, codes)
        progress.update(1, **values, images_per_second=rate)
        if whole:  # a signal that came since is for the next epoch, whose checkpoint it will find written
          stop.stop_if_asked(
            f"stopped after epoch {number} of {settings.epochs}; the checkpoint is written. Resume with the same command."
          )
    seconds = time.perf_counter() - started
    logits_fn = start.model.logits_fn(state.model_state)
    test = predict(logits_fn, state.params, dataset.test, dataset.preprocess)
    return {
      "run": str(run.path),
      "config": run.config.name,
      "epochs": settings.epochs,
      "steps": int(state.step),
      "resumed_from_epoch": resumed_from,
      "loss": run.metrics()[-1]["loss"] if run.metrics() else None,
      "test_accuracy": float(np.mean(test.predictions == dataset.test.labels)),
      "seconds": seconds,
      "checkpoint": str(run.checkpoints / str(int(state.step))),
      "codes_sha256": setup.array_sha256(codes),
      "params_sha256": params_sha256(jax.device_get(state.params)),
    }
