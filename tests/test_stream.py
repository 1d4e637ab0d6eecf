"""Streamed sets: TFDS's builders, Grain's order and workers, crops, and a run with a forget."""

from __future__ import annotations

import io
import itertools
import json
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import prepared_sets as archives
import pytest
from PIL import Image
from running import HANG, call, snapshot
from safetensors.numpy import save_file

from mnemonic_jax import _trees, data
from mnemonic_jax.data import decoding
from mnemonic_jax.data.split import Stream
from mnemonic_jax.errors import MnemonicError, UsageError
from mnemonic_jax.progress import Progress
from mnemonic_jax.runs import config as configs
from mnemonic_jax.runs import setup

pytest_plugins = ["stream_fixtures"]

BATCH = 8


def stream(count: int = 20, crop: bool = True, side: int = 24) -> Stream:
  """Cuttings of two photographs, labelled 0, 1, 2, 0, 1, 2..."""
  source = [{"image": archives.picture(i), "label": i % 3} for i in range(count)]
  labels = np.arange(count, dtype=np.int32) % 3
  return Stream("cuttings", source, np.arange(count), labels, 3, side, crop)


def batches(split: Stream, seed: int = 0, **options) -> list:
  settings = {"first_step": 0, "last_step": 5} | options
  with split.training_batches(seed, BATCH, **settings) as steps:
    return list(steps)


def same(ours, theirs) -> bool:
  pairs = zip(ours, theirs, strict=True)
  return all(np.array_equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


# --- the order


def test_an_epoch_is_a_permutation_cut_into_batches():
  steps = batches(stream())
  assert len(steps) == 5 and all(step.images.shape == (BATCH, 24, 24, 3) for step in steps)
  assert steps[0].images.dtype == np.uint8 and steps[0].labels.dtype == np.int32
  epochs = [np.concatenate([step.rows for step in steps[i : i + 2]]) for i in (0, 2)]
  for rows in epochs:
    assert len(set(rows.tolist())) == 2 * BATCH and set(rows.tolist()) <= set(range(20))
  assert not np.array_equal(*epochs)
  assert all(np.array_equal(step.labels, step.rows % 3) for step in steps)
  assert not same(steps, batches(stream(), seed=1))


@pytest.mark.parametrize("first", [1, 2, 3])
def test_a_resumed_stream_goes_on_where_it_stopped(first):
  assert same(batches(stream(), first_step=first), batches(stream())[first:])


def test_the_processes_of_a_run_share_each_batch_in_order():
  whole = batches(stream())
  parts = [batches(stream(), process=(index, 4)) for index in range(4)]
  together = [
    [np.concatenate(field) for field in zip(*step, strict=True)]
    for step in zip(*parts, strict=True)
  ]
  assert same(together, whole)
  with pytest.raises(MnemonicError, match=r"train\.batch_size: got 8 for 3 processes"):
    batches(stream(), process=(0, 3))


def test_workers_change_nothing():
  assert same(batches(stream(), workers=2, first_step=1), batches(stream(), first_step=1))


def test_the_crop_of_a_picture_depends_on_seed_epoch_and_row_alone():
  seen = {}
  for step, batch in enumerate(batches(stream(), last_step=10)):
    for row, image in zip(batch.rows, batch.images, strict=True):
      seen[step // 2, int(row)] = image
  crops = [seen[epoch, 7] for epoch in range(5) if (epoch, 7) in seen]
  assert len(crops) > 1 and not np.array_equal(crops[0], crops[1])
  larger = stream().without([])  # the same rows in other batches
  with larger.training_batches(0, 4, first_step=0, last_step=5) as steps:
    for batch in steps:
      for row, image in zip(batch.rows, batch.images, strict=True):
        if (0, int(row)) in seen:
          assert np.array_equal(image, seen[0, int(row)])
  central = batches(stream(crop=False), last_step=10)
  images = [image for b in central for row, image in zip(b.rows, b.images, strict=True) if row == 7]
  assert all(np.array_equal(image, images[0]) for image in images)


def test_workers_end_with_a_process_that_is_killed():
  program = f"""
import sys, time, multiprocessing
sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
if __name__ == "__main__":
  from test_stream import BATCH, stream
  with stream().training_batches(0, BATCH, first_step=0, last_step=10**6, workers=1) as steps:
    next(steps)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(600)
"""
  process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
  workers = [int(pid) for pid in process.stdout.readline().split()]
  assert workers and all(alive(pid) for pid in workers)
  process.kill()
  process.communicate(timeout=HANG)  # until all of them have closed the pipe
  assert not any(map(alive, workers))


def alive(pid: int) -> bool:
  try:
    return "Z" not in pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
  except OSError:
    return False


# --- pixels


def test_central_crops_are_what_pillow_makes_of_the_middle():
  content = archives.picture(5)
  picture = Image.open(io.BytesIO(content))
  width, height = picture.size
  edge = 7 / 8 * min(width, height)
  box = ((width - edge) / 2, (height - edge) / 2, (width + edge) / 2, (height + edge) / 2)
  expected = np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR, box=box))
  assert np.array_equal(decoding.central_crop(content, 32), expected)


