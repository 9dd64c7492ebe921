"""Values between two processes of ours over a pipe: their size in eight bytes, then the value, pickled."""

import pickle
import struct
from typing import IO, Any


def send(stream: IO[bytes], value: Any) -> None:
    content = pickle.dumps(value)
    stream.write(struct.pack("<Q", len(content)) + content)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """Raises EOFError where nothing more comes."""
    size = stream.read(8)
    if len(size) < 8:
        raise EOFError
    content = stream.read(struct.unpack("<Q", size)[0])
    try:
        return pickle.loads(content)
    except pickle.UnpicklingError:
        raise EOFError from None  # cut off
