"""Project the forgotten classes out of what the kernels write: closed form, weights only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from mnemonic_jax import _checks, _functions, _trees
from mnemonic_jax._types import LogitsFn
from mnemonic_jax.methods import distilling, network, places, search
from mnemonic_jax.methods.drop_row import drop_program
from mnemonic_jax.methods.problem import Problem, plan_of_logits
from mnemonic_jax.methods.protocol import Info, method

PyTree = Any
_DEEPEST = 8  # that a search tries
_CHEAP = 0.005  # predicted A_R that a deeper cut may cost
# Without judges: the deepest that cost no accuracy on every set tried. On digits depth 1 costs 6
# points (experiments/README.md).
_RECALLED_DEPTH = 0
_CODES_TO_HEAL = 8  # a class
_OPTIMIZER = optax.chain(optax.clip_by_global_norm(2.0), optax.sgd(0.002, momentum=0.9))
_SHIFT = 16  # pictures move by 1/16 of their side
_static: Any = partial(dataclasses.field, metadata={"static": True})


@method
@dataclasses.dataclass(frozen=True)
class Projection:
  """Cut the forgotten classes out of what the kernels write, then drop their rows of the head.

  At each site (a hidden layer's pre-activation, the sum of a residual block, a residual stream), in
  the order of the data, with D and W of the codes' mean array there (`directions.cut`):

      what a kernel writes  <-  (1 - D W) what it writes

  by its kernel, and its bias or BatchNorm's offset. A forgotten class's mean moves to that of the
  kept classes; kept judges, or kept codes where there are none, stay nearly where they are. Many
  of them show how a class spreads, and cost less accuracy than its mean alone. Codes are read
  again after each cut.

  Guarantees:
    No strength to choose. Running statistics, scales and all other leaves stay as they are. The
    edited model gives, as a plain function, the arrays that the pass has seen.

  Edge cases:
    a mask without a class, or codes that do not tell the class: nothing changes.
    fewer channels than directions (rank D = F), or a group of a grouped convolution that is so
      narrow: it is not cut, and `info["cut"]` says so.
    a kernel that several operations read, or that is normalised on its way: not edited; see
      `explain_projection`.
    without the row dropped, or where it cannot be, the head's kernel loses the class in what it
      reads, by D and W of the model as it was.

  Attributes:
    depth: how many sites, counted from the head; 0 is the head alone. None: searched. With judges
      the deepest of 0 to 8 whose predicted A_R is within 0.5 points of depth 0's; without, or
      where judges cannot be relied on (`learning.calibrated`), 0.
    sites: names of sites to cut instead (`explain_projection` lists them).
    drop_row: drop the rows as `DropRow` does, as the last step.
    heal: before that, how many steps of distilling the model as it was: the mean KL divergence of
      its kept logits from those of the edited model, on batches of 128 of the recalled codes of
      kept classes (8 a class at least), by SGD (0.002, momentum 0.9, gradient norm at most 2). The
      leaves that the model uses from the first site on are trained, in evaluation mode. 150 is
      enough where any is. 0: none. `forget` alone takes it.

  >>> codes = jax.random.normal(jax.random.key(0), (3, 1, 8))
  >>> params = {"hidden": jnp.eye(8), "output": codes[:, 0].T, "bias": jnp.zeros(3)}
  >>> model = lambda p, x: jnp.tanh(x @ p["hidden"]) @ p["output"] + p["bias"]
  >>> result = mj.forget(model, params, codes, [0], method=Projection(depth=1))
  >>> result.info["rank"], result.code_forget_error
  (array([1], dtype=int32), 1.0)

  Source: this project. DAMP (Hatami, Aalishah, Monosov, 2026, arXiv 2604.15166) projects what
  kernels read, orthogonally, by prototypes of real data.
  """

  depth: int | None = _static(default=None)
  sites: tuple[str, ...] = _static(default=())
  drop_row: bool = _static(default=True)
  heal: int = _static(default=0)

  def __post_init__(self) -> None:
    names = self.sites
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
      raise TypeError(f"sites: got {names!r}; expected a tuple of names of sites.")
    object.__setattr__(self, "sites", tuple(names))
    if not isinstance(self.drop_row, bool):
      raise TypeError(f"drop_row: got {self.drop_row!r}; expected True or False.")
    if self.depth is not None and self.sites:
      raise ValueError(
        f"depth: got {self.depth} with sites {self.sites}; expected one of them. depth counts "
        "sites from the head, sites names them."
      )
    if self.depth is not None:
      object.__setattr__(self, "depth", _checks.require_size("depth", self.depth, 0))
    object.__setattr__(self, "heal", _checks.require_size("heal", self.heal, 0))
    if self.heal and self.depth == 0:
      raise ValueError(
        f"heal: got {self.heal} with depth=0, which cuts nothing below the head, so that there is "
        "nothing to heal. Use a larger depth, or leave heal out."
      )

  @property
  def to_search(self) -> tuple[str, ...]:
    """The settings that a search chooses."""
    return ("depth",) if self.depth is None and not self.sites else ()

  @property
  def steps(self) -> int:
    """How many steps healing takes."""
    return self.heal

  @property
  def learns_from(self) -> int:
    """How many recalled codes a class it needs."""
    return _CODES_TO_HEAL if self.heal else 0

  def step(self, problem: Problem) -> tuple[PyTree, Info]:
    """Forget; `info` holds the "rank" of D at each site (S,), and the share "cut" of its groups.

    Both are 0 where nothing was cut. "margin": whether the row is dropped and a forgotten class is
    below the kept ones for certain.

    A search adds the "method", and A_R (without the row dropped, E_F too) as predicted for depth 0,
    1, ... ("curve_...").
    """
    method, curve = self.resolved(problem)
    outline = method._outline(problem)
    params, info, _ = method._run(problem, "drop" if self.drop_row else "cut")
    found = {"method": method} if self.to_search else {}
    return params, {**info, **curve, **found, "margin": method._margin(outline)}

  def resolved(self, problem: Problem) -> tuple[Projection, Info]:
    """Choose the depth where it is searched; also what was foreseen of each that was tried."""
    outline = self._outline(problem)
    if not self.to_search:
      return self, {}
    head = "drop" if self.drop_row else "cut"
    apply = lambda depth: project_program(self.sites, head, problem, np.int32(depth))[0]
    depth, curve = self._searched(problem, outline.depths, apply)
    if self.heal and not depth:
      raise ValueError(
        f"heal: got {self.heal}, but the search takes depth 0, which cuts nothing below the head: "
        "there is nothing to heal. Pass a depth too, such as 1, or leave heal out."
      )
    return dataclasses.replace(self, depth=depth), curve

  def init(self, problem: Problem) -> distilling.State:
    """Cut, and be ready to heal; the head is left for the end where its row is dropped."""
    distilling.require_recalled(problem, self.learns_from, f"Projection(heal={self.heal})")
    self._outline(problem)
    params, _, _ = self._run(problem, "leave" if self.drop_row else "cut")
    trained = _trained(self.sites, problem, np.int32(self.depth or 0))
    return distilling.start(problem, params, trained, _OPTIMIZER, self._identity(problem))

  def belongs(self, problem: Problem, state: distilling.State) -> bool:
    """Whether a state is of this request."""
    return distilling.same(state.request, self._identity(problem))

  def _identity(self, problem: Problem) -> jax.Array:
    return distilling.identity(problem, (self.depth, self.sites, self.drop_row, self.heal))

  def advance(self, problem: Problem, state: distilling.State) -> distilling.State:
    """Heal by one step."""

    def loss(params: PyTree, statistics: Any, inputs: jax.Array) -> tuple[jax.Array, Any]:
      teacher = distilling.logits_of(problem, problem.params, inputs)
      student = distilling.logits_of(problem, params, inputs)
      return distilling.divergence(teacher, student, problem.remain), statistics

    return distilling.advanced(problem, state, loss, _OPTIMIZER, _SHIFT)

  def finish(self, problem: Problem, state: distilling.State) -> tuple[PyTree, Info]:
    """Drop the row of what has healed; `info` as of `step`."""
    outline, params = self._outline(problem), distilling.whole(problem, state.leaves)
    _, info, _ = self._run(problem, "leave" if self.drop_row else "cut")
    if self.drop_row:
      params = drop_program(dataclasses.replace(problem, params=params))[0]
    return params, {**info, "margin": self._margin(outline)}

  def _outline(self, problem: Problem) -> network.Outline:
    """What is known of the model before anything is computed; refuses what it cannot do."""
    head = "drop" if self.drop_row else "cut"
    outline: network.Outline
    outline = project_program.eval_shape(self.sites, head, problem, np.int32(0))[2]
    if (self.depth or 0) > outline.depths:
      raise ValueError(
        f"depth: got {self.depth}; this model has {outline.depths} sites. "
        "mnemonic_jax.explain_projection lists them."
      )
    if self.drop_row:
      outline.require_margin(problem.remain)
    return outline

  def _run(self, problem: Problem, head: str) -> tuple[PyTree, Info, network.Outline]:
    return project_program(self.sites, head, problem, np.int32(self.depth or 0))

  def _margin(self, outline: network.Outline) -> Any:
    return np.bool_(self.drop_row and outline.has_bias)

  def _searched(
    self, problem: Problem, depths: int, apply: Callable[[Any], PyTree]
  ) -> tuple[int, dict[str, np.ndarray]]:
    """The depth to take, and what judges foresee of each that was tried."""
    if problem.judges is None and self.drop_row:
      return min(_RECALLED_DEPTH, depths), {}
    tried = np.arange(min(_DEEPEST, depths) + 1, dtype=np.int32)
    if not self.drop_row:
      search.require_judges(problem, "depth")
      return search.best(problem, "depth", tried, apply, tried)
    found = search.predictions(problem, tried, apply)
    retain = np.asarray(found.retain_accuracy, np.float64)
    curve = {"curve_retain_accuracy": retain}
    cheap = np.flatnonzero(retain >= retain[0] - _CHEAP)  # none where they are NaN
    return int(cheap.max(initial=0)), curve


@partial(jax.jit, static_argnums=(0, 1))
def project_program(
  named: tuple[str, ...], head: str, problem: Problem, depth: Any
) -> tuple[PyTree, Info, network.Outline]:
  """Project at the sites that are named, else up to a depth: one program for all depths."""
  model = network.look(problem)
  active = model.named(named) if named else model.at_depth(depth)
  params, found = network.edit(problem, model, active, head=head, bypassed=bool(named))
  return params, found._asdict(), model.outline


@partial(jax.jit, static_argnums=0)
def _trained(named: tuple[str, ...], problem: Problem, depth: Any) -> list[jax.Array]:
  """What healing trains: bools for each leaf."""
  model = network.look(problem)
  return model.used_from(model.named(named) if named else model.at_depth(depth), problem.params)


@dataclasses.dataclass(frozen=True)
class ProjectionPlan:
  """What `Projection` can edit in a model; prints as a table.

  Attributes:
    sites: from the input to the head.
    head: the path of the head's kernel, "" where the row cannot be dropped.
    head_reason: why it cannot, else "".
    not_edited: the dotted path of each kernel that no site reaches -> why.

  >>> str(ProjectionPlan((), "head.kernel", "", {"tied": "used more than once"})).splitlines()[-1]
  'tied                not edited: used more than once'
  """

  sites: tuple[network.Site, ...]
  head: str
  head_reason: str
  not_edited: Mapping[str, str]

  def __str__(self) -> str:
    rows = [("site", "depth", "kernels")]
    rows += [
      (s.name, "-" if s.depth is None else str(s.depth), ", ".join(s.kernels)) for s in self.sites
    ]
    rows.append((self.head or "(head)", "0", self.head_reason or "the row is dropped"))
    rows += [(path, "", f"not edited: {why}") for path, why in self.not_edited.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def explain_projection(
  logits_fn: LogitsFn, params: PyTree, inputs: jax.Array, *, mask: PyTree = None
) -> ProjectionPlan:
  """Tell which sites a `Projection` can cut, which kernels write there, and what it cannot edit.

  Args:
    logits_fn: pure function (params, inputs) -> (N, C) logits, in evaluation mode.
    params, inputs: the params and a batch (N, *shape); arrays may be `jax.ShapeDtypeStruct`s,
      because nothing is computed.
    mask: a tree prefix of bools; False leaves a leaf as it is.

  >>> def logits_fn(p, x):
  ...   return jax.numpy.tanh(x @ p["hidden"] + p["bias"]) @ p["output"]
  >>> shaped = lambda *shape: jax.ShapeDtypeStruct(shape, "float32")
  >>> params = {"hidden": shaped(4, 3), "bias": shaped(3), "output": shaped(3, 2)}
  >>> print(explain_projection(logits_fn, params, shaped(8, 4)))
  site    depth  kernels
  hidden  1      hidden
  output  0      the row is dropped
  """
  function, constants = _functions.split(logits_fn)
  kept = _trees.mask_leaves(mask, params)
  planned = plan_of_logits(function, constants, params, inputs, kept)
  model = network.of_plan(planned, params)
  paths = list(_trees.by_path(params))
  edited = {leaf for site in places.known(model.places) for leaf in site.leaves}
  edited |= {model.head.kernel.leaf} if model.head else set()
  reasons: dict[str, str] = {}
  for use in planned.uses():
    for leaf in sorted(use.leaves - edited):
      if leaf < len(paths) and len(jax.tree.leaves(params)[leaf].shape) > 1:
        reasons.setdefault(paths[leaf], use.reason or "what it writes does not end in one array")
  for path, leaf, may in zip(paths, jax.tree.leaves(params), kept, strict=True):
    if not may and len(leaf.shape) > 1:
      reasons[path] = "masked"
  head = paths[model.head.kernel.leaf] if model.head else ""
  return ProjectionPlan(model.sites, head, model.why, reasons)
