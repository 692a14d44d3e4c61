#!/usr/bin/env python3
"""Golden answers of HSTU and of SASRec in the same code: small random checkpoints, and what they make of histories with times, in float64.

    python hstu.py make             make the folders below models/hstu, and models/sasrec/meta
    python hstu.py research REPO    compare them with the classes of a checkout of meta-recsys/generative-recommenders
                                    (needs torch)

`make` needs NumPy alone: the formulas of Zhai et al. 2024 are written out here in loops over positions. `research` loads
the same files into the published modules in float64 and prints the largest difference of the vectors.
"""
import json
import math
import os
import sys

import numpy as np

from vectors import HERE, ITEMS, NAMES, attention, draw, linear_weights, write_safetensors

#        folder        items ratings heads keys values layers positions window buckets
CASES = {"hstu/small": (12, None, 2, 6, 6, 2, 20, 12, 128),
         "hstu/rated": (10, 3, 1, 5, 9, 2, 90, 80, 40),
         "hstu/plain": (8, None, 4, 3, 2, 1, 9, 8, None),
         "sasrec/meta": (12, None, 3, 4, 4, 2, 20, 14, None)}
INNER = 18  # of SASRec's feed-forward layers
NUM_RATINGS = 6


def silu(x):
    return x / (1 + np.exp(-x))


def norm(x, epsilon=1e-6):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + epsilon)


def sasrec_block(t, layer, x, heads):
    """Queries are normed, keys and values are not."""
    p, f = f"attention_layers.{layer}.", f"forward_layers.{layer}._conv1d."
    q = norm(x, 1e-8)
    parts = zip((q, x, x), np.split(t[p + "in_proj_weight"], 3), np.split(t[p + "in_proj_bias"], 3))
    queries, keys, values = (rows @ weight.T + bias for rows, weight, bias in parts)
    attended = attention(queries, keys, values, heads, True)
    y = norm(q + attended @ t[p + "out_proj.weight"].T + t[p + "out_proj.bias"], 1e-8)
    inner = np.maximum(y @ t[f + "0.weight"][:, :, 0].T + t[f + "0.bias"], 0)
    return y + inner @ t[f + "3.weight"][:, :, 0].T + t[f + "3.bias"]


def bucket(seconds, last):
    """As torch computes it from whole seconds, in f32."""
    return min(int(np.log(np.float32(max(1, abs(seconds)))) / np.float32(0.301)), last)


def query_vector(case, t, layout, history, time):
    """The query vector of a history of (row, time, rating); None where there is none."""
    items, ratings, heads, keys, values, layers, positions, window, buckets = CASES[case]
    history = history[-window:]
    if not history:
        return None
    columns = items + (ratings or 0)
    x = t["_embedding_module._item_emb.weight"][[row for row, _, _ in history]]
    if ratings:
        x = np.concatenate([x, t["_input_features_preproc._rating_emb.weight"][[r for _, _, r in history]]], axis=1)
    x = x * math.sqrt(columns) + t["_input_features_preproc._pos_emb.weight"][:len(history)]
    times = [at for _, at, _ in history] + [time]
    for layer in range(layers):
        if case.startswith("sasrec"):
            x = sasrec_block(t, layer, x, heads)
            continue
        p = f"_hstu._attention_layers.{layer}."
        uvqk = norm(x) @ t[p + "_uvqk"]
        if layout.get("linear_activation", "silu") == "silu":
            uvqk = silu(uvqk)
        u, v, q, k = np.split(uvqk, np.cumsum([heads * values, heads * values, heads * keys]), axis=1)
        attended = np.zeros((len(history), heads * values))
        for head in range(heads):
            of_keys, of_values = slice(head * keys, (head + 1) * keys), slice(head * values, (head + 1) * values)
            for i in range(len(history)):
                for j in range(i + 1):
                    score = q[i, of_keys] @ k[j, of_keys]
                    if buckets is None:
                        score += t[p + "_rel_attn_bias._w"][positions - 1 + j - i]
                    else:
                        score += t[p + "_rel_attn_bias._pos_w"][positions - 1 + j - i]
                        score += t[p + "_rel_attn_bias._ts_w"][bucket(times[i + 1] - times[j], buckets)]
                    attended[i, of_values] += silu(score) / positions * v[j, of_values]
        a = norm(attended)
        gated = np.concatenate([u, a, u * a], axis=1) if layout.get("concat_ua") else u * a
        x = x + gated @ t[p + "_o.weight"].T + t[p + "_o.bias"]
    last = x[-1, :items]
    if layout.get("user_embedding_norm") == "layer_norm":
        return norm(last)
    return last / max(np.sqrt((last ** 2).sum()), 1e-6)


