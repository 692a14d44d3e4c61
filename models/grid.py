"""The golden answers of GRID's network: `python models/grid.py` with torch and transformers (for T5's buckets alone).

GRID (Ju et al. 2025) trains TIGER as T5 stacks under other names: one table for the codes of all levels, a separator
row after each item, a start row, a head for each level, an optional row for the user, and feed-forward layers of n
hidden layers with biases. This writes a random checkpoint of a small one as Lightning saves it, and what the network,
written out here in f64, finds among the items of a real catalogue.
"""

import json
import os

import torch
from golden import HERE, children_of, randomise, read_codes, search
from transformers.models.t5.modeling_t5 import T5Attention

LEVELS, CODES, WIDTH, HEADS, HEAD_DIM, INNER, BLOCKS, HIDDEN, USERS = 3, 256, 24, 2, 8, 40, 2, 2, 7
SEPARATOR = LEVELS * CODES
FOLDER = os.path.join(HERE, "t5/grid")


def shapes():
    yield "item_sid_embedding_table_encoder.weight", (LEVELS * CODES, WIDTH)
    yield "sep_token", (1, WIDTH)
    yield "user_embedding.weight", (USERS, WIDTH)
    yield "decoder.bos_token", (1, WIDTH)
    for level in range(LEVELS):
        yield f"decoder.decoder_mlp.{level}.weight", (CODES, WIDTH)
    for stack, kinds in (("encoder.encoder.encoder", ["SelfAttention"]),
                         ("decoder.decoder", ["SelfAttention", "EncDecAttention"])):
        yield f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, HEADS)
        yield f"{stack}.final_layer_norm.weight", (WIDTH,)
        for block in range(BLOCKS):
            for at, kind in enumerate(kinds):
                layer = f"{stack}.block.{block}.layer.{at}"
                for name in "qkv":
                    yield f"{layer}.{kind}.{name}.weight", (HEADS * HEAD_DIM, WIDTH)
                yield f"{layer}.{kind}.o.weight", (WIDTH, HEADS * HEAD_DIM)
                yield f"{layer}.layer_norm.weight", (WIDTH,)
            layer = f"{stack}.block.{block}.layer.{len(kinds)}"
            yield f"{layer}.layer_norm.weight", (WIDTH,)
            sizes = [WIDTH, *[INNER] * HIDDEN, WIDTH]
            # Between linear layers stand an activation and a dropout, before the first there is none.
            for at, (into, out) in zip([0, *range(2, 99, 3)], zip(sizes, sizes[1:])):
                yield f"{layer}.mlp.model.{at}.weight", (out, into)
                yield f"{layer}.mlp.model.{at}.bias", (out,)


