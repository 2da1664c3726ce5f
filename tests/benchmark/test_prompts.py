"""What is asked: repeatable, of the length and with the beginnings that were wanted, and what a file may hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_benchmark.prompts import PromptFileError, Shape, Talk, read_prompts, read_trace, same, synthetic, trace_lengths

LIKE = Talk((), max_tokens=9, temperature=0.5, seed=100)


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def words(talk: Talk) -> list[str]:
    return talk.turns[0].split()


def test_no_two_requests_of_a_run_draw_alike_and_a_second_run_asks_the_same() -> None:
    talks = same(3, "hello", Talk(("go on",), seed=7))
    asks = [talk.ask(turn, ["answer"]) for talk in talks for turn in range(2)]
    assert [ask.seed for ask in asks] == [7, 8, 9, 10, 11, 12]
    assert talks == same(3, "hello", Talk(("go on",), seed=7))


def test_turn_is_asked_with_system_prompt_and_all_that_came_before() -> None:
    ask = Talk(("one", "two"), system="Be kind.").ask(1, ["uno"])
    assert [(message["role"], message["content"]) for message in ask.messages] == [
        ("system", "Be kind."),
        ("user", "one"),
        ("assistant", "uno"),
        ("user", "two"),
    ]


def test_what_is_not_given_is_left_to_the_endpoint() -> None:
    assert Talk(("hello",), max_tokens=3).ask(0, ()).body("m") == {
        "model": "m",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 3,
    }
    assert Talk(("hello",), max_tokens=3, ignore_eos=True).ask(0, ()).body("m")["ignore_eos"] is True


@given(st.integers(1, 30), st.integers(2, 200), st.integers(0, 100), st.integers(1, 5), st.integers(0, 99))
def test_synthetic_prompts_have_their_length_and_share_their_beginnings_in_turn(
    total: int, length: int, prefix: int, prefixes: int, seed: int
) -> None:
    shape = Shape(length, min(prefix, length - 1), prefixes)
    talks = synthetic(total, shape, LIKE, seed)
    assert talks == synthetic(total, shape, LIKE, seed)
    assert {len(words(talk)) for talk in talks} == {length}
    for i, talk in enumerate(talks):
        assert words(talk)[: shape.prefix_words] == words(talks[i % prefixes])[: shape.prefix_words]
    beginnings = {tuple(words(talk)[: shape.prefix_words]) for talk in talks}
    assert len(beginnings) <= prefixes


def test_different_beginnings_differ() -> None:
    talks = synthetic(4, Shape(60, 50, prefixes=2), LIKE, 0)
    assert len({tuple(words(talk)[:50]) for talk in talks}) == 2
    assert len({tuple(words(talk)) for talk in talks}) == 4


def test_lengths_are_spread_evenly_around_the_one_asked_for() -> None:
    lengths = [len(words(talk)) for talk in synthetic(2000, Shape(100, spread=0.5), LIKE, 0)]
    assert (min(lengths), max(lengths)) == (50, 150)
    assert sum(lengths) / len(lengths) == pytest.approx(100, rel=0.02)


def test_prompt_file_is_read_in_order_and_over_again(tmp_path: Path) -> None:
    chat = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "b"},
    ]
    path = write(tmp_path / "p.jsonl", {"prompt": "one", "max_tokens": 3}, "", {"turns": ["two", "three"]}, {"messages": chat})
    talks = read_prompts(path, 4, LIKE)
    assert [(talk.turns, talk.system, talk.max_tokens) for talk in talks] == [
        (("one",), None, 3),
        (("two", "three"), None, 9),
        (("a", "b"), "S", 9),
        (("one",), None, 3),
    ]
    assert {talk.temperature for talk in talks} == {0.5}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 must be a JSON object"),
        ({"text": "x"}, "needs prompt (text), turns (texts) or messages (a chat); it has text"),
        ({"prompt": ""}, "every turn must be a text that is not empty"),
        ({"prompt": 7}, "every turn must be a text that is not empty"),
        ({"turns": []}, "every turn must be a text that is not empty"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "the last of them a user's"),
        ({"messages": ["a"]}, "messages must be objects with role and content"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens must be a whole number from 1; got 0"),
    ],
)
def test_wrong_line_is_refused_with_its_number_and_the_rule(tmp_path: Path, line: object, sentence: str) -> None:
    with pytest.raises(PromptFileError, match=r"line 2") as refused:
        read_prompts(write(tmp_path / "p.jsonl", {"prompt": "fine"}, line), 1, LIKE)
    assert sentence in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe"])
def test_file_without_a_line_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(PromptFileError, match=r"p\.jsonl"):
        read_prompts(tmp_path / "p.jsonl", 1, LIKE)


def test_trace_is_replayed_from_its_first_moment_in_order_at_its_speed(tmp_path: Path) -> None:
    lines = [
        {"at_s": 14, "prompt": "later", "output_tokens": 5},
        {"timestamp": 10_000, "input_length": 40, "output_length": 6},
        {"at_s": 12, "turns": ["a", "b"]},
    ]
    path = write(tmp_path / "trace.jsonl", *lines)
    assert trace_lengths(path) == {40}
    talks = read_trace(path, None, 2.0, LIKE, {40: 33})
    assert [(talk.at_s, talk.max_tokens) for talk in talks] == [(0.0, 6), (1.0, 9), (2.0, 5)]
    assert len(words(talks[0])) == 33
    assert [talk.turns for talk in talks[1:]] == [("a", "b"), ("later",)]
    assert read_trace(path, 2, 2.0, LIKE, {40: 33}) == talks[:2]


@pytest.mark.parametrize("moment", [{}, {"at_s": -1}, {"at_s": "soon"}, {"timestamp": True}])
def test_trace_line_without_a_moment_is_refused(tmp_path: Path, moment: dict[str, object]) -> None:
    with pytest.raises(PromptFileError, match=r"line 1: a trace needs at_s \(seconds\) or timestamp \(milliseconds\)"):
        read_trace(write(tmp_path / "t.jsonl", {"prompt": "a", **moment}), None, 1.0, LIKE, {})
