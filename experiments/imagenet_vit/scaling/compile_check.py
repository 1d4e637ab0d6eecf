"""Compile training, learning codes and forgetting for a TPU pod, without one, and print the cost.

Command:  make tpu-check
          .venv-tpu/bin/python experiments/imagenet_vit/scaling/compile_check.py \
          --topology v5e:16x16 --model vit_l16 --batch 4096 --fsdp 16

The programs are those of train.py, codes.py and forget.py in the folder above: a step of training,
a forget of the paper's from random codes, a projection from learned codes with eight judges a
class, and a step of learning and of recalling codes. Any field of the config can be overridden too
(--codes.per_class 2). Exit code 1: a program does not fit, or some collective gives a device the
whole model, or a whole stack of its layers, at once.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import cost_model
import hlo
import jax
import numpy as np
from chips import CHIPS, Chip

import mnemonic_jax as mj
from mnemonic_jax.cli.parser import dotted_overrides
from mnemonic_jax.data import Dataset
from mnemonic_jax.errors import MnemonicError, UsageError
from mnemonic_jax.multihost import sharding
from mnemonic_jax.multihost.sharding import Layout
from mnemonic_jax.runs import config as configs
from mnemonic_jax.runs import setup
from mnemonic_jax.runs.config import Config

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import codes
import forget

CONFIG = "imagenet_vit_s16_90ep"
PROGRAMS = ("train step", "forget", "projection", "learning codes", "recalling codes")
DEPTH = 2  # of the projection
_LARGEST = 8  # collectives, and operations, that the table lists one by one
# The TPU compiler asks for a machine; these answers keep it from looking for one and locking it.
_MACHINE = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
}
_MACHINE |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


class Unread(NamedTuple):
  """Pictures that nobody reads: all that planning asks of a split."""

  shape: tuple[int, ...]
  num_examples: int = cost_model.TRAIN_IMAGES


class Report(NamedTuple):
  """What the compiler said of one program; bytes and seconds are of one device."""

  program: str
  compile_seconds: float
  memory: dict[str, int]  # arguments, outputs, aliased, temporaries, code, used
  collectives: list[hlo.Collective]
  estimated_seconds: float  # the compiler's, without collectives; 0 where it says nothing
  costliest: dict[str, float]  # operations, and seconds of these
  flops: float  # arithmetic
  whole: list[str]  # what gathers a whole stack of layers, or model


def devices_of(topology: str) -> tuple[list[Any], Chip | None]:
  """The devices of a pod such as v5e:4x4, and what its chip can do; "cpu": the devices at hand."""
  if topology == "cpu":
    return jax.devices("cpu"), None
  generation = topology.partition(":")[0]
  if generation not in CHIPS or generation.startswith("h"):
    raise UsageError(
      f"--topology: got {topology!r}; expected v4, v5e, v5p or v6e and a shape, "
      "such as v5e:4x4 or v5p:4x4x8."
    )
  os.environ |= _MACHINE
  try:
    import libtpu  # noqa: F401
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(topology, platform="tpu").devices), CHIPS[generation]
  except ImportError:
    raise MnemonicError(
      "libtpu: not installed; expected jax[tpu]. Run `make tpu-check`, which installs it."
    ) from None
  except Exception as error:
    raise UsageError(
      f"--topology: the TPU compiler knows no {topology!r}: {str(error).splitlines()[0]}"
    ) from None


def _programs(
  config: Config, dataset: Dataset, mesh: jax.sharding.Mesh, training: setup.Program
) -> dict[str, tuple[Any, tuple[Any, ...], float]]:
  """What is compiled: the program, its abstract arguments, and its FLOPs over all devices."""
  of = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)
  number = jax.ShapeDtypeStruct((), np.float32, sharding=sharding.replicated(mesh))
  num_classes, shape, judges = len(dataset.class_names), dataset.shape, cost_model.JUDGES
  learned = mj.LearnedCodes(
    of(num_classes, 1, *shape),
    of(num_classes, judges, *shape),
    *(of(num_classes, judges) for _ in range(3)),
    of(num_classes, 0, *shape),
  )
  forgets = {
    "forget": (forget.make_program(config, dataset, mesh), mj.Perturbation(number, number)),
    "projection": (forget.make_program(config, dataset, mesh, None, learned), mj.Projection(DEPTH)),
  }
  learning, recalling = codes.make_programs(config, dataset, mesh)
  calls = {
    "train step": (training.step, training.arguments),
    **{name: (made.step, (*made.arguments, method)) for name, (made, method) in forgets.items()},
    "learning codes": learning[:2],
    "recalling codes": recalling[:2],
  }
  counts = {
    "train step": config.train.batch_size,
    "forget": num_classes * config.codes.per_class,
    "projection": num_classes,
    "learning codes": learning.count,
    "recalling codes": recalling.count,
  }
  forward = cost_model.VITS[config.model.name].forward_flops(num_classes, config.data.side)
  passes = cost_model.forward_passes(config.model.remat)
  return {name: (*call, passes[name] * forward * counts[name]) for name, call in calls.items()}


def check(
  config: Config,
  num_classes: int,
  mesh: jax.sharding.Mesh,
  chip: Chip | None,
  only: Sequence[str] = PROGRAMS,
) -> list[Report]:
  """Compile the programs of a config for a mesh, one after the other."""
  side = config.data.side
  unread = Unread((side, side, 3))
  names = tuple(map(str, range(num_classes)))
  name, half = config.data.name, (0.5,) * 3
  dataset = Dataset(name, unread, unread, names, 255, half, half)  # type: ignore[arg-type]
  training = setup.make_program(config, dataset, Layout(mesh))
  split = [
    hlo.Leaf(
      leaf.shape,
      leaf.sharding.shard_shape(leaf.shape),
      config.model.scan and path[0].key == "blocks" and leaf.ndim > 2,
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(training.state.params)
    if leaf.ndim > 1 and not leaf.sharding.is_fully_replicated
  ]
  reports = []
  for name, (function, arguments, flops) in _programs(config, dataset, mesh, training).items():
    if name not in only:
      continue
    start = time.perf_counter()
    with jax.set_mesh(mesh):
      compiled = _compiled(name, function.lower(*arguments))
    parsed = hlo.parse(compiled.as_text())
    cycles = hlo.estimated_cycles(parsed) if chip else {}
    costliest = sorted(cycles, key=lambda operation: -cycles[operation])[:_LARGEST]
    reports.append(
      Report(
        name,
        time.perf_counter() - start,
        _memory(compiled.memory_analysis()),
        hlo.collectives(parsed),
        sum(cycles.values()) / chip.clock if chip else 0.0,
        {operation: cycles[operation] / chip.clock for operation in costliest} if chip else {},
        flops / mesh.size,
        hlo.whole(parsed, split),
      )
    )
  return reports


def _compiled(name: str, lowered: Any) -> Any:
  try:
    return lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    said = " ".join(str(error).split())[:300]
    raise MnemonicError(
      f"{name}: does not fit, says the compiler: {said} "
      "Use a smaller --batch, a larger --fsdp or more devices."
    ) from None


def _memory(stats: Any) -> dict[str, int]:
  found = {
    "arguments": stats.argument_size_in_bytes,
    "outputs": stats.output_size_in_bytes,
    "aliased": stats.alias_size_in_bytes,
    "temporaries": stats.temp_size_in_bytes,
    "code": stats.generated_code_size_in_bytes,
  }
  return found | {"used": sum(found.values()) - 2 * found["aliased"]}


def problems(reports: Sequence[Report], chip: Chip | None) -> list[str]:
  """What makes the check fail, as messages."""
  found = []
  for report in reports:
    used = report.memory["used"]
    if chip and used > chip.memory:
      found.append(
        f"{report.program}: {used / 2**30:.2f} GiB a device, "
        f"and the chip has {chip.memory / 2**30:.0f}."
      )
    found += [
      f"{report.program}: every device gets a whole stack of layers, or the model: {one}."
      for one in report.whole
    ]
  return found


def table(report: Report, devices: int, chip: Chip | None) -> str:
  """One program's figures, as text."""
  gib = {name: f"{size / 2**30:.3f}" for name, size in report.memory.items()}
  of_chip = f" of {chip.memory / 2**30:.0f}" if chip else ""
  parts = ", ".join(f"{name} {size}" for name, size in gib.items() if name != "used")
  lines = [
    f"{report.program} (compiled in {report.compile_seconds:.0f} s)",
    f"  memory of a device, GiB: used {gib['used']}{of_chip}: {parts}",
  ]
  seconds = f", {1e3 * report.flops / chip.flops:.2f} ms at the bfloat16 peak" if chip else ""
  lines.append(f"  arithmetic of a device: {report.flops:.3g} FLOP{seconds}")
  if chip:
    lines.append(
      f"  the compiler's estimate, without collectives: "
      f"{1e3 * report.estimated_seconds:.2f} ms; the most of it:"
    )
    lines += [
      f"    {1e3 * seconds:8.2f} ms  {operation}" for operation, seconds in report.costliest.items()
    ]
  lines.append(
    "  collectives of a call (a device's result, a reduce-scatter's operand; sent: in a ring):"
  )
  for total in totals(report, devices):
    per = "" if total["times_known"] else "  in loops of unknown length, one iteration"
    sizes = f"{total['bytes'] / 2**20:10.2f} MiB  sent {total['sent_bytes'] / 2**20:10.2f} MiB"
    lines.append(f"    {total['kind']:<18} {total['times']:>6} x  {sizes}{per}")
  lines.append("  the largest:")
  for one in largest(report):
    size = f"{one.bytes / 2**20:10.2f} MiB  over {one.group or devices}"
    lines.append(f"    {one.kind:<18} {one.times:>6} x  {size}: {hlo.names(one.shapes)}")
  return "\n".join(lines)


