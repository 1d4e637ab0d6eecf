"""A finished training, restored: what forgetting and evaluation start from."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from mnemonic_jax.checkpoints import Checkpoints
from mnemonic_jax.data import Dataset
from mnemonic_jax.errors import MnemonicError
from mnemonic_jax.models import Model
from mnemonic_jax.runs import setup
from mnemonic_jax.runs.folder import RunFolder
from mnemonic_jax.training import TrainState


class Trained(NamedTuple):
  """The last checkpoint of a finished training, and its model."""

  model: Model
  state: TrainState
  codes: jax.Array
  checkpoint: pathlib.Path
  logits_fn: Callable[[Any, jax.Array], jax.Array]


def restore(run: RunFolder, dataset: Dataset) -> Trained:
  """Restore the checkpoint of a run whose training is finished, or say how far it is."""
  resume = f"Finish it first: mnemonic train {run.config.name} --out {run.path}"
  if not run.checkpoints.is_dir():
    raise MnemonicError(f"{run.path}: has no checkpoint yet. {resume}")
  start = setup.make(run.config, dataset, run.prng_impl)
  with Checkpoints(run.checkpoints, create=False) as checkpoints:
    if checkpoints.latest_step() is None:
      raise MnemonicError(f"{run.path}: has no whole checkpoint yet. {resume}")
    state, codes = checkpoints.restore(start.state, start.codes)
  if (step := int(state.step)) < start.total_steps:
    epoch, last = (f"{number / start.steps_per_epoch:.4g}" for number in (step, start.total_steps))
    raise MnemonicError(f"{run.path}: training stands at epoch {epoch} of {last}. {resume}")
  checkpoint = run.checkpoints / str(int(state.step))
  return Trained(start.model, state, codes, checkpoint, start.model.logits_fn(state.model_state))
