"""Learn codes of a model that is already trained: the door."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from mnemonic_jax import _checks
from mnemonic_jax._types import LogitsFn
from mnemonic_jax.fisher import Execution
from mnemonic_jax.fisher.door import require_execution
from mnemonic_jax.learning import checks, reads
from mnemonic_jax.learning.checks import Settings
from mnemonic_jax.learning.learned import LearnedCodes
from mnemonic_jax.learning.learner import RECALLED, Learner

PyTree = Any
FeaturesFn = Callable[[PyTree, jax.Array], dict[str, jax.Array]]
StatisticsFn = Callable[[PyTree, jax.Array], dict[str, tuple[jax.Array, jax.Array, jax.Array]]]


def learn_codes(
  key: jax.Array,
  logits_fn: LogitsFn,
  params: PyTree,
  batches: Iterable[tuple[Any, ...]] | None,
  *,
  num_classes: int,
  per_class: int | None = None,
  recall: int = 0,
  shape: Sequence[int] | None = None,
  input_range: tuple[Any, Any] | None = None,
  features_fn: FeaturesFn | None = None,
  statistics_fn: StatisticsFn | None = None,
  num_judges: int = 8,
  min_members: int = 50,
  steps: int = 200,
  recall_steps: int = 150,
  learning_rate: float = 0.05,
  precision: str | None = "highest",
  execution: Execution | None = None,
  progress: Callable[[int, int], Any] | None = None,
) -> LearnedCodes:
  """Learn codes of a trained model from one pass over data, or recall them from the model alone.

  With `batches` a code is an input x that makes the model's activations those of its class:

      minimise sum over arrays h of mean((h(x) - mean_c) / sd)^2

  by Adam from uniform noise. The arrays h are the inputs of the last half of the model's
  contractions, two at least, averaged over positions. mean_c is the mean of h over the class, sd
  each channel's deviation plus 0.05 of that of all values. Judges are learned likewise, each from
  the means over a cluster of its class's examples. Clusters are those of k-means in the last array.

  Without data (`batches=None`, `shape=...`) codes are recalled:

      minimise cross-entropy (labels smoothed by 0.1)
        + 5 mean over BatchNorm layers of mean over channels of
            (m - M)^2 / (V + 1e-4) + (sd(v) / sd(V) - 1)^2,         sd(v) = sqrt(v + 1e-6)

  with m, v the statistics of all codes together, or of batches of at most 256 where they do not
  all fit in memory, and M, V the running ones. Without `statistics_fn` there is no such term.

  Guarantees:
    The same key gives the same codes. Whatever the devices and processes, class means agree to
    1e-5, the examples that judges stand for are the same, and the loss agrees to 1 %. Memory is
    bounded: sums, and 1,000 vectors a class. Nothing of the data is kept but what codes and judges
    hold, and each judge stands for `min_members` examples at least.

  Edge cases:
    a class of fewer than `min_members` examples has no judge, and a warning says so. The judges of
      a class stand for at most 1,000 of its examples, and match as many of the last arrays as that
      many vectors of all classes take 2 GiB for, one at least.
    codes are not clipped to `input_range`. Masked rows count nowhere.

  Args:
    key: one typed key.
    logits_fn: pure function (params, inputs) -> (N, C) logits, in evaluation mode.
    params: a tree of floating arrays: the kernels whose inputs are matched.
    batches: yields (inputs, labels) or (inputs, labels, mask) once: inputs (N, *shape), floating,
      as the model sees them; labels (N,), integers in [0, C). None: no data. On several processes
      they are arrays over all of them, as params are, and every process gets all codes.
    num_classes: C, at least 2.
    per_class: K, codes a class. None: 1 with data, 8 without.
    recall: R, how many codes a class to recall beside.
    shape: the shape of one input; needed without data.
    input_range: (low, high), where codes start, scalars or arrays that broadcast to `shape`. None:
      that of the data for each channel (last axis), or (0, 1) without data.
    features_fn: (params, inputs) -> {name: (N, ..., F)}, matched in place of the contractions'
      inputs; judges are clusters in the last of them.
    statistics_fn: (params, inputs) -> {name: (values (N, ..., F), mean (F,), variance (F,))}, what
      each BatchNorm reads and its running statistics: `Model.statistics_fn(state)`. Only recalled
      codes need it.
    num_judges: J, at most, a class; a class of n examples has min(J, n // min_members).
    min_members: how many examples a judge stands for at least.
    steps, recall_steps: of Adam, for learned and for recalled codes.
    learning_rate: Adam's, as a share of `input_range`; it falls along a cosine.
    precision: matmul precision, as `jax.default_matmul_precision` takes it.
    execution: `microbatch`, how many codes at a time. None: as many as fit in memory, which must be
      the same on all processes.
    progress: called with (steps done, of).

  Returns:
    `LearnedCodes`, in the dtype of the inputs.

  Raises:
    TypeError, ValueError: arguments of the wrong kind, shape or range; a class without examples; a
      model in training mode, or in which no contraction is found; NaN or inf anywhere.

  >>> inputs, labels = jnp.array([[1.0, 0.0], [0.0, 1.0]] * 60), jnp.array([0, 1] * 60)
  >>> found = learn_codes(
  ...   jax.random.key(0), lambda w, x: x @ w, jnp.eye(2), [(inputs, labels)], num_classes=2)
  >>> found.codes.shape, found.judges.shape, found.judge_weights[:, 0]
  ((2, 1, 2), (2, 8, 2), Array([1., 1.], dtype=float32))
  >>> bool(jnp.allclose(found.codes[0, 0], jnp.array([1.0, 0.0]), atol=0.05))
  True
  """
  _checks.require_key(key)
  checks.require_functions(logits_fn, features_fn, statistics_fn)
  if per_class is None:
    per_class = RECALLED if batches is None else 1
  settings = Settings(
    num_classes, per_class, recall, num_judges, min_members, steps, recall_steps, learning_rate
  )
  shape = checks.require_source(batches, shape, features_fn)
  if input_range is not None:
    checks.require_range(input_range, shape)
  microbatch = require_execution(execution).microbatch
  if progress is not None:
    _checks.require_callable("progress", progress, "(done, of)")
  checks.require_params(params)
  functions, arrays = reads.split(
    logits_fn, features_fn, statistics_fn, params, settings.num_classes, precision
  )
  learner = Learner(key, settings, functions, arrays, input_range, microbatch, progress)
  if batches is None:
    assert shape is not None
    return learner.recalled(shape)
  return learner.learned(batches, shape)
