"""Measure a training: images a second, the share of an accelerator's peak, a profile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from etils import epath

# Dense bfloat16 FLOP/s of a device by jax's device_kind, from the makers' data sheets.
PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H200": 989e12,
}


class Meter:
  """Rates since the last reading.

  Args:
    batch_size: examples in a step.
    devices: how many share a step.
    forward_flops: counts the FLOPs of one image forward; called where a device's peak is known.
  """

  def __init__(self, batch_size: int, devices: int, forward_flops: Callable[[], float]) -> None:
    self._batch, self._devices = batch_size, devices
    self._peak = PEAK_FLOPS.get(jax.devices()[0].device_kind, 0.0)
    self._flops = 3 * forward_flops() if self._peak else 0.0
    self._restart()

  def _restart(self) -> None:
    self._start, self._steps = time.perf_counter(), 0
    self._spent = {"input": 0.0, "checkpoint": 0.0}

  def count(self, steps: int) -> None:
    """Count finished steps."""
    self._steps += steps

  def waiting(self, batches: Iterable[Any]) -> Iterator[Any]:
    """Give the same batches; the time to get them counts as waiting for input."""
    iterator = iter(batches)
    while True:
      with self.paused("input"):
        batch = next(iterator, None)
      if batch is None:
        return
      yield batch

  @contextmanager
  def paused(self, what: str) -> Iterator[None]:
    """Count the seconds within as "input" or "checkpoint"."""
    start = time.perf_counter()
    yield
    self._spent[what] += time.perf_counter() - start

  def read(self) -> dict[str, float]:
    """Return the rates over the steps since the last reading; call when the last one is finished.

    Checkpoints are not in these seconds. MFU = 3 x forward FLOPs of an image x images/s per device
    / peak dense bfloat16 FLOP/s of the device. Recomputation (remat) does not count as useful work.
    """
    steps = max(self._steps, 1)
    seconds = max(time.perf_counter() - self._start - self._spent["checkpoint"], 1e-9)
    rate = self._steps * self._batch / seconds
    found = {
      "images_per_second": rate,
      "images_per_second_per_device": rate / self._devices,
      "seconds": seconds,
      "step_seconds": seconds / steps,
      "input_seconds": self._spent["input"] / steps,
      "checkpoint_seconds": self._spent["checkpoint"],
    }
    if self._peak:
      found["mfu"] = self._flops * rate / self._devices / self._peak
    self._restart()
    return found


class Profile:
  """A trace of five steps, after the first ones, for TensorBoard or xprof."""

  def __init__(self, folder: epath.Path | None, first: int, total: int) -> None:
    self._folder, self._tracing = folder, False
    self._steps = range(min(first + 5, total - 1), min(first + 10, total)) if folder else range(0)

  def before(self, step: int) -> None:
    """Start the trace where `step` is its first one."""
    if self._steps and step == self._steps.start:
      jax.profiler.start_trace(str(self._folder))
      self._tracing = True

  def after(self, step: int, metrics: Any) -> None:
    """End the trace where `step` is its last one."""
    if self._steps and step == self._steps.stop - 1:
      jax.block_until_ready(metrics)
      self.close()

  def close(self) -> None:
    """End the trace, of however many steps."""
    if self._tracing:
      jax.profiler.stop_trace()
    self._tracing = False
