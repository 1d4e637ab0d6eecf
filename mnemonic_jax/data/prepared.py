"""Image sets from prepared TensorFlow Datasets folders, read without tensorflow.

Small sets are decoded once: a copy in the user's cache folder is read back in a second instead of a
minute.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from mnemonic_jax.data import decoding
from mnemonic_jax.data.split import Split, Stream, read_labels
from mnemonic_jax.errors import MnemonicError
from mnemonic_jax.multihost import user_cache
from mnemonic_jax.progress import Progress

SMALL = ("mnist", "fashion_mnist", "cifar10", "cifar100")  # decoded once, and kept in memory


class _Streamed(NamedTuple):
  """A set that stays on disk."""

  test: str  # the split to test on
  num_classes: int | None = None  # use the first classes only; None: all


STREAMED = {
  "caltech_birds2011": _Streamed("test", 40),
  "cars196": _Streamed("test", 49),
  "imagenet2012": _Streamed("validation"),
}
NAMES = (*SMALL, *STREAMED)
_ROWS = 1000  # examples read at once


def load(
  name: str, data_dir: str = "", *, side: int = 224, crop: bool = False
) -> tuple[Any, Any, tuple[str, ...]]:
  """Open a prepared TFDS set; nothing is ever downloaded.

  Args:
    name: one of `NAMES`.
    data_dir: the folder of prepared sets; else TFDS_DATA_DIR, else TFDS's default.
    side: height and width of streamed images, in pixels.
    crop: train on random resized crops of streamed images.

  Returns:
    (train, test, class names): a `Split` each for `SMALL` sets, a `Stream` each for the others.

  Raises:
    MnemonicError: the set is damaged or missing; the message then has the commands that prepare it.
  """
  tfds = _import_tfds()
  where = data_dir or None
  try:
    builder = tfds.builder(name, data_dir=where)
    prepared = builder.is_prepared()
  except Exception as error:
    raise MnemonicError(
      f"data set {name!r}: TFDS cannot open it in {where or tfds_folder(tfds)}: {error}"
    ) from error
  if not prepared:
    raise MnemonicError(
      f"data set {name!r}: not found, or not complete, at {builder.data_path}"
      f"{_other_versions(builder)}. Prepare it once with\n"
      f"  pip install 'mnemonic-jax[data]' tensorflow\n"
      f"  python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}', data_dir='DIR', "
      "file_format='array_record').download_and_prepare()\"\n"
      "and pass --data-dir DIR, or set TFDS_DATA_DIR."
    )
  names = tuple(builder.info.features["label"].names)
  if name in STREAMED:
    return _streams(tfds, builder, names, side, crop)
  train, test = (
    kept(pathlib.Path(builder.data_path), f"{name}-{split}", partial(_read, tfds, builder, split))
    for split in ("train", "test")
  )
  return train, test, names


def tfds_folder(tfds: Any) -> str:
  """Return the folder that TFDS uses by default."""
  return str(tfds.core.constants.DATA_DIR)


def _other_versions(builder: Any) -> str:
  """Say which other versions of a missing set are there."""
  folder = pathlib.Path(builder.data_path)
  found = sorted(
    entry.name for entry in folder.parent.glob("[0-9]*.[0-9]*") if entry.name != folder.name
  )
  return f" (found version {', '.join(found)}; this TFDS reads {folder.name})" if found else ""


def _source(tfds: Any, builder: Any, split: str) -> Any:
  """Open random access to the examples; images (and masks) stay encoded."""
  features = builder.info.features
  decoders = {
    name: tfds.decode.SkipDecoding()
    for name in features
    if isinstance(features[name], tfds.features.Image)
  }
  try:
    return builder.as_data_source(split=split, decoders=decoders)
  except Exception as error:
    raise MnemonicError(
      f"data set {builder.name!r}: split {split!r} at {builder.data_path} cannot be opened "
      f"({type(error).__name__}: {error}). Delete that folder and prepare it again."
    ) from error


def _streams(
  tfds: Any, builder: Any, names: tuple[str, ...], side: int, crop: bool
) -> tuple[Stream, Stream, tuple[str, ...]]:
  """Open both splits of a streamed set; of some sets only the first classes are used."""
  test, num_classes = STREAMED[builder.name]
  splits = []
  for split in ("train", test):
    called = f"{builder.name!r}, split {split!r} at {builder.data_path}"
    source = _source(tfds, builder, split)
    places, labels = np.arange(len(source)), None
    if num_classes is not None:
      labels = read_labels(called, source, len(names))
      places = np.flatnonzero(labels < num_classes)
      labels = labels[places]
    kept = num_classes or len(names)
    splits.append(Stream(called, source, places, labels, kept, side, crop and split == "train"))
  return splits[0], splits[1], names[:num_classes]


def _read(tfds: Any, builder: Any, split: str) -> Split:
  """Decode one split: TFDS reads the encoded bytes, Pillow decodes them."""
  source = _source(tfds, builder, split)
  try:
    images: list[np.ndarray] = []
    labels: list[int] = []
    with Progress(f"read {builder.name} {split}", len(source), "images") as progress:
      for start in range(0, len(source), _ROWS):
        for example in source.__getitems__(list(range(start, min(start + _ROWS, len(source))))):
          images.append(decoding.decode(example["image"], builder.info.features["image"].shape))
          labels.append(int(example["label"]))
        progress.update(len(labels) - start)
    return Split(np.stack(images), np.asarray(labels, np.int32))
  except Exception as error:
    raise MnemonicError(
      f"data set {builder.name!r}: split {split!r} at {builder.data_path} cannot be read "
      f"({type(error).__name__}: {error}). Delete that folder and prepare it again."
    ) from error


def _import_tfds() -> Any:
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise MnemonicError(
      f"prepared data sets need the data extra ({error}); "
      "install it with: pip install 'mnemonic-jax[data]'"
    ) from None
  return tfds


def kept(source: pathlib.Path, name: str, decode: Callable[[], Split]) -> Split:
  """Read the cached copy of what `decode` makes of the folder `source`, or decode and cache it.

  A copy is valid while names, sizes and times of the files in `source` stay the same. A damaged
  copy is made again. If the cache cannot be written, the set is decoded every time.
  """
  if (ours := user_cache.folder()) is None:
    return decode()
  folder = ours / "decoded"
  stats = sorted(
    (file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in source.iterdir()
  )
  fingerprint = hashlib.sha256(repr((str(source.resolve()), stats)).encode()).hexdigest()[:16]
  copy = folder / f"{name}-{fingerprint}.npz"
  damaged = contextlib.suppress(Exception)  # zipfile and NumPy raise many kinds
  with damaged, open(copy, "rb") as file, np.load(file, allow_pickle=False) as arrays:
    return Split(arrays["images"], arrays["labels"])
  split = decode()
  with contextlib.suppress(OSError):
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for older in [*folder.glob(f"{name}-*"), *folder.glob(f".{name}-*")]:
      older.unlink()
    unfinished = folder / f".{name}-{os.getpid()}"
    try:
      with open(unfinished, "xb") as target:
        np.savez(target, images=split.images, labels=split.labels, source=str(source.resolve()))
      unfinished.replace(copy)
    finally:
      unfinished.unlink(missing_ok=True)
  return split


def drop_orphans() -> None:
  """Delete the cached copies of sets that were deleted, so that no images stay behind."""
  ours = user_cache.folder()
  for copy in (ours / "decoded").glob("*.npz") if ours else ():
    source = None
    damaged = contextlib.suppress(Exception)
    with damaged, open(copy, "rb") as file, np.load(file, allow_pickle=False) as arrays:
      source = pathlib.Path(str(arrays["source"]))
    with contextlib.suppress(OSError):
      if source is None or not source.exists():
        copy.unlink()
