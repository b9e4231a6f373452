// Anthropic's official JavaScript library.
import Anthropic from "@anthropic-ai/sdk";
import { COMMON, MODELS, all, declare, leave, must, noticed, refused, serve } from "./speak.mjs";

const HELLO = [{ role: "user", content: COMMON.hello }];
const ASK = [{ role: "user", content: COMMON.ask_weather }];
const IMAGE = { type: "image", source: { type: "base64", media_type: "image/png", data: COMMON.pixel } };
const SEE = [{ role: "user", content: [IMAGE, { type: "text", text: "What is this?" }] }];
const TOOL = { name: "get_weather", description: "The weather of a city", input_schema: COMMON.weather.parameters };
const CALL = { type: "tool_use", id: "toolu_1", name: "get_weather", input: { city: "Paris" } };
const GIVEN = { type: "tool_result", tool_use_id: "toolu_1", content: "sunny" };
const RESULT = [...ASK, { role: "assistant", content: [CALL] }, { role: "user", content: [GIVEN] }];
const THINK = { thinking: { type: "enabled", budget_tokens: 1024 }, max_tokens: 2048 };
const { chat: CHAT, thinker: THINKER, vision: VISION } = MODELS;

const at = (url, more = {}) => new Anthropic({ baseURL: url, apiKey: "none", maxRetries: 0, ...more });
const asks = (url, model, messages = HELLO, more = {}) => at(url).messages.create({ model, messages, max_tokens: 200, ...more });

declare("/v1/messages", "whole", (url) =>
  asks(url, CHAT, HELLO, { system: "Be brief.", stop_sequences: ["zzz"], max_tokens: 9 }));
declare("/v1/messages", "streamed", async (url) => {
  const events = await all(await asks(url, CHAT, HELLO, { stream: true }));
  must(events.at(-1).type === "message_stop");
  return events;
});
declare("/v1/messages", "streamed, helper", (url) => at(url).messages.stream({ model: CHAT, messages: HELLO, max_tokens: 200 }).finalMessage());
declare("/v1/messages", "tools", async (url) => {
  const answer = await asks(url, CHAT, ASK, { tools: [TOOL] });
  must(answer.content.some((part) => part.type === "tool_use" && part.name === "get_weather"));
  return answer;
});
declare("/v1/messages", "tools, streamed", async (url) => {
  const events = await all(await asks(url, CHAT, ASK, { tools: [TOOL], stream: true }));
  must(events.some((event) => event.delta?.type === "input_json_delta"));
  return events;
});
declare("/v1/messages", "a tool's result", (url) => asks(url, CHAT, RESULT, { tools: [TOOL] }));
declare("/v1/messages", "thinking", async (url) => {
  const answer = await asks(url, THINKER, HELLO, THINK);
  must(answer.content.some((part) => part.type === "thinking"));
  return answer;
});
declare("/v1/messages", "thinking, streamed", async (url) => {
  const events = await all(await asks(url, THINKER, HELLO, { ...THINK, stream: true }));
  must(events.some((event) => event.delta?.type === "thinking_delta"));
  return events;
});
declare("/v1/messages", "images", (url) => asks(url, VISION, SEE));
declare("/v1/messages", "unknown model", (url) => refused(() => asks(url, "nosuch")));
declare("/v1/messages", "bad input", (url) => refused(() => asks(url, CHAT, [])));
declare("/v1/messages", "client leaves", (url) => leave(() => asks(url, MODELS.slow, HELLO, { stream: true }), 4));
declare("/v1/messages", "client leaves before the first token", (url) =>
  refused(() => at(url, { timeout: 300 }).messages.create({ model: MODELS.late, messages: HELLO, max_tokens: 9 })));
declare("/v1/messages", "connection cut", (url) => noticed(() => asks(url, MODELS.cut, HELLO, { stream: true })));
declare("/v1/messages", "connection cut inside a line", (url) => noticed(() => asks(url, MODELS.torn, HELLO, { stream: true })));
declare("/v1/messages", "connection cut, whole", (url) => refused(() => asks(url, MODELS.cut)));
declare("/v1/messages", "connection cut, helper", (url) =>
  refused(() => at(url).messages.stream({ model: MODELS.cut, messages: HELLO, max_tokens: 200 }).finalMessage()));
declare("/v1/messages", "end without a last line", (url) => noticed(() => asks(url, MODELS.mute, HELLO, { stream: true })));
declare("/v1/messages", "node's own error", (url) => noticed(() => asks(url, MODELS.broken, HELLO, { stream: true })));

await serve();
