"""Paged steps, in chunks and mixed batches, against the plain model in one shot."""

import dataclasses

import numpy as np
import pytest
import tvm
from tvm import relax

from tests.passes.served_models import Batch, Compiled, Tiny, fused_model, random_params, round_trip
from tests.tolerances import assert_close
from tilewright.compiler.errors import CompileError
from tilewright.compiler.relax_utils import bindings, composite_of, op_name
from tilewright.compiler.verify import verify
from tilewright.passes.insert_paged_kv import InsertPagedKV

PAGE_SIZE = 4


def check_against_plain(c: Tiny, served: InsertPagedKV) -> None:
    """Chunked prefill, mixed batches and decode of three sequences equal one-shot runs of the fused model."""
    rng = np.random.default_rng()
    fused = fused_model(c)
    params = random_params(fused["forward"], rng)
    plain, paged = Compiled(fused), served.run(fused)
    verify(paged, "served")
    batch = Batch(paged, params, served.page_size)

    def go(lengths: dict[int, int], all_rows: bool = False) -> None:
        request = {s: rng.integers(0, c.vocab, n).tolist() for s, n in lengths.items()}
        result = batch.step(request, all_rows)
        results = result if isinstance(result, list) else [result]
        row = 0
        for sequence, new in request.items():
            whole = plain("forward", np.array(batch.tokens[sequence], "int32"), *params)
            wanted = len(new) if all_rows else 1
            for got, expected in zip(results, whole if isinstance(whole, list) else [whole], strict=True):
                assert_close(got[row : row + wanted], expected[-wanted:])
            row += wanted
        assert row == len(results[0])

    go({0: 7, 1: 3}, all_rows=True)
    go({2: 19, 0: 5})
    go({0: 1, 1: 1, 2: 6})
    for _ in range(3):
        go({2: 1, 0: 1, 1: 1})


@pytest.mark.parametrize(
    "c",
    [
        Tiny(),
        Tiny(heads=3, kv_heads=3, head_dim=10, qk_norm=True, joint_qkv=False, bias=True, windows=(2, None, 1)),
        Tiny(heads=4, kv_heads=1, soft_cap=5.0, windows=(None, None)),
        Tiny(sinks=True),
    ],
    ids=["gqa-window", "mha-norm-bias", "mqa-softcap", "sinks"],
)
def test_steps_equal_one_shot(c):
    check_against_plain(c, InsertPagedKV(PAGE_SIZE))


def test_all_outputs_are_narrowed_to_the_wanted_rows():
    check_against_plain(Tiny(taps=True), InsertPagedKV(PAGE_SIZE))


def test_cache_with_k_as_slot_dim_and_in_half_precision_is_honoured():
    check_against_plain(Tiny(windows=(None,)), InsertPagedKV(3, k_transposed=False))
    paged = InsertPagedKV(5, kv_dtype="float16").run(fused_model(Tiny()))
    pages = next(p for p in paged["logits"].params if p.name == "pages")
    assert pages.ty.dtype == "float16"
    assert Compiled(paged) is not None


def test_what_no_attention_needs_is_computed_for_the_wanted_rows_only():
    mod = InsertPagedKV(PAGE_SIZE).run(fused_model(Tiny(windows=(None, None))))
    names = []
    for b in bindings(mod["logits"]):
        composite = composite_of(mod, b.value)
        names.append(composite[0] if composite else op_name(b.value))
    last = len(names) - names[::-1].index("paged_attention")
    assert names.count("take") == 2 and "take" not in names[:last]  # the residual and the attention's output
    for b in bindings(mod["logits"])[names.index("take", last) :]:
        if composite_of(mod, b.value):
            assert b.var.ty.shape.values[0].name == "r"


def test_text_parses_back():
    round_trip(InsertPagedKV(PAGE_SIZE).run(fused_model(Tiny(qk_norm=True, windows=(None, 2)))))


def test_equal_layers_share_their_functions():
    mod = InsertPagedKV(PAGE_SIZE).run(fused_model(Tiny(windows=(None, 3, None, 3))))
    kinds = [str(f.attrs["tw.composite"]) for f in mod.functions.values() if "tw.composite" in (f.attrs or {})]
    assert kinds.count("kv_append") == 1 and kinds.count("paged_attention") == 2


def test_the_given_module_stays_as_it_was():
    fused = fused_model(Tiny())
    before = fused.script()
    InsertPagedKV(PAGE_SIZE).run(fused)
    assert fused.script() == before


def two_geometries() -> tvm.IRModule:
    """A model whose second attention has another number of KV heads, made by stitching two attention specs."""
    mod = fused_model(Tiny(windows=(None, 3)))
    functions = dict(mod.functions.items())
    for gv, func in mod.functions.items():
        text = str((func.attrs or {}).get("tw.spec", ""))
        if (func.attrs or {}).get("tw.composite") == "attention" and '"window": 3' in text:
            functions[gv] = func.with_attr("tw.spec", text.replace('"kv_heads": 2', '"kv_heads": 1'))
    return tvm.IRModule(functions)


def test_layers_of_different_geometry_are_refused():
    with pytest.raises(CompileError, match=r"attention layer 1 has 1 KV heads of 16, layer 0 has 2 of 16"):
        InsertPagedKV(PAGE_SIZE).run(two_geometries())


def test_a_program_without_attention_is_refused():
    with pytest.raises(CompileError, match="no attention"):
        InsertPagedKV(PAGE_SIZE).run(fused_model(dataclasses.replace(Tiny(), windows=())))


def test_page_size_must_be_positive():
    with pytest.raises(CompileError, match="page size is 0 tokens"):
        InsertPagedKV(0)


def test_the_result_is_well_formed_with_no_stale_length():
    mod = InsertPagedKV(PAGE_SIZE).run(fused_model(Tiny()))
    assert relax.analysis.check_well_formed(mod)
    assert "n: T.int64" not in mod["logits"].script()
