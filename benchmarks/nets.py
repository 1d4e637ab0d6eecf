"""The models that the Fisher is timed on, as plain functions.

Each is a pair (init(key) -> params, apply(params, images) -> logits). BatchNorm is in evaluation
mode, its running statistics those of a fresh model, so scale and bias are all that is left of it.
Images are NHWC.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np


class Keys:
  """Draws params one after the other."""

  def __init__(self, key):
    self._key = key

  def normal(self, *shape, fan_in=None):
    self._key, key = jax.random.split(self._key)
    return jax.random.normal(key, shape) * math.sqrt(2 / (fan_in or math.prod(shape[:-1])))


def conv(x, kernel, stride=1, groups=1, padding="SAME"):
  numbers = ("NHWC", "HWIO", "NHWC")
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), padding, dimension_numbers=numbers, feature_group_count=groups
  )


def affine(x, p):
  return x * p["scale"] + p["bias"]


def affine_init(width):
  return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}


def linear(x, p):
  return x @ p["kernel"] + p["bias"]


def linear_init(keys, inputs, outputs):
  return {"kernel": keys.normal(inputs, outputs), "bias": jnp.zeros(outputs)}


def layer_norm(x, p):
  mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
  return affine((x - mean) * jax.lax.rsqrt(var + 1e-6), p)


def mlp(inputs=784, hidden=1000, classes=10):
  def init(key):
    keys = Keys(key)
    return {"hidden": linear_init(keys, inputs, hidden), "head": linear_init(keys, hidden, classes)}

  return init, lambda p, x: linear(
    jax.nn.sigmoid(linear(x.reshape(len(x), -1), p["hidden"])), p["head"]
  )


def resnet(depths, *, bottleneck=False, groups=1, base=64, small_stem=False, classes=1000):
  """ResNet-18 is (2, 2, 2, 2); ResNeXt-50 32x4d (3, 4, 6, 3), bottleneck, base 128, 32 groups."""
  plan = [
    (64 * 2**stage, 2 if stage and not block else 1)
    for stage, n in enumerate(depths)
    for block in range(n)
  ]

  def init(key):
    keys = Keys(key)
    params = {
      "stem": keys.normal(*((3, 3) if small_stem else (7, 7)), 3, 64),
      "norm": affine_init(64),
      "blocks": [],
    }
    width = 64
    for features, stride in plan:
      out, inner = (4 * features, base * features // 64) if bottleneck else (features, features)
      sizes = (
        [(1, width, inner), (3, inner // groups, inner), (1, inner, out)]
        if bottleneck
        else [(3, width, out), (3, out, out)]
      )
      block = {
        "convs": [keys.normal(k, k, i, o) for k, i, o in sizes],
        "norms": [affine_init(o) for _, _, o in sizes],
      }
      if stride > 1 or width != out:
        block |= {"shortcut": keys.normal(1, 1, width, out), "shortcut_norm": affine_init(out)}
      params["blocks"].append(block)
      width = out
    return params | {"head": linear_init(keys, width, classes)}

  def apply(params, x):
    x = jax.nn.relu(affine(conv(x, params["stem"], 1 if small_stem else 2), params["norm"]))
    if not small_stem:
      x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    for block, (_, stride) in zip(params["blocks"], plan, strict=True):
      y = x
      for index, (kernel, norm) in enumerate(zip(block["convs"], block["norms"], strict=True)):
        strided = index == (1 if bottleneck else 0)
        y = affine(
          conv(y, kernel, stride if strided else 1, groups if bottleneck and index == 1 else 1),
          norm,
        )
        y = jax.nn.relu(y) if index < len(block["convs"]) - 1 else y
      x = (
        affine(conv(x, block["shortcut"], stride), block["shortcut_norm"])
        if "shortcut" in block
        else x
      )
      x = jax.nn.relu(x + y)
    return linear(x.mean((1, 2)), params["head"])

  return init, apply


def attention(x, p, heads, bias=None):
  q, k, v = jnp.split(linear(x, p["qkv"]).reshape(*x.shape[:-1], 3 * heads, -1), 3, axis=-2)
  scores = jnp.einsum("...qhd,...khd->...hqk", q, k) / math.sqrt(q.shape[-1])
  mixed = jnp.einsum(
    "...hqk,...khd->...qhd", jax.nn.softmax(scores if bias is None else scores + bias), v
  )
  return linear(mixed.reshape(x.shape), p["out"])


def attention_init(keys, width):
  return {"qkv": linear_init(keys, width, 3 * width), "out": linear_init(keys, width, width)}


def block_init(keys, width):
  return {
    "norm1": affine_init(width),
    "attention": attention_init(keys, width),
    "norm2": affine_init(width),
    "mlp": [linear_init(keys, width, 4 * width), linear_init(keys, 4 * width, width)],
  }


def feed_forward(x, p):
  return linear(jax.nn.gelu(linear(layer_norm(x, p["norm2"]), p["mlp"][0])), p["mlp"][1])


def vit(width, depth, heads, *, patch=16, size=224, classes=1000):
  """ViT-S/16 is (384, 12, 6), ViT-B/16 (768, 12, 12)."""

  def init(key):
    keys = Keys(key)
    return {
      "patch": keys.normal(patch, patch, 3, width),
      "class_token": jnp.zeros((1, 1, width)),
      "position": keys.normal(1, (size // patch) ** 2 + 1, width, fan_in=5000),
      "blocks": [block_init(keys, width) for _ in range(depth)],
      "norm": affine_init(width),
      "head": linear_init(keys, width, classes),
    }

  def apply(params, x):
    x = conv(x, params["patch"], patch, padding="VALID").reshape(len(x), -1, width)
    x = (
      jnp.concatenate([jnp.broadcast_to(params["class_token"], (len(x), 1, width)), x], 1)
      + params["position"]
    )
    for p in params["blocks"]:
      x = x + attention(layer_norm(x, p["norm1"]), p["attention"], heads)
      x = x + feed_forward(x, p)
    return linear(layer_norm(x, params["norm"])[:, 0], params["head"])

  return init, apply


def swin(width=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24), *, window=7, size=224, classes=1000):
  """Swin-T: windows, shifted in every other block, with a relative position bias."""
  axis = np.arange(window)
  y, x = np.meshgrid(axis, axis, indexing="ij")
  points = np.stack([y.ravel(), x.ravel()])
  offset = points[:, :, None] - points[:, None] + window - 1
  relative = offset[0] * (2 * window - 1) + offset[1]  # (window^2, window^2)

  def init(key):
    keys = Keys(key)
    params = {"patch": keys.normal(4, 4, 3, width), "patch_norm": affine_init(width), "stages": []}
    for stage, depth in enumerate(depths):
      features = width * 2**stage
      blocks = [
        block_init(keys, features)
        | {"relative": keys.normal((2 * window - 1) ** 2, heads[stage], fan_in=5000)}
        for _ in range(depth)
      ]
      merge = {"norm": affine_init(4 * features), "kernel": keys.normal(4 * features, 2 * features)}
      params["stages"].append(
        {"blocks": blocks} | ({"merge": merge} if stage < len(depths) - 1 else {})
      )
    last = width * 2 ** (len(depths) - 1)
    return params | {"norm": affine_init(last), "head": linear_init(keys, last, classes)}

  def windows(x):
    n, h, w, c = x.shape
    x = x.reshape(n, h // window, window, w // window, window, c).swapaxes(2, 3)
    return x.reshape(n, -1, window**2, c)

  def unwindows(x, h, w):
    n, c = len(x), x.shape[-1]
    return (
      x.reshape(n, h // window, w // window, window, window, c).swapaxes(2, 3).reshape(n, h, w, c)
    )

  def mask(h, w, shift):
    regions = np.zeros((1, h, w, 1))
    for i, rows in enumerate((slice(-window), slice(-window, -shift), slice(-shift, None))):
      for j, columns in enumerate((slice(-window), slice(-window, -shift), slice(-shift, None))):
        regions[:, rows, columns] = 3 * i + j
    regions = windows(regions)[0, :, :, 0]
    return np.where(regions[:, None, :] == regions[:, :, None], 0.0, -100.0).astype(np.float32)[
      :, None
    ]

  def apply(params, x):
    x = layer_norm(conv(x, params["patch"], 4, padding="VALID"), params["patch_norm"])
    for stage, p_stage in enumerate(params["stages"]):
      h, w = x.shape[1:3]
      for index, p in enumerate(p_stage["blocks"]):
        shift = window // 2 if index % 2 and h > window else 0
        y = jnp.roll(layer_norm(x, p["norm1"]), (-shift, -shift), (1, 2))
        bias = p["relative"][relative].transpose(2, 0, 1)
        if shift:
          bias = bias + mask(h, w, shift)
        y = unwindows(attention(windows(y), p["attention"], heads[stage], bias), h, w)
        x = x + jnp.roll(y, (shift, shift), (1, 2))
        x = x + feed_forward(x, p)
      if "merge" in p_stage:
        n, c = len(x), x.shape[-1]
        x = (
          x.reshape(n, h // 2, 2, w // 2, 2, c)
          .transpose(0, 1, 3, 4, 2, 5)
          .reshape(n, h // 2, w // 2, 4 * c)
        )
        x = layer_norm(x, p_stage["merge"]["norm"]) @ p_stage["merge"]["kernel"]
    return linear(layer_norm(x, params["norm"]).mean((1, 2)), params["head"])

  return init, apply


MODELS = {
  "MNIST MLP": (mlp(), (28, 28, 1), 10),
  "CIFAR ResNet-18": (resnet((2, 2, 2, 2), small_stem=True, classes=10), (32, 32, 3), 10),
  "ResNet-18": (resnet((2, 2, 2, 2)), (224, 224, 3), 1000),
  "ResNeXt-50": (resnet((3, 4, 6, 3), bottleneck=True, groups=32, base=128), (224, 224, 3), 1000),
  "Swin-T": (swin(), (224, 224, 3), 1000),
  "ViT-S/16": (vit(384, 12, 6), (224, 224, 3), 1000),
  "ViT-B/16": (vit(768, 12, 12), (224, 224, 3), 1000),
}
