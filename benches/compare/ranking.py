#!/usr/bin/env python3
"""What candidates cost a ranking network: `sidereal rank` at the shape of DLRM-v3, beside PyTorch on the same weights.

    python ranking.py [--sidereal target/release/sidereal] [--history 4096] [--threads 1] [--rounds 3] [--no-torch]

Makes a folder of random weights (512 columns, 4 heads of 128, 5 layers; items in a table of their own), asks for 1 to
2,048 candidates behind one history, and prints milliseconds a request and what each candidate adds. PyTorch (f32 and
bf16; needs torch) runs the same network written out, in two ways: all candidates in one forward with the target-aware
mask, and the history again for every 32 candidates, as a service without a cache of it does. Contenders in turns.
"""
import argparse
import json
import math
import os
import struct
import subprocess
import tempfile
import time

import numpy as np

D, HEADS, DIM, LAYERS, INNER, ITEMS = 512, 4, 128, 5, 256, 100_000
T, P, E = "_hstu_transducer.", "_hstu_transducer._input_preprocessor.", "_hstu_transducer._positional_encoder."


def write_safetensors(path, tensors):
    header, at = {}, 0
    for name, value in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [at, at + 4 * value.size]}
        at += 4 * value.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for value in tensors.values():
            file.write(np.ascontiguousarray(value, dtype="<f4").tobytes())


def mlp(rng, name, num_in, inner, num_out, has_norm=True):
    t = {name + ".0.weight": rng.normal(0, num_in ** -0.5, (inner, num_in)), name + ".0.bias": np.zeros(inner),
         name + ".1.weight": np.ones(inner), name + ".1.bias": np.zeros(inner),
         name + ".2.weight": rng.normal(0, inner ** -0.5, (num_out, inner)), name + ".2.bias": np.zeros(num_out)}
    if has_norm:
        t |= {name + ".3.weight": np.ones(num_out), name + ".3.bias": np.zeros(num_out)}
    return t


