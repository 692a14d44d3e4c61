#!/usr/bin/env python3
"""Golden scores of DLRM-v3's HSTU: small random checkpoints, and what they say of candidates, in float64.

    python dlrm_hstu.py make              make the folders below models/dlrm_hstu
    python dlrm_hstu.py published REPO    compare them with the classes of a checkout of meta-recsys/generative-recommenders
                                          (needs torch)

`make` needs NumPy alone: the formulas are written out here in loops over positions. `published` builds the network of
the published modules (`HSTUTransducer` with its preprocessor, positional encoder, layers and postprocessor,
`DefaultMultitaskModule`), loads the same tensors in float64, and prints the largest difference of the scores.
"""
import importlib.abc
import importlib.machinery
import json
import math
import os
import sys
from unittest.mock import MagicMock

import numpy as np

from hstu import jagged_operations
from vectors import HERE, draw, write_safetensors

T, P, E = "_hstu_transducer.", "_hstu_transducer._input_preprocessor.", "_hstu_transducer._positional_encoder."
ITEMS = 30
CASES = {
    "dlrm_hstu/small": dict(
        width=6, columns=12, inner=10, heads=2, keys=4, values=4, layers=2, positions=40, times=12, max_items=16,
        item_features=["item_id", "category"], rows={"item_id": ITEMS, "category": 5, "user_id": 9, "country": 4},
        context=[("user_id", 0), ("country", 4)], bits=[1, 2, 4], clock=True,
        tasks=[("click", "probability"), ("like", "probability"), ("seconds", "value")],
        layout={"attention_divisor": 24}),
    "dlrm_hstu/odd": dict(
        width=5, columns=9, inner=7, heads=3, keys=3, values=5, layers=3, positions=20, times=9, max_items=80,
        item_features=["item_id"], rows={"item_id": ITEMS}, context=[], bits=[], clock=False,
        tasks=[("rating", "probability")], by_head=True, norm=False,
        layout={"attention_divisor": "own_length", "counted_candidates": 1, "max_attn_len": 20,
                "min_full_attn_seq_len": 3, "hashed": ["item_id"]}),
    "dlrm_hstu/groups": dict(
        width=4, columns=8, inner=6, heads=1, keys=8, values=8, layers=2, positions=64, times=64, max_items=70,
        item_features=["item_id"], rows={"item_id": ITEMS, "user_id": 3, "age": 6}, context=[("user_id", 0), ("age", 0)],
        bits=[1, 2], clock=False, tasks=[("click", "probability")],
        layout={"attention_divisor": 100, "contextual_seq_len": 2, "target_group_size": 4}),
}


def silu(x):
    return x / (1 + np.exp(-x))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def norm(x, epsilon, weight=1.0, bias=0.0):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + epsilon) * weight + bias


def mlp(t, name, x):
    x = x @ t[name + ".0.weight"].T + t[name + ".0.bias"]
    x = x * sigmoid(norm(x, 1e-5, t[name + ".1.weight"], t[name + ".1.bias"]))
    x = x @ t[name + ".2.weight"].T + t[name + ".2.bias"]
    return norm(x, 1e-5, t[name + ".3.weight"], t[name + ".3.bias"]) if name + ".3.weight" in t else x


def seen(layout, row, column, first_target, length):
    """Whether a row sees a column: `_get_valid_attn_mask` of the published code, and groups of targets as
    NVIDIA's recsys-examples have them."""
    contextual = layout.get("contextual_seq_len", 0)
    limit, full = layout.get("max_attn_len", 0), layout.get("min_full_attn_seq_len", 0)
    group = layout.get("target_group_size", 1)
    end = first_target - (contextual - 1 if contextual else 0)
    place = lambda at: min(max(at - contextual + 1, 0) if contextual else at, end)
    i, j = place(row), place(column)
    visible = row == column or i > j
    if row >= first_target and column >= first_target:
        return column <= row and (row - first_target) // group == (column - first_target) // group
    if limit:
        visible = visible and (i - j <= limit or (full > 0 and i >= end - full))
    if contextual:
        visible = visible or (i == 0 and j < end)
    return visible


