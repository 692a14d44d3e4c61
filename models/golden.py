#!/usr/bin/env python3
"""Golden answers: small random checkpoints and what the published networks make of them.

    python golden.py exact FOLDER...      add `exact_scores` to the golden.json of existing folders
    python golden.py make CASE...         make the folders of the cases below
    python golden.py programs FOLDER...   make programs.json in existing folders: named tokens and forced tokens

Needs torch and transformers (5.x). The scores of the first five folders are those of Hugging Face's `generate` in
f32 with `prefix_allowed_tokens_fn`; `exact_scores` beside them are the same network's in f64, which tells how far
f32 itself is from the truth. The other folders hold a plain beam search without a cache over the network in f64.
"""
import argparse
import json
import os
import re

import torch
from safetensors.torch import load_file, save_file
from transformers import (AutoConfig, LlamaConfig, LlamaForCausalLM, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM,
                          T5Config, T5ForConditionalGeneration)
from transformers.models.t5.modeling_t5 import T5LayerNorm

HERE = os.path.dirname(os.path.abspath(__file__))
NETWORKS = {"t5": T5ForConditionalGeneration, "qwen3": Qwen3ForCausalLM, "qwen2": Qwen2ForCausalLM,
            "llama": LlamaForCausalLM}


def norm_in_f64(self, x):
    """T5's norm takes its variance in f32 whatever the network's type; the truth must not."""
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


class Network:
    """A checkpoint in f64, asked for the log-probabilities after prefixes."""

    def __init__(self, folder):
        network = NETWORKS[AutoConfig.from_pretrained(folder).model_type]
        self.model = network.from_pretrained(folder, dtype=torch.float64).eval()
        for module in self.model.modules():
            if isinstance(module, T5LayerNorm):
                module.forward = norm_in_f64.__get__(module)

    @torch.no_grad()
    def logits(self, prompt, prefixes):
        if self.model.config.is_encoder_decoder:
            start = self.model.config.decoder_start_token_id
            inputs = dict(input_ids=torch.tensor([prompt] * len(prefixes)),
                          decoder_input_ids=torch.tensor([[start, *prefix] for prefix in prefixes]))
        else:
            inputs = dict(input_ids=torch.tensor([[*prompt, *prefix] for prefix in prefixes]))
        return self.model(**inputs).logits


def log_p(logits, token, among):
    return logits[token] - torch.logsumexp(logits if among is None else logits[among], 0)


def read_codes(folder, index):
    with open(os.path.join(folder, index)) as file:
        index = json.load(file)
    return {item: [int(re.findall(r"\d+", text)[-1]) for text in texts] for item, texts in index.items()}


def children_of(sequences):
    children = {}
    for sequence in sequences:
        for end in range(len(sequence)):
            children.setdefault(tuple(sequence[:end]), set()).add(sequence[end])
    return children


def add_exact(folder):
    """The f64 scores of the sequences that golden.json lists."""
    path = os.path.join(folder, "golden.json")
    golden, layout = json.load(open(path)), json.load(open(os.path.join(folder, "sidereal.json")))
    first = [level["first_token"] for level in layout["levels"]]
    codes = read_codes(folder, golden["items_index"]).values()
    children = children_of([[f + code for f, code in zip(first, sid)] for sid in codes])
    network = Network(folder)
    for cases, is_children in ((golden["cases"], False), (golden["children"], True)):
        for case in cases:
            logits = network.logits(case["input_ids"], [sequence[:-1] for sequence in case["sequences"]])
            case["exact_scores"] = []
            for row, sequence in zip(logits[:, -len(first):], case["sequences"]):
                score = sum(log_p(row[step], token, sorted(children[tuple(sequence[:step])]) if is_children else None)
                            for step, token in enumerate(sequence))
                case["exact_scores"].append(score.item())
    json.dump(golden, open(path, "w"))


TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=512)
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
CASES = {
    # T5 whose encoder and decoder differ in depth.
    "t5/uneven-depth": dict(
        network=T5ForConditionalGeneration, config=T5Config(
            d_model=40, d_kv=16, d_ff=64, num_layers=3, num_decoder_layers=1, num_heads=3, vocab_size=800,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
            decoder_start_token_id=0)),
    # Tokens that are forced after the codes and count in the score; bfloat16 in two files.
    "decoder_only/qwen3-suffix": dict(
        network=Qwen3ForCausalLM, config=Qwen3Config(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, tie_word_embeddings=True, rope_parameters=ROPE, vocab_size=800, **TOKENS),
        dtype=torch.bfloat16, shards=2, layout=dict(suffix=[9, 2])),
    # The spelling of transformers 4, float16, a tied head.
    "decoder_only/llama-tied": dict(
        network=LlamaForCausalLM, config=LlamaConfig(
            hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3,
            tie_word_embeddings=True, rope_parameters=dict(ROPE, rope_theta=5000.0), vocab_size=800, **TOKENS),
        dtype=torch.float16, spelling=4),
    # A prompt around the items and another default normalisation.
    "decoder_only/qwen3-prompt": dict(
        network=Qwen3ForCausalLM, config=Qwen3Config(
            hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1,
            head_dim=24, tie_word_embeddings=False, rope_parameters=ROPE, vocab_size=800, **TOKENS),
        layout=dict(prompt=dict(prefix=[1, 5], suffix=[7, 8], separator=[6], max_items=4), normalize="children")),
}
LEVELS = [dict(size=256, first_token=20 + 256 * level) for level in range(3)]


