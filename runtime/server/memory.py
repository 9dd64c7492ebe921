"""The garbage collector's part in a server's pauses."""

import gc

_NEW = 10_000  # objects; a step of a hundred streams makes a few hundred, and most are gone with the next


def settle() -> None:
    """Call it when all is loaded, once in a process: what is alive now is never looked at again.

    A full collection walks every object, with Python's lock held: with a server's libraries that takes longer than a
    step, and it comes between two tokens of every stream. Requests leave nothing for it to find (`Request.part`), so it
    may come late.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_NEW, 10, 10)
