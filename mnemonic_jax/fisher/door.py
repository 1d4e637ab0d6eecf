"""The door: the diagonal empirical Fisher information, and an account of how it is computed."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from mnemonic_jax import _checks, _mesh, _trees
from mnemonic_jax._types import LossFn
from mnemonic_jax.fisher import loss_checks, passes

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Execution:
  """How a Fisher is computed. Nothing here changes a result, except for the rounding of sums.

  Attributes:
    microbatch: examples per backward pass; None takes as many as fit in 2 GiB, or a quarter of the
      accelerator's memory. Inside a caller's `jit` on CPU, where a loop around a convolution is
      slow, None takes all examples. Choosing the direction in `forget` needs no backward pass, so
      there and on a mesh None takes all of them too.
    shardings: a tree like params of NamedSharding, for traced calls on a mesh; concrete params tell
      their own. Examples are then spread over all axes of the mesh, and sums over devices go
      straight to the shards of the params: nothing as large as all params is ever on one device.
      Kept as a tuple, in leaf order.
  """

  microbatch: int | None = None
  shardings: PyTree = None

  def __post_init__(self) -> None:
    if self.microbatch is not None:
      _checks.require_size("execution.microbatch", self.microbatch)
    if self.shardings is not None:
      leaves = tuple(jax.tree.leaves(self.shardings))
      meshes = {getattr(leaf, "mesh", None) for leaf in leaves}
      if len(meshes) != 1 or not all(isinstance(leaf, NamedSharding) for leaf in leaves):
        raise TypeError(
          f"execution.shardings: got {self.shardings!r}; expected a tree like params of "
          "NamedSharding on one mesh."
        )
      object.__setattr__(self, "shardings", leaves)  # hashable


def diagonal_fisher(
  loss_fn: LossFn,
  params: PyTree,
  inputs: PyTree,
  labels: PyTree,
  weights: jax.Array | None = None,
  *,
  mask: PyTree = None,
  precision: str | None = "highest",
  execution: Execution | None = None,
) -> PyTree:
  """Compute the diagonal of the empirical Fisher information.

      F[i] = sum_n weights[n] * (d loss_n / d params[i])**2,      weights = 1/N if not given

  Each example's gradient is squared, then summed; the gradient of a summed loss is never squared.

  Guarantees:
    Exact up to rounding, accumulated in float32 at least (float64 for float64 leaves). `execution`
    changes rounding only. An example whose weight is zero in every group contributes exactly
    nothing, whatever its gradient. Inside `jax.shard_map` the result is the sum over the local
    examples (the local mean without weights): no collective is done, and the caller reduces.

  Edge cases:
    range: returned values are plain float32, so squares of gradients below 1e-19 come out as 0,
      above 1e19 as inf; `forget` works on gradients brought into range and has no such limit.
    non-finite gradients propagate, one example's to every group perhaps; half precision is squared
      and summed in float32.
    derivatives of a Fisher are not promised: the loops used where groups are known to share no
      example have none.
    explicit meshes: a batch sharded over axes of `AxisType.Explicit` is computed with these axes
      automatic, and the loss may not close over arrays on that mesh. Concrete params give a result
      that is sharded like them, traced ones a replicated one.
    traced calls: the caller promises that the examples do not depend on each other (no BatchNorm in
      training mode, no dropout, no mean over the batch). Concrete calls measure it, and put
      differences of up to 1e-4 in a loss (0.1 in half precision) down to rounding.

  Args:
    loss_fn: pure function (params, inputs, labels) -> (N,) losses, one per example. What it closes
      over is a constant.
    params: a tree of floating arrays.
    inputs, labels: arrays or trees of arrays with leading axis N >= 1, passed to the loss.
    weights: (N,), or (G, N) for G groups from one pass; finite; None for the mean over examples.
    mask: a tree prefix of bools; False leaves a leaf out. None keeps all.
    precision: matmul precision of the gradients, as `jax.default_matmul_precision` takes it; None
      keeps what is set.
    execution: microbatch; see `Execution`.

  Returns:
    A tree like params, float32 at least, each leaf (*leaf.shape) or (G, *leaf.shape); None where
    mask is False.

  Raises:
    TypeError: leaves that are not floating.
    ValueError: no leaves, an empty batch, weights of the wrong shape, a loss that is not (N,),
      examples that depend on each other, a collective inside the loss, an unknown precision.

  >>> def squared_error(w, x, y):
  ...   return 0.5 * (x @ w - y) ** 2
  >>> x = jnp.array([[1.0, 2.0], [3.0, 0.0]])
  >>> diagonal_fisher(squared_error, jnp.zeros(2), x, jnp.array([1.0, 1.0]))
  Array([5., 2.], dtype=float32)

  Source: Yamashita, Yamada, Shibata (2024), section 3.2; Kunstner, Balles, Hennig (2019) on
  "empirical".
  """
  _checks.require_callable("loss_fn", loss_fn, "(params, inputs, labels) -> (N,) losses")
  mask_of_leaves = _trees.mask_leaves(mask, params)
  execution = require_execution(execution)
  num_examples = loss_checks.num_examples_of(inputs, labels)
  group_weights, squeeze = _group_weights(weights, num_examples)
  loss_checks.check_loss(loss_fn, params, inputs, labels, precision)
  placement = _mesh.Placement.of(params, (inputs, labels, group_weights), execution.shardings)
  objective = passes.Objective(
    loss_fn,
    mask_of_leaves,
    precision,
    disjoint=_disjoint(weights, group_weights),
    placement=placement,
  )
  batch = inputs, labels
  found = passes.squared_gradients(objective, params, batch, group_weights, execution.microbatch)
  filled = iter(_plain(found, squeeze))
  return _trees.like(params, [next(filled) if kept else None for kept in mask_of_leaves])


@partial(jax.jit, static_argnums=1)
def _plain(found: passes.SquaredGradients, squeeze: bool) -> list[jax.Array]:
  """The sums as plain numbers, in one program: not in twenty for every leaf."""
  return [value[0] if squeeze else value for value in found.in_range()]


def _disjoint(weights: Any, group_weights: jax.Array) -> bool:
  """Whether each example is known to have a weight in one group at most.

  Inspects the caller's `weights`; inside jit the converted ones are tracers.
  """
  if len(group_weights) == 1:
    return True
  if not _checks.is_concrete(weights):
    return False
  return bool(np.all(np.count_nonzero(np.asarray(weights), axis=0) <= 1))


def require_execution(execution: Execution | None) -> Execution:
  """Return `execution`, or the default one."""
  if execution is None:
    return Execution()
  if not isinstance(execution, Execution):
    raise TypeError(
      f"execution: got {execution!r}; expected mnemonic_jax.Execution(microbatch=...)."
    )
  return execution


def _group_weights(weights: Any, num_examples: int) -> tuple[jax.Array, bool]:
  """Weights as (G, N), and whether the group axis is to be dropped from the result."""
  if weights is None:
    return jnp.full((1, num_examples), 1.0 / num_examples), True
  on_host = not isinstance(weights, jax.Array) and _checks.is_concrete(weights)
  try:
    weights = (np if on_host else jnp).asarray(weights)
  except ValueError:  # rows of different lengths
    raise ValueError(
      f"weights: got {weights!r}; expected an array (N,), or (G, N) for G groups."
    ) from None
  if weights.ndim not in (1, 2) or weights.shape[-1] != num_examples or weights.shape[0] == 0:
    raise ValueError(
      f"weights: got shape {weights.shape}; expected ({num_examples},), or (G, {num_examples}) "
      "for G groups."
    )
  if not (
    jnp.issubdtype(weights.dtype, jnp.floating) or jnp.issubdtype(weights.dtype, jnp.integer)
  ):
    raise TypeError(f"weights: got dtype {weights.dtype}; expected floating numbers.")
  if on_host and np.issubdtype(weights.dtype, np.integer):  # JAX would cut them to 32 bits
    weights = weights.astype(np.float64)
  weights = jnp.asarray(weights)
  if _checks.is_concrete(weights) and not np.all(np.isfinite(np.asarray(weights, np.float64))):
    raise ValueError("weights: got NaN or inf; expected finite numbers.")
  if not jnp.issubdtype(weights.dtype, jnp.floating):
    weights = weights.astype(jnp.result_type(float))
  return jnp.atleast_2d(weights), weights.ndim == 1


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
  ...   hidden = jnp.tanh(x @ p["kernel"] + p["bias"])
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