def save(case, folder):
    torch.manual_seed(len(folder))
    model = case["network"](case["config"]).eval()
    with torch.no_grad():  # wide enough that scores differ
        for name, parameter in model.named_parameters():
            is_table = "embed" in name or "shared" in name
            spread = 0.6 if is_table else 1.0 / parameter.shape[-1] ** 0.5
            noise = torch.randn(parameter.shape)
            parameter.copy_(noise * spread if parameter.dim() > 1 else 1 + 0.2 * noise)
    model.to(case.get("dtype", torch.float32)).save_pretrained(folder)
    if case.get("spelling") == 4:
        path = os.path.join(folder, "config.json")
        config = json.load(open(path))
        config.update(rope_theta=config.pop("rope_parameters")["rope_theta"], rope_scaling=None)
        json.dump(config, open(path, "w"), indent=1)
    if case.get("shards", 1) > 1:
        path = os.path.join(folder, "model.safetensors")
        tensors = load_file(path)
        parts = [f"model-{part + 1:05}-of-{case['shards']:05}.safetensors" for part in range(case["shards"])]
        home = {name: parts[at % len(parts)] for at, name in enumerate(sorted(tensors))}
        for part in parts:
            save_file({name: tensors[name] for name in tensors if home[name] == part}, os.path.join(folder, part))
        json.dump(dict(metadata={}, weight_map=home), open(os.path.join(folder, "model.safetensors.index.json"), "w"))
        os.remove(path)


def search(network, ids, forced, children, num_steps, width, is_children):
    """The best prefixes after forced tokens, which are in no prefix and no score."""
    beams = [((), 0.0)]
    for _ in range(num_steps):
        logits = network.logits(ids, [(*forced, *prefix) for prefix, _ in beams])[:, -1]
        grown = [((*prefix, token), score + log_p(row, token, sorted(children[prefix]) if is_children else None).item())
                 for row, (prefix, score) in zip(logits, beams) for token in sorted(children[prefix])]
        beams = sorted(grown, key=lambda beam: (-beam[1], beam[0]))[:width]
    return beams


def add_programs(folder):
    """Log-probabilities of named tokens, and searches with forced tokens before the codes, by the network in f64."""
    golden, layout = (json.load(open(os.path.join(folder, name))) for name in ("golden.json", "sidereal.json"))
    first, suffix = [level["first_token"] for level in layout["levels"]], layout.get("suffix", [])
    children = {}
    for sid in read_codes(folder, golden["items_index"]).values():
        sequence = [f + code for f, code in zip(first, sid)] + suffix
        for end in range(len(sequence)):
            children.setdefault(tuple(sequence[:end]), set()).add(sequence[end])
    network, read, searches = Network(folder), [], []
    cases = [case["input_ids"] for case in golden.get("cases", []) + golden.get("children", [])][:3]
    for ids, forced in zip(cases, ([], [11], [4, 13, 3])):
        tokens = [7, 3, first[1] + 5, 2, 3, first[0]]
        row = torch.log_softmax(network.logits(ids, [tuple(forced)])[0, -1], 0)
        read.append(dict(input_ids=ids, forced=forced, tokens=tokens, log_probs=[row[token].item() for token in tokens]))
        forced = forced or [5]
        rows = network.logits(ids, [tuple(forced)])[0, -len(forced) - 1:]
        counted = sum(log_p(row, token, None).item() for row, token in zip(rows, forced))
        beams = search(network, ids, forced, children, len(first) + len(suffix), 20, False)
        for is_counted in (False, True):
            searches.append(dict(input_ids=ids, forced=forced, is_counted=is_counted, width=20,
                                 sequences=[prefix[:len(first)] for prefix, _ in beams],
                                 scores=[score + counted * is_counted for _, score in beams]))
    with open(os.path.join(folder, "programs.json"), "w") as file:
        json.dump(dict(read=read, searches=searches), file)


def make(name):
    case, folder = CASES[name], os.path.join(HERE, name)
    save(case, folder)
    layout = dict(levels=LEVELS, **case.get("layout", {}))
    json.dump(layout, open(os.path.join(folder, "sidereal.json"), "w"))
    index = "../../catalogs/industrial.index.json"
    codes = read_codes(folder, index)
    tokens = {item: [level["first_token"] + code for level, code in zip(LEVELS, sid)] for item, sid in codes.items()}
    children = children_of(list(tokens.values()))
    for suffix_at, token in enumerate(layout.get("suffix", [])):
        for sequence in set(map(tuple, tokens.values())):
            children[(*sequence, *layout["suffix"][:suffix_at])] = {token}
    network, prompt, is_children = Network(folder), layout.get("prompt", {}), layout.get("normalize") == "children"
    generator, golden = torch.Generator().manual_seed(5), []
    for length, width in ((6, 10), (1, 30), (3, 120)):
        history = [list(tokens)[i] for i in torch.randint(len(tokens), (length,), generator=generator).tolist()]
        kept = history[-prompt.get("max_items", length):]
        ids = list(prompt.get("prefix", []))
        for at, item in enumerate(kept):
            ids += (prompt.get("separator", []) if at else []) + tokens[item]
        ids += prompt.get("suffix", [])
        beams = search(network, ids, (), children, len(LEVELS) + len(layout.get("suffix", [])), width, is_children)
        golden.append(dict(input_ids=ids, history=history, width=width, scores=[score for _, score in beams],
                           sequences=[prefix[:len(LEVELS)] for prefix, _ in beams]))
    kind = "children" if is_children else "cases"
    json.dump({"items_index": index, "from_history": True, kind: golden}, open(os.path.join(folder, "golden.json"), "w"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("exact", "make", "programs"))
    parser.add_argument("names", nargs="+", help="folders, or cases: " + ", ".join(CASES))
    options = parser.parse_args()
    for name in options.names:
        dict(exact=add_exact, make=make, programs=add_programs)[options.action](name)


if __name__ == "__main__":
    main()