class Network:
    """The checkpoint in f64, asked for the logits after prefixes of a prompt."""

    def __init__(self, tensors):
        self.t = {name: tensor.double() for name, tensor in tensors.items()}
        rows = ["item_sid_embedding_table_encoder.weight", "sep_token", "decoder.bos_token", "user_embedding.weight"]
        self.rows = torch.cat([self.t[name] for name in rows])

    def norm(self, x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * self.t[f"{name}.weight"]

    def attend(self, x, memory, name, bias):
        heads = lambda y, part: (y @ self.t[f"{name}.{part}.weight"].T).view(len(y), HEADS, HEAD_DIM).transpose(0, 1)
        scores = heads(x, "q") @ heads(memory, "k").transpose(1, 2) + bias
        mixed = torch.softmax(scores, -1) @ heads(memory, "v")
        return mixed.transpose(0, 1).reshape(len(x), -1) @ self.t[f"{name}.o.weight"].T

    def bias(self, length, stack, is_bidirectional):
        distances = torch.arange(length)[None] - torch.arange(length)[:, None]
        buckets = T5Attention._relative_position_bucket(distances, is_bidirectional, 32, 128)
        table = self.t[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        bias = table[buckets].permute(2, 0, 1)
        return bias if is_bidirectional else bias.masked_fill(distances > 0, -torch.inf)

    def stack(self, x, stack, memory=None):
        bias = self.bias(len(x), stack, memory is None)
        for block in range(BLOCKS):
            layer = f"{stack}.block.{block}.layer.0"
            y = self.norm(x, f"{layer}.layer_norm")
            x = x + self.attend(y, y, f"{layer}.SelfAttention", bias)
            if memory is not None:
                layer = f"{stack}.block.{block}.layer.1"
                x = x + self.attend(self.norm(x, f"{layer}.layer_norm"), memory, f"{layer}.EncDecAttention", 0)
            layer = f"{stack}.block.{block}.layer.{1 if memory is None else 2}"
            y = self.norm(x, f"{layer}.layer_norm")
            for hidden in range(HIDDEN + 1):
                name = f"{layer}.mlp.model.{3 * hidden - 1 if hidden else 0}"
                y = y @ self.t[f"{name}.weight"].T + self.t[f"{name}.bias"]
                y = y if hidden == HIDDEN else y.relu()
            x = x + y
        return self.norm(x, f"{stack}.final_layer_norm")

    def logits(self, prompt, prefixes):
        memory = self.stack(self.rows[prompt], "encoder.encoder.encoder")
        logits = torch.full((len(prefixes), 1, LEVELS * CODES), -torch.inf, dtype=torch.float64)
        for row, prefix in zip(logits, prefixes):
            state = self.stack(self.rows[[SEPARATOR + 1, *prefix]], "decoder.decoder", memory)[-1]
            level = len(prefix)
            head = self.t[f"decoder.decoder_mlp.{level}.weight"]
            row[0, level * CODES:(level + 1) * CODES] = head @ state
        return logits


def main():
    torch.manual_seed(3)
    tensors = {name: torch.empty(shape) for name, shape in shapes()}
    for name, tensor in tensors.items():
        randomise(tensor, tensor.dim() > 1 and "block" not in name and "mlp" not in name)
        if name.endswith(".bias"):
            tensor.copy_(0.3 * torch.randn(tensor.shape))
    os.makedirs(FOLDER, exist_ok=True)
    optimiser = {"state": {0: {"step": 7}}, "param_groups": [{"lr": 1e-3}]}
    torch.save({"epoch": 1, "optimizer_states": [optimiser], "state_dict": tensors}, os.path.join(FOLDER, "last.ckpt"))
    levels = [dict(size=CODES, first_token=CODES * level) for level in range(LEVELS)]
    items = {"items": "{{ sid }}", "separator": [SEPARATOR], "trailing_separator": True}
    pieces = [{"user": {"first_token": SEPARATOR + 2, "bins": USERS}}, items]
    layout = dict(levels=levels, prompt=dict(pieces=pieces), normalize="level")
    json.dump(layout, open(os.path.join(FOLDER, "sidereal.json"), "w"))
    index = "../../catalogs/industrial.index.json"
    tokens = {item: [CODES * level + code for level, code in enumerate(sid)]
              for item, sid in read_codes(FOLDER, index).items()}
    network, children = Network(tensors), children_of(list(tokens.values()))
    generator, golden = torch.Generator().manual_seed(5), []
    for length, width, user in ((6, 10, 3), (1, 30, 12), (3, 120, 700)):
        history = [list(tokens)[i] for i in torch.randint(len(tokens), (length,), generator=generator).tolist()]
        ids = [SEPARATOR + 2 + user % USERS]
        for item in history:
            ids += [*tokens[item], SEPARATOR]
        beams = search(network, ids, (), children, LEVELS, width, True)
        golden.append(dict(input_ids=ids, history=history, user=str(user), width=width,
                           scores=[score for _, score in beams], sequences=[prefix for prefix, _ in beams]))
    json.dump({"items_index": index, "from_history": True, "children": golden},
              open(os.path.join(FOLDER, "golden.json"), "w"))


if __name__ == "__main__":
    main()
