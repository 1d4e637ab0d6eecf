"""Prepare a small CUB, Cars or ImageNet with TFDS's builders, from archives like the official ones.

Run it in a process of its own: python tests/prepared_sets.py OUT NAME... The images are cut from
the two photographs that scikit-learn ships. TFDS's builders open files with tensorflow and read
masks with OpenCV. Without them, stand-ins provide the few functions that the builders call.
Everything else is TFDS's own code.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import itertools
import os
import pathlib
import sys
import tarfile
import tempfile
import types

import numpy as np
import scipy.io
from PIL import Image
from sklearn.datasets import load_sample_images

TRAIN, TEST = 3, 2  # images per class
CLASSES = {"caltech_birds2011": 42, "cars196": 51, "imagenet2012": 3}  # the first ones


photographs = functools.cache(lambda: load_sample_images().images)


@functools.cache
def picture(number: int, format: str = "JPEG") -> bytes:
  """The number-th cutting, encoded. No two have the same place and size."""
  photograph = photographs()[number % len(photographs())]
  height, width = 90 + number % 31, 100 + number % 37
  top = (17 * number) % (photograph.shape[0] - height)
  left = (29 * number) % (photograph.shape[1] - width)
  buffer = io.BytesIO()
  Image.fromarray(photograph[top : top + height, left : left + width]).save(
    buffer, format, quality=95
  )
  return buffer.getvalue()


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
  """Add one file to a tar."""
  entry = tarfile.TarInfo(name)
  entry.size = len(content)
  archive.addfile(entry, io.BytesIO(content))


def examples(name: str):
  """Yield (number, label, whether it is for training) of each image."""
  number = 0
  for label in range(CLASSES[name]):
    for place in range(TRAIN + TEST):
      yield number, label, place < TRAIN
      number += 1


def birds(folder: pathlib.Path) -> None:
  """Write CUB_200_2011.tgz and segmentations.tgz."""
  images, splits, boxes = [], [], []
  with (
    tarfile.open(folder / "CUB_200_2011.tgz", "w:gz") as archive,
    tarfile.open(folder / "segmentations.tgz", "w:gz") as masks,
  ):
    for number, label, training in examples("caltech_birds2011"):
      name = f"{label + 1:03d}.Bird_{label + 1}/Bird_{label + 1}_{number:04d}_{number}"
      content = picture(number)
      add(archive, f"CUB_200_2011/images/{name}.jpg", content)
      mask = np.zeros(Image.open(io.BytesIO(content)).size[::-1], np.uint8)
      buffer = io.BytesIO()
      Image.fromarray(mask).save(buffer, "PNG")
      add(masks, f"segmentations/{name}.png", buffer.getvalue())
      images.append(f"{number + 1} {name}.jpg")
      splits.append(f"{number + 1} {int(training)}")
      boxes.append(f"{number + 1} 10.0 10.0 50.0 40.0")
    for name, lines in (
      ("images", images),
      ("train_test_split", splits),
      ("bounding_boxes", boxes),
    ):
      add(archive, f"CUB_200_2011/{name}.txt", ("\n".join(lines) + "\n").encode())


def cars(folder: pathlib.Path) -> None:
  """Write cars_train.tgz, cars_test.tgz, car_devkit.tgz and cars_test_annos_withlabels.mat."""
  fields = [
    (name, object) for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")
  ]
  annotations: dict[bool, list] = {True: [], False: []}
  with (
    tarfile.open(folder / "cars_train.tgz", "w:gz") as train,
    tarfile.open(folder / "cars_test.tgz", "w:gz") as test,
  ):
    for number, label, training in examples("cars196"):
      archive, where = (train, "cars_train") if training else (test, "cars_test")
      add(archive, f"{where}/{number:05d}.jpg", picture(number))
      annotations[training].append((5, 6, 70, 80, label + 1, f"{number:05d}.jpg"))
  for training, file in ((True, "cars_train_annos.mat"), (False, "cars_test_annos_withlabels.mat")):
    scipy.io.savemat(folder / file, {"annotations": np.array([annotations[training]], fields)})
  with tarfile.open(folder / "car_devkit.tgz", "w:gz") as archive:
    archive.add(folder / "cars_train_annos.mat", "devkit/cars_train_annos.mat")


def imagenet(folder: pathlib.Path) -> None:
  """Write ILSVRC2012_img_train.tar, with one tar per synset in it, and the flat ..._val.tar."""
  import tensorflow_datasets as tfds

  base = pathlib.Path(tfds.__file__).parent / "datasets/imagenet2012"
  synsets = (base / "labels.txt").read_text().split()
  with (
    tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as train,
    tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as validation,
  ):
    for synset, group in itertools.groupby(
      examples("imagenet2012"), key=lambda example: synsets[example[1]]
    ):
      inner = io.BytesIO()
      with tarfile.open(fileobj=inner, mode="w") as archive:
        for number, _, training in group:
          if training:
            add(archive, f"{synset}_{number}.JPEG", picture(number))
          else:
            add(validation, f"ILSVRC2012_val_{number + 1:08d}.JPEG", picture(number))
      add(train, f"{synset}.tar", inner.getvalue())


def stand_in_for_tensorflow() -> None:
  """Provide what TFDS's builders and its unpacking of archives call to open files."""

  def open_or_pass(file, mode="r"):
    opened = file if hasattr(file, "read") else open(file, mode)  # noqa: SIM115
    # tensorflow's file opens itself again after it was closed.
    return contextlib.nullcontext(opened) if mode == "rb" else opened

  gfile = types.SimpleNamespace(
    GFile=open_or_pass,
    exists=os.path.exists,
    listdir=os.listdir,
    walk=os.walk,
  )
  stand_in = types.SimpleNamespace(
    io=types.SimpleNamespace(gfile=gfile),
    compat=types.SimpleNamespace(as_text=lambda text: os.fspath(text)),
  )
  for name in (
    "core.download.extractor",
    "image_classification.caltech_birds",
    "image_classification.cars196",
    "datasets.imagenet2012.imagenet2012_dataset_builder",
    "datasets.imagenet2012.imagenet_common",
  ):
    importlib.import_module(f"tensorflow_datasets.{name}").tf = stand_in


