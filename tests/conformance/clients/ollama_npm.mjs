// Ollama's official JavaScript library.
import { Ollama } from "ollama";
import { COMMON, MODELS, WEATHER, all, declare, must, noticed, refused, serve } from "./speak.mjs";

const HELLO = [{ role: "user", content: COMMON.hello }];
const ASK = [{ role: "user", content: COMMON.ask_weather }];
const SEE = [{ role: "user", content: "What is this?", images: [COMMON.pixel] }];
const OPTIONS = { num_predict: 9, seed: 7, temperature: 0.5, num_ctx: 2048, stop: ["zzz"] };
const CALL = { function: { name: "get_weather", arguments: { city: "Paris" } } };
const RESULT = [...ASK, { role: "assistant", content: "", tool_calls: [CALL] }, { role: "tool", content: "sunny", tool_name: "get_weather" }];
const { chat: CHAT, thinker: THINKER, vision: VISION, embed: EMBED } = MODELS;
const at = (url) => new Ollama({ host: url });

async function leave(url, ask) {
  const client = at(url);
  const stream = await ask(client);
  let seen = 0;
  try {
    for await (const _ of stream) if (++seen === 2) client.abort();
  } catch (error) {
    return { seen, error: error.name };
  }
  throw new Error("the abort was not told");
}

declare("/api/tags", "list", async (url) => (await at(url).list()).models.map((model) => model.model).sort());
declare("/api/ps", "list", async (url) => {
  return (await at(url).ps()).models.map((model) => model.model).filter((name) => name === CHAT);
});
declare("/api/version", "version", async (url) => (await at(url).version()).version);
declare("/api/show", "show", (url) => at(url).show({ model: CHAT }));
declare("/api/show", "unknown model", (url) => refused(() => at(url).show({ model: "nosuch" })));

declare("/api/chat", "whole", (url) => at(url).chat({ model: CHAT, messages: HELLO, options: OPTIONS, keep_alive: "7m" }));
declare("/api/chat", "streamed", async (url) => all(await at(url).chat({ model: CHAT, messages: HELLO, stream: true })));
declare("/api/chat", "tools", async (url) => {
  const answer = await at(url).chat({ model: CHAT, messages: ASK, tools: [WEATHER] });
  must(answer.message.tool_calls[0].function.name === "get_weather");
  return answer;
});
declare("/api/chat", "tools, streamed", async (url) => {
  const parts = await all(await at(url).chat({ model: CHAT, messages: ASK, tools: [WEATHER], stream: true }));
  must(parts.some((part) => part.message.tool_calls));
  return parts;
});
declare("/api/chat", "a tool's result", (url) => at(url).chat({ model: CHAT, messages: RESULT, tools: [WEATHER] }));
declare("/api/chat", "thinking", async (url) => {
  const answer = await at(url).chat({ model: THINKER, messages: HELLO, think: true });
  must(answer.message.thinking);
  return answer;
});
declare("/api/chat", "thinking, streamed", async (url) => {
  const parts = await all(await at(url).chat({ model: THINKER, messages: HELLO, think: true, stream: true }));
  must(parts.some((part) => part.message.thinking));
  return parts;
});
declare("/api/chat", "images", (url) => at(url).chat({ model: VISION, messages: SEE }));
declare("/api/chat", "structured output", (url) => at(url).chat({ model: CHAT, messages: HELLO, format: COMMON.schema }));
declare("/api/chat", "unknown model", (url) => refused(() => at(url).chat({ model: "nosuch", messages: HELLO })));
declare("/api/chat", "bad input", (url) => refused(() => at(url).chat({ model: CHAT, messages: HELLO, options: { num_ctx: "many" } })));
declare("/api/chat", "client leaves", (url) =>
  leave(url, (client) => client.chat({ model: MODELS.slow, messages: HELLO, stream: true })));
