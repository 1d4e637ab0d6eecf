"""What input costs a training step, and what mixing codes costs it.

Command:  python benchmarks/inputs.py [--pictures DIR] [--quick]
          (tens of minutes on 2 CPU cores)

First table, images per second:
  loader alone   stored sets: rows gathered and augmented on the device; streamed:
                 `Stream.training_batches`, decoded and cut to 224 x 224 by as many workers
                 (0: threads of this process), its first batches not counted
  step alone     the jitted step of `mnemonic train` on one batch that is repeated
  cost of input  seconds of steps with the loader over seconds of as many on the repeated batch,
                 minus 1: the median of pairs run one after the other, so that load on the machine
                 cancels, and in brackets its 95 % interval. MLPs run whole epochs in one call, the
                 others step by step, as `mnemonic train` does on CPU
Second table: a jitted step that mixes codes (rate 0.3) against the same step without, in pairs too;
and the seconds of `mix` by itself, called from Python, over those of the step without.

Pixels of the MNIST and CIFAR shapes are random (synthetic). Streamed pictures are the JPEGs in DIR,
or 100 JPEGs of 500 x 375 from scikit-learn's two photographs (synthetic too: two contents), kept in
memory. "cold" is the first call, compilation included; "first batch" includes the start of the
workers.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import io
import itertools
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image
from scipy.stats import binom
from sklearn.datasets import load_sample_images

from mnemonic_jax import data, losses, training
from mnemonic_jax.codes import mix as mix_codes
from mnemonic_jax.data import Dataset, Split, Stream, augmentation
from mnemonic_jax.runs import config as configs
from mnemonic_jax.runs import setup

WORKERS = (0, 1, 2)
RATE = 0.3


class Start(NamedTuple):
  """What a training starts from."""

  program: setup.Program
  state: training.TrainState
  codes: jax.Array


@dataclasses.dataclass
class Row:
  """One model with its data."""

  name: str
  dataset: Dataset
  config: configs.Config
  pairs: int  # of steps with a loader and without
  steps: int  # in each half of such a pair, where they are taken one by one
  mixing_pairs: int
  mixing_steps: int

  @functools.cached_property
  def start(self) -> Start:
    """Model, optimizer, first state, codes."""
    planned = setup.make_program(self.config, self.dataset)
    return Start(planned, *planned.init())

  def step(self) -> training.Step:
    """A train step that mixes in codes at the rate of this benchmark."""
    planned = self.start.program
    return training.make_train_step(planned.model.apply, planned.optimizer, rate=RATE)


def synthetic(name: str, num: int, shape: tuple[int, ...]) -> Dataset:
  """Random pixels in the shapes of a set."""
  generator = np.random.default_rng(0)
  images = generator.integers(0, 256, (num, *shape), dtype=np.uint8)
  split = Split(images, generator.integers(0, 10, num).astype(np.int32))
  return Dataset(name, split, split, tuple(map(str, range(10))), 255)


def encoded(folder: pathlib.Path | None) -> list[bytes]:
  """JPEGs of a folder, or a hundred crops of scikit-learn's photographs, each at another place."""
  if folder is not None:
    return [
      file.read_bytes()
      for file in sorted(folder.iterdir())
      if file.suffix.lower() in (".jpeg", ".jpg")
    ]
  files, photographs = [], [Image.fromarray(image) for image in load_sample_images().images]
  for index in range(100):
    photograph, buffer = photographs[index % 2], io.BytesIO()
    left, top = index, index // 2
    photograph.crop((left, top, left + 500, top + 375)).save(buffer, "JPEG", quality=90)
    files.append(buffer.getvalue())
  return files


def streamed(files: list[bytes], side: int) -> Dataset:
  """Pictures with labels that mean nothing, 40 classes."""
  source = [{"image": file, "label": index % 40} for index, file in enumerate(files)]
  labels = np.arange(len(files), dtype=np.int32) % 40
  stream = Stream("pictures", source, np.arange(len(files)), labels, 40, side, crop=True)
  return Dataset(
    "pictures",
    stream,
    stream,
    tuple(map(str, range(40))),
    255,
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
  )


