"""The wire: every JSON body that crosses a socket, as pydantic models, in one place.

Decides names, types, limits and defaults of what clients, server and workers say to each other. Leaves to others how bodies
travel (client.py, routes/, link.py), what a queue does with them, and how an error is chosen. Standard library and pydantic only.

Three parts: what clients send and get on OpenAI's routes; the native job routes with their events; the worker routes.
Bodies from outside ignore unknown fields, so that older and newer programs understand each other.
"""

from __future__ import annotations

import json
import zlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)

PROTOCOL_VERSION = 2
"""Version of the worker wire. A server refuses an older one with a sentence; unknown fields are ignored on both sides.
2: a worker honours every field of JobSpec (1 knew temperature, top_p, top_k and stop, and would have ignored the others in silence)."""

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_MESSAGES = 10_000
MAX_STOP_TOKEN_IDS = 64
MAX_SEED = 2**63 - 1
MAX_COUNT = 2**31 - 1
"""Of tokens, leases, slots: what a worker says of itself is never more."""
MAX_TURN = 2**53
"""The largest whole number that Lua and JavaScript count to."""
MAX_TOKEN_ID = 2**31 - 1
MAX_LOGIT_BIASES = 1024
MAX_TOP_LOGPROBS = 20
MAX_SCHEMA_BYTES = 65_536
MAX_SCHEMA_DEPTH = 64
MAX_N = 8
MAX_CHOICES = 32
"""Answers to one request: n, or a completion's prompts times n. Each is a job of its own."""

Role: TypeAlias = Literal["system", "developer", "user", "assistant"]
Finish: TypeAlias = Literal["stop", "length", "cancelled", "error", "expired"]
"""Why a job ended. OpenAI's routes show the first two; the others become error bodies there."""

JobState: TypeAlias = Literal["waiting", "leased", "streaming", "done", "failed", "cancelled", "expired", "dead"]


class Wire(BaseModel):
    """Base of every body: unknown fields are ignored, NaN and infinity are refused."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


# ---------------------------------------------------------------------------------------------- chats


class TextPart(Wire):
    type: Literal["text"]
    text: str


def _text_of(content: Any) -> Any:
    """OpenAI's content is a string or a list of parts; text parts are joined, anything else is refused by name."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"content parts must be of type 'text' (this model reads and writes text only); got {kind!r:.60}")
        texts.append(part["text"])
    return "".join(texts)


Text: TypeAlias = Annotated[str, BeforeValidator(_text_of, json_schema_input_type=str | list[TextPart] | None)]


class ChatMessage(Wire):
    role: Role
    content: Text


@dataclass(frozen=True)
class Unsupported:
    """A field of OpenAI's that no worker can honour and that would change the answer: refused, but for values that ask for nothing."""

    remedy: str
    harmless: tuple[Any, ...] = ()

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return BeforeValidator(self._checked).__get_pydantic_core_schema__(source, handler)

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [None, *self.harmless], "description": f"not supported: {self.remedy}"}

    def _checked(self, value: Any) -> None:
        if value is not None and not any(type(value) is type(one) and value == one for one in self.harmless):
            raise ValueError(f"is not supported: {self.remedy}")


_NO_TOOLS = "the model calls no tools; describe them in a message and ask for JSON by response_format, or leave this out"
_TEXT_ONLY = "the model reads and writes text only; leave this out"
NoTools: TypeAlias = Annotated[None, Unsupported(_NO_TOOLS, ([],))]
NoToolChoice: TypeAlias = Annotated[None, Unsupported(_NO_TOOLS, ("none", "auto"))]
TextOnly: TypeAlias = Annotated[None, Unsupported(_TEXT_ONLY, (["text"],))]


class RequestMessage(ChatMessage):
    """A message of a request: text, and nothing that stands beside it in OpenAI's."""

    tool_calls: NoTools = None
    function_call: NoToolChoice = None
    audio: TextOnly = None

    @model_validator(mode="before")
    @classmethod
    def _of_a_plain_one(cls, given: Any) -> Any:
        return {"role": given.role, "content": given.content} if type(given) is ChatMessage else given


def _stop_list(stop: Any) -> Any:
    return [] if stop is None else [stop] if isinstance(stop, str) else stop


