"""The text that leaves is the text of the ids, whole characters only, cut before the first stop string, from whatever point it goes on."""

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from mixtral_worker.detokenizer import Detokenizer
from support import tokenizers

UNTIMED = settings(deadline=None)
DEMO = tokenizers.load("demo")


def ids_of(text: str) -> list[int]:
    return DEMO.encode(text)


# Ids as models produce them, and ids as no text has them: lone bytes, halves of characters, control ids.
TEXTS = st.lists(st.sampled_from(["Once upon", " a time", "é", "😀", "\n", "ab", "aab", "abc", " "]), max_size=6).map("".join)
WILD = st.lists(
    st.integers(0, DEMO.vocab_size - 1) | st.sampled_from(DEMO.bytes_to_ids(b"\xe2\x82\xac\xf0\x9f\x98\x80 a\xff")), max_size=12
)
IDS = st.tuples(TEXTS.map(ids_of), WILD, TEXTS.map(ids_of)).map(lambda parts: [id for part in parts for id in part])
STOPS = st.lists(
    st.sampled_from(["ab", "abc", "aabaab", "upon a", "é", "\n", "b", " ", "\ufffd", "zzz"]) | st.text(min_size=1, max_size=3), max_size=3
)


def expected(ids: list[int], stop: list[str], strip_leading_blank: bool) -> tuple[str, bool]:
    """The whole text at once: all bytes, then cut before the stop string that is complete first."""
    whole = b"".join(map(DEMO.token_bytes, ids))
    text = (whole.removeprefix(b" ") if strip_leading_blank else whole).decode(errors="replace")
    for end in range(1, len(text) + 1):
        complete = [found for found in stop if text[:end].endswith(found)]
        if complete:
            return text[: end - len(max(complete, key=len))], True
    return text, False


@UNTIMED
@given(ids=IDS, stop=STOPS, strip=st.booleans())
def test_pushes_and_flush_make_the_whole_text_before_the_first_stop_string(ids: list[int], stop: list[str], strip: bool) -> None:
    detokenizer = Detokenizer(DEMO, stop, strip_leading_blank=strip)
    text = "".join(detokenizer.push(id) for id in ids) + detokenizer.flush()
    assert (text, detokenizer.stopped) == expected(ids, stop, strip)
    assert detokenizer.sent_bytes == len(text.encode())


@UNTIMED
@given(ids=IDS, stop=STOPS, strip=st.booleans())
@example(ids=ids_of("Once upon a time, said the end of it"), stop=["the end", "n a t"], strip=True)
@example(ids=DEMO.bytes_to_ids("€😀".encode()), stop=["😀"], strip=True)
def test_a_detokenizer_made_anew_at_any_point_goes_on_exactly_as_the_first(ids: list[int], stop: list[str], strip: bool) -> None:
    first = Detokenizer(DEMO, stop, strip_leading_blank=strip)
    sent = [0]
    texts = []
    for id in ids:
        texts.append(first.push(id))
        sent.append(first.sent_bytes)
    texts.append(first.flush())

    for split in range(len(ids) + 1):
        anew = Detokenizer(DEMO, stop, ids[:split], sent[split], strip)
        assert anew.sent_bytes == sent[split]
        assert [anew.push(id) for id in ids[split:]] + [anew.flush()] == texts[split:]
        assert (anew.stopped, anew.sent_bytes) == (first.stopped, first.sent_bytes)


@UNTIMED
@given(ids=IDS, stop=STOPS, least=st.integers(0, 12), split=st.integers(0, 20))
def test_no_stop_string_is_looked_for_in_the_text_of_the_first_min_tokens(ids: list[int], stop: list[str], least: int, split: int) -> None:
    first = Detokenizer(DEMO, stop, min_tokens=least)
    head = "".join(first.push(id) for id in ids[:least])
    assert not first.stopped
    assert head == "".join(map(Detokenizer(DEMO).push, ids[:least]))
    whole = Detokenizer(DEMO)
    texts = [whole.push(id) for id in ids] + [whole.flush()]
    rest = "".join([*texts[:-1][least:], texts[-1]])
    ends = [rest.index(one) + len(one) for one in stop if one in rest]
    assert head + "".join(first.push(id) for id in ids[least:]) + first.flush() == head + (
        min((rest[: end - len(one)] for one in stop if (end := rest.find(one) + len(one)) == min(ends)), key=len) if ends else rest
    )
    assert first.stopped == bool(ends)

    moved = Detokenizer(DEMO, stop, min_tokens=least)
    sent = sum(len(moved.push(id).encode()) for id in ids[:split])
    anew = Detokenizer(DEMO, stop, ids[:split], sent, min_tokens=least)
    assert [anew.push(id) for id in ids[split:]] + [anew.flush()] == [moved.push(id) for id in ids[split:]] + [moved.flush()]


