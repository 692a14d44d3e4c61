#!/usr/bin/env python3
"""Train and evaluate networks that give vectors, on the demo's catalogue or on MovieLens 100k.

    python train.py sasrec --data ../industrial --output sasrec       RecBole's layout
    python train.py hstu --data ../industrial --output hstu           the research layout of HSTU
    python train.py hstu --data ml-100k.inter --output FOLDER         the same, with times (RecBole's file of ml-100k)

The demo's rows have no times, so HSTU is trained there with biases by position alone. Sequences and rows are those of
../industrial/train.py: targets of test rows are never trained on. For ml-100k, each user's last item is the test target,
and the last but one the validation's; both are written as rows beside the checkpoint. The loss is the cross-entropy over
all items; HSTU's vectors have length 1 and its products are divided by 0.05, as in the published training. Needs torch
and safetensors; the checkpoint is saved in 16 bits and evaluated from there, in f32.
"""
import argparse
import json
import math
import os
import random
import time

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

WINDOW, COLUMNS, HEADS, LAYERS, DROPOUT = 50, 64, 2, 2, 0.4


class Sasrec(nn.Module):
    """Kang & McAuley 2018, in RecBole's form: norms after, GELU, LN(item + position) first."""

    def __init__(self, num_rows):
        super().__init__()
        self.item_embedding = nn.Embedding(num_rows, COLUMNS, padding_idx=0)
        self.position_embedding = nn.Embedding(WINDOW, COLUMNS)
        self.LayerNorm = nn.LayerNorm(COLUMNS, eps=1e-12)
        self.trm_encoder = nn.ModuleDict({"layer": nn.ModuleList(SasrecBlock() for _ in range(LAYERS))})
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.data.normal_(0, 0.02)

    def forward(self, rows, times):
        positions = torch.arange(rows.shape[1])
        x = self.LayerNorm(self.item_embedding(rows) + self.position_embedding(positions))
        x = F.dropout(x, DROPOUT, self.training)
        mask = torch.ones(len(positions), len(positions), dtype=torch.bool).tril()
        for block in self.trm_encoder["layer"]:
            x = block(x, mask)
        return x

    def logits(self, vectors):
        return vectors @ self.item_embedding.weight.T

    def layout(self):
        return {"family": "sasrec", "num_heads": HEADS}


class SasrecBlock(nn.Module):
    def __init__(self):
        super().__init__()
        names = ("query", "key", "value", "dense")
        self.multi_head_attention = nn.ModuleDict({name: nn.Linear(COLUMNS, COLUMNS) for name in names})
        self.multi_head_attention["LayerNorm"] = nn.LayerNorm(COLUMNS, eps=1e-12)
        self.feed_forward = nn.ModuleDict({"dense_1": nn.Linear(COLUMNS, 4 * COLUMNS), "dense_2": nn.Linear(4 * COLUMNS, COLUMNS),
                                           "LayerNorm": nn.LayerNorm(COLUMNS, eps=1e-12)})

    def forward(self, x, mask):
        a, f = self.multi_head_attention, self.feed_forward
        heads = lambda y: y.view(*y.shape[:2], HEADS, -1).transpose(1, 2)
        q, k, v = (heads(a[name](x)) for name in ("query", "key", "value"))
        scores = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
        y = (F.dropout(scores.softmax(-1), DROPOUT, self.training) @ v).transpose(1, 2).flatten(2)
        x = a["LayerNorm"](F.dropout(a["dense"](y), DROPOUT, self.training) + x)
        y = F.dropout(f["dense_2"](F.gelu(f["dense_1"](x))), DROPOUT, self.training)
        return f["LayerNorm"](y + x)


class Hstu(nn.Module):
    """Zhai et al. 2024, in the form of the research code."""

    def __init__(self, num_rows, has_times):
        super().__init__()
        self.has_times, self.places = has_times, WINDOW + 1
        self._embedding_module = nn.ModuleDict({"_item_emb": nn.Embedding(num_rows, COLUMNS, padding_idx=0)})
        self._input_features_preproc = nn.ModuleDict({"_pos_emb": nn.Embedding(self.places, COLUMNS)})
        for table in (self._embedding_module["_item_emb"], self._input_features_preproc["_pos_emb"]):
            nn.init.trunc_normal_(table.weight, 0, 0.02 if table.padding_idx == 0 else COLUMNS ** -0.5)
        self._hstu = nn.ModuleDict({"_attention_layers": nn.ModuleList(HstuBlock(self.places, has_times) for _ in range(LAYERS))})

    def forward(self, rows, times):
        count = rows.shape[1]
        x = self._embedding_module["_item_emb"](rows) * math.sqrt(COLUMNS)
        x = x + self._input_features_preproc["_pos_emb"](torch.arange(count))
        x = F.dropout(x, DROPOUT, self.training) * (rows != 0)[:, :, None]
        places = self.places - 1 + torch.arange(count)[None, :] - torch.arange(count)[:, None]
        buckets = None
        if self.has_times:
            apart = (times[:, 1:, None] - times[:, None, :-1]).abs().clamp(min=1).float()
            buckets = (apart.log() / 0.301).long().clamp(max=128)
        mask = torch.ones(count, count).tril()
        for block in self._hstu["_attention_layers"]:
            x = block(x, places, buckets, mask)
        return F.normalize(x, dim=-1, eps=1e-6)

    def logits(self, vectors):
        return vectors @ F.normalize(self._embedding_module["_item_emb"].weight, dim=-1, eps=1e-6).T / 0.05

    def layout(self):
        return {"family": "hstu", "num_heads": HEADS, "max_items": WINDOW}


