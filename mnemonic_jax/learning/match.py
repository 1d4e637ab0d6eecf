"""Learn inputs whose reads are given vectors, by Adam, some inputs at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mnemonic_jax.fisher import loss_checks
from mnemonic_jax.learning import reads
from mnemonic_jax.learning.reads import Arrays, Functions

_CHECK_EVERY = 50  # steps, after which the loss must be finite


class Targets(NamedTuple):
  """What the reads of N inputs shall be, for each array that is matched."""

  vectors: list[Any]  # (N, F)
  deviations: list[Any]  # (F,), in units of which differences count
  counts: list[Any]  # (N,) float32, 0 where an input is not matched to this array


class State(NamedTuple):
  """Inputs that are learned, and what Adam knows of them."""

  inputs: jax.Array  # (N, *shape)
  adam: optax.ScaleByAdamState


class Rate(NamedTuple):
  """How far Adam moves: a share of the range of the inputs, which falls along a cosine."""

  share: float
  width: Any  # broadcasts to the shape of an input
  steps: int

  def at(self, step: int) -> np.float32:
    """The share of step 0, 1, ..."""
    return np.float32(self.share * 0.5 * (1 + np.cos(np.pi * step / self.steps)))


def start(functions: Functions, inputs: np.ndarray) -> State:
  """The state before the first step, where the params lie; on a mesh each device has its part."""
  none: Any = reads.placed(functions.placement, np.zeros((), np.int32))
  dealt = lambda array: reads.dealt(functions.placement, array)
  moments: Any = dealt(np.zeros_like(inputs)), dealt(np.zeros_like(inputs))
  return State(dealt(inputs), optax.ScaleByAdamState(none, *moments))


def moved(
  functions: Functions, state: State, gradient: jax.Array, rate: Any, width: jax.Array
) -> State:
  """Do one step of Adam (Kingma and Ba, 2015)."""
  update: Any
  adam: Any
  update, adam = optax.scale_by_adam().update(gradient, state.adam)
  return kept(functions, State(state.inputs - rate * width * update, adam))


def kept(functions: Functions, state: State) -> State:
  """The state, which stays as `start` has dealt it."""
  spread = lambda x: reads.spread_over(functions.placement, x)
  adam = state.adam._replace(mu=spread(state.adam.mu), nu=spread(state.adam.nu))
  return State(spread(state.inputs), adam)


def match(
  functions: Functions,
  arrays: Arrays,
  inputs: np.ndarray,
  targets: Targets,
  rate: Rate,
  dtype: Any,
  at_once: int,
  tick: Callable[[], None],
) -> np.ndarray:
  """Learn inputs (N, *shape) from their start, `at_once` at a time; the same program each time.

  `tick` is called after each step.
  """
  made = []
  put = partial(reads.placed, functions.placement)
  width = put(rate.width)
  for rows in parts(functions, len(inputs), at_once):
    some = put(
      targets._replace(
        vectors=[x[rows] for x in targets.vectors], counts=[x[rows] for x in targets.counts]
      )
    )
    state = start(functions, inputs[rows])
    for step in range(rate.steps):
      state, losses = step_program(functions, dtype, arrays, state, some, rate.at(step), width)
      check(functions, losses, step, rate)
      tick()
    made.append(reads.on_host(functions.placement, state.inputs))
  return np.concatenate(made)[: len(inputs)]


def parts(functions: Functions, count: int, at_once: int) -> np.ndarray:
  """Deal `count` rows into parts of equal size, the last filled up with the last row.

  On a mesh each device has its share of a part.
  """
  number = -(-count // at_once)
  size = reads.rows_of_all(functions.placement, -(-count // number))
  return np.minimum(np.arange(number * size), count - 1).reshape(number, size)


def check(functions: Functions, losses: Any, step: int, rate: Rate) -> None:
  """Refuse to go on from a loss that is NaN or inf; looked at now and then, and at the end.

  On a mesh each step is waited for: of many that run at once, collectives can wait for each other
  for ever (seen with two processes on CPUs).
  """
  if functions.placement.spread is not None:
    jax.block_until_ready(losses)
  if step % _CHECK_EVERY and step + 1 < rate.steps:
    return
  if not np.all(np.isfinite(np.asarray(losses))):
    raise ValueError(
      f"learn_codes: the loss became NaN or inf at step {step + 1}; expected finite losses. Pass a "
      "smaller learning_rate, an input_range that the model knows, or check the params."
    )


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def step_program(
  functions: Functions,
  dtype: Any,
  arrays: Arrays,
  state: State,
  targets: Targets,
  rate: jax.Array,
  width: jax.Array,
) -> tuple[State, jax.Array]:
  """One step for all inputs; and the loss of each before it."""

  def total(inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    inputs = reads.spread_over(functions.placement, inputs)
    found, _ = reads.reads_of(functions, arrays, inputs.astype(dtype))
    losses = distances(found, targets)
    return jnp.sum(losses), losses

  with loss_checks.matmul_precision(functions.precision):
    gradient, losses = jax.grad(total, has_aux=True)(state.inputs)
  return moved(functions, state, gradient, rate, width), reads.copied(functions.placement, losses)


def distances(found: list[jax.Array], targets: Targets) -> jax.Array:
  """The loss of each input: the mean of ((read - target) / deviation)^2, summed over arrays."""
  losses = [
    count * jnp.mean(jnp.square((x - vector) / deviation), axis=-1)
    for x, vector, deviation, count in zip(found, *targets, strict=True)
  ]
  return sum(losses[1:], losses[0])
