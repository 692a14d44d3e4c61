#!/usr/bin/env python3
"""SASRec: small random checkpoints, what they answer in f64, and the same of RecBole's own class.

    python sasrec.py make CASE...   make the folders sasrec/CASE anew: plain, recbole
    python sasrec.py verify         compare this program with RecBole's class on the cases, in f64

The program below is written out from the paper and RecBole's formulas, in numpy. `make recbole` and `verify` need
torch and recbole 1.2.1 (`pip install recbole==1.2.1`): the first saves a checkpoint as RecBole's trainer does.
"""
import json
import os
import sys

import numpy as np

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "sasrec")
CASES = {
    # items (with the padding), columns, inner columns, layers, heads, positions, activation, epsilon
    "plain": dict(items=300, hidden=24, inner=40, layers=3, heads=3, positions=20, act="relu", epsilon=1e-6),
    "recbole": dict(items=200, hidden=32, inner=64, layers=2, heads=2, positions=12, act="gelu", epsilon=1e-12),
}
HISTORIES = [1, 2, 5, 12, 19, 20, 33]


def shapes(case):
    hidden, inner = case["hidden"], case["inner"]
    yield "item_embedding.weight", (case["items"], hidden)
    yield "position_embedding.weight", (case["positions"], hidden)
    for layer in range(case["layers"]):
        attention, feed_forward = f"trm_encoder.layer.{layer}.multi_head_attention", f"trm_encoder.layer.{layer}.feed_forward"
        for part in ("query", "key", "value", "dense"):
            yield f"{attention}.{part}.weight", (hidden, hidden)
            yield f"{attention}.{part}.bias", (hidden,)
        for part, shape in (("dense_1", (inner, hidden)), ("dense_2", (hidden, inner))):
            yield f"{feed_forward}.{part}.weight", shape
            yield f"{feed_forward}.{part}.bias", shape[:1]
        for norm in (f"{attention}.LayerNorm", f"{feed_forward}.LayerNorm"):
            yield f"{norm}.weight", (hidden,)
            yield f"{norm}.bias", (hidden,)
    yield "LayerNorm.weight", (hidden,)
    yield "LayerNorm.bias", (hidden,)


def weights(case):
    """Numbers of f32, wide enough that attention and scores differ."""
    rng = np.random.default_rng(case["items"])
    found = {}
    for name, shape in shapes(case):
        spread = 0.8 if "embedding" in name else 1.5 / shape[-1] ** 0.5 if len(shape) == 2 else 0.2
        numbers = rng.standard_normal(shape) * spread
        found[name] = (numbers + (1.0 if name.endswith("LayerNorm.weight") else 0.0)).astype(np.float32)
    found["item_embedding.weight"][0] = 0  # the padding
    return found


def erf(x):
    from math import erf
    return np.vectorize(erf)(x)


def scores(case, tensors, history):
    """log p of every item after a history, in f64."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred ** 2).mean(-1, keepdims=True)
        return centred / np.sqrt(variance + case["epsilon"]) * w[name + ".weight"] + w[name + ".bias"]

    def dense(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    activation = {"relu": lambda x: np.maximum(x, 0), "gelu": lambda x: x * 0.5 * (1 + erf(x / np.sqrt(2)))}[case["act"]]
    history = history[-case["positions"]:]
    x = norm(w["item_embedding.weight"][history] + w["position_embedding.weight"][:len(history)], "LayerNorm")
    width = case["hidden"] // case["heads"]
    for layer in range(case["layers"]):
        attention, feed_forward = f"trm_encoder.layer.{layer}.multi_head_attention", f"trm_encoder.layer.{layer}.feed_forward"
        query, key, value = (dense(x, f"{attention}.{part}") for part in ("query", "key", "value"))
        rows = []
        for row in range(len(history)):
            heads = []
            for head in range(case["heads"]):
                columns = slice(head * width, (head + 1) * width)
                products = key[:row + 1, columns] @ query[row, columns] / np.sqrt(width)
                shares = np.exp(products - products.max())
                heads.append(shares / shares.sum() @ value[:row + 1, columns])
            rows.append(np.concatenate(heads))
        x = norm(x + dense(np.array(rows), f"{attention}.dense"), f"{attention}.LayerNorm")
        inner = activation(dense(x, f"{feed_forward}.dense_1"))
        x = norm(x + dense(inner, f"{feed_forward}.dense_2"), f"{feed_forward}.LayerNorm")
    products = w["item_embedding.weight"] @ x[-1]
    return products - products.max() - np.log(np.exp(products - products.max()).sum())


def histories(case):
    rng = np.random.default_rng(7)
    return [rng.integers(1, case["items"], size=size).tolist() for size in HISTORIES]


def recbole_of(case):
    """RecBole's class, without a dataset."""
    import torch
    from recbole.model.sequential_recommender import SASRec

    class Settings(dict):
        def __getitem__(self, key):
            return self.get(key)

    class Dataset:
        def num(self, _):
            return case["items"]

    settings = Settings(
        n_layers=case["layers"], n_heads=case["heads"], hidden_size=case["hidden"], inner_size=case["inner"],
        hidden_dropout_prob=0.5, attn_dropout_prob=0.5, hidden_act=case["act"], layer_norm_eps=case["epsilon"],
        initializer_range=0.02, loss_type="CE", train_neg_sample_args=None, USER_ID_FIELD="user_id", LIST_SUFFIX="_list",
        ITEM_ID_FIELD="item_id", ITEM_LIST_LENGTH_FIELD="item_length", NEG_PREFIX="neg_", device="cpu",
        MAX_ITEM_LIST_LENGTH=case["positions"], data_path="dataset")
    network = SASRec(settings, Dataset())
    network.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in weights(case).items()})
    return network, settings