class Bias(nn.Module):
    def __init__(self, places, has_times):
        super().__init__()
        if has_times:
            self._pos_w = nn.Parameter(torch.randn(2 * places - 1) * 0.02)
            self._ts_w = nn.Parameter(torch.randn(129) * 0.02)
        else:
            self._w = nn.Parameter(torch.randn(2 * places - 1) * 0.02)


class HstuBlock(nn.Module):
    def __init__(self, places, has_times):
        super().__init__()
        self.places = places
        self._uvqk = nn.Parameter(torch.randn(COLUMNS, 4 * COLUMNS) * 0.02)
        self._o = nn.Linear(COLUMNS, COLUMNS)
        nn.init.xavier_uniform_(self._o.weight)
        self._rel_attn_bias = Bias(places, has_times)

    def forward(self, x, places, buckets, mask):
        norm = lambda y: F.layer_norm(y, y.shape[-1:], eps=1e-6)
        u, v, q, k = F.silu(norm(x) @ self._uvqk).chunk(4, dim=-1)
        heads = lambda y: y.view(*y.shape[:2], HEADS, -1).transpose(1, 2)
        bias = self._rel_attn_bias
        scores = heads(q) @ heads(k).transpose(2, 3)
        if buckets is None:
            scores = scores + bias._w[places]
        else:
            scores = scores + (bias._pos_w[places] + bias._ts_w[buckets])[:, None]
        attended = (F.silu(scores) / self.places * mask) @ heads(v)
        gated = u * norm(attended.transpose(1, 2).flatten(2))
        return self._o(F.dropout(gated, DROPOUT, self.training)) + x


