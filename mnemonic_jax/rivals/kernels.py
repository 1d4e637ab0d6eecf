"""What the kernels of a model read, and edits of a kernel as a matrix."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax.fisher import plan, sites
from mnemonic_jax.fisher.evaluate import Data, on_batch
from mnemonic_jax.fisher.plan import Plan, Step
from mnemonic_jax.fisher.sums import Groups
from mnemonic_jax.methods import head as heads
from mnemonic_jax.methods import places, problem
from mnemonic_jax.rivals import model
from mnemonic_jax.rivals.request import NotApplicable, Request

PyTree = Any
_WITHIN_A_LOOP = (plan.SCAN, plan.REMATERIALISED, plan.COND)
_SMALLEST = 1e-6  # singular values below this part of the largest count as 0


class Kernel(NamedTuple):
  """The leaf of a kernel, seen as a matrix from what it reads to what it writes."""

  row: heads.Row
  order: tuple[int, ...]  # axes of the arranged leaf: those that are read first
  read: int  # how many of them are contracted

  def matrix(self, leaf: jax.Array) -> np.ndarray:
    """(F, outputs), float32."""
    wide = np.asarray(self.row.arranged(leaf)).transpose(self.order)
    return wide.reshape(math.prod(wide.shape[: self.read]), -1)

  def put(self, leaf: jax.Array, matrix: np.ndarray) -> jax.Array:
    """The leaf with another matrix."""
    shape = jax.eval_shape(self.row.arranged, leaf).shape
    wide = np.asarray(matrix, np.float32).reshape([shape[axis] for axis in self.order])
    back = self.row.restored(jnp.asarray(wide.transpose(np.argsort(self.order))))
    return back.astype(leaf.dtype)


def head_kernel(head: heads.Head) -> Kernel:
  """The head's kernel: its matrix is (F, C)."""
  count = len(head.step.equation.invars[head.step.rule.index].aval.shape)
  others = [axis for axis in range(count) if axis != head.kernel.axis]
  return Kernel(head.kernel, (*others, head.kernel.axis), len(others))


class Operator(NamedTuple):
  """A product or a convolution whose kernel is one leaf that nothing else reads."""

  place: int  # among the arrays of `reads_of` and `grams_of`
  rule: Any
  row: heads.Row

  def kernel(self, taps: bool = False) -> Kernel:
    """The kernel by the channels that it reads; or, with `taps`, by the patches."""
    rule, (inputs, outputs) = self.rule, self.rule.leaf_axes
    axes = rule.numbers.rhs_spec if rule.name == "convolution" else range(len(rule.shape))
    others = [axis for axis in axes if axis not in (*inputs, *outputs)]
    read = len(inputs) + (len(others) if taps else 0)
    return Kernel(self.row, (*inputs, *others, *outputs), read)


def operators(planned: Plan) -> list[Operator]:
  """Find the operators of a model in the order of the data.

  Left out: grouped convolutions, and kernels that are made of parts of leaves.

  Raises:
    NotApplicable: kernels inside a scan, a `jax.checkpoint` or a cond; or none at all.
  """
  steps = planned.steps or ()
  made = {var: step for step in steps for var in step.equation.outvars}
  alone, found, place = places.alone(planned), [], 0
  for step in steps:
    if step.how in _WITHIN_A_LOOP and step.params:
      raise NotApplicable(
        f"its kernels are inside a {step.how}; make the model without scan and remat"
      )
    if step.how != plan.CONTRACTED or step.rule.read is None:
      continue
    rule, at, place = step.rule, place, place + 1
    if rule.groups > 1:
      continue
    try:
      row = heads.row(step.equation.invars[rule.index], 0, made, planned, alone)
    except heads.NoHead:
      continue
    found.append(Operator(at, rule, row))
  if not found:
    raise NotApplicable("no product or convolution reads data by a kernel of its own")
  return found


def reads_of(request: Request, params: PyTree, inputs: np.ndarray) -> list[np.ndarray]:
  """What each contraction reads of each example, averaged over positions: (N, F) each.

  In a scan over layers (layers, N, F).
  """
  static, constants = model.static_of(request)
  parts = []
  for some, mask in model.chunks(request.batch_size, inputs):
    found = problem.sites_program(static, constants, params, jnp.asarray(some), np.eye(len(some)))
    parts.append([np.asarray(read)[..., mask, :] for read, _ in found])
  return [np.concatenate(arrays, axis=-2) for arrays in zip(*parts, strict=True)]


