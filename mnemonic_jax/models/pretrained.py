"""Weights from local files: safetensors of torchvision and timm, the AugReg ViTs' .npz, our exports, vectors of texts."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from mnemonic_jax.errors import MnemonicError

PyTree = Any
Reader = Callable[[], np.ndarray]

_SHOWN = 3  # names in an error message


class _Source(NamedTuple):
  """How one library names the arrays of one family of models."""

  marker: str  # a name that only its files hold
  rules: tuple[
    tuple[str, Any], ...
  ]  # regular expressions that turn its names into our dotted paths, in this order


def _next(number: str) -> str:
  return str(int(number) + 1)


_BLOCK_OF_TORCH = (
  (r"\.attn\.relative_position_bias_table$", ".position_bias"),
  (r"\.(attn|self_attention)\.", ".attention."),
  (r"\.(proj|out_proj)\.", ".out."),
  (r"\.mlp\.(fc1|0|linear_1)\.", ".feed_forward.hidden."),
  (r"\.mlp\.(fc2|3|linear_2)\.", ".feed_forward.out."),
)
_OURS = ((r"^model_state\.", ""),)  # what `mnemonic export` writes
_SOURCES: dict[str, tuple[_Source, ...]] = {
  "mlp": (_Source("hidden.kernel", _OURS),),
  "resnet": (
    _Source("stem.kernel", _OURS),
    _Source(  # torchvision and timm
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
    _Source("patches.kernel", _OURS),
    _Source(  # timm
      "blocks.0.attn.qkv.weight",
      (
        (r"^cls_token$", "class_token"),
        (r"^pos_embed$", "positions"),
        (r"^patch_embed\.proj\.", "patches."),
        (r"^blocks\.(\d+)\.", lambda found: f"block{_next(found[1])}."),
        *_BLOCK_OF_TORCH,
      ),
    ),
    _Source(  # torchvision
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
    _Source(  # AugReg, of the reference implementation in JAX
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
    _Source("patches.kernel", _OURS),
    _Source(  # timm
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
    _Source(  # torchvision
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
# Of torch's names: buffers that our models compute, or do without.
_BUFFERS = re.compile(r"(num_batches_tracked|relative_position_index|attn_mask)$")


def check(file: str | pathlib.Path, name: str) -> None:
  """Tell early whether a file can be opened and holds weights of such a model; shapes are left to `load`.

  Args:
    file, name: as `load` takes them.

  Raises:
    MnemonicError: no such file, a damaged one, or one of another architecture.
  """
  with _weights_of(file, name):
    pass


def load(
  file: str | pathlib.Path,
  name: str,
  params: PyTree,
  model_state: PyTree,
  *,
  new_head: bool = False,
) -> Any:
  """Fill params and running statistics with the weights in a file.

  Args:
    file: safetensors as torchvision's or timm's state dict or as `mnemonic export` writes it, or an AugReg .npz. Pickled
      files are refused.
    name: of the model, as `models.make` takes it.
    params, model_state: trees of arrays or `jax.ShapeDtypeStruct`, as `Model.init` returns them; those of scanned
      "blocks" are stacked layer by layer. The weights go where the arrays lie, or the shapes' shardings say.
    new_head: leave the head as it is in `params` (arrays), for a data set with other classes.

  Returns:
    (params, model_state), same structure, shapes, dtypes and shardings, read one array at a time: on a mesh each process
    reads every array, and a device gets its own shards alone.

  Raises:
    MnemonicError: no such file, a damaged one, or one of another architecture, head or picture size; it names the array.
  """
  head = "output" if name == "mlp" else "head"
  with _weights_of(file, name) as named:
    used: set[str] = set()

    def read(ours: str, shape: tuple[int, ...]) -> np.ndarray:
      reader = named.get(ours)
      if reader is None:
        raise MnemonicError(
          f"{file}: has no array for {ours} {shape} of {name}; {_remedy(ours, named, head)}"
        )
      used.add(ours)
      value = reader()
      if value.shape != shape:
        raise MnemonicError(
          f"{file}: {ours} has shape {value.shape} there; {name} with this data set expects {shape}."
          + (
            " Pass model.new_head to start with a head of your own."
            if ours.startswith(f"{head}.")
            else ""
          )
        )
      if not jax.numpy.issubdtype(value.dtype, jax.numpy.floating):
        raise MnemonicError(
          f"{file}: {ours} has dtype {value.dtype} there; expected floating weights."
        )
      if not np.all(
        np.isfinite(value)
        if value.dtype.itemsize <= 4
        else np.abs(value) <= np.finfo(np.float32).max
      ):
        raise MnemonicError(
          f"{file}: {ours} holds NaN, inf or numbers beyond float32; expected finite weights."
        )
      return value

    def fill(path: Any, leaf: Any) -> Any:
      top, *keys = (str(key.key) for key in path)
      if new_head and top == head:
        return leaf
      uncommitted = not getattr(
        leaf, "committed", True
      )  # such an array may go anywhere, and so may its weights
      placement = None if uncommitted else getattr(leaf, "sharding", None)
      if (
        top == "blocks" and ".".join([top, *keys]) not in named
      ):  # scanned: one leaf holds a param of every block
        stacked = jax.jit(
          partial(jax.numpy.zeros, leaf.shape, leaf.dtype), out_shardings=placement
        )()
        for index in range(len(stacked)):
          layer = read(".".join([f"block{index + 1}", *keys]), tuple(leaf.shape[1:]))
          on_devices = _placed(layer, leaf.dtype, _of_a_layer(placement))
          stacked = jax.block_until_ready(_with_layer(stacked, index, on_devices))
        return stacked
      on_host = read(".".join([top, *keys]), tuple(leaf.shape))
      if (top, *keys) == (head, "text") and not _same_vectors(on_host, leaf):
        raise MnemonicError(
          f"{file}: {head}.text differs from the vectors of model.text_embeddings, and its head scores against its own. Pass "
          "those, or model.new_head to start with a head of your own."
        )
      value = _placed(on_host, leaf.dtype, placement)
      return jax.block_until_ready(value)  # else the copies of several arrays wait in host memory

    # The largest first: what is in memory beside an array while it is filled comes on top of the least.
    leaves, structure = jax.tree_util.tree_flatten_with_path((params, model_state))
    order = sorted(range(len(leaves)), key=lambda place: -leaves[place][1].size)
    done = {place: fill(leaves[place][0][1:], leaves[place][1]) for place in order}
    filled = jax.tree.unflatten(structure, [done[place] for place in range(len(leaves))])
    left = [
      ours for ours in named if ours not in used and not (new_head and ours.startswith(f"{head}."))
    ]
    if left:
      raise MnemonicError(
        f"{file}: holds arrays that {name} has no place for: {_few(left)}; it is another architecture."
      )
  return filled


def _same_vectors(stored: np.ndarray, leaf: Any) -> bool:
  """Whether a leaf, where it is an array, holds what is stored; on a mesh, by the shards of this process."""
  shards = getattr(leaf, "addressable_shards", ())
  return all(np.allclose(stored[shard.index], shard.data, atol=1e-5) for shard in shards)


def _remedy(missing: str, named: Mapping[str, Reader], head: str) -> str:
  """What to do where a file lacks an array."""
  if not missing.startswith(f"{head}."):
    return "it is another architecture."
  if f"{head}.text" in named:
    return "its head scores against text embeddings; pass model.text_embeddings with its vectors."
  return "it has another head. Pass model.new_head to start with one of your own."


def load_text_embeddings(file: str | pathlib.Path, num_classes: int) -> np.ndarray:
  """Read the vectors that a text-embedding head scores against, one row for each class in label order.

  Args:
    file: .npy, or .safetensors of exactly one array: (num_classes, E), floating. Pickled files are refused.

  Returns:
    (num_classes, E) float32, vectors of length one.

  Raises:
    MnemonicError: no such file, a damaged one, or vectors that no head can score against; it names the file.
  """
  remedy = "save the vectors with numpy.save(FILE, vectors)."
  with _opened(
    pathlib.Path(file), "model.text_embeddings", (".npy", ".safetensors"), remedy
  ) as arrays:
    if len(arrays) != 1:
      raise MnemonicError(
        f"{file}: holds {len(arrays)} arrays ({_few(arrays)}); expected one, the text embeddings."
      )
    (read,) = arrays.values()
    vectors = read()
  if vectors.ndim != 2 or len(vectors) != num_classes or not vectors.size:
    raise MnemonicError(
      f"{file}: has shape {vectors.shape}; expected ({num_classes}, E), a vector for each of the {num_classes} classes."
    )
  if not np.issubdtype(vectors.dtype, np.floating):
    raise MnemonicError(f"{file}: has dtype {vectors.dtype}; expected floating vectors.")
  with np.errstate(over="ignore", invalid="ignore"):
    vectors = vectors.astype(np.float64)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
  if (wrong := np.flatnonzero(~np.isfinite(lengths))).size:
    raise MnemonicError(
      f"{file}: the vector of class {wrong[0]} holds NaN or inf; expected finite vectors."
    )
  if (wrong := np.flatnonzero(lengths == 0)).size:
    raise MnemonicError(
      f"{file}: the vector of class {wrong[0]} is zero; expected one with a direction."
    )
  return (vectors / lengths).astype(np.float32)


def _placed(value: np.ndarray, dtype: Any, placement: Sharding | None) -> jax.Array:
  """A host array on the devices, each its own part; on the default device where no placement is given."""
  if placement is None:
    return jax.numpy.asarray(value, dtype)
  return jax.make_array_from_callback(
    value.shape, placement, lambda part: np.asarray(value[part], dtype)
  )


def _of_a_layer(placement: Sharding | None) -> Sharding | None:
  """Where one layer of a stack goes, so that it is filled in where it lies; the stack itself is not split by layers."""
  if isinstance(placement, NamedSharding):
    return NamedSharding(placement.mesh, PartitionSpec(*placement.spec[1:]))
  return placement


@partial(jax.jit, donate_argnums=0)
def _with_layer(stacked: jax.Array, index: int, layer: jax.Array) -> jax.Array:
  """Fill one layer in, in place."""
  return stacked.at[index].set(layer)


def _renamed(arrays: Mapping[str, Reader], source: _Source) -> dict[str, Reader]:
  """Our dotted path -> reader in our layout."""
  named: dict[str, Reader] = {}
  parts: dict[str, dict[str, Reader]] = {}  # AugReg keeps queries, keys and values apart
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
  """torch's (out, in, *window) -> (*window, in, out), a view: the way to the device puts it in order."""
  weight = read()
  return weight if weight.ndim < 2 else np.moveaxis(weight, (0, 1), (-1, -2))


