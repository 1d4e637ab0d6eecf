"""Whole epochs in one call against one jitted step per Python call, on the MLPs: seconds an epoch, and the ratio.

Command:  python benchmarks/training.py      (under a minute on 2 CPU cores)

Pixels of the MNIST row are random, labelled synthetic: only the time is read. Medians of the epochs after the first;
"cold" is the first call, compilation included.
"""

from __future__ import annotations

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax import data, training
from mnemonic_jax.data import Dataset
from mnemonic_jax.data.split import Split
from mnemonic_jax.runs import config as configs
from mnemonic_jax.runs import setup

EPOCHS = 6


def synthetic_mnist() -> Dataset:
  """Random pixels in MNIST's shapes (synthetic)."""
  generator = np.random.default_rng(0)
  images = generator.integers(0, 256, (60_000, 28, 28, 1), dtype=np.uint8)
  split = Split(images, generator.integers(0, 10, 60_000).astype(np.int32))
  return Dataset("synthetic", split, split, tuple(map(str, range(10))), 255)


def time_epochs(run_epoch) -> tuple[float, float]:
  """(cold, median warm) seconds of an epoch."""
  seconds = []
  for _ in range(EPOCHS):
    start = time.perf_counter()
    run_epoch()
    seconds.append(time.perf_counter() - start)
  return seconds[0], statistics.median(seconds[1:])


def measure(name: str, config_name: str, dataset: Dataset) -> str:
  """One row of the table."""
  config = configs.load(config_name)
  images, labels = jnp.asarray(dataset.train.images), jnp.asarray(dataset.train.labels)
  size = config.train.batch_size

  def fresh():
    start = setup.make(config, dataset)
    return start, training.make_train_step(
      start.model.apply, start.optimizer, start.codes, rate=config.codes.rate
    )

  start, step = fresh()
  epoch = training.make_epoch(training.make_stored_step(step, dataset.preprocess), batch_size=size)
  state = start.state

  def whole() -> None:
    nonlocal state
    state, metrics = epoch(state, images, labels)
    jax.block_until_ready((state.params, metrics))

  whole_cold, whole_warm = time_epochs(whole)
  start, step = fresh()
  jitted = jax.jit(
    lambda state, rows: step(state, dataset.preprocess(images[rows]), labels[rows]),
    donate_argnums=0,
  )
  state, generator = start.state, np.random.default_rng(0)

  def single() -> None:
    nonlocal state
    order = generator.permutation(len(labels))
    for index in range(start.steps_per_epoch):
      state, _ = jitted(state, order[index * size : (index + 1) * size])
    jax.block_until_ready(state.params)

  single_cold, single_warm = time_epochs(single)
  return (
    f"| {name} | {start.steps_per_epoch} | {whole_warm:.3f} ({whole_cold:.2f}) | {single_warm:.3f} ({single_cold:.2f}) | "
    f"{single_warm / whole_warm:.2f} |"
  )


def main() -> None:
  """Print the table."""
  print(
    "| data, MLP 1000 | steps | epoch in one call, s (cold) | step by step, s (cold) | ratio |\n|---|---|---|---|---|"
  )
  print(measure("digits, batch 32", "digits", data.load("digits")))
  print(measure("MNIST shapes (synthetic pixels), batch 128", "mnist_mlp", synthetic_mnist()))


if __name__ == "__main__":
  main()
