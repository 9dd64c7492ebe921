"""The page at /, in a real Chromium: what a person does with it, by keyboard, on a phone, in the dark.

Without a Chromium (`playwright install chromium`, or the system's package) there is nothing to look with, and this
file is skipped.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.runtime.fake import expected
from tests.server.serving import LIMITS, MODEL, TOKENIZER, Running, answer_to, chat_prompt, wait_until
from tilewright.runtime.types import SamplingParams

pytestmark = pytest.mark.timeout(120)

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        found = own if Path(own).exists() else next(filter(None, map(shutil.which, PROGRAMS)), None)
        if found is None:
            pytest.skip("no Chromium: neither Playwright's own nor one of " + ", ".join(PROGRAMS))
        # Where tests run as root, as in containers, Chromium's sandbox can't be had.
        browser = playwright.chromium.launch(executable_path=found, chromium_sandbox=False)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, server: Running) -> Iterator[Page]:
    """The page, open and ready. At the end, that nothing was asked of another host, and no script failed."""
    page = browser.new_page(viewport={"width": 1000, "height": 800})
    asked, failed = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.goto(server.url)
    expect(page.locator("#model")).to_have_value(MODEL)
    yield page
    page.close()
    server.model.step_s = 0.0
    assert failed == []
    assert all(url.startswith((f"{server.url}/", "data:")) for url in asked)


def set_parameters(page: Page, **values: str) -> None:
    page.locator("summary").press("Enter")
    for name, value in values.items():
        page.locator(f"#{name}").fill(value)


def say(page: Page, text: str) -> None:
    page.locator("#prompt").fill(text)
    page.locator("#prompt").press("Enter")


def seed_of_a_long_answer(messages: list[dict[str, str]]) -> str:
    """Whose answer, at the page's temperature, does not end before 150 tokens."""
    prompt = chat_prompt(messages)

    def long(seed: int) -> bool:
        drawn = expected(prompt, SamplingParams(seed=seed, temperature=0.7, max_tokens=150), limits=LIMITS)
        return not set(drawn) & set(TOKENIZER.stop_token_ids)

    return str(next(filter(long, range(1000))))


def test_an_answer_streams_and_is_counted(page: Page, server: Running) -> None:
    said = page.locator(".message.assistant p")
    server.model.step_s = 0.02
    set_parameters(page, seed="1", max_tokens="40", temperature="0.5", system="be a dog")
    say(page, "the dog?")
    expect(said).not_to_be_empty()
    early = said.text_content() or ""
    expect(page.locator("#stop")).to_be_visible()
    expect(page.locator(".message.assistant small")).to_contain_text(" out")
    messages = [{"role": "system", "content": "be a dog"}, {"role": "user", "content": "the dog?"}]
    params = SamplingParams(seed=1, max_tokens=40, temperature=0.5)
    whole = answer_to(chat_prompt(messages), params)
    assert said.text_content() == whole and len(early) < len(whole) and whole.startswith(early)
    counted = page.locator(".message.assistant small")
    expect(counted).to_contain_text(f"{len(chat_prompt(messages))} tokens in")
    expect(counted).to_contain_text("tokens/s")
    expect(page.locator("#prompt")).to_be_focused()

    say(page, "and now?")
    messages += [{"role": "assistant", "content": whole}, {"role": "user", "content": "and now?"}]
    expect(page.locator(".message.assistant small")).to_have_count(2)
    assert said.nth(1).text_content() == answer_to(chat_prompt(messages), params)


def test_escape_stops_an_answer(page: Page, server: Running) -> None:
    server.model.step_s = 0.02
    set_parameters(page, seed=seed_of_a_long_answer([{"role": "user", "content": "tell me all"}]))
    say(page, "tell me all")
    expect(page.locator(".message.assistant p")).not_to_be_empty()
    page.keyboard.press("Escape")
    expect(page.locator(".message.assistant small")).to_contain_text("stopped")
    wait_until(lambda: not server.service.active)
    expect(page.locator("#send")).to_be_visible()


def test_the_stop_button_stops_what_has_not_begun(page: Page, server: Running) -> None:
    server.model.gate.clear()
    say(page, "wait for it")
    wait_until(lambda: server.service.active)
    page.locator("#stop").click()
    wait_until(lambda: page.locator("#send").is_visible())
    server.model.gate.set()
    wait_until(lambda: not server.service.active)


def test_an_error_is_shown_and_the_question_kept(page: Page, server: Running) -> None:
    long = "dog " * 600
    say(page, long)
    expect(page.get_by_role("alert")).to_contain_text("context")
    expect(page.locator("#prompt")).to_have_value(long)
    expect(page.locator(".message.user")).to_have_count(0)
    set_parameters(page, temperature="9")
    say(page, "the dog?")
    assert page.locator("#temperature").evaluate("e => e.matches(':invalid')")
    expect(page.locator(".message.user")).to_have_count(0)


def test_the_figures_move(page: Page, server: Running) -> None:
    server.model.step_s = 0.02
    expect(page.locator("#running")).to_have_text("0")
    text = "the dog? " * 10
    set_parameters(page, seed=seed_of_a_long_answer([{"role": "user", "content": text}]))
    say(page, text)
    expect(page.locator("#running")).to_have_text("1")
    wait_until(lambda: float((page.locator("#rate").text_content() or "0").replace("–", "0")) > 1)
    assert page.locator("#strip i.used").count() > 0
    assert (page.locator("#pages").text_content() or "").endswith(f"/ {server.engine.load.pages}")
    page.keyboard.press("Escape")
    expect(page.locator("#running")).to_have_text("0")
    expect(page.locator("#strip i.used")).to_have_count(0)
    assert page.locator("#strip i.kept").count() > 0
    say(page, "again")
    expect(page.locator("#hits")).to_contain_text("%")
    assert "kept" in (page.locator("#strip").get_attribute("aria-label") or "")


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_scrolls_no_sideways_and_the_dark_is_dark(browser: Browser, server: Running, width: int) -> None:
    backs = {}
    for scheme in ("light", "dark"):
        page = browser.new_page(viewport={"width": width, "height": 700}, color_scheme=scheme)
        page.goto(server.url)
        expect(page.locator("#model")).to_have_value(MODEL)
        page.locator("summary").click()
        say(page, "w" * 300)
        expect(page.locator(".message.assistant, .message.error").first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        expect(page.locator("#send")).to_be_in_viewport(ratio=1)
        backs[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.close()
    wait_until(lambda: not server.service.active)
    assert backs["light"] != backs["dark"]


def test_all_of_it_works_by_keyboard(page: Page, server: Running) -> None:
    reached = set()
    page.locator("#prompt").focus()
    for _ in range(8):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"model", "new", "log", "SUMMARY", "prompt", "send"} <= reached
    page.locator("#prompt").fill("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(page.locator("#prompt")).to_have_value("one\ntwo")
    page.keyboard.press("Enter")
    expect(page.locator(".message.user p")).to_have_text("one\ntwo")
    page.locator("#new").press("Enter")
    expect(page.locator(".message")).to_have_count(0)


def test_what_a_model_says_is_no_html(page: Page, server: Running) -> None:
    say(page, "<img src=x onerror=alert(1)><b>bold</b>")
    expect(page.locator(".message.user p")).to_have_text("<img src=x onerror=alert(1)><b>bold</b>")
    assert page.locator(".message img, .message b").count() == 0
