"""Data sets: the real bytes, one fixed split, no example in both train and test."""

from __future__ import annotations

import gzip
import hashlib
import io
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from mnemonic_jax import data
from mnemonic_jax.data import decoding, prepared
from mnemonic_jax.data.split import Split
from mnemonic_jax.errors import MnemonicError, UsageError

SHARED = pathlib.Path(__file__).parents[1].parent / "shared" / "data"
IDX = {
  "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
  "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


WHOLE = {"train": 60_000, "test": 10_000}
FIRST = {"train": 2_300, "test": 300}  # more than are read at once, and no multiple of it


def rows(images: np.ndarray) -> list[bytes]:
  return [image.tobytes() for image in images]


def test_digits_are_scikit_learns_and_split_without_overlap():
  digits = data.load("digits")
  train, test = digits.train, digits.test
  assert train.images.dtype == test.images.dtype == np.uint8 and train.labels.dtype == np.int32
  assert train.images.shape == (1437, 8, 8, 1) and test.images.shape == (360, 8, 8, 1)
  source = load_digits()
  everything = sorted(
    zip(rows(source.images.astype(np.uint8)[..., None]), source.target.tolist(), strict=True)
  )
  ours = [*zip(rows(train.images), train.labels.tolist(), strict=True)]
  ours += zip(rows(test.images), test.labels.tolist(), strict=True)
  assert sorted(ours) == everything  # each image once, with its own label


def test_digits_are_stratified():
  digits = data.load("digits")
  train, test = (np.bincount(split.labels, minlength=10) for split in (digits.train, digits.test))
  assert np.all(np.abs(test / (train + test) - 0.2) < 0.005)


def test_the_digits_split_is_fixed():
  """If these numbers change, every published figure must be measured again."""
  digits = data.load("digits")
  digest = hashlib.sha256(
    digits.test.images.tobytes() + digits.test.labels.astype("<i4").tobytes()
  ).hexdigest()
  assert digest == "b73ad886c973a728a3983062b04e72cc2f7effc9643c50702683ffd0c5faf323"
  assert np.array_equal(digits.test.images, data.load("digits").test.images)


def test_preprocessing_ends_in_zero_to_one():
  digits = data.load("digits")
  seen = jax.jit(digits.preprocess)(digits.train.images)
  assert seen.dtype == jnp.float32
  assert (float(seen.min()), float(seen.max())) == (0.0, 1.0)
  assert digits.shape == (8, 8, 1) and digits.class_names == tuple("0123456789")


def test_leaving_classes_out_touches_only_training():
  digits = data.load("digits")
  without = digits.without((3, 5))
  assert set(without.train.labels.tolist()) == {0, 1, 2, 4, 6, 7, 8, 9}
  assert len(without.train.images) == len(without.train.labels)
  assert without.test is digits.test


def test_an_unknown_data_set():
  with pytest.raises(UsageError, match=r"unknown data set 'mnits'\. Did you mean mnist\?"):
    data.load("mnits")


def require_mnist() -> None:
  pytest.importorskip("tensorflow_datasets")
  if not (SHARED / "mnist").is_dir():
    pytest.skip("the original MNIST files are not at ../shared/data/mnist")


@pytest.fixture(scope="session")
def whole_mnist(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A folder with MNIST prepared for TFDS from the original files, which takes 20 s."""
  require_mnist()
  folder = tmp_path_factory.mktemp("tfds")
  command = [sys.executable, str(SHARED / "prepare_tfds.py"), "--out", str(folder), "mnist"]
  done = subprocess.run(command, text=True, capture_output=True)
  assert done.returncode == 0, done.stderr
  return folder


@pytest.fixture(scope="session")
def tfds_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """The same with the first examples of each split only."""
  require_mnist()
  import tensorflow_datasets as tfds
  from tensorflow_datasets.image_classification.mnist import MNIST

  with tfds.core.registered.skip_registration():

    class FirstExamples(MNIST):
      def _split_generators(self, manager):
        return {split: examples_of(split) for split in IDX}

  FirstExamples.name = "mnist"
  folder = tmp_path_factory.mktemp("tfds")
  FirstExamples(data_dir=folder, file_format="array_record").download_and_prepare()
  return folder


def examples_of(split: str):
  """Yield the first examples of a split of MNIST as TFDS takes them."""
  for index, (image, label) in enumerate(zip(*original(split, FIRST[split]), strict=True)):
    encoded = io.BytesIO()
    Image.fromarray(image.reshape(28, 28)).save(encoded, "PNG")
    encoded.seek(0)
    yield index, {"image": encoded, "label": int(label)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def original(split: str, number: int | None = None) -> tuple[np.ndarray, np.ndarray]:
  """The images (N, 784) and labels of the original files, or the first of them."""
  images, labels = IDX[split]
  return idx(images, 16).reshape(-1, 784)[:number], idx(labels, 8)[:number]


def idx(name: str, header: int) -> np.ndarray:
  """The bytes after the header of an idx file, zipped or not."""
  (file,) = (SHARED / "mnist").glob(f"{name}*")
  content = file.read_bytes()
  return np.frombuffer(gzip.decompress(content) if file.suffix == ".gz" else content, np.uint8)[
    header:
  ]


@pytest.mark.parametrize(
  ("folder", "number"),
  [("tfds_folder", FIRST), pytest.param("whole_mnist", WHOLE, marks=pytest.mark.long)],
)
def test_mnist_is_byte_for_byte_the_original(folder, number, request, capfd):
  folder = request.getfixturevalue(folder)
  capfd.readouterr()
  mnist = data.load("mnist", str(folder))
  assert mnist.class_names == tuple("0123456789") and mnist.levels == 255
  for split in IDX:
    ours, (images, labels) = getattr(mnist, split), original(split, number[split])
    assert ours.images.dtype == np.uint8 and ours.images.shape[1:] == (28, 28, 1)
    theirs = sorted(zip(rows(images), labels.tolist(), strict=True))
    assert sorted(zip(rows(ours.images), ours.labels.tolist(), strict=True)) == theirs
  err = capfd.readouterr().err
  assert f"read mnist test: {number['test']}/{number['test']} images" in err
  assert all(line.startswith("read mnist") for line in err.splitlines()), err


def test_a_damaged_prepared_set_says_what_to_do(tfds_folder, tmp_path):
  (version,) = (tfds_folder / "mnist").iterdir()
  copy = tmp_path / "mnist" / version.name
  copy.mkdir(parents=True)
  for file in version.iterdir():
    content = file.read_bytes()
    (copy / file.name).write_bytes(
      content[: len(content) // 2] if "array_record" in file.name else content
    )
  with pytest.raises(MnemonicError, match="Delete that folder and prepare it again") as caught:
    data.load("mnist", str(tmp_path))
  assert "split 'train'" in str(caught.value)


@pytest.mark.parametrize("shape", [(28, 28, 3), (14, 28)])
def test_an_image_of_another_shape_is_named(shape, tfds_folder, monkeypatch):
  odd = io.BytesIO()
  Image.fromarray(np.zeros(shape, np.uint8)).save(odd, "PNG")
  real = decoding.decode
  monkeypatch.setattr(decoding, "decode", lambda encoded, expected: real(odd.getvalue(), expected))
  with pytest.raises(
    MnemonicError,
    match=r"split 'train' .* an image is uint8 \(\d+, 28, \d\); expected uint8 \(28, 28, 1\)",
  ):
    data.load("mnist", str(tfds_folder))


@pytest.mark.parametrize(
  ("labels", "message"),
  [
    ([0, 1, 2, 3], r"holds the label 3; expected 0 to 2"),
    ([0, 2, 2, 0], r"class 1 \(b\) has no training example"),
  ],
)
def test_labels_that_do_not_fit_are_refused(labels, message, monkeypatch):
  split = Split(np.zeros((4, 2, 2, 1), np.uint8), np.asarray(labels, np.int32))
  monkeypatch.setattr(
    data.prepared, "load", lambda *arguments, **options: (split, split, ("a", "b", "c"))
  )
  with pytest.raises(MnemonicError, match=message):
    data.load("mnist")

  # A label of the test split alone, also where nothing is trained.
  whole = Split(split.images, np.array([0, 1, 2, 0], np.int32))
  wrong = Split(split.images, np.array([0, 1, 2, -1], np.int32))
  monkeypatch.setattr(
    data.prepared, "load", lambda *arguments, **options: (whole, wrong, ("a", "b", "c"))
  )
  with pytest.raises(MnemonicError, match=r"holds the label -1; expected 0 to 2"):
    data.load("mnist", training=False)


@pytest.mark.parametrize(
  ("name", "normalization", "darkest", "brightest"),
  [
    ("mnist", "dataset", (0,), (1,)),
    ("digits", "half", (-1,), (1,)),
    ("cifar10", "half", (-1, -1, -1), (1, 1, 1)),
    ("cifar10", "dataset", (-1.9895, -1.9803, -1.7068), (2.0591, 2.1265, 2.1158)),
    ("cifar100", "dataset", (-1.8971, -1.8974, -1.5963), (1.8440, 2.0027, 2.0243)),
    ("imagenet2012", "dataset", (-2.118, -2.036, -1.804), (2.249, 2.429, 2.640)),
    ("cars196", "dataset", (-2.118, -2.036, -1.804), (2.249, 2.429, 2.640)),
  ],
)
def test_what_a_model_sees_of_the_darkest_and_the_brightest_pixel(
  name, normalization, darkest, brightest, monkeypatch
):
  black = np.zeros((3, 2, 2, len(darkest)), np.uint8)
  split = Split(black, np.arange(3, dtype=np.int32))
  monkeypatch.setattr(
    data.prepared, "load", lambda *arguments, **options: (split, split, ("a", "b", "c"))
  )
  dataset = data.load(name, normalization=normalization)
  for pixels, seen in (black, darkest), (np.full_like(black, dataset.levels), brightest):
    np.testing.assert_allclose(
      dataset.preprocess(pixels), np.broadcast_to(seen, pixels.shape), atol=5e-4
    )


def test_a_set_to_evaluate_needs_no_training_example(monkeypatch):
  """The images of a class to forget may be gone."""
  split = Split(np.zeros((4, 2, 2, 1), np.uint8), np.array([0, 2, 2, 0], np.int32))
  monkeypatch.setattr(
    data.prepared, "load", lambda *arguments, **options: (split, split, ("a", "b", "c"))
  )
  assert data.load("mnist", training=False).train is split


def test_a_set_is_decoded_once(tmp_path, monkeypatch):
  draw, calls = np.random.default_rng(0), []
  source, cache = tmp_path / "source", tmp_path / "cache" / "mnemonic_jax" / "decoded"
  source.mkdir()
  (source / "record").write_bytes(b"one")

  def decode() -> Split:
    calls.append(1)
    return Split(draw.integers(0, 256, (3, 2, 2, 1), np.uint8), np.arange(3, dtype=np.int32))

  def load() -> Split:
    return prepared.kept(source, "set-train", decode)

  first, again = load(), load()
  assert len(calls) == 1 and all(
    np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(first, again, strict=True)
  )
  (copy,) = cache.iterdir()
  for damage in (
    b"",
    copy.read_bytes()[:-30],
    copy.read_bytes().replace(first.images.tobytes(), bytes(12)),
  ):
    copy.write_bytes(damage)
    calls.clear()
    load()
    assert calls == [1]
    copy.write_bytes(copy.read_bytes())
  (source / "record").write_bytes(b"more")
  calls.clear()
  load()
  assert calls == [1] and len(list(cache.iterdir())) == 1  # the copy of the files before is gone
  (other := tmp_path / "other").mkdir()
  prepared.kept(other, "other-train", decode)
  assert len(list(cache.iterdir())) == 2
  shutil.rmtree(other)
  prepared.drop_orphans()  # the set was deleted, and so its copy is
  assert [path.name[:9] for path in cache.iterdir()] == ["set-train"]
  for whatever in (b"PK\3\4", b"", bytes(100)):  # damaged: nobody knows of which set
    (cache / "set-test-0.npz").write_bytes(whatever)
    prepared.drop_orphans()
    assert len(list(cache.iterdir())) == 1
  shutil.rmtree(cache)
  cache.write_text("no folder")
  prepared.drop_orphans()
  assert np.array_equal(load().labels, np.arange(3))


def test_a_half_prepared_set_says_what_to_do(tfds_folder, tmp_path):
  (version,) = (tfds_folder / "mnist").iterdir()
  (tmp_path / "mnist" / version.name).mkdir(parents=True)
  with pytest.raises(MnemonicError, match=r"data set 'mnist'"):
    data.load("mnist", str(tmp_path))
