"""The functions that codes are learned from, and the arrays that are matched."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax import _checks, _functions, _mesh, _trees
from mnemonic_jax._functions import Static
from mnemonic_jax.fisher import loss_checks, passes, sites

PyTree = Any

_ROWS = 16  # on which examples are checked for independence
_ROUNDING = 0.05  # differences of logits that are rounding, relative to an example's largest


class Unfit(ValueError):
  """Functions that returned what cannot be learned from."""


@dataclasses.dataclass(frozen=True)
class Functions:
  """The functions without their arrays. Equal ones share compiled programs."""

  logits: Static
  features: Static | None
  statistics: Static | None
  num_classes: int
  precision: str | None
  placement: _mesh.Placement


class Arrays(NamedTuple):
  """Params, and the arrays that each function carries."""

  params: PyTree
  logits: list[Any]
  features: list[Any]
  statistics: list[Any]


def split(
  logits_fn: Any,
  features_fn: Any,
  statistics_fn: Any,
  params: PyTree,
  num_classes: int,
  precision: str | None,
  shardings: tuple[jax.sharding.NamedSharding, ...] | None = None,
) -> tuple[Functions, Arrays]:
  """Take the functions apart into what `jit` may hash and the arrays that it may trace.

  `shardings` says where each leaf of abstract params would lie.
  """
  optional = lambda function: _functions.split(function) if function else (None, [])
  logits, of_logits = _functions.split(logits_fn)
  features, of_features = optional(features_fn)
  statistics, of_statistics = optional(statistics_fn)
  placement = _mesh.Placement.of(params, (), shardings)
  functions = Functions(logits, features, statistics, num_classes, precision, placement)
  return functions, Arrays(params, of_logits, of_features, of_statistics)


def logits_of(functions: Functions, arrays: Arrays, inputs: jax.Array) -> jax.Array:
  """The logits (N, C), float32 at least."""
  logits = functions.logits(arrays.logits)(arrays.params, inputs)
  _require_logits(logits, (len(inputs), functions.num_classes))
  return logits.astype(_trees.at_least_float32(logits.dtype))


def reads_of(
  functions: Functions, arrays: Arrays, inputs: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
  """What is matched, one array (N, F) a contraction in the order of the data; and the logits.

  Those are the last half of the contractions, and the last two at least; or the features.
  """
  if functions.features is not None:
    named = functions.features(arrays.features)(arrays.params, inputs)
    return averaged(named, len(inputs)), logits_of(functions, arrays, inputs)
  whole = arrays.params, arrays.logits
  mask = _trees.mask_leaves(None, arrays.params) + (False,) * len(arrays.logits)
  abstract = jax.ShapeDtypeStruct(inputs.shape, inputs.dtype)
  planned = passes.plan_of(Logits(functions.logits), mask, whole, (abstract, None))
  found, (logits,) = sites.reads(planned, jax.tree.leaves(whole), [jnp.expand_dims(inputs, 1)])
  if not found:
    raise Unfit(
      "logits_fn: no leaf of params meets data in a matrix product or a convolution; expected at "
      "least one, whose input can be matched. Let logits_fn take its kernels as params, or pass "
      "features_fn."
    )
  logits = logits[:, 0]
  _require_logits(logits, (len(inputs), functions.num_classes))
  last = max(2, (len(found) + 1) // 2)
  return found[-last:], logits.astype(_trees.at_least_float32(logits.dtype))


@dataclasses.dataclass(frozen=True)
class Logits:
  """The logits as the Fisher's tracer takes a function, with the arrays beside the params."""

  function: Static

  def __call__(self, whole: PyTree, inputs: jax.Array, labels: None) -> jax.Array:
    """Return the logits of a batch."""
    params, arrays = whole
    return self.function(arrays)(params, inputs)


def averaged(named: Any, num_examples: int) -> list[jax.Array]:
  """Features {name: (N, ..., F)} as a list of (N, F), averaged over positions."""
  if not isinstance(named, dict) or not named:
    raise Unfit(
      f"features_fn: returned {_checks.kind(named)}; expected a dict {{name: (N, ..., F)}} with at "
      "least one array."
    )
  return [_average(name, x, num_examples) for name, x in named.items()]


def _average(name: str, x: Any, num_examples: int) -> jax.Array:
  shape: tuple[int, ...] = getattr(x, "shape", ())
  dtype = getattr(x, "dtype", np.dtype(object))
  fits = len(shape) >= 2 and shape[0] == num_examples and jnp.issubdtype(dtype, jnp.floating)
  if not fits or 0 in shape:
    raise Unfit(
      f"features_fn: {name!r} has shape {shape} and dtype {dtype} for {num_examples} inputs; "
      f"expected floats ({num_examples}, ..., F), the batch axis first and channels last."
    )
  wide = x.astype(_trees.at_least_float32(dtype))
  return wide.reshape(num_examples, -1, shape[-1]).mean(1)


def _require_logits(logits: Any, wanted: tuple[int, ...]) -> None:
  shape, dtype = getattr(logits, "shape", None), getattr(logits, "dtype", np.dtype(object))
  if shape != wanted or not jnp.issubdtype(dtype, jnp.floating):
    got = f"shape {shape} and dtype {dtype}" if shape is not None else type(logits).__name__
    raise Unfit(
      f"logits_fn: returned {got}; expected floating logits {wanted}, because num_classes is "
      f"{wanted[-1]}."
    )


