"""Recall inputs of each class from the model alone, by what it answers and what BatchNorm keeps.

The idea of inverting a network by its BatchNorm statistics is that of Yin et al. (2020),
DeepInversion.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mnemonic_jax import _mesh, _trees
from mnemonic_jax.fisher import loss_checks
from mnemonic_jax.learning import match, reads
from mnemonic_jax.learning.match import Rate, State
from mnemonic_jax.learning.reads import Arrays, Functions

_SMOOTHING = 0.1
_STATISTICS = 5.0  # weight of the statistics' distance
_MEAN_FLOOR, _DEVIATION_FLOOR = 1e-4, 1e-6  # added to variances
# Inputs a step where not all fit in memory.
AT_ONCE = 256


def recall(
  functions: Functions,
  arrays: Arrays,
  inputs: np.ndarray,
  labels: np.ndarray,
  rate: Rate,
  dtype: Any,
  at_once: int,
  rng: np.random.Generator,
  tick: Callable[[], None],
) -> np.ndarray:
  """Recall inputs (N, *shape) of the classes `labels` (N,), from their start.

  Statistics are those of all inputs, or of batches of `at_once`, drawn anew for each round over
  them. `tick` is called after each step.
  """
  state, width = match.start(functions, inputs), reads.placed(functions.placement, rate.width)
  whole = len(inputs) <= at_once
  for step in range(rate.steps if whole else 0):
    state, loss = step_program(functions, dtype, arrays, state, labels, rate.at(step), width)
    match.check(functions, loss, step, rate)
    tick()
  for step in range(0 if whole else rate.steps):
    for rows in drawn(labels, at_once, rng, functions.placement):
      state, loss = step_of_some_program(
        functions, dtype, arrays, state, rows, labels[rows], step, rate.at(step), width
      )
      match.check(functions, loss, step, rate)
      tick()
  return reads.on_host(functions.placement, state.inputs)


def steps_a_round(num_inputs: int, at_once: int) -> int:
  """How many batches a round over all inputs has."""
  return -(-num_inputs // at_once)


def drawn(
  labels: np.ndarray,
  at_once: int,
  rng: np.random.Generator,
  placement: _mesh.Placement = _mesh.NOWHERE,
) -> np.ndarray:
  """Deal all inputs into batches (number, size) in which each class has its share.

  Where they do not divide, the last batches are filled up from the first. On a mesh each device has
  its share of a batch.
  """
  number = steps_a_round(len(labels), at_once)
  size = min(len(labels), reads.rows_of_all(placement, -(-len(labels) // number)))
  order = rng.permutation(len(labels))
  rank = np.empty(len(labels), np.int64)  # of an input among those of its class
  for label in np.unique(labels):
    rows = order[labels[order] == label]
    rank[rows] = np.arange(len(rows))
  order = order[np.argsort(rank[order], kind="stable")]
  return np.resize(order, (number, size))


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def step_program(
  functions: Functions, dtype: Any, arrays: Arrays, state: State, labels: Any, rate: Any, width: Any
) -> tuple[State, jax.Array]:
  """One step for all inputs; and the loss before it."""
  of_inputs = lambda inputs: loss_of(functions, arrays, inputs.astype(dtype), labels)
  loss, gradient = jax.value_and_grad(of_inputs)(state.inputs)
  return match.moved(functions, state, gradient, rate, width), loss


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def step_of_some_program(
  functions: Functions,
  dtype: Any,
  arrays: Arrays,
  state: State,
  rows: Any,
  labels: Any,
  step: Any,
  rate: Any,
  width: Any,
) -> tuple[State, jax.Array]:
  """A step for some inputs, which Adam has moved `step` times."""
  adam = optax.ScaleByAdamState(
    jnp.asarray(step, jnp.int32), state.adam.mu[rows], state.adam.nu[rows]
  )
  before = match.kept(functions, State(state.inputs[rows], adam))
  some, loss = step_program(functions, dtype, arrays, before, labels, rate, width)
  put = lambda whole, part: whole.at[rows].set(part)
  adam = state.adam._replace(
    mu=put(state.adam.mu, some.adam.mu), nu=put(state.adam.nu, some.adam.nu)
  )
  return match.kept(functions, State(put(state.inputs, some.inputs), adam)), loss


def loss_of(
  functions: Functions, arrays: Arrays, inputs: jax.Array, labels: jax.Array
) -> jax.Array:
  """Smoothed cross-entropy, and how far statistics are from those that BatchNorm keeps."""
  inputs = reads.spread_over(functions.placement, inputs)
  with loss_checks.matmul_precision(functions.precision):
    logits = reads.logits_of(functions, arrays, inputs)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), _SMOOTHING)
    loss = jnp.mean(optax.softmax_cross_entropy(logits, targets.astype(logits.dtype)))
    if functions.statistics is None:
      return loss
    named = functions.statistics(arrays.statistics)(arrays.params, inputs)
  return loss + _STATISTICS * statistics_distance(named)


def statistics_distance(named: dict[str, Any]) -> jax.Array:
  """The mean over layers of how far the batch's mean and deviation are from the running ones.

      mean over channels of (m - M)^2 / (V + 1e-4) + (sd(v) / sd(V) - 1)^2,   sd(x) = sqrt(x + 1e-6)

  with m, v the mean and variance of `values` over all axes but channels, M, V the running ones.

  >>> values, ones = jnp.array([[0.0], [2.0]]), jnp.ones(1)
  >>> float(statistics_distance({"norm": (values, ones, ones)}))
  0.0
  """
  layers = []
  for values, mean, variance in named.values():
    values = values.astype(_trees.at_least_float32(values.dtype))
    values = values.reshape(-1, values.shape[-1])
    own = jnp.var(values, axis=0)
    of_mean = jnp.square(jnp.mean(values, axis=0) - mean) / (variance + _MEAN_FLOOR)
    deviations = jnp.sqrt(own + _DEVIATION_FLOOR), jnp.sqrt(variance + _DEVIATION_FLOOR)
    layers.append(jnp.mean(of_mean + jnp.square(deviations[0] / deviations[1] - 1)))
  return jnp.mean(jnp.stack(layers))