@UNTIMED
@given(ids=IDS, stop=STOPS, sent_chars=st.integers(0, 40))
def test_text_that_never_left_leaves_with_the_next_push(ids: list[int], stop: list[str], sent_chars: int) -> None:
    whole, stopped = expected(ids, stop, True)
    behind = whole[:sent_chars]
    free = Detokenizer(DEMO, stop)
    assume(len("".join(map(free.push, ids))) >= len(behind))
    anew = Detokenizer(DEMO, stop, ids, len(behind.encode()))
    assert anew.push(DEMO.eos_id) + anew.flush() == whole[len(behind) :]
    assert anew.stopped == stopped


@UNTIMED
@given(ids=IDS, stop=STOPS)
def test_no_more_is_held_back_than_a_stop_string_and_a_character_need(ids: list[int], stop: list[str]) -> None:
    detokenizer = Detokenizer(DEMO, stop)
    text = ""
    for count, id in enumerate(ids, 1):
        text += detokenizer.push(id)
        whole = b"".join(map(DEMO.token_bytes, ids[:count])).removeprefix(b" ")
        if not detokenizer.stopped:
            complete = whole.decode(errors="replace").rstrip("\ufffd")
            assert len(text) >= len(complete) - max((len(found) - 1 for found in stop), default=0)


def test_half_a_character_waits_for_its_other_half() -> None:
    detokenizer = Detokenizer(DEMO)
    assert [detokenizer.push(id) for id in DEMO.bytes_to_ids("é€".encode())] == ["", "é", "", "", "€"]
    assert detokenizer.sent_bytes == 5


def test_bytes_that_are_no_character_become_one_replacement_character() -> None:
    detokenizer = Detokenizer(DEMO)
    assert [detokenizer.push(id) for id in DEMO.bytes_to_ids(b"\xe2\x82(\xff")] == ["", "", "\ufffd(", "\ufffd"]
    assert detokenizer.sent_bytes == 7


def test_half_a_character_at_the_end_becomes_a_replacement_character() -> None:
    detokenizer = Detokenizer(DEMO)
    assert "".join(map(detokenizer.push, DEMO.bytes_to_ids("a€".encode()[:-1]))) == "a"
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_stop_string_across_tokens_never_leaves() -> None:
    detokenizer = Detokenizer(DEMO, stop=["upon a t"])
    texts = [detokenizer.push(id) for id in ids_of("Once upon a time")]
    assert "".join(texts) == "Once "
    assert detokenizer.stopped
    assert detokenizer.push(ids_of("more")[0]) == detokenizer.flush() == ""


def test_stop_string_begun_before_a_move_is_met_after_it() -> None:
    ids = ids_of("Once upon a time")
    before = Detokenizer(DEMO, stop=["upon a t"])
    assert "".join(before.push(id) for id in ids[:2]) == "Once "
    after = Detokenizer(DEMO, ["upon a t"], ids[:2], before.sent_bytes)
    assert "".join(after.push(id) for id in ids[2:]) == ""
    assert after.stopped
    assert after.sent_bytes == 5


def test_what_only_looked_like_a_stop_string_leaves_after_all() -> None:
    detokenizer = Detokenizer(DEMO, stop=["upon the"])
    ids = ids_of("Once upon a")  # "Once", " upon", " a"
    assert [detokenizer.push(id) for id in ids] == ["Once", " ", "upon a"]


def test_only_the_first_blank_of_an_answer_is_dropped() -> None:
    ids = [DEMO.bos_id, *ids_of(" a  b")]
    answer, continued = Detokenizer(DEMO), Detokenizer(DEMO, strip_leading_blank=False)
    assert "".join(map(answer.push, ids)) == " a  b"
    assert "".join(map(continued.push, ids)) == "  a  b"


def test_sent_bytes_beyond_the_text_are_refused() -> None:
    with pytest.raises(ValueError, match="sent_bytes is 9, but the ids so far set only 4 bytes of text free"):
        Detokenizer(DEMO, produced_ids=ids_of("Once"), sent_bytes=9)


def test_sent_bytes_inside_a_character_are_refused() -> None:
    with pytest.raises(ValueError, match="sent_bytes is 1, which is inside a character"):
        Detokenizer(DEMO, produced_ids=ids_of("é"), sent_bytes=1)


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="a stop string is empty"):
        Detokenizer(DEMO, stop=["end", ""])
