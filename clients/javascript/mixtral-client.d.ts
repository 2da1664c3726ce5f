/** Types of mixtral-client.js, written by hand; field names are the wire's. */

export type Role = "system" | "developer" | "user" | "assistant";
export type Finish = "stop" | "length" | "cancelled" | "error" | "expired";
export type JobState = "waiting" | "leased" | "streaming" | "done" | "failed" | "cancelled" | "expired" | "dead";

export interface ChatMessage {
  role: Role;
  content: string;
}

export type ResponseFormat =
  | { type: "text" }
  | { type: "json_object" }
  | { type: "json_schema"; json_schema: { name?: string; description?: string; schema: object; strict?: boolean } };

/** Natural logarithm of a token's probability: the model's own, before temperature and penalties. */
export interface TokenChance {
  id: number;
  text: string;
  /** Hexadecimal; empty for a token without a text. */
  bytes: string;
  logprob: number;
}

/** The token that was drawn, and the likeliest ones at its place. */
export type TokenLogprobs = TokenChance & { top: TokenChance[] };

/** A chat (messages) or a text to continue (prompt: text or token ids): give exactly one of the two. */
export interface JobRequest {
  /** Name of an endpoint; default "mixtral_chat". */
  model?: string;
  messages?: ChatMessage[];
  prompt?: string | number[];
  max_tokens?: number;
  /** 0 is greedy, at most 2. */
  temperature?: number;
  top_p?: number;
  /** 0 keeps every token. */
  top_k?: number;
  /** Keeps tokens of at least this share of the best one's probability. */
  min_p?: number;
  /** Over prompt and answer; 1 is none. */
  repetition_penalty?: number;
  presence_penalty?: number;
  frequency_penalty?: number;
  /** Token id → what is added to its logit, -100 to 100. */
  logit_bias?: Record<string, number>;
  seed?: number;
  stop?: string | string[];
  stop_token_ids?: number[];
  /** Before so many nothing ends the answer. */
  min_tokens?: number;
  ignore_eos?: boolean;
  response_format?: ResponseFormat;
  logprobs?: boolean;
  /** Up to 20; needs logprobs. */
  top_logprobs?: number;
  /** A chat that is too long loses its oldest turns; otherwise it is refused. */
  truncate?: "oldest_turns";
  /** 0 is served first, 9 last. */
  priority?: number;
  /** Give up if no worker has begun by then. */
  queue_timeout_s?: number;
}

export interface Accepted {
  id: string;
  model: string;
  state: JobState;
  /** 1 = next; null once a worker has it. */
  position: number | null;
  /** Seconds within which it starts as likely as not; null where nothing is measured. */
  eta_s: number | null;
  /** Seconds within which it starts nine times of ten. */
  eta_p90_s: number | null;
}

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  total_tokens: number;
  /** Messages left out of the prompt because of `truncate`. */
  dropped_messages: number;
}

export interface Timings {
  queue_s: number | null;
  first_token_s: number | null;
  total_s: number | null;
}

export interface JobView {
  id: string;
  model: string;
  state: JobState;
  /** Unix seconds. */
  created: number;
  position: number | null;
  /** Seconds within which it starts as likely as not; null where nothing is measured. */
  eta_s: number | null;
  /** Seconds within which it starts nine times of ten. */
  eta_p90_s: number | null;
  attempt: number;
  tokens: number;
  text: string;
  finish: Finish | null;
  error: { message: string; type: string; param: string | null; code: string } | null;
  usage: Usage | null;
  timings: Timings | null;
}

export interface Model {
  id: string;
  object: "model";
  created: number;
  owned_by: string;
}

/** `id` is what `follow` takes as `after`, to go on after this event. */
export type JobEvent = { id: string } & (
  | { event: "queued"; position: number; eta_s: number | null; eta_p90_s: number | null }
  /** offset counts from 1; text may be "" while a character or a stop string is incomplete. */
  | { event: "token"; offset: number; text: string; logprobs?: TokenLogprobs }
  /** The job goes on at another worker, or waits for one; nothing that was sent is lost. */
  | { event: "moved"; attempt: number }
  /** Forget every token after offset `to`: they come anew. */
  | { event: "rewind"; to: number }
  | { event: "done"; finish: Finish; usage: Usage; timings: Timings | null }
);

