// OpenAI's official JavaScript library.
import OpenAI, { toFile } from "openai";
import { COMMON, MODELS, WEATHER, all, declare, leave, must, noticed, refused, serve } from "./speak.mjs";

const HELLO = [{ role: "user", content: COMMON.hello }];
const ASK = [{ role: "user", content: COMMON.ask_weather }];
const IMAGE = { type: "image_url", image_url: { url: `data:image/png;base64,${COMMON.pixel}` } };
const SEE = [{ role: "user", content: [{ type: "text", text: "What is this?" }, IMAGE] }];
const SCHEMA = { type: "json_schema", json_schema: { name: "a", schema: COMMON.schema } };
const CALL = { id: "call_1", type: "function", function: { name: "get_weather", arguments: '{"city": "Paris"}' } };
const RESULT = [...ASK, { role: "assistant", content: "", tool_calls: [CALL] }, { role: "tool", content: "sunny", tool_call_id: "call_1" }];
const TOOL = { type: "function", ...COMMON.weather };
const { chat: CHAT, thinker: THINKER, vision: VISION, embed: EMBED } = MODELS;

const at = (url, more = {}) => new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0, ...more });
const chats = (url, model, messages, more = {}) => at(url).chat.completions.create({ model, messages, ...more });
const completes = (url, model, more = {}) => at(url).completions.create({ model, prompt: "Once", ...more });
const responds = (url, model, input, more = {}) => at(url).responses.create({ model, input, ...more });
const failed = (event) => (["response.failed", "error"].includes(event.type) ? event.type : undefined);

declare("/v1/models", "list", async (url) => (await all(await at(url).models.list())).map((model) => model.id).sort());
declare("/v1/models/{id}", "show", (url) => at(url).models.retrieve(CHAT));
declare("/v1/models/{id}", "unknown model", (url) => refused(() => at(url).models.retrieve("nosuch")));

declare("/v1/chat/completions", "whole", (url) => chats(url, CHAT, HELLO, { max_tokens: 5, seed: 3, temperature: 0.1, stop: ["zzz"] }));
declare("/v1/chat/completions", "streamed", async (url) =>
  all(await chats(url, CHAT, HELLO, { stream: true, stream_options: { include_usage: true } })));
declare("/v1/chat/completions", "tools", async (url) => {
  const answer = await chats(url, CHAT, ASK, { tools: [WEATHER] });
  must(answer.choices[0].message.tool_calls[0].function.name === "get_weather");
  return answer;
});
declare("/v1/chat/completions", "tools, streamed", async (url) => {
  const parts = await all(await chats(url, CHAT, ASK, { tools: [WEATHER], stream: true }));
  must(parts.some((part) => part.choices[0]?.delta.tool_calls));
  return parts;
});
declare("/v1/chat/completions", "a tool's result", (url) => chats(url, CHAT, RESULT, { tools: [WEATHER] }));
declare("/v1/chat/completions", "thinking", async (url) => {
  const answer = await chats(url, THINKER, HELLO, { reasoning_effort: "high" });
  must(answer.choices[0].message.reasoning);
  return answer;
});
declare("/v1/chat/completions", "thinking, streamed", async (url) => {
  const parts = await all(await chats(url, THINKER, HELLO, { reasoning_effort: "high", stream: true }));
  must(parts.some((part) => part.choices[0]?.delta.reasoning));
  return parts;
});
declare("/v1/chat/completions", "images", (url) => chats(url, VISION, SEE));
declare("/v1/chat/completions", "structured output", (url) => chats(url, CHAT, HELLO, { response_format: SCHEMA }));
declare("/v1/chat/completions", "unknown model", (url) => refused(() => chats(url, "nosuch", HELLO)));
declare("/v1/chat/completions", "bad input", (url) => refused(() => chats(url, CHAT, [])));
declare("/v1/chat/completions", "client leaves", (url) => leave(() => chats(url, MODELS.slow, HELLO, { stream: true })));
declare("/v1/chat/completions", "client leaves before the first token", (url) =>
  refused(() => at(url, { timeout: 300 }).chat.completions.create({ model: MODELS.late, messages: HELLO })));