def check_shapes(functions: Functions, arrays: Arrays, inputs: Any, reads: bool) -> Any:
  """Refuse functions that fail on inputs, or return the wrong shapes. Nothing is computed.

  Returns:
    The shapes of what is matched if `reads`, else of the logits.
  """
  program = reads_program if reads else logits_program
  inputs = jax.ShapeDtypeStruct(inputs.shape, inputs.dtype)
  try:
    return jax.eval_shape(partial(program, functions), arrays, inputs)
  except Unfit:
    raise
  except Exception as error:
    raise ValueError(_why_it_fails(inputs.shape, error)) from error


def _why_it_fails(shape: tuple[int, ...], error: Exception) -> str:
  what = f"logits_fn: fails on inputs of shape {shape}: {error} "
  if type(error).__name__ == "TraceContextError":  # Flax NNX, where a call changes the model
    return (
      f"{what}The call changes the model's own state, as BatchNorm and dropout do in training "
      "mode. Call model.eval() first, and let logits_fn take its params as an argument."
    )
  return f"{what}Expected inputs (N, *shape) that the model takes: check shape, batches and params."


def check_independence(functions: Functions, arrays: Arrays, inputs: Any, mask: Any) -> None:
  """Refuse non-finite logits, and examples that depend on each other, measured on a few inputs.

  In another batch half the places are doubles. Inputs that are not finite themselves pass; rows
  where the mask (N,) is False are taken as 0.
  """
  places = np.arange(min(len(inputs), _ROWS))
  order = (places - places % 2 - 1) % len(places)
  some, finite = _some(functions, inputs, mask, places)
  logits = np.asarray(logits_program(functions, arrays, some))
  again = np.asarray(logits_program(functions, arrays, _some(functions, inputs, mask, order)[0]))
  if not finite:
    return
  if not np.all(np.isfinite(logits)):
    raise ValueError(
      "logits_fn: NaN or inf in the logits; expected finite logits from finite params and inputs."
    )
  wanted = logits[order]
  size = np.max(np.abs(wanted), axis=-1)
  change = np.max(np.abs(again - wanted), axis=-1)
  tiny = np.finfo(size.dtype).tiny
  difference = np.max(np.where(size > tiny, change / np.maximum(size, tiny), 0))
  if difference > _ROUNDING:
    raise ValueError(
      f"logits_fn: examples depend on each other: the logits of an input change by {difference:.0%}"
      " with the inputs around it. Likely causes: (a) BatchNorm or dropout in training mode: call "
      "model.eval(), or pass use_running_average=True and deterministic=True; (b) a mean over the "
      "batch inside the model."
    )


@partial(jax.jit, static_argnums=0)
def reads_program(
  functions: Functions, arrays: Arrays, inputs: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
  """`reads_of` as a program."""
  with loss_checks.matmul_precision(functions.precision):
    return reads_of(functions, arrays, inputs)


@partial(jax.jit, static_argnums=0)
def logits_program(functions: Functions, arrays: Arrays, inputs: jax.Array) -> jax.Array:
  """`logits_of` as a program."""
  with loss_checks.matmul_precision(functions.precision):
    return copied(functions.placement, logits_of(functions, arrays, inputs))


@partial(jax.jit, static_argnums=0)
def _some(
  functions: Functions, inputs: jax.Array, mask: jax.Array, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Some rows of a batch, on every device; and whether they are finite."""

  def of_batch(batch: Any, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    found = only_real(*batch)[rows]
    return copied(functions.placement, (found, jnp.all(jnp.isfinite(found))))

  everywhere = jax.sharding.PartitionSpec()
  return _mesh.with_automatic_axes(of_batch, (inputs, mask), rows, out_specs=everywhere)


def only_real(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Return x (N, ...) with 0 in rows where the mask is False."""
  return jnp.where(mask.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)


def placed(placement: _mesh.Placement, tree: PyTree) -> PyTree:
  """Put arrays of the host where the params lie, a copy on each device of a mesh."""
  if placement.spread is None:
    return jax.tree.map(jnp.asarray, tree)
  whole = jax.sharding.NamedSharding(placement.mesh, jax.sharding.PartitionSpec())
  return jax.device_put(tree, whole)


def dealt(placement: _mesh.Placement, x: np.ndarray) -> jax.Array:
  """Put an array (N, ...) of the host where the params lie.

  Each device has its part of it on a mesh that divides N, else all of it.
  """
  if placement.spread is None or len(x) % placement.mesh.size:
    return placed(placement, x)
  spec = jax.sharding.PartitionSpec(placement.mesh.axis_names)
  return jax.device_put(x, jax.sharding.NamedSharding(placement.mesh, spec))


def rows_of_all(placement: _mesh.Placement, count: int) -> int:
  """The least number of rows, at least `count`, of which each device has its share on a mesh."""
  devices = placement.mesh.size if placement.spread else 1
  return -(-count // devices) * devices


def copied(placement: _mesh.Placement, tree: PyTree) -> PyTree:
  """Copy arrays to all devices of the mesh that the params lie on, if any."""
  if placement.spread is None:
    return tree
  whole = jax.sharding.NamedSharding(placement.mesh, jax.sharding.PartitionSpec())
  return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, whole), tree)


def spread_over(placement: _mesh.Placement, x: jax.Array) -> jax.Array:
  """Each device its part of (N, ...), on a mesh that divides N."""
  if placement.spread is None or len(x) % placement.mesh.size:
    return x
  return placement.spread.examples(x)


def on_host(placement: _mesh.Placement, x: jax.Array) -> np.ndarray:
  """Fetch an array, which may be split over the devices of several processes."""
  return np.asarray(_copied(placement, x) if placement.spread else x)


_copied = jax.jit(copied, static_argnums=0)
