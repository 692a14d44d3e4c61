"""What Sidereal is compared with: three ways to run the same search in PyTorch.

hf      Hugging Face `generate` with `prefix_allowed_tokens_fn`
torch   prefill once, expand the cache to the beams, the trie on tensors: what a good engineer writes in an afternoon
shared  the network written out in plain tensor operations, the context's keys and values shared by all beams

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
    """The arithmetic of T5 on the checkpoint's tensors, its products in `dtype`."""

    def __init__(self, model, dtype=torch.float32):
        config, self.dtype = model.config, dtype
        is_f32 = lambda name: "layer_norm" in name or "relative_attention_bias" in name
        self.weights = {name: tensor.detach() if is_f32(name) else tensor.detach().to(dtype)
                        for name, tensor in model.state_dict().items()}
        self.heads, self.head_dim, self.epsilon = config.num_heads, config.d_kv, config.layer_norm_epsilon
        self.encoder_layers, self.decoder_layers = config.num_layers, config.num_decoder_layers
        self.buckets, self.max_distance = config.relative_attention_num_buckets, config.relative_attention_max_distance
        is_scaled = getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)
        self.scale = config.d_model ** -0.5 if is_scaled else 1.0

    def norm(self, x, name):
        x = x.float()
        return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon) * self.weights[name]).to(self.dtype)

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
        return table[first + torch.where(back < exact, back, far)].to(self.dtype)

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


class WrittenOutQwen3:
    """The arithmetic of Qwen3 on the checkpoint's tensors, its products in `dtype`."""

    def __init__(self, model, dtype=torch.float32):
        config, self.dtype = model.config, dtype
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        self.epsilon, self.num_layers = config.rms_norm_eps, config.num_hidden_layers
        tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        self.norms = {name: tensor for name, tensor in tensors.items() if "norm" in name}
        self.embedding = tensors["model.embed_tokens.weight"].to(dtype)
        self.head = self.embedding if config.tie_word_embeddings else tensors["lm_head.weight"].to(dtype)
        join = lambda layer, *names: torch.cat([tensors[f"model.layers.{layer}.{name}.weight"] for name in names]).to(dtype)
        self.qkv = [join(layer, *(f"self_attn.{part}_proj" for part in "qkv")) for layer in range(self.num_layers)]
        self.out = [join(layer, "self_attn.o_proj") for layer in range(self.num_layers)]
        self.gate_up = [join(layer, "mlp.gate_proj", "mlp.up_proj") for layer in range(self.num_layers)]
        self.down = [join(layer, "mlp.down_proj") for layer in range(self.num_layers)]
        theta = config.rope_parameters["rope_theta"]
        self.frequencies = theta ** (-torch.arange(0, self.head_dim, 2).float() / self.head_dim)

    def norm(self, x, name):
        x = x.float()
        return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon) * self.norms[name]).to(self.dtype)

    def rotate(self, x, positions):
        angles = positions[:, None, None].float() * self.frequencies
        low, high = x.float().chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(self.dtype)

    def project(self, x, layer, positions):
        """Queries, keys and values, `[rows, heads, head_dim]`."""
        rows = F.linear(self.norm(x, f"model.layers.{layer}.input_layernorm.weight"), self.qkv[layer])
        q, k, v = rows.view(len(x), -1, self.head_dim).split([self.heads, self.kv_heads, self.kv_heads], 1)
        name = f"model.layers.{layer}.self_attn"
        q, k = self.norm(q, f"{name}.q_norm.weight"), self.norm(k, f"{name}.k_norm.weight")
        return self.rotate(q, positions), self.rotate(k, positions), v

    def finish(self, x, mixed, layer):
        x = x + F.linear(mixed, self.out[layer])
        y = self.norm(x, f"model.layers.{layer}.post_attention_layernorm.weight")
        gate, up = F.linear(y, self.gate_up[layer]).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down[layer])

    def logits(self, x):
        return F.linear(self.norm(x, "model.norm.weight"), self.head)

    def prefill(self, prompt):
        """The last row's logits, and keys and values of each layer, `[kv_heads, tokens, head_dim]`."""
        x, positions, contexts = self.embedding[torch.tensor(prompt)], torch.arange(len(prompt)), []
        for layer in range(self.num_layers):
            q, k, v = (part.transpose(0, 1).contiguous() for part in self.project(x, layer, positions))
            contexts.append((k, v))
            is_last = layer + 1 == self.num_layers
            if is_last:
                q, x = q[:, -1:], x[-1:]
            mixed = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=not is_last, enable_gqa=True)
            x = self.finish(x, mixed[0].transpose(0, 1).flatten(1), layer)
        return self.logits(x), contexts

    def step(self, tokens, position, tails, contexts):
        """One position of all beams; `tails` hold each layer's own keys and values."""
        x, grown, beams = self.embedding[tokens], [], len(tokens)
        group, positions = self.heads // self.kv_heads, torch.full((beams,), position)
        together = lambda y: y.transpose(0, 1).reshape(self.kv_heads, beams * group, -1)
        apart = lambda y: y.view(self.kv_heads, beams, group, -1).transpose(0, 1)
        for layer in range(self.num_layers):
            q, k, v = self.project(x, layer, positions)
            k, v = k[:, :, None], v[:, :, None]
            if tails:
                k, v = torch.cat([tails[layer][0], k], 2), torch.cat([tails[layer][1], v], 2)
            grown.append((k, v))
            keys, values = contexts[layer]
            q, length = q.view(beams, self.kv_heads, group, self.head_dim), keys.shape[1]
            scores = torch.cat([apart(together(q) @ keys.transpose(1, 2)), q @ k.transpose(2, 3)], -1)
            shares = torch.softmax(scores.float() * self.head_dim ** -0.5, -1).to(self.dtype)
            mixed = apart(together(shares[..., :length]) @ values) + shares[..., length:] @ v
            x = self.finish(x, mixed.reshape(beams, -1), layer)
        return self.logits(x), grown


