"""A worker for the tests of tuner/process.py: it answers, sleeps, prints, fails, or ends, as it is asked."""

import os
import sys
import time

from tilewright.tuner.process import serve


def answer(request: tuple[str, float]) -> object:
    what, amount = request
    if what == "sleep":
        time.sleep(amount)
    if what == "end":
        print("the last words", file=sys.stderr)
        os._exit(int(amount))
    if what == "abort":
        os.abort()
    print("what is printed is no answer")
    return os.getpid()


def main() -> None:
    serve(answer)
