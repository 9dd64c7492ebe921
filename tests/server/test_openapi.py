"""The OpenAPI document, held against the server by schemathesis: what it allows is taken, what it forbids is refused,
and all answers are as it says."""

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import ignored_auth, positive_data_acceptance

from tests.server.serving import MODEL, Running, running
from tilewright.runtime.server.app import ENDPOINTS
from tilewright.runtime.server.openapi import document
from tilewright.runtime.types import EngineLimits

pytestmark = pytest.mark.timeout(120)

# What no schema can say: that tokens are in the vocabulary, that a prompt fits the context, that fields fit together.
BEYOND_SCHEMAS = (
    "model_limit", "context_length_exceeded", "deadline_too_short", "invalid_combination", "unsupported_grammar"
)  # fmt: skip


@schemathesis.check
def taken_where_allowed(ctx, response, case):
    if case.meta.generation.mode.is_positive and response.status_code == 400:
        assert response.json()["error"]["code"] in BEYOND_SCHEMAS, response.text


@pytest.fixture(scope="module")
def _shared() -> Iterator[Running]:
    """Short answers: what is said matters little here."""
    with running(engine_limits=EngineLimits(max_answer=4)) as it:
        yield it


API = schemathesis.openapi.from_dict(document(ENDPOINTS, [MODEL], keyed=False))
API.config.checks.negative_data_rejection.expected_statuses.append("413")
API.config.generation.update(modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE])


@API.parametrize()
@settings(max_examples=10, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_the_document_is_true(server: Running, case: schemathesis.Case) -> None:
    case.call_and_validate(server.url, excluded_checks=[positive_data_acceptance, ignored_auth], timeout=20)


def test_the_document_has_every_path_and_no_name_of_python(server: Running) -> None:
    served = server.ask("GET", "/openapi.json")[2]
    assert set(served["paths"]) == {e.path.replace(":path}", "}") for e in ENDPOINTS}
    assert served == document(ENDPOINTS, [MODEL], keyed=False)
    schemas = served["components"]["schemas"]
    assert schemas["ChatRequest"]["properties"]["model"]["enum"] == [MODEL]
    assert schemas["ChatRequest"]["additionalProperties"] is False
    assert not any("__" in name for name in schemas)
