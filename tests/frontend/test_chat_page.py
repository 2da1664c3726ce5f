"""The chat page in a real browser, on the real server, with a worker that says what each test wants it to say.

Every test also fails if the page breaks its content policy or logs an error: see `open_page`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect

expect.set_options(timeout=10_000)

HOSTILE = (
    '<img src=x onerror="window.hacked = 1"><script>window.hacked = 2</script> [a link](javascript:window.hacked=3)\n'
    '<a href="javascript:window.hacked=4">x</a> &lt;b&gt; **bold** <style>body{display:none}</style>'
    '<iframe srcdoc="<script>parent.hacked=5</script>">'
)


def message_field(page: Page) -> Locator:
    return page.get_by_label("Message", exact=True)


def ask(page: Page, text: str) -> None:
    message_field(page).fill(text)
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    message_field(page).press("Enter")


def answers(page: Page) -> Locator:
    return page.locator("[data-role=assistant]")


def answer_text(page: Page) -> Locator:
    return answers(page).last.locator("[data-part=text]")


def expect_state(page: Page, state: str) -> None:
    expect(answers(page).last).to_have_attribute("data-state", state)


def messages_of(job: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in job["spec"]["messages"]]


def kept_in(page: Page, storage: str) -> dict[str, str]:
    kept: dict[str, str] = page.evaluate(f"() => ({{...{storage}}})")
    return kept


# ------------------------------------------------------------------------------------------------ asking and answering


def test_answer_appears_token_by_token_and_ends_with_its_figures(page: Page, worker: Any) -> None:
    ask(page, "Tell a long story: Once upon a time")
    job = worker.take()
    assert messages_of(job) == [("user", "Tell a long story: Once upon a time")]
    worker.say(job, "There", " was")
    expect(answer_text(page)).to_have_text("There was")
    expect_state(page, "streaming")
    worker.say(job, " a fox.\n\n", "The end.")
    worker.finish(job)
    expect_state(page, "done")
    assert answer_text(page).evaluate("node => node.textContent") == "There was a fox.\n\nThe end."
    expect(answers(page).locator("[data-part=figures]")).to_contain_text(re.compile(r"^4 tokens · [\d.,]+ tokens/s$"))


def test_answer_cut_at_the_token_limit_says_so(page: Page, worker: Any) -> None:
    ask(page, "Go on")
    worker.finish(worker.take(), "and", " so", finish="length")
    expect(answers(page).locator("[data-part=figures]")).to_contain_text("cut at the token limit")


def test_enter_sends_and_shift_enter_breaks_the_line(page: Page, worker: Any) -> None:
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    message_field(page).press_sequentially("one")
    message_field(page).press("Shift+Enter")
    message_field(page).press_sequentially("two")
    message_field(page).press("Enter")
    job = worker.take()
    assert messages_of(job) == [("user", "one\ntwo")]
    expect(message_field(page)).to_have_value("")
    worker.finish(job, "ok")


def test_a_suggested_wish_is_asked_by_one_press(page: Page, worker: Any) -> None:
    page.get_by_role("button", name="Tell a long story: Once upon a time").click()
    job = worker.take()
    assert messages_of(job) == [("user", "Tell a long story: Once upon a time")]
    worker.finish(job, "ok")
    expect(page.get_by_role("heading", name="What would you like to hear?")).to_be_hidden()


def test_next_question_carries_the_history_and_new_chat_forgets_it(page: Page, worker: Any) -> None:
    ask(page, "one")
    worker.finish(worker.take(), "first", " answer")
    expect_state(page, "done")
    ask(page, "two")
    job = worker.take()
    assert messages_of(job) == [("user", "one"), ("assistant", "first answer"), ("user", "two")]
    worker.finish(job, "second")
    expect_state(page, "done")
    page.get_by_role("button", name="New chat").click()
    expect(answers(page)).to_have_count(0)
    expect(message_field(page)).to_be_focused()
    ask(page, "three")
    job = worker.take()
    assert messages_of(job) == [("user", "three")]
    worker.finish(job, "third")


def test_system_prompt_temperature_and_token_limit_reach_the_worker(page: Page, worker: Any) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Answer like a pirate.")
    page.get_by_label("Temperature").fill("0.3")
    page.get_by_label("Longest answer").fill("33")
    page.get_by_role("button", name="Done").click()
    ask(page, "Hello")
    job = worker.take()
    assert messages_of(job) == [("system", "Answer like a pirate."), ("user", "Hello")]
    assert (job["spec"]["sampling"]["temperature"], job["spec"]["max_tokens"]) == (0.3, 33)
    worker.finish(job, "Arr")
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_role("button", name="Back to defaults").click()
    expect(page.get_by_label("System prompt")).to_have_value("")
    page.get_by_role("button", name="Done").click()
    ask(page, "Again")
    job = worker.take()
    assert messages_of(job)[0] == ("user", "Hello")
    assert job["spec"]["max_tokens"] != 33
    worker.finish(job, "ok")


def test_token_limit_out_of_range_is_not_taken_on(page: Page) -> None:
    summary = page.locator("#summary")
    expect(summary).to_contain_text("tokens")
    before = summary.inner_text()
    summary.click()
    page.get_by_label("Longest answer").fill("999999999")
    page.get_by_role("button", name="Done").click()
    expect(page.get_by_label("Longest answer")).to_be_focused()  # the browser points at what is wrong
    page.keyboard.press("Escape")
    assert summary.inner_text() == before


def test_asking_again_sends_the_same_chat_and_replaces_the_answer(page: Page, worker: Any) -> None:
    ask(page, "one")
    worker.finish(worker.take(), "first")
    expect_state(page, "done")
    page.get_by_role("button", name="Ask again").click()
    job = worker.take()
    assert messages_of(job) == [("user", "one")]
    worker.finish(job, "other")
    expect_state(page, "done")
    expect(answer_text(page)).to_have_text("other")
    expect(answers(page)).to_have_count(1)


def test_copy_puts_the_answer_on_the_clipboard(open_page: Callable[..., Page], worker: Any) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    ask(page, "one")
    worker.finish(worker.take(), "  two\n", "three <b>")
    expect_state(page, "done")
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("() => navigator.clipboard.readText()") == "  two\nthree <b>"


# ------------------------------------------------------------------------------------------------ stopping, waiting, moving


@pytest.mark.parametrize("how", ["escape", "button"])
def test_stop_keeps_the_partial_answer_and_cancels_the_job(page: Page, worker: Any, how: str) -> None:
    ask(page, "Go on for ever")
    job = worker.take()
    worker.say(job, "Once", " upon")
    expect(answer_text(page)).to_have_text("Once upon")
    if how == "escape":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Stop").click()
    expect_state(page, "stopped")
    worker.wait_for_drop(job)
    expect(answer_text(page)).to_have_text("Once upon")
    expect(message_field(page)).to_be_focused()


def test_place_in_the_queue_is_shown_while_no_worker_is_there(page: Page, join: Callable[..., Any], house: Any) -> None:
    first, second = page, page.context.new_page()  # two tabs of one visitor, whose chats are served in order
    second.goto(house.url)
    ask(first, "one")
    expect(answers(first)).to_contain_text("next in the queue")
    ask(second, "two")
    expect(answers(second)).to_contain_text("number 2 in the queue")
    worker = join()
    worker.finish(worker.take(), "1")
    worker.finish(worker.take(), "2")
    expect(answer_text(first)).to_have_text("1")
    expect(answer_text(second)).to_have_text("2")


def test_waiting_question_can_be_stopped_and_is_not_told_to_the_model(page: Page, join: Callable[..., Any]) -> None:
    ask(page, "never mind")
    expect_state(page, "queued")
    with page.expect_response(lambda answer: answer.request.method == "DELETE"):
        page.keyboard.press("Escape")
    expect_state(page, "stopped")
    ask(page, "two")
    expect(page.get_by_text("the model is not told of it").first).to_be_visible()
    worker = join()
    job = worker.take()
    assert messages_of(job) == [("user", "two")]
    worker.finish(job, "ok")


def test_chat_that_moves_to_another_worker_goes_on_where_it_was(page: Page, join: Callable[..., Any]) -> None:
    ask(page, "one")
    first = join()
    first.say(first.take(), "Once", " upon")
    expect(answer_text(page)).to_have_text("Once upon")
    first.leave()
    second = join()
    job = second.take()
    assert job["produced_ids"] == [1, 2]
    second.say(job, " a")
    expect(answer_text(page)).to_have_text("Once upon a")
    expect(answers(page)).to_contain_text("Moved to another worker; nothing was lost.")
    second.finish(job, " time")
    expect_state(page, "done")
    expect(answer_text(page)).to_have_text("Once upon a time")


# ------------------------------------------------------------------------------------------------ what goes wrong, in words


def test_worker_failure_is_said_in_words_with_a_remedy(page: Page, worker: Any) -> None:
    ask(page, "far too long")
    worker.fail(worker.take(), "context_length_exceeded", "prompt is 1,100 tokens; this worker takes at most 1,023; shorten the chat")
    expect(answers(page)).to_contain_text("Prompt is 1,100 tokens; this worker takes at most 1,023; shorten the chat.")
    answers(page).get_by_role("button", name="New chat").click()
    expect(answers(page)).to_have_count(0)


def test_server_that_is_gone_is_said_in_words_and_asked_again_when_it_is_back(
    start_house: Callable[..., Any], open_page: Callable[..., Page], join: Callable[..., Any]
) -> None:
    house = start_house("--public_page")
    page = open_page(house)
    expect(page.locator("#summary")).to_contain_text("tokens")
    house.stop()
    ask(page, "anyone there?")
    expect(answers(page)).to_contain_text("The server does not answer; trying again…")
    expect_state(page, "failed")
    expect(answers(page)).to_contain_text("The server cannot be reached. Check that it is running")
    house.start()
    answers(page).get_by_role("button", name="Try again").click()
    worker = join(house)
    worker.finish(worker.take(), "here")
    expect(answer_text(page)).to_have_text("here")


def test_key_is_asked_for_checked_and_kept_in_the_tab_only(
    private_house: Any, open_page: Callable[..., Page], join: Callable[..., Any]
) -> None:
    key = private_house.key("MIXTRAL_CLIENT_KEY")
    page = open_page(private_house)
    dialog = page.get_by_role("dialog", name="This server asks for a key")
    expect(dialog).to_contain_text("kept in this tab only")
    dialog.get_by_label("Client key").fill("mx-wrong")
    dialog.get_by_role("button", name="Use this key").click()
    expect(dialog).to_contain_text("The server does not know this key.")
    dialog.get_by_role("button", name="Not now").click()
    ask(page, "without a key")
    expect(dialog).to_be_visible()
    assert answers(page).count() == 0
    dialog.get_by_label("Client key").fill(key)
    dialog.get_by_label("Client key").press("Enter")
    expect(dialog).to_be_hidden()
    expect(message_field(page)).to_have_value("without a key")
    message_field(page).press("Enter")
    worker = join(private_house)
    worker.finish(worker.take(), "welcome")
    expect(answer_text(page)).to_have_text("welcome")
    assert key in kept_in(page, "sessionStorage").values()
    assert kept_in(page, "localStorage") == {}
    assert page.context.cookies() == []
    page.reload()
    expect(answer_text(page)).to_have_text("welcome")
    expect(dialog).to_be_hidden()


def test_key_that_stops_working_is_asked_for_anew_and_the_question_goes_on(
    private_house: Any, open_page: Callable[..., Page], join: Callable[..., Any]
) -> None:
    page = open_page(private_house)
    page.evaluate("() => sessionStorage.setItem('mixtral.key', 'mx-revoked')")
    page.reload()
    ask(page, "hello")
    expect(answers(page)).to_contain_text("The server does not know this key.")
    answers(page).get_by_role("button", name="Enter a key").click()
    page.get_by_label("Client key").fill(private_house.key("MIXTRAL_CLIENT_KEY"))
    page.get_by_label("Client key").press("Enter")
    worker = join(private_house)
    job = worker.take()
    assert messages_of(job) == [("user", "hello")]
    worker.finish(job, "hi")
    expect(answer_text(page)).to_have_text("hi")


# ------------------------------------------------------------------------------------------------ across a reload


def test_reload_goes_on_with_the_answer_that_was_coming(page: Page, worker: Any) -> None:
    ask(page, "one")
    job = worker.take()
    worker.say(job, "Once", " upon")
    expect(answer_text(page)).to_have_text("Once upon")
    page.reload()
    expect(answer_text(page)).to_have_text("Once upon")
    expect_state(page, "streaming")
    worker.say(job, " a")
    expect(answer_text(page)).to_have_text("Once upon a")
    worker.finish(job, " time")
    expect_state(page, "done")
    expect(answer_text(page)).to_have_text("Once upon a time")


def test_what_came_while_the_page_was_away_is_there_after_it(page: Page, worker: Any, house: Any) -> None:
    ask(page, "one")
    job = worker.take()
    worker.say(job, "Once")
    expect(answer_text(page)).to_have_text("Once")
    page.goto("about:blank")
    worker.say(job, " upon")
    worker.finish(job, " a time")
    page.goto(house.url)
    expect_state(page, "done")
    expect(answer_text(page)).to_have_text("Once upon a time")


def test_reload_keeps_the_place_in_the_queue(page: Page, join: Callable[..., Any]) -> None:
    ask(page, "one")
    expect_state(page, "queued")
    page.reload()
    expect(answers(page)).to_contain_text("next in the queue")
    worker = join()
    job = worker.take()
    worker.finish(job, "ok")
    expect(answer_text(page)).to_have_text("ok")


def test_reload_keeps_settings_and_the_chat_so_far(page: Page, worker: Any) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_role("button", name="Done").click()
    ask(page, "one")
    worker.finish(worker.take(), "1")
    expect_state(page, "done")
    page.reload()
    ask(page, "two")
    job = worker.take()
    assert messages_of(job) == [("system", "Be brief."), ("user", "one"), ("assistant", "1"), ("user", "two")]
    worker.finish(job, "2")


# ------------------------------------------------------------------------------------------------ output is text


def test_answers_and_questions_never_become_html_or_script(page: Page, worker: Any) -> None:
    ask(page, HOSTILE)
    job = worker.take()
    assert messages_of(job) == [("user", HOSTILE)]
    for character in HOSTILE[:40]:
        worker.say(job, character)
    worker.finish(job, HOSTILE[40:])
    expect_state(page, "done")
    for _ in ("as it came", "as it was restored"):
        assert answer_text(page).evaluate("node => node.textContent") == HOSTILE
        assert page.locator("[data-role=user] [data-part=question]").evaluate("node => node.textContent") == HOSTILE
        assert page.locator("#exchanges").locator("img, script, a, b, style, iframe, strong:not([data-part])").count() == 0
        assert page.evaluate("() => window.hacked") is None
        page.reload()
        expect_state(page, "done")


def test_server_errors_never_become_html_or_script(page: Page, worker: Any) -> None:
    ask(page, "one")
    worker.fail(worker.take(), "engine_failed", HOSTILE)
    expect_state(page, "failed")
    assert page.locator("[data-part=failure]").locator("img, script, a, b, style, iframe").count() == 0
    assert page.evaluate("() => window.hacked") is None


def test_content_policy_stops_script_that_is_not_the_servers_own(open_page: Callable[..., Page], house: Any, browser: Any) -> None:
    page = browser.new_context().new_page()
    page.goto(house.url)
    refused = page.evaluate(
        """() => new Promise((resolve) => {
             addEventListener("securitypolicyviolation", (event) => resolve(event.effectiveDirective));
             const script = document.createElement("script");
             try { script.text = "window.hacked = 1"; } catch { resolve("require-trusted-types-for"); }
             document.body.append(script);
           })"""
    )
    assert refused in ("script-src-elem", "script-src", "require-trusted-types-for")
    assert page.evaluate("() => window.hacked") is None
    page.context.close()


# ------------------------------------------------------------------------------------------------ for every reader


def test_page_follows_the_end_only_while_one_reads_there(open_page: Callable[..., Page], worker: Any) -> None:
    page = open_page(viewport={"width": 800, "height": 500})
    ask(page, "many lines")
    job = worker.take()
    worker.say(job, *(f"line {number}\n" for number in range(60)))
    expect(page.get_by_text("line 59")).to_be_visible()
    scroller = page.locator("#scroller")
    from_end = "node => Math.round(node.scrollHeight - node.scrollTop - node.clientHeight)"
    assert scroller.evaluate(from_end) <= 1
    scroller.evaluate("node => node.scrollTo({top: 100, behavior: 'instant'})")
    latest = page.get_by_role("button", name="Latest")
    expect(latest).to_be_visible()
    worker.say(job, "one more\n")
    expect(answer_text(page)).to_contain_text("one more")
    assert scroller.evaluate("node => node.scrollTop") == 100
    latest.click()
    expect(latest).to_be_hidden()
    worker.finish(job, "last\n")
    expect_state(page, "done")
    assert scroller.evaluate(from_end) <= 1


def test_page_fits_a_phone_whatever_the_answer_holds(open_page: Callable[..., Page], worker: Any) -> None:
    page = open_page(viewport={"width": 320, "height": 480}, has_touch=True, is_mobile=True)
    expect(page.locator("#summary")).to_contain_text("tokens")
    assert page.locator("#scroller").evaluate("node => node.scrollTop") == 0  # the welcome is read from its top
    ask(page, "x" * 300)
    worker.finish(worker.take(), "y" * 500, "\n" + "z " * 200)
    expect_state(page, "done")
    for selector in ("html", "#scroller"):
        assert page.locator(selector).evaluate("node => node.scrollWidth - node.clientWidth") == 0
    page.get_by_role("button", name="Settings", exact=True).click()
    assert page.locator("#settings").evaluate("node => node.scrollWidth - node.clientWidth") == 0


def test_every_control_has_a_name_and_the_tab_order_is_that_of_the_eye(page: Page, worker: Any) -> None:
    ask(page, "one")
    worker.finish(worker.take(), "1")
    expect_state(page, "done")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button:not([data-part=remedy]), input, textarea")]
             .filter((node) => !(node.textContent.trim() || node.ariaLabel || node.labels?.length))
             .map((node) => node.outerHTML)"""
    )
    assert nameless == []
    message_field(page).focus()
    seen = []
    for _ in range(5):
        page.keyboard.press("Shift+Tab")
        seen.append(page.evaluate("() => document.activeElement.innerText.trim()"))
    assert [name for name in seen if name in ("Copy", "Ask again", "Settings", "New chat")] == ["Ask again", "Copy", "Settings", "New chat"]


