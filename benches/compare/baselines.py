"""What Sidereal is compared with: three ways to run the same search in PyTorch.

hf      Hugging Face `generate` with `prefix_allowed_tokens_fn`
torch   prefill once, expand the cache to the beams, the trie on tensors: what a good engineer writes in an afternoon
shared  T5 written out in plain tensor operations, cross-attention keys and values shared by all beams

Each takes a prompt (a list of tokens) and returns [(tokens, score), ...], best first, normalised over the
whole vocabulary.
"""
import math

import torch
import torch.nn.functional as F
from transformers import AutoConfig, Qwen3ForCausalLM, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput


def load(folder):
    is_t5 = AutoConfig.from_pretrained(folder).model_type == "t5"
    return (T5ForConditionalGeneration if is_t5 else Qwen3ForCausalLM).from_pretrained(folder, dtype=torch.float32).eval()


class Trie:
    """Nodes as numbers; of each its legal tokens and the nodes that they lead to."""

    def __init__(self, sequences):
        nodes, children = {(): 0}, [{}]
        for sequence in sequences:
            for end in range(1, len(sequence) + 1):
                prefix = sequence[:end]
                if prefix not in nodes:
                    nodes[prefix] = len(children)
                    children[nodes[prefix[:-1]]][prefix[-1]] = len(children)
                    children.append({})
        self.nodes = nodes
        self.allowed = [sorted(node) for node in children]
        self.tokens = [torch.tensor(tokens, dtype=torch.long) for tokens in self.allowed]
        self.next = [[node[token] for token in tokens] for node, tokens in zip(children, self.allowed)]


def hugging_face(model, trie, levels, width, prompt):
    is_t5 = model.config.is_encoder_decoder
    start = 1 if is_t5 else len(prompt)

    def allowed(_, sequence):
        node = trie.nodes.get(tuple(sequence[start:].tolist()))
        return trie.allowed[node] if node is not None else []

    tokens = torch.tensor([prompt], device=model.device)
    output = model.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), num_beams=width, num_return_sequences=width,
        max_new_tokens=levels, do_sample=False, length_penalty=0.0, early_stopping=False,
        prefix_allowed_tokens_fn=allowed, return_dict_in_generate=True, output_scores=True)
    sequences = output.sequences[:, start:start + levels].tolist()
    return list(zip(map(tuple, sequences), output.sequences_scores.tolist()))


class Beams:
    """The search itself, the same for `torch` and `shared`."""

    def __init__(self, trie, width):
        self.trie, self.width = trie, width
        self.scores, self.nodes, self.sequences = torch.zeros(1), [0], [()]

    def advance(self, logits):
        """Takes `[beams, vocabulary]`; returns the parents of the new beams."""
        log_p = torch.log_softmax(logits.float(), -1)
        scores, tokens, nodes, parents = [], [], [], []
        for beam, node in enumerate(self.nodes):
            choices = self.trie.tokens[node]
            scores.append(log_p[beam, choices] + self.scores[beam])
            tokens.append(choices)
            nodes += self.trie.next[node]
            parents += [beam] * len(choices)
        scores, tokens = torch.cat(scores), torch.cat(tokens)
        self.scores, best = scores.topk(min(self.width, len(scores)))
        best = best.tolist()
        self.sequences = [self.sequences[parents[i]] + (int(tokens[i]),) for i in best]
        self.nodes = [nodes[i] for i in best]
        self.newest = tokens[torch.tensor(best)]
        return torch.tensor([parents[i] for i in best])

    def answer(self):
        return list(zip(self.sequences, self.scores.tolist()))


