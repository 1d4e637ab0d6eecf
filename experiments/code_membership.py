"""Attack learned codes: do they give away which pictures they were learned from?

Command:  python experiments/code_membership.py CONFIG RUN --data-dir DIR [--share 0.1]

RUN is a finished training with codes.rate 0. Codes and judges are learned anew from a share of its
training data, the members. The others were trained on as well, so what the model itself gives away
counts for both, and what is left is that of the codes. Two attacks, each the area under the ROC
curve (0.5: nothing) with a 95 % interval from 500 bootstraps: how near a picture's features are to
the nearest code or judge of its class, and how near its pixels are. Writes
results/code_membership_NAME.json, and a picture of each class's code beside the member nearest to
it.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
import tempfile
from typing import Any

import common
import jax
import matplotlib
import numpy as np
from etils import epath
from sklearn.metrics import roc_auc_score

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from mnemonic_jax.cli.parser import dotted_overrides
from mnemonic_jax.data import Dataset
from mnemonic_jax.learning import LearnedCodes
from mnemonic_jax.runs import config as configs
from mnemonic_jax.runs import files, learned, setup
from mnemonic_jax.runs import trained as trained_run
from mnemonic_jax.runs.folder import RunFolder
from mnemonic_jax.runs.trained import Trained

BOOTSTRAPS, ROWS = 500, 2500


def references(codes: LearnedCodes) -> tuple[np.ndarray, np.ndarray]:
  """All codes and judges (C, R, *shape), and which of them there are (C, R)."""
  there = np.concatenate([np.ones(codes.codes.shape[:2], bool), codes.judge_weights > 0], axis=1)
  return np.concatenate([codes.codes, codes.judges], axis=1), there


def distances(
  vectors: np.ndarray, labels: np.ndarray, codes: np.ndarray, there: np.ndarray
) -> np.ndarray:
  """The squared distance (N,) of each vector to the nearest code of its class."""
  found = np.empty(len(vectors))
  for label in range(len(codes)):
    rows = np.flatnonzero(labels == label)
    own = codes[label][there[label]]
    each = [np.sum((vectors[rows] - code) ** 2, axis=1) for code in own]
    found[rows] = np.min(each, axis=0)
  return found


def attacked(near: np.ndarray, members: np.ndarray, rng: np.random.Generator) -> list[float]:
  """The area under the ROC curve and its interval."""
  scores = [roc_auc_score(members, near)]
  for _ in range(BOOTSTRAPS):
    rows = rng.integers(len(near), size=len(near))
    scores.append(roc_auc_score(members[rows], near[rows]))
  return [scores[0], *np.quantile(scores[1:], (0.025, 0.975))]


def study(model: Trained, config: Any, dataset: Dataset, share: float, picture: Any) -> Any:
  """Learn codes from a share of the data, and attack them."""
  rng, train = np.random.default_rng(0), dataset.train
  members = np.zeros(train.num_examples, bool)
  members[rng.permutation(len(members))[: int(share * len(members))]] = True
  part = dataclasses.replace(dataset, train=train.part(np.flatnonzero(members)))
  with tempfile.TemporaryDirectory() as folder:
    path = epath.Path(folder) / "codes.safetensors"
    learned.learn(model, config, part, path, learned.Request())
    sha256 = files.params_sha256(model.params)
    codes = learned.load(path, sha256, len(dataset.class_names), dataset.shape)
  features = jax.jit(lambda x: model.model.features(model.params, model.model_state, x))
  inputs = np.concatenate([np.asarray(dataset.preprocess(x)) for x, _ in train.batches(ROWS)])
  of = lambda x: np.concatenate([features(x[i : i + ROWS]) for i in range(0, len(x), ROWS)])
  read = of(inputs)
  sd = read.std(0) + 0.05 * read.std()
  own, there = references(codes)
  of_codes = of(own.reshape(-1, *dataset.shape)).reshape(*own.shape[:2], -1)
  in_features = distances(read / sd, train.labels, of_codes / sd, there)
  flat = inputs.reshape(len(inputs), -1)
  in_pixels = distances(flat, train.labels, own.reshape(*own.shape[:2], -1), there)
  draw(codes, inputs, train.labels, np.where(members, in_pixels, np.inf), picture)
  return {
    "share": share,
    "members": int(members.sum()),
    "others": int((~members).sum()),
    "features": attacked(-in_features, members, rng),
    "pixels": attacked(-in_pixels, members, rng),
  }


def draw(codes: LearnedCodes, inputs: np.ndarray, labels: Any, near: np.ndarray, path: Any) -> None:
  """Each class's code, and the member whose pixels are nearest to a code or judge of it."""
  number = len(codes.codes)
  _, axes = plt.subplots(2, number, figsize=(number, 2.2), squeeze=False)
  for label in range(number):
    nearest = inputs[np.argmin(np.where(labels == label, near, np.inf))]
    for axis, image in zip(axes[:, label], (codes.codes[label, 0], nearest), strict=True):
      low, high = np.min(image), np.max(image)
      axis.imshow((np.asarray(image) - low) / (high - low), cmap="gray")
      axis.axis("off")
  plt.tight_layout()
  plt.savefig(path, dpi=80)


def main() -> None:
  """Attack, print, save."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("config", help="a named config or a TOML file")
  parser.add_argument("run", type=epath.Path, help="the folder of its training")
  parser.add_argument("--data-dir", default="", help="prepared TFDS folder (else TFDS_DATA_DIR)")
  parser.add_argument("--share", type=float, default=0.1, help="of the training data")
  overrides, rest = dotted_overrides(sys.argv[1:])
  options = parser.parse_args(rest)
  config = configs.load(options.config, {"codes.rate": 0.0, **overrides})
  dataset = setup.load_data(config, options.data_dir)
  model = trained_run.restore(RunFolder.open(options.run), dataset)
  name = f"code_membership_{common.study_name(config, overrides)}"
  picture = pathlib.Path(common.RESULTS) / f"{name}.png"
  found = study(model, config, dataset, options.share, picture)
  (common.RESULTS / f"{name}.json").write_text(files.dumps(found) + "\n")
  for what in ("features", "pixels"):
    area, low, high = found[what]
    print(f"{what}: area under the ROC curve {area:.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
  main()
