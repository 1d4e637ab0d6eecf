"""Check that a loss has per-example gradients: (N,), independent examples, no collective."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from mnemonic_jax import _checks, _mesh
from mnemonic_jax._types import LossFn
from mnemonic_jax.fisher.jaxprs import equations_in

PyTree = Any

# Rows on which examples are checked for independence, and how far their losses may differ by
# rounding: relative, and, where a caller's own loss may cancel, absolute.
_INDEPENDENCE_ROWS = 8
_ROUNDING = {"float32": (0.02, 1e-4), "half": (0.5, 0.1)}
# Each also as the start and done of its asynchronous form.
_COLLECTIVES = (
  *("psum", "pmax", "pmin", "ppermute", "pbroadcast", "psend", "precv", "all_gather", "all_to_all"),
  *("ragged_all_to_all", "reduce_scatter", "unreduced_psum", "unreduced_reduce_scatter"),
)


def num_examples_of(inputs: PyTree, labels: PyTree) -> int:
  """N, the common leading axis of inputs and labels."""
  sizes = {}
  for name, tree in (("inputs", inputs), ("labels", labels)):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      if not np.ndim(leaf):
        raise ValueError(
          f"{name}{jax.tree_util.keystr(path)}: got a scalar; "
          "expected a leading axis of N examples."
        )
      sizes[name + jax.tree_util.keystr(path)] = np.shape(leaf)[0]
  if len(set(sizes.values())) > 1:
    raise ValueError(
      f"inputs, labels: leading axes differ: {sizes}; expected the same number of examples in each."
    )
  if not sizes or 0 in sizes.values():
    raise ValueError("inputs: an empty batch; expected at least one example.")
  return next(iter(sizes.values()))


def matmul_precision(precision: str | None) -> contextlib.AbstractContextManager[Any]:
  """The context in which matrix products have `precision`; None leaves what is set."""
  if precision is None:
    return contextlib.nullcontext()
  try:
    return jax.default_matmul_precision(precision)
  except (ValueError, TypeError):
    raise ValueError(
      f"precision: got {precision!r}; expected for example 'highest', 'high', 'default' or None."
    ) from None


def check_loss(
  loss_fn: LossFn,
  params: PyTree,
  inputs: PyTree,
  labels: PyTree,
  precision: str | None,
  *,
  cancels: bool = True,
) -> None:
  """Refuse a loss that is not (N,), communicates, or (if concrete) mixes its examples.

  A loss that `cancels` is also allowed an absolute rounding error.
  """
  num_examples = num_examples_of(inputs, labels)
  with matmul_precision(precision):
    jaxpr, shape = _traced(loss_fn, params, inputs, labels)
  require_losses("loss_fn", shape, num_examples)
  refuse_collectives("loss_fn", jaxpr)
  operations = list(equations_in(jaxpr.jaxpr))
  if num_examples > 1 and _checks.is_concrete((params, inputs, labels)):
    half = any(
      getattr(getattr(v, "aval", None), "dtype", None) in (jnp.bfloat16, jnp.float16)
      for e in operations
      for v in e.outvars
    )
    rows = np.unique(
      np.linspace(0, num_examples - 1, min(num_examples, _INDEPENDENCE_ROWS)).astype(int)
    )
    relative, absolute = _ROUNDING["half" if half else "float32"]
    with matmul_precision(precision):
      difference = _dependence(loss_fn, params, inputs, labels, rows, absolute if cancels else 0.0)
    # Inside a trace the difference is not concrete, even that of concrete values.
    if _checks.is_concrete(difference) and difference > relative:
      raise ValueError(
        f"loss_fn: examples depend on each other: a loss changes by {difference:.0%} when its "
        "example is computed alone. Likely causes: BatchNorm in training mode (use evaluation "
        "mode), dropout that is on, or a mean over the batch inside the loss."
      )


def _traced(loss_fn: LossFn, params: PyTree, inputs: PyTree, labels: PyTree) -> tuple[Any, Any]:
  """Trace a loss to a closed jaxpr and the shape it returns; explicit axes are automatic in it."""
  found = []

  def trace(batch: PyTree, params: PyTree) -> jax.Array:
    found.append(jax.make_jaxpr(loss_fn, return_shape=True)(params, *batch))
    return jnp.zeros(())

  automatic = partial(_mesh.with_automatic_axes, out_specs=jax.sharding.PartitionSpec())
  jax.eval_shape(partial(automatic, trace), (inputs, labels), params)
  return found[0]


def require_losses(name: str, losses: Any, num_examples: int) -> None:
  """Refuse what a loss returned, or its shape, if it is not one floating number per example."""
  shape, dtype = getattr(losses, "shape", None), getattr(losses, "dtype", np.dtype(object))
  if shape != (num_examples,) or not jnp.issubdtype(dtype, jnp.floating):
    got = f"shape {shape} and dtype {dtype}" if shape is not None else type(losses).__name__
    raise ValueError(
      f"{name}: returned {got}; expected floating losses of shape ({num_examples},), one per "
      "example. Drop the mean or sum over the batch: per-example gradients are squared before they "
      "are averaged."
    )


def refuse_collectives(name: str, jaxpr: Any) -> None:
  """Refuse a function whose closed jaxpr communicates between devices."""
  for equation in equations_in(jaxpr.jaxpr):
    if equation.primitive.name.startswith(_COLLECTIVES):
      raise ValueError(
        f"{name}: calls the collective {equation.primitive.name!r}; its gradient would be summed "
        "over devices before it is squared. Gather the params before the call and pass the "
        "gathered tree, or use jit with sharded arrays, which needs no collective in the function."
      )


def of_one(
  function: Callable[..., Any], params: PyTree, inputs: PyTree, labels: PyTree
) -> jax.Array:
  """What a loss, or a model, returns for a batch of one example, whose axis must still be there."""
  remedy = (
    "A squeeze without its axis takes the axis of examples too when there is one: name the axes to "
    "squeeze."
  )
  try:
    values = function(params, inputs, labels)
  except Exception as error:
    error.add_note(f"mnemonic_jax called it with a batch of one example. {remedy}")
    raise
  if jnp.shape(values)[:1] != (1,):
    expected = "(1,)" if jnp.ndim(values) < 2 else "(1, ...)"
    raise ValueError(
      f"loss_fn, logits_fn: returned shape {jnp.shape(values)} for a batch of one example; "
      f"expected {expected}. {remedy}"
    )
  return values


def traced_on_one(
  function: Callable[..., Any], params: PyTree, inputs: PyTree, labels: PyTree
) -> Any:
  """The closed jaxpr of `of_one`; the function runs once for all calls on the same shapes."""
  closed = jax.make_jaxpr(of_one, static_argnums=0)(function, params, inputs, labels)
  # JAX remembers a jaxpr together with the tracers that the function closed over at the time.
  if any(isinstance(const, jax.core.Tracer) for const in closed.consts):
    return jax.make_jaxpr(partial(of_one, function))(params, inputs, labels)
  return closed


@partial(jax.jit, static_argnums=0)
def _dependence(
  loss_fn: LossFn, params: PyTree, inputs: PyTree, labels: PyTree, rows: jax.Array, absolute: float
) -> jax.Array:
  """Compare the losses of some rows together and one by one: the largest relative difference.

  Differences up to `absolute` do not count.
  """

  def largest_difference(batch: PyTree, params: PyTree, rows: jax.Array) -> jax.Array:
    inputs, labels = jax.tree.map(lambda x: x[rows], batch)
    together = loss_fn(params, inputs, labels)
    shapes = jax.tree.map(lambda x: jax.eval_shape(lambda x: x[:1], x), (inputs, labels))
    one = jex.jaxpr_as_fun(traced_on_one(loss_fn, params, *shapes))
    rows_of = [jnp.expand_dims(x, 1) for x in jax.tree.leaves((inputs, labels))]
    (alone,) = jax.vmap(partial(one, *jax.tree.leaves(params)))(*rows_of)
    alone = alone[:, 0]
    larger = jnp.maximum(jnp.abs(together), jnp.abs(alone))
    beyond = jnp.abs(together - alone) - absolute
    relative = jnp.where(larger > jnp.finfo(larger.dtype).tiny, beyond / larger, 0)
    relative = jnp.where(jnp.isfinite(relative), relative, 0)
    return jnp.max(jnp.where(jnp.isfinite(together) == jnp.isfinite(alone), relative, 1))

  specs = jax.sharding.PartitionSpec()
  return _mesh.with_automatic_axes(
    largest_difference, (inputs, labels), params, rows, out_specs=specs
  )
