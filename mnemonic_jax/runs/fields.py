"""Check one field of a config: its type, its choices, its limits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from mnemonic_jax.errors import UsageError

# What int32 and float32 hold.
_LARGEST = {int: 2**31 - 1, float: 3.4e38}
_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}

Classes = tuple[int | str, ...]  # indices and names
Settings = Mapping[str, Any]  # of a method


def one_of(default: str, choices: Iterable[str]) -> Any:
  """Declare a field that takes one of a few words."""
  return dataclasses.field(default=default, metadata={"choices": tuple(choices)})


def number(default: float, low: float = 0, high: float | None = None) -> Any:
  """Declare a number from `low` to `high`, both included; without `high`, as large as it fits."""
  return dataclasses.field(default=default, metadata={"low": low, "high": high})


def check(name: str, value: Any, kind: Any, limits: Mapping[str, Any]) -> Any:
  """Return `value` as its field wants it, or raise a UsageError that names both.

  Args:
    name: the dotted name of the field, for the error.
    kind: the field's type: bool, int, float, str, `Classes` or `Settings`.
    limits: the metadata that `one_of` and `number` leave; a number without any is at least 0.
  """
  if kind == Classes:
    return tuple(_class(name, item) for item in _as_list(value))
  if kind == Settings:
    return _settings(name, value)
  if kind is float and type(value) is int:
    value = float(value) if abs(value) < 2**1000 else math.inf
  if type(value) is not kind:
    raise UsageError(f"{name}: got {value!r}; expected {_EXPECTED[kind]}.")
  if "choices" in limits and value not in limits["choices"]:
    raise UsageError(f"{name}: got {value!r}; expected one of {', '.join(limits['choices'])}.")
  if kind in _LARGEST:
    _in_range(name, value, limits.get("low", 0), limits.get("high"), _LARGEST[kind])
  return value


def _in_range(name: str, value: float, low: float, high: float | None, largest: float) -> None:
  if not low <= value <= (largest if high is None else high):
    limit = f"of at least {low:g}, at most {largest:g}" if high is None else f"from {low} to {high}"
    raise UsageError(f"{name}: got {value}; expected a number {limit}.")


def _as_list(value: Any) -> list[Any]:
  return list(value) if isinstance(value, (list, tuple)) else [value]


def _class(name: str, value: Any) -> int | str:
  if type(value) not in (int, str):
    raise UsageError(f"{name}: got {value!r}; expected class indices or names.")
  return value


def _settings(name: str, value: Any) -> dict[str, Any]:
  if not isinstance(value, Mapping):
    raise UsageError(f"{name}: got {value!r}; expected a table, such as {{ lambda1 = 1e-3 }}.")
  return {key: _setting(f"{name}.{key}", item) for key, item in value.items()}


def _setting(name: str, value: Any) -> Any:
  """A setting of a method: a number of at least 0, true or false, or names."""
  if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
    return tuple(value)
  if type(value) not in (bool, int, float):
    raise UsageError(f"{name}: got {value!r}; expected a number, true, false or a list of names.")
  return value if type(value) is bool else check(name, value, type(value), {})
