"""The function types that several stages share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

PyTree = Any
LogitsFn = Callable[[PyTree, jax.Array], jax.Array]  # (params, inputs) -> (N, C) logits
PerExampleLoss = Callable[[jax.Array, jax.Array], jax.Array]  # (logits, labels) -> (N,) losses
LossFn = Callable[[PyTree, PyTree, PyTree], jax.Array]  # (params, inputs, labels) -> (N,) losses
