"""See and steer heads of the bundled model in a minute: scan, read, ablate, observe.

python examples/quickstart.py
"""

from __future__ import annotations

import torch

import interp


def main() -> None:
    model = interp.load("llama")
    print(model.note)

    # See: score every head, and name the strongest.
    atlas = interp.scan_heads(
        model, scores="sink,previous_token,induction,retrieval", context=512, samples=8
    )
    for score in atlas.scores:
        print(
            f"{score:15s}",
            *(f"{head} {atlas.value(head, score):.2f}" for head in atlas.top(score, 4)),
            sep="  ",
        )

    # Steer: take the strongest retrieval heads out, against random heads.
    heads = [h for h in atlas.top("retrieval", 5) if atlas.value(h, "retrieval") >= 0.1]
    result = interp.ablate(model, heads, task="niah", n=16, avoid=heads)
    print(
        f"needle answered: {result.baseline} → without {', '.join(map(str, heads))}: "
        f"{result.ablated}"
    )
    print(f"without as many random heads: {result.control}")

    # Look closer: what one head attends to, in O(L) memory.
    text = "When Mary and John went to the store, John gave a drink to"
    inputs = model.tokenizer(text, return_tensors="pt")
    with torch.no_grad(), model.observe("entropy", "argmax") as seen:
        model(**inputs)
    tokens = model.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    for layer in range(model.n_layers):
        at = [tokens[i] for i in seen[layer].argmax[0, :, -1]]
        print(f"layer {layer}: the last token attends most to", *at)


if __name__ == "__main__":
    main()
