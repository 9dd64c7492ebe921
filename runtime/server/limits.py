"""What the server allows a client, with the reasons. docs/serving.md shows the same as a table."""

from dataclasses import dataclass

MAX_SAMPLES = 128  # n: more come cheaper as further requests
MAX_STOPS = 16
MAX_CHOICES = 1024
MAX_BIASES = 1024  # each is looked up by the sampler in every step
MAX_PROMPTS = 128  # of one completion request: they are queued all or none
MAX_MESSAGES = 1024
MAX_PARTS = 64  # of one message
MAX_TOOLS = 128  # of one request, as OpenAI has it: each becomes a part of a grammar
MAX_CALLS = 128  # of one message
MAX_INPUTS = 2048  # of one request for embeddings, as OpenAI has it


@dataclass(frozen=True)
class ServerLimits:
    """Every time is in seconds, above 0. Limits of prompts, answers and the queue are the engine's (EngineLimits).

    max_body_bytes: a request's body; held in memory until it is whole.
    max_header_bytes: a request's line and headers, which h11 keeps in memory until they are complete.
    max_connections: open sockets; each holds a file descriptor and buffers.
    header_s, body_s: a whole header, a whole body must have come by then, lest a slow sender hold a socket.
    send_s: a reader that takes nothing for so long is cut off, its request cancelled.
    max_unread_bytes: of a stream that are held for a slow reader, beside the socket's buffers; one that is further
    behind is cut off, its request cancelled.
    idle_s: a kept-alive connection without a request.
    request_s: from submission to the last token; what is there by then is the answer.
    drain_s: what runs when the server is told to end may go on for so long.
    stall_s: an engine with work that finishes no step for so long is reported as sick.
    """

    max_body_bytes: int = 4 << 20
    max_header_bytes: int = 32 << 10
    max_unread_bytes: int = 4 << 20
    max_connections: int = 2048
    header_s: float = 10.0
    body_s: float = 30.0
    send_s: float = 30.0
    idle_s: float = 30.0
    request_s: float = 600.0
    drain_s: float = 30.0
    stall_s: float = 60.0
