"""Text and conversations to tokens and back, by the `tokenizers` library and a sandboxed chat template.

Both libraries are loaded on first use of this module's class, not with the package.
"""

import datetime
import json
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from tilewright.compiler.errors import ModelError, RequestError
from tilewright.runtime.detokenizer import ByteLevelStream, Detokenizer, WindowStream
from tilewright.runtime.grammar import Constraint, Grammar, Grammars
from tilewright.runtime.tools import ToolForm, spelt_out, tool_form

Message = Mapping[str, Any]


class Tokenizer:
    """One model's tokenizer.

    tokenizer_json: Hugging Face's file as text. settings, all optional: chat_template, bos_token, eos_token (texts);
    stop_token_ids (end of sequence, end of turn); add_bos (a text that is no chat begins with `bos_token`, even where
    the file's own post-processor does not add it).
    """

    def __init__(self, tokenizer_json: str, settings: Mapping[str, Any] | None = None) -> None:
        import tokenizers

        settings = settings or {}

        try:
            self._settings = json.loads(tokenizer_json)
            self._library = tokenizers.Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises plain Exception
            raise ModelError(f"tokenizer.json can't be read ({error}); fetch or convert the model again") from None
        self._library.no_truncation()
        self._library.no_padding()
        self.chat_template: str | None = settings.get("chat_template")
        self.bos_token: str | None = settings.get("bos_token")
        self.eos_token: str | None = settings.get("eos_token")
        self.stop_token_ids = tuple(settings.get("stop_token_ids") or ())
        bos = self.bos_token if settings.get("add_bos") else None
        self._grammars: Grammars | None = None  # made when first asked for: it takes a quarter of a second
        self._lock = threading.Lock()
        self._bos_id = self._library.token_to_id(bos) if bos else None

    @property
    def vocab_size(self) -> int:
        return self._library.get_vocab_size()

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """Token ids of a text. special_tokens: with what begins and ends a text (a chat template writes its own)."""
        ids = self._library.encode(text, add_special_tokens=special_tokens).ids
        if special_tokens and self._bos_id is not None and ids[:1] != [self._bos_id]:
            ids = [self._bos_id, *ids]
        return ids

    def encode_chat(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Token ids of a conversation that the model is to continue. tools: functions that it may call, as OpenAI's API
        describes them; a template that knows of none gets them, and calls in the messages, as text."""
        if not self.tool_form.native:
            messages, tools = spelt_out(messages, tools), ()
        return self.encode(self.apply_chat_template(messages, tools=list(tools) or None), special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of all tokens, special ones left out."""
        return self._library.decode(list(ids))

    def spelling(self, token: int) -> bytes:
        """The bytes that a token stands for in a text: a special token's are its name, an unknown one has none."""
        return self._detokenizer.spelling(token)

    def constraint(self, grammar: Grammar, vocab_size: int) -> Constraint:
        """What keeps an answer to a grammar. vocab_size: of the model. Raises GrammarError."""
        with self._lock:
            if self._grammars is None:
                self._grammars = Grammars(json.dumps(self._settings), vocab_size, self.stop_token_ids)
        return self._grammars.constraint(grammar)

    def detokenizer(self) -> ByteLevelStream | WindowStream:
        """A new stream: pushed one by one, tokens give the same text as `decode`."""
        return self._detokenizer.stream()

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The conversation as the model was taught to read it. variables: what else the template knows of."""
        if self._template is None:
            raise RequestError("this model has no chat template; give a plain prompt, with --raw or /v1/completions")
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
                raise RequestError(f"message {message!r} is no chat message; give a role and a content")
        names: dict[str, Any] = {
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self.bos_token or "",
            "eos_token": self.eos_token or "",
            "tools": None,
            "documents": None,
        }
        try:
            return self._template.render(**(names | variables))
        except Exception as error:  # a template may run into anything, and says with raise_exception what it refuses
            raise RequestError(
                f"the chat template refuses these messages ({error}); change their roles or order, or use --raw"
            ) from None

    @cached_property
    def tool_form(self) -> ToolForm:
        """How the model writes calls of functions."""
        return tool_form(self.chat_template)

    @property
    def tool_marker(self) -> int | None:
        """The special token that stands before calls; None where their beginning is text."""
        token = self._library.token_to_id(self.tool_form.begin) if self.tool_form.begin else None
        special = {t["id"] for t in self._settings.get("added_tokens", ()) if t.get("special")}
        return token if token in special else None

    @cached_property
    def _detokenizer(self) -> Detokenizer:
        return Detokenizer(self._library, self._settings)

    @cached_property
    def _template(self) -> Any:
        return None if self.chat_template is None else _compile_template(self.chat_template)


def _compile_template(source: str) -> Any:
    """The template in the environment that Hugging Face's chat templates are written for, without access to Python."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation_extension()]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise RequestError(
            f"the model's chat template is broken (line {error.lineno}: {error.message}); use a plain prompt with --raw"
        ) from None


def _generation_extension() -> type:
    """{% generation %} ... {% endgeneration %} marks the assistant's words for training; here it is only its body."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return Generation


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """Plain JSON: jinja2's own filter escapes for HTML, which no model was taught."""
    return json.dumps(value, ensure_ascii=options.get("ensure_ascii", False), indent=indent)


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)