StopString: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
StopStrings: TypeAlias = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)]
Stop: TypeAlias = Annotated[StopStrings, BeforeValidator(_stop_list, json_schema_input_type=StopString | StopStrings | None)]


TokenId: TypeAlias = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
Biases: TypeAlias = Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_LOGIT_BIASES)]
LogitBias: TypeAlias = Annotated[Biases, BeforeValidator(lambda bias: {} if bias is None else bias, json_schema_input_type=Biases | None)]


def _of_bearable_size(schema: dict[str, Any]) -> dict[str, Any]:
    level: list[Any] = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        children = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [value for values in children for value in values]
    if level:
        raise ValueError(
            f"may be nested {MAX_SCHEMA_DEPTH} levels deep at most; this one goes deeper: put parts under $defs and refer to them"
        )
    size = len(json.dumps(schema, separators=(",", ":")))
    if size > MAX_SCHEMA_BYTES:
        raise ValueError(
            f"may be {MAX_SCHEMA_BYTES:,} bytes of JSON at most; got {size:,}: leave out descriptions, or ask for less at once"
        )
    return schema


class JsonSchema(Wire):
    """A schema as OpenAI's requests carry it. The answer always keeps to it; strict is taken and changes nothing."""

    name: str = Field("answer", max_length=64)
    description: str | None = Field(None, max_length=1000)
    json_schema: Annotated[dict[str, Any], AfterValidator(_of_bearable_size)] = Field(alias="schema")
    strict: bool | None = None

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)


class ResponseFormat(Wire):
    """What an answer must be: any text, a JSON object, or JSON that a schema allows."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_one_is_meant(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must be given with type 'json_schema', and only with it")
        return self

    @property
    def schema_text(self) -> str | None:
        """The schema that the answer must keep to, as JSON; None for plain text."""
        if self.type == "text":
            return None
        return json.dumps(self.json_schema.json_schema if self.json_schema else {"type": "object"})


class SamplingFields(Wire):
    """How the next token is drawn. A field left out, or null, takes the endpoint's default; temperature 0 is greedy."""

    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the best token")
    top_p: float | None = Field(None, gt=0, le=1, description="the best tokens that together have this probability")
    top_k: int | None = Field(None, ge=0, le=1000, description="0 keeps every token")
    min_p: float | None = Field(None, ge=0, le=1, description="keeps tokens of at least this share of the best one's probability")
    repetition_penalty: float | None = Field(None, ge=0.1, le=10, description="1 is none; over prompt and answer")
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="0 is none; over the answer, as are the next")
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: LogitBias = Field(default_factory=dict, description="token id → what is added to its logit")
    seed: int | None = Field(None, ge=-MAX_SEED - 1, le=MAX_SEED, description="the same seed and request give the same answer")
    stop: Stop = Field(default_factory=list, description="texts that end the answer, and never appear in it")
    stop_token_ids: list[TokenId] | None = Field(
        None, max_length=MAX_STOP_TOKEN_IDS, description="end the answer; their text is no part of it"
    )
    min_tokens: int | None = Field(None, ge=0, description="before so many nothing ends the answer")
    ignore_eos: bool | None = Field(None, description="the end-of-sequence token does not end the answer")
    response_format: ResponseFormat | None = Field(None, description="the answer is JSON, or JSON of a schema, and nothing else")


Truncate: TypeAlias = Literal["oldest_turns"]
"""What becomes of a chat that is longer than the model's context: its oldest turns are left out, where it would be refused otherwise."""


class ChatFields(SamplingFields):
    """What only a chat can be asked for."""

    truncate: Truncate | None = Field(None, description="a chat that is too long loses its oldest turns instead of being refused")
    continue_final_message: bool | None = Field(
        None, description="true: the last message is the assistant's and is continued; false: it is not; left out: it is where it is one"
    )
    add_generation_prompt: bool | None = Field(None, description="whether a new answer begins: the opposite of continue_final_message")


class StreamOptions(Wire):
    include_usage: bool | None = Field(None, description="a last chunk with the usage of all answers")


