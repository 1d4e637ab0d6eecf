"""What a rival is, and what it is given.

A rival is a pure pair

    prepare(request) -> state                               before it is known which class goes
    forget(request, state, classes, strength) -> params     after

with what it declares of itself. `Rival` runs both, and refuses what does not fit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mnemonic_jax import _checks, _trees
from mnemonic_jax.rivals.request import FORGOTTEN, KEPT, NOTHING, Request

PyTree = Any


class Reads(NamedTuple):
  """Which examples a rival reads: "kept", "forgotten", "all" or "nothing"."""

  forget: str  # at the request
  times: str = ""  # how often then, in words
  prepare: str = NOTHING  # before, once
  optional: bool = False  # whether `forget` can do without


class State(NamedTuple):
  """What a rival has prepared for one model."""

  rival: str
  layout: tuple[Any, ...]  # of the model's params
  value: PyTree


@dataclasses.dataclass(frozen=True)
class Rival:
  """A rival way to forget.

  Attributes:
    name: as commands and tables have it.
    source: the paper it is from.
    reads: which data it touches, and how often.
    strengths: what a search tries, at most 8, from the weakest to the strongest.
    forget_fn: (request, prepared value, classes, strength) -> params.
    prepare_fn: (request) -> what may be computed before a request, from all examples.
    trains: whether it takes steps of SGD, in training mode where the request has one.
    reconstruction: whether it is built from memory of the paper, or simplified.
    default: the strength of the paper, None where it names none.
  """

  name: str
  source: str
  reads: Reads
  strengths: tuple[Any, ...]
  forget_fn: Callable[[Request, Any, tuple[int, ...], Any], PyTree]
  prepare_fn: Callable[[Request], PyTree] | None = None
  trains: bool = False
  reconstruction: bool = False
  default: Any = None

  def prepare(self, request: Request) -> State:
    """Compute what needs no class to be known.

    Raises:
      NotApplicable: the rival needs what the request does not have.
    """
    value = self.prepare_fn(request) if self.prepare_fn else None
    return State(self.name, layout(request.params), value)

  def forget(self, request: Request, state: State, classes: Iterable[int], strength: Any) -> PyTree:
    """Forget classes.

    Guarantees:
      The params returned have the structure, shapes and dtypes of `request.params`, which are not
      modified. The same arguments give the same params.

    Args:
      state: what `prepare` returned for this model.
      classes: those of `request.forgotten`.
      strength: one of `strengths`, or any value of their kind.

    Raises:
      NotApplicable: the rival cannot forget in this model, or needs data that are not given.
      ValueError: a state of another rival or model, examples on the wrong side.
    """
    classes = _checks.require_classes("classes", classes, request.num_classes)
    if (state.rival, state.layout) != (self.name, layout(request.params)):
      raise ValueError(
        f"state: got one of {state.rival} for params {state.layout}; expected the result of "
        f"{self.name}'s prepare for this model."
      )
    _require_sides(request, classes)
    if not self.reads.optional and self.reads.forget != NOTHING:
      request.side(self.reads.forget)
    params = self.forget_fn(request, state.value, classes, strength)
    if layout(params) != layout(request.params):
      raise ValueError(
        f"{self.name}: made params {layout(params)}; expected {layout(request.params)}."
      )
    return params

  def training_mode(self, request: Request) -> bool | None:
    """Tell whether it trains in training mode; None where it does not train."""
    return (request.train_fn is not None) if self.trains else None


def layout(tree: PyTree) -> tuple[Any, ...]:
  """What params of one model have in common: structure, shapes and dtypes."""
  leaves, treedef = _trees.flatten(tree)
  return str(treedef), tuple((jnp.shape(x), jnp.result_type(x).name) for x in leaves)


def _require_sides(request: Request, classes: tuple[int, ...]) -> None:
  for name, wanted in ((FORGOTTEN, True), (KEPT, False)):
    examples = getattr(request, name)
    if examples is None:
      continue
    wrong = np.unique(examples.labels[np.isin(examples.labels, classes) != wanted])
    if len(wrong):
      raise ValueError(
        f"{name}: holds examples of classes {wrong.tolist()} when {list(classes)} are to be "
        "forgotten; expected each example on its own side."
      )
