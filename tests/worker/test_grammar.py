"""Answers that are JSON: every finished one parses and keeps to its schema, whatever the model would rather say."""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_worker import grammar
from mixtral_worker.detokenizer import Detokenizer
from mixtral_worker.grammar import Grammar, GrammarRefused, Grammars
from mixtral_worker.plan import Sampling
from mixtral_worker.sampling import NOT_FINITE, sample
from mixtral_worker.steering import Steering, Wishes
from support import tokenizers

NAMES = ["v1", "v3", "demo"]
MAKERS = {name: Grammars(tokenizers.load(name)) for name in NAMES}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}

texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=6)
leaves = st.sampled_from([{"type": kind} for kind in ("string", "integer", "number", "boolean", "null")]) | st.lists(
    texts | st.integers(-99, 99) | st.booleans() | st.none(), min_size=1, max_size=4, unique_by=repr
).map(lambda values: {"enum": values})


def larger(schemas: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    objects = st.dictionaries(texts, schemas, max_size=3).flatmap(
        lambda fields: st.lists(st.sampled_from(sorted(fields)) if fields else st.nothing(), unique=True, max_size=len(fields)).map(
            lambda required: {"type": "object", "properties": fields, "required": required, "additionalProperties": False}
        )
    )
    arrays = st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most}, schemas, st.integers(0, 3))
    return objects | arrays | st.lists(schemas, min_size=1, max_size=3).map(lambda some: {"anyOf": some})


schemas = st.recursive(leaves, larger, max_leaves=6)


def ready(one: Grammar) -> Grammar:
    while not one.is_ready():
        threading.Event().wait(0.001)
    return one


def answer(name: str, schema: Any, seed: int, most: int = 400, produced: list[int] | None = None, begun: str = "") -> list[int]:
    """A job of a model that knows nothing, but likes to close what it has opened; goes on after `produced`."""
    tokenizer, ids = tokenizers.load(name), list(produced or [])
    row = Steering(Wishes(), [1], ids, ready(MAKERS[name].compile(json.dumps(schema), ids, begun)))
    endings = [id for id in range(tokenizer.vocab_size) if tokenizer.token_bytes(id) in (b'"', b"}", b"]", b'"}')]
    while len(ids) < most and ids[-1:] != [tokenizer.eos_id]:
        row.look_ahead()
        logits = torch.randn(1, tokenizer.vocab_size, generator=torch.Generator().manual_seed(seed * 1000 + len(ids)))
        logits[0, endings] += 6
        logits[0, tokenizer.eos_id] += 3
        [id] = sample(logits, [Sampling(1.0, seed=seed)], [len(ids) + 1], [(0, row)]).tolist()
        assert id != NOT_FINITE, row.grammar and row.grammar.error
        ids.append(id)
    return ids


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def text_of(name: str, ids: list[int]) -> str:
    """As a reader gets it."""
    detokenizer = Detokenizer(tokenizers.load(name))
    return "".join(map(detokenizer.push, ids)) + detokenizer.flush()


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=40)
@given(schema=schemas, seed=st.integers(0, 2**20))
def test_every_finished_answer_parses_and_keeps_to_its_schema(name: str, schema: Any, seed: int) -> None:
    ids = answer(name, schema, seed)
    if ids[-1] == tokenizers.load(name).eos_id:
        jsonschema.validate(json.loads(text_of(name, ids)), schema)


@pytest.mark.parametrize("name", NAMES)
def test_answers_do_finish_by_the_end_of_the_sequence(name: str) -> None:
    finished = [ids for seed in range(8) if (ids := answer(name, PERSON, seed))[-1] == tokenizers.load(name).eos_id]
    assert len(finished) >= 6
    assert all(json.loads(text_of(name, ids)).keys() == {"name", "age"} for ids in finished)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=15)