def make(folder, history):
    rng = np.random.default_rng(5)
    t = mlp(rng, P + "_content_embedding_mlp", D, INNER, D)
    t[P + "_action_encoder._action_embedding_table"] = rng.normal(0, 1, (5, 8))
    t[P + "_action_encoder._target_action_embedding_table"] = rng.normal(0, 1, (1, 40))
    t |= mlp(rng, P + "_action_embedding_mlp", 40, INNER, D)
    t[E + "_position_embeddings_weight"] = rng.normal(0, 0.1, (8192, D))
    t[E + "_timestamp_embeddings_weight"] = rng.normal(0, 0.1, (2049, D))
    for layer in range(LAYERS):
        p = f"{T}_stu_module._stu_layers.{layer}."
        t |= {p + "_uvqk_weight": rng.normal(0, D ** -0.5, (D, 4 * HEADS * DIM)), p + "_uvqk_beta": np.zeros(4 * HEADS * DIM),
              p + "_input_norm_weight": np.ones(D), p + "_input_norm_bias": np.zeros(D),
              p + "_output_weight": rng.normal(0, (3 * HEADS * DIM) ** -0.5, (3 * HEADS * DIM, D)),
              p + "_output_norm_weight": np.ones(HEADS * DIM), p + "_output_norm_bias": np.zeros(HEADS * DIM)}
    post = T + "_output_postprocessor."
    t |= {post + "_time_feature_combiner.weight": rng.normal(0, D ** -0.5, (D, D + 4)),
          post + "_time_feature_combiner.bias": np.zeros(D),
          post + "_layer_norm.weight": np.ones(D), post + "_layer_norm.bias": np.zeros(D)}
    t |= mlp(rng, "_item_embedding_mlp", D, 512, D)
    t |= mlp(rng, "_multitask_module._prediction_module", D, 512, 1, has_norm=False)
    t = {name: value.astype(np.float32) for name, value in t.items()}
    write_safetensors(os.path.join(folder, "model.safetensors"), t)
    os.makedirs(os.path.join(folder, "tables"), exist_ok=True)
    table = rng.normal(0, 1, (ITEMS, D)).astype(np.float32)
    np.save(os.path.join(folder, "tables", "item_id.npy"), table)
    layout = {"family": "dlrm_hstu", "num_heads": HEADS, "max_items": history, "attention_divisor": history + 2048,
              "item_features": ["item_id"], "action": "action", "action_bits": [1, 2, 4, 8, 16],
              "tasks": [{"name": "rating", "kind": "probability"}]}
    with open(os.path.join(folder, "sidereal.json"), "w") as file:
        json.dump(layout, file)
    with open(os.path.join(folder, "items.jsonl"), "w") as file:
        for item in range(ITEMS):
            file.write(json.dumps({"item": str(item), "sid": [item // 400, item % 400]}) + "\n")
    return t, table


def request(history, num_candidates):
    rng = np.random.default_rng(7)
    entries = [{"item": int(item), "time": 1_600_000_000 + 600 * at, "action": int(item) % 32}
               for at, item in enumerate(rng.integers(0, ITEMS, history))]
    candidates = [int(item) for item in rng.permutation(ITEMS)[:num_candidates]]
    return {"history": entries, "candidates": candidates, "time": 1_600_000_000 + 600 * history + 60, "timings": True}


class Torch:
    """The network in PyTorch, its rows in tensors; as written out in models/dlrm_hstu.py, in one batch of one user."""

    def __init__(self, tensors, table, dtype, history):
        import torch
        self.torch, self.dtype, self.divisor = torch, dtype, history + 2048
        self.t = {name: torch.tensor(value).to(dtype) for name, value in tensors.items()}
        self.table = torch.tensor(table)

    def mlp(self, name, x):
        F = self.torch.nn.functional
        x = F.linear(x, self.t[name + ".0.weight"], self.t[name + ".0.bias"])
        x = x * F.layer_norm(x, x.shape[-1:], self.t[name + ".1.weight"], self.t[name + ".1.bias"], 1e-5).sigmoid()
        x = F.linear(x, self.t[name + ".2.weight"], self.t[name + ".2.bias"])
        if name + ".3.weight" in self.t:
            x = F.layer_norm(x, x.shape[-1:], self.t[name + ".3.weight"], self.t[name + ".3.bias"], 1e-5)
        return x

    def scores(self, fields, candidates):
        torch, t = self.torch, self.t
        F, history, time_ = torch.nn.functional, fields["history"], fields["time"]
        count, length = len(candidates), len(history) + len(candidates)
        content = self.table[[entry["item"] for entry in history] + candidates].to(self.dtype)
        bits = torch.tensor([1, 2, 4, 8, 16])
        actions = torch.tensor([entry["action"] for entry in history])
        rows = ((actions[:, None] & bits) > 0).to(self.dtype)[:, :, None] * t[P + "_action_encoder._action_embedding_table"]
        target = t[P + "_action_encoder._target_action_embedding_table"].expand(count, -1)
        x = self.mlp(P + "_content_embedding_mlp", content)
        x = (x + self.mlp(P + "_action_embedding_mlp", torch.cat([rows.flatten(1), target]))) * math.sqrt(D)
        places = (len(history) - torch.arange(length)).clamp(min=0)
        seconds = torch.tensor([entry["time"] for entry in history] + [time_] * count)
        ages = ((time_ - seconds).float().clamp(min=1e-6) / 60).sqrt().int().clamp(max=2048)
        x = x + t[E + "_position_embeddings_weight"][places] + t[E + "_timestamp_embeddings_weight"][ages]
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        mask[:, len(history):] &= torch.eye(length, dtype=torch.bool)[:, len(history):]
        for layer in range(LAYERS):
            p = f"{T}_stu_module._stu_layers.{layer}."
            z = F.layer_norm(x, (D,), t[p + "_input_norm_weight"], t[p + "_input_norm_bias"], 1e-6)
            u, v, q, k = (z @ t[p + "_uvqk_weight"] + t[p + "_uvqk_beta"]).split(HEADS * DIM, dim=1)
            heads = lambda y: y.view(length, HEADS, DIM).transpose(0, 1)
            weights = F.silu(heads(q) @ heads(k).transpose(1, 2) / math.sqrt(DIM)) / self.divisor * mask
            a = (weights @ heads(v)).transpose(0, 1).reshape(length, HEADS * DIM)
            u = F.silu(u)
            normed = F.layer_norm(a, a.shape[-1:], t[p + "_output_norm_weight"], t[p + "_output_norm_bias"], 1e-6)
            x = x + torch.cat([u, a, u * normed], dim=1) @ t[p + "_output_weight"]
        post = T + "_output_postprocessor."
        angles = [float(np.float32(np.floor(np.float32(time_) / np.float32(unit)) % n / n) * np.float32(6.28))
                  for unit, n in ((3600, 24), (86400, 7))]
        clock = torch.tensor([part(angle) for angle in angles for part in (math.cos, math.sin)]).to(self.dtype)
        users = torch.cat([x[len(history):], clock.expand(count, -1)], dim=1)
        users = F.linear(users, t[post + "_time_feature_combiner.weight"], t[post + "_time_feature_combiner.bias"])
        users = F.layer_norm(users, (D,), t[post + "_layer_norm.weight"], t[post + "_layer_norm.bias"], 1e-5)
        items = self.mlp("_item_embedding_mlp", content[len(history):])
        return self.mlp("_multitask_module._prediction_module", users * items).sigmoid()[:, 0].float()

    def time(self, fields, per_forward):
        candidates = fields["candidates"]
        with self.torch.no_grad():
            begin = time.perf_counter()
            parts = [self.scores(fields, candidates[at:at + per_forward]) for at in range(0, len(candidates), per_forward)]
            return (time.perf_counter() - begin) * 1e3, self.torch.cat(parts)


def rank(binary, folder, dtype, threads, fields, rounds):
    """Milliseconds of each round but the first, and the scores by item."""
    lines = json.dumps(fields) + "\n"
    command = [binary, "rank", "--model", folder, "--requests", "-", "--threads", str(threads), "--dtype", dtype]
    found = subprocess.run(command, input=lines * (rounds + 1), text=True, capture_output=True, check=True).stdout
    answers = [json.loads(line) for line in found.splitlines()]
    scores = {item["item"]: item["score"] for item in answers[0]["items"]}
    return [answer["timings"]["total_us"] / 1e3 for answer in answers[1:]], scores


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sidereal", default="target/release/sidereal")
    parser.add_argument("--history", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        tensors, table = make(folder, arguments.history)
        networks = {}
        if not arguments.no_torch:
            import torch
            torch.set_num_threads(arguments.threads)
            networks = {name: Torch(tensors, table, dtype, arguments.history)
                        for name, dtype in (("torch f32", torch.float32), ("torch bf16", torch.bfloat16))}
        for count in (1, 32, 256, 1024, 2048):
            fields = request(arguments.history, count)
            row = {"candidates": count}
            for dtype in ("f32", "bf16"):
                times, scores = rank(arguments.sidereal, folder, dtype, arguments.threads, fields, arguments.rounds)
                row[f"sidereal {dtype}"] = min(times)
                for name, network in networks.items():
                    if not name.endswith(dtype):
                        continue
                    spent, theirs = network.time(fields, 2048)
                    row[name] = min(spent, network.time(fields, 2048)[0])
                    error = max(abs(scores[str(item)] - float(score)) for item, score in zip(fields["candidates"], theirs))
                    row[f"difference {dtype}"] = error
                    row[f"{name}, 32 a forward"] = network.time(fields, 32)[0] if count <= 256 else None
            results.append(row)
            shown = {key: f"{value:.2e}" if "difference" in key else round(value, 1) for key, value in row.items() if value}
            print(json.dumps(shown), flush=True)
    first, last = results[0], results[-1]
    for dtype in ("f32", "bf16"):
        added = (last[f"sidereal {dtype}"] - first[f"sidereal {dtype}"]) / (last["candidates"] - 1) * 1e3
        print(f"{dtype}: each further candidate takes {added:.0f} us")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"history": arguments.history, "threads": arguments.threads, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
