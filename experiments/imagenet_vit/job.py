"""What train.py and forget.py share: the command line, the mesh, evaluation on all devices, and the meter."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from chips import CHIPS
from etils import epath

from mnemonic_jax import evaluation, losses
from mnemonic_jax.cli import compilation_cache
from mnemonic_jax.cli.parser import dotted_overrides
from mnemonic_jax.data import Dataset
from mnemonic_jax.data.stream import Stream
from mnemonic_jax.errors import MnemonicError, UsageError
from mnemonic_jax.models import Model
from mnemonic_jax.multihost import processes, sharding
from mnemonic_jax.multihost.watchdog import Watchdog
from mnemonic_jax.runs import config as configs
from mnemonic_jax.runs import files, setup, signals
from mnemonic_jax.runs.config import Config
from mnemonic_jax.runs.folder import RunFolder
from mnemonic_jax.runs.inference import Predictions

# Dense bfloat16 FLOP/s of a device, from the makers' data sheets, by jax's device_kind.
PEAK_FLOPS = {
  "TPU v4": CHIPS["v4"].flops,
  "TPU v5 lite": CHIPS["v5e"].flops,
  "TPU v5": CHIPS["v5p"].flops,
  "TPU v6 lite": CHIPS["v6e"].flops,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA H100 80GB HBM3": CHIPS["h100"].flops,
  "NVIDIA H200": CHIPS["h200"].flops,
}


@dataclasses.dataclass(frozen=True)
class Job:
  """What a script works on."""

  config: Config
  dataset: Dataset
  mesh: jax.sharding.Mesh
  run: RunFolder
  classes: tuple[int, ...] = ()  # to forget
  search: bool = False  # for the strength
  log_every: int = 50
  profile: bool = False
  watchdog: Watchdog = dataclasses.field(default_factory=lambda: Watchdog(60.0, 300.0))


def make_mesh(config: Config) -> jax.sharding.Mesh:
  """The mesh that a config asks for."""
  try:
    return sharding.make_mesh(config.execution.data or None, config.execution.fsdp or None)
  except ValueError as error:
    raise UsageError(f"execution.data, execution.fsdp: {error}") from None


def main(work: Callable[[Job], dict[str, Any]], description: str, arguments: Sequence[str]) -> None:
  """Read the command line, join the other processes if there are any, do the work under the mesh, print one JSON object."""
  forgets = work.__name__ == "forget"
  parser = argparse.ArgumentParser(
    description=description, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  if forgets:
    parser.add_argument("run", type=epath.Path, help="the folder of a finished run")
    parser.add_argument(
      "--classes", type=int, nargs="+", required=True, help="class indices to forget"
    )
    parser.add_argument(
      "--search",
      action="store_true",
      help="choose the strength from the paper's grid, on the codes",
    )
  else:
    parser.add_argument("config", help="a named config or a TOML file")
    parser.add_argument("--out", type=epath.Path, required=True, help="the run folder")
    parser.add_argument("--log-every", type=int, default=50, metavar="STEPS")
    parser.add_argument(
      "--profile", action="store_true", help="write a trace of five steps to RUN/profile"
    )
  parser.add_argument(
    "--data-dir", default="", help="folder of prepared TFDS sets (else TFDS_DATA_DIR)"
  )
  parser.add_argument(
    "--coordinator",
    metavar="HOST:PORT",
    help="of process 0; not where SLURM, a TPU pod, ... tells it",
  )
  parser.add_argument("--process-id", type=int, metavar="I", help="of this process, from 0")
  parser.add_argument("--num-processes", type=int, metavar="N")
  parser.add_argument(
    "--startup-timeout",
    type=float,
    default=300.0,
    metavar="S",
    help="until all processes are there, and of all but steps: compilation, a checkpoint...",
  )
  parser.add_argument(
    "--peer-timeout", type=float, default=60.0, metavar="S", help="of a step, after the first one"
  )
  overrides, rest = dotted_overrides(arguments)
  options = parser.parse_args(rest)
  compilation_cache.enable()
  try:
    signals.exit_at_once()
    processes.initialize(
      options.coordinator,
      options.process_id,
      options.num_processes,
      startup_timeout=options.startup_timeout,
      peer_timeout=options.peer_timeout,
    )
    if forgets:
      signals.exit_at_once()  # also where several processes would agree on a step: there is none
    with Watchdog(options.peer_timeout, options.startup_timeout) as watchdog:
      job = _planned(options, overrides, watchdog)
      with jax.set_mesh(job.mesh):
        result = work(job)
  except (MnemonicError, ValueError) as error:
    print(f"mnemonic: {error}", file=sys.stderr, flush=True)
    processes.leave(getattr(error, "exit_code", 1))
  if processes.is_writer():
    print(files.dumps(result, indent=2))


def _planned(options: argparse.Namespace, overrides: dict[str, str], watchdog: Watchdog) -> Job:
  """The job that the command line asks for; a training's run folder is made."""
  forgets = hasattr(options, "classes")
  if forgets:
    run = RunFolder.open(options.run)
    allowed = ("forget.", "execution.")
    if wrong := [field for field in overrides if not field.startswith(allowed)]:
      raise UsageError(
        f"--{wrong[0]}: a forget uses the run's own config; only {' and '.join(allowed)} may differ."
      )
    config = configs.build(run.config.name, configs.as_dict(run.config), overrides)
  else:
    config = configs.load(options.config, overrides)
  mesh = make_mesh(config)
  watchdog.phase(f"opening the data set {config.data.name}")
  dataset = setup.load_data(config, options.data_dir, training=not forgets)
  watchdog.phase("opening the run folder and planning the work")
  if not isinstance(dataset.train, Stream):
    raise UsageError(
      f"data.name: got {config.data.name!r}; expected a streamed set, such as imagenet2012."
    )
  if forgets:
    return Job(
      config,
      dataset,
      mesh,
      run,
      watchdog=watchdog,
      classes=tuple(options.classes),
      search=options.search,
    )
  run = RunFolder.create(options.out, config)
  return Job(
    config,
    dataset,
    mesh,
    run,
    watchdog=watchdog,
    log_every=options.log_every,
    profile=options.profile,
  )


