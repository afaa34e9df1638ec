"""Continue several prompts at once, and print how likely each chosen token was.

    python examples/generate.py [MODEL_FOLDER]

Without a folder it uses the small model that comes with camelid.
"""

from __future__ import annotations

import math
import sys

import camelid


def main() -> None:
    """Load a model, continue two prompts greedily, print the text and the tokens' probabilities."""
    model = sys.argv[1] if len(sys.argv) > 1 else camelid.demo_model_path()
    params = camelid.SamplingParams(max_tokens=24, temperature=0, logprobs=0)
    prompts = ["The town of", "Every morning,"]
    with camelid.LLM(model) as llm:
        for prompt, completion in zip(prompts, llm.generate(prompts, params), strict=True):
            print(f"{prompt}|{completion.text}  ({completion.finish_reason})")
            for entry in completion.logprobs or []:
                print(f"  {math.exp(entry.logprob):6.1%}  {entry.token!r}")


if __name__ == "__main__":
    main()