def rows(pictures: pathlib.Path | None, quick: bool) -> list[Row]:
  """Everything that is measured."""
  cifar = {"train.batch_size": 8} if quick else {}
  mnist_size, cifar_size, side, batch = (256, 32, 32, 4) if quick else (60_000, 50_000, 224, 16)
  large = configs.load(
    "cub_resnet18", {"train.batch_size": batch, "model.pretrained": "", "model.new_head": False}
  )
  few = lambda number: 2 if quick else number
  return [
    Row(
      "digits, MLP, 32",
      data.load("digits"),
      configs.load("digits_paper"),
      few(600),
      0,
      few(200),
      few(20),
    ),
    Row(
      "MNIST shapes, MLP, 128",
      synthetic("MNIST", mnist_size, (28, 28, 1)),
      configs.load("mnist_mlp"),
      few(40),
      0,
      few(1000),
      few(10),
    ),
    Row(
      f"CIFAR-10 shapes, ResNet-10 small width 8, {8 if quick else 128}",
      synthetic("CIFAR-10", cifar_size, (32, 32, 3)),
      configs.load("cifar10_cpu_paper", cifar),
      few(25),
      few(8),
      few(150),
      1,
    ),
    Row(
      f"pictures, ResNet-18 at {side}, {batch}",
      streamed(encoded(pictures), side),
      large,
      few(11),
      few(3),
      few(25),
      1,
    ),
  ]