declare("/v1/chat/completions", "connection cut", (url) => noticed(() => chats(url, MODELS.cut, HELLO, { stream: true })));
declare("/v1/chat/completions", "connection cut inside a line", (url) => noticed(() => chats(url, MODELS.torn, HELLO, { stream: true })));
declare("/v1/chat/completions", "connection cut, whole", (url) => refused(() => chats(url, MODELS.cut, HELLO)));
declare("/v1/chat/completions", "end without a last line", (url) => noticed(() => chats(url, MODELS.mute, HELLO, { stream: true })));
declare("/v1/chat/completions", "node's own error", (url) => noticed(() => chats(url, MODELS.broken, HELLO, { stream: true })));
declare("/v1/chat/completions", "connection cut, helper", (url) =>
  refused(() => at(url).chat.completions.stream({ model: MODELS.cut, messages: HELLO }).finalChatCompletion()));

declare("/v1/completions", "whole", (url) => completes(url, CHAT, { max_tokens: 6 }));
declare("/v1/completions", "streamed", async (url) => all(await completes(url, CHAT, { stream: true })));
declare("/v1/completions", "unknown model", (url) => refused(() => completes(url, "nosuch")));
declare("/v1/completions", "client leaves", (url) => leave(() => completes(url, MODELS.slow, { stream: true })));
declare("/v1/completions", "connection cut", (url) => noticed(() => completes(url, MODELS.cut, { stream: true })));
declare("/v1/completions", "end without a last line", (url) => noticed(() => completes(url, MODELS.mute, { stream: true })));

declare("/v1/embeddings", "one", (url) => at(url).embeddings.create({ model: EMBED, input: "one", encoding_format: "float" }));
declare("/v1/embeddings", "several", async (url) => {
  const answer = await at(url).embeddings.create({ model: EMBED, input: ["one", "two"] });
  must(answer.data.length === 2);
  return answer;
});
declare("/v1/embeddings", "unknown model", (url) => refused(() => at(url).embeddings.create({ model: "nosuch", input: "one" })));

declare("/v1/audio/transcriptions", "whole", async (url) => {
  const file = await toFile(Buffer.from("RIFF"), "a.wav");
  return (await at(url).audio.transcriptions.create({ model: MODELS.audio, file })).text;
});
declare("/v1/responses", "whole", async (url) => {
  const answer = await responds(url, CHAT, COMMON.hello);
  return [answer.status, answer.output_text, answer.usage];
});
declare("/v1/responses", "streamed", async (url) => {
  const events = await all(await responds(url, CHAT, COMMON.hello, { stream: true }));
  must(events.at(-1).type === "response.completed");
  return events;
});
declare("/v1/responses", "tools", async (url) => {
  const answer = await responds(url, CHAT, COMMON.ask_weather, { tools: [TOOL] });
  const calls = answer.output.filter((item) => item.type === "function_call");
  must(calls[0].name === "get_weather");
  return calls.map((call) => [call.name, call.arguments]);
});
declare("/v1/responses", "thinking, streamed", async (url) => {
  const events = await all(await responds(url, THINKER, COMMON.hello, { reasoning: { effort: "high" }, stream: true }));
  const kinds = events.map((event) => event.type);
  must(kinds.includes("response.reasoning_summary_text.delta"));
  return kinds;
});
declare("/v1/responses", "structured output", async (url) => {
  const format = { type: "json_schema", name: "a", schema: COMMON.schema };
  return (await responds(url, CHAT, COMMON.hello, { text: { format } })).output_text;
});
declare("/v1/responses", "unknown model", (url) => refused(() => responds(url, "nosuch", "Hello")));
declare("/v1/responses", "client leaves", (url) => leave(() => responds(url, MODELS.slow, "Hello", { stream: true }), 6));
declare("/v1/responses", "connection cut", (url) => noticed(() => responds(url, MODELS.cut, "Hello", { stream: true }), failed));
declare("/v1/responses", "end without a last line", (url) => noticed(() => responds(url, MODELS.mute, "Hello", { stream: true }), failed));
declare("/v1/responses", "connection cut, helper", (url) =>
  refused(() => at(url).responses.stream({ model: MODELS.cut, input: "Hello" }).finalResponse()));

await serve();
