"""The diagonal empirical Fisher information: per-example squared gradients, summed with weights."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax import _trees, _validation

PyTree = Any
# (params, inputs, labels) -> (N,) losses.
LossFn = Callable[[PyTree, PyTree, PyTree], jax.Array]

# Bytes of per-example gradients held at once when no microbatch is given.
_GRADIENT_BYTES = 2**30
# Before squaring, the largest entry of a leaf's gradients is brought to about 2**_TARGET_EXPONENT: squares then span
# 2**-126 .. 2**81, which keeps entries that are 1e-31 of the largest.
_TARGET_EXPONENT = 40
# Rows on which examples are checked for independence, and the difference of their losses that is rounding: relative,
# and, where a caller's own loss may cancel, absolute.
_INDEPENDENCE_ROWS = 8
_ROUNDING = {"float32": (0.02, 1e-4), "half": (0.5, 0.1)}
# Each also as the start and done of its asynchronous form.
_COLLECTIVES = (
  *("psum", "pmax", "pmin", "ppermute", "pbroadcast", "psend", "precv", "all_gather", "all_to_all"),
  *("ragged_all_to_all", "reduce_scatter", "unreduced_psum", "unreduced_reduce_scatter"),
)


@dataclasses.dataclass(frozen=True)
class Execution:
  """How a Fisher is computed. Nothing here changes a result beyond the rounding of a sum in another order.

  Attributes:
    microbatch: examples per backward pass; None takes as many as keep the per-example gradients under 1 GiB.
  """

  microbatch: int | None = None

  def __post_init__(self) -> None:
    if self.microbatch is not None:
      _validation.require_size("execution.microbatch", self.microbatch)

  def examples_at_once(self, num_examples: int, params: PyTree) -> int:
    """The microbatch for `num_examples` examples of a model with these params."""
    if self.microbatch is not None:
      return min(self.microbatch, num_examples)
    size = sum(np.size(leaf) * max(4, jnp.result_type(leaf).itemsize) for leaf in jax.tree.leaves(params))
    return max(1, min(num_examples, _GRADIENT_BYTES // max(size, 1)))


# Of one leaf: the sums (G, *leaf.shape) so far, and the exponent () of the power of two they are in units of.
_Sum = tuple[jax.Array, jax.Array]


class ScaledFisher(NamedTuple):
  """A Fisher in units of a power of two per leaf: value = scaled * 2**exponent.

  The groups of one leaf share its exponent, so their ratio needs no exponent at all.
  """

  scaled: PyTree  # leaves (G, *leaf.shape), float32 at least
  exponent: PyTree  # leaves (), int32


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
    Exact up to rounding, accumulated in float32 at least (float64 for float64 leaves). `execution` changes rounding
    only. An example whose weight is zero in every group contributes exactly nothing, whatever its gradient.
    Inside `jax.shard_map` the result is the sum over the local examples (the local mean without weights): no
    collective is done, and the caller reduces.

  Edge cases:
    range: returned values are plain float32, so squares of gradients below 1e-19 come out as 0, above 1e19 as inf;
      `forget` works on gradients brought into range and has no such limit.
    non-finite gradients propagate; bfloat16 and float16 leaves have gradients of their own dtype, squared in float32.
    explicit meshes: a batch sharded over axes of `AxisType.Explicit` is computed with these axes automatic. The result
      is then replicated, and the loss may not close over arrays on that mesh.
    traced calls: that the examples do not depend on each other is then the caller's promise (no BatchNorm in training
      mode, no dropout, no mean over the batch); concrete calls measure it.

  Args:
    loss_fn: pure function (params, inputs, labels) -> (N,) losses, one per example. What it closes over is a constant.
    params: a tree of floating arrays.
    inputs, labels: arrays or trees of arrays with leading axis N >= 1, passed to the loss.
    weights: (N,), or (G, N) for G groups from one pass, finite; None for the mean over the examples.
    mask: a tree prefix of bools; False leaves a leaf out. None keeps all.
    precision: matmul precision of the gradients, as `jax.default_matmul_precision` takes it; None: whatever is set.
    execution: microbatch; see `Execution`.

  Returns:
    A tree like params, float32 at least, each leaf (*leaf.shape) or (G, *leaf.shape); None where mask is False.

  Raises:
    TypeError: leaves that are not floating.
    ValueError: no leaves, an empty batch, weights of the wrong shape, a loss that is not (N,), examples that depend on
      each other, a collective inside the loss, an unknown precision.

  >>> def squared_error(w, x, y):
  ...   return 0.5 * (x @ w - y) ** 2
  >>> x = jnp.array([[1.0, 2.0], [3.0, 0.0]])
  >>> diagonal_fisher(squared_error, jnp.zeros(2), x, jnp.array([1.0, 1.0]))
  Array([5., 2.], dtype=float32)

  Source: Yamashita, Yamada, Shibata (2024), section 3.2; Kunstner, Balles, Hennig (2019) on "empirical".
  """
  _validation.require_callable("loss_fn", loss_fn, "(params, inputs, labels) -> (N,) losses")
  chosen = _trees.mask_leaves(mask, params)
  execution = require_execution(execution)
  num_examples = _num_examples(inputs, labels)
  group_weights, squeeze = _group_weights(weights, num_examples)
  check_loss(loss_fn, params, inputs, labels, precision)
  compute = _scaled_fisher if _validation.is_concrete((params, inputs, labels, weights)) else scaled_fisher
  fisher = compute(loss_fn, params, inputs, labels, group_weights, chosen, precision, execution)

  def plain(scaled: jax.Array, exponent: jax.Array) -> jax.Array:
    half = _power_of_two(exponent // 2, scaled.dtype)  # in two steps: 2**exponent itself may not be representable
    value = scaled * half * half
    return value[0] if squeeze else value

  return jax.tree.map(plain, fisher.scaled, fisher.exponent)


def scaled_fisher(
  loss_fn: LossFn,
  params: PyTree,
  inputs: PyTree,
  labels: PyTree,
  weights: jax.Array,
  chosen: tuple[bool, ...],
  precision: str | None,
  execution: Execution,
) -> ScaledFisher:
  """The engine behind `diagonal_fisher` and `forget`: weights (G, N), one bool per leaf in `chosen`, no checks.

  Per-example gradients by `vmap(grad)`, a microbatch at a time; between microbatches the sums are rescaled to the
  largest gradient seen so far, as in a streaming logsumexp.
  """
  engine = lambda batch, params, weights: _engine(loss_fn, batch, params, weights, chosen, precision, execution)
  return _trees.with_automatic_axes(engine, (inputs, labels), params, weights, out_specs=jax.sharding.PartitionSpec())


_scaled_fisher = jax.jit(scaled_fisher, static_argnums=(0, 5, 6, 7))


def _engine(
  loss_fn: LossFn,
  batch: tuple[PyTree, PyTree],
  params: PyTree,
  weights: jax.Array,
  chosen: tuple[bool, ...],
  precision: str | None,
  execution: Execution,
) -> ScaledFisher:
  leaves, treedef = _trees.flatten(params)
  num_examples = weights.shape[-1]
  microbatch = execution.examples_at_once(num_examples, params)
  # What the loss closes over may vary along more axes than its arguments do.
  axes = _varying_axes((weights, params, jax.eval_shape(loss_fn, params, *batch)))
  live = [_varying(leaf, axes) for leaf, takes_part in zip(leaves, chosen, strict=True) if takes_part]

  def rebuild(live_leaves: list[jax.Array]) -> PyTree:
    replacements = iter(live_leaves)
    return treedef.unflatten([next(replacements) if c else leaf for c, leaf in zip(chosen, leaves, strict=True)])

  def example_loss(live_leaves: list[jax.Array], example: PyTree) -> jax.Array:
    single_input, single_label = jax.tree.map(lambda x: x[None], example)
    return loss_fn(rebuild(live_leaves), single_input, single_label)[0]

  def accumulate(sums: list[_Sum], chunk: PyTree) -> list[_Sum]:
    examples, chunk_weights = chunk
    with matmul_precision(precision):
      gradients = jax.vmap(jax.grad(example_loss), in_axes=(None, 0))(live, examples)
    active = jnp.any(chunk_weights != 0, axis=0)
    return [_add_squares(s, g, chunk_weights, active) for s, g in zip(sums, gradients, strict=True)]

  def empty(leaf: jax.Array) -> _Sum:
    dtype = _trees.at_least_float32(leaf.dtype)
    zeros, lowest = jnp.zeros((weights.shape[0], *leaf.shape), dtype), jnp.int32(_lowest_exponent(dtype))
    return _varying(zeros, axes), _varying(lowest, axes)

  sums = [empty(leaf) for leaf in live]
  if microbatch == num_examples:
    sums = accumulate(sums, (batch, weights))
  else:
    chunks = jax.tree.map(lambda x: _in_chunks(x, microbatch), (batch, weights.T))
    # Rows that pad the last chunk repeat the first example at weight zero.
    padding = -num_examples % microbatch
    real = jnp.arange(num_examples + padding) < num_examples
    chunk_weights = jnp.where(real.reshape(-1, microbatch, 1), chunks[1], 0)
    body = lambda carry, chunk: (accumulate(carry, (chunk[0], chunk[1].T)), None)
    sums, _ = jax.lax.scan(body, sums, (chunks[0], chunk_weights))

  filled = iter(sums)
  pairs = [next(filled) if c else (None, None) for c in chosen]
  scaled = treedef.unflatten([value for value, _ in pairs])
  return ScaledFisher(scaled, treedef.unflatten([None if e is None else 2 * (e - _TARGET_EXPONENT) for _, e in pairs]))


def _add_squares(sums: _Sum, gradient: jax.Array, weights: jax.Array, active: jax.Array) -> _Sum:
  """Add one microbatch of gradients (B, *leaf) to (sums, exponent) of one leaf; the squares are in 2**exponent units."""
  total, exponent = sums
  gradient = gradient.astype(total.dtype)
  gradient = jnp.where(active.reshape(-1, *(1,) * (gradient.ndim - 1)), gradient, 0)
  largest = jnp.max(jnp.abs(gradient), initial=0.0)
  # The first exponent is the lowest there is. A chunk of zeros, whose frexp is 0, must not raise it.
  common = jnp.where(largest == 0, exponent, jnp.maximum(exponent, jnp.frexp(largest)[1]))
  squares = jnp.square(gradient * _power_of_two(_TARGET_EXPONENT - common, total.dtype))
  shrink = _power_of_two(jnp.maximum(exponent - common, jnp.finfo(total.dtype).minexp), total.dtype)
  added = jnp.einsum("gn,n...->g...", weights.astype(total.dtype), squares, precision=jax.lax.Precision.HIGHEST)
  return total * shrink * shrink + added, common


def _lowest_exponent(dtype: Any) -> int:
  """Gradients whose largest entry is below 2**this are not brought up further, lest the scale itself overflow."""
  return int(jnp.finfo(dtype).minexp) + _TARGET_EXPONENT + 6


def _power_of_two(exponent: jax.Array, dtype: Any) -> jax.Array:
  """Exactly 2**exponent for an exponent in the normal range, built from bits (exp2 rounds on some backends)."""
  info = jnp.finfo(dtype)
  integer = jnp.int64 if info.bits == 64 else jnp.int32
  biased = exponent.astype(integer) + (info.maxexp - 1)
  return jax.lax.bitcast_convert_type(biased << info.nmant, dtype)


def _in_chunks(x: jax.Array, size: int) -> jax.Array:
  """(N, ...) -> (ceil(N / size), size, ...), padded with copies of the first row."""
  padding = -x.shape[0] % size
  padded = jnp.concatenate([x, jnp.broadcast_to(x[:1], (padding, *x.shape[1:]))]) if padding else x
  return padded.reshape(-1, size, *x.shape[1:])


def _varying_axes(tree: PyTree) -> frozenset[str]:
  """Mesh axes of the surrounding `jax.shard_map` along which any leaf varies."""
  abstract = [x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x) for x in jax.tree.leaves(tree)]
  # An attribute that a later jax renames must fail here: without it every Fisher would be wrong, and say nothing.
  return frozenset().union(*(x.manual_axis_type.varying for x in abstract if x.manual_axis_type is not None))


