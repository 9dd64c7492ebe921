"""What a user did wrong, in one sentence: the value, the limit, the remedy.

Every error that a user can cause derives from `UserError`. The command line prints its text and exits with 2, the
server answers 4xx with it; neither shows a traceback. Free of heavy imports, since the serving path uses it too.
"""


class UserError(Exception):
    """Base of all errors whose text is meant for the person who caused them."""


class ModelError(UserError):
    """The model can't be found, read or understood."""


class TargetError(UserError):
    """The target is unknown, or this machine can't compile for it or run it."""


class CompileError(UserError):
    """The program can't be compiled, with the operator that stands in the way."""


class ArtifactError(UserError):
    """The artifact is missing, damaged, too new, or made for another machine."""


class RequestError(UserError):
    """A request's prompt or parameters are out of range."""


class ContextLengthError(RequestError):
    """Prompt and answer are longer than what the model reads at once."""


class DeadlineError(RequestError):
    """A request's deadline can't be met. retry_s: after how many seconds it may be; None where it never can."""

    def __init__(self, message: str, retry_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_s = retry_s


class GrammarError(RequestError):
    """An answer's form is not understood, or not supported."""


class QueueFullError(RequestError):
    """As many requests wait as may; the same one may be sent again later."""
