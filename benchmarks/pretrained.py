"""Import a pretrained ViT-B/16 from disk to device: seconds, and private host memory.

Command:  python benchmarks/pretrained.py [--quick]
          (two minutes on 2 CPU cores; --quick: a ViT-Ti/16, once)

Files of random weights (synthetic) with timm's names (.safetensors) and AugReg's (.npz) are read by
`mnemonic_jax.models.pretrained.load`, each time in a fresh process, into a model with and without
scanned blocks. Seconds go from the call until the params are on the device. The files have just
been written, so they are in the page cache: a cold one is not measured.

Memory is anonymous private memory (RssAnon), sampled every 5 ms: pages of mapped files are not in
it. "Peak" and "kept" are its growth during the load and after it. On CPU the params themselves are
in it, because host and device memory are the same; the target, a peak of 1.2 times the file, is
read with them there, and without them where the device has memory of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import jax
import numpy as np
from safetensors.numpy import save_file

from mnemonic_jax import models
from mnemonic_jax.models import pretrained

INTERVAL = 0.005  # seconds between samples
REPEATS = 3
MIB = 2**20

BLOCK = r"^block(\d+)/"
TIMM = (
  (BLOCK, lambda found: f"blocks/{int(found[1]) - 1}/"),
  ("^class_token$", "cls_token"),
  ("^positions$", "pos_embed"),
  ("^patches/", "patch_embed/proj/"),
  ("/attention/out/", "/attn/proj/"),
  ("/attention/", "/attn/"),
  ("/feed_forward/hidden/", "/mlp/fc1/"),
  ("/feed_forward/out/", "/mlp/fc2/"),
  ("/(kernel|scale)$", "/weight"),
  ("/", "."),
)
AUGREG = (
  (BLOCK, lambda found: f"Transformer/encoderblock_{int(found[1]) - 1}/"),
  ("^class_token$", "cls"),
  ("^positions$", "Transformer/posembed_input/pos_embedding"),
  ("^patches/", "embedding/"),
  ("^norm/", "Transformer/encoder_norm/"),
  ("/norm1/", "/LayerNorm_0/"),
  ("/norm2/", "/LayerNorm_2/"),
  ("/attention/", "/MultiHeadDotProductAttention_1/"),
  ("/feed_forward/hidden/", "/MlpBlock_3/Dense_0/"),
  ("/feed_forward/out/", "/MlpBlock_3/Dense_1/"),
)
HEADS = {"vit_ti16": 3, "vit_b16": 12}


def template(name: str, scan: bool = False):
  """Shapes of params and model_state."""
  return jax.eval_shape(
    models.make(name, shape=(224, 224, 3), num_classes=1000, scan=scan).init, jax.random.key(0)
  )


def drawn(name: str, rules) -> dict[str, np.ndarray]:
  """Random arrays in our shapes under a library's names."""
  generator, arrays = np.random.default_rng(0), {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(template(name)[0]):
    theirs = "/".join(key.key for key in path)
    for pattern, replacement in rules:
      theirs = re.sub(pattern, replacement, theirs)
    arrays[theirs] = generator.standard_normal(leaf.shape, np.float32)
  return arrays


def write_timm(name: str, folder: pathlib.Path) -> pathlib.Path:
  """A state dict of timm's: (out, in, *window)."""
  arrays = {
    theirs: np.ascontiguousarray(np.moveaxis(x, (-1, -2), (0, 1)))
    if theirs.endswith("weight") and x.ndim > 1
    else x
    for theirs, x in drawn(name, TIMM).items()
  }
  save_file(arrays, folder / "timm.safetensors")
  return folder / "timm.safetensors"


def write_augreg(name: str, folder: pathlib.Path) -> pathlib.Path:
  """Write q, k and v apart, heads in an axis of their own; uncompressed, as numpy.savez does."""
  arrays, heads = {}, HEADS[name]
  for theirs, x in drawn(name, AUGREG).items():
    if "/qkv/" in theirs:
      for part, piece in zip(("query", "key", "value"), np.split(x, 3, axis=-1), strict=True):
        arrays[theirs.replace("/qkv/", f"/{part}/")] = piece.reshape(*piece.shape[:-1], heads, -1)
    else:
      arrays[theirs] = x.reshape(heads, -1, x.shape[-1]) if theirs.endswith("_1/out/kernel") else x
  np.savez(folder / "augreg.npz", **arrays)
  return folder / "augreg.npz"


def anonymous() -> int:
  """Bytes of this process's anonymous memory."""
  found = re.search(r"RssAnon:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
  return 1024 * int(found[1])


def child(name: str, file: str, scan: bool) -> dict[str, float]:
  """Load once in this process."""
  trees = template(name, scan)
  jax.block_until_ready(jax.numpy.zeros(3))
  gc.collect()
  before, samples, done = anonymous(), [], threading.Event()

  def sample() -> None:
    while not done.wait(INTERVAL):
      samples.append(anonymous())

  sampler = threading.Thread(target=sample)
  sampler.start()
  start = time.perf_counter()
  params, _ = jax.block_until_ready(pretrained.load(file, name, *trees))
  seconds = time.perf_counter() - start
  done.set()
  sampler.join()
  gc.collect()
  kept = anonymous()
  return {
    "seconds": seconds,
    "peak": max(*samples, kept) - before,
    "kept": kept - before,
    "params": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
  }


def row(kind: str, name: str, file: pathlib.Path, repeats: int, scan: bool) -> str:
  """Medians over fresh processes; the largest peak."""
  size, outcomes = file.stat().st_size, []
  for _ in range(repeats):
    command = [sys.executable, __file__, "--child", name, str(file), *["--scan"] * scan]
    outcomes.append(
      json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout
      )
    )
  seconds = [outcome["seconds"] for outcome in outcomes]
  peak, kept = max(o["peak"] for o in outcomes), statistics.median(o["kept"] for o in outcomes)
  params = outcomes[0]["params"]
  return (
    f"| {kind}{', scanned blocks' if scan else ''} | {size / MIB:.0f} | "
    f"{seconds[0]:.2f} | {statistics.median(seconds):.2f} | {peak / MIB:.0f} | "
    f"{peak / size:.2f} | {(peak - params) / MIB:.0f} | "
    f"{(peak - params) / size:.2f} | {kept / size:.2f} |"
  )


def main() -> None:
  """Write, load, print."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--quick", action="store_true", help="a ViT-Ti/16, once")
  parser.add_argument(
    "--child",
    nargs=2,
    metavar=("MODEL", "FILE"),
    help="load one file here, and print one JSON line",
  )
  parser.add_argument("--scan", action="store_true", help="with --child: into scanned blocks")
  options = parser.parse_args()
  if options.child:
    print(json.dumps(child(*options.child, options.scan)))
    return
  name, repeats = ("vit_ti16", 1) if options.quick else ("vit_b16", REPEATS)
  print(
    f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {name}, "
    f"{repeats} fresh processes a row\n"
  )
  print(
    "| file | MiB | s (first) | s (median) | largest peak, MiB | / file | "
    "less the params, MiB | / file | kept / file |\n"
    "|---|---|---|---|---|---|---|---|---|"
  )
  with tempfile.TemporaryDirectory() as folder:
    for kind, write in (("timm .safetensors", write_timm), ("AugReg .npz", write_augreg)):
      file = write(name, pathlib.Path(folder))
      for scan in (False, True):
        print(row(kind, name, file, repeats, scan), flush=True)
      file.unlink()


if __name__ == "__main__":
  main()
