"""Ask a question about a document and print the answer as it is written.

    python examples/stream_chat.py [MODEL_FOLDER]

Without a folder it uses the small model that comes with camelid, and a document that it never saw.
"""

from __future__ import annotations

import random
import sys

import camelid
from camelid.demo_corpus import make_document, user_message


def main() -> None:
    """Stream one chat answer, then print how many tokens it took."""
    model = sys.argv[1] if len(sys.argv) > 1 else camelid.demo_model_path()
    document = make_document(random.Random(1), n_tokens_target=200)
    question, truth = document.questions[0]
    messages = [{"role": "user", "content": user_message(document.text, question)}]
    params = camelid.SamplingParams(max_tokens=48, temperature=0)
    print(f"{document.text}\n\n{question}")
    with camelid.LLM(model) as llm:
        for delta in llm.stream_chat(messages, params):
            print(delta.text, end="", flush=True)
            if delta.usage:
                print(f"\n[{delta.usage.prompt_tokens} + {delta.usage.completion_tokens} tokens]")
    print(f"The document says: {truth}")


if __name__ == "__main__":
    main()
