// @ts-check
/** Prints the events of one chat as JSON lines: node follow_chat.mjs URL,URL KEY REQUEST */
import { MixtralClient } from "../../clients/javascript/mixtral-client.js";

const [urls, apiKey, request] = process.argv.slice(2);
for await (const event of new MixtralClient({ baseUrl: urls.split(","), apiKey }).stream(JSON.parse(request))) {
  console.log(JSON.stringify(event));
}