class Mask(io.BytesIO):
  """The encoded bytes of a mask, with the shape that the builder asks for. TFDS stores bytes."""

  shape: tuple[int, ...] = ()

  def __getitem__(self, _: object) -> Mask:
    return self


def stand_in_for_opencv() -> None:
  """Provide a `cv2.imdecode` that leaves masks encoded, so that nothing must encode them again."""
  opencv = types.ModuleType("cv2")

  def imdecode(content: np.ndarray, flags: int) -> Mask:
    mask = Mask(content.tobytes())
    mask.shape = Image.open(io.BytesIO(content.tobytes())).size[::-1]
    return mask

  opencv.imdecode = imdecode
  sys.modules["cv2"] = opencv


def main(out: str, *names: str) -> None:
  """Make the archives and let TFDS prepare the sets."""
  if importlib.util.find_spec("tensorflow") is None:
    stand_in_for_tensorflow()
  if importlib.util.find_spec("cv2") is None:
    stand_in_for_opencv()
  for name in names:
    prepare(out, name)


def prepare(out: str, name: str) -> None:
  import tensorflow_datasets as tfds

  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    {"caltech_birds2011": birds, "cars196": cars, "imagenet2012": imagenet}[name](folder)
    manager = tfds.download.DownloadManager

    def local(self, url: str) -> pathlib.Path:
      return folder / url.split("/")[-1].split("?")[0]

    def download(self, urls):
      return [local(self, url) for url in urls]

    def download_and_extract(self, urls):
      one = lambda url: local(self, url) if url.endswith(".mat") else self.extract(local(self, url))
      return (
        {key: one(url) for key, url in urls.items()}
        if isinstance(urls, dict)
        else [one(url) for url in urls]
      )

    manager.download, manager.download_and_extract = download, download_and_extract
    builder = tfds.builder(name, data_dir=out, file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=temporary))
  print({split: info.num_examples for split, info in builder.info.splits.items()})


if __name__ == "__main__":
  main(*sys.argv[1:])