def item_vectors(t, layout):
    items = t["_embedding_module._item_emb.weight"]
    if layout.get("item_l2_norm", True):
        items = items / np.maximum(np.sqrt((items ** 2).sum(-1, keepdims=True)), 1e-6)
    return items


def checkpoint(case, rng):
    """Tensors and sidereal.json."""
    items, ratings, heads, keys, values, layers, positions, window, buckets = CASES[case]
    columns = items + (ratings or 0)
    layout = {"family": case.split("/")[0], "num_heads": heads, "max_items": window}
    if case == "hstu/rated":
        layout |= {"concat_ua": True, "user_embedding_norm": "layer_norm", "item_l2_norm": False}
    if case == "hstu/plain":
        layout |= {"linear_activation": "none"}
    t = {"_embedding_module._item_emb.weight": draw(rng, ITEMS + 1, items),
         "_input_features_preproc._pos_emb.weight": draw(rng, positions, columns)}
    if ratings:
        t["_input_features_preproc._rating_emb.weight"] = draw(rng, NUM_RATINGS, ratings)
    for layer in range(layers):
        if case.startswith("sasrec"):
            p, f = f"attention_layers.{layer}.", f"forward_layers.{layer}._conv1d."
            t |= {p + "in_proj_weight": draw(rng, 3 * columns, columns), p + "in_proj_bias": draw(rng, 3 * columns)}
            t |= linear_weights(rng, p + "out_proj", columns, columns)
            t |= {f + "0.weight": draw(rng, INNER, columns, 1), f + "0.bias": draw(rng, INNER),
                  f + "3.weight": draw(rng, columns, INNER, 1), f + "3.bias": draw(rng, columns)}
            continue
        p = f"_hstu._attention_layers.{layer}."
        t[p + "_uvqk"] = draw(rng, columns, 2 * heads * (keys + values))
        width = heads * values * (3 if layout.get("concat_ua") else 1)
        t[p + "_o.weight"], t[p + "_o.bias"] = draw(rng, columns, width), draw(rng, columns)
        if buckets is None:
            t[p + "_rel_attn_bias._w"] = draw(rng, 2 * positions - 1)
        else:
            t[p + "_rel_attn_bias._pos_w"] = draw(rng, 2 * positions - 1)
            t[p + "_rel_attn_bias._ts_w"] = draw(rng, buckets + 1)
    return t, layout


def histories(rng, window):
    """(row, time, rating) of each entry, and the time of the request."""
    made = []
    for length in [0, 1, 2, 3, window - 1, window, window + 4]:
        time, history = 1_600_000_000, []
        for row in rng.integers(1, ITEMS + 1, length):
            history.append((int(row), time, int(rng.integers(0, NUM_RATINGS))))
            time += int(math.exp(rng.uniform(0, 18)))  # seconds to years
        made.append((history, time))
    return made


def make():
    for number, case in enumerate(CASES):
        rng = np.random.default_rng(2100 + number)
        tensors, layout = checkpoint(case, rng)
        folder = os.path.join(HERE, case)
        os.makedirs(folder, exist_ok=True)
        write_safetensors(os.path.join(folder, "model.safetensors"), tensors)
        with open(os.path.join(folder, "sidereal.json"), "w") as file:
            file.write(json.dumps(layout) + "\n")
        with open(os.path.join(folder, "item_rows.json"), "w") as file:
            file.write(json.dumps(NAMES) + "\n")
        with open(os.path.join(folder, "items.jsonl"), "w") as file:
            for row, name in enumerate(NAMES):
                if name:
                    file.write(json.dumps({"item": name, "sid": [row % 5, row]}) + "\n")
        cases = []
        for history, time in histories(rng, CASES[case][7]):
            query = query_vector(case, tensors, layout, history, time)
            best = None
            if query is not None:
                scores = item_vectors(tensors, layout) @ query
                order = sorted(range(1, ITEMS + 1), key=lambda row: (-scores[row], row))
                best = [[NAMES[row], round(float(scores[row]), 9)] for row in order]
                query = [round(float(value), 9) for value in query]
            entries = [{"item": NAMES[row], "time": at, "rating": rating} for row, at, rating in history]
            cases.append({"history": entries, "time": time, "query": query, "best": best})
        with open(os.path.join(folder, "golden.json"), "w") as file:
            file.write(json.dumps({"cases": cases}) + "\n")
        print(case, sum(value.size for value in tensors.values()), "numbers")


# The published classes.

