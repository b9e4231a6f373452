// The AI SDK with its provider `ollama-ai-provider-v2`.
import { embed, embedMany, generateText, streamText, tool } from "ai";
import { createOllama } from "ollama-ai-provider-v2";
import { z } from "zod";
import { COMMON, MODELS, all, declare, must, noticed, refused, serve } from "./speak.mjs";

const SEE = [{ role: "user", content: [{ type: "text", text: "What is this?" }, { type: "image", image: COMMON.pixel, mediaType: "image/png" }] }];
const TOOLS = { get_weather: tool({ description: "The weather of a city", inputSchema: z.object({ city: z.string() }) }) };
const CALL = { type: "tool-call", toolCallId: "call_1", toolName: "get_weather", input: { city: "Paris" } };
const GIVEN = { type: "tool-result", toolCallId: "call_1", toolName: "get_weather", output: { type: "text", value: "sunny" } };
const RESULT = [
  { role: "user", content: COMMON.ask_weather },
  { role: "assistant", content: [CALL] },
  { role: "tool", content: [GIVEN] },
];
const THINK = { ollama: { think: true } };
const { chat: CHAT, thinker: THINKER, vision: VISION, embed: EMBED } = MODELS;

const at = (url) => createOllama({ baseURL: `${url}/api` });
const asks = (url, model, more) => ({ model: at(url)(model), maxRetries: 0, prompt: COMMON.hello, ...more });
const whole = async (url, model, more = {}) => {
  const { text, reasoningText, toolCalls, finishReason, usage } = await generateText(asks(url, model, more));
  return { text, reasoningText, calls: toolCalls.map((call) => [call.toolName, call.input]), finishReason, usage };
};
const parts = (url, model, more = {}) => streamText({ ...asks(url, model, more), onError: () => {} }).fullStream;
const kinds = async (stream) => (await all(stream)).map((part) => [part.type, part.text]);
const failed = (part) => (part.type === "error" ? `error part: ${part.error?.name}` : undefined);

declare("/api/chat", "whole", (url) => whole(url, CHAT, { maxOutputTokens: 9, seed: 7, temperature: 0.5, stopSequences: ["zzz"] }));
declare("/api/chat", "streamed", (url) => kinds(parts(url, CHAT)));
declare("/api/chat", "tools", async (url) => {
  const answer = await whole(url, CHAT, { prompt: COMMON.ask_weather, tools: TOOLS });
  must(answer.calls[0][0] === "get_weather");
  return answer;
});
declare("/api/chat", "tools, streamed", async (url) => {
  const found = await kinds(parts(url, CHAT, { prompt: COMMON.ask_weather, tools: TOOLS }));
  must(found.some(([kind]) => kind === "tool-call"));
  return found;
});
declare("/api/chat", "a tool's result", (url) => whole(url, CHAT, { prompt: undefined, messages: RESULT, tools: TOOLS }));
declare("/api/chat", "thinking", async (url) => {
  const answer = await whole(url, THINKER, { providerOptions: THINK });
  must(answer.reasoningText);
  return answer;
});
declare("/api/chat", "thinking, streamed", async (url) => {
  const found = await kinds(parts(url, THINKER, { providerOptions: THINK }));
  must(found.some(([kind]) => kind === "reasoning-delta"));
  return found;
});
declare("/api/chat", "images", (url) => whole(url, VISION, { prompt: undefined, messages: SEE }));
declare("/api/chat", "structured output", async (url) => {
  const responseFormat = { type: "json", schema: COMMON.schema };
  const prompt = [{ role: "user", content: [{ type: "text", text: COMMON.hello }] }];
  return (await at(url)(CHAT).doGenerate({ prompt, responseFormat })).content;
});
declare("/api/chat", "unknown model", (url) => refused(() => whole(url, "nosuch")));
declare("/api/chat", "bad input", (url) => refused(() => whole(url, EMBED)));
declare("/api/chat", "client leaves", async (url) => {
  const leaving = new AbortController();
  let seen = 0;
  for await (const part of parts(url, MODELS.slow, { abortSignal: leaving.signal }))
    if (part.type === "text-delta" && ++seen === 2) leaving.abort();
  return seen;
});
declare("/api/chat", "client leaves before the first token", (url) =>
  refused(() => whole(url, MODELS.late, { abortSignal: AbortSignal.timeout(300) })));
declare("/api/chat", "connection cut", (url) => noticed(() => parts(url, MODELS.cut), failed));
declare("/api/chat", "connection cut inside a line", (url) => noticed(() => parts(url, MODELS.torn), failed));
declare("/api/chat", "connection cut, whole", (url) => refused(() => whole(url, MODELS.cut)));
declare("/api/chat", "end without a last line", (url) => noticed(() => parts(url, MODELS.mute), failed));
declare("/api/chat", "node's own error", (url) => noticed(() => parts(url, MODELS.broken), failed));

declare("/api/embed", "one", async (url) => (await embed({ model: at(url).embedding(EMBED), value: "one" })).embedding);
declare("/api/embed", "several", async (url) => (await embedMany({ model: at(url).embedding(EMBED), values: ["one", "two"] })).embeddings);

await serve();
