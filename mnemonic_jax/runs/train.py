"""`mnemonic train`: train on one device or many, checkpoint, resume."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mnemonic_jax import training
from mnemonic_jax.data import Batch, Dataset, Split
from mnemonic_jax.errors import MnemonicError
from mnemonic_jax.multihost.processes import Watchdog, is_writer
from mnemonic_jax.multihost.sharding import Layout
from mnemonic_jax.progress import Progress
from mnemonic_jax.runs import ledger, setup, signals
from mnemonic_jax.runs.checkpoints import Checkpoints
from mnemonic_jax.runs.files import array_sha256, params_sha256
from mnemonic_jax.runs.folder import RunFolder
from mnemonic_jax.runs.meter import Meter, Profile
from mnemonic_jax.runs.scoring import predict_each
from mnemonic_jax.runs.setup import Program
from mnemonic_jax.training import TrainState

Values = dict[str, float]
Feed = Callable[[int, int], Iterator[Batch]]  # (first step, last step) -> the batches in between


@dataclasses.dataclass(frozen=True)
class Options:
  """How a training runs. Nothing here changes what is trained, beyond rounding.

  Attributes:
    layout: the devices.
    watchdog: of several processes.
    log_every: steps between two lines of metrics.jsonl, beside one an epoch; 0: an epoch alone.
    profile: write a trace of five steps to RUN/profile.
  """

  layout: Layout = dataclasses.field(default_factory=Layout)
  watchdog: Watchdog = dataclasses.field(default_factory=Watchdog)
  log_every: int = 0
  profile: bool = False


def train(run: RunFolder, dataset: Dataset, options: Options | None = None) -> dict[str, Any]:
  """Train the run to its last step from wherever it is, and return a summary.

  A checkpoint is written every `train.checkpoint_every` epochs (and `train.checkpoint_steps`
  steps), at the end, and on Ctrl-C or SIGTERM; training goes on while it is written. On the same
  devices a resumed training continues bit for bit as if it had never stopped, in the middle of an
  epoch too; on others, up to rounding. A line of metrics.jsonl averages over the steps since the
  line before or the start.
  """
  options = options or Options()
  config, layout = run.config, options.layout
  with ExitStack() as stack:
    stack.enter_context(layout.used())
    planned = setup.make_program(config, dataset, layout, run.prng_impl)
    stack.enter_context(run.locked())
    run.require_config()
    keep = config.train.keep_checkpoints
    checkpoints = stack.enter_context(Checkpoints(run.checkpoints, keep=keep))
    options.watchdog.phase("making or restoring the first state")
    if checkpoints.latest_step() is None:
      state, codes = setup.first_state(config, planned)
    else:
      state, codes = checkpoints.restore(planned.state, planned.codes)
    first = int(state.step)
    run.rewind_metrics(first)
    started = time.perf_counter()
    loop = _Loop(run, dataset, options, planned, codes, checkpoints)
    state = loop.run_all(state, first)
    seconds = time.perf_counter() - started
    logits_fn = planned.model.logits_fn(state.model_state)
    scored = (dataset.test, dataset.preprocess, layout, options.watchdog)
    (test,) = predict_each(logits_fn, [state.params], *scored)
    steps, per_epoch = planned.total_steps, planned.steps_per_epoch
    params = params_sha256(state.params)
    ledger.record(run, params)
    lines = run.metrics()
    return {
      "run": str(run.path),
      "config": config.name,
      "epochs": _plain(steps / per_epoch),
      "steps": int(state.step),
      "resumed_from_epoch": _plain(first / per_epoch),
      "resumed_from_step": first,
      "mesh": dict(layout.mesh.shape) if layout.mesh else None,
      "processes": layout.process[1],
      "loss": lines[-1]["loss"] if lines else None,
      "test_accuracy": float(np.mean(test.predictions == test.labels)),
      "seconds": seconds,
      "checkpoint": str(run.checkpoints / str(int(state.step))),
      "codes_sha256": array_sha256(codes),
      "params_sha256": params,
    }


class _Loop:
  """The steps of one training, and all that watches them."""

  def __init__(
    self,
    run: RunFolder,
    dataset: Dataset,
    options: Options,
    planned: Program,
    codes: jax.Array,
    checkpoints: Checkpoints,
  ) -> None:
    self._run, self._dataset, self._options = run, dataset, options
    self._layout, self._watchdog = options.layout, options.watchdog
    self._settings = run.config.train
    self._program, self._codes, self._checkpoints = planned, codes, checkpoints
    self._per_epoch, self._total = planned.steps_per_epoch, planned.total_steps
    self._epoch_at_once = _epoch_at_once(run, dataset, options, planned, codes)
    flops = partial(setup.forward_flops, run.config, dataset)
    self._meter = Meter(self._settings.batch_size, self._layout.size, flops)

  def run_all(self, state: TrainState, first: int) -> TrainState:
    """Take all steps that are left."""
    with ExitStack() as stack:
      log = stack.enter_context(self._run.metric_log(first))
      self._feed = self._make_feed(state.key, first, stack)
      folder = self._run.path / "profile" if self._options.profile else None
      self._profile = Profile(folder, first, self._total)
      stack.callback(self._profile.close)
      self._stop = stack.enter_context(signals.deferred())
      self._progress = stack.enter_context(self._make_progress(first))
      self._watchdog.phase("the first step, with its compilation,")
      done = first
      while done < self._total:
        state, done = self._stretch(state, done, log)
      self._checkpoints.wait()
    return state

  def _make_feed(self, key: jax.Array, first: int, stack: ExitStack) -> Feed:
    """Feed this process's part of the batches, on the host; steps are asked for in order.

    The order of a stored set depends on the train state's `key`, that of a stream on `train.seed`.
    `stack` ends the threads and processes that decode a stream.
    """
    split, size, process = self._dataset.train, self._settings.batch_size, self._layout.process
    if isinstance(split, Split):
      return StoredFeed(split, setup.host_key(key), size, process)
    stream = stack.enter_context(
      split.training_batches(
        self._settings.seed,
        size,
        first_step=first,
        last_step=self._total,
        workers=self._run.config.execution.workers,
        process=process,
      )
    )
    return lambda first, last: itertools.islice(stream, last - first)

  def _make_progress(self, first: int) -> Progress:
    """Count epochs where each is one call, else steps."""
    quiet = not is_writer()
    if not self._epoch_at_once:
      return Progress("train", self._total, "steps", first, quiet=quiet)
    epochs = -(-self._total // self._per_epoch)
    return Progress("train", epochs, "epochs", first // self._per_epoch, quiet=quiet)

  def _stretch(
    self, state: TrainState, first: int, log: Callable[[dict[str, Any]], None]
  ) -> tuple[TrainState, int]:
    """Train until the next line or checkpoint is due or a signal comes, and write what is due."""
    end, whole_epoch = self._end_of_stretch(first)
    if whole_epoch:
      state, values = whole_epoch(state)
      done = end
    else:
      state, done, values = self._steps(state, first, end)
    self._meter.count(done - first)
    if not np.isfinite(values["loss"]):
      raise MnemonicError(
        f"training: the loss of the steps {first + 1} to {done} is {values['loss']}; expected a "
        "finite one. Use a smaller train.learning_rate. The last checkpoint is from before that."
      )
    rates = self._meter.read()
    if done == end:  # no signal cut it short
      log({"epoch": _plain(done / self._per_epoch), "step": done, **values, **rates})
    if self._epoch_at_once:
      self._progress.update(1, **values, images_per_second=rates["images_per_second"])
    self._save_if_due(state, done)
    return state, done

  def _end_of_stretch(self, first: int) -> tuple[int, Any]:
    """Return the step to stop at, and what takes all steps until there in one call, if anything."""
    inside = first % self._per_epoch
    end_of_epoch = first - inside + self._per_epoch
    if self._epoch_at_once and not inside and end_of_epoch <= self._total:
      return end_of_epoch, self._epoch_at_once  # not inside an epoch: another machine stopped there
    every = (self._settings.checkpoint_steps, self._options.log_every)
    return min(self._total, end_of_epoch, *((first // n + 1) * n for n in every if n)), None

  def _steps(self, state: TrainState, first: int, end: int) -> tuple[TrainState, int, Values]:
    """Take the steps of one stretch, each a call; end early when a signal comes."""
    seen: list[Values] = []
    running, step, started = None, first, time.perf_counter()
    epoch = jax.device_put(np.int32(first // self._per_epoch), self._layout.copied)

    def finish(metrics: training.Metrics) -> None:
      """Read the metrics of a step, which waits for it."""
      seen.append({name: float(value) for name, value in jax.device_get(metrics).items()})
      self._watchdog.beat(first + len(seen))
      rate = len(seen) * self._settings.batch_size / (time.perf_counter() - started)
      if not self._epoch_at_once:
        self._progress.update(1, **seen[-1], images_per_second=rate)

    local = self._watchdog.inputs(self._feed(first, end))
    for images, labels, rows in self._meter.waiting(map(self._placed, local)):
      self._profile.before(step)
      with jax.transfer_guard_host_to_device("disallow"):  # all it reads was placed on purpose
        state, metrics = self._program.step(state, images, labels, self._codes, rows, epoch)
      self._profile.after(step, metrics)
      step += 1
      if running is not None:  # the step before: this one runs meanwhile
        finish(running)
      running = metrics
      if self._stop.asked(step):
        break
    finish(metrics)
    return state, step, {name: float(np.mean([v[name] for v in seen])) for name in seen[0]}

  def _placed(self, batch: Any) -> Any:
    images, labels, rows = batch
    return self._layout.place((images, labels, rows.astype(np.int32)))

  def _save_if_due(self, state: TrainState, done: int) -> None:
    """Write a checkpoint where one is due, and stop where a signal asked for it."""
    epoch, rest = divmod(done, self._per_epoch)
    steps, last, asked = self._settings.checkpoint_steps, done == self._total, self._stop.signum
    due = last or asked or (steps and done % steps == 0)
    if not due and (rest or epoch % self._settings.checkpoint_every):
      return
    self._watchdog.phase(f"the checkpoint of step {done}")
    with self._meter.paused("checkpoint"):
      self._checkpoints.save(state, self._codes)
      if asked or last:
        self._checkpoints.wait()
    if asked:
      self._stop.stop_if_asked(
        f"stopped after epoch {done / self._per_epoch:.4g} of "
        f"{_plain(self._total / self._per_epoch)}; the checkpoint is written. Resume with the same "
        "command."
      )
    if not last:
      self._watchdog.beat(done)  # a step is waited for again


class StoredFeed:
  """Batches of a set in memory, in the order of `training.epoch_rows`."""

  def __init__(
    self, split: Split, key: jax.Array, batch_size: int, process: tuple[int, int] = (0, 1)
  ) -> None:
    self._split, self._key, self._size, self._process = split, key, batch_size, process
    self._epoch, self._rows = -1, np.zeros((0, 0), np.int32)

  def __call__(self, first: int, last: int) -> Iterator[Batch]:
    """Give the batch of each step."""
    index, count = self._process
    for step in range(first, last):
      epoch, inside = divmod(step, self._split.num_examples // self._size)
      rows = self._rows_of(epoch)[inside].reshape(count, -1)[index]
      yield Batch(self._split.images[rows], self._split.labels[rows], rows)

  def _rows_of(self, epoch: int) -> np.ndarray:
    if epoch != self._epoch:
      rows = training.epoch_rows(self._key, epoch, self._split.num_examples, self._size)
      self._epoch, self._rows = epoch, np.asarray(rows)
    return self._rows


def _epoch_at_once(
  run: RunFolder, dataset: Dataset, options: Options, planned: Program, codes: jax.Array
) -> Callable[[TrainState], tuple[TrainState, Values]] | None:
  """Make what takes a whole epoch in one call; None where steps are taken one by one.

  On CPU, convolutions inside a loop of XLA's are many times slower than one step a call.
  """
  config, split = run.config, dataset.train
  convolves = jax.default_backend() == "cpu" and config.model.name != "mlp"
  watched = options.log_every or options.profile
  if not isinstance(split, Split) or options.layout.mesh or convolves or watched:
    return None
  epoch = training.make_epoch(planned.batch_step, batch_size=config.train.batch_size)
  images, labels = jnp.asarray(split.images), jnp.asarray(split.labels)

  def run_epoch(state: TrainState) -> tuple[TrainState, Values]:
    state, metrics = epoch(state, images, labels, codes)
    return state, {name: float(value) for name, value in metrics.items()}

  return run_epoch


def _plain(number: float) -> float:
  """Return an integer where the number is one."""
  return int(number) if number == int(number) else number
