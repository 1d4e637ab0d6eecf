"""What a method is asked to solve: a resolved request, and what can be measured on its codes.

A `Request` is the static part of a forget: what is differentiated, and how. A `Problem` is a
request with its arrays. Both are made by `mnemonic_jax.forgetting`, for `forget` and `forget_step`
alike. A method reads Fishers, logits and scores from the problem, each computed when it asks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax import _checks, _mesh, _trees, learning
from mnemonic_jax._functions import Static
from mnemonic_jax._types import PerExampleLoss
from mnemonic_jax.evaluation import retain_and_forget
from mnemonic_jax.fisher import loss_checks, passes, sites
from mnemonic_jax.learning import Predicted

PyTree = Any

_FEW = 2  # slices of a map that a trace unrolls


class WrongLogits(ValueError):
  """What the logits function returned is no (N, C)."""


class CodeScores(NamedTuple):
  """How one set of params does on the codes; scalar arrays."""

  retain_accuracy: jax.Array  # accuracy on the codes of the kept classes, in [0, 1]
  forget_error: jax.Array  # error on the codes of the forgotten classes, in [0, 1]
  loss_gap: jax.Array  # mean loss of the forget codes minus that of the remain codes


class Site(NamedTuple):
  """What one contraction reads and writes, on average over the codes of each class."""

  paths: tuple[str, ...]  # of its leaf, as `jax.tree_util.keystr` has them; several if concatenated
  rule: str  # "product" or "convolution"
  reads: jax.Array  # (C, F), or (layers, C, F): several contracted axes are flattened into one
  writes: jax.Array  # (C, O), or (layers, C, O)


class Judges(NamedTuple):
  """Codes that stand for clusters of examples, see `LearnedCodes`."""

  inputs: jax.Array  # (C, J, *shape)
  weights: jax.Array  # (C, J)
  accuracy: jax.Array  # (C, J)
  spread: jax.Array  # (C, J)


@dataclasses.dataclass(frozen=True)
class Request:
  """The static part of a forget. Equal requests share their compiled programs."""

  function: Static  # gives (params, inputs) -> logits, once it has its arrays
  num_classes: int
  loss: PerExampleLoss
  mask: tuple[bool, ...]  # one per leaf of params: whether it may change
  layer_axes: tuple[int | None, ...]  # one per leaf of params
  precision: str | None
  microbatch: int | None
  placement: _mesh.Placement


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problem:
  """A request with its arrays: a pytree, so that `jit` takes it as an argument.

  Attributes:
    request: the static part.
    constants: the arrays that the logits function carries.
    params: what may be changed, as it was given.
    codes: (C, K, *shape).
    forget, remain: (C,) bool, the classes of both sides; a class may be in neither.
    judges: what foretells accuracy on data; None if the codes have none.
    recalled: (C, R, *shape), codes recalled from the model alone; None if there are none.
    kept: (M, *shape), examples of kept classes that the caller passes; None if there are none.
  """

  request: Request = dataclasses.field(metadata={"static": True})
  constants: list[jax.Array]
  params: PyTree
  codes: jax.Array
  forget: jax.Array
  remain: jax.Array
  judges: Judges | None = None
  recalled: jax.Array | None = None
  kept: jax.Array | None = None

  @property
  def inputs(self) -> jax.Array:
    """The codes as a batch, (N, *shape), class by class."""
    return self.codes.reshape(-1, *self.codes.shape[2:])

  @property
  def labels(self) -> np.ndarray:
    """The class of each code of the batch, (N,) int32."""
    num_classes, per_class = self.codes.shape[:2]
    return np.repeat(np.arange(num_classes, dtype=np.int32), per_class)

  @property
  def _per_class(self) -> int:
    return self.codes.shape[1]

  @property
  def layer_axes(self) -> tuple[int | None, ...]:
    """The layer axis of each leaf that may change."""
    pairs = zip(self.request.layer_axes, self.request.mask, strict=True)
    return tuple(axis for axis, may_change in pairs if may_change)

  def fishers(self, groups: jax.Array | None = None) -> PyTree:
    """Compute the diagonal Fisher of each group of classes from one pass over the codes.

        F[g] = mean over the codes of group g of (d loss / d params)^2

    Args:
      groups: (G, C) bool. None: those to forget, then those to keep.

    Returns:
      A tree like params, every leaf (G, *leaf.shape), float32 at least; None where the mask is
      False. A leaf is in a unit that all its groups have in common, so that squares of tiny
      gradients stay in range: only ratios of groups mean something.
    """
    known = groups is None and _checks.is_concrete((self.forget, self.remain))
    sides = (self.forget, self.remain) if groups is None else tuple(groups)
    weights = _mean_weights(sides, self._per_class)
    objective = dataclasses.replace(self._objective, disjoint=known)
    batch, microbatch = (self.inputs, jnp.asarray(self.labels)), self.request.microbatch
    whole = self.params, self.constants
    squares = passes.squared_gradients(objective, whole, batch, weights, microbatch)
    return self._of_changing(squares.sums)

  def logits(self, params: PyTree, inputs: jax.Array | None = None) -> jax.Array:
    """Compute the logits of the codes, (N, C), float32 at least, under any params.

    As many codes at a time are computed as in the Fisher's pass.
    """
    inputs = self.inputs if inputs is None else inputs
    size = self._codes_at_once(params)
    program = partial(logits_program, self.request)
    if size >= len(inputs) or self.request.placement.spread is not None:
      return program(min(size, len(inputs)), self.constants, params, inputs)
    if not _checks.is_concrete((params, self.codes)):
      return program(size, self.constants, params, inputs)
    # On CPU a convolution inside a loop of XLA's is many times slower: loop in Python.
    filled = jnp.concatenate([inputs, jnp.repeat(inputs[-1:], -len(inputs) % size, axis=0)])
    parts = filled.reshape(-1, size, *inputs.shape[1:])
    found = [program(size, self.constants, params, part) for part in parts]
    return jnp.concatenate(found)[: len(inputs)]

  def scores(self, params: PyTree) -> CodeScores:
    """Score params on the codes of both sides; NaN where params or logits are not finite."""
    return self.scores_of(self.logits(params), params)

  def scores_of(self, logits: jax.Array, params: PyTree) -> CodeScores:
    """Score params by the logits (N, C) that they give on the codes."""
    return _scores(self.request.loss, logits, self.labels, self.forget, self.remain, params)

  def predicted(self, params: PyTree, *, head_edited: bool = False) -> Predicted:
    """Predict A_R and E_F on data, by the judges; a problem without judges has no prediction.

    NaN where judges do not give the accuracy that was measured before (`learning.calibrated`).

    `head_edited`: with the logits of the classes to forget out of the way, as the head edit has it.
    """
    if self.judges is None:
      raise ValueError("judges: got None; expected codes of mnemonic_jax.learn_codes with judges.")
    inputs, *measured = self.judges
    shape, flat = inputs.shape[:2], inputs.reshape(-1, *inputs.shape[2:])
    before, after = (self.logits(p, flat).reshape(*shape, -1) for p in (self.params, params))
    return _predict(before, after, *measured, self.forget, self.remain, head_edited)

  def sites(self, params: PyTree) -> list[Site]:
    """Find what the contractions of the model read and write, on average over each class's codes.

    Returns:
      A `Site` for each leaf that may change and meets data in one product or convolution, in the
      order of the data: `paths`, `rule`, `reads` (C, F) and `writes` (C, O). In a scan over layers
      both have a first axis of layers.
    """
    weights = _mean_weights(tuple(np.eye(self.request.num_classes, dtype=bool)), self._per_class)
    size = self._codes_at_once(params)
    whole = size >= len(self.inputs) or not _checks.is_concrete((params, self.codes))
    size = len(self.inputs) if whole else size
    starts = range(0, len(self.inputs), size)
    arguments = self.request, self.constants, params
    parts = [
      sites_program(*arguments, self.inputs[at : at + size], weights[:, at : at + size])
      for at in starts
    ]
    sums = jax.tree.map(lambda *found: sum(found[1:], found[0]), *parts)
    paths = _trees.leaf_paths(self.params)
    known = zip(_known_sites(*arguments, self.inputs), sums, strict=True)
    return [
      Site(tuple(paths[i] for i in sorted(leaves)), rule, *pair) for (leaves, rule), pair in known
    ]

  def map(self, function: Callable[[Any], Any], xs: PyTree) -> Any:
    """Apply a function to each slice of `xs` along the first axis, one slice at a time.

    With concrete values the loop is Python's, so what the function calls is compiled once. Inside
    a trace it is XLA's, but for few slices on one device: on CPU a convolution in a loop of XLA's
    is many times slower.
    """
    count = len(jax.tree.leaves(xs)[0])
    on_mesh = self.request.placement.spread is not None
    if not _checks.is_concrete((self, xs)) and (on_mesh or count > _FEW):
      return jax.lax.map(function, xs)
    found = [function(jax.tree.map(lambda x, i=i: x[i], xs)) for i in range(count)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

  @property
  def _objective(self) -> passes.Objective:
    """What the Fisher differentiates: the loss of the logits with respect to what may change."""
    request = self.request
    frozen = (False,) * len(self.constants)
    return passes.Objective(
      _Values(request.function),
      request.mask + frozen,
      request.precision,
      request.loss,
      placement=request.placement,
    )

  def _codes_at_once(self, params: PyTree) -> int:
    microbatch = self.request.microbatch
    if self.request.placement.spread is not None or _is_split(self.codes):
      return microbatch or len(self.inputs)
    weights = _mean_weights((self.forget, self.remain), self._per_class)
    batch = self.inputs, jnp.asarray(self.labels)
    whole = params, self.constants
    return passes.examples_at_once(self._objective, whole, batch, weights, microbatch)

  def _of_changing(self, values: Iterable[Any]) -> PyTree:
    """Make a tree like params from one value for each leaf that may change, None elsewhere."""
    filled = iter(values)
    return _trees.like(self.params, [next(filled) if m else None for m in self.request.mask])


@dataclasses.dataclass(frozen=True)
class _Values:
  """The logits as the engine takes them, with the constants beside the params."""

  function: Static

  def __call__(self, whole: PyTree, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    params, constants = whole
    return self.function(constants)(params, inputs)


@partial(jax.jit, static_argnums=(0, 1))
def logits_program(
  request: Request, size: int, constants: PyTree, params: PyTree, inputs: jax.Array
) -> jax.Array:
  """The program of `Problem.logits`: (N, *shape) -> (N, C), `size` examples at a time."""
  spread = request.placement.spread
  count = -(-len(inputs) // size)

  def logits_of(inputs: jax.Array) -> jax.Array:
    logits = request.function(constants)(params, inputs)
    _require_logits(logits, (len(inputs), request.num_classes))
    return logits.astype(_trees.at_least_float32(logits.dtype))

  with loss_checks.matmul_precision(request.precision):
    if count == 1 and spread is None:
      return logits_of(inputs)
    if spread is None:
      return jax.lax.map(lambda x: logits_of(x[None])[0], inputs, batch_size=size)
    parts = passes.dealt(inputs, count, spread)
    some = lambda index: logits_of(passes.part(parts, index, spread))
    found = jax.lax.map(some, jnp.arange(count)) if count > 1 else some(0)[None]
    return jnp.swapaxes(found, 0, 1).reshape(-1, found.shape[-1])[: len(inputs)]


def _require_logits(logits: Any, wanted: tuple[int, int]) -> None:
  shape, dtype = getattr(logits, "shape", None), getattr(logits, "dtype", np.dtype(object))
  if shape != wanted or not jnp.issubdtype(dtype, jnp.floating):
    got = f"shape {shape} and dtype {dtype}" if shape is not None else type(logits).__name__
    raise WrongLogits(f"logits_fn: returned {got}; expected floating logits {wanted}")


@partial(jax.jit, static_argnums=0)
def sites_program(
  request: Request, constants: PyTree, params: PyTree, inputs: jax.Array, weights: jax.Array
) -> list[tuple[jax.Array, jax.Array]]:
  """Run `Problem.sites`: for each site, the weighted sums of what it reads and writes."""
  with loss_checks.matmul_precision(request.precision):
    planned = plan_of_logits(request.function, constants, params, inputs, request.mask)
    leaves = jax.tree.leaves((params, constants))
    examples = [jnp.expand_dims(x, 1) for x in (inputs, jnp.zeros(len(inputs), jnp.int32))]
    found = sites.sites(planned, leaves, examples, weights)
  return [(site.reads, site.writes) for site in found]


def _known_sites(
  request: Request, constants: PyTree, params: PyTree, inputs: jax.Array
) -> list[tuple[frozenset[int], str]]:
  """Leaves and rule of each site."""
  planned = plan_of_logits(request.function, constants, params, inputs, request.mask)
  return list(sites.known(planned))


def class_weights(problem: Problem) -> jax.Array:
  """(C, N), the weights of the mean over the codes of each class."""
  num_classes, per_class = problem.codes.shape[:2]
  return _mean_weights(tuple(np.eye(num_classes, dtype=bool)), per_class)


def plan_of(problem: Problem) -> Any:
  """The plan of the logits of one code; leaves of params come first among its inputs."""
  request = problem.request
  arguments = problem.constants, problem.params, problem.inputs
  return plan_of_logits(request.function, *arguments, request.mask)


def plan_of_logits(
  function: Static, constants: PyTree, params: PyTree, inputs: Any, mask: tuple[bool, ...]
) -> Any:
  """The plan of the logits of one example; arrays may be abstract."""
  labels = jax.ShapeDtypeStruct((inputs.shape[0],), jnp.int32)
  batch = jax.ShapeDtypeStruct(inputs.shape, inputs.dtype), labels
  frozen = (False,) * len(constants)
  return passes.plan_of(_Values(function), mask + frozen, (params, constants), batch)


@partial(jax.jit, static_argnums=0)
def _scores(
  loss: PerExampleLoss,
  logits: jax.Array,
  labels: jax.Array,
  forget: jax.Array,
  remain: jax.Array,
  params: PyTree,
) -> CodeScores:
  labels = jnp.asarray(labels)
  losses, finite = loss(logits, labels), jnp.all(jnp.isfinite(logits)) & _trees.all_finite(params)
  scores = retain_and_forget(logits, labels, forget, remain)
  retain_accuracy, forget_error = (jnp.where(finite, score, jnp.nan) for score in scores)

  def mean_loss(classes: jax.Array) -> jax.Array:
    side = classes[labels]
    return jnp.sum(jnp.where(side, losses, 0)) / jnp.sum(side, dtype=losses.dtype)

  return CodeScores(retain_accuracy, forget_error, mean_loss(forget) - mean_loss(remain))


@partial(jax.jit, static_argnums=7)
def _predict(
  before: jax.Array,
  after: jax.Array,
  weights: jax.Array,
  accuracy: jax.Array,
  spread: jax.Array,
  forget: jax.Array,
  remain: jax.Array,
  head_edited: bool,
) -> Predicted:
  """Predict from the judges' logits (C, J, C) before and after; NaN if they are no good."""
  if head_edited:
    after = jnp.where(forget, -jnp.inf, after)
  both = learning.margins(before), learning.margins(after)
  good = learning.calibrated(both[0], weights, accuracy, spread)
  found = learning.predict(*both, weights, accuracy, spread, forget, remain)
  return Predicted(*(jnp.where(good, value, jnp.nan) for value in found))


@partial(jax.jit, static_argnums=1)
def _mean_weights(groups: tuple[jax.Array, ...], per_class: int) -> jax.Array:
  """Groups of classes, (C,) bool each -> (G, C * K) weights of a mean over each group's codes."""
  chosen = jnp.repeat(jnp.stack(groups), per_class, axis=1).astype(float)
  return chosen / jnp.maximum(jnp.sum(chosen, axis=1, keepdims=True), 1)


def _is_split(codes: Any) -> bool:
  """Whether codes are split over axes of an explicit mesh, which no loop can cut."""
  return any(jax.typeof(codes).sharding.spec)
