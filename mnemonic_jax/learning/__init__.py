"""Codes of a model that is already trained: learned from one pass over data, or recalled from it.

`door` is where callers enter, `learner` what they start. `reads` says what is matched, `measure`
does the pass over data, `judges` clusters, `match` and `recall` optimise codes, and `predict` tells
what judges foresee.
"""

from mnemonic_jax.learning.door import learn_codes as learn_codes
from mnemonic_jax.learning.learned import LearnedCodes as LearnedCodes
from mnemonic_jax.learning.predict import Predicted as Predicted
from mnemonic_jax.learning.predict import calibrated as calibrated
from mnemonic_jax.learning.predict import margins as margins
from mnemonic_jax.learning.predict import predict as predict