def test_random_crops_have_the_areas_and_shapes_that_they_should():
  random = np.random.default_rng(0)
  boxes = np.asarray([decoding._random_box(400, 300, random) for _ in range(2000)])
  left, top, right, bottom = boxes.T
  assert left.min() >= 0 and top.min() >= 0 and right.max() <= 400 and bottom.max() <= 300
  shares = (right - left) * (bottom - top) / (400 * 300)
  ratios = (right - left) / (bottom - top)
  assert 0.079 < shares.min() < 0.1 and 0.9 < shares.max() <= 1.0 and 0.4 < shares.mean() < 0.54
  assert 0.74 < ratios.min() < 0.78 and 1.29 < ratios.max() < 1.35
  assert left.std() > 50 and top.std() > 40


def test_a_shape_that_no_draw_fits_gives_the_largest_rectangle_in_the_middle():
  boxes = {decoding._random_box(1000, 10, np.random.default_rng(i)) for i in range(20)}
  assert any(
    box == pytest.approx((1000 / 2 - 10 * 2 / 3, 0, 1000 / 2 + 10 * 2 / 3, 10)) for box in boxes
  )


def test_decoding_a_jpeg_at_half_its_size_shows_the_same_picture():
  buffer = io.BytesIO()
  archives_picture = archives.photographs()[0]
  Image.fromarray(archives_picture).save(buffer, "JPEG", quality=95)
  small = decoding.random_resized_crop(buffer.getvalue(), 32, np.random.default_rng(3)).astype(int)
  box = decoding._random_box(640, 427, np.random.default_rng(3))
  exact = np.asarray(
    Image.fromarray(archives_picture).resize((32, 32), Image.Resampling.BILINEAR, box=box)
  ).astype(int)
  assert np.abs(small - exact).mean() < 4


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "1", "I;16"])
def test_every_kind_of_picture_becomes_rgb(mode):
  image = Image.fromarray(archives.photographs()[1][:64, :64]).convert(
    "L" if mode == "I;16" else mode
  )
  image = image.convert(mode)
  buffer = io.BytesIO()
  image.save(buffer, "TIFF" if mode == "CMYK" else "PNG")
  for shown in (
    decoding.central_crop(buffer.getvalue(), 16),
    decoding.random_resized_crop(buffer.getvalue(), 16, np.random.default_rng(0)),
  ):
    assert shown.shape == (16, 16, 3) and shown.dtype == np.uint8


# --- bad input


CUT = archives.picture(3)[:300]


@pytest.mark.parametrize(("damage", "workers"), [(b"", 0), (b"no picture", 0), (CUT, 0), (CUT, 1)])
def test_a_damaged_picture_is_named(damage, workers):
  split = stream()
  split.source[11]["image"] = damage
  with pytest.raises(
    MnemonicError, match=r"data set cuttings: example 11 cannot be read .*prepare it again"
  ):
    batches(split, workers=workers)
  if not workers:
    with pytest.raises(MnemonicError, match=r"example 11 cannot be read"):
      list(split.batches(7))


