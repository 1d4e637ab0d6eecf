"""Functions that carry arrays, taken apart so that `jit` sees the arrays as arguments.

A plain closure is a constant to `jit`: another closure over the same model compiles everything
again, and the compiled program keeps the closed-over arrays alive. A `Bound` function is a pytree
whose leaves are those arrays, so neither happens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

PyTree = Any


@jax.tree_util.register_pytree_node_class
class Bound:
  """A function with its first argument filled in: `Bound(f, state)(*args)` is `f(state, *args)`.

  Guarantees:
    Two are equal, and hash alike, where their functions are equal and their states hold the same
    array objects.

  >>> double = Bound(lambda factor, x: factor * x, 2.0)
  >>> double(3.0)
  6.0
  """

  def __init__(self, function: Callable[..., Any], state: PyTree) -> None:
    self.function, self.state = function, state

  def __call__(self, *args: Any) -> Any:
    return self.function(self.state, *args)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Bound) and self._identity() == other._identity()

  def __hash__(self) -> int:
    return hash(self._identity())

  def _identity(self) -> tuple[Any, ...]:
    leaves, treedef = jax.tree.flatten(self.state)
    return self.function, treedef, tuple(map(id, leaves))

  def tree_flatten(self) -> tuple[tuple[PyTree], Callable[..., Any]]:
    """The state as the only child."""
    return (self.state,), self.function

  @classmethod
  def tree_unflatten(cls, function: Callable[..., Any], children: tuple[PyTree]) -> Bound:
    """Rebuild with another state."""
    return cls(function, children[0])


@dataclasses.dataclass(frozen=True)
class Static:
  """The hashable part of a function; calling it with the arrays gives the function back."""

  whole: Callable[..., Any] | None = None  # a function that carries no arrays of its own
  treedef: Any = None  # of one that does

  def __call__(self, arrays: list[Any]) -> Callable[..., Any]:
    """Return the function that `split` took apart, with these arrays in it."""
    return self.whole if self.whole is not None else jax.tree.unflatten(self.treedef, arrays)


def split(function: Callable[..., Any]) -> tuple[Static, list[Any]]:
  """Take a function apart into what `jit` may hash and the arrays that it may trace.

  `Bound` and `jax.tree_util.Partial` give up their arrays. Any other function is static as a whole.

  >>> static, arrays = split(Bound(lambda factor, x: factor * x, 2.0))
  >>> arrays, static([5.0])(3.0)
  ([2.0], 15.0)
  """
  if isinstance(function, (Bound, jax.tree_util.Partial)):
    leaves: list[Any]
    leaves, treedef = jax.tree.flatten(function)
    if all(isinstance(leaf, (int, float)) or hasattr(leaf, "dtype") for leaf in leaves):
      return Static(treedef=treedef), leaves
  return Static(whole=function), []
