// @ts-check
/** The same with the JavaScript client: see read_on.py. */
import { MixtralClient } from "../../clients/javascript/mixtral-client.js";

const [urls, apiKey, order] = process.argv.slice(2);
const wanted = JSON.parse(order);
const client = new MixtralClient({ baseUrl: urls.split(","), apiKey, patience: { firstWaitMs: 100, maxWaitMs: 1000, giveUpAfterMs: 60_000 } });
/** @param {object} fields */
const say = (fields) => console.log(JSON.stringify(fields));
const events = wanted.request
  ? client.stream(wanted.request, { onJob: (job) => say({ job }) })
  : client.follow(wanted.job, { after: wanted.after });
for await (const event of events) say(event);