def make_plain_step(apply, optimizer):
  """`training.make_train_step` without codes."""

  def step(state, images, labels, codes):
    def mean_loss(params):
      logits, model_state = apply(params, state.model_state, images, True)
      return jnp.mean(losses.softmax_cross_entropy(logits, labels)), (logits, model_state)

    (value, (logits, model_state)), gradient = jax.value_and_grad(mean_loss, has_aux=True)(
      state.params
    )
    updates, optimizer_state = optimizer.update(gradient, state.optimizer_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {"loss": value, "accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == labels)}
    return training.TrainState(
      params, model_state, optimizer_state, state.step + 1, state.key
    ), metrics

  return step


class Runner:
  """Carries a train state from call to call, because each call donates it."""

  def __init__(self, row: Row, step: Callable):
    self.state = jax.tree.map(jnp.copy, row.start.state)
    self.step = step

  def __call__(self, batches: Iterator[tuple]) -> float:
    """Seconds of a step for each batch."""
    start = time.perf_counter()
    for batch in batches:
      self.state, metrics = self.step(self.state, *batch)
    jax.block_until_ready((self.state, metrics))
    return time.perf_counter() - start


def in_pairs(
  first: Callable[[], float], second: Callable[[], float], pairs: int
) -> tuple[list[float], list[float]]:
  """Time both in turn: first second, second first, ..., after one of each that is not counted."""
  seconds: tuple[list[float], list[float]] = ([], [])
  for index in range(-1, pairs):
    for which in (0, 1) if index % 2 else (1, 0):
      value = (first, second)[which]()
      if index >= 0:
        seconds[which].append(value)
  return seconds


def cost(first: list[float], second: list[float]) -> str:
  """First over second, pair by pair, minus 1: the median and its 95 % interval.

  The interval lies between two of the sorted ratios (a sign test); of fewer than six pairs it
  covers all.
  """
  ratios = sorted(100 * (a / b - 1) for a, b in zip(first, second, strict=True))
  low = max(int(binom.ppf(0.025, len(ratios), 0.5)), 1)
  bounds = ratios[low - 1], ratios[-low]
  return f"{statistics.median(ratios):+.2f} % ({bounds[0]:+.2f} to {bounds[1]:+.2f})"


def repeated_batch(row: Row) -> tuple[jax.Array, ...]:
  """One batch of the training set on the device: stored images, labels, codes, rows."""
  size = row.config.train.batch_size
  images, labels = next(row.dataset.train.batches(size))
  return jnp.asarray(images), jnp.asarray(labels), row.start.codes, jnp.arange(size)


def measure_stored(row: Row) -> str:
  """A set that lives on the device."""
  config, dataset = row.config, row.dataset
  size, augment = config.train.batch_size, augmentation.NAMES[config.data.augment]
  start, step = row.start, row.step()
  images, labels = jnp.asarray(dataset.train.images), jnp.asarray(dataset.train.labels)
  batch = repeated_batch(row)
  augmented = training.make_batch_step(step, dataset.preprocess, augment)
  alone = training.make_batch_step(step, dataset.preprocess)
  no_step = training.make_batch_step(
    lambda state, images, labels, codes: (state, (images, labels)), lambda x: x, augment
  )
  stored = lambda state, images, labels, codes, rows, epoch: augmented(
    state, images[rows], labels[rows], codes, rows, epoch
  )
  gather = jax.jit(
    lambda state, images, labels, rows: no_step(state, images[rows], labels[rows], None, rows, 0)[1]
  )
  order = list(training.epoch_rows(start.state.key, 0, len(images), size))

  def gather_all() -> float:
    begun = time.perf_counter()
    jax.block_until_ready([gather(start.state, images, labels, rows) for rows in order[:50]])
    return time.perf_counter() - begun

  first_batch = time.perf_counter()
  jax.block_until_ready(gather(start.state, images, labels, order[0]))
  first_batch = time.perf_counter() - first_batch
  loader = min(50, len(order)) * size / statistics.median(gather_all() for _ in range(5))
  if config.model.name == "mlp":
    with_loader = Runner(row, training.make_epoch(augmented, batch_size=size))

    def steps_of_one_batch(state, *batch):
      scanned = lambda carry, _: alone(carry, *batch, 0)
      return jax.lax.scan(scanned, state, None, length=start.program.steps_per_epoch)

    without = Runner(row, jax.jit(steps_of_one_batch, donate_argnums=0))
    calls = lambda: [(images, labels, start.codes)], lambda: [batch]
    steps = start.program.steps_per_epoch
  else:
    with_loader = Runner(row, jax.jit(stored, donate_argnums=0))
    without = Runner(row, jax.jit(alone, donate_argnums=0))
    epochs = itertools.count()
    all_rows = itertools.chain.from_iterable(
      training.epoch_rows(start.state.key, epoch, len(images), size) for epoch in epochs
    )
    calls = (
      lambda: (
        (images, labels, start.codes, rows, 0) for rows in itertools.islice(all_rows, row.steps)
      ),
      lambda: itertools.repeat((*batch, 0), row.steps),
    )
    steps = row.steps
  cold = without(calls[1]())
  loaded, plain = in_pairs(lambda: with_loader(calls[0]()), lambda: without(calls[1]()), row.pairs)
  return line(
    row, "stored", first_batch, loader, steps * size / statistics.median(plain), cold, loaded, plain
  )


def measure_streamed(row: Row) -> Iterator[str]:
  """A set that is decoded as it is needed, with each number of workers."""
  config, stream, size = row.config, row.dataset.train, row.config.train.batch_size
  step, codes = row.step(), row.start.codes
  augment = augmentation.NAMES[config.data.augment]
  compiled = jax.jit(
    training.make_batch_step(step, row.dataset.preprocess, augment), donate_argnums=0
  )
  runner, batch = Runner(row, compiled), repeated_batch(row)
  repeated = lambda: runner(itertools.repeat((*batch, 0), row.steps))
  begun = time.perf_counter()
  runner([(*batch, 0)])
  cold = time.perf_counter() - begun
  for workers in WORKERS:
    skipped, counted = 8 * max(workers, 1), 6 if row.pairs < 3 else 30
    begun = time.perf_counter()
    with stream.training_batches(
      0, size, first_step=0, last_step=skipped + counted, workers=workers
    ) as batches:
      next(batches)
      first_batch = time.perf_counter() - begun
      for _ in range(skipped - 1):
        next(batches)
      begun = time.perf_counter()
      for _ in range(counted):
        next(batches)
      loader = counted * size / (time.perf_counter() - begun)

    def with_loader(workers: int = workers) -> float:
      # The first step is not counted: it fills the buffers, which are full again at the end.
      loading = stream.training_batches(
        0, size, first_step=0, last_step=row.steps + 13, workers=workers
      )
      with loading as batches:
        decoded = ((b.images, b.labels, codes, b.rows, 0) for b in batches)
        runner(itertools.islice(decoded, 1))
        return runner(itertools.islice(decoded, row.steps))

    loaded, plain = in_pairs(with_loader, repeated, row.pairs)
    alone = row.steps * size / statistics.median(plain)
    yield line(row, f"streamed, workers {workers}", first_batch, loader, alone, cold, loaded, plain)


def line(row: Row, kind: str, first_batch, loader, alone, cold, loaded, plain) -> str:
  """A row of the first table."""
  return (
    f"| {row.name} | {kind} | {first_batch:.2f} | {loader:.0f} | {alone:.3g} | {cold:.2f} | "
    f"{cost(loaded, plain)} |"
  )


def measure_mixing(row: Row) -> str:
  """A row of the second table."""
  start, size = row.start, row.config.train.batch_size
  images, labels, codes, _ = repeated_batch(row)
  images = jax.jit(row.dataset.preprocess)(images)
  mixed = Runner(
    row,
    jax.jit(
      row.step(),
      donate_argnums=0,
    ),
  )
  plain = Runner(
    row,
    jax.jit(make_plain_step(start.program.model.apply, start.program.optimizer), donate_argnums=0),
  )
  batches = lambda: itertools.repeat((images, labels, codes), row.mixing_steps)
  with_codes, without = in_pairs(
    lambda: mixed(batches()), lambda: plain(batches()), row.mixing_pairs
  )
  mix = jax.jit(
    lambda index: mix_codes(
      jax.random.fold_in(start.state.key, index), images, labels, start.codes, RATE
    )
  )

  def mix_alone(index: int) -> float:
    begun = time.perf_counter()
    jax.block_until_ready(mix(index))
    return time.perf_counter() - begun

  mix_alone(0)
  alone = statistics.median(mix_alone(index) for index in range(100))
  seconds = [
    1000 * statistics.median(values) / row.mixing_steps for values in (with_codes, without)
  ]
  return (
    f"| {row.name} | {size} | {seconds[0]:.4g} | {seconds[1]:.4g} | {cost(with_codes, without)} | "
    f"{1000 * alone:.3g} | {100_000 * alone / seconds[1]:.2g} % |"
  )


def main() -> None:
  """Print both tables."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--pictures", type=pathlib.Path, metavar="DIR", help="folder of JPEGs to stream"
  )
  parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
  options = parser.parse_args()
  if options.pictures is not None and not options.pictures.is_dir():
    parser.error(f"--pictures: {options.pictures} is no folder")
  chosen = rows(options.pictures, options.quick)
  pictures = (
    f"JPEGs of {options.pictures.name}" if options.pictures else "two photographs (synthetic)"
  )
  print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; streamed pictures: {pictures}\n")
  print(
    "| data, model, batch | loader | first batch, s | loader alone, images/s | "
    "step alone, images/s | cold, s | cost of input |\n"
    "|---|---|---|---|---|---|---|"
  )
  for row in chosen:
    measured = (
      measure_streamed(row) if isinstance(row.dataset.train, Stream) else [measure_stored(row)]
    )
    for text in measured:
      print(text, flush=True)
  print(
    "\n| data, model | batch | step with codes, ms | without, ms | ratio - 1 | "
    "mix alone, ms | / step |\n"
    "|---|---|---|---|---|---|---|"
  )
  for row in chosen[1:]:
    print(measure_mixing(row), flush=True)


if __name__ == "__main__":
  main()
