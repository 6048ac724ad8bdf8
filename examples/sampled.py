"""Several samples of several prompts in one request: each is the target's own, whatever was drafted."""

import sys

from openai import OpenAI

PROMPTS = ["The best thing about the sea is", "In the year 2100, people will"]
SAMPLES = 3

url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:30000"
client = OpenAI(base_url=f"{url}/v1", api_key="none")
answer = client.completions.create(
    model="smollm2-135m", prompt=PROMPTS, n=SAMPLES, temperature=0.8, top_p=0.95, max_tokens=24
)
for choice in sorted(answer.choices, key=lambda c: c.index):
    print(f"{PROMPTS[choice.index // SAMPLES]} …{choice.text!r}")