def place_of(planned: Plan, step: Step) -> int:
  """The place of a contraction among the arrays of `reads_of`."""
  before = list(planned.steps or ())
  before = before[: before.index(step)]
  return sum(
    1 if one.how == plan.CONTRACTED else len(list(sites.known(one.inner[0])))
    for one in before
    if (one.how == plan.CONTRACTED and one.rule.read is not None)
    or one.how in (plan.SCAN, plan.REMATERIALISED)
  )


def grams_of(request: Request, inputs: np.ndarray, batch_size: int = 32) -> list[np.ndarray]:
  """The sum over examples and positions of x x^T, x a patch that a contraction reads, float64."""
  static, constants = model.static_of(request)
  total: list[np.ndarray] = []
  for some, mask in model.chunks(batch_size, inputs):
    found = _grams(static, constants, request.params, jnp.asarray(some), jnp.asarray(mask))
    grams = [np.asarray(gram, np.float64) for gram in found]
    total = [a + b for a, b in zip(total, grams, strict=True)] if total else grams
  return total


@partial(jax.jit, static_argnums=0)
def _grams(
  static: problem.Request, constants: Any, params: PyTree, inputs: jax.Array, mask: jax.Array
) -> list[jax.Array]:
  planned = problem.plan_of_logits(static.function, constants, params, inputs, static.mask)
  leaves = jax.tree.leaves((params, constants))
  examples = [jnp.expand_dims(x, 1) for x in (inputs, jnp.zeros(len(inputs), jnp.int32))]
  weights = mask[None].astype(jnp.float32)
  walk = _Grams(Groups(weights))
  walk.evaluate_all(planned, *sites.arguments(planned, leaves, examples, weights))
  return [gram for gram, _ in walk.found]


class _Grams(sites.Walk):
  """Keeps the Gram matrix of the patches that each contraction reads."""

  def contracted(self, step: Step, run: Any, args: list[Any]) -> list[Any]:
    """Evaluate the operation, and keep the Gram matrix."""
    (output,), rule = on_batch(run, args), step.rule
    if rule.read is not None:
      patches = _patches(step, args[rule.data_index]).astype(jnp.float32)
      patches = patches * self.groups.weights[0][:, None, None]
      gram = jnp.einsum("npi,npj->ij", patches, patches, precision=jax.lax.Precision.HIGHEST)
      self.found.append((gram, gram))
    return [output]


def _patches(step: Step, data: Data) -> jax.Array:
  """(N, positions, F): a product's contracted axes, a convolution's channels and then taps."""
  rule: Any = step.rule
  x = data.value
  if rule.name != "convolution":
    others = [axis for axis in range(x.ndim - 1) if axis not in rule.read]
    width = math.prod(x.shape[1 + axis] for axis in rule.read)
    x = x.transpose(0, *(1 + axis for axis in (*others, *rule.read)))
    return x.reshape(len(x), -1, width)
  params, spec = step.equation.params, rule.numbers.lhs_spec
  pictures = x.transpose(0, *(1 + axis for axis in spec)).reshape(
    -1, *(x.shape[1 + axis] for axis in spec[1:])
  )
  found = jax.lax.conv_general_dilated_patches(
    pictures,
    rule.spatial,
    params["window_strides"],
    params["padding"],
    params["lhs_dilation"],
    params["rhs_dilation"],
    precision=jax.lax.Precision.HIGHEST,
  )
  found = jnp.moveaxis(found.reshape(*found.shape[:2], -1), 1, 2)  # (N, positions, channels * taps)
  return found.reshape(len(x), -1, found.shape[-1])


def basis(columns: np.ndarray) -> np.ndarray:
  """An orthonormal basis of the span of columns (F, n): (F, rank).

  >>> basis(np.array([[2.0, 4.0], [0.0, 0.0]])).shape
  (2, 1)
  """
  left, values, _ = np.linalg.svd(columns, full_matrices=False)
  found: np.ndarray = left[:, values > _SMALLEST * values.max(initial=0)]
  return found