def save(folder, name, case, tensors):
    network = {"model_type": "sasrec", "n_heads": case["heads"], "hidden_act": case["act"], "layer_norm_eps": case["epsilon"]}
    with open(os.path.join(folder, "sidereal.json"), "w") as file:
        json.dump({"network": network}, file)
        file.write("\n")
    if name == "recbole":
        import torch
        for old in ("float", "complex", "unicode"):  # names that RecBole uses and NumPy 2 has no more
            setattr(np, f"{old}_", {"float": np.float64, "complex": np.complex128, "unicode": np.str_}[old])
        from recbole.config import Config
        module, settings = recbole_of(case)
        config = Config(model="SASRec", dataset="items", config_dict=dict(settings))
        torch.save({"config": config, "epoch": 3, "cur_step": 0, "best_valid_score": 0.1, "state_dict": module.state_dict(),
                    "other_parameter": module.other_parameter(),
                    "optimizer": torch.optim.Adam(module.parameters()).state_dict()},
                   os.path.join(folder, "SASRec.pth"), pickle_protocol=4)
    else:
        from safetensors.numpy import save_file
        save_file(tensors, os.path.join(folder, "model.safetensors"))


def make(name):
    case, folder = CASES[name], os.path.join(HERE, name)
    os.makedirs(folder, exist_ok=True)
    tensors = weights(case)
    save(folder, name, case, tensors)
    with open(os.path.join(folder, "items.jsonl"), "w") as file:
        for item in range(1, case["items"]):
            file.write(json.dumps({"item": f"i{item}", "sid": [item]}) + "\n")
    cases = []
    for history in histories(case):
        found = scores(case, tensors, history)
        best = sorted(range(1, case["items"]), key=lambda item: -found[item])[:20]
        cases.append({"history": [f"i{item}" for item in history], "items": [f"i{item}" for item in best],
                      "scores": [round(float(found[item]), 9) for item in best]})
    with open(os.path.join(folder, "golden.json"), "w") as file:
        json.dump({"cases": cases}, file)
        file.write("\n")


def verify():
    import torch
    for name, case in CASES.items():
        network, _ = recbole_of(case)
        network, tensors = network.double().eval(), weights(case)
        worst = 0.0
        for history in histories(case):
            newest = history[-case["positions"]:]
            padded = newest + [0] * (case["positions"] - len(newest))
            with torch.no_grad():
                row = network.forward(torch.tensor([padded]), torch.tensor([len(newest)]))
                own = torch.log_softmax(row @ network.item_embedding.weight.T, -1)[0].numpy()
            worst = max(worst, np.abs(own - scores(case, tensors, history)).max())
        print(f"{name}: RecBole's class and this program differ by {worst:.1e} at most")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make", *names]:
            for name in names:
                make(name)
        case ["verify"]:
            verify()
        case _:
            sys.exit(__doc__)
