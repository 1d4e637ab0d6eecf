"""Stochastic gradient descent, for all rivals that train.

In training mode where the request has `train_fn` and `fold_fn`, else in evaluation mode.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mnemonic_jax import _functions, _trees, losses
from mnemonic_jax.methods.relearn import TrainFn
from mnemonic_jax.rivals.model import chunks
from mnemonic_jax.rivals.request import Examples, Request
from mnemonic_jax.training import epoch_rows

PyTree = Any
# (params, statistics, inputs) -> (logits, statistics)
Forward = Callable[[PyTree, PyTree, jax.Array], tuple[jax.Array, PyTree]]
# (forward, params, statistics, batch, extras) -> (a scalar, statistics)
Loss = Callable[[Forward, PyTree, PyTree, Any, Any], tuple[jax.Array, PyTree]]

MOMENTUM = optax.trace(0.9)


class State(NamedTuple):
  """Weights that are trained."""

  leaves: list[jax.Array]  # float32 at least
  optimizer: PyTree
  statistics: PyTree  # of BatchNorm in training mode
  steps: int = 0
  epochs: int = 0


@dataclasses.dataclass(frozen=True)
class Descent:
  """How a rival trains; hashable, so that equal ones share their compiled step.

  Attributes:
    loss: what is minimised, a function of a module.
    transform: of the gradient, before it is multiplied by the rate.
  """

  loss: Loss
  transform: Any = MOMENTUM


def begin(request: Request, params: PyTree = None, transform: Any = MOMENTUM) -> State:
  """The state before the first step, at the model as it is or at other params."""
  given = jax.tree.leaves(request.params if params is None else params)
  leaves = [jnp.asarray(x, _trees.at_least_float32(jnp.result_type(x))) for x in given]
  return State(leaves, transform.init(leaves), request.statistics)


def epoch(
  request: Request,
  descent: Descent,
  state: State,
  examples: tuple[Any, ...],
  rate: float | Callable[[int], Any],
  *,
  extras: PyTree = (),
  moves: list[Any] | None = None,
  train_fn: TrainFn | None = None,
) -> State:
  """Train for one pass over examples, in an order drawn anew.

  The rows that do not fill a batch sit the pass out, but there is one batch at least.

  Args:
    examples: arrays (N, ...); the loss is given their rows.
    rate: of the step, or a function of the number of the step.
    extras: what the loss is given beside the rows.
    moves: for each leaf, bools that broadcast to it: which weights are trained. None: all.
    train_fn: in place of the request's.
  """
  program = _Program(
    descent,
    _functions.split(request.logits_fn)[0],
    train_fn or request.train_fn,
    _trees.flatten(request.params)[1],
    tuple(jnp.result_type(x).name for x in jax.tree.leaves(request.params)),
  )
  arrays = _functions.split(request.logits_fn)[1]
  moves = [np.bool_(True)] * len(state.leaves) if moves is None else moves
  count = len(examples[0])
  order = epoch_rows(request.key, state.epochs, count, min(request.batch_size, count))
  for rows in np.asarray(order):
    batch = jax.tree.map(lambda x, rows=rows: x[rows], examples)
    now = jnp.float32(rate(state.steps) if callable(rate) else rate)
    leaves, optimizer, statistics = _step(
      program, arrays, state.leaves, state.optimizer, state.statistics, moves, batch, extras, now
    )
    state = State(leaves, optimizer, statistics, state.steps + 1, state.epochs)
  return state._replace(epochs=state.epochs + 1)


def steps_of(request: Request, count: int) -> int:
  """How many steps an epoch over `count` examples takes."""
  return count // min(request.batch_size, count)


def end(request: Request, state: State) -> PyTree:
  """The params, in their dtypes, with the statistics folded in."""
  dtypes = (jnp.result_type(x) for x in jax.tree.leaves(request.params))
  leaves = [x.astype(dtype) for x, dtype in zip(state.leaves, dtypes, strict=True)]
  params = _trees.like(request.params, leaves)
  return params if request.fold_fn is None else request.fold_fn(params, state.statistics)


def cross_entropy(
  forward: Forward, params: PyTree, statistics: PyTree, batch: Any, extras: Any
) -> tuple[jax.Array, PyTree]:
  """The mean cross-entropy of (inputs, labels)."""
  inputs, labels = batch
  logits, statistics = forward(params, statistics, inputs)
  return jnp.mean(losses.softmax_cross_entropy(logits, labels)), statistics


def fine_tuned(
  request: Request,
  descent: Descent,
  examples: tuple[Any, ...],
  rate: float,
  moves: list[Any] | None = None,
) -> PyTree:
  """Train the model as it is, for the request's epochs at one rate."""
  state = begin(request, transform=descent.transform)
  for _ in range(request.epochs):
    state = epoch(request, descent, state, examples, rate, moves=moves)
  return end(request, state)


def gradient(request: Request, examples: Examples) -> PyTree:
  """The gradient of the mean cross-entropy in evaluation mode, a tree like params."""
  static, arrays = _functions.split(request.logits_fn)
  total = None
  for inputs, labels, mask in chunks(request.batch_size, examples.inputs, examples.labels):
    part = _gradient(static, arrays, request.params, inputs, labels, mask)
    total = part if total is None else jax.tree.map(jnp.add, total, part)
  return jax.tree.map(lambda x: x / len(examples.labels), total)


@dataclasses.dataclass(frozen=True)
class _Program:
  """The static part of a step."""

  descent: Descent
  function: _functions.Static
  train_fn: TrainFn | None
  treedef: Any
  dtypes: tuple[str, ...]

  def forward(self, arrays: list[Any]) -> Forward:
    def in_evaluation(params: PyTree, statistics: PyTree, inputs: jax.Array) -> Any:
      return self.function(arrays)(params, inputs), statistics

    run = self.train_fn or in_evaluation

    def forward(params: PyTree, statistics: PyTree, inputs: jax.Array) -> Any:
      logits, statistics = run(params, statistics, inputs)
      return logits.astype(_trees.at_least_float32(logits.dtype)), statistics

    return forward

  def params(self, leaves: list[jax.Array]) -> PyTree:
    pairs = zip(leaves, self.dtypes, strict=True)
    return self.treedef.unflatten([leaf.astype(dtype) for leaf, dtype in pairs])


@partial(jax.jit, static_argnums=0)
def _step(
  program: _Program,
  arrays: list[Any],
  leaves: list[jax.Array],
  optimizer: PyTree,
  statistics: PyTree,
  moves: list[Any],
  batch: Any,
  extras: PyTree,
  rate: jax.Array,
) -> tuple[list[jax.Array], PyTree, PyTree]:
  loss, transform = program.descent.loss, program.descent.transform
  forward = program.forward(arrays)
  of_leaves = lambda xs: loss(forward, program.params(xs), statistics, batch, extras)
  found, statistics = jax.grad(of_leaves, has_aux=True)(leaves)
  moving = lambda xs: [jnp.where(m, x, 0) for x, m in zip(xs, moves, strict=True)]
  updates, optimizer = transform.update(moving(found), optimizer, leaves)
  leaves = [x - rate * update for x, update in zip(leaves, moving(updates), strict=True)]
  return leaves, optimizer, statistics


@partial(jax.jit, static_argnums=0)
def _gradient(
  static: Any, arrays: Any, params: PyTree, inputs: Any, labels: Any, mask: Any
) -> PyTree:
  def total(params: PyTree) -> jax.Array:
    each = losses.softmax_cross_entropy(static(arrays)(params, inputs), labels)
    return jnp.sum(jnp.where(mask, each, 0))

  return jax.grad(total)(params)
