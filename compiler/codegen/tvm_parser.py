"""TVM's parser of kernels, without the walks that take most of its time.

Each inlined function looks for its parser, and each barrier for the line that made it, among all frames of the stack,
and asks for every frame's source on the way: Python's inspect then goes through all modules that are loaded.
"""

import linecache
import sys
from collections.abc import Iterator
from functools import cache
from types import FrameType
from typing import Any


@cache
def spare_frames() -> None:
    """From now on this process's parser reads of a frame what it needs, and of no frame that it does not need."""
    from tvm.script.parser.core.parser import ScriptMacro
    from tvm.tirx.script.builder import ir as builder

    def find_parser(self: Any) -> Any:
        for frame in _outward(sys._getframe(1)):
            parser = frame.f_globals.get(ScriptMacro.parser_object_name)
            if parser is not None:
                return parser
        raise RuntimeError("an inlined function of a kernel was called outside a kernel")

    def record_resource(value: Any, skip_frames: int = 2) -> None:
        scope = builder._current_meta_construction_scope()
        if scope is None:
            return
        frame = next(frame for frame in _outward(sys._getframe(1)) if frame.f_code.co_filename != builder.__file__)
        name, line = frame.f_code.co_filename, frame.f_lineno
        code = linecache.getline(name, line).strip()
        scope.created.append(builder._MetaResourceRecord(value, filename=name, lineno=line, colno=None, code=code))

    ScriptMacro._find_parser_def = find_parser
    builder._record_meta_resource = record_resource


def _outward(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
