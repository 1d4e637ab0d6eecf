"""The diagonal Fisher information of any per-example loss: one door, and the engine behind it."""

from mnemonic_jax.fisher.door import Execution as Execution
from mnemonic_jax.fisher.door import FisherPlan as FisherPlan
from mnemonic_jax.fisher.door import LeafPlan as LeafPlan
from mnemonic_jax.fisher.door import diagonal_fisher as diagonal_fisher
from mnemonic_jax.fisher.door import explain_fisher as explain_fisher
