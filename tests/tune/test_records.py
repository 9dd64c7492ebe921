"""Tuning records: what a line holds, which ones are refused, and which tile a compile takes from them."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernel_runner import host_target
from tests.tune.examples import DEVICE, FOLDER, SPACE, Facts, Tile, record
from tilewright.compiler.calls import ByRows, Call
from tilewright.compiler.composites import LinearSpec, NormSpec
from tilewright.compiler.targets import RECORDS
from tilewright.compiler.targets.base import Target
from tilewright.schedules.cpu.rms_norm import RMSNorm
from tilewright.schedules.cuda.linear import Linear, LinearFacts
from tilewright.schedules.order import Chooser
from tilewright.schedules.records import (
    Known,
    UnreadableRecord,
    merged,
    parse,
    read_file,
    read_known,
    space_hash,
    target_text,
    text_of,
)

HERE = Target("cpu", "cpu", "x86_64", ("avx2",))


def test_a_line_gives_its_record_back() -> None:
    for each in (record(), record(us=None), record(clock_mhz=1980.0, temperature_c=61.0, of_floor=0.93, detail="x")):
        assert parse(each.line()) == each
        assert "\n" not in each.line()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("{", "is no JSON"),
        ("7", "is no tuning record"),
        ('{"case": "decode"}', "is no tuning record"),
        ({"version": 2}, "is of another version than 1"),
        ({"us": -1.0}, "has a us that can't be"),
        ({"us": "fast"}, "has a us that can't be"),
        ({"rows": 0}, "has a rows that can't be"),
        ({"tile": "wide"}, "has a tile that can't be"),
        ({"target": ""}, "has a target that can't be"),
        ({"spread_us": [1]}, "has a spread_us that can't be"),
        ({"failure": "sad", "us": None}, "has a us that can't be"),
        ({"failure": "crash"}, "has neither a time nor a failure, or both"),
        ({"colour": "red"}, "has one field too many or too few: colour"),
    ],
)
def test_what_is_no_record_says_why(change: str | dict, reason: str) -> None:
    line = change if isinstance(change, str) else json.dumps(json.loads(record().line()) | change)
    with pytest.raises(UnreadableRecord, match=reason):
        parse(line)


def test_unreadable_and_foreign_lines_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    file = tmp_path / FOLDER / "made_up.jsonl"
    file.parent.mkdir()
    elsewhere = record(4, device="Another")
    lines = [record(1).line(), record(2).line()[:40], elsewhere.line(), "", record(4).line()]
    file.write_text("\n".join(lines))
    records, others, problems = read_file(file)
    assert [r.tile for r in records] == [text_of(Tile(1)), text_of(Tile(4))]
    assert [r.place for r in records] == [f"{FOLDER}/made_up.jsonl:1", f"{FOLDER}/made_up.jsonl:5"]
    assert others == lines[1:3]
    assert problems == [
        f"{file}:2 is no JSON: skipped",
        f"{file}:3 is of made_up on Another, and belongs into another file: skipped",
    ]


def test_the_fastest_of_the_same_space_is_best() -> None:
    known = Known((record(1, 9.0), record(2, 7.0), record(4, None), record(4, 1.0, n=8)))
    tile, found = known.best("made_up", Facts(7), 8, SPACE) or (None, None)
    assert tile == Tile(2) and found is not None and found.us == 7.0
    assert known.best("made_up", Facts(9), 8, SPACE) is None
    assert known.best("another", Facts(7), 8, SPACE) is None
    assert Known().best("made_up", Facts(7), 8, SPACE) is None


def test_a_record_of_another_space_is_stale() -> None:
    known = Known((record(1, 9.0),))
    wider = (*SPACE, Tile(8))
    assert known.best("made_up", Facts(7), 8, wider) is None
    assert known.stale("made_up", Facts(7), wider) == list(known.records)
    assert known.stale("made_up", Facts(7), SPACE) == []
    assert space_hash(SPACE) == space_hash(SPACE[::-1])  # a better guess at the default makes nothing stale


def test_the_nearest_number_of_rows_counts() -> None:
    known = Known((record(1, 5.0, rows=4), record(2, 9.0, rows=64), record(4, 8.0, rows=64)))
    for rows, width in ((1, 1), (8, 1), (15, 1), (16, 4), (17, 4), (512, 4)):
        tile, _ = known.best("made_up", Facts(7), rows, SPACE) or (None, None)
        assert tile == Tile(width), rows


def test_of_one_candidate_the_later_record_counts() -> None:
    early, late = record(us=3.0), record(us=5.0, date="2026-02-01T00:00:00Z")
    assert merged([late, early]) == merged([early, late]) == [late]
    other = record(us=4.0, rows=3)
    assert merged([late, other]) == sorted([late, other], key=lambda r: r.order)


def write(logs: Path, *records) -> None:
    for each in records:
        file = logs / each.place / f"{each.schedule}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as stream:
            stream.write(each.line() + "\n")


def test_a_device_here_goes_by_its_own_records(tmp_path: Path) -> None:
    h100 = RECORDS["nvidia-h100"]
    text = target_text(h100)
    write(
        tmp_path,
        record(1, place=FOLDER),
        record(2, place=FOLDER, target="cpu x86_64 avx2 fma"),
        record(1, device="GPU A", target=text, place="gpu-a"),
        record(2, device="GPU B", target=text, place="gpu-b"),
    )
    assert [r.tile for r in read_known(tmp_path, HERE, DEVICE)[0].records] == [text_of(Tile(1))]
    assert read_known(tmp_path, HERE, "GPU A")[0].records == read_known(tmp_path, HERE, None)[0].records == ()
    assert [r.device for r in read_known(tmp_path, h100, "GPU B")[0].records] == ["GPU B"]
    assert [r.device for r in read_known(tmp_path, h100, None)[0].records] == ["GPU A", "GPU B"]
    assert read_known(tmp_path, h100, None)[0].digest != read_known(tmp_path, h100, "GPU B")[0].digest


NORM = Call("rms_norm", NormSpec(64, 1e-5), None, 41)


def tuned(call: Call, which: int, **fields) -> tuple[Chooser, object]:
    """A chooser that knows one tile of RMSNorm's space to be fast, and that tile."""
    target = host_target()
    facts = RMSNorm().match(call, target)
    space = RMSNorm().space(facts, target)
    made = replace(record(rows=call.rows), schedule="rms_norm", facts=text_of(facts), place="here:3")
    made = replace(made, **{"space": space_hash(space), "tile": text_of(space[which]), **fields})
    return Chooser(target, Known((made,))), space[which]


