// @ts-check
/** Prints the events of one chat as JSON lines: node read_chat.mjs URL KEY MESSAGE */
import { MixtralClient } from "../../../clients/javascript/mixtral-client.js";

const [baseUrl, apiKey, content] = process.argv.slice(2);
for await (const event of new MixtralClient({ baseUrl, apiKey }).stream({ messages: [{ role: "user", content }] })) {
  console.log(JSON.stringify(event));
}
