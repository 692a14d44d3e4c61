#!/usr/bin/env python3
"""Searches among phrases: small random checkpoints, and what Hugging Face's `generate` finds among real titles.

    python phrases.py CASE...     make the folders phrases/CASE anew: qwen3, t5

Needs torch and transformers (5.x). The phrases are the first 2,000 titles of industrial/items.jsonl and 80 beginnings of
them, so that some are the prefix of others; the tokenizer is prompts/tokenizer.json. `generate` is held to them by
`prefix_allowed_tokens_fn`. It goes on with beams that are no prefix of a phrase where it has too few others; such a beam
gets a token that never ends here, and what it finds is left out.
"""
import json
import os
import sys

import torch
from tokenizers import Tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM, T5Config, T5ForConditionalGeneration

HERE = os.path.dirname(os.path.abspath(__file__))
END, PAD, NEVER_ENDS = 0, 1, 2
VOCABULARY = 1000
NUM_TITLES = 2000
TOKENS = dict(vocab_size=VOCABULARY, eos_token_id=END, pad_token_id=PAD)
CASES = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        tie_word_embeddings=True, max_position_embeddings=512, bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, **TOKENS)),
    "t5": (T5ForConditionalGeneration, T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="relu", tie_word_embeddings=True,
        decoder_start_token_id=PAD, **TOKENS)),
}


def titles():
    """The titles of the items, in their order; the items are named by their numbers."""
    with open(os.path.join(HERE, "industrial", "items.jsonl")) as file:
        found = [json.loads(line)["title"] for line in file][:NUM_TITLES]
    return found + [found[number * 23].rsplit(" ", 1 + number % 3)[0] for number in range(80)]


def randomise(network):
    """Numbers wide enough that scores differ; the end is likelier than most tokens, so that beginnings are found."""
    generator = torch.Generator().manual_seed(16)
    for name, parameter in network.named_parameters():
        spread = 0.6 if "embed" in name or "shared" in name else 1.0 / parameter.shape[-1] ** 0.5
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            parameter.copy_(noise * spread if parameter.dim() > 1 else 1 + 0.2 * noise)
    return network.eval()


@torch.no_grad()
def search(network, ids, children, longest, width, penalty, early_stopping):
    """The phrases that `generate` finds, with their scores, best first."""
    start = 1 if network.config.is_encoder_decoder else len(ids)

    def allowed(_, tokens):
        return children.get(tuple(tokens[start:].tolist()), [NEVER_ENDS])

    out = network.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), num_beams=width,
        num_return_sequences=width, length_penalty=penalty, early_stopping=early_stopping, max_new_tokens=longest + 1,
        do_sample=False, prefix_allowed_tokens_fn=allowed, output_scores=True, output_logits=True,
        return_dict_in_generate=True)
    found = []
    for number, sequence in enumerate(out.sequences[:, start:].tolist()):
        if END not in sequence:
            continue
        phrase = sequence[:sequence.index(END)]
        if width == 1:  # greedy: `generate` gives no score
            log_probs = [torch.log_softmax(logits[0], -1) for logits in out.logits]
            score = sum(row[token].item() for row, token in zip(log_probs, [*phrase, END])) / (len(phrase) + 1) ** penalty
        else:
            score = out.sequences_scores[number].item()
        if END in children.get(tuple(phrase), ()) and score > -1e8:
            found.append((phrase, score))
    return found


def make(name):
    network, config = CASES[name]
    network = randomise(network(config))
    folder = os.path.join(HERE, "phrases", name)
    network.save_pretrained(folder)
    spare = os.path.join(folder, "generation_config.json")
    os.path.exists(spare) and os.remove(spare)
    with open(os.path.join(folder, "sidereal.json"), "w") as file:
        json.dump({"phrases": "titles", "prompt": {"pieces": [{"items": "{{ title }}", "separator": " "}]}}, file)
    tokenizer = Tokenizer.from_file(os.path.join(HERE, "prompts", "tokenizer.json"))
    known = titles()
    phrases = [tokenizer.encode(title, add_special_tokens=False).ids for title in known]
    children = {}
    for phrase in phrases:
        for end, token in enumerate([*phrase, END]):
            children.setdefault(tuple(phrase[:end]), set()).add(token)
    children = {prefix: sorted(tokens) for prefix, tokens in children.items()}
    longest = max(map(len, phrases))
    cases = []
    for history in ([5, 17, 300], [1234], [7, 1999, 42, 8, 77]):
        ids = tokenizer.encode(" ".join(known[item] for item in history), add_special_tokens=False).ids
        for width in (1, 4, 20):
            for penalty in (0.0, 1.0, -1.0):
                for early_stopping in (False, True, "never"):
                    found = search(network, ids, children, longest, width, penalty, early_stopping)
                    cases.append(dict(input_ids=ids, width=width, length_penalty=penalty, early_stopping=early_stopping,
                                      phrases=[phrase for phrase, _ in found], scores=[score for _, score in found]))
    with open(os.path.join(folder, "golden.json"), "w") as file:
        json.dump(dict(num_phrases=len(set(map(tuple, phrases))), longest=longest, cases=cases), file)
    print(name, "longest", longest, "found", sum(len(case["phrases"]) for case in cases),
          "of", sum(case["width"] for case in cases))


for case in sys.argv[1:]:
    make(case)