def scores(case, t, request):
    """`[candidates, tasks]`"""
    c, layout = CASES[case], CASES[case]["layout"]
    columns, heads, keys, values = c["columns"], c["heads"], c["keys"], c["values"]
    history, candidates, time = request["history"][-c["max_items"]:], request["candidates"], request["time"]
    table = lambda name: t[f"_embedding_collection.embeddings.{name}.weight"]
    row_of = lambda name, value: table(name)[value % c["rows"][name] if name in layout.get("hashed", []) else value]
    entries = history + candidates
    own, *further = c["item_features"]
    content = np.stack([row_of(own, entry["item"]) for entry in entries])
    x = mlp(t, P + "_content_embedding_mlp", content)
    features = [content]
    if further:
        more = np.stack([np.concatenate([row_of(name, entry[name]) for name in further]) for entry in entries])
        x = x + mlp(t, P + "_additional_embedding_mlp", more)
        features.append(more)
    if c["bits"]:
        actions = t[P + "_action_encoder._action_embedding_table"]
        rows = [np.concatenate([row * bool(entry["action"] & bit) for row, bit in zip(actions, c["bits"])])
                for entry in history]
        rows += [t[P + "_action_encoder._target_action_embedding_table"][0]] * len(candidates)
        x = x + mlp(t, P + "_action_embedding_mlp", np.stack(rows))
    num_context = len(c["context"])
    counted = layout.get("counted_candidates", 1)
    context = []
    for at, (name, least) in enumerate(c["context"]):
        value = request["features"].get(name)
        embedding = np.zeros(c["width"])
        if value is not None and len(history) + counted >= least:
            embedding = row_of(name, value)
        context.append(embedding @ t[P + "_batched_contextual_linear_weights"][at]
                       + t[P + "_batched_contextual_linear_bias"][at])
    if context:
        x = np.concatenate([np.stack(context), x])
    first_target, length = num_context + len(history), len(x)
    positions, times = t[E + "_position_embeddings_weight"], t[E + "_timestamp_embeddings_weight"]
    seconds = [0] * num_context + [entry["time"] for entry in history] + [time] * len(candidates)
    x = x * math.sqrt(columns)
    for at in range(length):
        place = at if at < num_context else first_target - min(at, first_target) + num_context
        age = int(np.sqrt(np.float32(max(np.float32(time - seconds[at]), np.float32(1e-6))) / np.float32(60)))
        x[at] += positions[min(place, len(positions) - 1)] + times[min(age, len(times) - 1)]
    divisor = layout["attention_divisor"]
    divisor = first_target + counted if divisor == "own_length" else divisor
    for layer in range(c["layers"]):
        p = f"{T}_stu_module._stu_layers.{layer}."
        z = norm(x, 1e-6, t[p + "_input_norm_weight"], t[p + "_input_norm_bias"]) @ t[p + "_uvqk_weight"] + t[p + "_uvqk_beta"]
        u, v, q, k = np.split(z, np.cumsum([heads * values, heads * values, heads * keys]), axis=1)
        u = silu(u)
        attended = np.zeros((length, heads * values))
        for head in range(heads):
            of_keys, of_values = slice(head * keys, (head + 1) * keys), slice(head * values, (head + 1) * values)
            for i in range(length):
                for j in range(length):
                    if seen(layout, i, j, first_target, length):
                        score = q[i, of_keys] @ k[j, of_keys] / math.sqrt(keys)
                        attended[i, of_values] += silu(score) / divisor * v[j, of_values]
        weight, bias = t[p + "_output_norm_weight"], t[p + "_output_norm_bias"]
        if c.get("by_head"):
            normed = norm(attended.reshape(length, heads, values), 1e-6, weight[:, None], bias[:, None])
            normed = normed.reshape(length, heads * values)
        else:
            normed = norm(attended, 1e-6, weight, bias)
        x = x + np.concatenate([u, attended, u * normed], axis=1) @ t[p + "_output_weight"]
    users = x[first_target:]
    post = T + "_output_postprocessor."
    if c["clock"]:
        f = np.float32
        angles = [f(f(np.floor(f(time) / f(unit)) % count) / f(count)) * f(2) * f(3.14) for unit, count in ((3600, 24), (86400, 7))]
        clock = [float(part(np.float64(angle))) for angle in angles for part in (np.cos, np.sin)]
        users = np.concatenate([users, np.tile(clock, (len(users), 1))], axis=1)
        users = users @ t[post + "_time_feature_combiner.weight"].T + t[post + "_time_feature_combiner.bias"]
    if post + "_layer_norm.weight" in t:
        users = norm(users, 1e-5, t[post + "_layer_norm.weight"], t[post + "_layer_norm.bias"])
    else:
        users = users / np.maximum(np.sqrt((users ** 2).sum(-1, keepdims=True)), 1e-6)
    items = mlp(t, "_item_embedding_mlp", np.concatenate(features, axis=1)[len(history):])
    logits = mlp(t, "_multitask_module._prediction_module", users * items)
    kinds = [kind for _, kind in c["tasks"]]
    return np.stack([sigmoid(logits[:, at]) if kind == "probability" else logits[:, at]
                     for at, kind in enumerate(kinds)], axis=1)