def prefill_once(model, trie, levels, width, prompt):
    tokens, beams = torch.tensor([prompt]), Beams(trie, width)
    if model.config.is_encoder_decoder:
        encoded = model.encoder(input_ids=tokens).last_hidden_state
        output = model(encoder_outputs=BaseModelOutput(encoded), decoder_input_ids=torch.zeros(1, 1, dtype=torch.long),
                       use_cache=True)
    else:
        output = model(input_ids=tokens, use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    for level in range(levels):
        parents = beams.advance(output.logits[:, -1])
        if level + 1 == levels:
            return beams.answer()
        cache.reorder_cache(parents)
        newest = beams.newest[:, None]
        if model.config.is_encoder_decoder:
            expanded = BaseModelOutput(encoded.expand(len(newest), -1, -1))
            output = model(encoder_outputs=expanded, decoder_input_ids=newest, past_key_values=cache, use_cache=True)
        else:
            output = model(input_ids=newest, past_key_values=cache, use_cache=True)
        cache = output.past_key_values


class WrittenOutT5:
    """The arithmetic of T5 on the checkpoint's tensors."""

    def __init__(self, model):
        config = model.config
        self.weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        self.heads, self.head_dim, self.epsilon = config.num_heads, config.d_kv, config.layer_norm_epsilon
        self.encoder_layers, self.decoder_layers = config.num_layers, config.num_decoder_layers
        self.buckets, self.max_distance = config.relative_attention_num_buckets, config.relative_attention_max_distance
        is_scaled = getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)
        self.scale = config.d_model ** -0.5 if is_scaled else 1.0

    def norm(self, x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon) * self.weights[name]

    def linear(self, x, name):
        return F.linear(x, self.weights[name])

    def split(self, x):
        return x.view(*x.shape[:-1], self.heads, self.head_dim).transpose(-2, -3)

    def bias(self, stack, distance, is_bidirectional):
        buckets, first = self.buckets, torch.zeros_like(distance)
        if is_bidirectional:
            buckets //= 2
            first = (distance > 0).long() * buckets
            back = distance.abs()
        else:
            back = (-distance).clamp(min=0)
        exact = buckets // 2
        ratio = torch.log(back.float().clamp(min=1) / exact) / math.log(self.max_distance / exact)
        far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
        table = self.weights[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        return table[first + torch.where(back < exact, back, far)]

    def feed_forward(self, x, layer):
        inner = torch.relu(self.linear(self.norm(x, layer + ".layer_norm.weight"), layer + ".DenseReluDense.wi.weight"))
        return x + self.linear(inner, layer + ".DenseReluDense.wo.weight")

    def contexts(self, prompt):
        """Cross-attention keys and values of each decoder layer, `[heads, tokens, head_dim]`."""
        x, positions = self.weights["shared.weight"][torch.tensor(prompt)], torch.arange(len(prompt))
        bias = self.bias("encoder", positions[None] - positions[:, None], True).permute(2, 0, 1)
        for number in range(self.encoder_layers):
            layer = f"encoder.block.{number}.layer.0"
            y = self.norm(x, layer + ".layer_norm.weight")
            q, k, v = (self.split(self.linear(y, f"{layer}.SelfAttention.{part}.weight")) for part in "qkv")
            mixed = torch.softmax(q @ k.transpose(-1, -2) + bias, -1) @ v
            x = x + self.linear(mixed.transpose(0, 1).flatten(1), layer + ".SelfAttention.o.weight")
            x = self.feed_forward(x, f"encoder.block.{number}.layer.1")
        x = self.norm(x, "encoder.final_layer_norm.weight")
        return [[self.split(self.linear(x, f"decoder.block.{number}.layer.1.EncDecAttention.{part}.weight"))
                 for part in "kv"] for number in range(self.decoder_layers)]

    def step(self, tokens, position, tails, contexts):
        """One decoder position of all beams; `tails` hold each layer's own keys and values."""
        x, grown = self.weights["shared.weight"][tokens], []
        distance = torch.arange(position + 1) - position
        bias = self.bias("decoder", distance, False).T[None, :, None]
        for number in range(self.decoder_layers):
            layer = f"decoder.block.{number}.layer.0"
            y = self.norm(x, layer + ".layer_norm.weight")
            q, k, v = (self.linear(y, f"{layer}.SelfAttention.{part}.weight").view(-1, self.heads, 1, self.head_dim)
                       for part in "qkv")
            if tails:
                k, v = torch.cat([tails[number][0], k], 2), torch.cat([tails[number][1], v], 2)
            grown.append((k, v))
            mixed = torch.softmax(q @ k.transpose(-1, -2) + bias, -1) @ v
            x = x + self.linear(mixed.flatten(1), layer + ".SelfAttention.o.weight")
            layer = f"decoder.block.{number}.layer.1"
            y = self.norm(x, layer + ".layer_norm.weight")
            q = self.split(self.linear(y, layer + ".EncDecAttention.q.weight"))
            keys, values = contexts[number]
            mixed = torch.softmax(q @ keys.transpose(-1, -2), -1) @ values
            x = x + self.linear(mixed.transpose(0, 1).flatten(1), layer + ".EncDecAttention.o.weight")
            x = self.feed_forward(x, f"decoder.block.{number}.layer.2")
        x = self.norm(x, "decoder.final_layer_norm.weight") * self.scale
        return F.linear(x, self.weights.get("lm_head.weight", self.weights["shared.weight"])), grown


def shared_context(network, trie, levels, width, prompt):
    contexts, beams = network.contexts(prompt), Beams(trie, width)
    tokens, tails = torch.zeros(1, dtype=torch.long), None
    for level in range(levels):
        logits, tails = network.step(tokens, level, tails, contexts)
        parents = beams.advance(logits)
        tails = [(keys[parents], values[parents]) for keys, values in tails]
        tokens = beams.newest
    return beams.answer()


def check_equal(name, found, expected):
    """Rank by rank; neighbours may swap where their scores are as good as equal."""
    expected = [(tokens, score) for tokens, score in expected if score > -1e8]  # padding of `generate`
    scores = dict(expected)
    assert len(found) == len(expected), f"{name}: {len(found)} answers, not {len(expected)}"
    for (tokens, score), (_, at_rank) in zip(found, expected):
        assert tokens in scores and abs(scores[tokens] - score) < 1e-4 and abs(at_rank - score) < 1e-4, \
            f"{name}: {tokens} scores {score}, not {scores.get(tokens)} (rank's {at_rank})"
