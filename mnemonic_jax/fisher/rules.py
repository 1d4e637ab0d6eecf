"""The table of contractions that plan, explanation, microbatch sizes and evaluation all read.

A rule is a class with

    fits(equation, params, kinds)     whether it can contract the equation, `params` the operands
                                      that are leaves
    misfit                            why not, in words
    Rule(equation, index)             the contraction of the leaf that is operand `index`

and such a contraction has

    name, index, data_index           what it is called, and where leaf and data are
    positions, flops, held, held_each what it costs: see each rule
    read, written                     axes of one example's data that it contracts, and of its
                                      result that the leaf's channels are on; None for a lookup
    contract(data, g, groups)         sums of squared gradients, (G, *leaf.shape)
    gradients(data, g)                the gradients of a few examples
"""

from __future__ import annotations

from typing import Any

from mnemonic_jax.fisher.convolution import Convolution
from mnemonic_jax.fisher.lookup import Lookup
from mnemonic_jax.fisher.product import Product

Contractor = Product | Convolution | Lookup

BY_PRIMITIVE: dict[str, Any] = {
  "dot_general": Product,
  "conv_general_dilated": Convolution,
  "gather": Lookup,
  "dynamic_slice": Lookup,
}


def contractor(equation: Any, index: int) -> Contractor:
  """The contraction of an equation whose operand `index` is a leaf."""
  made: Contractor = BY_PRIMITIVE[equation.primitive.name](equation, index)
  return made
