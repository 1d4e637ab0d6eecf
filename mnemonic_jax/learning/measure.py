"""The one pass over data: class means and deviations of what is matched, and a sample for judges.

Memory is bounded: running sums on the device, and on the host a reservoir of at most 1,000 examples
a class, with what was read of each. Those are the examples with the smallest hash of seed and
position in the data, so the reservoir is the same whatever the batches and the devices.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax import _checks, _mesh, _trees
from mnemonic_jax.fisher import loss_checks
from mnemonic_jax.learning import reads
from mnemonic_jax.learning.predict import margin
from mnemonic_jax.learning.reads import Arrays, Functions

RESERVOIR = 1000  # examples a class
_RESERVOIR_BYTES = 2**31  # above which only the last array is kept of each, or the last few
_FLOOR = 0.05  # of the deviation of all values, added to each channel's


class Measured(NamedTuple):
  """What is known of the data after the pass; float32 on the host."""

  means: list[np.ndarray]  # (C, F) for each array that is matched
  deviations: list[np.ndarray]  # (F,) likewise
  low: np.ndarray  # (channels,), the smallest input of each channel, and the largest
  high: np.ndarray
  shape: tuple[int, ...]  # of one input
  dtype: Any
  reservoir: Reservoir
  kept: int  # how many arrays the reservoir holds, the last ones, side by side


class Running(NamedTuple):
  """Sums up to now, on the device."""

  counts: jax.Array  # (C,) int32
  class_means: list[jax.Array]  # (C, F)
  means: list[jax.Array]  # (F,), over all classes
  squares: list[jax.Array]  # (F,), the sums of squared differences from `means`
  low: jax.Array  # (channels,)
  high: jax.Array


class Batch(NamedTuple):
  """One batch, checked; rows where the mask is False do not count."""

  inputs: Any
  labels: Any
  mask: Any


class Seen(NamedTuple):
  """What the host takes from one batch."""

  vectors: Any  # (N, F), the arrays that the reservoir keeps
  margins: Any  # (N,) float32, of the logits
  labels: Any
  mask: Any
  inputs_finite: Any
  reads_finite: Any


class Reservoir:
  """The vectors of each class with the smallest hashes, in the order of these."""

  def __init__(self, seed: np.ndarray, num_classes: int, width: int, size: int = RESERVOIR) -> None:
    self.seed, self.seen = seed, 0
    self.hashes = np.full((num_classes, size), _NONE)
    self.vectors = np.zeros((num_classes, size, width), np.float32)
    self.margins = np.zeros((num_classes, size), np.float32)

  def add(self, vectors: np.ndarray, margins: np.ndarray, labels: np.ndarray) -> None:
    """Take the next examples of the data."""
    hashes = hashed(self.seed, self.seen + np.arange(len(labels)))
    self.seen += len(labels)
    largest = self.hashes.max(1)
    for row in np.flatnonzero(hashes < largest[labels]):
      of_class = self.hashes[labels[row]]
      slot = of_class.argmax()
      if hashes[row] < of_class[slot]:
        of_class[slot] = hashes[row]
        self.vectors[labels[row], slot] = vectors[row]
        self.margins[labels[row], slot] = margins[row]

  def of(self, label: int) -> tuple[np.ndarray, np.ndarray]:
    """The vectors (n, F) of a class, and the margins (n,) by which the model was right."""
    order = np.argsort(self.hashes[label])
    order = order[self.hashes[label][order] != _NONE]
    return self.vectors[label][order], self.margins[label][order]


_NONE = np.uint64(2**32)  # where the reservoir is empty: larger than any hash


def hashed(seed: np.ndarray, positions: np.ndarray) -> np.ndarray:
  """Hash positions with two words of seed; no two of 2**32 positions have the same hash.

  >>> hashed(np.array([1, 2], np.uint32), np.arange(3))
  array([ 779996176, 3333651121,  376952191], dtype=uint64)
  """
  words = positions.astype(np.uint32) + seed[0]
  return _mixed(_mixed(words) ^ seed[1]).astype(np.uint64)


def _mixed(words: np.ndarray) -> np.ndarray:
  """The finaliser of MurmurHash3 (Appleby), a bijection of 32-bit words."""
  words = (words ^ (words >> np.uint32(16))) * np.uint32(0x85EBCA6B)
  words = (words ^ (words >> np.uint32(13))) * np.uint32(0xC2B2AE35)
  return words ^ (words >> np.uint32(16))


def measure(
  functions: Functions, arrays: Arrays, first: Batch, batches: Iterator[Batch], seed: np.ndarray
) -> Measured:
  """Do the pass over data: the first batch, and those that follow it."""
  found, _ = reads.check_shapes(functions, arrays, first.inputs, reads=True)
  reads.check_independence(functions, arrays, first.inputs, first.mask)
  running = reads.placed(functions.placement, _start(found, first.inputs, functions.num_classes))
  kept = _that_fit([x.shape[1] for x in found], functions.num_classes)
  reservoir = Reservoir(seed, functions.num_classes, sum(x.shape[1] for x in found[-kept:]))
  for index, batch in enumerate(itertools.chain([first], batches)):
    running, seen = _examine(functions, kept, running, arrays, *batch)
    _keep(reservoir, Seen(*map(np.asarray, seen)), index, functions.num_classes)
  _require_every_class(np.asarray(running.counts))
  host = jax.tree.map(np.asarray, running)
  pairs = zip(host.means, host.squares, strict=True)
  deviations = [_deviation(*pair, host.counts.sum()) for pair in pairs]
  dtype = jax.dtypes.canonicalize_dtype(first.inputs.dtype)
  shape = first.inputs.shape[1:]
  return Measured(host.class_means, deviations, host.low, host.high, shape, dtype, reservoir, kept)


def _that_fit(widths: list[int], num_classes: int) -> int:
  """How many arrays, from the last on, fit in the reservoir; the last one always does."""
  bytes_each = np.cumsum(widths[::-1]) * num_classes * RESERVOIR * 4
  return max(1, int(np.sum(bytes_each <= _RESERVOIR_BYTES)))


def _keep(reservoir: Reservoir, seen: Seen, index: int, num_classes: int) -> None:
  if not seen.inputs_finite:
    raise ValueError(
      f"batches: NaN or inf in the inputs of batch {index}; expected finite inputs, in the space "
      "that the model sees."
    )
  if not seen.reads_finite:
    raise ValueError(
      f"logits_fn: NaN or inf in logits or activations on batch {index}; expected finite ones from "
      "finite params and inputs."
    )
  _require_labels(seen.labels, seen.mask, num_classes)
  mask = seen.mask
  reservoir.add(seen.vectors[mask], seen.margins[mask], seen.labels[mask].astype(np.int64))


def _require_every_class(count: np.ndarray) -> None:
  if missing := np.flatnonzero(count == 0).tolist():
    raise ValueError(
      f"batches: no example of class {', '.join(map(str, missing[:10]))}; expected examples of "
      f"all {len(count)} classes. Pass the data that the model was trained with, or recall the "
      "codes without data: batches=None, shape=..."
    )


def _deviation(mean: np.ndarray, squares: np.ndarray, count: int) -> np.ndarray:
  """Each channel's deviation, and a share of that of all values: a dead channel's is 0."""
  variance = squares.astype(np.float64) / count
  overall = np.sqrt(np.mean(variance) + np.var(mean.astype(np.float64)))
  found = np.sqrt(variance) + _FLOOR * overall
  return np.where(found > 0, found, 1).astype(np.float32)  # an array that never changes


def _start(found: list[Any], inputs: Any, num_classes: int) -> Running:
  zeros = lambda *sizes: [jnp.zeros((*sizes, x.shape[1]), x.dtype) for x in found]
  channels, inf = (
    inputs.shape[-1:],
    jnp.asarray(jnp.inf, jax.dtypes.canonicalize_dtype(inputs.dtype)),
  )
  return Running(
    jnp.zeros(num_classes, jnp.int32),
    zeros(num_classes),
    zeros(),
    zeros(),
    jnp.full(channels, inf),
    jnp.full(channels, -inf),
  )


@partial(jax.jit, static_argnums=(0, 1))
def _examine(
  functions: Functions,
  kept: int,
  running: Running,
  arrays: Arrays,
  *batch: jax.Array,
) -> tuple[Running, Seen]:
  """One batch: run the model on it, and add what it reads to the sums."""
  added = partial(_with_batch, functions, kept)
  everywhere = jax.sharding.PartitionSpec()
  return _mesh.with_automatic_axes(added, batch, running, arrays, out_specs=everywhere)


def _with_batch(
  functions: Functions, kept: int, batch: Any, running: Running, arrays: Arrays
) -> tuple[Running, Seen]:
  inputs, labels, mask = batch
  inputs = reads.only_real(inputs, mask)
  found, logits = reads.reads_program(functions, arrays, inputs)
  found = [reads.only_real(x, mask) for x in found]
  inputs_finite = _trees.all_finite(inputs)
  reads_finite = _trees.all_finite((found, reads.only_real(logits, mask)))
  with loss_checks.matmul_precision("highest"):
    running = _added(running, found, labels, mask)
  real = mask.reshape(-1, *(1,) * (inputs.ndim - 1))
  others = tuple(range(inputs.ndim - 1))
  smallest = jnp.min(jnp.where(real, inputs, jnp.inf), axis=others)
  largest = jnp.max(jnp.where(real, inputs, -jnp.inf), axis=others)
  low, high = jnp.minimum(running.low, smallest), jnp.maximum(running.high, largest)
  margins = margin(logits.astype(jnp.float32), labels.astype(jnp.int32))
  vectors = jnp.concatenate([x.astype(jnp.float32) for x in found[-kept:]], axis=1)
  seen = Seen(vectors, margins, labels, mask, inputs_finite, reads_finite)
  return reads.copied(functions.placement, (running._replace(low=low, high=high), seen))


def _added(running: Running, found: list[jax.Array], labels: jax.Array, mask: jax.Array) -> Running:
  """Move every mean by the batch's own; only differences from a mean are summed."""
  num_classes = len(running.counts)
  classes = jnp.arange(num_classes, dtype=jnp.int32)
  chosen = (labels.astype(jnp.int32)[:, None] == classes[None]) & mask[:, None]
  of_class = jnp.sum(chosen, axis=0, dtype=jnp.int32)
  before, now = jnp.sum(running.counts), jnp.sum(of_class)
  share = now / jnp.maximum(before + now, 1)
  per_class = of_class / jnp.maximum(running.counts + of_class, 1)
  class_means, means, squares = [], [], []
  for x, old, mean, square in zip(
    found, running.class_means, running.means, running.squares, strict=True
  ):
    own = chosen.astype(x.dtype).T @ x / jnp.maximum(of_class, 1)[:, None].astype(x.dtype)
    class_means.append(old + per_class[:, None].astype(x.dtype) * (own - old))
    batch_mean = jnp.sum(x, axis=0) / jnp.maximum(now, 1).astype(x.dtype)
    apart = jnp.where(mask[:, None], x - batch_mean[None], 0)
    step = batch_mean - mean
    weight = (share * before).astype(x.dtype)
    squares.append(square + jnp.sum(jnp.square(apart), axis=0) + weight * jnp.square(step))
    means.append(mean + share.astype(x.dtype) * step)
  return running._replace(
    counts=running.counts + of_class, class_means=class_means, means=means, squares=squares
  )


