"""What the manifest says of a compile: which tensors are kept in another format than they are stored in."""

import numpy as np

from tests.checkpoints import make_gguf
from tilewright.compiler.artifact import Param
from tilewright.compiler.build import weight_formats
from tilewright.compiler.checkpoint import Checkpoint, LazyTensor
from tilewright.compiler.describe import conversions
from tilewright.compiler.frontends import load_checkpoint
from tilewright.compiler.options import Options
from tilewright.compiler.targets import find_target


def checkpoint(**formats: str) -> Checkpoint:
    zeros = np.zeros((4, 32), np.float32)
    tensors = {name: LazyTensor((4, 32), stored, lambda: zeros) for name, stored in formats.items()}
    return Checkpoint("m", None, tensors, None)  # type: ignore[arg-type]


def param(made: str, *sources: str, columns: int | None = 32) -> Param:
    return Param("+".join(sources), (4, 32), "uint8", sources, made, 4 * len(sources), columns)


def test_every_pair_of_formats_has_a_line() -> None:
    model = checkpoint(a="q5_0", b="q5_0", c="q6_k", d="q4_1", e="q4_0", f="f16", g="f32")
    params = (param("q8_0", "a", "b", "c"), param("q4_1", "d", "e"), param("f16", "f"), param("f32", "g", columns=None))
    assert conversions(model, params) == (
        "1 tensor of q4_0 becomes q4_1",
        "2 tensors of q5_0 become q8_0",
        "1 tensor of q6_k becomes q8_0",
    )


def test_a_tensor_that_is_used_twice_counts_once_a_format() -> None:
    """A tied embedding, and one that is also kept in another format."""
    model = checkpoint(embed="q6_k")
    assert conversions(model, (param("q8_0", "embed"), param("q8_0", "embed"))) == ("1 tensor of q6_k becomes q8_0",)
    lines = conversions(model, (param("q8_0", "embed"), param("f16", "embed")))
    assert lines == ("1 tensor of q6_k becomes f16", "1 tensor of q6_k becomes q8_0")


def test_what_is_kept_has_no_line() -> None:
    model = checkpoint(a="q4_1", n="f32")
    assert conversions(model, (param("q4_1", "a"), param("f32", "n", columns=None))) == ()


def test_formats_that_were_asked_for_have_lines_too(tmp_path) -> None:
    model = load_checkpoint(make_gguf(tmp_path, "llama", "Q5_1", head_dim=64))
    formats = weight_formats(model, Options(find_target("cpu"), quant="q4_1"))
    params = tuple(param(formats[name], name) for name in formats)
    assert conversions(model, params)[-1] == f"{len(params)} tensors of q5_1 become q4_1"
