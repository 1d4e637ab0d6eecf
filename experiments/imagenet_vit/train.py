"""Train a config with codes on all devices there are.

Command:  python experiments/imagenet_vit/train.py imagenet_vit_s16_90ep --data-dir DIR --out RUN \
[--execution.fsdp 8]

It is `mnemonic train --json`: examples lie over the whole mesh, params over its axis fsdp, and the
weights of `model.pretrained` go from the file straight to the shards. A run may be stopped and go
on with another number of devices or processes. Forget with forget.py beside this file.
"""

from __future__ import annotations

import sys

from mnemonic_jax.cli import main

if __name__ == "__main__":
  if {"-h", "--help"} & set(sys.argv):
    print(__doc__)
  sys.exit(main(["train", "--json", *sys.argv[1:]]))
