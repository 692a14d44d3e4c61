#!/usr/bin/env python3
"""Golden answers of networks that give vectors: small random checkpoints, and what they make of histories, in float64.

    python vectors.py make              make the folders below models/sasrec, models/bert4rec and models/gru4rec
    python vectors.py recbole           compare them with the classes of RecBole 1.2.1 (needs torch and recbole)
    python vectors.py pmixer MODEL.PY   compare them with the class in python/model.py of pmixer/SASRec.pytorch (needs torch)

`make` needs NumPy alone. It draws weights, writes them in the layout of the published project, and computes query
vectors and the scores of all items by the formulas of the papers, written out here in loops over positions. `recbole`
loads the same files into RecBole's own modules in float64 and prints the largest difference of the vectors and scores.
"""
import json
import math
import os
import struct
import sys

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
ITEMS = 40
NAMES = [None] + [f"i{row * 7 % 41}" for row in range(1, ITEMS + 1)]  # rows and names in different orders

#        folder                     columns heads inner layers window
CASES = {"sasrec/recbole-small": (12, 2, 20, 2, 9),
         "sasrec/recbole-odd": (7, 1, 5, 1, 70),
         "sasrec/pmixer-before": (10, 2, None, 2, 6),
         "sasrec/pmixer-after": (5, 1, None, 2, 67),
         "bert4rec/small": (12, 3, 16, 2, 8),
         "bert4rec/odd": (9, 1, 4, 1, 66),
         "gru4rec/small": (8, None, 12, 1, 10),
         "gru4rec/deep": (5, None, 7, 2, 50)}


def draw(rng, *shape, scale=0.5):
    """Weights that f32 holds exactly."""
    return rng.normal(0, scale, shape).astype(np.float32).astype(np.float64)


def write_safetensors(path, tensors):
    header, at = {}, 0
    for name, value in tensors.items():
        size = 4 * value.size
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for value in tensors.values():
            file.write(value.astype("<f4").tobytes())


# The formulas.

def layer_norm(x, weight, bias, epsilon):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * weight + bias


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def attention(q, k, v, heads, is_causal):
    """Softmax attention, query by query and head by head."""
    rows, columns = q.shape
    width = columns // heads
    out = np.zeros_like(q)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        for row in range(rows):
            seen = row + 1 if is_causal else rows
            scores = np.array([q[row, part] @ k[other, part] for other in range(seen)]) / math.sqrt(width)
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            out[row, part] = sum(weight * v[other, part] for other, weight in enumerate(weights))
    return out


def recbole_blocks(t, x, heads, is_causal):
    layer = 0
    while f"trm_encoder.layer.{layer}.feed_forward.dense_1.weight" in t:
        p = f"trm_encoder.layer.{layer}."
        linear = lambda name, x: x @ t[p + name + ".weight"].T + t[p + name + ".bias"]
        norm = lambda name, x: layer_norm(x, t[p + name + ".weight"], t[p + name + ".bias"], 1e-12)
        a = "multi_head_attention."
        y = attention(linear(a + "query", x), linear(a + "key", x), linear(a + "value", x), heads, is_causal)
        x = norm(a + "LayerNorm", linear(a + "dense", y) + x)
        y = linear("feed_forward.dense_2", gelu(linear("feed_forward.dense_1", x)))
        x = norm("feed_forward.LayerNorm", y + x)
        layer += 1
    return x


def sasrec_recbole(t, history, heads, window):
    history = history[-window:]
    if not history:
        return None
    x = t["item_embedding.weight"][history] + t["position_embedding.weight"][:len(history)]
    x = layer_norm(x, t["LayerNorm.weight"], t["LayerNorm.bias"], 1e-12)
    return recbole_blocks(t, x, heads, True)[-1]


def bert4rec_recbole(t, history, heads, window):
    history = history[-window:]
    if not history:
        return None
    tokens = history[1:] + [len(t["item_embedding.weight"]) - 1]
    x = t["item_embedding.weight"][tokens] + t["position_embedding.weight"][:len(tokens)]
    x = layer_norm(x, t["LayerNorm.weight"], t["LayerNorm.bias"], 1e-12)
    x = recbole_blocks(t, x, heads, False)[-1]
    x = gelu(x @ t["output_ffn.weight"].T + t["output_ffn.bias"])
    return layer_norm(x, t["output_ln.weight"], t["output_ln.bias"], 1e-12)


