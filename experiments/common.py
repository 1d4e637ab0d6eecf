"""What the experiments share: training, forgetting every class in one call, scores, results."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

import mnemonic_jax as mj
from mnemonic_jax import evaluation
from mnemonic_jax.data import Dataset, Split
from mnemonic_jax.runs import train as train_run
from mnemonic_jax.runs import trained as trained_run
from mnemonic_jax.runs.config import Config
from mnemonic_jax.runs.files import dumps
from mnemonic_jax.runs.folder import RunFolder
from mnemonic_jax.runs.trained import Trained

RESULTS = pathlib.Path(__file__).parent / "results"


def train(config: Config, dataset: Dataset) -> Trained:
  """Train as `mnemonic train` does, in a run folder that is not kept."""
  with tempfile.TemporaryDirectory() as folder:
    run = RunFolder.create(epath.Path(folder) / "run", config)
    train_run.train(run, dataset)
    return trained_run.restore(run, dataset)


def forget_each(trained: Trained, methods: Any, forget_masks: jax.Array) -> Any:
  """Forget each row of (R, C) bool masks by each of S methods: params with leading axes (R, S).

  `methods` is one method whose numbers are arrays (S,). One compiled call: the Fishers of the codes
  are computed once for all of them.
  """

  def one(forget: jax.Array, method: Any) -> Any:
    arguments = trained.logits_fn, trained.params, trained.codes, forget, ~forget, method
    return mj.forget_step(*arguments)[0]

  return jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(forget_masks, methods)


class Judge:
  """Scores of many params of one model on one set of pictures in memory, in percent."""

  def __init__(self, trained: Trained, dataset: Dataset, split: Split) -> None:
    inputs, labels = dataset.preprocess(jnp.asarray(split.images)), jnp.asarray(split.labels)
    num_classes = len(dataset.class_names)
    self._totals = np.bincount(split.labels, minlength=num_classes)
    self._count = lambda params: evaluation.right_counts(
      trained.logits_fn(params, inputs), labels, num_classes
    )

  def right(self, params: Any, mapped: int = 0) -> np.ndarray:
    """Right predictions of each class, (..., C), of params with `mapped` leading axes."""
    count = self._count
    for _ in range(mapped):
      count = jax.vmap(count)
    return np.asarray(jax.jit(count)(params))

  def scores(self, right: np.ndarray, classes: Sequence[int]) -> tuple[float, float]:
    """(A_R, E_F) with `classes` forgotten."""
    found = evaluation.scores_from_counts(right, self._totals, classes)
    return 100 * found.retain_accuracy, 100 * found.forget_error

  def accuracy(self, right: np.ndarray) -> float:
    """Accuracy on all classes."""
    return 100 * float(right.sum() / self._totals.sum())


def part_of_train(dataset: Dataset, every: int) -> tuple[Dataset, Split]:
  """The set with every `every`-th training example held out, and that part."""
  held = np.arange(len(dataset.train.labels)) % every == 0
  kept, part = (dataset.train.part(np.flatnonzero(rows)) for rows in (~held, held))
  return dataclasses.replace(dataset, train=kept), part


def study_name(config: Config, overrides: Mapping[str, Any]) -> str:
  """Name the files and folders of a study: the config's name, and what was overridden."""
  changed = [f"{field}_{value}" for field, value in sorted(overrides.items())]
  return "_".join([config.name, *changed]).replace("/", "-")


def save(name: str, result: Any) -> None:
  """Write a result as JSON beside the table that shows it."""
  RESULTS.mkdir(exist_ok=True)
  (RESULTS / f"{name}.json").write_text(dumps(result, indent=1) + "\n")


def load(name: str) -> Any:
  """Read what `save` wrote."""
  return json.loads((RESULTS / f"{name}.json").read_text())
