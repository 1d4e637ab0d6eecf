"""The head edit: a trivial control that hides a class and leaves the features as they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax.rivals import model
from mnemonic_jax.rivals.protocol import Reads, Rival
from mnemonic_jax.rivals.request import NOTHING, NotApplicable, Request

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


def forget(request: Request, state: None, classes: tuple[int, ...], strength: None) -> Any:
  """Do the head edit of any model whose head has a bias; it is found by tracing.

  In half precision the bias is half of the lowest number.
  """
  head = model.head_of(request)
  if head.bias is None:
    raise NotApplicable("the head has no bias")
  bias = jax.tree.leaves(request.params)[head.bias.leaf]
  low = max(_VERY_LOW, float(jnp.finfo(bias.dtype).min) / 2)
  edited = head.bias.put(bias, model.masks(request, classes)[0], jnp.float32(low))
  return model.replaced(request, request.params, {head.bias.leaf: edited})


RIVAL = Rival(
  name="head_edit",
  source="a control",
  reads=Reads(NOTHING),
  strengths=(None,),
  forget_fn=forget,
)
