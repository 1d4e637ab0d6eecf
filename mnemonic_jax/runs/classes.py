"""Check the classes that a command or a config names, and turn names into indices."""

from __future__ import annotations

from collections.abc import Sequence

from mnemonic_jax.errors import MnemonicError, UsageError, nearest


def resolve(classes: Sequence[int | str], names: Sequence[str]) -> list[int]:
  """Return the indices of `classes`, each an index or the exact name of a class.

  A word that is the name of a class means that class, even where it looks like an index.

  Args:
    classes: integers are indices; words are names, or indices where no class is called so.
    names: the class names of the data set, in label order.

  Raises:
    UsageError: no class, an unknown one, a name that two classes have, or one class twice.

  >>> resolve(["dog", 0, "1"], ["cat", "bird", "dog"])
  [2, 0, 1]
  """
  if not classes:
    raise UsageError("classes: got none; expected at least one, for example --classes 0.")
  found = [_index(one, names) for one in classes]
  for position, index in enumerate(found):
    if index in found[:position]:
      asked = ", ".join(map(str, classes))
      raise UsageError(
        f"classes: got {asked}; class {index} ({names[index]}) is in it twice; expected each class "
        "once."
      )
  return found


def union(requested: Sequence[int], earlier: Sequence[int], names: Sequence[str]) -> list[int]:
  """Return all classes to forget, those of earlier requests too; one class must stay."""
  for index in earlier:
    if not 0 <= index < len(names):
      raise MnemonicError(
        f"classes: an earlier forget of this run names class {index}; the data set has classes 0 "
        f"to {len(names) - 1}. Its report.json was edited, or belongs to another run."
      )
  classes = sorted({*requested, *earlier})
  if len(classes) == len(names):
    before = " with those forgotten before" if earlier else ""
    raise UsageError(f"classes: {list(requested)}{before} are all {len(names)}; one must stay.")
  return classes


def _index(one: int | str, names: Sequence[str]) -> int:
  called = [index for index, name in enumerate(names) if name == one]
  if len(called) > 1:
    indices = " and ".join(map(str, called))
    raise UsageError(f"classes: got {one!r}, which classes {indices} are called. Pass the index.")
  if called:
    return called[0]
  index = _integer(one)
  if index is not None and 0 <= index < len(names):
    return index
  expected = f"expected an index from 0 to {len(names) - 1}"
  if list(names) == [str(index) for index in range(len(names))]:
    raise UsageError(f"classes: got {one}; {expected}: no class has a name here.")
  near = "" if index is not None else f" {nearest(str(one), names)}"
  raise UsageError(f"classes: got {one}; {expected}, or the name of a class.{near}")


def _integer(one: int | str) -> int | None:
  try:
    return int(one)
  except ValueError:
    return None
