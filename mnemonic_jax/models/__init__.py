"""Models: Flax NNX modules, turned at once into plain dict params and pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from mnemonic_jax.models.mlp import MLP

PyTree = Any


class Model(NamedTuple):
  """A model as pure functions on nested dicts of arrays.

  Attributes:
    init: key -> (params, model_state); params may be perturbed, model_state holds the rest (running statistics).
    apply: (params, model_state, inputs, train) -> (logits, model_state).
    features: (params, model_state, inputs) -> (N, F), what the last layer sees, in evaluation mode.
    head: keys of the last layer in params.
  """

  init: Callable[[jax.Array], tuple[PyTree, PyTree]]
  apply: Callable[[PyTree, PyTree, jax.Array, bool], tuple[jax.Array, PyTree]]
  features: Callable[[PyTree, PyTree, jax.Array], jax.Array]
  head: tuple[str, ...]

  def logits_fn(self, model_state: PyTree) -> Callable[[PyTree, jax.Array], jax.Array]:
    """(params, inputs) -> logits in evaluation mode, as the core takes it."""
    return lambda params, inputs: self.apply(params, model_state, inputs, False)[0]


def make(name: str, *, shape: Sequence[int], num_classes: int, hidden: int) -> Model:
  """Make the model `name` for inputs of `shape`.

  >>> params, _ = make("mlp", shape=(8, 8, 1), num_classes=10, hidden=16).init(jax.random.key(0))
  >>> jax.tree.map(lambda leaf: leaf.shape, params)
  {'hidden': {'bias': (16,), 'kernel': (64, 16)}, 'output': {'bias': (10,), 'kernel': (16, 10)}}
  """
  makers = {"mlp": lambda rngs: MLP(int(np.prod(shape)), hidden, num_classes, rngs=rngs)}
  return functional(makers[name], head=("output",))


def functional(make_module: Callable[[nnx.Rngs], Any], head: tuple[str, ...]) -> Model:
  """Turn an NNX module with methods `features` and `__call__` into a `Model`."""
  graph, *shapes = _split(nnx.eval_shape(lambda: make_module(nnx.Rngs(0))))

  def init(key: jax.Array) -> tuple[PyTree, PyTree]:
    _, params, model_state = _split(make_module(nnx.Rngs(key)))
    return nnx.to_pure_dict(params), nnx.to_pure_dict(model_state)

  def bound(params: PyTree, model_state: PyTree, train: bool) -> Any:
    states = [jax.tree.map(lambda x: x, shape) for shape in shapes]
    for state, values in zip(states, (params, model_state), strict=True):
      nnx.replace_by_pure_dict(state, values)
    module = nnx.merge(graph, *states)
    if train:
      module.train()
    else:
      module.eval()
    return module

  def apply(params: PyTree, model_state: PyTree, inputs: jax.Array, train: bool) -> tuple[jax.Array, PyTree]:
    module = bound(params, model_state, train)
    logits = module(inputs)
    return logits, nnx.to_pure_dict(_split(module)[2])

  def features(params: PyTree, model_state: PyTree, inputs: jax.Array) -> jax.Array:
    return bound(params, model_state, False).features(inputs)

  return Model(init, apply, features, head)


def _split(module: Any) -> tuple[Any, Any, Any]:
  """Graph, params, and all other state of an NNX module."""
  parts: Any = nnx.split(module, nnx.Param, ...)
  return parts
