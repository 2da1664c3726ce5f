"""What the benchmark asks: the prompt and seed of each request.

Decides that every request asks the same prompt, with a seed of its own when --seed is given. Leaves the wire to wires.py.
"""

from __future__ import annotations

from dataclasses import dataclass

START_PROMPT = "Tell a long story: Once upon a time"
"""The start prompt of AIME's article on serving Mixtral."""


@dataclass(frozen=True)
class Ask:
    """One chat to have. seed None leaves the draw to the server."""

    prompt: str
    max_tokens: int
    temperature: float | None = None
    seed: int | None = None

    def body(self, endpoint: str) -> dict[str, object]:
        """The fields that OpenAI's wire and the native one share; what is None is left out, so that the endpoint's default holds."""
        fields = {
            "model": endpoint,
            "messages": [{"role": "user", "content": self.prompt}],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
        }
        return {name: value for name, value in fields.items() if value is not None}


def asks(total: int, prompt: str, max_tokens: int, temperature: float | None, seed: int | None) -> list[Ask]:
    """One ask per request. Chat i draws with seed + i: the chats differ, and a second run asks the same."""
    return [Ask(prompt, max_tokens, temperature, None if seed is None else seed + i) for i in range(total)]
