"""Read weights and text embeddings from local files: safetensors, .npz and .npy, never pickles."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import jax
import numpy as np
import safetensors
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from mnemonic_jax.errors import MnemonicError
from mnemonic_jax.models import weight_names
from mnemonic_jax.models.weight_names import Reader

PyTree = Any

_SHOWN = 3  # how many names an error message lists


def check(file: str | pathlib.Path, name: str) -> None:
  """Check early that a file can be opened and holds such a model; `load` checks the shapes.

  Args:
    file, name: as `load` takes them.

  Raises:
    MnemonicError: the file does not exist, is damaged or holds another architecture.
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

  Each process reads the arrays one by one, and a device receives its own shards only.

  Args:
    file: safetensors, a state dict of torchvision or timm or a file of `mnemonic export`; or an
      AugReg .npz. Pickled files are refused.
    name: the model's name, as `models.make` takes it.
    params, model_state: trees of arrays or `jax.ShapeDtypeStruct`, as `Model.init` returns them.
      Weights are placed like the arrays, or by the shardings of the shapes. Scanned "blocks" are
      filled layer by layer.
    new_head: keep the head that is in `params` (arrays), for a data set with other classes.

  Returns:
    (params, model_state) with the same structure, shapes, dtypes and shardings.

  Raises:
    MnemonicError: the file does not exist or is damaged, or an array, which the message names, does
      not fit the model: another architecture, head or image size.
  """
  head = "output" if name == "mlp" else "head"
  with _weights_of(file, name) as named:
    weights = _Weights(file, name, head, named)

    def fill(path: Any, leaf: Any) -> Any:
      keys = [str(key.key) for key in path]
      return leaf if new_head and keys[0] == head else _filled(weights, keys, leaf)

    # Fill the largest leaves first: a leaf is on the host too while it is filled, and that adds
    # least to the peak while few others are filled.
    leaves, structure = jax.tree_util.tree_flatten_with_path((params, model_state))
    order = sorted(range(len(leaves)), key=lambda place: -leaves[place][1].size)
    done = {place: fill(leaves[place][0][1:], leaves[place][1]) for place in order}
    weights.require_all_used(except_head=new_head)
  return jax.tree.unflatten(structure, [done[place] for place in range(len(leaves))])


@dataclasses.dataclass(frozen=True)
class _Weights:
  """The arrays of one file, checked as they are read."""

  file: str | pathlib.Path
  model: str
  head: str
  named: dict[str, Reader]
  used: set[str] = dataclasses.field(default_factory=set)

  def read(self, ours: str, shape: tuple[int, ...]) -> np.ndarray:
    """Read the array of one of our params; refuse one that is missing, misshapen or not finite."""
    reader = self.named.get(ours)
    if reader is None:
      raise MnemonicError(
        f"{self.file}: has no array for {ours} {shape} of {self.model}; {self._remedy(ours)}"
      )
    self.used.add(ours)
    value = reader()
    if value.shape != shape:
      raise MnemonicError(
        f"{self.file}: {ours} has shape {value.shape} there; "
        f"{self.model} with this data set expects {shape}."
        + (" Pass model.new_head to start with a new head." if self._in_head(ours) else "")
      )
    if not jax.numpy.issubdtype(value.dtype, jax.numpy.floating):
      raise MnemonicError(
        f"{self.file}: {ours} has dtype {value.dtype} there; expected floating weights."
      )
    wide = value.dtype.itemsize > 4
    fits = np.abs(value) <= np.finfo(np.float32).max if wide else np.isfinite(value)
    if not np.all(fits):
      raise MnemonicError(
        f"{self.file}: {ours} holds NaN, inf or numbers beyond float32; expected finite weights."
      )
    return value

  def require_all_used(self, *, except_head: bool) -> None:
    """Refuse arrays that the model has no place for."""
    left = [
      ours
      for ours in self.named
      if ours not in self.used and not (except_head and self._in_head(ours))
    ]
    if left:
      raise MnemonicError(
        f"{self.file}: holds arrays that {self.model} has no place for: {_few(left)}; "
        "it is another architecture."
      )

  def _in_head(self, ours: str) -> bool:
    return ours.startswith(f"{self.head}.")

  def _remedy(self, missing: str) -> str:
    if not self._in_head(missing):
      return "it is another architecture."
    if f"{self.head}.text" in self.named:
      return "its head scores against text embeddings; pass them as model.text_embeddings."
    return "it has another head. Pass model.new_head to start with a new one."


def _filled(weights: _Weights, keys: list[str], leaf: Any) -> jax.Array:
  """Read the weights of one leaf and place them like the leaf."""
  # An uncommitted array may lie on any device, and so may its weights.
  uncommitted = not getattr(leaf, "committed", True)
  placement = None if uncommitted else getattr(leaf, "sharding", None)
  if keys[0] == "blocks" and ".".join(keys) not in weights.named:
    return _filled_stack(weights, keys[1:], leaf, placement)
  on_host = weights.read(".".join(keys), tuple(leaf.shape))
  if keys == [weights.head, "text"] and not _same_vectors(on_host, leaf):
    raise MnemonicError(
      f"{weights.file}: {weights.head}.text differs from the vectors of model.text_embeddings. "
      "Pass the vectors that its head was trained with, or model.new_head to start with a new head."
    )
  # Without blocking, host copies of several arrays would wait in memory.
  return jax.block_until_ready(_placed(on_host, leaf.dtype, placement))


def _filled_stack(
  weights: _Weights, keys: list[str], leaf: Any, placement: Sharding | None
) -> jax.Array:
  """Fill a leaf of scanned blocks, which stacks one param of every block, layer by layer."""
  zeros = partial(jax.numpy.zeros, leaf.shape, leaf.dtype)
  stacked = jax.jit(zeros, out_shardings=placement)()
  for index in range(len(stacked)):
    layer = weights.read(".".join([f"block{index + 1}", *keys]), tuple(leaf.shape[1:]))
    on_devices = _placed(layer, leaf.dtype, _of_a_layer(placement))
    stacked = jax.block_until_ready(_with_layer(stacked, index, on_devices))
  return stacked


def _same_vectors(stored: np.ndarray, leaf: Any) -> bool:
  """Compare a leaf with what is stored, on a mesh only the shards of this process; shapes agree."""
  shards = getattr(leaf, "addressable_shards", ())
  return all(np.allclose(stored[shard.index], shard.data, atol=1e-5) for shard in shards)


def load_text_embeddings(file: str | pathlib.Path, num_classes: int) -> np.ndarray:
  """Read the text embeddings that a head scores against, one row per class in label order.

  Args:
    file: .npy, or .safetensors with exactly one array: (num_classes, E), floating. Pickled files
      are refused.
    num_classes: the number of rows to expect.

  Returns:
    (num_classes, E) float32, rows of length one.

  Raises:
    MnemonicError: the file does not exist, is damaged or holds vectors that no head can score
      against; the message names the file.
  """
  remedy = "save the vectors with numpy.save(FILE, vectors)."
  suffixes = (".npy", ".safetensors")
  with _opened(pathlib.Path(file), "model.text_embeddings", suffixes, remedy) as arrays:
    if len(arrays) != 1:
      raise MnemonicError(
        f"{file}: holds {len(arrays)} arrays ({_few(arrays)}); expected one, the text embeddings."
      )
    (read,) = arrays.values()
    vectors = read()
  if vectors.ndim != 2 or len(vectors) != num_classes or not vectors.size:
    raise MnemonicError(
      f"{file}: has shape {vectors.shape}; expected ({num_classes}, E), "
      f"a vector for each of the {num_classes} classes."
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
    raise MnemonicError(f"{file}: the vector of class {wrong[0]} is zero; it has no direction.")
  return (vectors / lengths).astype(np.float32)


def _placed(value: np.ndarray, dtype: Any, placement: Sharding | None) -> jax.Array:
  """Put a host array on the devices, shard by shard; on the default device without a placement."""
  if placement is None:
    return jax.numpy.asarray(value, dtype)
  return jax.make_array_from_callback(
    value.shape, placement, lambda part: np.asarray(value[part], dtype)
  )


def _of_a_layer(placement: Sharding | None) -> Sharding | None:
  """Return the sharding of one layer of a stack; the axis of layers is never sharded."""
  if isinstance(placement, NamedSharding):
    return NamedSharding(placement.mesh, PartitionSpec(*placement.spec[1:]))
  return placement


@partial(jax.jit, donate_argnums=0)
def _with_layer(stacked: jax.Array, index: int, layer: jax.Array) -> jax.Array:
  """Fill in one layer, in place."""
  return stacked.at[index].set(layer)


@contextmanager
def _weights_of(file: str | pathlib.Path, name: str) -> Iterator[dict[str, Reader]]:
  """Open a file of weights and yield a reader in our layout for each of our dotted paths."""
  sources = weight_names.sources_of(name)
  remedy = "in PyTorch, save with safetensors.torch.save_file(model.state_dict(), FILE)."
  with _opened(pathlib.Path(file), "model.pretrained", (".safetensors", ".npz"), remedy) as arrays:
    source = next((source for source in sources if source.marker in arrays), None)
    if source is None:
      markers = ", ".join(source.marker for source in sources) or "(none for this model)"
      raise MnemonicError(
        f"{file}: holds no {name} in a known format: expected one of the arrays {markers}; "
        f"found {_few(arrays)}."
      )
    yield weight_names.renamed(arrays, source)


@contextmanager
def _opened(
  path: pathlib.Path, field: str, suffixes: tuple[str, str], remedy: str
) -> Iterator[dict[str, Reader]]:
  """Open a file and yield a reader for each array by name. Nothing is unpickled."""
  if not path.is_file():
    raise MnemonicError(
      f"{path}: no such file. {field} takes a local {' or '.join(suffixes)} file."
    )
  if path.suffix not in suffixes:
    raise MnemonicError(
      f"{path}: is neither {' nor '.join(suffixes)}. Reading other formats may run code; {remedy}"
    )

  def guarded(read: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
      return read(*arguments, **options)
    except OSError as error:
      raise MnemonicError(f"{path}: cannot be read: {error.strerror or error}.") from error
    # For damaged files zipfile, zlib, struct, numpy and safetensors raise many kinds of errors.
    except Exception as error:
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
  # numpy.load would also take a pickle or a zip file with this name.
  with open(path, "rb") as file:
    return np.lib.format.read_array(file, allow_pickle=False)


def _few(names: Iterable[str]) -> str:
  """List the first names and count the others."""
  names = list(names)
  more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
  return ", ".join(names[:_SHOWN]) + more
