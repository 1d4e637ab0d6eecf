"""What the experiments share: training in memory, forgetting every class in one call, controls, tables."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import mnemonic_jax as mj
from mnemonic_jax import training
from mnemonic_jax.data import Dataset
from mnemonic_jax.data.split import Split
from mnemonic_jax.models import Model
from mnemonic_jax.runs import setup
from mnemonic_jax.runs.config import Config
from mnemonic_jax.runs.files import dumps

RESULTS = pathlib.Path(__file__).parent / "results"


class Trained(NamedTuple):
  """A classifier trained with codes, in evaluation mode."""

  model: Model
  params: Any
  codes: jax.Array
  logits_fn: Any
  features_fn: Any


def train(config: Config, dataset: Dataset) -> Trained:
  """Train in memory as `mnemonic train` does, without a run folder."""
  start = setup.make(config, dataset)
  step = training.make_train_step(
    start.model.apply, start.optimizer, start.codes, rate=config.codes.rate
  )
  stored_step = training.make_stored_step(step, dataset.preprocess)
  epoch = training.make_epoch(stored_step, batch_size=config.train.batch_size)
  images, labels = jnp.asarray(dataset.train.images), jnp.asarray(dataset.train.labels)
  state = start.state
  for _ in range(config.train.epochs):
    state, _ = epoch(state, images, labels)
  model_state = state.model_state
  return Trained(
    model=start.model,
    params=state.params,
    codes=start.codes,
    logits_fn=start.model.logits_fn(model_state),
    features_fn=lambda params, inputs: start.model.features(params, model_state, inputs),
  )


def forget_each(trained: Trained, strengths: mj.Perturbation, forget_masks: jax.Array) -> Any:
  """Forget each row of (R, C) bool masks at each of S strengths: params with leading axes (R, S).

  One compiled call: the per-example gradients of the codes are computed once for all of them.
  """

  def one(forget: jax.Array, strength: mj.Perturbation) -> Any:
    return mj.forget_step(
      trained.logits_fn, trained.params, trained.codes, forget, ~forget, strength
    )[0]

  return jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(forget_masks, strengths)


def per_class_accuracy(
  logits_fn: Any, params: Any, inputs: jax.Array, labels: np.ndarray, num_classes: int
) -> jax.Array:
  """(C,) accuracies; traceable, so it can be mapped over many params."""
  right = jnp.argmax(logits_fn(params, inputs), axis=-1) == labels
  counts = np.bincount(labels, minlength=num_classes)
  return jax.ops.segment_sum(right.astype(jnp.float32), labels, num_classes) / counts


def retain_and_forget(
  per_class: np.ndarray, counts: np.ndarray, classes: Sequence[int]
) -> tuple[float, float]:
  """(A_R, E_F) over examples, in percent, from per-class accuracies."""
  forgotten = np.isin(np.arange(len(counts)), classes)
  right = per_class * counts
  return (
    100 * float(right[~forgotten].sum() / counts[~forgotten].sum()),
    100 * float(1 - right[forgotten].sum() / counts[forgotten].sum()),
  )


def part_of_train(dataset: Dataset, every: int) -> tuple[Dataset, Split]:
  """The set with every `every`-th training example held out, and that part."""
  held = np.arange(len(dataset.train.labels)) % every == 0
  split = lambda rows: Split(dataset.train.images[rows], dataset.train.labels[rows])
  kept = Dataset(dataset.name, split(~held), dataset.test, dataset.class_names, dataset.levels)
  return kept, split(held)


def study_name(config: Config, overrides: Mapping[str, Any]) -> str:
  """What the files and folders of a study are called: the config's name, and the fields that were overridden."""
  changed = [f"{field}_{value}" for field, value in sorted(overrides.items())]
  return "_".join([config.name, *changed]).replace("/", "-")


def save(name: str, result: Any) -> None:
  """Write a result as JSON beside the table that shows it."""
  RESULTS.mkdir(exist_ok=True)
  (RESULTS / f"{name}.json").write_text(dumps(result, indent=1) + "\n")


def load(name: str) -> Any:
  """Read what `save` wrote."""
  return json.loads((RESULTS / f"{name}.json").read_text())