def sasrec_pmixer(t, history, heads, window, is_norm_first):
    history = history[-window:]
    tokens = [0] * (window - len(history)) + history
    columns = t["item_emb.weight"].shape[1]
    positions = [place + 1 if token else 0 for place, token in enumerate(tokens)]
    x = t["item_emb.weight"][tokens] * math.sqrt(columns) + t["pos_emb.weight"][positions]
    layer = 0
    while f"attention_layers.{layer}.in_proj_weight" in t:
        norm = lambda name, x: layer_norm(x, t[f"{name}.{layer}.weight"], t[f"{name}.{layer}.bias"], 1e-8)

        def attend(x):
            a = f"attention_layers.{layer}."
            qkv = x @ t[a + "in_proj_weight"].T + t[a + "in_proj_bias"]
            y = attention(qkv[:, :columns], qkv[:, columns:2 * columns], qkv[:, 2 * columns:], heads, True)
            return y @ t[a + "out_proj.weight"].T + t[a + "out_proj.bias"]

        def feed_forward(x):
            f = f"forward_layers.{layer}."
            y = np.maximum(x @ t[f + "conv1.weight"][:, :, 0].T + t[f + "conv1.bias"], 0)
            return y @ t[f + "conv2.weight"][:, :, 0].T + t[f + "conv2.bias"]

        if is_norm_first:
            x = x + attend(norm("attention_layernorms", x))
            x = x + feed_forward(norm("forward_layernorms", x))
        else:
            x = norm("attention_layernorms", x + attend(x))
            x = norm("forward_layernorms", x + feed_forward(x))
        layer += 1
    return layer_norm(x, t["last_layernorm.weight"], t["last_layernorm.bias"], 1e-8)[-1]


def gru4rec_recbole(t, history, window):
    history = history[-window:]
    if not history:
        return None
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    inputs = [t["item_embedding.weight"][row] for row in history]
    layer = 0
    while f"gru_layers.weight_hh_l{layer}" in t:
        w, u = t[f"gru_layers.weight_ih_l{layer}"], t[f"gru_layers.weight_hh_l{layer}"]
        width = u.shape[1]
        state, states = np.zeros(width), []
        for x in inputs:
            a, b = w @ x, u @ state
            reset = sigmoid(a[:width] + b[:width])
            update = sigmoid(a[width:2 * width] + b[width:2 * width])
            new = np.tanh(a[2 * width:] + reset * b[2 * width:])
            state = (1 - update) * new + update * state
            states.append(state)
        inputs = states
        layer += 1
    return t["dense.weight"] @ inputs[-1] + t["dense.bias"]


# The checkpoints.

def norm_weights(rng, name, columns):
    return {name + ".weight": 1 + draw(rng, columns, scale=0.25).astype(np.float32).astype(np.float64),
            name + ".bias": draw(rng, columns)}


def linear_weights(rng, name, num_out, num_in):
    return {name + ".weight": draw(rng, num_out, num_in), name + ".bias": draw(rng, num_out)}


def recbole_tensors(rng, columns, inner, layers, window, num_tokens):
    t = {"item_embedding.weight": draw(rng, num_tokens, columns),
         "position_embedding.weight": draw(rng, window, columns)}
    t["item_embedding.weight"][0] = 0
    t |= norm_weights(rng, "LayerNorm", columns)
    for layer in range(layers):
        p = f"trm_encoder.layer.{layer}."
        for name in ("query", "key", "value", "dense"):
            t |= linear_weights(rng, p + "multi_head_attention." + name, columns, columns)
        t |= norm_weights(rng, p + "multi_head_attention.LayerNorm", columns)
        t |= linear_weights(rng, p + "feed_forward.dense_1", inner, columns)
        t |= linear_weights(rng, p + "feed_forward.dense_2", columns, inner)
        t |= norm_weights(rng, p + "feed_forward.LayerNorm", columns)
    return t