def test_a_record_damaged_on_disk_is_named_and_loses_nothing(prepared_sets, tmp_path):
  sets = pathlib.Path(
    shutil.copytree(prepared_sets / "cars196", tmp_path / "sets" / "cars196")
  ).parent
  words = (
    "train",
    "digits_paper",
    *SETTINGS,
    "--data-dir",
    sets,
    "--train.checkpoint_every",
    1,
    "--json",
    "--out",
  )
  whole = call(*words, tmp_path / "whole").json
  run = pathlib.Path(shutil.copytree(tmp_path / "whole", tmp_path / "run"))
  shutil.rmtree(run / "checkpoints" / str(whole["steps"]))
  before = snapshot(run / "checkpoints")
  (file,) = sets.glob("cars196/*/*train*array_record*")
  content = file.read_bytes()
  file.write_bytes(content[: len(content) // 2] + bytes(4096) + content[len(content) // 2 + 4096 :])
  message = call(*words, run).refusal()
  assert "data set 'cars196', split 'train'" in message and "prepare it again" in message
  assert snapshot(run / "checkpoints") == before
  file.write_bytes(content)
  assert call(*words, run).json["params_sha256"] == whole["params_sha256"]


def test_a_picture_that_is_damaged_ends_a_training_and_loses_nothing(
  prepared_sets, tmp_path, monkeypatch
):
  """ImageNet's records are read one by one: the third step finds it, after the checkpoint."""
  settings = (
    "--data.name",
    "imagenet2012",
    *SETTINGS[2:],
    "--train.batch_size",
    3,
    "--train.steps",
    5,
  )
  words = (
    "train",
    "digits_paper",
    *settings,
    "--train.checkpoint_steps",
    2,
    "--data-dir",
    prepared_sets,
    "--json",
    "--out",
  )
  whole, run = call(*words, tmp_path / "whole").json, tmp_path / "run"
  real, calls = decoding.random_resized_crop, itertools.count(1)

  def crop(encoded, *more):
    return real(encoded[:300] if next(calls) == 9 else encoded, *more)

  with monkeypatch.context() as patched:
    patched.setattr(decoding, "random_resized_crop", crop)
    patched.setattr(
      "mnemonic_jax.data.split._AHEAD", 1
    )  # one thread, so that the ninth is of the third step
    message = call(*words, run).refusal()
  assert (
    "data set 'imagenet2012', split 'train'" in message and "cannot be read (OSError" in message
  )
  assert [path.name for path in (run / "checkpoints").iterdir()] == ["2"]
  resumed = call(*words, run).json
  assert resumed["params_sha256"] == whole["params_sha256"] and resumed["steps"] == 5


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_outside_the_classes_is_named(label):
  split = stream()
  split.source[4]["label"] = label
  with pytest.raises(MnemonicError, match=rf"holds the label {label}; expected 0 to 2"):
    list(split.batches(20))


# --- TFDS's own builders


@pytest.mark.parametrize("name", archives.CLASSES)
def test_a_set_in_the_official_layout_comes_as_it_is(name, prepared_sets):
  dataset = data.load(name, str(prepared_sets), side=48)
  num_classes = {"caltech_birds2011": 40, "cars196": 49, "imagenet2012": 1000}[name]
  assert len(dataset.class_names) == num_classes and dataset.shape == (48, 48, 3)
  present = min(num_classes, archives.CLASSES[name])
  assert dataset.train.num_examples == archives.TRAIN * present
  assert dataset.test.num_examples == archives.TEST * present
  kinds = (True, dataset.train), (False, dataset.test)
  for training, split in kinds:
    theirs = {}
    for number, label, kind in archives.examples(name):
      if kind == training and label < num_classes:
        theirs[decoding.central_crop(archives.picture(number), 48).tobytes()] = label
    images, labels = (np.concatenate(part) for part in zip(*split.batches(10), strict=True))
    ours = {image.tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    assert set(ours) == set(theirs)
    if (
      name != "imagenet2012" or training
    ):  # the builder labels ImageNet's validation pictures by its own list
      assert ours == theirs


def test_a_set_of_another_version_is_named(prepared_sets, tmp_path):
  (version,) = (prepared_sets / "cars196").iterdir()
  shutil.copytree(version, tmp_path / "cars196" / "1.0.0")
  with pytest.raises(
    MnemonicError, match=rf"found version 1\.0\.0; this TFDS reads {version.name}"
  ):
    data.load("cars196", str(tmp_path))


def test_a_resized_crop_needs_a_streamed_set():
  with pytest.raises(
    UsageError, match=r"data\.augment: got 'resized_crop' for digits; it needs a streamed set"
  ):
    data.load("digits", augment="resized_crop")


# --- a run

SETTINGS = (
  *(
    "--data.name",
    "cars196",
    "--data.augment",
    "resized_crop_flip",
    "--data.side",
    16,
    "--model.hidden",
    8,
  ),
  *("--train.batch_size", 49, "--train.epochs", 3, "--codes.rate", 0.3),
  *("--execution.data", 1, "--execution.fsdp", 1),  # of eight devices, which 49 does not suit
)


def test_a_streamed_run_stops_resumes_and_forgets(prepared_sets, tmp_path, monkeypatch):
  settings = (*SETTINGS, "--data-dir", prepared_sets)
  whole = call("train", "digits_paper", "--out", tmp_path / "whole", *settings, "--json").json
  assert whole["steps"] == 9
  real, calls = Progress.update, itertools.count(1)

  def update(self, *args, **values):
    real(self, *args, **values)
    if self._description == "train" and next(calls) == 4:
      signal.raise_signal(signal.SIGTERM)

  with monkeypatch.context() as patched:
    patched.setattr(Progress, "update", update)
    stopped = call("train", "digits_paper", "--out", tmp_path / "run", *settings)
  assert stopped.code == 143 and "stopped after epoch 1.667 of 3" in stopped.err
  resumed = call(
    "train",
    "digits_paper",
    "--out",
    tmp_path / "run",
    *settings,
    "--execution.workers",
    1,
    "--json",
  ).json
  assert resumed["params_sha256"] == whole["params_sha256"]
  unflipped = call(
    "train",
    "digits_paper",
    "--out",
    tmp_path / "no",
    *settings,
    "--data.augment",
    "resized_crop",
    "--json",
  ).json
  assert unflipped["params_sha256"] != whole["params_sha256"]
  forgotten = call(
    "forget", tmp_path / "run", "--classes", 3, "--data-dir", prepared_sets, "--json"
  ).json
  assert forgotten["classes"] == [3] and len(forgotten["per_class_accuracy_after"]) == 49
  scores = call("evaluate", tmp_path / "run", "--data-dir", prepared_sets, "--json").json
  assert scores["forgotten"]["retain_accuracy"] == forgotten["retain_accuracy_after"]


@pytest.mark.long
def test_imagenet_trains_for_some_steps_with_checkpoints_between(prepared_sets, tmp_path):
  settings = (
    "--data.name",
    "imagenet2012",
    *SETTINGS[2:],
    "--train.batch_size",
    3,
    "--train.steps",
    7,
  )
  more = ("--train.checkpoint_steps", 2, "--data-dir", prepared_sets)
  result = call("train", "digits_paper", "--out", tmp_path / "run", *settings, *more, "--json").json
  assert result["steps"] == 7 and result["epochs"] == pytest.approx(7 / 3)
  assert sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()) == [6, 7]
  lines = [
    json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  ]
  assert [line["step"] for line in lines] == [2, 3, 4, 6, 7]
  assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))
  forgotten = call(
    "forget", tmp_path / "run", "--classes", 999, "--data-dir", prepared_sets, "--json"
  ).json
  assert forgotten["classes"] == [999]