def mlp_weights(rng, name, num_in, inner, num_out, has_norm=True):
    t = {name + ".0.weight": draw(rng, inner, num_in), name + ".0.bias": draw(rng, inner),
         name + ".1.weight": 1 + draw(rng, inner, scale=0.25), name + ".1.bias": draw(rng, inner),
         name + ".2.weight": draw(rng, num_out, inner), name + ".2.bias": draw(rng, num_out)}
    if has_norm:
        t |= {name + ".3.weight": 1 + draw(rng, num_out, scale=0.25), name + ".3.bias": draw(rng, num_out)}
    return t


def checkpoint(case, rng):
    """Tensors and sidereal.json."""
    c = CASES[case]
    width, columns, inner, heads = c["width"], c["columns"], c["inner"], c["heads"]
    keys, values = c["keys"], c["values"]
    layout = {"family": "dlrm_hstu", "num_heads": heads, "max_items": c["max_items"], "item_features": c["item_features"],
              "tasks": [{"name": name, "kind": kind} for name, kind in c["tasks"]]} | c["layout"]
    if c["context"]:
        layout["context_features"] = [{"name": name, "min_history": least} if least else name for name, least in c["context"]]
    t = {f"_embedding_collection.embeddings.{name}.weight": draw(rng, rows, width) for name, rows in c["rows"].items()}
    t |= mlp_weights(rng, P + "_content_embedding_mlp", width, inner, columns)
    if len(c["item_features"]) > 1:
        t |= mlp_weights(rng, P + "_additional_embedding_mlp", width * (len(c["item_features"]) - 1), inner, columns)
    if c["bits"]:
        layout |= {"action": "action", "action_bits": c["bits"]}
        t[P + "_action_encoder._action_embedding_table"] = draw(rng, len(c["bits"]), 8)
        t[P + "_action_encoder._target_action_embedding_table"] = draw(rng, 1, 8 * len(c["bits"]))
        t |= mlp_weights(rng, P + "_action_embedding_mlp", 8 * len(c["bits"]), inner, columns)
    if c["context"]:
        t[P + "_batched_contextual_linear_weights"] = draw(rng, len(c["context"]), width, columns)
        t[P + "_batched_contextual_linear_bias"] = draw(rng, len(c["context"]), columns)
    t[E + "_position_embeddings_weight"] = draw(rng, c["positions"], columns)
    t[E + "_timestamp_embeddings_weight"] = draw(rng, c["times"], columns)
    for layer in range(c["layers"]):
        p = f"{T}_stu_module._stu_layers.{layer}."
        t[p + "_uvqk_weight"] = draw(rng, columns, 2 * heads * (keys + values))
        t[p + "_uvqk_beta"] = draw(rng, 2 * heads * (keys + values))
        t[p + "_input_norm_weight"], t[p + "_input_norm_bias"] = 1 + draw(rng, columns, scale=0.25), draw(rng, columns)
        t[p + "_output_weight"] = draw(rng, 3 * heads * values, columns)
        count = heads if c.get("by_head") else heads * values
        t[p + "_output_norm_weight"], t[p + "_output_norm_bias"] = 1 + draw(rng, count, scale=0.25), draw(rng, count)
    post = T + "_output_postprocessor."
    if c["clock"]:
        t[post + "_time_feature_combiner.weight"] = draw(rng, columns, columns + 4)
        t[post + "_time_feature_combiner.bias"] = draw(rng, columns)
    if c.get("norm", True):
        t[post + "_layer_norm.weight"], t[post + "_layer_norm.bias"] = 1 + draw(rng, columns, scale=0.25), draw(rng, columns)
    t |= mlp_weights(rng, "_item_embedding_mlp", width * len(c["item_features"]), inner, columns)
    t |= mlp_weights(rng, "_multitask_module._prediction_module", columns, inner, len(c["tasks"]), has_norm=False)
    return t, layout


def requests(case, rng):
    c = CASES[case]
    window = c["max_items"]
    made = []
    for length, num_candidates in [(1, 1), (2, 5), (window - 1, 3), (window, 9), (window + 3, 20), (0, 2)]:
        time, history = 1_600_000_000, []
        category = lambda item: {"category": item % 5} if "category" in c["rows"] else {}
        for item in rng.integers(1, ITEMS, length):
            entry = {"item": int(item), "time": time, "action": int(rng.integers(0, 8))}
            history.append(entry | category(int(item)))
            time += int(math.exp(rng.uniform(0, 13)))
        candidates = [{"item": int(item)} | category(int(item)) for item in rng.permutation(ITEMS - 1)[:num_candidates] + 1]
        features = {name: int(rng.integers(0, c["rows"][name])) for name, _ in c["context"]}
        if length == 2 and features:
            features.popitem()  # one is unknown
        made.append({"history": history, "candidates": candidates, "time": time, "features": features})
    return made


