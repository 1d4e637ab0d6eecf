"""The door to forgetting: one resolved request, run by any method."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax import _checks
from mnemonic_jax._types import LogitsFn, PerExampleLoss
from mnemonic_jax.fisher import Execution
from mnemonic_jax.learning import LearnedCodes, Predicted
from mnemonic_jax.methods.drop_row import DropRow
from mnemonic_jax.methods.problem import Problem
from mnemonic_jax.methods.projection import Projection
from mnemonic_jax.methods.protocol import (
  Method,
  OneShot,
  Stepwise,
  require_method,
  settings,
  steps_of,
)
from mnemonic_jax.methods.request import all_finite, check_values, resolve, sides_of

PyTree = Any


class Prediction(NamedTuple):
  """A_R and E_F on data, as judges foresee them, in [0, 1].

  Where nothing can be foreseen they are None; NaN where they are arrays, as of `forget_step`.
  """

  retain_accuracy: Any
  forget_error: Any

  @staticmethod
  def of(found: Predicted, certain: Any) -> Prediction:
    """What judges foresee; the error is 1 where a forgotten class is below the kept ones."""
    error = found.forget_error
    return Prediction(found.retain_accuracy, jnp.where(certain & ~jnp.isnan(error), 1.0, error))

  def plain(self) -> Prediction:
    """Numbers in place of arrays, None in place of NaN."""
    return Prediction(*(None if np.isnan(value) else float(value) for value in self))


@dataclasses.dataclass(frozen=True)
class ForgetResult:
  """What `forget` returns.

  Attributes:
    params: the forgotten params; structure, shapes, dtypes and shardings of the params given.
    method: the method, its numbers resolved.
    code_retain_accuracy: accuracy on the codes of the kept classes afterwards, in [0, 1]; None
      where the codes are only a shape.
    code_forget_error: error on the codes of the forgotten classes afterwards; likewise.
    predicted: A_R and E_F on data as judges foresee them; None without judges.
    info: what the method says of itself, as plain numbers and NumPy arrays.
    seconds: wall-clock seconds: "compile" (tracing too), "method" (without it), "total".
  """

  params: PyTree
  method: Method
  code_retain_accuracy: float | None
  code_forget_error: float | None
  info: Mapping[str, Any]
  seconds: Mapping[str, float]
  predicted: Prediction | None = None


class ForgetInfo(NamedTuple):
  """What `forget_step` found."""

  method: Method  # its numbers resolved
  code_retain_accuracy: jax.Array  # () in [0, 1], on the codes, after forgetting
  code_forget_error: jax.Array  # ()
  info: dict[str, Any]  # what the method says of itself, arrays
  predicted: Prediction | None = None  # scalar arrays; None without judges


def forget(
  logits_fn: LogitsFn,
  params: PyTree,
  codes: jax.Array | LearnedCodes,
  classes: Iterable[int],
  *,
  method: Method | None = None,
  loss: PerExampleLoss | None = None,
  forgotten: Iterable[int] = (),
  mask: PyTree = None,
  layer_axis: PyTree = None,
  precision: str | None = "highest",
  execution: Execution | None = None,
  kept: Iterable[tuple[Any, Any]] | None = None,
  progress: Callable[[int, int], None] | None = None,
  state: PyTree = None,
  on_state: Callable[[PyTree], None] | None = None,
) -> ForgetResult:
  """Forget classes from their mnemonic codes alone.

  Guarantees:
    `params` is not modified. The same arguments give the same result on any device count, up to
    rounding. Another class or another strength compiles nothing again; nor does another state of
    the model, if `logits_fn` carries it as `Model.logits_fn` and `jax.tree_util.Partial` do.

  Edge cases:
    a loss of the caller's own must keep its gradient for confident codes: float32
      logsumexp(l) - l_y has a gradient of exactly 0 at a margin of 17; see
      `losses.softmax_cross_entropy`.
    codes that mean nothing to the model (kept ones classified at chance): a warning.

  Args:
    logits_fn: pure function (params, inputs) -> (N, C) logits, in evaluation mode.
    params: a tree of floating arrays: what may be changed.
    codes: (C, K, *shape), floating: those that the model was trained with; or `LearnedCodes`. A
      `jax.ShapeDtypeStruct` is enough for `DropRow`, which reads none.
    classes: the classes to forget, integers in [0, C).
    method: how to forget, such as `Perturbation(lambda1=1e-3, lambda2=10.0)`. None, with learned
      codes: `Projection()`.
    loss: (logits, labels) -> (N,) losses; softmax cross-entropy if not given.
    forgotten: classes forgotten earlier, which belong to neither side.
    mask: a tree prefix of bools; False leaves a leaf as it is.
    layer_axis: a tree prefix of ints or None; the layer axis of stacked leaves.
    precision: matmul precision of Fishers and logits.
    execution: microbatch; changes rounding only.
    kept: yields (inputs, labels), examples of kept classes that join the recalled codes from which
      a method heals or learns anew: half of each batch. None: no example is read.
    progress: called as progress(done, of) after each step of a method that takes many.
    state: of such a method, to go on from, with the same result bit for bit; or its leaves, a list.
    on_state: called with each new state, a pytree of arrays that the caller may save.

  Returns:
    A `ForgetResult`.

  Raises:
    TypeError, ValueError: each names the argument, its value, what was expected and what to do.

  >>> codes = jax.random.uniform(jax.random.key(0), (3, 1, 8))  # 3 classes, one code of 8 numbers
  >>> kernel = codes[:, 0].T  # a linear model that knows its codes by heart
  >>> method = mj.Perturbation(lambda1=1.0, lambda2=10.0)
  >>> result = forget(lambda kernel, x: x @ kernel, kernel, codes, [0], method=method)
  >>> result.info["sign"], result.code_retain_accuracy, result.code_forget_error
  (-1, 1.0, 1.0)

  Source: Yamashita, Yamada, Shibata (2024), section 3.2.
  """
  started = time.perf_counter()
  method = _default(codes) if method is None else method
  require_method(method)
  if kept is not None and not steps_of(method):
    raise ValueError(
      f"kept: {method} reads no examples; expected None, or a method that does, such as "
      "mnemonic_jax.Projection(heal=150)."
    )
  codes, are_known = _stand_in(method, codes)
  for name, value in (("params", params), ("codes", codes), ("method", method)):
    if not _checks.is_concrete(value):
      raise TypeError(
        f"{name}: got traced values; forget looks at them. Inside jit, vmap or grad call "
        "forget_step."
      )
  with compile_seconds() as compiling:
    request = loss, mask, layer_axis, precision, execution
    sides = sides_of(codes, classes, forgotten)
    problem = resolve(logits_fn, params, codes, sides, *request, kept)
    check_values(problem, reads_codes=are_known)
    before, ready = compiling(), time.perf_counter()
    moved, info = _run(method, problem, progress, state, on_state)
    _require_like_params(method, problem.params, moved)
    scores = problem.scores(moved) if are_known else None
    finite = scores is None or np.isfinite(scores.retain_accuracy)
    if not (finite and bool(all_finite(moved))):
      numbers = ", ".join(f"{name}={value}" for name, value in settings(method).items())
      raise ValueError(
        f"method: {type(method).__name__}({numbers}) drives params or logits to NaN or inf, "
        "whatever it tries; use a smaller strength, or rate."
      )
    predicted = _foreseen(problem, moved, info)
    moved = jax.block_until_ready(jax.tree.map(_placed_like, moved, problem.params))
    end = time.perf_counter()
    seconds = {
      "compile": compiling(),
      "method": end - ready - (compiling() - before),
      "total": end - started,
    }
  info = {name: _plain(value) for name, value in info.items()}
  return ForgetResult(
    params=moved,
    method=info.pop("method", jax.tree.map(_plain, method)),
    code_retain_accuracy=None if scores is None else float(scores.retain_accuracy),
    code_forget_error=None if scores is None else float(scores.forget_error),
    predicted=predicted and predicted.plain(),
    info=info,
    seconds=seconds,
  )


def forget_step(
  logits_fn: LogitsFn,
  params: PyTree,
  codes: jax.Array | LearnedCodes,
  forget: jax.Array,
  remain: jax.Array,
  method: OneShot,
  *,
  loss: PerExampleLoss | None = None,
  mask: PyTree = None,
  layer_axis: PyTree = None,
  precision: str | None = "highest",
  execution: Execution | None = None,
) -> tuple[PyTree, ForgetInfo]:
  """Forget classes, traceably: the heart of `forget`, for use under `jit` and `vmap`.

  Class masks and the method's numbers are traced, so another class or another strength never
  recompiles; `vmap` over masks shares the per-example gradients between all of them.

  Edge cases:
    a class in neither mask was forgotten before: it counts on no side.
    a traced mask without any class: the params come back unchanged, and the accuracy of that side
      is NaN.
    traced values are not checked: NaN in params or codes gives NaN scores.

  Args:
    forget, remain: (C,) bool masks without a common class.
    method: one that is a single traceable step, such as `Perturbation` with both numbers.
    The other arguments are those of `forget`.

  Returns:
    (params, `ForgetInfo`). With judges it holds what they foresee, NaN where that is nothing.

  Raises:
    TypeError, ValueError: as `forget`, for what can be told without values.

  >>> codes = jax.random.uniform(jax.random.key(0), (3, 1, 8))
  >>> kernel, method = codes[:, 0].T, mj.Perturbation(1.0, 10.0)
  >>> step = lambda forget: forget_step(lambda w, x: x @ w, kernel, codes, forget, ~forget, method)
  >>> _, info = jax.jit(jax.vmap(step))(jnp.eye(3, dtype=bool))  # each class in turn, in one call
  >>> info.code_forget_error
  Array([1., 1., 1.], dtype=float32)

  Source: Yamashita, Yamada, Shibata (2024), section 3.2.
  """
  require_method(method, one_shot=True)
  request = loss, mask, layer_axis, precision, execution
  problem = resolve(logits_fn, params, codes, (forget, remain), *request)
  moved, info = method.step(problem)
  _require_like_params(method, problem.params, moved)
  scores = problem.scores(moved)
  found = scores.retain_accuracy, scores.forget_error
  predicted = _foreseen(problem, moved, info)
  return moved, ForgetInfo(info.pop("method", method), *found, info, predicted)


def _default(codes: jax.Array | LearnedCodes) -> Method:
  """The method for these codes."""
  if isinstance(codes, LearnedCodes):
    return Projection()
  raise ValueError(
    "method: got None with plain codes; expected learned ones, mnemonic_jax.learn_codes(key, "
    "logits_fn, params, batches, num_classes=C), or a method, such as "
    "mnemonic_jax.Perturbation(lambda1=1e-3, lambda2=10.0)."
  )


def _stand_in(method: Method, codes: Any) -> tuple[Any, bool]:
  """Codes, zeros in place of a shape; and whether they are known."""
  if not isinstance(codes, jax.ShapeDtypeStruct):
    return codes, True
  _checks.require_codes(codes)
  if not isinstance(method, DropRow):
    raise TypeError(
      f"codes: got {_checks.kind(codes)}; {type(method).__name__} reads codes. Expected an array "
      "(C, K, *shape), or mnemonic_jax.DropRow(), which needs their shape alone."
    )
  return jnp.zeros(codes.shape, codes.dtype), False


def _foreseen(problem: Problem, moved: PyTree, info: Mapping[str, Any]) -> Prediction | None:
  """What judges foresee of the params that a method returned, beside what it says of itself."""
  if problem.judges is None:
    return None
  return Prediction.of(problem.predicted(moved), info.get("margin", np.bool_(False)))


def _run(
  method: Method,
  problem: Problem,
  progress: Callable[[int, int], None] | None,
  state: PyTree,
  on_state: Callable[[PyTree], None] | None,
) -> tuple[PyTree, dict[str, Any]]:
  """Run a method of either kind, the one that takes many steps from `state` on."""
  run: Any = method
  found: dict[str, Any] = {}
  if steps_of(run) and hasattr(run, "to_search") and run.to_search:
    run, found = run.resolved(problem)
    found = {**found, "method": run}
  steps = steps_of(run)
  if state is not None and not steps:
    raise ValueError(f"state: {type(run).__name__} takes one step; expected None.")
  if not steps:
    params, info = run.step(problem)
    return params, {**info, **found}
  state = run.init(problem) if state is None else _require_state(run, problem, state)
  for done in range(int(state.done) + 1, steps + 1):
    state = _advance(run, problem, state)
    if on_state is not None:
      on_state(state)
    if progress is not None:
      progress(done, steps)
  params, info = run.finish(problem, state)
  return params, {**info, **found}


def _layout(tree: PyTree) -> PyTree:
  return jax.tree.map(lambda x: f"{jnp.result_type(x).name}{jnp.shape(x)}", tree)


def _require_like_params(method: Method, params: PyTree, moved: PyTree) -> None:
  """Refuse what a method returned if it is more than other weights."""
  if (found := _layout(moved)) != (wanted := _layout(params)):
    raise ValueError(
      f"method: {type(method).__name__} returned other params than it was given: {found}; expected "
      f"{wanted}. A method changes weights only."
    )


def _require_state(method: Stepwise, problem: Problem, state: PyTree) -> PyTree:
  """The state; refuse one of another structure, shape or dtype than the method's own."""
  belongs = getattr(method, "belongs", lambda *_: True)
  own = jax.eval_shape(method.init, problem)
  if isinstance(state, list) and len(state) == len(jax.tree.leaves(own)):
    state = jax.tree.unflatten(jax.tree.structure(own), state)
  wanted = _layout(own)
  if (found := _layout(state)) != wanted:
    raise ValueError(
      f"state: got {found}; expected a state that {type(method).__name__} made for these params: "
      f"{wanted}."
    )
  if not (0 <= int(state.done) <= method.steps and belongs(problem, state)):
    raise ValueError(
      f"state: it is of another request, {int(state.done)} of its steps done; expected one that "
      "the same call, with the same params, codes, classes and method, gave to on_state."
    )
  return state