def test_screen_readers_hear_the_wait_and_the_whole_answer_once(page: Page, join: Callable[..., Any]) -> None:
    spoken = page.get_by_role("status")
    ask(page, "one")
    expect(spoken).to_contain_text("Waiting: next in the queue")
    worker = join()
    job = worker.take()
    worker.say(job, "Once")
    expect(spoken).to_have_text("The answer is coming.")
    worker.finish(job, " upon")
    expect(spoken).to_have_text("Answer: Once upon")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_ground(open_page: Callable[..., Page], scheme: str) -> None:
    """WCAG AA: 4.5 to 1 for the text colours on each ground they are used on."""
    page = open_page(color_scheme=scheme)
    colours = json.loads(
        page.evaluate(
            """() => {
                 const style = getComputedStyle(document.documentElement);
                 const names = ["paper", "raised", "tint", "ink", "soft", "ember", "on-ember", "alarm", "alarm-tint"];
                 return JSON.stringify(Object.fromEntries(names.map((name) => [name, style.getPropertyValue("--" + name).trim()])));
               }"""
        )
    )
    pairs = [("ink", "paper"), ("ink", "raised"), ("ink", "tint"), ("soft", "paper"), ("soft", "raised"), ("soft", "tint")]
    pairs += [("ink", "alarm-tint"), ("alarm", "alarm-tint"), ("alarm", "raised"), ("on-ember", "ember"), ("ember", "raised")]
    low = {pair: round(contrast(colours[pair[0]], colours[pair[1]]), 2) for pair in pairs}
    assert {pair: ratio for pair, ratio in low.items() if ratio < 4.5} == {}


def contrast(one: str, other: str) -> float:
    """WCAG 2's ratio of two #rrggbb colours."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_motion_stops_for_those_who_asked_for_calm(open_page: Callable[..., Page], worker: Any) -> None:
    page = open_page(reduced_motion="reduce")
    ask(page, "one")
    job = worker.take()
    worker.say(job, "Once")
    expect(answer_text(page)).to_have_text("Once")
    assert page.evaluate("() => document.getAnimations().length") == 0
    worker.finish(job)