def jagged_operations():
    """fbgemm's operations on ragged rows, which the modules call, in plain torch."""
    import torch
    library = torch.library.Library("fbgemm", "DEF")
    library.define("asynchronous_complete_cumsum(Tensor lengths) -> Tensor")
    library.define("jagged_to_padded_dense(Tensor values, Tensor[] offsets, int[] max_lengths, float padding_value=0.0) "
                   "-> Tensor")
    library.define("dense_to_jagged(Tensor dense, Tensor[] offsets, SymInt? total_L=None) -> (Tensor, Tensor[])")

    def cumsum(lengths):
        return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])

    def pad(values, offsets, max_lengths, padding_value=0.0):
        ends = offsets[0].tolist()
        out = values.new_full((len(ends) - 1, max_lengths[0], *values.shape[1:]), padding_value)
        for row, (start, end) in enumerate(zip(ends, ends[1:])):
            out[row, :end - start] = values[start:end]
        return out

    def compact(dense, offsets, total_L=None):
        ends = offsets[0].tolist()
        rows = [dense[row, :end - start] for row, (start, end) in enumerate(zip(ends, ends[1:]))]
        return torch.cat(rows), offsets

    library.impl("asynchronous_complete_cumsum", cumsum, "CompositeExplicitAutograd")
    library.impl("jagged_to_padded_dense", pad, "CompositeExplicitAutograd")
    library.impl("dense_to_jagged", compact, "CompositeExplicitAutograd")
    return library


def research(repository):
    import torch
    sys.path.insert(0, repository)
    library = jagged_operations()
    from generative_recommenders.research.modeling.sequential import hstu, sasrec
    from generative_recommenders.research.modeling.sequential import input_features_preprocessors as inputs
    from generative_recommenders.research.modeling.sequential import output_postprocessors as outputs
    from generative_recommenders.research.modeling.sequential.embedding_modules import LocalEmbeddingModule
    for number, case in enumerate(CASES):
        items, ratings, heads, keys, values, layers, positions, window, buckets = CASES[case]
        rng = np.random.default_rng(2100 + number)
        tensors, layout = checkpoint(case, rng)
        if ratings:
            preprocessor = inputs.LearnablePositionalEmbeddingRatedInputFeaturesPreprocessor(
                positions, items, 0.0, ratings, NUM_RATINGS)
        else:
            preprocessor = inputs.LearnablePositionalEmbeddingInputFeaturesPreprocessor(positions, items, 0.0)
        post = (outputs.LayerNormEmbeddingPostprocessor if layout.get("user_embedding_norm") == "layer_norm"
                else outputs.L2NormEmbeddingPostprocessor)(items, 1e-6)
        shared = dict(embedding_module=LocalEmbeddingModule(ITEMS, items), similarity_module=None,
                      input_features_preproc_module=preprocessor, output_postproc_module=post, verbose=False)
        network = sasrec.SASRec(
            window, positions - window, items, layers, heads, INNER, "relu", 0.0, **shared
        ) if case.startswith("sasrec") else hstu.HSTU(
            max_sequence_len=window, max_output_len=positions - window, embedding_dim=items + (ratings or 0),
            num_blocks=layers, num_heads=heads, linear_dim=values, attention_dim=keys,
            normalization="rel_bias", linear_config="uvqk", linear_activation=layout.get("linear_activation", "silu"),
            linear_dropout_rate=0.0, attn_dropout_rate=0.0, enable_relative_attention_bias=buckets is not None,
            concat_ua=layout.get("concat_ua", False), **shared)
        for layer in [] if case.startswith("sasrec") else network._hstu._attention_layers:
            if buckets is None:
                layer._rel_attn_bias = hstu.RelativePositionalBias(positions)
            elif buckets != 128:
                layer._rel_attn_bias = hstu.RelativeBucketedTimeAndPositionBasedBias(
                    positions, buckets, lambda x: (torch.log(torch.abs(x).clamp(min=1)) / 0.301).long())
        network = network.double().eval()
        state = {name: torch.tensor(value) for name, value in tensors.items()}
        missing, unexpected = network.load_state_dict(state, strict=False)
        assert not unexpected and all("_attn_mask" in name for name in missing)
        worst = 0.0
        for history, time in histories(rng, window):
            query = query_vector(case, tensors, layout, history, time)
            if query is None:
                continue
            history = history[-window:]
            pad = lambda values: torch.tensor([values + [0] * (positions - len(values))])
            ids = pad([row for row, _, _ in history])
            payloads = {"timestamps": pad([at for _, at, _ in history] + [time]),
                        "ratings": pad([rating for _, _, rating in history])}
            with torch.no_grad():
                theirs = network(torch.tensor([len(history)]), ids, network.get_item_embeddings(ids), payloads)
            worst = max(worst, float(np.abs(theirs[0, len(history) - 1].numpy() - query).max()))
        print(f"{case}: the published modules' vectors differ by {worst:.1e} at most")
        assert worst < 1e-9, case
    del library


if __name__ == "__main__":
    {"make": make, "research": research}[sys.argv[1]](*sys.argv[2:])
