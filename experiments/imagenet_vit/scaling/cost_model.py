"""The cost model of training and forgetting ViTs, on paper, and the tables of docs/scaling.md.

Command:  python experiments/imagenet_vit/scaling/cost_model.py [--write]
          (prints the tables, or puts them into docs/scaling.md)

Nothing here was measured. Pictures are 224 x 224, and the head reads the mean over patches, as in
the recipes. The last table shows what compile_check.py wrote into
experiments/results/compile_check.
"""

from __future__ import annotations

import json
import math
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from chips import CHIPS, TF32, Chip

TRAIN_IMAGES = 1_281_167  # of ImageNet-1k
SIDE, CLASSES = 224, 1000
SHARE_OF_PEAK = 0.4  # assumed, of products, in training (the MFU) and in forgetting
CODES_PER_DEVICE = 16  # in one pass of a forget; job.py's
JUDGES = 8  # a class, of learned codes
BFLOAT16, FLOAT32 = 2, 4  # bytes
PAGE = pathlib.Path(__file__).parents[3] / "docs" / "scaling.md"
COMPILED = pathlib.Path(__file__).parents[2] / "results" / "compile_check"


class ViT(NamedTuple):
  """The sizes of a vision transformer."""

  width: int
  depth: int
  heads: int
  patch: int

  def tokens(self, side: int = SIDE) -> int:
    """Patches of a picture."""
    return (side // self.patch) ** 2

  def layer_params(self) -> int:
    """Of one block: four kernels, their biases, two norms."""
    return 12 * self.width**2 + 13 * self.width

  def params(self, classes: int = CLASSES, side: int = SIDE) -> int:
    """Of the whole model, without a class token."""
    patches = 3 * self.patch**2 * self.width + self.width
    ends = self.tokens(side) * self.width + 2 * self.width + (self.width + 1) * classes
    return patches + self.depth * self.layer_params() + ends

  def layer_flops(self, side: int = SIDE) -> int:
    """Of one image forward: products with weights, scores, and values by scores.

    A multiply and an add are two.
    """
    tokens = self.tokens(side)
    return 24 * tokens * self.width**2 + 4 * tokens**2 * self.width

  def forward_flops(self, classes: int = CLASSES, side: int = SIDE) -> int:
    """Of one image."""
    patches = 2 * self.tokens(side) * 3 * self.patch**2 * self.width
    return patches + self.depth * self.layer_flops(side) + 2 * self.width * classes

  def layer_activations(self, side: int = SIDE) -> int:
    """Numbers that a layer's backward pass reads of one image: 16 rows, and the scores.

    Rows are as wide as the model: its inputs, both norms' and the attention's outputs 1 each,
    queries, keys and values 3, the hidden layer before and after GELU 4 each, the second
    residual 1.
    """
    tokens = self.tokens(side)
    return 16 * tokens * self.width + 2 * self.heads * tokens**2

  def activation_bytes(self, remat: bool, side: int = SIDE) -> int:
    """Of one image, in bfloat16; with remat a layer's input each, and one layer whole."""
    if not remat:
      return 2 * self.depth * self.layer_activations(side)
    return 2 * (self.depth * self.tokens(side) * self.width + self.layer_activations(side))


VITS = {
  "vit_ti16": ViT(192, 12, 3, 16),
  "vit_s16": ViT(384, 12, 6, 16),
  "vit_b16": ViT(768, 12, 12, 16),
  "vit_l16": ViT(1024, 24, 16, 16),
  "vit_h14": ViT(1280, 32, 16, 14),
}


def forward_passes(remat: bool) -> dict[str, int]:
  """What each program does to one image or code, in forward passes.

  A step of training is three, a fourth with remat. Of a forget, the Fishers take the same for each
  code (what contracts inputs with cotangents stands where the gradient of the weights would), and
  scoring a forward pass for each of two directions and one at the end. A projection follows each
  code once and scores it once, and each judge once more than that; the linear algebra of its sites
  is left out. A code is learned or recalled by a forward pass and the half of a backward pass that
  needs no gradient of the weights; remat adds one.
  """
  return {
    "train step": 3 + remat,
    "forget": 3 + remat + 3,
    "projection": 2 + 3 * JUDGES,
    "learning codes": 2 + remat,
    "recalling codes": 2 + remat,
  }


class Machine(NamedTuple):
  """Devices, and how they are arranged."""

  name: str
  chip: str
  devices: int
  fsdp: int  # devices that share the params; the others hold copies

  @property
  def speed(self) -> Chip:
    """Of one device."""
    return CHIPS[self.chip]

  @property
  def data(self) -> int:
    """Copies of the params."""
    return self.devices // self.fsdp


MACHINES = (
  Machine("1 x H200", "h200", 1, 1),
  Machine("8 x H100", "h100", 8, 8),
  Machine("v5e, 16 chips", "v5e", 16, 4),
  Machine("v5e, 256 chips", "v5e", 256, 4),
  Machine("v5p, 128 chips", "v5p", 128, 4),
)
BATCH = 4096  # of the tables below
SMALL_BATCH = 1024  # of the recipe of ViT-S/16


def ring(size: float, group: int) -> float:
  """Bytes that each device sends to gather `size` bytes from a group, or to scatter their sums."""
  return size * (group - 1) / group


def step_bytes(params: int, machine: Machine) -> dict[str, float]:
  """Bytes that a device sends in one step, in bfloat16, if nothing is sent in vain.

  Each layer is gathered for the forward pass and again for the backward pass; gradients are summed
  onto the shards, and the shards over the copies.
  """
  size = BFLOAT16 * params
  return {
    "gather": 2 * ring(size, machine.fsdp),
    "scatter": ring(size, machine.fsdp),
    "copies": 2 * ring(size / machine.fsdp, machine.data),
  }


def state_bytes(params: int, fsdp: int) -> dict[str, float]:
  """Bytes of a device, in float32, whose device count along fsdp is given."""
  share = FLOAT32 * params / fsdp
  return {
    "params": share,
    "AdamW": 2 * share,
    "gradients": share,
    "average": share,
    "both Fishers": 2 * share,
  }


def step_seconds(vit: ViT, machine: Machine, batch: int) -> tuple[float, float]:
  """Of computing and of sending; the longer counts where they overlap."""
  flops = 3 * vit.forward_flops() * batch / machine.devices
  sent = sum(step_bytes(vit.params(), machine).values())
  return flops / (machine.speed.flops * SHARE_OF_PEAK), sent / machine.speed.link


def epoch_seconds(vit: ViT, machine: Machine, batch: int = BATCH) -> float:
  """Of one pass over ImageNet-1k, if the input keeps up."""
  return TRAIN_IMAGES / batch * max(step_seconds(vit, machine, batch))


def forget_seconds(vit: ViT, machine: Machine, classes: int, products: float) -> float:
  """Of one forget: products, each code's gradients in memory, and the network, in sequence.

  The engine writes the gradient of each code of one param after the other in float32, and reads it
  back to square and add it. Each pass gathers the params twice and sums two Fishers; the update
  gathers them once for each of two directions.
  """
  passes = math.ceil(classes / (CODES_PER_DEVICE * machine.devices))
  flops = (3 + 2) * vit.forward_flops(classes) * classes / machine.devices
  memory = 2 * FLOAT32 * vit.params(classes) * classes / machine.devices
  gathers = 4 * ring(BFLOAT16 * vit.params(classes), machine.fsdp)
  fishers = 2 * FLOAT32 * vit.params(classes)
  sums = ring(fishers, machine.fsdp) + 2 * ring(fishers / machine.fsdp, machine.data)
  sent = passes * (gathers + sums)
  speed = machine.speed
  return flops / (products * SHARE_OF_PEAK) + memory / speed.bandwidth + sent / speed.link


def train_bytes(vit: ViT, fsdp: int, images: int, classes: int = CLASSES) -> float:
  """Bytes of a device in a train step with remat: shares of the state, all codes, its images."""
  share = state_bytes(vit.params(classes), fsdp)
  picture = SIDE * SIDE * 3 * (1 + FLOAT32)  # as it is stored, and as the model sees it
  kept = share["params"] + share["AdamW"] + share["gradients"] + code_bytes(classes)
  return kept + images * (picture + vit.activation_bytes(True))


def forget_bytes(vit: ViT, fsdp: int, devices: int, classes: int = CLASSES) -> float:
  """Bytes that a device may take in a forget.

  5 shares of the params, three layers, its codes, and the activations and cotangents of one pass.
  """
  codes = math.ceil(classes / devices)
  shares = 5 * FLOAT32 * vit.params(classes) / fsdp + 3 * FLOAT32 * vit.layer_params()
  one = vit.activation_bytes(True) + BFLOAT16 * vit.layer_activations()
  return shares + code_bytes(codes) + min(codes, CODES_PER_DEVICE) * one


def code_bytes(classes: int) -> int:
  """Of one code a class, in float32."""
  return classes * SIDE * SIDE * 3 * FLOAT32


PUBLISHED = tuple(name for name in VITS if name != "vit_ti16")


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
  """A table."""
  lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
  return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def seconds(value: float) -> str:
  """Two digits that count."""
  return f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def models_table() -> str:
  """Sizes and work of the models."""
  rows = []
  for name in PUBLISHED:
    vit = VITS[name]
    forward = vit.forward_flops() / 1e9
    kept, again = (f"{vit.activation_bytes(remat) / 1e6:.1f}" for remat in (False, True))
    rows.append(
      [
        f"`{name}`",
        f"{vit.params():,}",
        f"{forward:.1f}",
        f"{3 * forward:.1f}",
        f"{4 * forward:.1f}",
        kept,
        again,
      ]
    )
  head = [
    "",
    "params",
    "forward, GFLOP",
    "training",
    "training with remat",
    "activations, MB an image",
    "with remat",
  ]
  return markdown(head, rows)


def state_table() -> str:
  """Bytes of the state, all devices together."""
  rows = []
  for name in PUBLISHED:
    sizes = state_bytes(VITS[name].params(), 1)
    rows.append([f"`{name}`", *(f"{size / 1e9:.2f}" for size in sizes.values())])
  return markdown(["GB", "params", "AdamW", "gradients", "moving average", "both Fishers"], rows)


def network_table() -> str:
  """What a device sends in a step, and how long that takes beside the products."""
  rows = []
  for name in PUBLISHED:
    for machine in MACHINES[1:]:
      sent = step_bytes(VITS[name].params(), machine)
      compute, network = step_seconds(VITS[name], machine, BATCH)
      mesh = f"{machine.data} x {machine.fsdp}"
      numbers = (
        *(f"{size / 1e6:.0f}" for size in sent.values()),
        f"{1e3 * network:.2g}",
        f"{1e3 * compute:.0f}",
      )
      numbers = (
        *numbers,
        *(f"{100 * network / compute * BATCH / batch:.2g}" for batch in (BATCH, SMALL_BATCH)),
      )
      rows.append([f"`{name}`", machine.name, mesh, *numbers])
  head = [
    "",
    "machine",
    "data x fsdp",
    "gather, MB",
    "scatter, MB",
    "copies, MB",
    "network, ms",
    "products, ms",
  ]
  head += ["network in % of products", f"the same at {SMALL_BATCH:,} images"]
  return markdown(head, rows)


def time_table() -> str:
  """Seconds of an epoch and of a forget."""
  rows = []
  for name in PUBLISHED:
    for machine in MACHINES:
      vit, speed = VITS[name], machine.speed
      rate = TRAIN_IMAGES / epoch_seconds(vit, machine)
      forgets = [
        forget_seconds(vit, machine, CLASSES, products) for products in (speed.flops, speed.flops32)
      ]
      tf32 = (
        seconds(forget_seconds(vit, machine, CLASSES, TF32[machine.chip]))
        if machine.chip in TF32
        else "-"
      )
      epoch = seconds(epoch_seconds(vit, machine))
      rows.append(
        [
          f"`{name}`",
          machine.name,
          epoch,
          f"{rate:,.0f}",
          seconds(forgets[0]),
          tf32,
          seconds(forgets[1]),
        ]
      )
  head = [
    "",
    "machine",
    "epoch, s",
    "images/s that the input must give",
    "forget, bfloat16, s",
    "TF32",
    "float32",
  ]
  return markdown(head, rows)


def classes_table() -> str:
  """What grows with the number of classes."""
  rows = []
  for classes in (1000, 21_841, 100_000):
    heads = [f"{(VITS[name].width + 1) * classes / 1e6:.1f}" for name in ("vit_s16", "vit_l16")]
    forget = [
      seconds(forget_seconds(VITS["vit_l16"], machine, classes, machine.speed.flops))
      for machine in MACHINES
    ]
    rows.append([f"{classes:,}", f"{code_bytes(classes) / 1e9:.1f}", *heads, *forget])
  head = ["classes", "codes, GB", "head of S, M params", "of L"]
  return markdown([*head, *(f"forget L on {machine.name}, s" for machine in MACHINES)], rows)


def compiled_table() -> str:
  """What the TPU compiler said, from the files of compile_check.py."""
  rows = []
  for path in sorted(COMPILED.glob("*.json")):
    found = json.loads(path.read_text())
    data, fsdp = found["mesh"]["data"], found["mesh"]["fsdp"]
    chip = CHIPS[found["topology"].partition(":")[0]]
    vit, devices = VITS[found["model"]], data * fsdp
    for program in found["programs"]:
      name = program["program"]
      trains, size = name == "train step", math.nan  # of what is not on paper
      if trains:
        size = train_bytes(vit, fsdp, found["batch_size"] // devices)
      elif name.startswith("forget"):
        size = forget_bytes(vit, fsdp, devices)
      used = program["memory"]["used"]
      sent = sum(one["sent_bytes"] for one in program["collectives"])
      what = f"{name}, {found['batch_size']} images" if trains else name
      if name.startswith("forget: "):  # one of the two programs that a forget once was
        what = f"older {name}"
      times = (
        f"{1e3 * program['flops'] / chip.flops:.1f}",
        f"{1e3 * program['estimated_seconds']:.1f}",
      )
      on_paper = "-" if math.isnan(size) else f"{size / 2**30:.2f}"
      sizes = (on_paper, f"{used / 2**30:.2f} of {chip.memory // 2**30}")
      pod = f"{found['topology']}, {data} x {fsdp}"
      rows.append([f"`{found['model']}`", pod, what, *sizes, *times, f"{sent / 1e6:.0f}"])
  head = [
    "",
    "pod, data x fsdp",
    "program",
    "GiB, arithmetic",
    "GiB, compiler",
    "ms, arithmetic",
    "ms, compiler",
    "sent, MB",
  ]
  return markdown(head, rows)


TABLES = {
  "Models": models_table,
  "State": state_table,
  "Network": network_table,
  "Time": time_table,
  "Classes": classes_table,
  "Compiled": compiled_table,
}


def filled(text: str) -> str:
  """A page whose tables, each between <!-- NAME --> and <!-- end -->, are made anew."""
  for name, table in TABLES.items():
    start, end = (
      text.index(f"<!-- {name} -->"),
      text.index("<!-- end -->", text.index(f"<!-- {name} -->")),
    )
    text = f"{text[:start]}<!-- {name} -->\n{table()}\n{text[end:]}"
  return text


if __name__ == "__main__":
  if sys.argv[1:] == ["--write"]:
    PAGE.write_text(filled(PAGE.read_text()))
  else:
    print("\n\n".join(f"{name}\n\n{table()}" for name, table in TABLES.items()))
