"""What a pass is: a frozen, printable value that maps one IRModule to another and touches nothing else."""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Pass(ABC):
    """Subclasses are frozen dataclasses whose fields are the options; str(p) shows name and options."""

    @property
    def name(self) -> str:
        """The file's name: FuseAttention -> fuse_attention, InsertPagedKV -> insert_paged_kv."""
        words = re.findall(r"[A-Z]+(?=[A-Z][a-z]|$)|[A-Z][a-z0-9]*", type(self).__name__)
        return "_".join(w.lower() for w in words)

    @abstractmethod
    def run(self, mod: Any) -> Any:
        """A new IRModule; the given one stays as it was."""

    def __call__(self, mod: Any) -> Any:
        return self.run(mod)
