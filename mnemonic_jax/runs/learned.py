"""Learned codes of a run: learn them, keep them in one file, read them back.

    RUN/codes/learned.safetensors     the arrays of a `LearnedCodes`

Its metadata are "params_sha256" and "read". The hash names the params that the codes were learned
from: codes of another model mean nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
from etils import epath
from safetensors.numpy import save_file

from mnemonic_jax import learning
from mnemonic_jax.data import Dataset
from mnemonic_jax.errors import MnemonicError
from mnemonic_jax.fisher import Execution
from mnemonic_jax.learning import LearnedCodes
from mnemonic_jax.multihost import processes
from mnemonic_jax.multihost.processes import Watchdog
from mnemonic_jax.multihost.sharding import Layout
from mnemonic_jax.progress import Progress
from mnemonic_jax.runs import files, scoring
from mnemonic_jax.runs.config import Config
from mnemonic_jax.runs.folder import RunFolder
from mnemonic_jax.runs.trained import Trained

_ROWS = 500  # pictures at once
_NAMES = [field.name for field in dataclasses.fields(LearnedCodes)]


class Request(NamedTuple):
  """What `mnemonic codes` is asked for."""

  from_model: bool = False  # recall them from the model alone; no picture is read
  per_class: int | None = None
  recall: int = 0  # recalled codes a class beside learned ones
  seed: int = 0


def path_in(run: RunFolder) -> epath.Path:
  """Where a run keeps its learned codes."""
  return run.path / "codes" / "learned.safetensors"


def learn(
  trained: Trained,
  config: Config,
  dataset: Dataset,
  out: epath.Path,
  request: Request,
  *,
  layout: Layout | None = None,
  watchdog: Watchdog | None = None,
  microbatch: int | None = None,
) -> dict[str, Any]:
  """Learn or recall the codes of a trained model, and write them to the new file `out`.

  On a mesh each process reads its part of the data, and all learn the same codes. `microbatch`:
  how many codes at a time; None: as many as fit in memory.
  """
  refuse_existing(out)
  layout, watchdog = layout or Layout(), watchdog or Watchdog()
  train, num_classes = dataset.train, len(dataset.class_names)
  preprocess = jax.jit(dataset.preprocess)
  batches = None
  if not request.from_model:
    if not train.num_examples:
      raise MnemonicError(
        f"{config.data.name}: its training pictures are gone, so codes cannot be learned. Recall "
        "them from the model alone, with --recall."
      )
    parts = scoring.batches(train, layout, watchdog, _ROWS, of="the pass over data")
    batches = ((preprocess(x), y, mask) for x, y, mask in parts)
  lowest, highest = (preprocess(np.full((1, *dataset.shape), v, np.uint8))[0] for v in (0, 255))
  started = time.perf_counter()
  watchdog.phase("the first of the codes to learn")
  with _progress(watchdog) as progress:
    found = learning.learn_codes(
      jax.random.key(request.seed),
      trained.logits_fn,
      trained.params,
      batches,
      num_classes=num_classes,
      per_class=request.per_class,
      recall=request.recall,
      shape=dataset.shape,
      input_range=(lowest, highest),
      statistics_fn=trained.model.statistics_fn(trained.model_state),
      execution=Execution(microbatch),
      progress=progress,
    )
  watchdog.phase("writing the codes")
  read = ["params"] if request.from_model else ["params", "training examples"]
  params_sha256 = files.params_sha256(trained.params)
  processes.on_writer(lambda: save(out, found, params_sha256, read))
  return {
    "file": str(out),
    "classes": num_classes,
    "per_class": found.codes.shape[1],
    "judges": int(np.sum(np.asarray(found.judge_weights) > 0)),
    "recalled": found.recalled.shape[1],
    "read": read,
    "seconds": time.perf_counter() - started,
    "codes_sha256": files.array_sha256(found.codes),
  }


@contextlib.contextmanager
def _progress(watchdog: Watchdog) -> Iterator[Callable[[int, int], None]]:
  """Give a function (steps done, of) that shows progress, and tells the watchdog."""
  with contextlib.ExitStack() as stack:
    counted = 0
    shown: list[Progress] = []

    def show(done: int, of: int) -> None:
      nonlocal counted
      if not shown:
        quiet = not processes.is_writer()
        shown.append(stack.enter_context(Progress("learn codes", of, "steps", quiet=quiet)))
      shown[0].update(done - counted)
      counted = done
      watchdog.phase(f"what follows step {done} of {of} of learning codes")

    yield show


def refuse_existing(out: epath.Path) -> None:
  """Refuse to write over codes: forgets may have used them."""
  if out.exists():
    raise MnemonicError(
      f"{out}: is there already. Nothing was changed. Move it away to learn other codes."
    )


def save(out: epath.Path, codes: LearnedCodes, params_sha256: str, read: list[str]) -> None:
  """Write learned codes to one file, atomically."""
  out.parent.mkdir(parents=True, exist_ok=True)
  arrays = {name: np.asarray(getattr(codes, name), order="C") for name in _NAMES}
  metadata = {"params_sha256": params_sha256, "read": json.dumps(read)}
  with files.written(out) as temporary:
    save_file(arrays, temporary, metadata)


def read_codes(path: epath.Path) -> np.ndarray:
  """The codes (C, K, *shape) of a file, whatever model they are of."""
  return _read(path)[0]["codes"]


def _read(path: epath.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """The arrays and metadata of a file."""
  try:
    with safetensors.safe_open(str(path), framework="np") as stored:
      metadata = stored.metadata() or {}
      missing = sorted(set(_NAMES) - set(stored.keys()))
      arrays = {} if missing else {name: stored.get_tensor(name) for name in _NAMES}
  except (OSError, safetensors.SafetensorError) as error:
    raise MnemonicError(f"{path}: cannot be read as learned codes: {error}.") from None
  if missing:
    raise MnemonicError(
      f"{path}: has no {', '.join(missing)}; expected a file that `mnemonic codes` wrote."
    )
  return arrays, metadata


def load(path: epath.Path, params_sha256: str, num_classes: int, shape: Any) -> LearnedCodes:
  """Read learned codes back, and refuse those of another model, data set or shape."""
  arrays, metadata = _read(path)
  codes = arrays["codes"]
  if codes.ndim < 3 or (codes.shape[0], *codes.shape[2:]) != (num_classes, *shape):
    raise MnemonicError(
      f"{path}: its codes are {codes.shape}; expected ({num_classes}, K, "
      f"{', '.join(map(str, shape))}), for the classes and inputs of the data set."
    )
  if metadata.get("params_sha256") != params_sha256:
    raise MnemonicError(
      f"{path}: was learned from other params than these: its params_sha256 differs. Learn the "
      "codes of this model: mnemonic codes."
    )
  return LearnedCodes(**{name: jax.numpy.asarray(array) for name, array in arrays.items()})