def checked(batches: Iterable[Any], num_classes: int, shape: Any) -> tuple[Batch, Iterator[Batch]]:
  """Check the first batch, and each of the others when it comes."""
  others = _each_checked(batches, num_classes, shape)
  first = next(others, None)
  if first is None:
    raise ValueError(
      "batches: yielded nothing; expected at least one batch (inputs, labels). An iterator can be "
      "used up only once: pass a fresh one."
    )
  return first, others


def _each_checked(batches: Iterable[Any], num_classes: int, shape: Any) -> Iterator[Batch]:
  """A batch that is smaller than one before is filled up, so that one program serves all."""
  size = 0
  for batch in batches:
    made = _unpacked(batch, num_classes)
    shape = made.inputs.shape[1:] if shape is None else shape
    if made.inputs.shape[1:] != tuple(shape):
      raise ValueError(
        f"batches: yielded inputs of shape {made.inputs.shape}; expected (N, "
        f"{', '.join(map(str, shape))}), as the batch before or the argument shape says."
      )
    size = max(size, len(made.inputs))
    yield _filled(made, size)


def _unpacked(batch: Any, num_classes: int) -> Batch:
  if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
    raise ValueError(
      f"batches: yielded {type(batch).__name__}; expected (inputs, labels) or (inputs, labels, "
      "mask)."
    )
  inputs, labels = (x if hasattr(x, "dtype") else np.asarray(x) for x in batch[:2])
  if not jnp.issubdtype(inputs.dtype, jnp.floating):
    raise TypeError(
      f"batches: yielded inputs of dtype {inputs.dtype}; expected floating inputs, as the model "
      "sees them after normalisation. Integer inputs, such as tokens, cannot be learned."
    )
  if inputs.ndim < 2 or 0 in inputs.shape:
    raise ValueError(
      f"batches: yielded inputs of shape {inputs.shape}; expected (N, *shape) with at least one "
      "example."
    )
  mask = batch[2] if len(batch) == 3 else np.ones(len(inputs), bool)
  if getattr(mask, "dtype", None) != np.dtype(bool) or mask.shape != (len(inputs),):
    raise ValueError(f"mask: got {_checks.kind(mask)}; expected bool of shape ({len(inputs)},).")
  if all(getattr(x, "is_fully_addressable", True) for x in (labels, mask)):
    _require_labels(labels, mask, num_classes)
  return Batch(inputs, labels, mask)


def _require_labels(labels: Any, mask: Any, num_classes: int) -> None:
  """Refuse labels of rows that count, if they are no classes of the model."""
  size = len(mask)
  fits = getattr(labels, "shape", None) == (size,) and jnp.issubdtype(labels.dtype, jnp.integer)
  host = np.asarray(labels)[np.asarray(mask)] if fits else labels
  _checks.require_labels("labels", host, len(host) if fits else size, num_classes)


def _filled(batch: Batch, size: int) -> Batch:
  """Repeat the last row, masked out, up to `size`; an array on several devices stays as it is."""
  missing = size - len(batch.inputs)
  on_mesh = any(isinstance(x, jax.Array) and len(x.devices()) > 1 for x in batch)
  if not missing or on_mesh:
    return batch
  inputs, labels, mask = map(np.asarray, batch)
  repeat = lambda x: np.concatenate([x, np.repeat(x[-1:], missing, axis=0)])
  return Batch(repeat(inputs), repeat(labels), np.concatenate([mask, np.zeros(missing, bool)]))