declare("/api/chat", "client leaves before the first token", async (url) => {
  const client = new Ollama({ host: url, fetch: (input, init) => fetch(input, { ...init, signal: AbortSignal.timeout(300) }) });
  return (await refused(() => client.chat({ model: MODELS.late, messages: HELLO }))).error;
});
declare("/api/chat", "connection cut", (url) => noticed(() => at(url).chat({ model: MODELS.cut, messages: HELLO, stream: true })));
declare("/api/chat", "connection cut inside a line", (url) =>
  noticed(() => at(url).chat({ model: MODELS.torn, messages: HELLO, stream: true })));
declare("/api/chat", "connection cut, whole", (url) => refused(() => at(url).chat({ model: MODELS.cut, messages: HELLO })));
declare("/api/chat", "end without a last line", (url) =>
  noticed(() => at(url).chat({ model: MODELS.mute, messages: HELLO, stream: true })));
declare("/api/chat", "node's own error", (url) => noticed(() => at(url).chat({ model: MODELS.broken, messages: HELLO, stream: true })));

declare("/api/generate", "whole", (url) => at(url).generate({ model: CHAT, prompt: "Once upon a time", options: OPTIONS }));
declare("/api/generate", "streamed", async (url) => all(await at(url).generate({ model: CHAT, prompt: "Once", stream: true, raw: true })));
declare("/api/generate", "thinking", async (url) => {
  const answer = await at(url).generate({ model: THINKER, prompt: "Once", think: true });
  must(answer.thinking);
  return answer;
});
declare("/api/generate", "images", (url) => at(url).generate({ model: VISION, prompt: "See", images: [COMMON.pixel] }));
declare("/api/generate", "structured output", (url) => at(url).generate({ model: CHAT, prompt: "Once", format: "json" }));
declare("/api/generate", "load only", (url) => at(url).generate({ model: CHAT, prompt: "" }));
declare("/api/generate", "unknown model", (url) => refused(() => at(url).generate({ model: "nosuch", prompt: "Once" })));
declare("/api/generate", "client leaves", (url) =>
  leave(url, (client) => client.generate({ model: MODELS.slow, prompt: "Once", stream: true })));
declare("/api/generate", "connection cut", (url) => noticed(() => at(url).generate({ model: MODELS.cut, prompt: "Once", stream: true })));
declare("/api/generate", "end without a last line", (url) =>
  noticed(() => at(url).generate({ model: MODELS.mute, prompt: "Once", stream: true })));

declare("/api/embed", "one", (url) => at(url).embed({ model: EMBED, input: "one", keep_alive: 60 }));
declare("/api/embed", "several", async (url) => {
  const answer = await at(url).embed({ model: EMBED, input: ["one", "two"], truncate: true });
  must(answer.embeddings.length === 2);
  return answer;
});
declare("/api/embed", "unknown model", (url) => refused(() => at(url).embed({ model: "nosuch", input: "one" })));
declare("/api/embeddings", "one", (url) => at(url).embeddings({ model: EMBED, prompt: "one" }));

declare("/api/pull", "streamed", async (url) => {
  const parts = await all(await at(url).pull({ model: COMMON.published, stream: true }));
  must(parts.at(-1).status === "success");
  must(parts.some((part) => part.total && part.completed));
  return [...new Set(parts.map((part) => part.status))].sort();
});
declare("/api/pull", "whole", (url) => at(url).pull({ model: COMMON.published }));
declare("/api/pull", "unknown model", (url) => refused(async () => all(await at(url).pull({ model: "nosuch", stream: true }))));
declare("/api/copy", "copy", (url) => at(url).copy({ source: CHAT, destination: "copied" }));
declare("/api/copy", "unknown model", (url) => refused(() => at(url).copy({ source: "nosuch", destination: "copied" })));
declare("/api/delete", "delete", (url) => at(url).delete({ model: MODELS.doomed }));
declare("/api/delete", "unknown model", (url) => refused(() => at(url).delete({ model: "nosuch" })));
declare("/api/create", "refused", (url) => refused(() => at(url).create({ model: "mine", from: CHAT })));
declare("/api/push", "refused", (url) => refused(() => at(url).push({ model: CHAT })));

await serve();
