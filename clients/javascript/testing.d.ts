/** Types of testing.js, written by hand. */

export type Call = "submit" | "events" | "job" | "cancel" | "models";
export type How = "close" | "abort" | "end" | "silence";

/** Each is played once, whoever reads; a reader that comes back goes on after its Last-Event-ID. */
export type Step =
  /** One token. */
  | string
  /** Wait for `release` or a cancel. */
  | { hold: true }
  /** Break this connection. */
  | { cut: How }
  /** Another worker goes on; the number is its attempt. */
  | { moved: number }
  /** The log lost all after this token. */
  | { rewind: number }
  /** The job fails. */
  | { error: { code: string; message: string; type?: string; param?: string | null } }
  /** It ends, not by "stop" as after the last step. */
  | { done: { finish?: string; usage?: object; timings?: object | null } }
  /** Sent as they are. */
  | { comment: string }
  | { event: string; [field: string]: unknown };

/** Steps; a bare string is an answer of one token for each word. */
export type Script = string | Step[];

export interface Request {
  call: Call;
  path: string;
  /** Of Authorization, Idempotency-Key and Last-Event-ID those that it had. */
  headers: Record<string, string>;
  body: any;
}

export interface Failure {
  status: number;
  code: string | null;
  message: string;
  /** Seconds or an HTTP date; null sends no such header. */
  retryAfter: string | null;
}

/** Jobs answered by scripts: the k-th new job by the k-th script, further ones by the last. */
export class FakeServer {
  constructor(...scripts: Script[]);
  readonly url: string;
  readonly apiKey: string;
  /** Stands in for globalThis.fetch. */
  readonly fetch: typeof globalThis.fetch;
  /** What was asked. */
  readonly requests: Request[];
  /** States of the jobs, in order of their making. */
  readonly states: string[];
  /** The scripts of the next jobs, in place of those that are left. */
  answer(...scripts: Script[]): void;
  /** Refuse the next requests of a kind; `code: null` is a proxy's HTML. */
  fail(on: Call, failure?: Partial<Failure> & { times?: number }): void;
  /** Carry out the next requests of a kind, and break the connection instead of answering. */
  loseAnswer(on: Call, options?: { times?: number }): void;
  /** End all holds, those to come included. */
  release(): void;
  asked(call: Call): Request[];
}