def checkpoint(case, rng):
    """Tensors and sidereal.json."""
    columns, heads, inner, layers, window = CASES[case]
    family = case.split("/")[0]
    layout = {"family": family}
    if family == "gru4rec":
        t = {"item_embedding.weight": draw(rng, ITEMS + 1, columns)}
        t["item_embedding.weight"][0] = 0
        for layer in range(layers):
            t[f"gru_layers.weight_ih_l{layer}"] = draw(rng, 3 * inner, columns if layer == 0 else inner)
            t[f"gru_layers.weight_hh_l{layer}"] = draw(rng, 3 * inner, inner)
        return t | linear_weights(rng, "dense", columns, inner), layout | {"max_items": window}
    layout["num_heads"] = heads
    if family == "bert4rec":
        t = recbole_tensors(rng, columns, inner, layers, window, ITEMS + 2)
        t |= linear_weights(rng, "output_ffn", columns, columns) | norm_weights(rng, "output_ln", columns)
        return t | {"output_bias": draw(rng, ITEMS + 1)}, layout
    if "recbole" in case:
        return recbole_tensors(rng, columns, inner, layers, window, ITEMS + 1), layout
    t = {"item_emb.weight": draw(rng, ITEMS + 1, columns), "pos_emb.weight": draw(rng, window + 1, columns)}
    if "before" in case:  # the rows of the padding are zero in what the project trains, and read as they are
        t["item_emb.weight"][0], t["pos_emb.weight"][0] = 0, 0
    for layer in range(layers):
        t |= norm_weights(rng, f"attention_layernorms.{layer}", columns)
        t |= {f"attention_layers.{layer}.in_proj_weight": draw(rng, 3 * columns, columns),
              f"attention_layers.{layer}.in_proj_bias": draw(rng, 3 * columns)}
        t |= linear_weights(rng, f"attention_layers.{layer}.out_proj", columns, columns)
        t |= norm_weights(rng, f"forward_layernorms.{layer}", columns)
        for name in ("conv1", "conv2"):
            t |= {f"forward_layers.{layer}.{name}.weight": draw(rng, columns, columns, 1),
                  f"forward_layers.{layer}.{name}.bias": draw(rng, columns)}
    t |= norm_weights(rng, "last_layernorm", columns)
    return t, layout | {"norm_first": "before" in case}


def answer(case, t, layout, history):
    """The query vector and the scores of all rows, None where the published program has no input."""
    family, window = layout["family"], CASES[case][4]
    heads = layout.get("num_heads")
    if family == "gru4rec":
        query = gru4rec_recbole(t, history, window)
    elif family == "bert4rec":
        query = bert4rec_recbole(t, history, heads, window)
    elif "item_emb.weight" in t:
        query = sasrec_pmixer(t, history, heads, window, layout["norm_first"])
    else:
        query = sasrec_recbole(t, history, heads, window)
    if query is None:
        return None, None
    items = t["item_emb.weight" if "item_emb.weight" in t else "item_embedding.weight"][:ITEMS + 1]
    return query, items @ query + t.get("output_bias", 0)


def histories(rng, window):
    lens = [0, 1, 2, 3, window - 1, window, window + 4]
    return [[int(row) for row in rng.integers(1, ITEMS + 1, max(0, length))] for length in lens]


def make():
    for number, case in enumerate(CASES):
        rng = np.random.default_rng(1400 + number)
        tensors, layout = checkpoint(case, rng)
        folder = os.path.join(HERE, case)
        os.makedirs(folder, exist_ok=True)
        write_safetensors(os.path.join(folder, "model.safetensors"), tensors)
        with open(os.path.join(folder, "sidereal.json"), "w") as file:
            file.write(json.dumps(layout) + "\n")
        with open(os.path.join(folder, "item_rows.json"), "w") as file:
            names = NAMES if number % 2 == 0 else {name: row for row, name in enumerate(NAMES) if name}
            file.write(json.dumps(names) + "\n")
        with open(os.path.join(folder, "items.jsonl"), "w") as file:
            for row, name in enumerate(NAMES):
                if name:
                    tags = ["even"] if row % 2 == 0 else []
                    file.write(json.dumps({"item": name, "sid": [row % 5, row], "tags": tags}) + "\n")
        cases = []
        for history in histories(rng, CASES[case][4]):
            query, scores = answer(case, tensors, layout, history)
            best = None
            if query is not None:
                order = sorted(range(1, ITEMS + 1), key=lambda row: (-scores[row], row))
                best = [[NAMES[row], round(float(scores[row]), 9)] for row in order]
                query = [round(float(value), 9) for value in query]
            cases.append({"history": [NAMES[row] for row in history], "query": query, "best": best})
        with open(os.path.join(folder, "golden.json"), "w") as file:
            file.write(json.dumps({"cases": cases}) + "\n")
        print(case, sum(value.size for value in tensors.values()), "numbers")


