#!/usr/bin/env python3
"""Train and evaluate the demo model of this folder: a small Qwen3-shaped generative recommender.

    python train.py --data DATA --output FOLDER                    train, save, evaluate
    python train.py --data DATA --evaluate FOLDER                  evaluate a saved checkpoint

DATA holds `items.jsonl` ({"item", "sid", "title"}, as in this folder) and the rows `valid.jsonl` and
`test.jsonl` ({"id": "USER-ROW", "history": [...], "target": ...}), which are those of this folder.
Needs torch, transformers and safetensors; a CPU is enough.

A history is written as its items' codes behind a begin token; the model learns to write the next
item's codes. The published training file is not used: training sequences are rebuilt from the rows,
each user's first history and, unless --holdout is given, the targets of the validation rows. Targets
of test rows are never trained on. Hyperparameters were chosen with --holdout on validation rows.

The checkpoint is saved in 16 bits; evaluation reads it back and computes in f32: beam search over
the trie of semantic IDs, log-softmax over the whole vocabulary, then restricted to legal codes.
"""
import argparse
import collections
import json
import math
import os
import random
import time

import torch
import torch.nn.functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

BEGIN, END, FIRST_CODE, CODES_PER_LEVEL = 1, 2, 4, 256
MAX_ITEMS = 50


def read_lines(folder, name):
    with open(os.path.join(folder, name)) as file:
        return [json.loads(line) for line in file]


class Data:
    """Items as tokens, training sequences, and the rows to evaluate on."""

    def __init__(self, folder, holdout):
        items = {row["item"]: row["sid"] for row in read_lines(folder, "items.jsonl")}
        self.tokens = {
            item: tuple(FIRST_CODE + level * CODES_PER_LEVEL + code for level, code in enumerate(sid))
            for item, sid in items.items()
        }
        self.levels = len(next(iter(items.values())))
        self.vocab_size = FIRST_CODE + self.levels * CODES_PER_LEVEL
        self.valid = read_lines(folder, "valid.jsonl")
        self.test = read_lines(folder, "test.jsonl")
        sequences = {}
        for rows, takes_targets in ((self.valid, not holdout), (self.test, False)):
            for row in rows:
                user = row["id"].split("-")[0]
                sequence = sequences.setdefault(user, list(row["history"]))
                if takes_targets:
                    sequence.append(row["target"])
        self.sequences = list(sequences.values())

    def prompt(self, items):
        return [BEGIN] + [token for item in items[-MAX_ITEMS:] for token in self.tokens[item]]


class Trie:
    """The legal codes after each prefix."""

    def __init__(self, sequences):
        self.children = collections.defaultdict(set)
        for sequence in sequences:
            for level in range(len(sequence)):
                self.children[sequence[:level]].add(sequence[level])
        self.children = {prefix: sorted(codes) for prefix, codes in self.children.items()}


@torch.no_grad()
def beam_search(model, data, trie, histories, width):
    """The `width` best semantic IDs of each history, best first, with their scores."""
    prompts = [data.prompt(history) for history in histories]
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(input_ids=padded, attention_mask=mask, position_ids=positions,
                   use_cache=True, logits_to_keep=1)
    cache, next_position, rows = output.past_key_values, positions[:, -1] + 1, 1
    beams = [[((), 0.0)] for _ in histories]
    for level in range(data.levels):
        log_p = torch.log_softmax(output.logits[:, -1].float(), -1)
        parents = []
        for request, current in enumerate(beams):
            candidates = []
            for row, (prefix, score) in enumerate(current):
                codes = trie.children[prefix]
                gains = log_p[request * rows + row, codes].tolist()
                candidates += [(score + gain, prefix + (code,), row) for gain, code in zip(gains, codes)]
            candidates.sort(key=lambda candidate: (-candidate[0], candidate[1]))
            best = candidates[:width]
            best += [best[0]] * (width - len(best))
            beams[request] = [(prefix, score) for score, prefix, _ in best]
            parents += [request * rows + row for _, _, row in best]
        if level + 1 == data.levels:
            return beams
        cache.reorder_cache(torch.tensor(parents))
        mask = mask[torch.tensor(parents)] if level else mask.repeat_interleave(width, 0)
        mask = torch.cat([mask, torch.ones(len(parents), 1, dtype=torch.long)], 1)
        newest = torch.tensor([[prefix[-1]] for current in beams for prefix, _ in current])
        position = (next_position + level).repeat_interleave(width)[:, None]
        output = model(input_ids=newest, attention_mask=mask, position_ids=position,
                       past_key_values=cache, use_cache=True)
        rows = width