def _joined_parts(parts: Sequence[Reader]) -> np.ndarray:
  """Each (F, heads, F / heads) or (heads, F / heads) -> (F, 3 F) or (3 F,)."""
  arrays = [read() for read in parts]
  return np.concatenate([x.reshape(*x.shape[:-2], -1) for x in arrays], axis=-1)


def _joined_heads(read: Reader, ours: str) -> np.ndarray:
  """The projection after attention comes as (heads, F / heads, F)."""
  x = read()
  return x.reshape(-1, x.shape[-1]) if ours.endswith("attention.out.kernel") and x.ndim == 3 else x


@contextmanager
def _weights_of(file: str | pathlib.Path, name: str) -> Iterator[dict[str, Reader]]:
  """Our dotted path -> reader in our layout, of all weights in a file."""
  family = "resnet" if name.startswith(("resnet", "resnext")) else name.split("_")[0]
  sources = _SOURCES.get(family, ())
  remedy = "in PyTorch, save with safetensors.torch.save_file(model.state_dict(), FILE)."
  with _opened(pathlib.Path(file), "model.pretrained", (".safetensors", ".npz"), remedy) as arrays:
    source = next((source for source in sources if source.marker in arrays), None)
    if source is None:
      raise MnemonicError(
        f"{file}: holds no {name} that is known here: expected one of the arrays "
        f"{', '.join(source.marker for source in sources) or '(none for this model)'}; found {_few(arrays)}."
      )
    yield _renamed(arrays, source)


