"""Speech to text of a simulated node, through the official client and raw."""

from typing import Any

import openai
import trio

from agent.simulated import SimulatedOllama
from tests.fleet.rawhttp import ask

MODELS = ("whisper:1b", "llama3.2:3b")


async def test_the_official_client_gets_a_text() -> None:
    def use(client: openai.OpenAI) -> None:
        said = client.audio.transcriptions.create(model=MODELS[0], file=("a.wav", b"RIFF\x00\xff", "audio/wav"))
        again: Any = client.audio.transcriptions.create(model=MODELS[0], file=("b.wav", b"RIFF\x00\xff"), response_format="text")
        other = client.audio.transcriptions.create(model=MODELS[0], file=("a.wav", b"another"))
        assert said.text
        assert again == said.text
        assert other.text != said.text

    async with SimulatedOllama(models=MODELS, load_s=0.0, decode_tokens_s=2000.0).serve() as sim:
        client = openai.OpenAI(base_url=f"{sim.url}/v1", api_key="any", max_retries=0)
        await trio.to_thread.run_sync(use, client)
        client.close()


async def test_what_is_wrong_with_a_form_is_told() -> None:
    def form(**fields: str) -> bytes:
        parts = [f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in fields.items()]
        return "".join([*parts, "--x--\r\n"]).encode()

    multipart = {"Content-Type": "multipart/form-data; boundary=x"}
    cases: list[tuple[bytes, dict[str, str], int, str]] = [
        (
            b"{}",
            {"Content-Type": "application/json"},
            400,
            "failed to parse multipart form: request Content-Type isn't multipart/form-data",
        ),
        (form(file="abc"), multipart, 400, "model is required"),
        (form(model="nosuch"), multipart, 400, "file is required: http: no such file"),
        (form(model="nosuch", file="abc"), multipart, 404, "model 'nosuch' not found"),
        (form(model=MODELS[1], file="abc"), multipart, 400, "registry.ollama.ai/library/llama3.2:3b does not support audio"),
    ]
    async with SimulatedOllama(models=MODELS).serve() as sim:
        for body, headers, status, text in cases:
            answer = await ask(sim.port, "POST", "/v1/audio/transcriptions", body, headers=headers)
            assert (answer.status, answer.json()["error"]["message"]) == (status, text)