class OpenAIRequest(SamplingFields):
    """What both routes of OpenAI's take."""

    model: str = Field(max_length=100, description="an endpoint's name")
    max_tokens: int | None = Field(None, ge=1, description="of an answer")
    stream: bool | None = Field(None, description="a chunk for every token, as server-sent events")
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_N, description="so many answers, each with a seed of its own that follows from the seed")
    user: str | None = Field(None, max_length=256, description="the caller's own word for who asks; it changes nothing")


class ChatRequest(OpenAIRequest, ChatFields):
    """Body of POST /v1/chat/completions."""

    messages: list[RequestMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, description="the newer name of max_tokens")
    logprobs: bool | None = Field(None, description="the logarithm of each token's probability with it")
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS, description="so many alternatives beside each token's own")
    tools: NoTools = None
    tool_choice: NoToolChoice = None
    functions: NoTools = None
    function_call: NoToolChoice = None
    modalities: TextOnly = None
    audio: TextOnly = None
    web_search_options: NoTools = None


PromptText: TypeAlias = Annotated[str, Field(min_length=1)]
PromptIds: TypeAlias = Annotated[list[TokenId], Field(min_length=1)]


def _kind_of_prompt(prompt: Any) -> str | None:
    """By its first item, so that what is wrong with a prompt is said of the form that was meant."""
    if not isinstance(prompt, list):
        return "one-text" if isinstance(prompt, str) else None
    first = prompt[0] if prompt else None
    return "list-of-texts" if isinstance(first, str) else "list-of-ids" if isinstance(first, list) else "one-ids"


Prompts: TypeAlias = Annotated[
    Annotated[PromptText, Tag("one-text")]
    | Annotated[PromptIds, Tag("one-ids")]
    | Annotated[list[PromptText], Field(max_length=MAX_CHOICES), Tag("list-of-texts")]
    | Annotated[list[PromptIds], Field(max_length=MAX_CHOICES), Tag("list-of-ids")],
    Discriminator(
        _kind_of_prompt,
        custom_error_type="prompt_kind",
        custom_error_message="Input should be a text, a list of token ids, or a list of either",
    ),
]


class CompletionRequest(OpenAIRequest):
    """Body of POST /v1/completions. prompt is text, or token ids of the worker's tokenizer, or a list of either."""

    prompt: Prompts
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS, description="so many alternatives beside each token's own")
    best_of: int | None = Field(None, ge=1, description="n, or left out: no answer is made that is not sent")
    echo: Annotated[None, Unsupported("the answer holds no prompt; put the two together yourself", (False,))] = None
    suffix: Annotated[None, Unsupported("the model writes on from a prompt's end; put the suffix into a chat's message", ("",))] = None


class JobRequest(ChatFields):
    """Body of POST /v1/jobs: a chat (messages) or a text to continue (prompt), queued under an endpoint's name."""

    model: str = Field(max_length=100, description="an endpoint's name")
    messages: list[RequestMessage] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    prompt: PromptText | PromptIds | None = None
    max_tokens: int | None = Field(None, ge=1, description="of an answer")
    logprobs: bool | None = Field(None, description="the logarithm of each token's probability with it")
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS, description="so many alternatives beside each token's own")
    priority: int | None = Field(
        None, ge=0, le=9, description="0 is served first; a key may be limited to higher numbers; left out: the best it may have"
    )
    queue_timeout_s: float | None = Field(None, gt=0, description="give up if no worker has begun by then")

    @model_validator(mode="after")
    def _one_input(self) -> JobRequest:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("give exactly one of 'messages' (a chat) and 'prompt' (a text to continue)")
        return self


class Sampling(Wire):
    """Sampling with every default filled in, as a worker gets it. These defaults are the wire's: they never change."""

    temperature: float = 0.8
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = Field(default_factory=dict)


class JobSpec(Wire):
    """What a job asks of a worker, defaults filled in: stored with the job, sent with every lease of it."""

    messages: list[ChatMessage] | None = None
    prompt: str | list[int] | None = None
    sampling: Sampling = Field(default_factory=Sampling)
    max_tokens: int
    min_tokens: int = 0
    stop: list[str] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list)
    ignore_eos: bool = False
    seed: int
    has_own_seed: bool = Field(False, description="the caller named the seed; else it was drawn")
    top_logprobs: int | None = Field(None, description="None: no logprobs; 0: those of the tokens drawn alone")
    response_format: ResponseFormat | None = None
    truncate: Truncate | None = None


