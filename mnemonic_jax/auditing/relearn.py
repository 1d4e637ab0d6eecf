"""Relearn curves: how fast does fine-tuning bring the class back?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mnemonic_jax import _functions, losses
from mnemonic_jax._types import LogitsFn

PyTree = Any

STEPS = (1, 2, 5, 10, 20, 50)  # after which the model is scored
BATCH = 64
_OPTIMIZER = optax.chain(optax.clip_by_global_norm(2.0), optax.sgd(0.01, momentum=0.9))


def fine_tuned(
  logits_fn: LogitsFn,
  params: PyTree,
  batch_of: Callable[[int], tuple[Any, Any]],
  steps: Sequence[int] = STEPS,
) -> Iterator[tuple[int, PyTree]]:
  """Fine-tune a model, and give (step, params) after each of `steps`.

  SGD on the softmax cross-entropy, rate 0.01, momentum 0.9, gradient norm clipped at 2, through
  `logits_fn` as it is: in evaluation mode, so running statistics stay. One program serves all
  steps.

  Cost: max(steps) gradients of one batch, params three times in memory. Pitfalls: the curve depends
  on the rate and the batches, so only the same curve of Retrain says how fast is fast. Trained on
  the class, every model learns it sooner or later. A forgotten bias far below all logits hides the
  class from this attack though its features are there: drop the row instead
  (`mnemonic_jax.DropRow`).

  Args:
    logits_fn, params: the model.
    batch_of: step, from 0 -> (inputs, labels), always of one shape.
    steps: increasing.

  >>> batch = jnp.eye(2), jnp.array([0, 1])
  >>> curve = fine_tuned(lambda w, x: x @ w, jnp.zeros((2, 2)), lambda step: batch, (1, 2))
  >>> [(step, bool(w[0, 0] > w[0, 1])) for step, w in curve]
  [(1, True), (2, True)]
  """
  static, arrays = _functions.split(logits_fn)
  state = _OPTIMIZER.init(params)
  for done in range(1, max(steps) + 1):
    params, state = _step(static, arrays, params, state, *batch_of(done - 1))
    if done in steps:
      yield done, params


@partial(jax.jit, static_argnums=0)
def _step(
  static: Any, arrays: Any, params: PyTree, state: Any, inputs: Any, labels: Any
) -> tuple[PyTree, Any]:
  def loss(params: PyTree) -> jax.Array:
    logits = static(arrays)(params, inputs)
    return jnp.mean(losses.softmax_cross_entropy(logits, labels.astype(jnp.int32)))

  updates, state = _OPTIMIZER.update(jax.grad(loss)(params), state, params)
  return optax.apply_updates(params, updates), state


def batches_from(
  kept: tuple[Any, Any], shots: tuple[Any, Any] | None, seed: int, size: int = BATCH
) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
  """Make `batch_of` for `fine_tuned`: drawn with replacement, each from the number of its step.

  Args:
    kept: (inputs, labels) of kept classes.
    shots: those of the forgotten classes, half of every batch; None: kept examples alone.
    seed: of the draws.
    size: of a batch.

  >>> batch_of = batches_from((np.zeros(3), np.zeros(3, int)), (np.ones(2), np.ones(2, int)), 0)
  >>> batch_of(0)[1].sum(), len(batch_of(1)[1])
  (np.int64(32), 64)
  """
  parts = [(kept, size)] if shots is None else [(kept, size - size // 2), (shots, size // 2)]

  def batch_of(step: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng((seed, step))
    rows = [rng.integers(len(labels), size=count) for (_, labels), count in parts]
    pick = lambda i: np.concatenate(
      [part[i][own] for (part, _), own in zip(parts, rows, strict=True)]
    )
    return pick(0), pick(1)

  return batch_of
