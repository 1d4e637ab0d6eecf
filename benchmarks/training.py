"""Compare whole epochs in one call with one jitted step per Python call, on the MLPs.

Command:  python benchmarks/training.py      (under a minute on 2 CPU cores)

Pixels of the MNIST row are random, labelled synthetic: only the time is read. Medians of the epochs
after the first; "cold" is the first call, compilation included.
"""

from __future__ import annotations

import itertools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax import data, training
from mnemonic_jax.data import Dataset, Split
from mnemonic_jax.runs import config as configs
from mnemonic_jax.runs import setup
from mnemonic_jax.runs.train import StoredFeed

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

  planned = setup.make_program(config, dataset)
  epoch = training.make_epoch(planned.batch_step, batch_size=size)
  state, codes = planned.init()

  def whole() -> None:
    nonlocal state
    state, metrics = epoch(state, images, labels, codes)
    jax.block_until_ready((state.params, metrics))

  whole_cold, whole_warm = time_epochs(whole)
  state, _ = planned.init()
  feed = StoredFeed(dataset.train, setup.host_key(state.key), size)
  epochs, steps = itertools.count(), planned.steps_per_epoch

  def single() -> None:
    nonlocal state
    first = next(epochs) * steps
    for pictures, answers, rows in feed(first, first + steps):
      state, _ = planned.step(state, pictures, answers, codes, rows, np.int32(first // steps))
    jax.block_until_ready(state.params)

  single_cold, single_warm = time_epochs(single)
  return (
    f"| {name} | {planned.steps_per_epoch} | {whole_warm:.3f} ({whole_cold:.2f}) | "
    f"{single_warm:.3f} ({single_cold:.2f}) | "
    f"{single_warm / whole_warm:.2f} |"
  )


def main() -> None:
  """Print the table."""
  print(
    "| data, MLP 1000 | steps | epoch in one call, s (cold) | step by step, s (cold) | ratio |\n"
    "|---|---|---|---|---|"
  )
  print(measure("digits, batch 32", "digits_paper", data.load("digits")))
  print(measure("MNIST shapes (synthetic pixels), batch 128", "mnist_mlp", synthetic_mnist()))


if __name__ == "__main__":
  main()