# The published classes.

class Dataset:
    """What a RecBole network asks of its data set."""

    def __init__(self, num_items):
        self.num_items = num_items

    def num(self, field):
        return self.num_items


class Settings(dict):
    """RecBole's configuration, of which a key that is missing is None."""

    def __getitem__(self, key):
        return self.get(key)


def recbole_network(case, tensors):
    import torch
    from recbole.model.sequential_recommender import BERT4Rec, GRU4Rec, SASRec
    columns, heads, inner, layers, window = CASES[case]
    settings = Settings(
        USER_ID_FIELD="user_id", ITEM_ID_FIELD="item_id", LIST_SUFFIX="_list", ITEM_LIST_LENGTH_FIELD="item_length",
        NEG_PREFIX="neg_", MAX_ITEM_LIST_LENGTH=window, device="cpu", n_layers=layers, n_heads=heads,
        hidden_size=inner if case.startswith("gru4rec") else columns, embedding_size=columns, inner_size=inner,
        num_layers=layers, hidden_dropout_prob=0.0, attn_dropout_prob=0.0, dropout_prob=0.0, hidden_act="gelu",
        layer_norm_eps=1e-12, initializer_range=0.02, loss_type="CE", mask_ratio=0.2, MASK_FIELD="MASK_ITEM_SEQ",
        ITEM_SEQ_FIELD="item_id_list")
    network = {"sasrec": SASRec, "bert4rec": BERT4Rec, "gru4rec": GRU4Rec}[case.split("/")[0]]
    network = network(settings, Dataset(ITEMS + 1)).double().eval()
    state = {name: torch.tensor(value, dtype=torch.float64) for name, value in tensors.items()}
    network.load_state_dict(state, strict=True)
    return network


def recbole():
    import torch
    from recbole.data.interaction import Interaction
    for number, case in enumerate(CASES):
        if "pmixer" in case:
            continue
        rng = np.random.default_rng(1400 + number)
        tensors, layout = checkpoint(case, rng)
        network, window = recbole_network(case, tensors), CASES[case][4]
        worst = 0.0
        for history in histories(rng, window):
            query, scores = answer(case, tensors, layout, history)
            if query is None:
                continue
            newest = history[-window:]
            padded = torch.tensor([newest + [0] * (window - len(newest))])
            given = Interaction({"item_id_list": padded, "item_length": torch.tensor([len(newest)])})
            with torch.no_grad():
                theirs = network.full_sort_predict(given).reshape(-1).numpy()
            worst = max(worst, float(np.abs(theirs - scores).max()))
        print(f"{case}: RecBole's scores differ by {worst:.1e} at most")
        assert worst < 1e-9, case


def pmixer(path):
    import importlib.util
    from types import SimpleNamespace

    import torch
    spec = importlib.util.spec_from_file_location("pmixer_model", path)
    published = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(published)
    for number, case in enumerate(CASES):
        if "pmixer" not in case:
            continue
        rng = np.random.default_rng(1400 + number)
        tensors, layout = checkpoint(case, rng)
        columns, heads, _, layers, window = CASES[case]
        settings = SimpleNamespace(device="cpu", norm_first=layout["norm_first"], maxlen=window, hidden_units=columns,
                                   num_blocks=layers, num_heads=heads, dropout_rate=0.0)
        network = published.SASRec(1, ITEMS, settings)
        # Some versions have a window of 200 whatever is asked for.
        network.pos_emb = torch.nn.Embedding(window + 1, columns, padding_idx=0)
        network = network.double().eval()
        network.load_state_dict({name: torch.tensor(value) for name, value in tensors.items()}, strict=True)
        worst = 0.0
        for history in histories(rng, window):
            _, scores = answer(case, tensors, layout, history)
            newest = history[-window:]
            padded = np.array([[0] * (window - len(newest)) + newest])
            with torch.no_grad():
                theirs = network.predict(None, padded, list(range(ITEMS + 1))).reshape(-1).numpy()
            worst = max(worst, float(np.abs(theirs - scores).max()))
        print(f"{case}: pmixer's scores differ by {worst:.1e} at most")
        assert worst < 1e-9, case


if __name__ == "__main__":
    {"make": make, "recbole": recbole, "pmixer": pmixer}[sys.argv[1]](*sys.argv[2:])
