// @ts-check
/**
 * Follows chats with the JavaScript client: node follow_chats.mjs URL,URL KEY. Each line at stdin, {"number", "request"}, is a chat;
 * each line at stdout one of its events, after {"number", "job"}. Ends when stdin does.
 */
import { createInterface } from "node:readline";
import { MixtralClient, MixtralError } from "../../clients/javascript/mixtral-client.js";

const [urls, apiKey] = process.argv.slice(2);
const patience = { firstWaitMs: 100, maxWaitMs: 1000, giveUpAfterMs: 60_000 };
const client = new MixtralClient({ baseUrl: urls.split(","), apiKey, patience });

for await (const line of createInterface({ input: process.stdin })) follow(JSON.parse(line));

/** @param {{number: number, request: import("../../clients/javascript/mixtral-client.js").JobRequest}} chat */
async function follow({ number, request }) {
  /** @param {object} fields */
  const say = (fields) => console.log(JSON.stringify({ number, ...fields }));
  try {
    for await (const event of client.stream(request, { onJob: (job) => say({ job }) })) say(event);
  } catch (error) {
    if (!(error instanceof MixtralError)) throw error;
    say({ event: "error", error: { message: error.message, type: error.kind ?? "client_error", code: error.code } });
  }
}