def make():
    for number, case in enumerate(CASES):
        rng = np.random.default_rng(3100 + number)
        tensors, layout = checkpoint(case, rng)
        folder = os.path.join(HERE, case)
        os.makedirs(folder, exist_ok=True)
        write_safetensors(os.path.join(folder, "model.safetensors"), tensors)
        with open(os.path.join(folder, "sidereal.json"), "w") as file:
            file.write(json.dumps(layout) + "\n")
        with open(os.path.join(folder, "items.jsonl"), "w") as file:
            for item in range(1, ITEMS):
                file.write(json.dumps({"item": str(item), "sid": [item % 5, item]}) + "\n")
        cases = []
        for request in requests(case, rng):
            found = scores(case, tensors, request)
            rows = [[str(candidate["item"]), [round(float(score), 9) for score in row]]
                    for candidate, row in zip(request["candidates"], found)]
            cases.append({"request": request, "scores": rows})
        with open(os.path.join(folder, "golden.json"), "w") as file:
            file.write(json.dumps({"tasks": [name for name, _ in CASES[case]["tasks"]], "cases": cases}) + "\n")
        print(case, sum(value.size for value in tensors.values()), "numbers")


# The published classes.

class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules that the published ones import and that nothing here runs: kernels for GPUs and what is for many machines."""

    NAMES = ("triton", "torchrec", "fbgemm_gpu", "hammer", "libfb")

    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in self.NAMES:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__name__ = [], spec, spec.name
        return module

    def exec_module(self, module):
        pass


def published_network(case, torch):
    from generative_recommenders.common import HammerKernel
    from generative_recommenders.modules.hstu_transducer import HSTUTransducer
    from generative_recommenders.modules.multitask_module import (
        DefaultMultitaskModule, MultitaskTaskType, TaskConfig)
    from generative_recommenders.modules.positional_encoder import HSTUPositionalEncoder
    from generative_recommenders.modules.postprocessors import (
        L2NormPostprocessor, LayerNormPostprocessor, TimestampLayerNormPostprocessor)
    from generative_recommenders.modules.preprocessors import ContextualPreprocessor
    from generative_recommenders.modules.stu import STULayer, STULayerConfig, STUStack
    from generative_recommenders.ops.layer_norm import LayerNorm, SwishLayerNorm
    c, layout = CASES[case], CASES[case]["layout"]
    width, columns, inner = c["width"], c["columns"], c["inner"]
    further = c["item_features"][1:]
    preprocessor = ContextualPreprocessor(
        input_embedding_dim=width, hidden_dim=inner, output_embedding_dim=columns,
        contextual_feature_to_max_length={name: 1 for name, _ in c["context"]},
        contextual_feature_to_min_uih_length={name: least for name, least in c["context"]},
        action_embedding_dim=8, action_feature_name="action", action_weights=c["bits"] or None,
        additional_embedding_features=further, is_inference=True)
    layers = [STULayer(STULayerConfig(
        embedding_dim=columns, num_heads=c["heads"], hidden_dim=c["values"], attention_dim=c["keys"],
        output_dropout_ratio=0.0, causal=True, target_aware=True, max_attn_len=layout.get("max_attn_len"),
        use_group_norm=c.get("by_head", False), contextual_seq_len=0), is_inference=True) for _ in range(c["layers"])]
    if c["clock"]:
        post = TimestampLayerNormPostprocessor(columns, [(3600, 24), (86400, 7)], 1e-5, True)
    else:
        post = LayerNormPostprocessor(columns, 1e-5, True) if c.get("norm", True) else L2NormPostprocessor(True)
    encoder = HSTUPositionalEncoder(c["positions"], c["times"] - 1, columns, len(c["context"]), True)
    transducer = HSTUTransducer(STUStack(layers, True), preprocessor, post, 0.0, encoder, True)
    kinds = {"probability": MultitaskTaskType.BINARY_CLASSIFICATION, "value": MultitaskTaskType.REGRESSION}
    small = lambda num_in, num_out: torch.nn.Sequential(
        torch.nn.Linear(num_in, inner), SwishLayerNorm(inner), torch.nn.Linear(inner, num_out))
    tasks = [TaskConfig(name, 1, kinds[kind]) for name, kind in c["tasks"]]
    multitask = DefaultMultitaskModule(tasks, columns, small, 1.0, True)
    items = torch.nn.Sequential(*small(width * len(c["item_features"]), columns), LayerNorm(columns))
    network = torch.nn.ModuleDict({"_hstu_transducer": transducer, "_item_embedding_mlp": items,
                                   "_multitask_module": multitask})
    for module in network.modules():
        if hasattr(module, "set_hammer_kernel"):
            module.set_hammer_kernel(HammerKernel.PYTORCH)
    return network.float().eval()


def published_scores(case, network, tables, request, torch):
    """One candidate at a time, so that neither the divisor nor what is counted depends on their number."""
    c, layout = CASES[case], CASES[case]["layout"]
    history, num_context = request["history"][-c["max_items"]:], len(c["context"])
    own, *further = c["item_features"]
    one = lambda value: torch.tensor([value])
    found = []
    for candidate in request["candidates"]:
        entries = history + [candidate]
        content = tables[own][[entry["item"] for entry in entries]]
        payloads = {"action": torch.tensor([entry["action"] for entry in history], dtype=torch.int64)}
        item = [content[-1:]]
        for name in further:
            payloads[name] = tables[name][[entry[name] for entry in entries]]
            item.append(payloads[name][-1:])
        for name, _ in c["context"]:
            value = request["features"].get(name)
            payloads[name] = tables[name][[] if value is None else [value]]
            payloads[name + "_offsets"] = torch.tensor([0, 0 if value is None else 1])
        longest = len(history) + 1
        if layout["attention_divisor"] != "own_length":
            longest = layout["attention_divisor"] - num_context
        user, _ = network["_hstu_transducer"](
            max_uih_len=longest - 1, max_targets=1, total_uih_len=len(history), total_targets=1,
            seq_lengths=one(len(entries)), seq_embeddings=content,
            seq_timestamps=torch.tensor([entry["time"] for entry in history] + [request["time"]]), num_targets=one(1),
            seq_payloads=payloads)
        items = network["_item_embedding_mlp"](torch.cat(item, dim=1))
        predictions = network["_multitask_module"](user, items, {}, {})[0]
        found.append(predictions[:, 0].numpy())
    return np.stack(found)


def published(repository):
    import torch
    sys.meta_path.insert(0, Absent())
    sys.path.insert(0, repository)
    library = jagged_operations()
    from generative_recommenders.ops.pytorch.pt_hstu_attention import _get_valid_attn_mask
    rng = np.random.default_rng(1)
    for _ in range(300):
        length = int(rng.integers(1, 20))
        first_target = int(rng.integers(1, length + 1))
        layout = {"contextual_seq_len": int(rng.integers(0, min(first_target, 4) + 1)),
                  "max_attn_len": int(rng.integers(0, 8)), "min_full_attn_seq_len": int(rng.integers(0, 4))}
        theirs = _get_valid_attn_mask(
            torch.device("cpu"), True, length, torch.tensor([length]), torch.tensor([length - first_target]),
            layout["max_attn_len"], layout["contextual_seq_len"], layout["min_full_attn_seq_len"])[0]
        own = [[seen(layout, i, j, first_target, length) for j in range(length)] for i in range(length)]
        assert (theirs.numpy() == np.array(own)).all(), layout
    print("300 masks are equal")
    for number, case in enumerate(CASES):
        if "target_group_size" in CASES[case]["layout"]:
            continue  # of NVIDIA's code
        # The layers take no such tail, and hash nothing.
        CASES[case]["layout"].pop("min_full_attn_seq_len", None)
        rng = np.random.default_rng(3100 + number)
        tensors, _ = checkpoint(case, rng)
        network = published_network(case, torch)
        tables = {name: torch.tensor(tensors[f"_embedding_collection.embeddings.{name}.weight"]).float()
                  for name in CASES[case]["rows"]}
        state = {name: torch.tensor(value).float() for name, value in tensors.items() if "_embedding_collection" not in name}
        missing, unexpected = network.load_state_dict(state, strict=False)
        known = ("_period_units", "_units_per_period", "_combined_action_weights", "_additional_embedding_mlp")
        assert not unexpected and all(any(name in left for name in known) for left in missing), (missing, unexpected)
        worst = 0.0
        for request in requests(case, rng):
            with torch.no_grad():
                theirs = published_scores(case, network, tables, request, torch)
            worst = max(worst, float(np.abs(theirs - scores(case, tensors, request)).max()))
        print(f"{case}: the published modules' scores, in f32, differ by {worst:.1e} at most")
        assert worst < 1e-4, case
    del library


if __name__ == "__main__":
    {"make": make, "published": published}[sys.argv[1]](*sys.argv[2:])