# ---------------------------------------------------------------------------------------------- answers


class Usage(Wire):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    dropped_messages: int = Field(0, description="left out of the prompt, where the request said truncate")


class TokenChance(Wire):
    """A token and the logarithm of its probability: the model's own, before temperature, penalties and cuts."""

    id: int
    text: str = Field(description="U+FFFD for bytes that are no whole character; the name of a token without a text, as '</s>'")
    bytes: str = Field(description="hexadecimal; empty for a token without a text")
    logprob: float


class TokenLogprobs(TokenChance):
    """The token that was drawn, and the likeliest ones at its place, best first."""

    top: list[TokenChance] = Field(default_factory=list)


class ErrorDetail(Wire):
    """OpenAI's error object; code is one of the words listed in docs/api.md."""

    message: str
    type: str
    param: str | None = None
    code: str


class ErrorBody(Wire):
    error: ErrorDetail


class OpenAIChance(Wire):
    token: str
    logprob: float
    bytes: list[int] | None


class OpenAIChances(OpenAIChance):
    top_logprobs: list[OpenAIChance]


class ChatLogprobs(Wire):
    content: list[OpenAIChances]
    refusal: None = None


class CompletionLogprobs(Wire):
    """OpenAI's older form: lists with an entry for each token. text_offset: characters of the answer before the token's text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class ChatChoice(Wire):
    index: int = 0
    message: ChatMessage
    finish_reason: Literal["stop", "length"]
    logprobs: ChatLogprobs | None = None


class ChatCompletion(Wire):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(Wire):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(Wire):
    index: int = 0
    delta: Delta
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: ChatLogprobs | None = None


class ChatCompletionChunk(Wire):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class CompletionChoice(Wire):
    index: int = 0
    text: str
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: CompletionLogprobs | None = None


class Completion(Wire):
    """Answer of POST /v1/completions, whole or as one chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ModelCard(Wire):
    """An endpoint as OpenAI's clients see it, with what the server knows beyond OpenAI's four fields."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "mixtral-chat"
    title: str = ""
    description: str = ""
    default_max_tokens: int | None = Field(None, description="tokens of an answer where a request names no limit")
    max_tokens: int | None = Field(None, description="tokens of the longest answer that a request may ask for")
    workers: int | None = Field(None, description="logged in now; null while the queue is away")
    served: list[str] = Field(default_factory=list, description="the models that they run, by the names that they give")
    context_length: int | None = Field(None, description="tokens of prompt and answer that each of them takes; null without one")
    largest_context_length: int | None = Field(None, description="those that one of them takes")
    max_model_len: int | None = Field(None, description="vLLM's name of context_length")


class ModelList(Wire):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Alive(Wire):
    """Answer of GET /livez."""

    status: Literal["ok"] = "ok"


class Ready(Wire):
    """Answer of GET /readyz."""

    status: Literal["ok"] = "ok"
    workers: int = Field(description="logged in now, at all endpoints")


class TokenLimits(Wire):
    default: int
    max: int


class TemperatureLimits(Wire):
    default: float
    min: float
    max: float


class PageFacts(Wire):
    """Answer of GET /v1/page: what the chat page offers."""

    public: bool = Field(description="it needs no key")
    model: str
    title: str
    description: str
    max_tokens: TokenLimits
    temperature: TemperatureLimits
    top_p: float
    top_k: int


# ---------------------------------------------------------------------------------------------- native jobs


class Timings(Wire):
    """Seconds of a finished job by Redis's clock. queue_s ends with the first lease; first_token_s counts from the request."""

    queue_s: float | None = None
    first_token_s: float | None = None
    total_s: float | None = None


class JobAccepted(Wire):
    """202 of POST /v1/jobs (200 when an Idempotency-Key named a job that exists)."""

    id: str
    model: str
    state: JobState
    position: int | None = Field(None, description="1 = next; null once a worker has it")
    eta_s: float | None = Field(None, description="seconds within which it starts as likely as not; null where nothing is measured")
    eta_p90_s: float | None = Field(None, description="seconds within which it starts nine times of ten")


