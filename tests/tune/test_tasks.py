"""What there is to tune in a model: one task for each schedule, facts and rows, weighted by a workload."""

import json
from pathlib import Path

import pytest
import tvm

from tests.kernel_runner import host_target
from tests.passes.scheduled_models import served_model
from tests.passes.served_models import Tiny
from tilewright.compiler.errors import UserError
from tilewright.compiler.options import Options
from tilewright.compiler.targets import RECORDS
from tilewright.passes.plan_buckets import PlanBuckets
from tilewright.tuner.tasks import extract, weights
from tilewright.tuner.workloads import Step, named
from tilewright.tuning import plan

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
MODEL = Tiny(hidden=32, inter=48, heads=6, kv_heads=2, head_dim=8, vocab=37, windows=(None, None, 3))
DECODE_ONE, DECODE_THREE, PROMPT = Step(1, 1, True, 1.0), Step(3, 3, True, 1.0), Step(24, 1, False, 1.0)


@pytest.fixture(scope="module")
def module() -> tvm.IRModule:
    return PlanBuckets(decode=(1,), max_tokens=24, max_batch=3).run(served_model(MODEL))


def calls(module: tvm.IRModule, *steps: Step) -> dict[tuple[str, int], float]:
    """Calls by schedule and rows, those of several facts added up."""
    found: dict[tuple[str, int], float] = {}
    for task in extract(module, host_target(), steps):
        key = task.schedule.name, task.rows
        found[key] = found.get(key, 0.0) + task.calls
    return found


def test_a_decode_of_one_runs_the_step_of_its_size(module: tvm.IRModule) -> None:
    found = calls(module, DECODE_ONE)
    assert found["paged_attention", 1] == 3  # layers
    assert found["sample", 1] == found["embedding", 1] == 1
    assert found["paged_attention", 24] == found["sample", 3] == 0


def test_steps_are_averaged_by_their_share(module: tvm.IRModule) -> None:
    found = calls(module, DECODE_ONE, Step(24, 1, False, 3.0))
    assert found["paged_attention", 1] == pytest.approx(3 / 4)
    assert found["paged_attention", 24] == pytest.approx(9 / 4)
    assert found["sample", 1] == pytest.approx(1 / 4) and found["sample", 3] == pytest.approx(3 / 4)


def test_the_load_is_that_of_the_rows_a_step_has(module: tvm.IRModule) -> None:
    """Of 24 tokens wants one row of logits; three sequences want three."""
    loads = {}
    for step in (PROMPT, DECODE_THREE):
        for task in extract(module, host_target(), [step]):
            if task.schedule.name in ("sample", "embedding") and task.calls:
                loads[task.schedule.name, step] = task.load_us / task.least_us(1)
    assert loads["sample", PROMPT] == pytest.approx(1) and loads["sample", DECODE_THREE] == pytest.approx(3)
    assert loads["embedding", PROMPT] == pytest.approx(24) and loads["embedding", DECODE_THREE] == pytest.approx(3)


def test_equal_calls_of_several_functions_are_one_task(module: tvm.IRModule) -> None:
    tasks = extract(module, host_target(), [DECODE_ONE, PROMPT])
    assert len({task.key for task in tasks}) == len(tasks)
    windowed = [t for t in tasks if t.schedule.name == "paged_attention" and t.rows == 24]
    assert sorted(task.calls for task in windowed) == [0.5, 1.0]  # one layer slides, two do not; half of the steps


def test_a_gpu_has_a_task_for_each_number_of_rows_that_is_told_apart(tmp_path: Path) -> None:
    """Of a model that is nothing but its configuration."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    options = Options(RECORDS["nvidia-h100"], weights="random:0", max_batch=64, max_tokens=512)
    workload = tmp_path / "steps.json"
    workload.write_text(json.dumps([*({"decode": n} for n in (1, 4, 16, 64)), {"prefill": 128}, {"prefill": 512}]))
    found = plan(str(tmp_path), options, str(workload), lambda _: None)
    rows = {task.rows for task in found.tasks if task.schedule.name == "linear"}
    assert rows == {8, 16, 64, 128, 512}
    assert {task.schedule.name for task in found.tasks} > {"linear", "paged_attention", "angles"}
    assert not any(task.why_not for task in (*found.tasks, *found.skipped))
    assert {task.rows for task in found.skipped if task.schedule.name == "linear"} > {32, 96, 384}


def test_weights_go_by_times_where_they_are_known(module: tvm.IRModule) -> None:
    tasks = extract(module, host_target(), [PROMPT])
    first = tasks[0]
    by_floor = weights(tasks, {})
    slow = weights(tasks, {first.key: 9 * first.floor_us})
    assert sum(by_floor.values()) == pytest.approx(1) == sum(slow.values())
    share = by_floor[first.key]
    assert slow[first.key] == pytest.approx(9 * share / (9 * share + 1 - share))


def test_named_workloads_fit_the_steps() -> None:
    assert [s.tokens for s in named("decode", 48, 512)] == [1, 4, 16, 48]
    assert [(s.tokens, s.sequences) for s in named("prefill", 4, 512)] == [(128, 1), (512, 1)]
    mixed = named("mixed", 100, 512)
    both = [s for s in mixed if s.sequences > 1 and not s.decode]
    assert [(s.tokens, s.sequences) for s in both] == [(320, 100), (384, 100), (448, 100), (512, 100)]
    assert [s.tokens for s in mixed if s.decode] == [1, 4, 16, 32, 48, 64, 96, 100]
    assert [s.tokens for s in mixed if s.sequences == 1 and not s.decode] == [128, 512]
    assert sum(s.share for s in both) == pytest.approx(4)
    assert sum(s.share for s in mixed if s.decode) == pytest.approx(16)
    assert sum(s.share for s in mixed) == pytest.approx(21)


def test_a_workload_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "steps.json"
    file.write_text('[{"decode": 16, "share": 3}, {"prefill": 500}]')
    assert named(str(file), 16, 512) == (Step(16, 16, True, 3.0), Step(500, 1, False, 1.0))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '[{"decode": 17}]', '[{"decode": 1, "prefill": 2}]', '[{"train": 1}]', '[{"decode": 1.5}]']
)
def test_what_is_no_workload_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "steps.json"
    file.write_text(text)
    with pytest.raises(UserError, match="is no workload of steps of up to 16 sequences and 512 tokens; write them as"):
        named(str(file), 16, 512)


def test_an_unknown_workload_is_refused() -> None:
    with pytest.raises(UserError, match="--workload is 'chat'; use decode, prefill, mixed, or a file of steps"):
        named("chat", 16, 512)


def test_the_example_of_a_refusal_is_a_workload(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refusal:
        (tmp_path / "none.json").write_text("no")
        named(str(tmp_path / "none.json"), 16, 512)
    example = str(refusal.value).partition("write them as ")[2]
    assert json.loads(example)
    (tmp_path / "some.json").write_text(example)
    assert len(named(str(tmp_path / "some.json"), 16, 512)) == 2
