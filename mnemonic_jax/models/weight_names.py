"""How torchvision, timm and AugReg name and lay out the weights of our models."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

Reader = Callable[[], np.ndarray]


class Source(NamedTuple):
  """How one library names the arrays of one family of models.

  Attributes:
    marker: the name of an array that only this library's files hold.
    rules: (regular expression, replacement) pairs that, applied in order, turn its names into our
      dotted paths.
  """

  marker: str
  rules: tuple[tuple[str, Any], ...]


def _next(number: str) -> str:
  return str(int(number) + 1)


_BLOCK_OF_TORCH = (
  (r"\.attn\.relative_position_bias_table$", ".position_bias"),
  (r"\.(attn|self_attention)\.", ".attention."),
  (r"\.(proj|out_proj)\.", ".out."),
  (r"\.mlp\.(fc1|0|linear_1)\.", ".feed_forward.hidden."),
  (r"\.mlp\.(fc2|3|linear_2)\.", ".feed_forward.out."),
)
_OURS = ((r"^model_state\.", ""),)  # files of `mnemonic export`
_SOURCES: dict[str, tuple[Source, ...]] = {
  "mlp": (Source("hidden.kernel", _OURS),),
  "resnet": (
    Source("stem.kernel", _OURS),
    Source(  # torchvision and timm
      "layer1.0.conv1.weight",
      (
        (r"^conv1\.", "stem."),
        (r"^bn1\.", "stem_norm."),
        (r"^layer(\d)\.(\d+)\.", lambda found: f"stage{found[1]}_block{_next(found[2])}."),
        (r"\.bn(\d)\.", r".norm\1."),
        (r"\.downsample\.0\.", ".shortcut."),
        (r"\.downsample\.1\.", ".shortcut_norm."),
        (r"^fc\.", "head."),
      ),
    ),
  ),
  "vit": (
    Source("patches.kernel", _OURS),
    Source(  # timm
      "blocks.0.attn.qkv.weight",
      (
        (r"^cls_token$", "class_token"),
        (r"^pos_embed$", "positions"),
        (r"^patch_embed\.proj\.", "patches."),
        (r"^blocks\.(\d+)\.", lambda found: f"block{_next(found[1])}."),
        *_BLOCK_OF_TORCH,
      ),
    ),
    Source(  # torchvision
      "encoder.layers.encoder_layer_0.self_attention.in_proj_weight",
      (
        (r"^encoder\.pos_embedding$", "positions"),
        (r"^conv_proj\.", "patches."),
        (r"^encoder\.layers\.encoder_layer_(\d+)\.", lambda found: f"block{_next(found[1])}."),
        (r"\.ln_(\d)\.", r".norm\1."),
        (r"\.in_proj_(weight|bias)$", r".qkv.\1"),
        (r"^encoder\.ln\.", "norm."),
        (r"^heads\.head\.", "head."),
        *_BLOCK_OF_TORCH,
      ),
    ),
    Source(  # AugReg, the reference implementation in JAX
      "Transformer/encoder_norm/scale",
      (
        (r"/", "."),
        (r"^cls$", "class_token"),
        (r"^embedding\.", "patches."),
        (r"^Transformer\.posembed_input\.pos_embedding$", "positions"),
        (r"^Transformer\.encoder_norm\.", "norm."),
        (r"^Transformer\.encoderblock_(\d+)\.", lambda found: f"block{_next(found[1])}."),
        (r"\.LayerNorm_0\.", ".norm1."),
        (r"\.LayerNorm_2\.", ".norm2."),
        (r"\.MultiHeadDotProductAttention_1\.", ".attention."),
        (r"\.MlpBlock_3\.Dense_0\.", ".feed_forward.hidden."),
        (r"\.MlpBlock_3\.Dense_1\.", ".feed_forward.out."),
      ),
    ),
  ),
  "swin": (
    Source("patches.kernel", _OURS),
    Source(  # timm
      "layers.0.blocks.0.attn.relative_position_bias_table",
      (
        (r"^patch_embed\.proj\.", "patches."),
        (r"^patch_embed\.norm\.", "patches_norm."),
        (
          r"^layers\.(\d)\.blocks\.(\d+)\.",
          lambda found: f"stage{_next(found[1])}_block{_next(found[2])}.",
        ),
        (r"^layers\.(\d)\.downsample\.norm\.", lambda found: f"stage{_next(found[1])}_norm."),
        (r"^layers\.(\d)\.downsample\.reduction\.", lambda found: f"stage{_next(found[1])}_merge."),
        (r"^head\.fc\.", "head."),
        *_BLOCK_OF_TORCH,
      ),
    ),
    Source(  # torchvision
      "features.1.0.attn.relative_position_bias_table",
      (
        (r"^features\.0\.0\.", "patches."),
        (r"^features\.0\.2\.", "patches_norm."),
        (
          r"^features\.(\d)\.(\d+)\.",
          lambda found: f"stage{int(found[1]) // 2 + 1}_block{_next(found[2])}.",
        ),
        (r"^features\.(\d)\.norm\.", lambda found: f"stage{int(found[1]) // 2 + 1}_norm."),
        (r"^features\.(\d)\.reduction\.", lambda found: f"stage{int(found[1]) // 2 + 1}_merge."),
        *_BLOCK_OF_TORCH,
      ),
    ),
  ),
}
# Buffers in torch's files that our models compute, or do without.
_BUFFERS = re.compile(r"(num_batches_tracked|relative_position_index|attn_mask)$")


def sources_of(name: str) -> tuple[Source, ...]:
  """Return the sources whose files may hold the model `name`; none for an unknown model."""
  family = "resnet" if name.startswith(("resnet", "resnext")) else name.split("_")[0]
  return _SOURCES.get(family, ())


def renamed(arrays: Mapping[str, Reader], source: Source) -> dict[str, Reader]:
  """Map our dotted paths to readers that give the arrays in our layout."""
  named: dict[str, Reader] = {}
  parts: dict[str, dict[str, Reader]] = {}  # AugReg stores queries, keys and values apart
  for theirs, reader in arrays.items():
    if _BUFFERS.search(theirs):
      continue
    ours = theirs
    for pattern, replacement in source.rules:
      ours = re.sub(pattern, replacement, ours)
    if "/" in theirs:
      found = re.match(r"(.*\.attention)\.(query|key|value)\.(kernel|bias)$", ours)
      if found:
        parts.setdefault(f"{found[1]}.qkv.{found[3]}", {})[found[2]] = reader
      else:
        named[ours] = partial(_joined_heads, reader, ours)
      continue
    stem, _, last = ours.rpartition(".")
    if last in ("running_mean", "running_var"):
      named[f"{stem}.{last.removeprefix('running_')}"] = reader
    elif last == "weight":
      is_norm = re.search(r"norm\d?$", stem)
      named[f"{stem}.{'scale' if is_norm else 'kernel'}"] = partial(_outputs_last, reader)
    else:
      named[ours] = reader
  for ours, three in parts.items():
    if set(three) == {"query", "key", "value"}:
      named[ours] = partial(_joined_parts, [three[part] for part in ("query", "key", "value")])
  return named


def _outputs_last(read: Reader) -> np.ndarray:
  """Turn torch's (out, in, *window) into our (*window, in, out), as a view."""
  weight = read()
  return weight if weight.ndim < 2 else np.moveaxis(weight, (0, 1), (-1, -2))


def _joined_parts(parts: Sequence[Reader]) -> np.ndarray:
  """Join queries, keys and values, ([F,] heads, F / heads) each, into ([F,] 3 F)."""
  arrays = [read() for read in parts]
  return np.concatenate([x.reshape(*x.shape[:-2], -1) for x in arrays], axis=-1)


def _joined_heads(read: Reader, ours: str) -> np.ndarray:
  """Flatten the heads of the projection after attention, (heads, F / heads, F)."""
  x = read()
  return x.reshape(-1, x.shape[-1]) if ours.endswith("attention.out.kernel") and x.ndim == 3 else x