_advance = jax.jit(lambda method, problem, state: method.advance(problem, state))


@contextmanager
def compile_seconds() -> Iterator[Callable[[], float]]:
  """Give a function that tells the seconds in which JAX has traced and compiled, on this thread.

  Spans inside others, a jit's in a jit's, count once.
  """
  spans: list[tuple[float, float]] = []
  thread = threading.get_ident()

  def listen(event: str, start_time: float, end_time: float, **_: Any) -> None:
    if event.startswith("/jax/core/compile") and threading.get_ident() == thread:
      spans.append((start_time, end_time))

  def total() -> float:
    seconds, until = 0.0, float("-inf")
    for start, end in sorted(spans):
      seconds += max(0.0, end - max(start, until))
      until = max(until, end)
    return seconds

  jax.monitoring.register_event_time_span_listener(listen)
  try:
    yield total
  finally:
    jax.monitoring.unregister_event_time_span_listener(listen)


def _placed_like(new: jax.Array, old: Any) -> Any:
  """Return `new` on the devices of `old`; a plain number that the mask left out stays one."""
  if not hasattr(old, "dtype"):
    return old
  return jax.device_put(new, old.sharding) if isinstance(old, jax.Array) else new


def _plain(value: Any) -> Any:
  """Return a number or array of a method as Python and NumPy have it."""
  if dataclasses.is_dataclass(value):
    return jax.tree.map(_plain, value)
  array = np.asarray(value)
  return array if array.ndim else array.item()
