"""Forgetting methods."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Perturbation:
  """Stand-in until the method protocol is merged."""

  lambda1: Any
  lambda2: Any

  def __post_init__(self) -> None:
    from mnemonic_jax import _checks

    for field in dataclasses.fields(self):
      _checks.require_finite_number(f"method.{field.name}", getattr(self, field.name))


METHODS: dict[str, type] = {"perturbation": Perturbation}


def settings(method: Any) -> dict[str, Any]:
  """The settings of a method as plain JSON values."""
  return {f.name: float(getattr(method, f.name)) for f in dataclasses.fields(method)}