@pytest.mark.long
@pytest.mark.parametrize(
  "name", [name for name in configs.names() if configs.load(name).data.name in archives.CLASSES]
)
def test_the_configs_of_streamed_sets_train(name, prepared_sets, tmp_path):
  """Two steps of four pictures; with few classes, a forget.

  A config that starts from a file of weights gets one of random weights.
  """
  side = 224 if "swin" in name else 32
  config = configs.load(name, {"data.side": side})
  words = ("--data-dir", prepared_sets, "--data.side", side, "--execution.workers", 0)
  words += ("--train.batch_size", 4, "--train.steps", 2)
  words += ("--execution.data", 1, "--execution.fsdp", 1)
  if config.model.pretrained:
    dataset = data.load(config.data.name, str(prepared_sets), side=side, training=False)
    params, model_state = setup.make_model(config, dataset).init(jax.random.key(7))
    arrays = _trees.by_path(params) | _trees.by_path({"model_state": model_state})
    save_file(
      {path: np.asarray(leaf) for path, leaf in arrays.items()}, tmp_path / "weights.safetensors"
    )
    words += ("--model.pretrained", tmp_path / "weights.safetensors")
  result = call("train", name, "--out", tmp_path / "run", *words, "--json").json
  assert result["steps"] == 2 and np.isfinite(result["loss"])
  assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]
  if config.data.name != "imagenet2012":
    forgotten = call(
      "forget", tmp_path / "run", "--classes", 3, "--data-dir", prepared_sets, "--json"
    ).json
    assert (
      forgotten["classes"] == [3] and forgotten["params_sha256_before"] == result["params_sha256"]
    )


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Classes without a judge")  # three pictures a class
@pytest.mark.filterwarnings("ignore:The model classifies")
def test_a_vit_trained_without_codes_learns_them_and_forgets_by_the_default(
  prepared_sets, tmp_path
):
  """As a config with codes in training says how to vary it; few classes, all with pictures."""
  words = ("--codes.rate", 0, "--data.name", "cars196", "--data.side", 32, "--model.pretrained", "")
  words += ("--train.batch_size", 49, "--train.steps", 4, "--train.learning_rate", 0.01)
  words += ("--execution.data", 1, "--execution.fsdp", 1, "--data-dir", prepared_sets)
  result = call("run", "imagenet_vit_s16", *words, "--out", tmp_path / "run", "--json").json
  codes, forgotten = result["codes"], result["forget"]
  assert codes["classes"] == 49 and codes["read"] == ["params", "training examples"]
  assert forgotten["method"]["name"] == "projection" and forgotten["forget_error_after"] == 1
  assert forgotten["codes_sha256"] == codes["codes_sha256"] != result["train"]["codes_sha256"]
