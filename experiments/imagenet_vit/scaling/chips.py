"""What an accelerator can do, from its maker's pages: memory, memory bandwidth, products, links."""

from __future__ import annotations

from typing import NamedTuple

from mnemonic_jax.runs.meter import PEAK_FLOPS


class Chip(NamedTuple):
  """One device as jax sees it; speeds are peaks."""

  memory: int  # bytes
  bandwidth: float  # bytes/s, of its memory
  flops: float  # dense bfloat16, FLOP/s
  flops32: float  # of products that are right to float32: precision "highest"
  link: float  # bytes/s that leave it, all links together
  clock: float = 0.0  # Hz, of a TPU's cores


GIB = 2**30


def _tpu(memory: int, bandwidth: float, flops: float, both_ways: float, clock: float) -> Chip:
  # A TPU multiplies bfloat16 alone: "highest" is six such products (docs.jax.dev,
  # jax.lax.Precision and DotAlgorithmPreset).
  return Chip(memory * GIB, bandwidth, flops, flops / 6, both_ways / 2, clock)


# TPUs: cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e; memory, bandwidth, bfloat16, links in both
# directions. v4's page says nothing of links: ICI as in Jouppi et al. (2023), 6 x 50 GB/s each way.
# Clocks: v5e is said to run at 1.5 GHz (jax-ml.github.io/scaling-book/tpus); the others follow from
# bfloat16 = 2 x multipliers x clock.
CHIPS = {
  "v4": _tpu(32, 1200e9, PEAK_FLOPS["TPU v4"], 600e9, 1.05e9),
  "v5e": _tpu(16, 819e9, PEAK_FLOPS["TPU v5 lite"], 400e9, 1.5e9),
  "v5p": _tpu(95, 2765e9, PEAK_FLOPS["TPU v5"], 1200e9, 1.75e9),
  "v6e": _tpu(32, 1640e9, PEAK_FLOPS["TPU v6 lite"], 800e9, 1.75e9),
  # NVIDIA's data sheets of H100 SXM and H200 SXM; bfloat16 without sparsity, float32 outside the
  # tensor cores, NVLink.
  "h100": Chip(80 * 10**9, 3350e9, PEAK_FLOPS["NVIDIA H100 80GB HBM3"], 67e12, 450e9),
  "h200": Chip(141 * 10**9, 4800e9, PEAK_FLOPS["NVIDIA H200"], 67e12, 450e9),
}
# bfloat16 products with float32 inputs rounded to TF32, FLOP/s; same data sheets.
TF32 = {"h100": 494e12, "h200": 494e12}
