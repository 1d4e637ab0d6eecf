"""Distil the model as it was into edited weights, on recalled codes of the kept classes.

What the kept classes need comes back; what was cut out does not, since no input of the forgotten
classes is shown. Nothing is read but codes, and what the caller passes as `kept`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax import _checks, _trees
from mnemonic_jax.fisher import loss_checks
from mnemonic_jax.learning import reads
from mnemonic_jax.methods.problem import Problem

PyTree = Any

# (params, statistics, inputs) -> (loss, statistics)
Loss = Callable[[PyTree, PyTree, jax.Array], tuple[jax.Array, PyTree]]

BATCH = 128
_PICTURE = 3  # axes of an input that can be flipped and shifted: height, width, channels


class State(NamedTuple):
  """Weights that are trained: those of the leaves that may change, float32 at least."""

  done: jax.Array  # () int32, steps
  leaves: list[jax.Array]
  optimizer: PyTree
  trained: list[jax.Array]  # of each leaf, or of each of its layers: whether it moves, bool
  request: jax.Array  # (5,), tells requests apart
  statistics: PyTree = None  # of BatchNorm in training mode


def require_recalled(problem: Problem, per_class: int, what: str) -> jax.Array:
  """The recalled codes (C, R, *shape), or a ValueError with the call that makes enough of them."""
  codes = problem.recalled
  found = 0 if codes is None else codes.shape[1]
  if codes is None or found < per_class:
    raise ValueError(
      f"codes: got {found} recalled codes a class; {what} learns from {per_class} or more. Make "
      f"them: mnemonic_jax.learn_codes(..., recall={per_class}), or without data "
      f"learn_codes(key, logits_fn, params, None, shape=..., per_class={per_class})."
    )
  if _checks.is_concrete(problem.remain) and np.sum(problem.remain) == 1:
    raise ValueError(
      f"classes: one class is kept, so {what} has nothing to learn: its logit has none beside it. "
      "Expected two kept classes. Use mnemonic_jax.Projection() without heal."
    )
  return codes


def batch(problem: Problem, codes: jax.Array, key: jax.Array, step: Any, shift: int) -> jax.Array:
  """Draw inputs (128, *shape) of kept classes.

  Half of them are kept examples, where there are any. Pictures are flipped with probability 1/2 and
  shifted by up to 1/`shift` of their side; every second batch is mixed in pairs.
  """
  of_class, of_code, of_kept, flip, move, share = jax.random.split(key, 6)
  nth = jax.random.randint(of_class, (BATCH,), 0, jnp.sum(problem.remain))
  label = jnp.searchsorted(jnp.cumsum(problem.remain), nth, side="right")
  inputs = codes[label, jax.random.randint(of_code, (BATCH,), 0, codes.shape[1])]
  if problem.kept is not None:
    rows = jax.random.randint(of_kept, (BATCH // 2,), 0, len(problem.kept))
    inputs = inputs.at[: BATCH // 2].set(problem.kept[rows].astype(inputs.dtype))
  if inputs.ndim == 1 + _PICTURE:
    chosen = jax.random.bernoulli(flip, 0.5, (BATCH, 1, 1, 1))
    inputs = _shifted(jnp.where(chosen, inputs[:, :, ::-1], inputs), move, shift)
  shares = jax.random.uniform(share, (BATCH, *[1] * (inputs.ndim - 1)), inputs.dtype)
  mixed = shares * inputs + (1 - shares) * inputs[::-1]
  return jnp.where(step % 2 == 1, mixed, inputs)


def _shifted(pictures: jax.Array, key: jax.Array, share: int) -> jax.Array:
  """Shift all pictures (N, H, W, channels) together; zeros come in."""
  sizes = pictures.shape[1:3]
  margins = [size // share for size in sizes]
  padded = jnp.pad(pictures, [(0, 0), *((m, m) for m in margins), (0, 0)])
  limits = jnp.asarray([0, *(2 * m + 1 for m in margins), 0])
  start = jax.random.randint(key, (4,), 0, jnp.maximum(limits, 1))
  return jax.lax.dynamic_slice(padded, list(start), pictures.shape)


def divergence(teacher: jax.Array, student: jax.Array, remain: jax.Array) -> jax.Array:
  """The mean KL divergence of two models' logits (N, C) over the kept classes.

  >>> kept = jnp.array([True, True, False])
  >>> float(divergence(jnp.array([[1.0, 2.0, 9.0]]), jnp.array([[2.0, 3.0, 0.0]]), kept))
  0.0
  """
  kept = lambda logits: jnp.where(remain, logits, -jnp.inf)
  wanted, found = jax.nn.log_softmax(kept(teacher)), jax.nn.log_softmax(kept(student))
  difference = jnp.where(remain, wanted - found, 0)
  return jnp.mean(jnp.sum(jnp.exp(wanted) * difference, -1))


def logits_of(problem: Problem, params: PyTree, inputs: jax.Array) -> jax.Array:
  """The logits of a batch under any params, float32 at least."""
  logits = problem.request.function(problem.constants)(params, inputs)
  return logits.astype(_trees.at_least_float32(logits.dtype))


def start(
  problem: Problem,
  params: PyTree,
  trained: list[jax.Array],
  optimizer: Any,
  request: jax.Array,
  statistics: Any = None,
) -> State:
  """The state before the first step; `trained` has an entry for each leaf."""
  mask = problem.request.mask
  leaves, trained = _chosen(jax.tree.leaves(params), mask), _chosen(trained, mask)
  wide = [x.astype(_trees.at_least_float32(x.dtype)) for x in leaves]
  return State(jnp.int32(0), wide, optimizer.init(wide), trained, request, statistics)


def identity(problem: Problem, settings: Any, *more: PyTree) -> jax.Array:
  """Numbers (5,) that tell requests apart: settings, params, codes and classes."""
  number = float(zlib.crc32(repr(settings).encode()) % 2**20)
  return _identity(problem, jnp.float32(number), more)


@jax.jit
def _identity(problem: Problem, settings: jax.Array, more: PyTree) -> jax.Array:
  size = lambda tree: sum(
    (jnp.sum(jnp.abs(x), dtype=jnp.float32) for x in jax.tree.leaves(tree)), jnp.float32(0)
  )
  places = jnp.arange(1, len(problem.forget) + 1)
  sides = jnp.sum(places * problem.forget), jnp.sum(places**2 * problem.remain)
  sizes = size((problem.params, more)), size((problem.recalled, problem.kept))
  return jnp.stack([settings, *sizes, *(jnp.asarray(x, jnp.float32) for x in sides)])


def same(one: Any, other: Any) -> bool:
  """Whether two requests are one, up to rounding on other devices."""
  return bool(jnp.allclose(jnp.asarray(one), other, rtol=1e-5))


def _chosen(leaves: list[Any], mask: tuple[bool, ...]) -> list[Any]:
  return [leaf for leaf, may_change in zip(leaves, mask, strict=True) if may_change]


def advanced(problem: Problem, state: State, loss: Loss, optimizer: Any, shift: int) -> State:
  """Do one step of training.

  Args:
    loss: (params, statistics, inputs) -> (a scalar, statistics).
    optimizer: of optax.
    shift: see `batch`.
  """
  codes = problem.recalled
  assert codes is not None
  key = jax.random.fold_in(jax.random.key(0), state.done)
  inputs = batch(problem, codes, key, state.done, shift)
  inputs = reads.spread_over(problem.request.placement, inputs)
  of_leaves = lambda leaves: loss(whole(problem, leaves), state.statistics, inputs)
  with loss_checks.matmul_precision(problem.request.precision):
    gradient, statistics = jax.grad(of_leaves, has_aux=True)(state.leaves)
  moving = lambda xs: [jnp.where(m, x, 0) for x, m in zip(xs, state.trained, strict=True)]
  updates, optimizer_state = optimizer.update(moving(gradient), state.optimizer, state.leaves)
  leaves = [x + update for x, update in zip(state.leaves, moving(updates), strict=True)]
  done = state.done + 1
  return State(done, leaves, optimizer_state, state.trained, state.request, statistics)


def whole(problem: Problem, leaves: list[jax.Array]) -> PyTree:
  """Params with other values of the leaves that may change, in their dtypes."""
  new, (old, treedef) = iter(leaves), _trees.flatten(problem.params)
  pairs = zip(old, problem.request.mask, strict=True)
  return treedef.unflatten(
    [next(new).astype(leaf.dtype) if may_change else leaf for leaf, may_change in pairs]
  )