def abstract(tree: Any, shardings: Any) -> Any:
  """Shapes with shardings."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
  )


def predict(
  job: Job, model: Model, candidates: Sequence[Any], model_state: Any, split: Stream
) -> list[Predictions]:
  """Predictions and losses of several params on a split; each process decodes its part, and all get all results."""
  mesh, processes = job.mesh, jax.process_count()
  if not split.num_examples:
    return [Predictions(np.zeros(0, int), np.zeros(0, np.float32), np.zeros(0, np.int32))] * len(
      candidates
    )
  size = -(-min(job.config.train.batch_size, split.num_examples) // mesh.size) * mesh.size
  run = _predict_fn(model, job.dataset.preprocess, sharding.replicated(mesh))
  local, spread = size // processes, sharding.batch_sharding(mesh)
  rows = np.arange(-(-split.num_examples // size) * size).reshape(
    -1, processes, local
  )  # by batch and process
  job.watchdog.phase("the first batch of an evaluation")
  mine = split.part(
    np.minimum(rows[:, jax.process_index()].ravel(), split.num_examples - 1)
  )  # filled up by the last
  found: list[list[Any]] = [[] for _ in candidates]
  batches = mine.batches(local)
  for number, batch in enumerate(job.watchdog.inputs(batches), start=1):
    images, labels = (jax.make_array_from_process_local_data(spread, part) for part in batch)
    for params, seen in zip(candidates, found, strict=True):
      seen.append(jax.device_get(run(params, model_state, images, labels)))
    job.watchdog.phase(f"what follows batch {number} of {len(rows)} of an evaluation")
  joined = (map(np.concatenate, zip(*seen, strict=True)) for seen in found)
  return [Predictions(*(values[: split.num_examples] for values in one)) for one in joined]


def _predict_fn(model: Model, preprocess: Any, copied: Any) -> Any:
  def run(
    params: Any, model_state: Any, images: jax.Array, labels: jax.Array
  ) -> tuple[jax.Array, ...]:
    logits = model.logits_fn(model_state)(params, preprocess(images))
    return (
      evaluation.predicted_classes(logits),
      losses.softmax_cross_entropy(logits, labels),
      labels,
    )

  return jax.jit(run, out_shardings=copied)


def forward_flops(config: Config, dataset: Dataset) -> float:
  """FLOPs of one image forward, as XLA counts those of the model without scan, whose body it would count once."""
  plain = dataclasses.replace(config.model, scan=False, remat=False, dtype="float32")
  model = setup.make_model(dataclasses.replace(config, model=plain), dataset)
  params, model_state = jax.eval_shape(model.init, jax.random.key(0))
  image = jax.ShapeDtypeStruct((1, *dataset.shape), jnp.float32)
  forward = jax.jit(lambda p, s, x: model.apply(p, s, x, False)[0])
  return float((forward.lower(params, model_state, image).cost_analysis() or {}).get("flops", 0.0))


class Meter:
  """Rates since the last reading, on every process; process 0 prints them."""

  def __init__(self, job: Job, flops_per_image: float) -> None:
    self._batch, self._devices = job.config.train.batch_size, job.mesh.size
    self._flops = flops_per_image
    self._peak = PEAK_FLOPS.get(jax.devices()[0].device_kind, 0.0)
    self._start, self._steps, self._spent = (
      time.perf_counter(),
      0,
      {"input": 0.0, "checkpoint": 0.0},
    )

  def waiting(self, batches: Iterable[Any]) -> Iterator[Any]:
    """The same batches; the time to get them counts as waiting for input."""
    iterator = iter(batches)
    while True:
      with self.paused("input"):
        batch = next(iterator, None)
      if batch is None:
        return
      self._steps += 1
      yield batch

  @contextmanager
  def paused(self, what: str) -> Iterator[None]:
    """Count the seconds within as "input" or "checkpoint"."""
    start = time.perf_counter()
    yield
    self._spent[what] += time.perf_counter() - start

  def read(self, done: int, total: int, values: dict[str, float]) -> dict[str, float]:
    """Rates over the steps since the last reading, without those of checkpoints; call when the last step is finished.

    MFU = 3 x forward FLOPs of an image x images/s per device / peak dense bfloat16 FLOP/s of the device. Recomputation
    (remat) does not count as useful work.
    """
    now = time.perf_counter()
    seconds = max(now - self._start - self._spent["checkpoint"], 1e-9)
    rate = self._steps * self._batch / seconds
    found = {
      "images_per_second": rate,
      "images_per_second_per_device": rate / self._devices,
      "step_seconds": seconds / max(self._steps, 1),
      "input_seconds": self._spent["input"] / max(self._steps, 1),
      "checkpoint_seconds": self._spent["checkpoint"],
    }
    if self._peak:
      found["mfu"] = self._flops * rate / self._devices / self._peak
    self._start, self._steps, self._spent = now, 0, dict.fromkeys(self._spent, 0.0)
    if jax.process_index() == 0:
      shown = ", ".join(f"{name} {value:.4g}" for name, value in {**values, **found}.items())
      left = (total - done) * found["step_seconds"]
      print(f"train: {done}/{total} steps, {shown}, {left:.0f} s left", file=sys.stderr, flush=True)
    return found