export interface Patience {
  /** How long a plain request is tried again; default 15,000. */
  giveUpAfterMs: number;
  /** How long a stream tries to get back; default 120,000. */
  resumeForMs: number;
  /** The first wait; each further one is twice as long. Default 500. */
  firstWaitMs: number;
  /** The longest wait, unless the server asks for more. Default 10,000. */
  maxWaitMs: number;
  /** Tries in a row without progress, the first one included; 1 never tries again. Default 50. */
  maxTries: number;
  /** How long one answer may take to begin, or stay silent in its middle; then it is tried again. Default 15,000. */
  answerMs: number;
  /** How long a stream may be silent before it is opened anew. Default 45,000. */
  silenceMs: number;
  /** How long a job may take to its first token, waiting in the queue included; then it is cancelled. Default Infinity. */
  firstTokenMs: number;
  /** How long a job may take to its end; then it is cancelled. Default Infinity. */
  totalMs: number;
}

export interface ClientOptions {
  /** The service's address, or those of its replicas; "" (the default) is the page's own server. */
  baseUrl?: string | string[];
  /** Without a key a page is known by its visitor cookie. */
  apiKey?: string;
  fetch?: typeof globalThis.fetch;
  patience?: Partial<Patience>;
}

export interface CallOptions {
  /** Aborting rejects with the signal's reason. */
  signal?: AbortSignal;
}

export interface SubmitOptions {
  /** Repeats with one key make one job. */
  idempotencyKey?: string;
  /** Aborting rejects with the signal's reason; a request that was under way may have made its job. */
  signal?: AbortSignal;
}

export interface FollowOptions {
  /** Id of the last event that was seen, or its offset. */
  after?: string | number;
  /** Aborting ends the events quietly and cancels the job. */
  signal?: AbortSignal;
  /** Let the job run on when the signal fires. */
  detach?: boolean;
}

export interface StreamOptions {
  /** Aborting ends the events quietly and cancels the job. */
  signal?: AbortSignal;
  /** Told the job's id once, before its first event. */
  onJob?: (id: string) => void;
  /** Let the job run on when the signal fires or a limit passes. */
  detach?: boolean;
  /** Repeats with one key make one job. */
  idempotencyKey?: string;
}

export interface Answer {
  jobId: string;
  text: string;
  finish: "stop" | "length";
  usage: Usage;
  timings: Timings | null;
  /** One for each token, if the job asked for them. */
  logprobs: TokenLogprobs[];
}

export const DEFAULT_MODEL: string;

/** Whatever goes wrong. */
export class MixtralError extends Error {
  constructor(message: string, facts: { code: string } & Partial<Omit<MixtralError, keyof Error | "code">> & { cause?: unknown });
  /**
   * The service's word for it, or one of the client's own: "connection_lost", "answer_timeout", "silence_timeout",
   * "first_token_timeout", "total_timeout", "bad_answer", "http_<status>".
   */
  readonly code: string;
  /** HTTP status, if an answer was the error. */
  readonly status: number | null;
  readonly kind: string | null;
  /** The field of the request that is meant. */
  readonly param: string | null;
  readonly requestId: string | null;
  readonly retryAfterMs: number | null;
  /** Whether the same request may succeed later. */
  readonly isPassing: boolean;
  /** The job that failed, if there was one. */
  readonly jobId: string | null;
  /** What came of an answer that `answer` wanted whole. */
  readonly text: string | null;
}

/** The text of an answer from its events, each rewind taken back; of a stream that began later, what came since. */
export class AnswerText {
  take(event: JobEvent): void;
  readonly text: string;
  readonly logprobs: TokenLogprobs[];
}

export class MixtralClient {
  constructor(options?: ClientOptions);
  /** This client with other patience, for one call or many. */
  withOptions(options: { patience: Partial<Patience> }): MixtralClient;
  /** The whole answer to a chat, or of a job by its id. */
  answer(request: JobRequest | string, options?: StreamOptions): Promise<Answer>;
  /** Put a chat in the queue. */
  submit(request: JobRequest, options?: SubmitOptions): Promise<Accepted>;
  /** Put a chat in the queue and follow it to its end. `break` leaves the job running; the signal cancels it unless `detach`. */
  stream(request: JobRequest, options?: StreamOptions): AsyncGenerator<JobEvent, void, void>;
  /** Follow a job from after an event. `break` leaves the job running; the signal cancels it unless `detach`. */
  follow(id: string, options?: FollowOptions): AsyncGenerator<JobEvent, void, void>;
  /** Stop a job; a finished one stays as it is. Gives it as it stands afterwards. */
  cancel(id: string, options?: CallOptions): Promise<JobView>;
  job(id: string, options?: CallOptions): Promise<JobView>;
  models(options?: CallOptions): Promise<Model[]>;
}
