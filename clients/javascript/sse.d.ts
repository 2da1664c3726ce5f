/** Types of sse.js, written by hand. */

export interface ServerSentEvent {
  /** Its name; "message" where the stream names none. */
  event: string;
  data: string;
  /** The last id the stream has named, with this event or before it. */
  id: string;
}

/** An event outgrew the decoder's limit: the other side is broken or hostile. */
export class EventTooLarge extends Error {
  constructor(limit: number);
}

/** Decoder of one response body. */
export class SseDecoder {
  constructor(options?: { maxEventChars?: number });
  /** The last `retry:` of the stream, at most a day. */
  retryMs: number | null;
  lastId: string;
  /** Take the next bytes of the body; give the events they complete. Throws EventTooLarge. */
  feed(bytes: Uint8Array): ServerSentEvent[];
}