@contextmanager
def _opened(
  path: pathlib.Path, field: str, suffixes: tuple[str, str], remedy: str
) -> Iterator[dict[str, Reader]]:
  """Name -> reader of each array in a file; nothing is read before it is asked for, and nothing is unpickled."""
  if not path.is_file():
    raise MnemonicError(
      f"{path}: no such file. {field} takes a local {' or '.join(suffixes)} file."
    )
  if path.suffix not in suffixes:
    raise MnemonicError(
      f"{path}: is neither {' nor '.join(suffixes)}. Other files may run code when they are read; {remedy}"
    )

  def guarded(read: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
      return read(*arguments, **options)
    except OSError as error:
      raise MnemonicError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except (
      Exception
    ) as error:  # zipfile, zlib, struct, numpy and safetensors raise many kinds for damaged files
      raise MnemonicError(f"{path}: cannot be read, it is damaged: {error}") from error

  with ExitStack() as stack:
    if path.suffix == ".npy":
      names, read = [path.stem], lambda _: _read_npy(path)
    elif path.suffix == ".npz":
      file = stack.enter_context(guarded(open, path, "rb"))
      arrays = stack.enter_context(guarded(np.load, file, allow_pickle=False))
      names, read = arrays.files, arrays.__getitem__
    else:
      arrays = stack.enter_context(guarded(safetensors.safe_open, path, framework="numpy"))
      names, read = arrays.keys(), arrays.get_tensor
    yield {name: partial(guarded, read, name) for name in names}


def _read_npy(path: pathlib.Path) -> np.ndarray:
  with open(path, "rb") as file:  # numpy.load would also take pickles and zip files of this name
    return np.lib.format.read_array(file, allow_pickle=False)


def _few(names: Iterable[str]) -> str:
  names = list(names)
  return ", ".join(names[:_SHOWN]) + (
    f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
  )
