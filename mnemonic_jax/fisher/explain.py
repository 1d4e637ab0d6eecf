"""How, why and at what cost the diagonal Fisher of each leaf is computed: a debugging aid."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax

from mnemonic_jax import _trees
from mnemonic_jax._types import LossFn
from mnemonic_jax.fisher import loss_checks, passes

PyTree = Any


class LeafPlan(NamedTuple):
  """How the squared gradients of one leaf come about."""

  path: str  # as `jax.tree_util.keystr` writes it
  shape: tuple[int, ...]
  rule: str  # "product", "convolution", "lookup", "per example", several with " + ", or "unused"
  reason: str  # why it is per example or unused; empty where operations contract it
  flops: int  # of one example: gradient (not for "per example"), square and sum
  bytes: int  # of gradient held at a time, whatever the microbatch
  bytes_per_example: int  # of gradient held for each example of the microbatch


@dataclasses.dataclass(frozen=True)
class FisherPlan:
  """One `LeafPlan` per leaf that takes part, in leaf order; prints as a table."""

  leaves: tuple[LeafPlan, ...]

  def __str__(self) -> str:
    heads = ("leaf", "shape", "rule", "kFLOP/example", "kB", "kB/example", "why")
    rows = [
      (
        x.path,
        str(x.shape),
        x.rule,
        _kilo(x.flops),
        _kilo(x.bytes),
        _kilo(x.bytes_per_example),
        x.reason,
      )
      for x in self.leaves
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    aligned = [
      "  ".join(
        cell.rjust(width) if 3 <= index <= 5 else cell.ljust(width)
        for index, (cell, width) in enumerate(zip(row, widths, strict=True))
      )
      for row in (heads, *rows)
    ]
    return "\n".join(line.rstrip() for line in aligned)


def explain_fisher(
  loss_fn: LossFn,
  params: PyTree,
  inputs: PyTree,
  labels: PyTree,
  *,
  mask: PyTree = None,
) -> FisherPlan:
  """Tell for every leaf which way `diagonal_fisher` takes, why, and what that costs.

  A leaf is contracted inside the operations in which it meets data (products, convolutions,
  lookups), without per-example gradients; any other use gives each example a copy of the leaf,
  whose gradient is held for the whole microbatch. Both are exact.

  Args:
    The arguments are those of `diagonal_fisher`; arrays may be `jax.ShapeDtypeStruct`s, because
    nothing is computed.

  Returns:
    A `FisherPlan`.

  Raises:
    TypeError, ValueError: as `diagonal_fisher`, for what can be told without values.

  >>> def loss_fn(p, x, y):
  ...   hidden = jax.numpy.tanh(x @ p["kernel"] + p["bias"])
  ...   return ((hidden @ p["kernel"].T - y) ** 2).sum(-1)
  >>> shaped = lambda *shape: jax.ShapeDtypeStruct(shape, "float32")
  >>> params = {"bias": shaped(3), "kernel": shaped(4, 3)}
  >>> print(explain_fisher(loss_fn, params, shaped(8, 4), shaped(8, 4)))
  leaf        shape   rule         kFLOP/example   kB  kB/example  why
  ['bias']    (3,)    per example            0.0  0.0         0.0  used in add
  ['kernel']  (4, 3)  product                0.1  0.1         0.0
  """
  leaves_mask = _trees.mask_leaves(mask, params)
  loss_checks.check_loss(loss_fn, params, inputs, labels, None)
  uses = list(passes.plan_of(loss_fn, leaves_mask, params, (inputs, labels)).uses())
  plans = []
  for index, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
    if not leaves_mask[index]:
      continue
    own = [use for use in uses if index in use.leaves]
    reasons = dict.fromkeys(use.reason for use in own if use.reason)
    plans.append(
      LeafPlan(
        path=jax.tree_util.keystr(path),
        shape=tuple(leaf.shape),
        rule=" + ".join(dict.fromkeys(use.rule for use in own)) or "unused",
        reason="; ".join(reasons) if own else "does not reach the loss",
        flops=sum(use.flops for use in own),
        bytes=max((use.bytes for use in own), default=0),
        bytes_per_example=sum(use.bytes_each for use in own),
      )
    )
  return FisherPlan(tuple(plans))


def _kilo(number: int) -> str:
  return f"{number / 1000:.{0 if number >= 1e6 else 1}f}"