def test_a_compile_takes_the_tile_of_a_record() -> None:
    choose, tile = tuned(NORM, 1)
    choice = choose(NORM)
    assert choice is not None and choice.tile == tile and choice.record is not None
    default = Chooser(host_target())(NORM)
    assert default is not None and default.tile != tile and default.record is None


def test_a_stale_record_is_named_once_and_not_used(caplog: pytest.LogCaptureFixture) -> None:
    choose, tile = tuned(NORM, 1, space="0" * 16, rows=977)
    with caplog.at_level(logging.WARNING):
        choice = choose(NORM)
        choose(NORM)
    assert choice is not None and choice.record is None and choice.tile != tile
    [message] = [r.getMessage() for r in caplog.records]
    assert message.startswith("tuning record here:3 is of another space of tiles than today's: not used")


def test_each_number_of_rows_has_a_tile_of_its_own() -> None:
    """Of the parts of a call of open size, only the one that a record is for changes."""
    target = RECORDS["nvidia-h100"]
    spec = LinearSpec(4096, 4096, "bf16_rows", dtype="bfloat16", out_dtype="bfloat16")
    call = Call("linear", spec, None, 256)
    facts = LinearFacts(spec, 64)
    space = Linear().space(facts, target)
    made = record(rows=64, target=target_text(target), schedule="linear", facts=text_of(facts))
    made = replace(made, space=space_hash(space), tile=text_of(space[3]), place="gpu/linear.jsonl:9")
    known = Known((made,))
    parts = {}
    for name, choose in (("default", Chooser(target)), ("tuned", Chooser(target, known))):
        choice = choose(call)
        assert choice is not None
        func = choice.lowering.kernels[0].func
        assert isinstance(func, ByRows)
        parts[name] = {part.rows: (part.tile, part.record) for part in func.parts}
    changed = {rows for rows, part in parts["tuned"].items() if part != parts["default"].get(rows)}
    assert changed == {64}
    assert parts["tuned"][64] == (space[3], "gpu/linear.jsonl:9")
