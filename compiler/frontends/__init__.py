"""Front ends: whatever a user calls a model -> a `Checkpoint` (compiler/checkpoint.py)."""

from tilewright.compiler.frontends.random_weights import random_checkpoint
from tilewright.compiler.frontends.resolve import aliases, load_checkpoint

__all__ = ["aliases", "load_checkpoint", "random_checkpoint"]
