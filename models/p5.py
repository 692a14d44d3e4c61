#!/usr/bin/env python3
"""The golden answers of P5: `python models/p5.py` with torch, tokenizers and transformers (for T5's buckets alone).

P5 (Geng et al. 2022) is T5 with an embedding of the number of each whole word beside that of its tokens, and writes the
next item as its digits. This trains a small SentencePiece-like tokenizer on such prompts, writes a random checkpoint as
P5's trainer saves it, and scores every item after some prompts with the network written out here in f64.
"""
import json
import os

import torch
from golden import HERE, randomise
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.models.t5.modeling_t5 import T5Attention

FOLDER = os.path.join(HERE, "phrases", "p5")
VOCABULARY, WIDTH, HEADS, HEAD_DIM, INNER, BLOCKS, WORDS = 160, 24, 2, 8, 40, 2, 64
PAD, END = 0, 1
# Items of any length, many of them the beginning of others.
ITEMS = sorted({str(pow(7, at, 100003) % 10 ** (1 + at % 6)) for at in range(300)}, key=lambda item: (len(item), item))
PROMPT = ("Given the purchase history of user_{{ user }} : {% for item in items %}{{ ', ' if not loop.first else '' }}"
          "{{ item.item }}{% endfor %} . What is the next item ?")


def prompt(user, history):
    return f"Given the purchase history of user_{user} : {', '.join(history)} . What is the next item ?"


def make_tokenizer():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    texts = [prompt(at, ITEMS[at % 250:][:9]) for at in range(400)]
    trainer = trainers.UnigramTrainer(vocab_size=VOCABULARY - 10, special_tokens=["<pad>", "</s>", "<unk>"],
                                      unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>",
                                                             special_tokens=[("</s>", END)])
    tokenizer.save(os.path.join(FOLDER, "tokenizer.json"), pretty=False)
    return tokenizer


def shapes():
    yield "shared.weight", (VOCABULARY, WIDTH)
    yield "encoder.whole_word_embeddings.weight", (WORDS, WIDTH)
    for stack, kinds in (("encoder", ["SelfAttention"]), ("decoder", ["SelfAttention", "EncDecAttention"])):
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
            yield f"{layer}.DenseReluDense.wi.weight", (INNER, WIDTH)
            yield f"{layer}.DenseReluDense.wo.weight", (WIDTH, INNER)
            yield f"{layer}.layer_norm.weight", (WIDTH,)


def whole_words(pieces):
    """P5's `calculate_whole_word_ids`: the word of each piece, and 0 for the end."""
    numbers, word = [], 0
    for piece in pieces[:-1]:
        word += piece.startswith("▁")
        numbers.append(word)
    return [*numbers, 0]


class Network:
    """The checkpoint in f64."""

    def __init__(self, tensors):
        self.t = {name: tensor.double() for name, tensor in tensors.items()}

    def norm(self, x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * self.t[f"{name}.weight"]

    def attend(self, x, memory, name, bias):
        def heads(y, part):
            return (y @ self.t[f"{name}.{part}.weight"].T).view(len(y), HEADS, HEAD_DIM).transpose(0, 1)
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
            y = (y @ self.t[f"{layer}.DenseReluDense.wi.weight"].T).relu()
            x = x + y @ self.t[f"{layer}.DenseReluDense.wo.weight"].T
        return self.norm(x, f"{stack}.final_layer_norm")

    def read(self, ids, words):
        x = self.t["shared.weight"][ids] + self.t["encoder.whole_word_embeddings.weight"][words]
        return self.stack(x, "encoder")

    def score(self, memory, tokens):
        """The log-probability of an output, the end included."""
        hidden = self.stack(self.t["shared.weight"][[PAD, *tokens[:-1]]], "decoder", memory)
        logits = hidden * WIDTH ** -0.5 @ self.t["shared.weight"].T
        return sum(torch.log_softmax(row, -1)[token].item() for row, token in zip(logits, tokens))


def main():
    os.makedirs(FOLDER, exist_ok=True)
    torch.manual_seed(5)
    tokenizer = make_tokenizer()
    tensors = {name: torch.empty(shape) for name, shape in shapes()}
    for name, tensor in tensors.items():
        randomise(tensor, "shared" in name or "whole_word" in name)
    saved = {f"module.{name}": tensor for name, tensor in tensors.items()}
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        saved[f"module.{name}"] = tensors["shared.weight"]
    torch.save(saved, os.path.join(FOLDER, "beauty-small.pth"))
    config = dict(architectures=["P5Pretraining"], model_type="t5", d_model=WIDTH, d_kv=HEAD_DIM, d_ff=INNER,
                  num_layers=BLOCKS, num_heads=HEADS, vocab_size=VOCABULARY, feed_forward_proj="relu",
                  relative_attention_num_buckets=32, is_encoder_decoder=True, tie_word_embeddings=True, pad_token_id=PAD,
                  eos_token_id=END, decoder_start_token_id=PAD, losses="rating,sequential", whole_word_embed=True)
    json.dump(config, open(os.path.join(FOLDER, "config.json"), "w"), indent=1)
    layout = {"phrases": "items", "prompt": {"pieces": [{"text": PROMPT, "special_tokens": True}]}}
    json.dump(layout, open(os.path.join(FOLDER, "sidereal.json"), "w"), indent=1)
    network, cases = Network(tensors), []
    for user, length in ((7, 5), (12345, 20), (3, 1)):
        history = [ITEMS[at * 37 % len(ITEMS)] for at in range(user, user + length)]
        encoding = tokenizer.encode(prompt(user, history))
        words = whole_words(encoding.tokens)
        memory = network.read(encoding.ids, words)
        scores = {}
        for item in ITEMS:
            tokens = [*tokenizer.encode(item, add_special_tokens=False).ids, END]
            scores[item] = network.score(memory, tokens)
        cases.append(dict(user=str(user), history=history, input_ids=encoding.ids, words=max(words), scores=scores))
    lengths = {len(tokenizer.encode(item, add_special_tokens=False).ids) for item in ITEMS}
    print(len(ITEMS), "items of", lengths, "tokens; prompts of", [len(case["input_ids"]) for case in cases],
          "tokens and", [case["words"] for case in cases], "words; vocabulary", tokenizer.get_vocab_size())
    json.dump(dict(cases=cases), open(os.path.join(FOLDER, "golden.json"), "w"))


main()