@given(schema=schemas, seed=st.integers(0, 2**20), data=st.data())
def test_an_answer_that_moved_goes_on_as_it_would_have(name: str, schema: Any, seed: int, data: st.DataObject) -> None:
    whole = answer(name, schema, seed, most=60)
    done = whole[:-1] if whole[-1] == tokenizers.load(name).eos_id else whole
    moved_at = data.draw(st.integers(0, len(done)))
    assert answer(name, schema, seed, most=60, produced=whole[:moved_at]) == whole


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("said", ['{"name": "Zoë 猫 \\n😀", "age": 7}', '{\n  "name": "",\n  "age": 30\n}', '{"name":"x","age":0}'])
def test_the_vocabularys_own_way_to_write_an_answer_is_allowed_with_the_blank_it_puts_in_front(name: str, said: str) -> None:
    tokenizer = tokenizers.load(name)
    one = ready(MAKERS[name].compile(json.dumps(PERSON)))
    produced: list[int] = []
    for id in [*tokenizer.encode(said), tokenizer.eos_id]:
        one.look_ahead(produced)
        mask = one.mask()
        assert mask is not None
        assert mask[id], (tokenizer.decode(produced), tokenizer.token_bytes(id))
        produced.append(id)


def test_no_token_of_the_template_may_be_drawn_and_the_end_only_once_the_answer_is_whole() -> None:
    tokenizer = tokenizers.load("v3")
    controls = [id for id in range(tokenizer.vocab_size) if not tokenizer.token_bytes(id)]
    ids = answer("v3", PERSON, 1)
    for length in range(len(ids)):
        one = ready(MAKERS["v3"].compile(json.dumps(PERSON), ids[:length]))
        one.look_ahead(ids[:length])
        mask = one.mask()
        assert mask is not None
        allowed = [id for id in controls if mask[id]]
        assert allowed == ([tokenizer.eos_id] if is_json(text_of("v3", ids[:length])) else [])


def test_white_space_between_tokens_comes_to_an_end() -> None:
    one = ready(MAKERS["demo"].compile(json.dumps(PERSON)))
    newline = tokenizers.load("demo").bytes_to_ids(b"\n")
    produced = tokenizers.load("demo").bytes_to_ids(b"{") + newline * grammar.MAX_SPACE
    one.look_ahead(produced)
    mask = one.mask()
    assert mask is not None
    assert not mask[newline[0]]


def test_a_message_that_is_continued_is_part_of_the_answer() -> None:
    begun = '{"name": "Zoë", "ag'
    ids = answer("demo", PERSON, 3, begun=begun)
    assert json.loads(begun + tokenizers.load("demo").decode(ids))["name"] == "Zoë"


@pytest.mark.parametrize(
    ("schema", "begun", "words"),
    [
        ({"type": "poem"}, "", ["Invalid type: poem", "change the schema"]),
        ({"type": "string", "pattern": "(a"}, "", ["unclosed group"]),
        ({"not": {"type": "string"}}, "", ["not"]),
        ({"$ref": "#/$defs/gone"}, "", ["gone"]),
        ({"type": "object", "patternProperties": {f"^{n}": {} for n in range(33)}}, "", ["32 entries at most", "33"]),
        ({"type": "object", "properties": {str(n): {"enum": list(range(n, n + 200))} for n in range(900)}}, "", []),
        (PERSON, "Here is", ["does not begin"]),
    ],
)
def test_a_schema_that_no_answer_can_be_held_to_is_refused_in_one_sentence(schema: Any, begun: str, words: list[str]) -> None:
    with pytest.raises(GrammarRefused) as refused:
        ready(MAKERS["demo"].compile(json.dumps(schema), begun=begun))
    assert refused.value.code == "response_format_refused"
    message = str(refused.value)
    assert message.startswith("response_format cannot be kept: ")
    assert "start:" not in message
    assert all(word in message for word in words), message


def test_compiling_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "MAX_PATTERN_PROPERTIES", 1000)
    slow = {"type": "object", "patternProperties": {f"^(a|b|c|d)*x{{{n}}}$": {"type": "string"} for n in range(120)}}
    now_s = 0.0
    makers = Grammars(tokenizers.load("demo"), lambda: now_s)
    one = makers.compile(json.dumps(slow))
    assert not one.is_ready()
    now_s = grammar.COMPILE_WITHIN_S + 1
    with pytest.raises(GrammarRefused, match="compiling it took more than 5 s"):
        one.is_ready()


def test_without_the_extra_a_job_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GrammarRefused, match=r"pip install 'mixtral-chat\[structured\]'") as refused:
        Grammars(tokenizers.load("demo")).compile("{}")
    assert refused.value.code == "response_format_unavailable"
