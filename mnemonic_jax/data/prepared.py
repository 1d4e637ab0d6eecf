"""Small image sets from prepared TensorFlow Datasets folders, read without tensorflow."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from mnemonic_jax.data.split import Split
from mnemonic_jax.errors import MnemonicError
from mnemonic_jax.progress import Progress

NAMES = ("mnist", "fashion_mnist", "cifar10", "cifar100")
_ROWS = 1000  # examples read at once


def load(name: str, data_dir: str = "") -> tuple[Split, Split, tuple[str, ...]]:
  """Read train and test of the TFDS set `name` from `data_dir`, else TFDS_DATA_DIR, else TFDS's default folder.

  Nothing is ever downloaded: a missing set raises with the commands that prepare it.
  """
  tfds = _import_tfds()
  where = data_dir or None
  try:
    builder = tfds.builder(name, data_dir=where)
    prepared = builder.is_prepared()
  except Exception as error:
    raise MnemonicError(f"data set {name!r}: TFDS cannot open it in {where or tfds_folder(tfds)}: {error}") from error
  if not prepared:
    raise MnemonicError(
      f"data set {name!r}: not found, or not whole, at {builder.data_path}. Prepare it once with\n"
      f"  pip install 'mnemonic-jax[data]' tensorflow\n"
      f"  python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}', data_dir='DIR', "
      "file_format='array_record').download_and_prepare()\"\n"
      "and pass --data-dir DIR, or set TFDS_DATA_DIR."
    )
  names = tuple(builder.info.features["label"].names)
  return _read(tfds, builder, "train"), _read(tfds, builder, "test"), names


def tfds_folder(tfds: Any) -> str:
  """The folder that TFDS uses when none is given."""
  return str(tfds.core.constants.DATA_DIR)


def _read(tfds: Any, builder: Any, split: str) -> Split:
  """Decode one split; the encoded bytes come from TFDS, the pixels from Pillow."""
  try:
    source = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    images: list[np.ndarray] = []
    labels: list[int] = []
    with Progress(f"read {builder.name} {split}", len(source), "images") as progress:
      for start in range(0, len(source), _ROWS):
        for example in source.__getitems__(list(range(start, min(start + _ROWS, len(source))))):
          with Image.open(io.BytesIO(example["image"])) as picture:
            pixels = np.asarray(picture)
          images.append(pixels if pixels.ndim == 3 else pixels[..., None])
          labels.append(int(example["label"]))
        progress.update(len(labels) - start)
    return Split(np.stack(images), np.asarray(labels, np.int32))
  except Exception as error:
    raise MnemonicError(
      f"data set {builder.name!r}: split {split!r} at {builder.data_path} cannot be read ({type(error).__name__}: {error}). "
      "Delete that folder and prepare it again."
    ) from error


def _import_tfds() -> Any:
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise MnemonicError(
      f"prepared data sets need the data extra ({error}); install it with: pip install 'mnemonic-jax[data]'"
    ) from None
  return tfds
