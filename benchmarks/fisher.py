"""Time the diagonal Fisher beside a plain batch gradient, and beside other ways to get it.

Command:  python benchmarks/fisher.py [--ours] [ROW ...]      (all rows if none; --list names them)

Every row is timed in one process, on the same codes and params (random weights; time does not
depend on them):
  batch gradient   jax.grad of the mean loss: the floor, and no Fisher
  one group        diagonal_fisher, the mean over all codes
  two groups       diagonal_fisher of the first code and of all others, concrete: as in `forget`
  overlapping      two groups that share every code
  vmap(grad)       per-example gradients squared, in the best of a few microbatches
  one by one       a jitted gradient of one code at a time, called from Python
Seconds are medians of interleaved repetitions. Compile: trace, lowering and compilation with JAX's
caches emptied, the median of three rounds over all ways, after one round that is not counted (the
first compilation of a process pays for all). Memory is the compiled program's temporary memory (of
the microbatch program). `--torch` adds a PyTorch loop over single codes (the `torch` extra) for the
CIFAR ResNet-18.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from nets import MODELS

import mnemonic_jax as mj
from mnemonic_jax import _mesh
from mnemonic_jax.fisher import passes

ROWS = {
  "MNIST MLP, 10 codes": ("MNIST MLP", 10),
  "MNIST MLP, 1000 codes": ("MNIST MLP", 1000),
  "CIFAR ResNet-18, 10 codes": ("CIFAR ResNet-18", 10),
  "CIFAR ResNet-18, 40 codes": ("CIFAR ResNet-18", 40),
  "CIFAR ResNet-18, 100 codes": ("CIFAR ResNet-18", 100),
  "ResNet-18 at 224, 16 codes": ("ResNet-18", 16),
  "ResNeXt-50 at 224, 2 codes": ("ResNeXt-50", 2),
  "Swin-T at 224, 8 codes": ("Swin-T", 8),
  "ViT-S/16 at 224, 8 codes": ("ViT-S/16", 8),
  "ViT-B/16 at 224, 4 codes": ("ViT-B/16", 4),
}


@dataclasses.dataclass
class Way:
  """One way to compute, ready to run."""

  name: str
  run: object  # () -> arrays
  compile_again: object  # () -> seconds
  megabytes: float
  compiled: object = None
  seconds: list[float] = dataclasses.field(default_factory=list)
  compile_seconds: float = float("nan")

  @property
  def median(self) -> float:
    """Median seconds."""
    return statistics.median(self.seconds)


def prepare(name, function, *arguments) -> Way:
  """Compile for these arguments; `function` is what jit takes."""

  def compile_again():
    jax.clear_caches()
    with jax.default_matmul_precision("highest"):
      start = time.perf_counter()
      compiled = jax.jit(function).lower(*arguments).compile()
      return compiled, time.perf_counter() - start

  compiled, _ = compile_again()
  memory = compiled.memory_analysis()
  megabytes = memory.temp_size_in_bytes / 2**20 if memory else 0.0
  return Way(name, lambda: compiled(*arguments), lambda: compile_again()[1], megabytes, compiled)


def ways_of(model: str, num: int, others: bool) -> list[Way]:
  """Everything that one row compares; `others`: per-example gradients too."""
  (init, apply), shape, classes = MODELS[model]
  params = jax.jit(init)(jax.random.key(0))
  inputs, labels = jax.random.uniform(jax.random.key(1), (num, *shape)), jnp.arange(num) % classes
  loss_fn = lambda p, x, y: mj.softmax_cross_entropy(apply(p, x), y)
  disjoint = jnp.zeros((2, num)).at[0, 0].set(1.0).at[1, 1:].set(1 / (num - 1))
  overlapping = jnp.stack([jnp.linspace(1, 2, num), jnp.linspace(2, 1, num)]) / num
  leaves = len(jax.tree.leaves(params))

  def ours(name, weights, is_disjoint) -> Way:
    objective = passes.Objective(
      loss_fn,
      (True,) * leaves,
      "highest",
      disjoint=is_disjoint,
      placement=_mesh.Placement.of(params, (), None),
    )
    batch = inputs, labels
    microbatch = passes.examples_at_once(objective, params, batch, weights, None)
    part = inputs[:microbatch], labels[:microbatch]
    program = partial(passes.fisher_program, objective, microbatch)
    way = prepare(name, program, params, part, weights[:, :microbatch])
    squares = lambda: passes.squared_gradients(objective, params, batch, weights, microbatch)
    way.run = squares  # each leaf in a unit of its own, as `forget` takes it
    way.name = f"{name} (microbatch {microbatch})" if microbatch < num else name
    return way

  def per_example(params, inputs, labels, weights):
    one = lambda p, x, y: loss_fn(p, x[None], y[None])[0]
    gradients = jax.vmap(jax.grad(one), (None, 0, 0))(params, inputs, labels)
    return jax.tree.map(lambda g: jnp.einsum("gn,n...->g...", weights, g * g), gradients)

  def in_microbatches(size) -> Way:
    step = lambda total, p, x, y, w: jax.tree.map(jnp.add, total, per_example(p, x, y, w))
    zeros = jax.tree.map(lambda leaf: jnp.zeros((2, *leaf.shape)), params)
    way = prepare(
      f"vmap(grad) by {size}", step, zeros, params, inputs[:size], labels[:size], disjoint[:, :size]
    )
    with jax.default_matmul_precision("highest"):
      donating = jax.jit(step, donate_argnums=0)
      compiled = donating.lower(
        zeros, params, inputs[:size], labels[:size], disjoint[:, :size]
      ).compile()

    def run():
      total = jax.tree.map(jnp.zeros_like, zeros)
      for at in range(0, num, size):
        total = compiled(
          total, params, inputs[at : at + size], labels[at : at + size], disjoint[:, at : at + size]
        )
      return total

    way.run = run
    return way

  ways = [
    prepare(
      "batch gradient",
      lambda p, x, y: jax.grad(lambda p: loss_fn(p, x, y).mean())(p),
      params,
      inputs,
      labels,
    ),
    ours("one group", jnp.full((1, num), 1 / num), True),
    ours("two groups", disjoint, True),
    ours("overlapping", overlapping, False),
  ]
  if not others:
    return ways
  sizes = {
    size
    for size in (num, 8, 4)
    if size <= num and num % size == 0 and size * params_bytes(params) < 6e9
  }
  ways += [in_microbatches(size) for size in sorted(sizes)]
  ways.append(in_microbatches(1))
  ways[-1].name = "one by one"
  return ways


def params_bytes(params) -> int:
  """Size of a model."""
  return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def check(ways: list[Way]) -> float:
  """Largest difference between our two groups and vmap(grad)'s, over each leaf's largest entry."""
  by_name = {way.name.split(" (")[0]: way for way in ways}
  if "one by one" not in by_name:
    return float("nan")
  ours = by_name["two groups"].run().in_range()
  theirs = jax.tree.leaves(by_name["one by one"].run())
  return max(
    float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in zip(ours, theirs, strict=True)
  )


def measure_compilation(ways: list[Way], rounds: int = 3) -> None:
  """Round after round over all ways, for the same reason as in `measure`; those that compile."""
  compiling = [way for way in ways if way.compile_again]
  seconds = [[way.compile_again() for way in compiling] for _ in range(rounds)]
  for way, column in zip(compiling, zip(*seconds, strict=True), strict=True):
    way.compile_seconds = statistics.median(column)


def measure(ways: list[Way], budget: float) -> None:
  """Interleave repetitions, so that a slow moment of the machine hits every way.

  At least two repetitions are timed, after one that is not.
  """
  for way in ways:
    jax.block_until_ready(way.run())
  start, repetitions = time.perf_counter(), 0
  while repetitions < 2 or (time.perf_counter() - start < budget and repetitions < 300):
    for way in ways:
      begun = time.perf_counter()
      jax.block_until_ready(way.run())
      way.seconds.append(time.perf_counter() - begun)
    repetitions += 1


def report(row: str, ways: list[Way], error: float) -> str:
  """The rows of one model."""
  floor = ways[0]
  vmapped = [way for way in ways if way.name.startswith("vmap")]
  best = min(vmapped, key=lambda way: way.median, default=None)
  shown = [way for way in ways if not way.name.startswith("vmap") or way is best]
  lines = [
    f"| {row if way is floor else ''} | {way.name} | {way.median:.3g} | "
    f"{way.median / floor.median:.2f} | {way.megabytes:.0f} | "
    f"{way.compile_seconds:.1f} | {way.compile_seconds / floor.compile_seconds:.1f} |"
    for way in shown
  ]
  lines = [line.replace(" nan ", " - ") for line in lines]
  return "\n".join([*lines, f"| | largest error against one by one | {error:.0e} | | | | |"])


def torch_loop(num: int) -> Way:
  """PyTorch: the same ResNet-18, a loop over single codes with squared gradients, two groups."""
  import torch
  from torch_nets import cifar_resnet18

  torch.manual_seed(0)
  torch.set_num_threads(2)
  model = cifar_resnet18().eval()
  inputs, labels = torch.rand(num, 3, 32, 32), torch.arange(num) % 10
  params = [p for p in model.parameters() if p.requires_grad]

  def run():
    sums = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    for n in range(num):
      loss = torch.nn.functional.cross_entropy(model(inputs[n : n + 1]), labels[n : n + 1])
      weight = 1.0 if n == 0 else 1 / (num - 1)
      for total, gradient in zip(sums[int(n > 0)], torch.autograd.grad(loss, params), strict=True):
        total.addcmul_(gradient, gradient, value=weight)
    return np.zeros(())

  run()
  return Way("PyTorch, one by one", run, None, float("nan"))


def main() -> None:
  """Parse, measure, print."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "rows", nargs="*", help="rows to run, by the start of their names; all if none"
  )
  parser.add_argument("--list", action="store_true", help="name the rows and stop")
  parser.add_argument(
    "--ours", action="store_true", help="leave out vmap(grad) and one by one, which take longest"
  )
  parser.add_argument(
    "--torch", action="store_true", help="add the PyTorch loop (CIFAR ResNet-18 rows)"
  )
  parser.add_argument(
    "--seconds", type=float, default=20.0, help="time for the repetitions of a row"
  )
  options = parser.parse_args()
  if options.list:
    print("\n".join(ROWS))
    return
  chosen = [
    row for row in ROWS if not options.rows or any(row.startswith(start) for start in options.rows)
  ]
  if not chosen:
    sys.exit(f"no row starts with {options.rows}; --list names them")
  print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {jax.device_count()} device(s)\n")
  print(
    "| model | way | seconds | / batch | temp MiB | compile s | / batch |\n"
    "|---|---|---|---|---|---|---|"
  )
  for row in chosen:
    model, num = ROWS[row]
    ways = ways_of(model, num, not options.ours)
    error = check(ways)
    if options.torch and model == "CIFAR ResNet-18":
      ways.append(torch_loop(num))
    measure(ways, options.seconds)
    measure_compilation(ways)
    print(report(row, ways, error), flush=True)


if __name__ == "__main__":
  main()
