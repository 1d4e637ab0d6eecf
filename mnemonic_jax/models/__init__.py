"""Models: Flax NNX modules inside, plain dicts of params and pure functions outside."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from mnemonic_jax import _mesh
from mnemonic_jax._functions import Bound
from mnemonic_jax.models import batch_norm, text_head
from mnemonic_jax.models.mlp import MLP
from mnemonic_jax.models.resnet import ResNet, Statistics
from mnemonic_jax.models.staged import pooled as pooled
from mnemonic_jax.models.swin import Swin
from mnemonic_jax.models.vit import ViT

PyTree = Any


# Whether a model is in training mode, or the names of its submodules that are.
Mode = bool | tuple[str, ...]


class Model(NamedTuple):
  """A model as pure functions on nested dicts of arrays.

  Attributes:
    init: key -> (params, model_state). Training and forgetting change params; model_state holds
      everything else, such as running statistics.
    apply: (params, model_state, inputs, train) -> (logits, model_state). `train` is a bool, or the
      names of the submodules that are in training mode.
    features: (params, model_state, inputs) -> (N, F), the input of the last layer in evaluation
      mode.
    stages: (params, model_state, inputs) -> {name: (N, ..., F)}, the output of each stage in
      evaluation mode, and "features" (N, F). Under jit, unused stages cost nothing. `pooled`
      averages them over positions.
    head: the keys of the last layer in params.
    layer_axis: which axis of each leaf counts layers, as a tree prefix that `forget` takes, so that
      a scanned and an unrolled model forget identically. None if no leaf is stacked.
    statistics: (params, model_state, inputs) -> {name: (values (N, ..., F), mean (F,), variance
      (F,))}, what each BatchNorm reads in evaluation mode, and its running statistics. None for a
      model without BatchNorm.
    fold: (model_state, params, statistics) -> params; see `fold_fn`.
  """

  init: Callable[[jax.Array], tuple[PyTree, PyTree]]
  apply: Callable[[PyTree, PyTree, jax.Array, Mode], tuple[jax.Array, PyTree]]
  features: Callable[[PyTree, PyTree, jax.Array], jax.Array]
  stages: Callable[[PyTree, PyTree, jax.Array], dict[str, jax.Array]]
  head: tuple[str, ...]
  layer_axis: PyTree = None
  statistics: Callable[[PyTree, PyTree, jax.Array], Statistics] | None = None
  fold: Callable[[PyTree, PyTree, PyTree], PyTree] = lambda model_state, params, statistics: params

  def logits_fn(self, model_state: PyTree) -> Bound:
    """Bind a model state: (params, inputs) -> logits (N, C) in evaluation mode.

    For the same state arrays the functions are equal and hash alike. Compiled programs take the
    state as an argument, so they do not keep it alive and serve another state too.
    """
    return Bound(_InEvaluation(self.apply), model_state)

  def stages_fn(self, model_state: PyTree) -> Bound:
    """Bind a model state: (params, inputs) -> `stages`, as `mj.audit` and `mj.Subject` take it."""
    return Bound(_StateFirst(self.stages), model_state)

  def statistics_fn(self, model_state: PyTree) -> Bound | None:
    """Bind a model state: (params, inputs) -> `statistics`, as `learn_codes` takes it.

    None for a model without BatchNorm.
    """
    if self.statistics is None:
      return None
    return Bound(_StateFirst(self.statistics), model_state)

  def train_fn(self, modules: tuple[str, ...] | None = None) -> _InTraining:
    """Return (params, model_state, inputs) -> (logits, model_state), as `Relearn` takes it.

    modules: the names of those, among the keys of params, that are in training mode. None: all.
    """
    if isinstance(modules, str):
      raise TypeError(f"modules: got {modules!r}; expected a tuple of names, ({modules!r},).")
    return _InTraining(self.apply, True if modules is None else tuple(modules))

  def fold_fn(self, model_state: PyTree) -> Bound:
    """Return (params, statistics) -> params, as `Relearn` takes it.

    With `model_state` the result gives the logits that `params` give with `statistics`:

        scale' = scale sqrt((v + eps) / (v' + eps))
        bias'  = bias + (m - m') scale / sqrt(v' + eps)

    for each BatchNorm, m and v of `model_state`, m' and v' of `statistics`.
    """
    return Bound(self.fold, model_state)


@dataclasses.dataclass(frozen=True)
class _InEvaluation:
  """(model_state, params, inputs) -> logits, for `Bound`."""

  apply: Callable[..., tuple[jax.Array, PyTree]]

  def __call__(self, model_state: PyTree, params: PyTree, inputs: jax.Array) -> jax.Array:
    return self.apply(params, model_state, inputs, False)[0]


@dataclasses.dataclass(frozen=True)
class _InTraining:
  """(params, model_state, inputs) -> (logits, model_state) in training mode."""

  apply: Callable[..., tuple[jax.Array, PyTree]]
  mode: Mode

  def __call__(
    self, params: PyTree, model_state: PyTree, inputs: jax.Array
  ) -> tuple[jax.Array, PyTree]:
    return self.apply(params, model_state, inputs, self.mode)


@dataclasses.dataclass(frozen=True)
class _StateFirst:
  """(model_state, params, inputs) -> what a function of (params, model_state, inputs) returns."""

  function: Callable[[PyTree, PyTree, jax.Array], Any]

  def __call__(self, model_state: PyTree, params: PyTree, inputs: jax.Array) -> Any:
    return self.function(params, model_state, inputs)


_RESNETS: dict[str, dict[str, Any]] = {
  "resnet10_small": {"depths": (1, 1, 1, 1), "small_stem": True},
  "resnet18_small": {"depths": (2, 2, 2, 2), "small_stem": True},
  "resnet18": {"depths": (2, 2, 2, 2)},
  "resnet50": {"depths": (3, 4, 6, 3), "bottleneck": True},
  "resnext50_32x4d": {"depths": (3, 4, 6, 3), "bottleneck": True, "groups": 32, "group_width": 4},
}
# Name -> size and patch.
_VITS = {
  f"vit_{size}{patch}": (size, patch)
  for size, patch in (("ti", 16), ("s", 16), ("b", 16), ("l", 16), ("h", 14))
}
NAMES = ("mlp", *_RESNETS, *_VITS, "swin_t")
# Option -> the models that have it.
OPTIONS = {"scan": tuple(_VITS), "remat": (*_VITS, "swin_t")}


def make(
  name: str,
  *,
  shape: Sequence[int],
  num_classes: int,
  hidden: int = 1000,
  width: int = 64,
  pool: str = "token",
  scan: bool = False,
  remat: bool = False,
  text: np.ndarray | None = None,
  dtype: Any = None,
) -> Model:
  """Make one of the models in `NAMES` for inputs of `shape`. It ignores options of other models.

  Args:
    name: "mlp" (one hidden layer), a ResNet ("_small": with a 3x3 stem, for 32 x 32 images),
      "vit_b16" and the like, or "swin_t".
    shape: the shape of one input, (H, W, C); of any rank for the MLP.
    hidden: units of the MLP.
    width: channels of a ResNet's first stage.
    pool: what a ViT's head reads, "token" (the class token) or "mean" (over all tokens).
    scan: run a ViT's blocks in one `lax.scan`; their params are stacked in "blocks".
    remat: recompute the activations inside a transformer's block in the backward pass.
    text: (num_classes, E), one vector per class. The head then scores against these vectors
      (`TextHead`), which are part of model_state. None: a linear head.
    dtype: the dtype to compute in, such as bfloat16; params and running statistics stay float32.

  Raises:
    ValueError: an unknown name, or a shape that the model cannot take.

  >>> params, _ = make("mlp", shape=(8, 8, 1), num_classes=10, hidden=16).init(jax.random.key(0))
  >>> jax.tree.map(lambda leaf: leaf.shape, params)
  {'hidden': {'bias': (16,), 'kernel': (64, 16)}, 'output': {'bias': (10,), 'kernel': (16, 10)}}
  """
  if name not in NAMES:
    raise ValueError(f"model.name: got {name!r}; expected one of {', '.join(NAMES)}.")
  if name != "mlp" and len(shape) != 3:
    raise ValueError(f"shape: got {tuple(shape)}; {name} expects (height, width, channels).")
  head = "output" if name == "mlp" else "head"
  network = _network(name, shape, hidden=hidden, width=width, pool=pool, scan=scan, remat=remat)
  make_module = lambda rngs: network(num_classes=num_classes, dtype=dtype, rngs=rngs)
  if text is not None:
    make_module = text_head.attach(make_module, head, text, dtype=dtype)
  return functional(
    make_module, head=(head,), stacked=("blocks",) if scan and name in _VITS else ()
  )


def _network(
  name: str, shape: Sequence[int], *, hidden: int, width: int, pool: str, scan: bool, remat: bool
) -> Callable[..., nnx.Module]:
  """Return the class behind `name` with its settings filled in; it takes the rest by keyword."""
  if name == "mlp":
    return partial(MLP, int(np.prod(shape)), hidden)
  height, breadth, channels = shape
  if name in _RESNETS:
    return partial(ResNet, channels=channels, width=width, **_RESNETS[name])
  image = (height, breadth)
  if name in _VITS:
    size, patch = _VITS[name]
    more: dict[str, Any] = {"image": image, "channels": channels, "scan": scan, "remat": remat}
    return partial(ViT, size, patch=patch, pool=pool, **more)
  return partial(Swin, image=image, channels=channels, remat=remat)


def functional(
  make_module: Callable[[nnx.Rngs], Any], head: tuple[str, ...], stacked: Sequence[str] = ()
) -> Model:
  """Turn an NNX module with methods `stages`, `features` and `__call__` into a `Model`.

  A module with BatchNorm has a method `statistics` too; see `ResNet`.
  `stacked` names the submodules whose params have a leading axis of layers.
  """
  module = nnx.eval_shape(lambda: make_module(nnx.Rngs(0)))
  graph, *shapes = _split(module)
  layer_axis = (
    {name: 0 if name in stacked else None for name in nnx.to_pure_dict(shapes[0])}
    if stacked
    else None
  )

  @jax.jit
  def init(key: jax.Array) -> tuple[PyTree, PyTree]:
    _, params, model_state = _split(make_module(nnx.Rngs(key)))
    return nnx.to_pure_dict(params), nnx.to_pure_dict(model_state)

  def bound(params: PyTree, model_state: PyTree, train: Mode) -> Any:
    params = {name: x if name in stacked else _mesh.gathered(x) for name, x in params.items()}
    states = [jax.tree.map(lambda x: x, shape) for shape in shapes]
    for state, values in zip(states, (params, model_state), strict=True):
      nnx.replace_by_pure_dict(state, values)
    module = nnx.merge(graph, *states)
    if train is True:
      module.train()
    else:
      module.eval()
    for name in train if isinstance(train, tuple) else ():
      getattr(module, name).train()
    return module

  def apply(
    params: PyTree, model_state: PyTree, inputs: jax.Array, train: Mode
  ) -> tuple[jax.Array, PyTree]:
    module = bound(params, model_state, train)
    logits = module(inputs)
    return logits, nnx.to_pure_dict(_split(module)[2])

  def features(params: PyTree, model_state: PyTree, inputs: jax.Array) -> jax.Array:
    return bound(params, model_state, False).features(inputs)

  def stages(params: PyTree, model_state: PyTree, inputs: jax.Array) -> dict[str, jax.Array]:
    return bound(params, model_state, False).stages(inputs)

  def statistics(params: PyTree, model_state: PyTree, inputs: jax.Array) -> Statistics:
    found: Statistics = bound(params, model_state, False).statistics(inputs)
    return found

  def fold(model_state: PyTree, params: PyTree, statistics: PyTree) -> PyTree:
    return batch_norm.folded(module, params, model_state, statistics)

  of_batch_norm = statistics if hasattr(module, "statistics") else None
  return Model(init, apply, features, stages, head, layer_axis, of_batch_norm, fold)


def _split(module: Any) -> tuple[Any, Any, Any]:
  """Split an NNX module into graph, params and all other state."""
  parts: Any = nnx.split(module, nnx.Param, ...)
  return parts