def totals(report: Report, devices: int) -> list[dict[str, Any]]:
  """Collectives by kind, the most bytes first.

  Those in loops of unknown length stand apart, for one iteration.
  """
  kinds: dict[Any, list[hlo.Collective]] = defaultdict(list)
  for one in report.collectives:
    kinds[one.kind, one.known].append(one)
  found = [
    {
      "kind": kind,
      "times_known": known,
      "times": sum(c.times for c in ones),
      "bytes": sum(c.bytes * c.times for c in ones),
      "sent_bytes": sum(c.sent(devices) * c.times for c in ones),
    }
    for (kind, known), ones in kinds.items()
  ]
  return sorted(found, key=lambda total: -total["bytes"])


def largest(report: Report) -> list[hlo.Collective]:
  """The collectives that give a device the most, over all their times."""
  return sorted(report.collectives, key=lambda one: -one.bytes * one.times)[:_LARGEST]


def as_json(report: Report, devices: int) -> dict[str, Any]:
  """A report as plain values."""
  ones = [
    {
      "kind": one.kind,
      "shapes": [f"{shape.dtype}{list(shape.sizes)}" for shape in one.shapes],
      "group": one.group or devices,
      "bytes": one.bytes,
      "times": one.times,
      "times_known": one.known,
    }
    for one in largest(report)
  ]
  return report._asdict() | {"collectives": totals(report, devices), "largest": ones}


