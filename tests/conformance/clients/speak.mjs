// As speak.py: a program declares cases with `declare(route, what, run)` and ends with `serve()`.
import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";

export const COMMON = JSON.parse(readFileSync(new URL("common.json", import.meta.url), "utf8"));
export const MODELS = COMMON.models;
export const WEATHER = { type: "function", function: COMMON.weather };
const CASES = new Map();

export function declare(route, what, run) {
  const key = `${route} ${what}`;
  if (CASES.has(key)) throw new Error(`${key} stands twice`);
  CASES.set(key, run);
}

export function must(condition, text) {
  if (!condition) throw new Error(text ?? "not as it must be");
}

export async function all(parts) {
  const found = [];
  for await (const part of parts) found.push(part);
  return found;
}

/** Read `count` parts of a stream, then abort it. */
export async function leave(open, count = 2) {
  const stream = await open();
  let seen = 0;
  for await (const _ of stream) {
    if (++seen === count) {
      stream.controller.abort();
      break;
    }
  }
  return seen;
}

/** The error that `call` ends with, as the client's user sees it. */
export async function refused(call) {
  let value;
  try {
    value = await call();
  } catch (error) {
    return { error: error.name, status: error.status ?? error.status_code ?? error.statusCode ?? null, text: error.message };
  }
  throw new Error(`no error, but ${JSON.stringify(value)}`);
}

/** What a client says when its stream breaks: the error, or the part that `bad` names as one; "" when it takes what came for a whole answer. */
export async function noticed(stream, bad = () => undefined) {
  let seen = 0;
  try {
    for await (const part of await stream()) {
      const told = bad(part);
      if (told !== undefined) return { noticed: told, text: JSON.stringify(part).slice(0, 300), seen };
      seen += 1;
    }
  } catch (error) {
    return { noticed: error.name, text: String(error.message).slice(0, 300), seen };
  }
  return { noticed: "", seen };
}

/** Answer questions until there are no more. Whatever a library prints goes to standard error. */
export async function serve() {
  console.log = console.info = console.warn = console.error;
  for await (const line of createInterface({ input: process.stdin })) {
    const { route, what, url } = JSON.parse(line);
    let answer;
    try {
      answer = { value: (await CASES.get(`${route} ${what}`)(url)) ?? null };
    } catch (error) {
      answer = { failure: String(error.stack ?? error) };
    }
    process.stdout.write(JSON.stringify(answer) + "\n");
  }
  process.exit(0);
}
