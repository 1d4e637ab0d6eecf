"""Fold what BatchNorm has learned in training mode into its scale and bias."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def folded(module: Any, params: PyTree, old: PyTree, new: PyTree) -> PyTree:
  """Change scales and biases so that the statistics `old` serve in place of `new`; see `fold_fn`.

  Args:
    module: the NNX module that params and statistics are of.
    params, old, new: nested dicts.
  """
  if not isinstance(old, dict):
    return params
  if {"mean", "var"} <= old.keys():
    return {**params, **_scale_and_bias(params, old, new, module.epsilon)}
  inside = {
    name: folded(_child(module, name), params[name], old[name], new[name])
    for name in old
    if name in params
  }
  return {**params, **inside}


def _child(module: Any, name: Any) -> Any:
  return module[name] if isinstance(name, int) else getattr(module, name)


def _scale_and_bias(
  params: PyTree, old: PyTree, new: PyTree, epsilon: float
) -> dict[str, jax.Array]:
  scale, bias = (params[name].astype(jnp.float32) for name in ("scale", "bias"))
  own = jnp.sqrt(new["var"] + epsilon)
  changed = {
    # In this order statistics that stayed change no bit.
    "scale": scale * (jnp.sqrt(old["var"] + epsilon) / own),
    "bias": bias + (old["mean"] - new["mean"]) * scale / own,
  }
  return {name: value.astype(params[name].dtype) for name, value in changed.items()}
