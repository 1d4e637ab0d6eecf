"""What rivals ask of a model: its logits, its head, its program."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax import _functions, _mesh, _trees, losses
from mnemonic_jax._types import LogitsFn
from mnemonic_jax.fisher.plan import Plan
from mnemonic_jax.methods import head as heads
from mnemonic_jax.methods import network, problem
from mnemonic_jax.rivals.request import NotApplicable, Request

PyTree = Any


def chunks(size: int, *arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
  """Cut arrays (N, ...) into chunks of one size; the last one repeats its last row.

  Yields the chunks and a mask (size,), False for what was repeated.

  >>> [[part.tolist() for part in parts] for parts in chunks(2, np.arange(3))]
  [[[0, 1], [True, True]], [[2, 2], [True, False]]]
  """
  count = len(arrays[0])
  size = min(size, count)
  for start in range(0, count, size):
    rows = np.arange(start, start + size)
    yield (*(x[np.minimum(rows, count - 1)] for x in arrays), rows < count)


def logits(request: Request, params: PyTree, inputs: np.ndarray) -> np.ndarray:
  """Compute logits (N, C) in evaluation mode, a batch at a time."""
  static, constants = static_of(request)
  run = lambda x: problem.logits_program(static, len(x), constants, params, jnp.asarray(x))
  parts = [np.asarray(run(x))[mask] for x, mask in chunks(request.batch_size, inputs)]
  return np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class PerExampleLoss:
  """The cross-entropy of a model, as `mnemonic_jax.diagonal_fisher` takes a loss."""

  logits_fn: LogitsFn

  def __call__(self, params: PyTree, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the loss of each example."""
    return losses.softmax_cross_entropy(self.logits_fn(params, inputs), labels)


def static_of(request: Request) -> tuple[problem.Request, list[Any]]:
  """The static part of the model, as the library's programs take it, and its arrays."""
  function, constants = _functions.split(request.logits_fn)
  count = len(jax.tree.leaves(request.params))
  asked = problem.Request(
    function,
    request.num_classes,
    losses.softmax_cross_entropy,
    (True,) * count,
    (None,) * count,
    None,
    None,
    _mesh.NOWHERE,
  )
  return asked, constants


def plan_of(request: Request) -> Plan:
  """The plan of the logits of one example; nothing is computed."""
  static, constants = static_of(request)
  one = jax.ShapeDtypeStruct((1, *request.shape), jnp.float32)
  return problem.plan_of_logits(static.function, constants, request.params, one, static.mask)


def network_of(request: Request) -> network.Network:
  """The sites and the head of the model."""
  return network.of_plan(plan_of(request), request.params)


def head_of(request: Request) -> heads.Head:
  """The head, or `NotApplicable` with the reason why none is found."""
  found = network_of(request)
  if found.head is None:
    raise NotApplicable(f"the head of this model cannot be edited: {found.why}")
  return found.head


def replaced(request: Request, params: PyTree, new: dict[int, jax.Array]) -> PyTree:
  """Params with some leaves, by their index, in place of others; in their dtypes."""
  leaves = jax.tree.leaves(params)
  return _trees.like(
    request.params, [new.get(i, leaf).astype(leaf.dtype) for i, leaf in enumerate(leaves)]
  )


def masks(request: Request, classes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
  """The classes to forget and to keep, (C,) bool each."""
  forget = np.isin(np.arange(request.num_classes), classes)
  return jnp.asarray(forget), jnp.asarray(~forget)
