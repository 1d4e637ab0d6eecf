"""Rival ways to forget, which every claim is measured against.

`protocol` says what a rival is. To add one, write its file and add it to `RIVALS`.
"""

from mnemonic_jax.rivals import (
  boundary_shrink,
  damp,
  eu_k,
  fine_tune,
  gradient_ascent,
  head_edit,
  head_projection,
  kodge,
  lwsf,
  random_labels,
  salun,
  scrub,
  sfdn,
  ssd,
  synthetic_embeddings,
  unsir,
)
from mnemonic_jax.rivals.protocol import Rival as Rival
from mnemonic_jax.rivals.request import NotApplicable as NotApplicable
from mnemonic_jax.rivals.request import Request as Request
from mnemonic_jax.rivals.request import make_request as make_request
from mnemonic_jax.rivals.search import search as search

RIVALS: dict[str, Rival] = {
  module.RIVAL.name: module.RIVAL
  for module in (
    head_edit,
    head_projection,
    synthetic_embeddings,
    ssd,
    sfdn,
    kodge,
    damp,
    gradient_ascent,
    boundary_shrink,
    random_labels,
    salun,
    scrub,
    fine_tune,
    eu_k,
    unsir,
    lwsf,
  )
}
