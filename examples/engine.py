"""No server: SGLang's offline engine with DFLASH."""

import sglang

PROMPTS = ["The capital of France is", "Water boils at", "def fibonacci(n):"]

if __name__ == "__main__":  # the engine starts processes, which import this file
    with sglang.Engine(model_path="smollm2-135m", speculative_algorithm="DFLASH") as engine:
        for prompt, answer in zip(
            PROMPTS, engine.generate(PROMPTS, {"temperature": 0, "max_new_tokens": 32}), strict=True
        ):
            meta = answer["meta_info"]
            print(f"{prompt}{answer['text']}")
            print(f"  {meta['completion_tokens']} tokens in {meta['spec_verify_ct']} verify steps")