class JobView(Wire):
    """Answer of GET /v1/jobs/{id}."""

    id: str
    model: str
    state: JobState
    created: float = Field(description="unix seconds, Redis's clock")
    position: int | None = None
    eta_s: float | None = None
    eta_p90_s: float | None = None
    attempt: int = 0
    tokens: int = Field(0, description="tokens in the log so far")
    text: str = Field("", description="their text")
    finish: Finish | None = None
    error: ErrorDetail | None = None
    usage: Usage | None = None
    timings: Timings | None = None


class QueuedEvent(Wire):
    """Its place while it waits: 1 = next. It starts within eta_s as likely as not, within eta_p90_s nine times of ten."""

    event: Literal["queued"] = "queued"
    position: int
    eta_s: float | None = None
    eta_p90_s: float | None = None


class TokenEvent(Wire):
    """One token. offset counts from 1; text may be "" while a character or a stop string is incomplete."""

    event: Literal["token"] = "token"
    offset: int
    text: str
    logprobs: TokenLogprobs | None = Field(None, description="where the job asked for them; else there is no such field")

    @model_serializer(mode="wrap")
    def _without_what_was_not_asked_for(self, fields_of: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = fields_of(self)
        if self.logprobs is None:
            fields.pop("logprobs", None)
        return fields


class MovedEvent(Wire):
    """The job goes on at another worker, or waits for one; nothing that was sent is lost."""

    event: Literal["moved"] = "moved"
    attempt: int


class RewindEvent(Wire):
    """Forget every token after offset `to`: the log lost them, and they come anew."""

    event: Literal["rewind"] = "rewind"
    to: int


class DoneEvent(Wire):
    event: Literal["done"] = "done"
    finish: Finish
    usage: Usage
    timings: Timings | None = None


class ErrorEvent(Wire):
    """Terminal, like done: the job failed, and this says why."""

    event: Literal["error"] = "error"
    error: ErrorDetail


JobEvent: TypeAlias = QueuedEvent | TokenEvent | MovedEvent | RewindEvent | DoneEvent | ErrorEvent
TERMINAL_EVENTS = ("done", "error")


def ids_crc(ids: Iterable[int], crc: int = 0) -> int:
    """CRC-32 of token ids as little-endian uint32, continued from crc: it names a prefix of a log."""
    words = array("I", ids)
    return zlib.crc32(words.tobytes(), crc)


def event_id(offset: int, crc: int) -> str:
    """The SSE id of the event that carries token `offset`; crc covers ids 1..offset."""
    return f"{offset}.{crc:08x}"


def parse_event_id(text: str) -> tuple[int, int | None]:
    """`<offset>.<crc>` or a bare `<offset>` → (offset, crc or None). Raises ValueError with the expected form."""
    offset, dot, crc = text.strip().partition(".")
    try:
        parsed = int(offset), int(crc, 16) if dot else None
    except ValueError:
        raise ValueError(f"Last-Event-ID must be '<offset>.<crc32 in hex>' as the stream sent it; got {text[:40]!r}") from None
    if parsed[0] < 0:
        raise ValueError(f"Last-Event-ID's offset must be 0 or more; got {parsed[0]}")
    return parsed


# ---------------------------------------------------------------------------------------------- workers


class SessionRequest(Wire):
    """Body of POST /v1/worker/sessions: a worker logs in to one endpoint."""

    endpoint: str = Field(max_length=100)
    name: str = Field(max_length=200, description="for people: host and device")
    protocol: int
    version: str = Field(max_length=50)
    model: str = Field(max_length=200)
    device: str = Field(max_length=200)
    max_slots: int = Field(ge=1, le=100_000)
    max_seq_len: int = Field(ge=1, le=MAX_COUNT)
    static_batch: int | None = Field(None, ge=1, description="it takes whole batches of at most so many jobs; null: any number at any time")


class SessionAnswer(Wire):
    session: str
    lease_s: float = Field(description="without a turn for this long the session lapses and its jobs go back to the queue")
    report_interval_ms: int


class Released(Wire):
    """Answer of DELETE /v1/worker/sessions/{session}."""

    released: int = Field(description="jobs that went back to the queue")


CALLER_ERRORS = frozenset(
    {
        "context_length_exceeded",
        "no_messages",
        "no_user_message",
        "response_format_refused",
        "response_format_unavailable",
        "roles_out_of_order",
        "template_in_content",
        "text_not_unicode",
        "token_out_of_vocabulary",
        "unknown_role",
    }
)
"""Code words of a FrameError that say: the request cannot be served as it is. Any other is the worker's own trouble."""


class FrameError(Wire):
    """Why the worker cannot serve this job; the job fails with it."""

    code: str = Field(max_length=64)
    message: str = Field(max_length=4000)


def _token_logprobs(text: str) -> str:
    return TokenLogprobs.model_validate_json(text).model_dump_json()  # on one line, and nothing else in it


LogprobsText: TypeAlias = Annotated[str, Field(max_length=16_384), AfterValidator(_token_logprobs)]
"""A TokenLogprobs as JSON. It is written once, by the worker, and read once, for the client; on its way and in the log it is a text."""


class Frame(Wire):
    """One job's new tokens in a turn. offset is that of ids[0]; texts has one entry per id, logprobs too where the job asked for them."""

    job: str = Field(max_length=200)
    attempt: int = Field(ge=0, le=MAX_COUNT)
    offset: int = Field(ge=1, le=MAX_COUNT)
    ids: list[Annotated[int, Field(ge=0, le=2**31 - 1)]] = Field(default_factory=list, max_length=65_536)
    texts: list[str] = Field(default_factory=list, max_length=65_536)
    logprobs: list[LogprobsText] | None = Field(None, max_length=65_536)
    finish: Literal["stop", "length"] | None = None
    prompt_tokens: int | None = Field(None, ge=0, le=MAX_COUNT, description="given with the job's first frame and with its last")
    dropped_messages: int | None = Field(None, ge=0, description="with prompt_tokens, where truncate left messages out")
    error: FrameError | None = None
    release: bool = Field(False, description="hand the job back unfinished: another worker goes on with it")

    @model_validator(mode="after")
    def _one_text_per_id(self) -> Frame:
        if len(self.texts) != len(self.ids):
            raise ValueError(f"a frame has one text per id; got {len(self.ids)} ids and {len(self.texts)} texts")
        if self.logprobs is not None and len(self.logprobs) != len(self.ids):
            raise ValueError(f"a frame has logprobs of every id or of none; got {len(self.ids)} ids and {len(self.logprobs)} logprobs")
        if (self.finish is not None) + (self.error is not None) + self.release > 1:
            raise ValueError("a frame ends its job in one way: give at most one of finish, error and release")
        return self


class TurnRequest(Wire):
    """Body of POST /v1/worker/turn. turn counts 1, 2, …; a repeat of the last number gets the same answer."""

    session: str = Field(max_length=200)
    turn: int = Field(ge=1, le=MAX_TURN)
    holding: list[tuple[Annotated[str, Field(max_length=200)], Annotated[int, Field(ge=0, le=MAX_COUNT)]]] = Field(
        default_factory=list,
        max_length=100_000,
        description="every (job, attempt) the worker has, finished but unacknowledged ones included",
    )
    frames: list[Frame] = Field(default_factory=list, max_length=100_000)
    room: int = Field(0, ge=0, le=MAX_COUNT, description="how many more jobs the worker takes now")
    telemetry: dict[str, Any] = Field(default_factory=dict)


class WorkerJob(Wire):
    """A leased job. The worker prefills its prompt plus produced_ids and goes on at offset len(produced_ids) + 1."""

    id: str
    attempt: int
    spec: JobSpec
    produced_ids: list[int] = Field(default_factory=list)
    sent_bytes: int = Field(0, description="UTF-8 bytes of text in the log; the first new text starts there")
    suspect: bool = Field(False, description="workers have died holding this job; at most one such job runs in a batch")
    priority: int = Field(0, description="lower is served first and keeps its slot; waiting has lowered it already")


class Expect(Wire):
    """The log wants this offset next; frames beyond it were refused."""

    job: str
    offset: int


class Drop(Wire):
    """Stop this job and forget it: cancelled, finished, expired, or no longer this session's."""

    job: str
    attempt: int


class TurnAnswer(Wire):
    turn: int
    jobs: list[WorkerJob] = Field(default_factory=list)
    drops: list[Drop] = Field(default_factory=list)
    expect: list[Expect] = Field(default_factory=list)
    drain: bool = Field(False, description="take no new work, finish what runs, log out")
