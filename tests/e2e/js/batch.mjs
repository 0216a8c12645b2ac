// Has lines answered as a batch job, through OpenAI's own client, and prints what came as one line of JSON.
import OpenAI, { toFile } from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0, timeout: 10_000 });
const ENDED = new Set(["completed", "failed", "expired", "cancelled"]);

async function answered(endpoint, bodies) {
  const lines = bodies.map((body, number) => ({ custom_id: `line-${number}`, method: "POST", url: endpoint, body }));
  const content = Buffer.from(lines.map((line) => JSON.stringify(line)).join("\n"));
  const file = await client.files.create({ file: await toFile(content, "lines.jsonl"), purpose: "batch" });
  let batch = await client.batches.create({
    input_file_id: file.id,
    endpoint,
    completion_window: "24h",
    metadata: { job: "test" },
  });
  while (!ENDED.has(batch.status)) {
    await new Promise((resolve) => setTimeout(resolve, 50));
    batch = await client.batches.retrieve(batch.id);
  }
  return batch;
}

async function linesOf(id) {
  const text = await (await client.files.content(id)).text();
  return text.trimEnd().split("\n").map((line) => JSON.parse(line));
}

const chats = await answered("/v1/chat/completions", [
  { model, messages: [{ role: "user", content: "hi" }] },
  { model: "lost", messages: [{ role: "user", content: "hi" }] },
]);
const embeddings = await answered("/v1/embeddings", [{ model, input: ["one", "two"] }]);
const wrong = await answered("/v1/embeddings", [{ model, input: "one" }, "no object"]);
const listed = [];
for await (const one of client.batches.list({ limit: 2 })) listed.push(one.id);
console.log(
  JSON.stringify({
    batch: chats,
    output: await linesOf(chats.output_file_id),
    errors: await linesOf(chats.error_file_id),
    embeddings: await linesOf(embeddings.output_file_id),
    wrong: wrong.errors.data,
    are_listed: [wrong.id, embeddings.id, chats.id].every((id, place) => listed[place] === id),
  }),
);
