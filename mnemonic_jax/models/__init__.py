"""Models: Flax NNX modules, turned at once into plain dict params and pure functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from mnemonic_jax import _mesh
from mnemonic_jax._functions import Bound
from mnemonic_jax.models import text_head
from mnemonic_jax.models.mlp import MLP
from mnemonic_jax.models.resnet import ResNet
from mnemonic_jax.models.staged import pooled as pooled
from mnemonic_jax.models.swin import Swin
from mnemonic_jax.models.vit import ViT

PyTree = Any


class Model(NamedTuple):
  """A model as pure functions on nested dicts of arrays.

  Attributes:
    init: key -> (params, model_state); params may be perturbed, model_state holds the rest (running statistics).
    apply: (params, model_state, inputs, train) -> (logits, model_state).
    features: (params, model_state, inputs) -> (N, F), what the last layer sees, in evaluation mode.
    stages: (params, model_state, inputs) -> the output of each stage by name, (N, ..., F), in evaluation mode, and
      "features" (N, F). Under jit, a stage that nobody reads costs nothing. `pooled` takes their means over positions.
    head: keys of the last layer in params.
    layer_axis: the layer axis of params whose blocks are scanned, a tree prefix as `forgetting.forget` takes it, so that
      a scanned and an unrolled model forget identically; None where no param is stacked.
  """

  init: Callable[[jax.Array], tuple[PyTree, PyTree]]
  apply: Callable[[PyTree, PyTree, jax.Array, bool], tuple[jax.Array, PyTree]]
  features: Callable[[PyTree, PyTree, jax.Array], jax.Array]
  stages: Callable[[PyTree, PyTree, jax.Array], dict[str, jax.Array]]
  head: tuple[str, ...]
  layer_axis: PyTree = None

  def logits_fn(self, model_state: PyTree) -> Bound:
    """Bind a model state: (params, inputs) -> logits (N, C) in evaluation mode, as the core takes it.

    For the same state arrays the functions are equal and hash alike. Compiled programs take the
    state as an argument, so they do not keep it alive and serve another state too.
    """
    return Bound(_InEvaluation(self.apply), model_state)


@dataclasses.dataclass(frozen=True)
class _InEvaluation:
  """(model_state, params, inputs) -> logits, for `Bound`."""

  apply: Callable[..., tuple[jax.Array, PyTree]]

  def __call__(self, model_state: PyTree, params: PyTree, inputs: jax.Array) -> jax.Array:
    return self.apply(params, model_state, inputs, False)[0]


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
# The models that an option is for.
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
  """Make the model `name` of `NAMES` for inputs of `shape`; an option that it does not have is ignored.

  Args:
    name: "mlp" (one hidden layer), a ResNet ("_small": 3x3 stem, for pictures of 32 x 32), "vit_b16"..., "swin_t".
    shape: of one input, (H, W, C); of any rank for the MLP.
    hidden: units of the MLP.
    width: channels of a ResNet's first stage.
    pool: "token" or "mean", what a ViT's head reads.
    scan: a ViT's blocks are one, "blocks", with params stacked along a leading axis.
    remat: a transformer's blocks compute their inner values again in the backward pass.
    text: (num_classes, E) vectors, one for each class: the head scores against them (`TextHead`), and they are part of
      model_state. None: a linear head.
    dtype: to compute in, bfloat16 for example; params and running statistics are float32.

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
  make_module = _module_maker(name, shape, num_classes, hidden, width, pool, scan, remat, dtype)
  if text is not None:
    make_module = text_head.attach(make_module, head, text, dtype=dtype)
  return functional(
    make_module, head=(head,), stacked=("blocks",) if scan and name in _VITS else ()
  )


def _module_maker(
  name: str,
  shape: Sequence[int],
  num_classes: int,
  hidden: int,
  width: int,
  pool: str,
  scan: bool,
  remat: bool,
  dtype: Any,
) -> Callable[[nnx.Rngs], Any]:
  """Make the module of a name, with a linear head."""
  if name == "mlp":
    return lambda rngs: MLP(int(np.prod(shape)), hidden, num_classes, dtype=dtype, rngs=rngs)
  *image, channels = shape
  settings = {"channels": channels, "dtype": dtype}
  if name in _RESNETS:
    settings |= {"width": width, **_RESNETS[name]}
    return lambda rngs: ResNet(num_classes=num_classes, **settings, rngs=rngs)
  settings |= {"image": tuple(image), "remat": remat}
  if name in _VITS:
    size, patch = _VITS[name]
    return lambda rngs: ViT(
      size, num_classes, patch=patch, pool=pool, scan=scan, **settings, rngs=rngs
    )
  return lambda rngs: Swin(num_classes, **settings, rngs=rngs)


def functional(
  make_module: Callable[[nnx.Rngs], Any], head: tuple[str, ...], stacked: Sequence[str] = ()
) -> Model:
  """Turn an NNX module with methods `stages`, `features` and `__call__` into a `Model`.

  `stacked` names its submodules whose params have a leading axis of layers.
  """
  graph, *shapes = _split(nnx.eval_shape(lambda: make_module(nnx.Rngs(0))))
  layer_axis = (
    {name: 0 if name in stacked else None for name in nnx.to_pure_dict(shapes[0])}
    if stacked
    else None
  )

  @jax.jit
  def init(key: jax.Array) -> tuple[PyTree, PyTree]:
    _, params, model_state = _split(make_module(nnx.Rngs(key)))
    return nnx.to_pure_dict(params), nnx.to_pure_dict(model_state)

  def bound(params: PyTree, model_state: PyTree, train: bool) -> Any:
    params = {name: x if name in stacked else _mesh.gathered(x) for name, x in params.items()}
    states = [jax.tree.map(lambda x: x, shape) for shape in shapes]
    for state, values in zip(states, (params, model_state), strict=True):
      nnx.replace_by_pure_dict(state, values)
    module = nnx.merge(graph, *states)
    if train:
      module.train()
    else:
      module.eval()
    return module

  def apply(
    params: PyTree, model_state: PyTree, inputs: jax.Array, train: bool
  ) -> tuple[jax.Array, PyTree]:
    module = bound(params, model_state, train)
    logits = module(inputs)
    return logits, nnx.to_pure_dict(_split(module)[2])

  def features(params: PyTree, model_state: PyTree, inputs: jax.Array) -> jax.Array:
    return bound(params, model_state, False).features(inputs)

  def stages(params: PyTree, model_state: PyTree, inputs: jax.Array) -> dict[str, jax.Array]:
    return bound(params, model_state, False).stages(inputs)

  return Model(init, apply, features, stages, head, layer_axis)


def _split(module: Any) -> tuple[Any, Any, Any]:
  """Graph, params, and all other state of an NNX module."""
  parts: Any = nnx.split(module, nnx.Param, ...)
  return parts