def _varying(x: jax.Array, axes: frozenset[str]) -> jax.Array:
  """Mark `x` as varying along `axes`. Without it shard_map sums gradients of replicated params *before* the square."""
  missing = tuple(sorted(axes - _varying_axes(x)))
  return jax.lax.pcast(x, missing, to="varying") if missing else x


def require_execution(execution: Execution | None) -> Execution:
  """Return `execution`, or the default one."""
  if execution is None:
    return Execution()
  if not isinstance(execution, Execution):
    raise TypeError(f"execution: got {execution!r}; expected mnemonic_jax.Execution(microbatch=...).")
  return execution


def _num_examples(inputs: PyTree, labels: PyTree) -> int:
  """N, the common leading axis of inputs and labels."""
  sizes = {}
  for name, tree in (("inputs", inputs), ("labels", labels)):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      if not np.ndim(leaf):
        raise ValueError(f"{name}{jax.tree_util.keystr(path)}: got a scalar; expected a leading axis of N examples.")
      sizes[name + jax.tree_util.keystr(path)] = np.shape(leaf)[0]
  if len(set(sizes.values())) > 1:
    raise ValueError(f"inputs, labels: leading axes differ: {sizes}; expected the same number of examples in each.")
  if not sizes or 0 in sizes.values():
    raise ValueError("inputs: an empty batch; expected at least one example.")
  return next(iter(sizes.values()))


