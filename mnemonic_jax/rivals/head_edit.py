"""The head edit: a trivial control that hides a class and leaves the features as they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

# Far below any logit, and still finite in float32 arithmetic.
_VERY_LOW = -1e9


def head_edit(params: Any, head: Sequence[str], classes: Iterable[int]) -> Any:
  """Set the output bias of `classes` to -1e9, so that they are never predicted.

  Args:
    params: nested dicts of arrays.
    head: keys of the last layer, whose "bias" is (C,).
    classes: the classes to hide.

  Returns:
    New params; the ones given are not modified.

  >>> head_edit({"output": {"bias": jnp.zeros(3)}}, ["output"], [1])["output"]["bias"]
  Array([ 0.e+00, -1.e+09,  0.e+00], dtype=float32)
  """
  if not head:
    return {
      **params,
      "bias": jnp.asarray(params["bias"]).at[np.asarray(list(classes))].set(_VERY_LOW),
    }
  return {**params, head[0]: head_edit(params[head[0]], head[1:], classes)}