def shared_context(network, trie, levels, width, prompt):
    if isinstance(network, WrittenOutQwen3):
        logits, contexts = network.prefill(prompt)
        first, tails = len(prompt) - 1, []
    else:
        contexts = network.contexts(prompt)
        logits, first, tails = None, 0, []
    beams, tokens = Beams(trie, width), torch.zeros(1, dtype=torch.long)
    for level in range(levels):
        if logits is None:
            logits, tails = network.step(tokens, first + level, tails, contexts)
        parents = beams.advance(logits)
        logits = None
        tails = [(keys[parents], values[parents]) for keys, values in tails]
        tokens = beams.newest
    return beams.answer()


def check_near(name, found, expected, most):
    """In 16 bits: scores of what both found are near each other, and four in five were found by both."""
    expected, found = dict(pair for pair in expected if pair[1] > -1e8), dict(found)
    common = found.keys() & expected.keys()
    worst = max(abs(found[tokens] - expected[tokens]) for tokens in common)
    assert worst <= most and len(common) >= 0.8 * len(found), f"{name}: {len(common)} of {len(found)}, off by {worst}"


def check_equal(name, found, expected):
    """Rank by rank; neighbours may swap where their scores are as good as equal."""
    expected = [(tokens, score) for tokens, score in expected if score > -1e8]  # padding of `generate`
    scores = dict(expected)
    assert len(found) == len(expected), f"{name}: {len(found)} answers, not {len(expected)}"
    for (tokens, score), (_, at_rank) in zip(found, expected):
        assert tokens in scores and abs(scores[tokens] - score) < 1e-4 and abs(at_rank - score) < 1e-4, \
            f"{name}: {tokens} scores {score}, not {scores.get(tokens)} (rank's {at_rank})"
