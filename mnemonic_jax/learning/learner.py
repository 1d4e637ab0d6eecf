"""One call of `learn_codes`: a pass over data, codes and judges; or codes from nothing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax.fisher import passes
from mnemonic_jax.learning import checks, judges, match, reads
from mnemonic_jax.learning import recall as recalling
from mnemonic_jax.learning.checks import Settings
from mnemonic_jax.learning.judges import Centroids
from mnemonic_jax.learning.learned import LearnedCodes
from mnemonic_jax.learning.match import Rate, Targets
from mnemonic_jax.learning.measure import Measured, checked, measure
from mnemonic_jax.learning.reads import Arrays, Functions

RECALLED = 8  # codes a class, where no number is given
_UNIT = (0.0, 1.0)  # where recalled codes start, if nothing is said

Bounds = tuple[np.ndarray, np.ndarray]  # the smallest and largest input, each of its shape


class Learner:
  """The arguments of a call, checked, and how far it is."""

  def __init__(
    self,
    key: jax.Array,
    settings: Settings,
    functions: Functions,
    arrays: Arrays,
    input_range: Any,
    microbatch: int | None,
    progress: Callable[[int, int], Any] | None,
  ) -> None:
    self.settings, self.functions, self.arrays = settings, functions, arrays
    self.input_range, self.microbatch, self.progress = input_range, microbatch, progress
    # NumPy draws: the sample of the data, the start of learned and of recalled codes.
    words = np.asarray(jax.random.key_data(key)).ravel()
    self.of_sample, self.of_learned, self.of_recalled = np.random.SeedSequence(words).spawn(3)
    self.done = self.of = 0

  def recalled(self, shape: tuple[int, ...]) -> LearnedCodes:
    """Recall all codes from the model alone."""
    settings, dtype = self.settings, jnp.dtype(jnp.float32)
    bounds = checks.require_range(self.input_range or _UNIT, shape)
    some = jax.ShapeDtypeStruct((settings.num_classes, *shape), dtype)
    reads.check_shapes(self.functions, self.arrays, some, reads=False)
    rng = np.random.default_rng(self.of_recalled)
    start = self._start(rng, settings.per_class + settings.recall, bounds)
    reads.check_independence(self.functions, self.arrays, start[:, 0], np.ones(len(start), bool))
    self._check_statistics(start[:, 0], dtype)
    self.of = self._recall_steps(start)
    made = self._recall(start, bounds, dtype, rng)
    codes, more = np.split(made, [settings.per_class], axis=1)
    none = np.zeros((len(codes), 0), np.float32)
    return _result(codes, codes[:, :0], none, none, none, more)

  def learned(self, batches: Any, shape: tuple[int, ...] | None) -> LearnedCodes:
    """Learn codes and judges from one pass over data; recall what is asked for beside them."""
    settings = self.settings
    seed = self.of_sample.generate_state(2)
    first, others = checked(batches, settings.num_classes, shape)
    if settings.recall:
      self._check_statistics(reads.only_real(first.inputs, first.mask), first.inputs.dtype)
    known = measure(self.functions, self.arrays, first, others, seed)
    bounds = self._bounds(known)
    found = judges.centroids(
      known.reservoir,
      known.means[-1].shape[1],
      settings.num_judges,
      settings.min_members,
      np.random.default_rng(self.of_sample),
    )
    _warn_of_unjudged(found, settings)
    labels, places = _wanted(found, settings.per_class)
    rng = np.random.default_rng(self.of_learned)
    start = self._start(rng, settings.per_class + settings.num_judges, bounds)
    rng = np.random.default_rng(self.of_recalled)
    more = self._start(rng, settings.recall, bounds)
    inputs = start[labels, places]
    at_once = self._at_once(inputs)
    rate = self._rate(settings.steps, bounds)
    self.of = rate.steps * len(
      match.parts(self.functions, len(inputs), at_once)
    ) + self._recall_steps(more)
    targets = _targets(known, found, labels, places - settings.per_class)
    made = match.match(
      self.functions, self.arrays, inputs, targets, rate, known.dtype, at_once, self._tick
    )
    whole = np.zeros_like(start)
    whole[labels, places] = made
    codes, judged = np.split(whole.astype(known.dtype), [settings.per_class], axis=1)
    recalled = self._recall(more, bounds, known.dtype, rng)
    of_judges = found.weights, found.accuracy, found.spread
    return _result(codes, judged, *of_judges, recalled)

  def _bounds(self, known: Measured) -> Bounds:
    if self.input_range is not None:
      return checks.require_range(self.input_range, known.shape)
    low, high = (
      np.broadcast_to(x.astype(np.float32), known.shape) for x in (known.low, known.high)
    )
    return low, high

  def _start(self, rng: np.random.Generator, count: int, bounds: Bounds) -> np.ndarray:
    """Uniform noise within bounds, (C, count, *shape)."""
    low, high = bounds
    shape = self.settings.num_classes, count, *low.shape
    return low + (high - low) * rng.random(shape, np.float32)

  def _check_statistics(self, inputs: Any, dtype: Any) -> None:
    checks.require_statistics(self.functions, self.arrays, inputs.astype(dtype))

  def _rate(self, steps: int, bounds: Bounds) -> Rate:
    low, high = bounds
    return Rate(self.settings.learning_rate, high - low, steps)

  def _tick(self) -> None:
    self.done += 1
    if self.progress is not None:
      self.progress(self.done, self.of)

  def _at_once(self, inputs: np.ndarray) -> int:
    """How many inputs a step takes: what is asked for, or what fits in memory."""
    whole = self.arrays.params, self.arrays.logits
    objective = passes.Objective(
      reads.Logits(self.functions.logits),
      (False,) * len(jax.tree.leaves(whole)),
      self.functions.precision,
      placement=self.functions.placement,
    )
    one_group: Any = np.ones((1, len(inputs)), np.float32)
    return passes.examples_at_once(objective, whole, (inputs, None), one_group, self.microbatch)

  def _recall_at_once(self, inputs: np.ndarray) -> int:
    """All inputs, whose statistics then are those of all; else a batch."""
    at_once = self._at_once(inputs)
    return at_once if at_once >= len(inputs) else min(at_once, recalling.AT_ONCE)

  def _recall_steps(self, start: np.ndarray) -> int:
    inputs = _flat(start)
    if not len(inputs):
      return 0
    rounds = recalling.steps_a_round(len(inputs), self._recall_at_once(inputs))
    return self.settings.recall_steps * rounds

  def _recall(
    self, start: np.ndarray, bounds: Bounds, dtype: Any, rng: np.random.Generator
  ) -> np.ndarray:
    """Recall codes (C, R, *shape) from their start."""
    num_classes, per_class = start.shape[:2]
    if not per_class:
      return start.astype(dtype)
    inputs, labels = _flat(start), np.repeat(np.arange(num_classes, dtype=np.int32), per_class)
    made = recalling.recall(
      self.functions,
      self.arrays,
      inputs,
      labels,
      self._rate(self.settings.recall_steps, bounds),
      dtype,
      self._recall_at_once(inputs),
      rng,
      self._tick,
    )
    return made.reshape(start.shape).astype(dtype)


def _result(*arrays: np.ndarray) -> LearnedCodes:
  return LearnedCodes(*map(jnp.asarray, arrays))


def _flat(codes: np.ndarray) -> np.ndarray:
  """(C, R, *shape) -> (C * R, *shape)."""
  return codes.reshape(math.prod(codes.shape[:2]), *codes.shape[2:])


def _warn_of_unjudged(found: Centroids, settings: Settings) -> None:
  without = np.flatnonzero(~found.are_there.any(1)).tolist()
  if settings.num_judges and without:
    named = ", ".join(map(str, without[:10])) + (", ..." if len(without) > 10 else "")
    warnings.warn(
      f"Classes without a judge: {named}. They have fewer than min_members={settings.min_members} "
      "examples, so nothing is predicted of them. Pass more data, or a smaller min_members.",
      stacklevel=4,
    )


def _wanted(found: Centroids, per_class: int) -> tuple[np.ndarray, np.ndarray]:
  """The class of each input to learn, and its place among the class's codes and judges."""
  codes = np.ones((len(found.weights), per_class), bool)
  labels, places = np.nonzero(np.concatenate([codes, found.are_there], axis=1))
  return labels, places


def _targets(known: Measured, found: Centroids, labels: np.ndarray, judge: np.ndarray) -> Targets:
  """Class means for codes, centroids for judges, in the arrays that the reservoir holds.

  `judge` is the place of an input among its class's judges; negative for codes.
  """
  rows = np.flatnonzero(judge >= 0)
  vectors = [mean[labels] for mean in known.means]
  end = found.vectors.shape[2]
  for index in range(len(vectors) - 1, len(vectors) - 1 - known.kept, -1):
    start = end - vectors[index].shape[1]
    vectors[index][rows] = found.vectors[labels[rows], judge[rows], start:end]
    end = start
  everywhere, of_codes = np.ones(len(labels), np.float32), (judge < 0).astype(np.float32)
  counts = [of_codes] * (len(vectors) - known.kept) + [everywhere] * known.kept
  return Targets(vectors, known.deviations, counts)
