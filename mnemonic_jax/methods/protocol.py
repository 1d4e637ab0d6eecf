"""What a forgetting method is: a frozen pytree of its own numbers with one way to be run.

A method has either

    step(problem) -> (params, info)

or, if it takes many steps from Python,

    steps                                    how many there are, an int
    init(problem) -> state                   a pytree of arrays with the field `done`, () int32
    advance(problem, state) -> state         one step, which the caller jits
    finish(problem, state) -> (params, info)

A method may have both: it takes many steps if its `steps` is not 0. If it also searches, it has

    resolved(problem) -> (method, info)      the method with the numbers found, before `init`

`problem` is a `mnemonic_jax.methods.problem.Problem`. `params` have the structure, shapes and
dtypes of `problem.params`: a method changes weights only. `info` is a dict of arrays that the
method says of itself. Its key "method", if there is one, holds the method with the numbers that a
search has chosen. A method that searches names the settings to search as `to_search`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np

from mnemonic_jax import _checks
from mnemonic_jax.methods.problem import Problem

PyTree = Any
Info = dict[str, Any]
_Class = TypeVar("_Class", bound=type)


@runtime_checkable
class OneShot(Protocol):
  """A method that is one pure function of the problem; `jit` and `vmap` work over it."""

  def step(self, problem: Problem) -> tuple[PyTree, Info]:
    """Forget."""


@runtime_checkable
class Stepwise(Protocol):
  """A method that takes many steps from Python."""

  steps: int

  def init(self, problem: Problem) -> Any:
    """Make the state before the first step."""

  def advance(self, problem: Problem, state: Any) -> Any:
    """Do one step."""

  def finish(self, problem: Problem, state: Any) -> tuple[PyTree, Info]:
    """Read the forgotten params from the last state."""


Method = OneShot | Stepwise


def method(cls: _Class) -> _Class:
  """Make a frozen dataclass of settings into a pytree, as a method must be.

  Fields are leaves, which `jit` traces, but for those with `metadata={"static": True}`. A
  `__post_init__` runs when a method is made, not when JAX rebuilds one.

  >>> @method
  ... @dataclasses.dataclass(frozen=True)
  ... class Toy:
  ...   strength: float
  ...   depth: int = dataclasses.field(default=1, metadata={"static": True})
  >>> jax.tree.leaves(Toy(0.5))
  [0.5]
  """
  fields = dataclasses.fields(cls)
  static = tuple(field.name for field in fields if field.metadata.get("static"))
  numbers = tuple(field.name for field in fields if field.name not in static)

  def flatten(self: Any) -> tuple[Any, Any]:
    children = tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in numbers)
    return children, tuple(getattr(self, name) for name in static)

  def unflatten(settings: Any, children: Any) -> Any:
    made: Any = object.__new__(cls)
    for name, value in zip((*numbers, *static), (*children, *settings), strict=True):
      object.__setattr__(made, name, value)
    return made

  jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
  return cls


def settings(method: Any) -> dict[str, Any]:
  """The fields of a method as plain values that JSON has, `{"lambda1": 0.001, ...}`.

  Fields with `metadata={"recorded": False}`, weights and functions, are left out.
  """
  plain = lambda value: np.asarray(value).tolist() if _is_number(value) else value
  recorded = (f.name for f in dataclasses.fields(method) if f.metadata.get("recorded", True))
  return {name: plain(getattr(method, name)) for name in recorded}


def name_of(method: Any) -> str:
  """Name a method, or its class, as commands and records do: `drop_row` for `DropRow`."""
  name = (method if isinstance(method, type) else type(method)).__name__
  return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


def require_method(method: Any, *, one_shot: bool = False) -> None:
  """Refuse what is no method, or, for `one_shot`, one that takes many steps from Python."""
  if isinstance(method, type) or not isinstance(method, (OneShot, Stepwise)):
    raise TypeError(
      f"method: got {_checks.kind(method)}; expected a method, such as "
      "mnemonic_jax.Perturbation(lambda1=1e-3, lambda2=10.0)."
    )
  if one_shot and (steps := steps_of(method)):
    raise ValueError(
      f"method: {type(method).__name__} takes {steps} steps from Python; expected a method "
      "that can be traced. Call mnemonic_jax.forget."
    )
  if one_shot and (names := getattr(method, "to_search", ())):
    raise ValueError(
      f"method: {type(method).__name__} has {', '.join(names)} to search; expected all settings. "
      "Call mnemonic_jax.forget, whose result.method has them."
    )


def steps_of(method: Any) -> int:
  """How many steps from Python a method takes; 0 if it is one pure function."""
  return int(getattr(method, "steps", 0))


def _is_number(value: Any) -> bool:
  return hasattr(value, "dtype") or isinstance(value, (int, float))
