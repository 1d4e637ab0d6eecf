"""Write our ViT's params as other libraries would save them."""

from __future__ import annotations

import re

import jax
import numpy as np


def as_augreg(params: dict) -> dict[str, np.ndarray]:
  """Params of a vit_ti16 with the names and shapes of an AugReg file."""
  heads, arrays = 3, {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    keys, value = [key.key for key in path], np.asarray(leaf)
    name = "/".join(keys)
    for pattern, replacement in (
      (r"^class_token$", "cls"),
      (r"^positions$", "Transformer/posembed_input/pos_embedding"),
      (r"^patches/", "embedding/"),
      (r"^norm/", "Transformer/encoder_norm/"),
      (r"^block(\d+)/", lambda found: f"Transformer/encoderblock_{int(found[1]) - 1}/"),
      (r"/norm1/", "/LayerNorm_0/"),
      (r"/norm2/", "/LayerNorm_2/"),
      (r"/feed_forward/hidden/", "/MlpBlock_3/Dense_0/"),
      (r"/feed_forward/out/", "/MlpBlock_3/Dense_1/"),
      (r"/attention/", "/MultiHeadDotProductAttention_1/"),
    ):
      name = re.sub(pattern, replacement, name)
    if "/qkv/" in name:
      for part, piece in zip(("query", "key", "value"), np.split(value, 3, axis=-1), strict=True):
        arrays[name.replace("/qkv/", f"/{part}/")] = piece.reshape(*piece.shape[:-1], heads, -1)
    else:
      arrays[name] = (
        value.reshape(heads, -1, value.shape[-1]) if name.endswith("_1/out/kernel") else value
      )
  return arrays


def as_timm(params: dict) -> dict[str, np.ndarray]:
  """Params of any ViT with timm's names, in torch's layout."""
  arrays = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name, value = ".".join(key.key for key in path), np.asarray(leaf)
    if name.endswith("kernel"):  # (*window, in, out) -> (out, in, *window)
      value = np.ascontiguousarray(np.moveaxis(value, (-1, -2), (0, 1)))
    for pattern, replacement in (
      (r"^class_token$", "cls_token"),
      (r"^positions$", "pos_embed"),
      (r"^patches\.", "patch_embed.proj."),
      (r"^block(\d+)\.", lambda found: f"blocks.{int(found[1]) - 1}."),
      (r"\.attention\.out\.", ".attn.proj."),
      (r"\.attention\.", ".attn."),
      (r"\.feed_forward\.hidden\.", ".mlp.fc1."),
      (r"\.feed_forward\.out\.", ".mlp.fc2."),
      (r"\.(kernel|scale)$", ".weight"),
    ):
      name = re.sub(pattern, replacement, name)
    arrays[name] = value
  return arrays