def main(arguments: Sequence[str]) -> int:
  """Read the command line, compile, print; the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--topology", required=True, help="v5e:4x4, v5e:16x16, v5p:4x4x8, v6e:16x16, v4:2x2x4..."
  )
  parser.add_argument(
    "--config", default=CONFIG, help="a named config or a TOML file (default: %(default)s)"
  )
  parser.add_argument("--model", choices=sorted(cost_model.VITS), help="instead of the config's")
  parser.add_argument("--batch", type=int, help="images a step, over all devices")
  parser.add_argument(
    "--fsdp", type=int, help="devices that share the params (default: those of a host)"
  )
  parser.add_argument("--classes", type=int, default=1000, help="classes, one code each")
  parser.add_argument(
    "--only",
    nargs="+",
    choices=PROGRAMS,
    default=PROGRAMS,
    metavar="PROGRAM",
    help="of: %(choices)s",
  )
  parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
  overrides, rest = dotted_overrides(arguments)
  options = parser.parse_args(rest)
  short = {
    "model.name": options.model,
    "train.batch_size": options.batch,
    "execution.fsdp": options.fsdp,
  }
  overrides = {**{name: value for name, value in short.items() if value is not None}, **overrides}
  jax.config.update("jax_platforms", "cpu")  # whatever accelerator is here, it is not asked
  try:
    config = configs.load(options.config, overrides)
    if config.model.name not in cost_model.VITS:
      raise UsageError(
        f"model.name: got {config.model.name!r}; expected one of {', '.join(cost_model.VITS)}."
      )
    devices, chip = devices_of(options.topology)
    try:
      mesh = sharding.make_mesh(
        config.execution.data or None, config.execution.fsdp or None, devices
      )
      reports = check(config, options.classes, mesh, chip, options.only)
    except ValueError as error:
      raise UsageError(str(error)) from None
  except MnemonicError as error:
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code
  wrong = problems(reports, chip)
  plan = {"topology": options.topology, "mesh": dict(mesh.shape), "model": config.model.name}
  plan |= {"batch_size": config.train.batch_size, "classes": options.classes, "config": config.name}
  if options.json:
    print(
      json.dumps(
        plan | {"programs": [as_json(r, mesh.size) for r in reports], "problems": wrong}, indent=2
      )
    )
  else:
    print(", ".join(f"{name} {value}" for name, value in plan.items()))
    print("\n".join(table(report, mesh.size, chip) for report in reports))
  for message in wrong:
    print(f"error: {message}", file=sys.stderr)
  return int(bool(wrong))


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
