"""ResNets (He et al., 2016) and ResNeXts (Xie et al., 2017), with strides as in torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from mnemonic_jax.models.staged import Staged

# {name: (values (N, ..., F), mean (F,), variance (F,))}: what each BatchNorm reads and keeps.
Statistics = dict[str, tuple[jax.Array, jax.Array, jax.Array]]

_kernel_init = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def _conv(
  num_in: int,
  num_out: int,
  size: int,
  rngs: nnx.Rngs,
  *,
  stride: int = 1,
  groups: int = 1,
  dtype: Any,
) -> Any:
  return nnx.Conv(
    num_in,
    num_out,
    (size, size),
    stride,
    padding=((size // 2, size // 2),) * 2,  # "SAME" pads even sizes on one side
    feature_group_count=groups,
    use_bias=False,
    dtype=dtype,
    kernel_init=_kernel_init,
    rngs=rngs,
  )


def _norm(num: int, rngs: nnx.Rngs, *, dtype: Any) -> nnx.BatchNorm:
  return nnx.BatchNorm(num, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs)


def _normalized(
  module: nnx.Module, name: str, x: jax.Array, seen: Statistics | None, path: str = ""
) -> jax.Array:
  """Normalise x by the BatchNorm `name` of a module, and note in `seen` what it reads."""
  norm = getattr(module, name)
  if seen is not None:
    seen[path + name] = x, norm.mean[...], norm.var[...]
  return norm(x)


class _Block(nnx.Module):
  """A residual block, relu(x + f(x)); a 1x1 convolution projects x where f changes its shape."""

  def __init__(
    self, sizes: Sequence[tuple[int, int, int, int, int]], rngs: nnx.Rngs, *, dtype: Any
  ):
    """Take (in, out, kernel size, stride, groups) of each convolution as `sizes`."""
    self.depth = len(sizes)
    for index, (num_in, num_out, size, stride, groups) in enumerate(sizes, 1):
      setattr(
        self,
        f"conv{index}",
        _conv(num_in, num_out, size, rngs, stride=stride, groups=groups, dtype=dtype),
      )
      setattr(self, f"norm{index}", _norm(num_out, rngs, dtype=dtype))
    first, last, stride = sizes[0][0], sizes[-1][1], max(size[3] for size in sizes)
    self.projects = first != last or stride > 1
    if self.projects:
      self.shortcut = _conv(first, last, 1, rngs, stride=stride, dtype=dtype)
      self.shortcut_norm = _norm(last, rngs, dtype=dtype)

  def __call__(self, x: jax.Array, seen: Statistics | None = None, path: str = "") -> jax.Array:
    norm = lambda name, x: _normalized(self, name, x, seen, path)
    y = x
    for index in range(1, self.depth + 1):
      y = norm(f"norm{index}", getattr(self, f"conv{index}")(y))
      y = jax.nn.relu(y) if index < self.depth else y
    shortcut = norm("shortcut_norm", self.shortcut(x)) if self.projects else x
    return jax.nn.relu(shortcut + y)


class ResNet(Staged):
  """A ResNet or ResNeXt with stages "stem" and "stage1" to "stage4".

  Args:
    depths: the number of blocks in each stage.
    bottleneck: True: a block is 1x1, 3x3 and 1x1 convolutions and ends four times as wide. False:
      it is two 3x3 convolutions.
    groups, group_width: groups of a bottleneck's 3x3 convolution and channels per group; (1, 64)
      makes a ResNet, (32, 4) a ResNeXt.
    width: channels of the first stage; each further stage has twice as many.
    small_stem: True: the stem is one 3x3 convolution, for 32 x 32 images. False: it is 7x7 with
      stride 2, followed by a 3x3 max pool.
  """

  def __init__(
    self,
    depths: Sequence[int],
    num_classes: int,
    *,
    channels: int = 3,
    bottleneck: bool = False,
    groups: int = 1,
    group_width: int = 64,
    width: int = 64,
    small_stem: bool = False,
    dtype: Any = None,
    rngs: nnx.Rngs,
  ):
    if bottleneck and width * group_width % 64:
      raise ValueError(
        f"width: got {width}; expected a multiple of {64 // group_width} for {groups} groups."
      )
    self.small_stem = small_stem
    size, stride = (3, 1) if small_stem else (7, 2)
    self.stem = _conv(channels, width, size, rngs, stride=stride, dtype=dtype)
    self.stem_norm = _norm(width, rngs, dtype=dtype)
    self.depths, num_in = tuple(depths), width
    for stage, depth in enumerate(depths):
      features = width * 2**stage
      for block in range(depth):
        stride = 2 if stage and not block else 1
        if bottleneck:
          inner, out = features * group_width * groups // 64, 4 * features
          sizes = [
            (num_in, inner, 1, 1, 1),
            (inner, inner, 3, stride, groups),
            (inner, out, 1, 1, 1),
          ]
        else:
          out = features
          sizes = [(num_in, out, 3, stride, 1), (out, out, 3, 1, 1)]
        setattr(self, f"stage{stage + 1}_block{block + 1}", _Block(sizes, rngs, dtype=dtype))
        num_in = out
    self.head = nnx.Linear(num_in, num_classes, dtype=dtype, rngs=rngs)

  def statistics(self, inputs: jax.Array) -> Statistics:
    """Return {name: (inputs (N, H, W, F), running mean (F,), running variance (F,))}."""
    seen: Statistics = {}
    self.stages(inputs, seen)
    return seen

  def stages(self, inputs: jax.Array, seen: Statistics | None = None) -> dict[str, jax.Array]:
    """See `Staged`; `seen` takes what each BatchNorm reads."""
    x = jax.nn.relu(_normalized(self, "stem_norm", self.stem(inputs), seen))
    outputs = {"stem": x}
    if not self.small_stem:
      x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    for stage, depth in enumerate(self.depths, 1):
      for block in range(1, depth + 1):
        name = f"stage{stage}_block{block}"
        x = getattr(self, name)(x, seen, name + ".")
      outputs[f"stage{stage}"] = x
    return outputs | {"features": x.mean((1, 2))}
