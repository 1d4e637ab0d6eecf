"""Learn the last stages anew from recalled codes of the kept classes: the features go too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mnemonic_jax import _checks, _functions, _trees
from mnemonic_jax._types import LogitsFn
from mnemonic_jax.methods import distilling, network
from mnemonic_jax.methods.drop_row import drop_program
from mnemonic_jax.methods.problem import Problem, plan_of_logits
from mnemonic_jax.methods.protocol import Info, method

PyTree = Any
TrainFn = Callable[[PyTree, PyTree, jax.Array], tuple[jax.Array, PyTree]]
FoldFn = Callable[[PyTree, PyTree], PyTree]

_CODES = 64  # a class
_SHIFT = 8  # pictures move by 1/8 of their side
_WARM_UP, _MOMENTUM, _DECAY, _LARGEST_NORM = 0.2, 0.9, 5e-4, 5.0
_STATIC, _UNRECORDED = {"static": True}, {"recorded": False}


@method
@dataclasses.dataclass(frozen=True)
class Relearn:
  """Learn the last stages from fresh weights, then drop the forgotten classes' rows of the head.

      minimise KL(softmax of the model as it was || softmax of the new one), over kept logits

  on batches of 128 recalled codes of kept classes, flipped, shifted by up to 1/8 of their side and
  mixed in pairs. SGD with Nesterov momentum 0.9, weight decay 5e-4, a one-cycle rate with 20 % of
  warm-up, gradient norm at most 5. The head is kept, and so is all that comes before.

  Guarantees:
    No weight that is learned anew has ever seen the class. Running statistics stay as they are.

  Edge cases:
    without `train_fn` and `fold_fn`: trained in evaluation mode, which fresh weights under
      BatchNorm bear badly; `info["training_mode"]` says so.
    what the stages before tell of the class stays in them, and so is partly readable.

  Attributes:
    depth: how many stages. A stage starts at an array that feeds two or more kernels (the input of
      a ResNet's stage, what a transformer's attention reads); in a model with fewer than two of
      them, at a site of `explain_projection`. The first of all starts at the input.
    fresh: newly initialised params, of the structure and dtypes of `params`.
    steps: of SGD.
    rate: its largest.
    train_fn: (params, statistics, inputs) -> (logits, statistics), the model in training mode:
      `Model.train_fn`.
    fold_fn: (params, statistics) -> params that give, with the statistics of `logits_fn`, what the
      trained ones give with theirs: `Model.fold_fn`.
    statistics: those that the training starts with: the model state.

  >>> draw = lambda key: jax.random.normal(jax.random.key(key), (8, 8))
  >>> params = {"hidden": draw(1), "output": draw(2)[:, :3], "bias": jnp.zeros(3)}
  >>> model = lambda p, x: jnp.tanh(x @ p["hidden"]) @ p["output"] + p["bias"]
  >>> learned = mj.learn_codes(
  ...   jax.random.key(3), model, params, None, num_classes=3, shape=(8,), per_class=64)
  >>> fresh = {**params, "hidden": draw(4)}
  >>> mj.forget(model, params, learned, [0], method=Relearn(2, fresh, 20)).code_forget_error
  1.0

  Source: this project. EU-k (Goel et al., 2022, arXiv 2201.06640) learns the last layers anew from
  data; GKT (Chundawat et al., 2023, arXiv 2201.05629) and ISPF (Zhang et al., 2025, arXiv
  2412.13790) distil a fresh student without data.
  """

  depth: int = dataclasses.field(metadata=_STATIC)
  fresh: PyTree = dataclasses.field(metadata=_UNRECORDED)
  steps: int = dataclasses.field(metadata=_STATIC)
  rate: Any = 0.05
  train_fn: TrainFn | None = dataclasses.field(default=None, metadata=_STATIC | _UNRECORDED)
  fold_fn: FoldFn | None = dataclasses.field(default=None, metadata=_STATIC | _UNRECORDED)
  statistics: PyTree = dataclasses.field(default=None, metadata=_UNRECORDED)

  def __post_init__(self) -> None:
    for name in ("depth", "steps"):
      object.__setattr__(self, name, _checks.require_size(name, getattr(self, name), 1))
    functions = {"train_fn": self.train_fn, "fold_fn": self.fold_fn}
    given = [name for name, function in functions.items() if function is not None]
    _require_rate(self.rate)
    for name in given:
      _checks.require_callable(name, functions[name], "of (params, statistics, ...)")
    if len(given) == 1:
      raise ValueError(f"{given[0]}: got one of train_fn and fold_fn; expected both, or none.")
    if (self.statistics is None) != (self.train_fn is None):
      raise ValueError(
        f"statistics: got {_checks.kind(self.statistics)} with train_fn={self.train_fn}; expected "
        "both, or none."
      )

  @property
  def learns_from(self) -> int:
    """How many recalled codes a class it needs."""
    return _CODES

  def init(self, problem: Problem) -> distilling.State:
    """Put the fresh weights in."""
    distilling.require_recalled(problem, self.learns_from, "Relearn")
    network.look(problem).outline.require_margin(problem.remain)
    self._require_fresh(problem.params)
    trained = _renewed(self.depth, problem)
    params = _put(problem, self.fresh, trained)
    if _checks.is_concrete((problem, self.fresh)):
      self._require_values(problem, trained)
      self._require_functions(problem, params, trained)
    own = self._identity(problem)
    return distilling.start(problem, params, trained, self._optimizer, own, self.statistics)

  def belongs(self, problem: Problem, state: distilling.State) -> bool:
    """Whether a state is of this request."""
    return distilling.same(state.request, self._identity(problem))

  def _identity(self, problem: Problem) -> jax.Array:
    settings = self.depth, self.steps, float(self.rate)
    return distilling.identity(problem, settings, self.fresh)

  def advance(self, problem: Problem, state: distilling.State) -> distilling.State:
    """Do one step of SGD."""

    def loss(params: PyTree, statistics: Any, inputs: jax.Array) -> tuple[jax.Array, Any]:
      teacher = distilling.logits_of(problem, problem.params, inputs)
      if self.train_fn is None:
        student = distilling.logits_of(problem, params, inputs)
      else:
        student, statistics = self.train_fn(params, statistics, inputs)
        student = student.astype(_trees.at_least_float32(student.dtype))
      return distilling.divergence(teacher, student, problem.remain), statistics

    return distilling.advanced(problem, state, loss, self._optimizer, _SHIFT)

  def finish(self, problem: Problem, state: distilling.State) -> tuple[PyTree, Info]:
    """Fold the statistics into the weights, and drop the rows."""
    params = distilling.whole(problem, state.leaves)
    if self.fold_fn is not None:
      params = self.fold_fn(params, state.statistics)
    params, outline = drop_program(dataclasses.replace(problem, params=params))
    margin, training = np.bool_(outline.has_bias), np.bool_(self.train_fn is not None)
    return params, {"training_mode": training, "margin": margin}

  @property
  def _optimizer(self) -> Any:
    schedule = optax.cosine_onecycle_schedule(self.steps, self.rate, pct_start=_WARM_UP)
    return optax.chain(
      optax.clip_by_global_norm(_LARGEST_NORM),
      optax.add_decayed_weights(_DECAY),
      optax.sgd(schedule, momentum=_MOMENTUM, nesterov=True),
    )

  def _require_fresh(self, params: PyTree) -> None:
    layout = lambda tree: jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x).name), tree)
    if (found := layout(self.fresh)) != (wanted := layout(params)):
      raise ValueError(
        f"fresh: got {found}; expected params of the structure, shapes and dtypes of params: "
        f"{wanted}. Initialise the model again, with another key."
      )

  def _require_values(self, problem: Problem, trained: list[jax.Array]) -> None:
    """Refuse weights that are not fresh or finite, and a mask that leaves nothing to learn."""
    if not bool(_all_finite(self.fresh)):
      raise ValueError("fresh: got NaN or inf; expected finite params.")
    leaves = map(jax.tree.leaves, (self.fresh, problem.params))
    found = zip(*leaves, trained, problem.request.mask, strict=True)
    kernels = [(new, old, here) for new, old, here, may in found if may and old.ndim > 1]
    if not any(bool(np.any(here)) for _, _, here in kernels):
      raise ValueError(
        f"depth: no kernel lies behind the start of stage {self.depth} from the head, or the mask "
        "leaves them out; expected one that can be learned anew. Use a larger depth."
      )
    if all(bool(jnp.all((new == old) | ~here)) for new, old, here in kernels):
      raise ValueError("fresh: equals params; expected newly initialised weights: another key.")

  def _require_functions(self, problem: Problem, params: PyTree, trained: list[jax.Array]) -> None:
    """Run `train_fn` and `fold_fn` once; refuse them where they change what is not learned anew."""
    if self.train_fn is None or self.fold_fn is None:
      return
    try:
      logits, statistics = jax.jit(self.train_fn)(params, self.statistics, problem.inputs)
      shape = logits.shape
      folded = self.fold_fn(params, statistics)
      same = jax.tree.map(lambda new, old: new == old, folded, params)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
      raise ValueError(
        f"train_fn, fold_fn: fail on params, statistics and codes: {error}. Expected (params, "
        "statistics, inputs) -> (logits, statistics) and (params, statistics) -> params."
      ) from error
    layout = lambda tree: jax.tree.map(jnp.shape, tree)
    if shape != (len(problem.inputs), problem.request.num_classes):
      raise ValueError(f"train_fn: returned logits {shape} for inputs {problem.inputs.shape}.")
    if layout(statistics) != layout(self.statistics):
      raise ValueError("train_fn: returned statistics of another structure than it was given.")
    moved = zip(_trees.leaf_paths(params), jax.tree.leaves(same), trained, strict=True)
    pairs = zip(moved, problem.request.mask, strict=True)
    kept = [path for (path, equal, here), may in pairs if not jnp.all(equal | (here & may))]
    if kept:
      raise ValueError(
        f"train_fn: moves the statistics behind {', '.join(kept[:3])}, which are not learned anew; "
        "expected training mode only for what is: Model.train_fn(modules), with the modules that "
        "mnemonic_jax.methods.relearn.renewed tells."
      )


def _require_rate(rate: Any) -> None:
  if not _checks.is_concrete(rate):
    return
  number = isinstance(rate, (int, float, np.number, np.ndarray, jax.Array)) and np.ndim(rate) == 0
  if not number or isinstance(rate, bool) or not (np.isfinite(rate) and rate > 0):
    raise ValueError(f"rate: got {rate!r}; expected a positive finite number.")


_all_finite = jax.jit(_trees.all_finite)


def renewed(logits_fn: LogitsFn, params: PyTree, inputs: Any, depth: int) -> PyTree:
  """Tell which leaves `Relearn` of a depth learns anew: a tree like params, of bools.

  Arrays may be `jax.ShapeDtypeStruct`s, because nothing of the model is computed. A leaf of stacked
  layers has a bool for each of them.
  """
  function, constants = _functions.split(logits_fn)
  mask = _trees.mask_leaves(None, params)
  planned = plan_of_logits(function, constants, params, inputs, mask)
  return _trees.like(params, network.of_plan(planned, params).stage(depth, params))


def modules(which: PyTree) -> tuple[str, ...]:
  """Name the submodules of which `renewed` tells some leaf, those that need training mode.

  >>> modules({"stem": {"kernel": np.bool_(False)}, "stage": {"kernel": np.bool_(True)}})
  ('stage',)
  """
  return tuple(name for name, part in which.items() if any(map(np.any, jax.tree.leaves(part))))


@partial(jax.jit, static_argnums=0)
def _renewed(depth: int, problem: Problem) -> list[jax.Array]:
  """What is learned anew: bools for each leaf. A mask does not move where a stage starts."""
  leaves, request = jax.tree.leaves(problem.params), problem.request
  floating = tuple(jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in leaves)
  inputs = problem.inputs
  planned = plan_of_logits(request.function, problem.constants, problem.params, inputs, floating)
  return network.of_plan(planned, problem.params).stage(depth, problem.params)


def _put(problem: Problem, fresh: PyTree, trained: list[jax.Array]) -> PyTree:
  """The params, with fresh weights where they are learned anew."""
  old, treedef = _trees.flatten(problem.params)
  found = zip(old, jax.tree.leaves(fresh), trained, problem.request.mask, strict=True)
  put = lambda leaf, new, here, may_change: jnp.where(here, new, leaf) if may_change else leaf
  return treedef.unflatten([put(*one) for one in found])