def _group_weights(weights: Any, num_examples: int) -> tuple[jax.Array, bool]:
  """Weights as (G, N), and whether the group axis is to be dropped from the result."""
  if weights is None:
    return jnp.full((1, num_examples), 1.0 / num_examples), True
  weights = jnp.asarray(weights)
  if weights.ndim not in (1, 2) or weights.shape[-1] != num_examples or weights.shape[0] == 0:
    raise ValueError(
      f"weights: got shape {weights.shape}; expected ({num_examples},), or (G, {num_examples}) for G groups."
    )
  if not (jnp.issubdtype(weights.dtype, jnp.floating) or jnp.issubdtype(weights.dtype, jnp.integer)):
    raise TypeError(f"weights: got dtype {weights.dtype}; expected floating numbers.")
  if _validation.is_concrete(weights) and not np.all(np.isfinite(np.asarray(weights, np.float64))):
    raise ValueError("weights: got NaN or inf; expected finite numbers.")
  return jnp.atleast_2d(weights), weights.ndim == 1


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
  loss_fn: LossFn, params: PyTree, inputs: PyTree, labels: PyTree, precision: str | None, *, cancels: bool = True
) -> None:
  """Refuse a loss that is not (N,), communicates, or, for concrete values, whose examples depend on each other.

  A loss that `cancels` is also allowed an absolute rounding error.
  """
  num_examples = _num_examples(inputs, labels)
  with matmul_precision(precision):
    jaxpr, shape = jax.make_jaxpr(loss_fn, return_shape=True)(params, inputs, labels)
  if getattr(shape, "shape", None) != (num_examples,) or not jnp.issubdtype(shape.dtype, jnp.floating):
    got = f"shape {shape.shape} and dtype {shape.dtype}" if hasattr(shape, "shape") else f"{type(shape).__name__}"
    raise ValueError(
      f"loss_fn: returned {got}; expected floating losses of shape ({num_examples},), one per example. "
      "Drop the mean or sum over the batch: per-example gradients are squared before they are averaged."
    )
  operations = list(_equations(jaxpr.jaxpr))
  for equation in operations:
    if equation.primitive.name.startswith(_COLLECTIVES):
      raise ValueError(
        f"loss_fn: calls the collective {equation.primitive.name!r}; its gradient would be summed over devices before "
        "it is squared. Gather the params before calling diagonal_fisher and pass the gathered tree, or use jit with "
        "sharded arrays, which needs no collective in the loss."
      )
  if num_examples > 1 and _validation.is_concrete((params, inputs, labels)):
    half = any(
      getattr(getattr(v, "aval", None), "dtype", None) in (jnp.bfloat16, jnp.float16)
      for e in operations
      for v in e.outvars
    )
    rows = np.unique(np.linspace(0, num_examples - 1, min(num_examples, _INDEPENDENCE_ROWS)).astype(int))
    relative, absolute = _ROUNDING["half" if half else "float32"]
    with matmul_precision(precision):
      difference = _dependence(loss_fn, params, inputs, labels, rows, absolute if cancels else 0.0)
    # Inside a trace the difference is not concrete, even that of concrete values.
    if _validation.is_concrete(difference) and difference > relative:
      raise ValueError(
        f"loss_fn: examples depend on each other: a loss changes by {difference:.0%} when its example is computed alone. "
        "Likely causes: BatchNorm in training mode (use evaluation mode), dropout that is on, or a mean over the batch "
        "inside the loss."
      )


