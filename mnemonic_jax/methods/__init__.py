"""Forgetting methods: frozen pytrees of their own numbers, each run by `mnemonic_jax.forget`.

`protocol` says what a method is, `problem` what it is given. To add one, write its file and add
its class to `METHODS`.
"""

from mnemonic_jax.methods.dampening import Dampening
from mnemonic_jax.methods.drop_row import DropRow
from mnemonic_jax.methods.perturbation import Perturbation
from mnemonic_jax.methods.projection import Projection as Projection
from mnemonic_jax.methods.protocol import Method as Method
from mnemonic_jax.methods.protocol import name_of
from mnemonic_jax.methods.protocol import require_method as require_method
from mnemonic_jax.methods.protocol import settings as settings
from mnemonic_jax.methods.protocol import steps_of as steps_of
from mnemonic_jax.methods.relearn import Relearn as Relearn

METHODS = {name_of(cls): cls for cls in (Projection, DropRow, Relearn, Dampening, Perturbation)}