def evaluate(model, data, rows, width=20, batch=64):
    """Recall and NDCG, the target found by its semantic ID and by the item itself."""
    model.eval()
    trie = Trie(set(data.tokens.values()))
    sharing = collections.defaultdict(list)
    for item, tokens in data.tokens.items():
        sharing[tokens].append(item)
    sums = collections.Counter()
    rows = sorted(rows, key=lambda row: len(row["history"]))
    for start in range(0, len(rows), batch):
        part = rows[start:start + batch]
        answers = beam_search(model, data, trie, [row["history"] for row in part], width)
        for row, beams in zip(part, answers):
            sids = list(dict.fromkeys(prefix for prefix, _ in beams))
            items = [item for sid in sids for item in sharing[sid]]
            for kind, found, target in (("by_sid", sids, data.tokens[row["target"]]),
                                        ("by_item", items, row["target"])):
                rank = found.index(target) + 1 if target in found else math.inf
                for cutoff in (5, 10, 20):
                    if rank <= cutoff:
                        sums[kind, f"recall_at_{cutoff}"] += 1
                        sums[kind, f"ndcg_at_{cutoff}"] += 1 / math.log2(rank + 1)
    names = [f"{metric}_at_{cutoff}" for metric in ("recall", "ndcg") for cutoff in (5, 10, 20)]
    return {kind: {name: round(sums[kind, name] / len(rows), 6) for name in names}
            for kind in ("by_sid", "by_item")}


def crop(items):
    """A random stretch that keeps at least two items: positions and neighbours vary from epoch to epoch."""
    if len(items) <= 2 or random.random() < 0.5:
        return items
    start = random.randrange(len(items) - 1)
    return items[start:]


def batches(data, tokens_per_batch, crops):
    """Sequences of like length together, in random order."""
    prompts = [data.prompt(crop(items) if crops else items) for items in data.sequences]
    prompts.sort(key=lambda prompt: len(prompt) + random.random())
    parts, part = [], []
    for prompt in prompts:
        if part and len(prompt) * (len(part) + 1) > tokens_per_batch:
            parts.append(part)
            part = []
        part.append(prompt)
    parts.append(part)
    random.shuffle(parts)
    return parts


def build(options, vocab_size):
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=vocab_size, hidden_size=options.hidden, intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        max_position_embeddings=1024, pad_token_id=0, bos_token_id=BEGIN, eos_token_id=END))

    def drop(module, inputs, output):
        return F.dropout(output, options.dropout, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)
    return model


def train(model, data, options):
    """AdamW on a cosine schedule over CPU time; the result is the moving average of the weights."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=options.decay),
                                   dict(params=vectors, weight_decay=0.0)], lr=options.rate, betas=(0.9, 0.98))
    average = [p.detach().clone() for p in model.parameters()]
    start, step, epoch = time.process_time(), 0, 0
    while True:
        epoch += 1
        losses = []
        for part in batches(data, options.batch_tokens, options.crops):
            progress = (time.process_time() - start) / (60 * options.minutes)
            if progress >= 1:
                with torch.no_grad():
                    for parameter, mean in zip(model.parameters(), average):
                        parameter.copy_(mean)
                return
            rate = options.rate * min(1, (step + 1) / 200) * (0.515 + 0.485 * math.cos(math.pi * progress))
            for group in optimizer.param_groups:
                group["lr"] = rate
            longest = max(map(len, part))
            tokens = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in part])
            targets = tokens[:, 1:].masked_fill(tokens[:, 1:] == 0, -100)
            logits = model(input_ids=tokens[:, :-1]).logits  # right padding behind a causal mask
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=options.smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            keep = min(options.average, step / (step + 10))
            with torch.no_grad():
                for parameter, mean in zip(model.parameters(), average):
                    mean.lerp_(parameter, 1 - keep)
            losses.append(loss.item())
        if epoch % 5 == 0:
            print(f"epoch {epoch} step {step} loss {sum(losses) / len(losses):.4f} done {progress:.0%}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of items.jsonl, valid.jsonl, test.jsonl")
    parser.add_argument("--output", help="folder for the checkpoint")
    parser.add_argument("--evaluate", help="checkpoint to evaluate instead of training")
    parser.add_argument("--holdout", action="store_true", help="keep validation targets out of training, evaluate on them")
    parser.add_argument("--minutes", type=float, default=6, help="CPU time of training")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--smoothing", type=float, default=0.1, help="label smoothing")
    parser.add_argument("--decay", type=float, default=0.05, help="weight decay")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--average", type=float, default=0.998, help="decay of the weights' moving average")
    parser.add_argument("--batch-tokens", type=int, default=2000)
    parser.add_argument("--no-crops", dest="crops", action="store_false")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    random.seed(options.seed)
    data = Data(options.data, options.holdout)
    folder = options.evaluate or options.output
    if not options.evaluate:
        model = build(options, data.vocab_size)
        print(sum(p.numel() for p in model.parameters()), "weights,", len(data.sequences), "sequences", flush=True)
        train(model, data, options)
        model.half().save_pretrained(folder)
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = data.valid if options.holdout else data.test
    metrics = dict(rows=len(rows), width=20, split="valid" if options.holdout else "test", **evaluate(model, data, rows))
    print(json.dumps(metrics, indent=1))
    with open(os.path.join(folder, "metrics.json"), "w") as file:
        json.dump(metrics, file, indent=1)


if __name__ == "__main__":
    main()