@partial(jax.jit, static_argnums=0)
def _dependence(
  loss_fn: LossFn, params: PyTree, inputs: PyTree, labels: PyTree, rows: jax.Array, absolute: float
) -> jax.Array:
  """Largest relative difference (above `absolute`) between the losses of some rows together and one by one."""

  def largest_difference(batch: PyTree, params: PyTree, rows: jax.Array) -> jax.Array:
    inputs, labels = jax.tree.map(lambda x: x[rows], batch)
    together = loss_fn(params, inputs, labels)
    alone = jax.vmap(lambda x, y: loss_fn(params, *jax.tree.map(lambda z: z[None], (x, y)))[0])(inputs, labels)
    larger = jnp.maximum(jnp.abs(together), jnp.abs(alone))
    beyond = jnp.abs(together - alone) - absolute
    relative = jnp.where(larger > jnp.finfo(larger.dtype).tiny, beyond / larger, 0)
    relative = jnp.where(jnp.isfinite(relative), relative, 0)
    return jnp.max(jnp.where(jnp.isfinite(together) == jnp.isfinite(alone), relative, 1))

  specs = jax.sharding.PartitionSpec()
  return _trees.with_automatic_axes(largest_difference, (inputs, labels), params, rows, out_specs=specs)


def _equations(jaxpr: Any) -> Iterator[Any]:
  """Every equation of a jaxpr and of the jaxprs inside it."""
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      for inner in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from _equations(inner)
