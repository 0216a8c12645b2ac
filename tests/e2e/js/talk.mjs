// Asks a gateway for everything once, through OpenAI's own client, and prints what came as one line of JSON.
import OpenAI from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0, timeout: 10_000 });
const messages = [{ role: "user", content: "hi" }];
const parameters = { type: "object", properties: { city: { type: "string" }, days: { type: "integer" } } };
const tools = [{ type: "function", function: { name: "weather", description: "Tell it.", parameters } }];

async function chat() {
  return (await client.chat.completions.create({ model, messages })).choices[0].message.content;
}

async function stream() {
  const parts = await client.chat.completions.create({
    model,
    messages,
    stream: true,
    stream_options: { include_usage: true },
  });
  const texts = [];
  let usage = null;
  for await (const part of parts) {
    const text = part.choices[0]?.delta?.content;
    if (text) texts.push(text);
    usage = part.usage ?? usage;
  }
  return { texts, usage };
}

async function completion() {
  return (await client.completions.create({ model, prompt: "hi" })).choices[0].text;
}

async function embedding() {
  return Array.from((await client.embeddings.create({ model, input: "one" })).data[0].embedding);
}

function called(call) {
  return { name: call.function.name, arguments: JSON.parse(call.function.arguments) };
}

async function tool() {
  const answer = await client.chat.completions.create({ model, messages, tools });
  return called(answer.choices[0].message.tool_calls[0]);
}

async function streamedTool() {
  const runner = client.chat.completions.stream({ model, messages, tools });
  return called((await runner.finalMessage()).tool_calls[0]);
}

async function models() {
  const names = [];
  for await (const one of await client.models.list()) names.push(one.id);
  return names;
}

async function unknown() {
  try {
    await client.chat.completions.create({ model: "no-such-model", messages });
  } catch (error) {
    return { status: error.status, type: error.constructor.name, message: error.message };
  }
  return null;
}

const { texts, usage } = await stream();
const saw = {
  chat: await chat(),
  stream: texts,
  usage,
  completion: await completion(),
  embedding: await embedding(),
  tool: await tool(),
  streamedTool: await streamedTool(),
  models: await models(),
  unknown: await unknown(),
};
console.log(JSON.stringify(saw));