def read_lines(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


class Data:
    """Sequences to train on, rows to evaluate on, and which row of the table is which item."""

    def __init__(self, path, holdout):
        if os.path.isdir(path):
            self.items = [row["item"] for row in read_lines(os.path.join(path, "items.jsonl"))]
            valid, test = (read_lines(os.path.join(path, name + ".jsonl")) for name in ("valid", "test"))
            sequences = {}
            for rows, takes_targets in ((valid, not holdout), (test, False)):
                for row in rows:
                    sequence = sequences.setdefault(row["id"].split("-")[0], list(row["history"]))
                    if takes_targets:
                        sequence.append(row["target"])
            self.sequences = [[(item, 0) for item in sequence] for sequence in sequences.values()]
            self.test = valid if holdout else test
            self.has_times = False
        else:
            users = {}
            with open(path) as file:
                next(file)
                for line in file:
                    user, item, _, at = line.split("\t")
                    users.setdefault(user, []).append((int(float(at)), item))
            self.items = sorted({item for events in users.values() for _, item in events}, key=int)
            self.sequences, self.test = [], []
            for user, events in users.items():
                events.sort(key=lambda event: event[0])
                cut = len(events) - (2 if holdout else 1)
                self.sequences.append([(item, at) for at, item in events[:cut]])
                history = [{"item": item, "time": at} for at, item in events[max(0, cut - WINDOW):cut]]
                self.test.append({"id": user, "history": history, "time": events[cut][0], "target": events[cut][1]})
            self.has_times = True
        self.rows = {item: row for row, item in enumerate(self.items, 1)}


def batch_of(data, sequences):
    """Rows, times of rows and of what follows, and targets, padded on the right."""
    longest = max(len(sequence) - 1 for sequence in sequences)
    rows, times, targets = (torch.zeros(len(sequences), longest + extra, dtype=torch.long) for extra in (0, 1, 0))
    for at, sequence in enumerate(sequences):
        ids = torch.tensor([data.rows[item] for item, _ in sequence])
        rows[at, :len(ids) - 1], targets[at, :len(ids) - 1] = ids[:-1], ids[1:]
        times[at, :len(ids)] = torch.tensor([time for _, time in sequence])
    return rows, times, targets


def train(network, data, epochs, batch_size):
    """Windows of a sequence, another one each epoch."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-2 if isinstance(network, Sasrec) else 0)
    steps = epochs * math.ceil(len(data.sequences) / batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 100) * (1 - step / steps))
    begin = time.time()
    for epoch in range(epochs):
        network.train()
        windows = []
        for sequence in data.sequences:
            if len(sequence) > 1:
                end = len(sequence) if len(sequence) <= WINDOW + 1 else random.randint(WINDOW + 1, len(sequence))
                windows.append(sequence[max(0, end - WINDOW - 1):end])
        random.shuffle(windows)
        total = 0.0
        for at in range(0, len(windows), batch_size):
            rows, times, targets = batch_of(data, windows[at:at + batch_size])
            is_real = targets != 0
            logits = network.logits(network(rows, times)[is_real])
            loss = F.cross_entropy(logits, targets[is_real])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        if epoch % 10 == 9 or epoch + 1 == epochs:
            print(f"epoch {epoch + 1}: loss {total / math.ceil(len(windows) / batch_size):.3f}, {time.time() - begin:.0f} s", flush=True)
            print("  " + json.dumps(evaluate(network, data)), flush=True)


@torch.no_grad()
def evaluate(network, data):
    network.eval()
    hits, gains = {5: 0, 10: 0, 20: 0}, {5: 0.0, 10: 0.0, 20: 0.0}
    for at in range(0, len(data.test), 256):
        requests = data.test[at:at + 256]
        sequences = []
        for request in requests:
            history = [(entry["item"], entry["time"]) if isinstance(entry, dict) else (entry, 0) for entry in request["history"]]
            sequences.append(history[-WINDOW:] + [(request["target"], request.get("time", 0))])
        rows, times, _ = batch_of(data, sequences)
        last = torch.tensor([len(sequence) - 2 for sequence in sequences])
        scores = network.logits(network(rows, times)[torch.arange(len(last)), last])
        scores[:, 0] = -math.inf
        target = torch.tensor([data.rows[request["target"]] for request in requests])
        own = scores.gather(1, target[:, None])
        earlier = torch.arange(scores.shape[1])[None, :] < target[:, None]
        ranks = ((scores > own) | ((scores == own) & earlier)).sum(1).tolist()
        for rank in ranks:
            for cutoff in hits:
                if rank < cutoff:
                    hits[cutoff] += 1
                    gains[cutoff] += 1 / math.log2(rank + 2)
    count = len(data.test)
    return {"rows": count} | {f"recall_at_{k}": round(hits[k] / count, 6) for k in hits} | {
        f"ndcg_at_{k}": round(gains[k] / count, 6) for k in gains}


def save(network, data, path, source):
    os.makedirs(path, exist_ok=True)
    state = {name: value.half().contiguous() for name, value in network.state_dict().items()}
    save_file(state, os.path.join(path, "model.safetensors"))
    with open(os.path.join(path, "sidereal.json"), "w") as file:
        file.write(json.dumps(network.layout()) + "\n")
    with open(os.path.join(path, "item_rows.json"), "w") as file:
        file.write(json.dumps([None] + data.items) + "\n")
    if data.has_times:
        with open(os.path.join(path, "test.jsonl"), "w") as file:
            file.writelines(json.dumps(request) + "\n" for request in data.test)
        with open(os.path.join(path, "items.jsonl"), "w") as file:
            for row, item in enumerate(data.items):
                file.write(json.dumps({"item": item, "sid": [row // 256, row % 256]}) + "\n")
    network.load_state_dict({name: value.float() for name, value in load_file(os.path.join(path, "model.safetensors")).items()})
    metrics = evaluate(network, data)
    with open(os.path.join(path, "metrics.json"), "w") as file:
        file.write(json.dumps(metrics, indent=1) + "\n")
    print(json.dumps(metrics))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=("sasrec", "hstu"))
    parser.add_argument("--data", required=True)
    parser.add_argument("--output")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--holdout", action="store_true", help="train without validation targets, and evaluate on them")
    arguments = parser.parse_args()
    torch.manual_seed(7)
    random.seed(7)
    data = Data(arguments.data, arguments.holdout)
    num_rows = len(data.items) + 1
    network = Sasrec(num_rows) if arguments.network == "sasrec" else Hstu(num_rows, data.has_times)
    train(network, data, arguments.epochs, arguments.batch)
    if arguments.output:
        save(network, data, arguments.output, arguments.data)


if __name__ == "__main__":
    main()
