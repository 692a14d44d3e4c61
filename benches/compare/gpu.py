#!/usr/bin/env python3
"""Sidereal on a GPU beside PyTorch: the same machine and shape, in turns within one run.

    cargo build --release --features cuda
    python benches/compare/gpu.py --output gpu.json                the whole table, within 100 seconds
    python benches/compare/gpu.py --case 1000x1                    one row
    python benches/compare/gpu.py --tiny --device cpu              the small shape on a CPU: a check of this program

Needs Python with torch and transformers. The shape is Qwen3-1.7B with 3 levels of 8192 codes added to its
vocabulary, 100,000 random items, 256 beams. Sidereal is `sidereal bench --shape`; weights, items and histories are
drawn from the same distributions on both sides, not from the same generator: the values differ, the arithmetic is the
same. (`compare.py` compares answers on one checkpoint.) Both compute in bf16 and normalise over the whole vocabulary.

hf      Hugging Face `generate` with `prefix_allowed_tokens_fn`, which repeats the context for every beam: only where
        memory holds that
shared  what PyTorch can do: one prefill for all prompts on the fastest fused attention there is; contexts shared by
        beams (flash attention over the context and attention over a beam's own tail, merged by log-sum-exp; no key is
        repeated for a beam or a query head); the trie on the device; fused weights; element-wise operations compiled;
        the whole search, prefill included, one CUDA graph for exactly this batch and length

Before anything is timed `shared` must give the answers of `generate`. Times are milliseconds from prompts on the host
to answers on the host, for all prompts of a group together: medians, after rounds that warm up. Sidereal is timed
between two halves of the others' rounds. Its time for groups of more than one request is the mean over groups, the
first ones included.
"""
import argparse
import contextlib
import functools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time

START = time.monotonic()  # importing torch is part of the time that there is
import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, Qwen3Config

import baselines

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.join(HERE, "..", "..")
# As in src/cli/shapes.rs: number of codes of a level, token of the first one, number of items.
LARGE = {"name": "qwen3-1.7b", "hidden": 2048, "inner": 6144, "layers": 28, "heads": (16, 8, 128), "tied": True,
         "levels": 3, "codes": 8192, "first_token": 151936, "items": 100_000}
SMALL = {"name": "qwen3-small", "hidden": 256, "inner": 768, "layers": 4, "heads": (8, 2, 64), "tied": False,
         "levels": 3, "codes": 256, "first_token": 1000, "items": 10_000}
# Items of a history and prompts of a group, by the row's name.
CASES = {"1000x1": (333, 1), "1000x8": (333, 8), "5000x1": (1666, 1), "5000x8": (1666, 8)}
TINY_CASES = {"100x1": (33, 1), "100x8": (33, 8)}
ROUNDS = {"shared": 5, "hf": 1}  # in each of two halves
SECONDS = {"compile": 40, "prepare": 20, "shared": 10, "hf": 15, "sidereal": 30}  # the most that each may take


class OutOfTime(Exception):
    pass


@contextlib.contextmanager
def at_most(seconds, what):
    """Raises OutOfTime in the main thread after so many seconds."""
    def stop(*_):
        raise OutOfTime(f"{what} took over {seconds:.0f} s")
    if seconds < 0.5:
        raise OutOfTime(f"no time was left for {what}")
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def build(shape, device, dtype):
    """A model with the random weights of `sidereal bench --shape`: their distribution, not their values."""
    num_heads, num_kv_heads, head_dim = shape["heads"]
    config = Qwen3Config(
        vocab_size=shape["first_token"] + shape["levels"] * shape["codes"], hidden_size=shape["hidden"],
        intermediate_size=shape["inner"], num_hidden_layers=shape["layers"], num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads, head_dim=head_dim, tie_word_embeddings=shape["tied"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, max_position_embeddings=40960, pad_token_id=0,
        bos_token_id=1, eos_token_id=2)
    torch.manual_seed(7)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data.uniform_(0.9, 1.1)
        else:
            spread = (3.0 / weight.shape[-1]) ** 0.5
            weight.data.uniform_(-spread, spread)
    return model


def draw_items(shape):
    """Semantic IDs, `[items, levels]`; codes near zero are frequent, as in real catalogs."""
    generator = torch.Generator().manual_seed(20)
    size = (shape["items"], shape["levels"])
    draw = torch.rand(size, generator=generator) * torch.rand(size, generator=generator)
    return (draw * shape["codes"]).long()


def draw_prompts(shape, items, history, count, seed=1):
    """`[count, 1 + history * levels]`"""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(items), (count, history), generator=generator)
    tokens = items[picks] + shape["first_token"] + shape["codes"] * torch.arange(shape["levels"])
    return torch.cat([torch.ones(count, 1, dtype=torch.long), tokens.flatten(1)], 1)


class DeviceTrie:
    """Children in compressed rows, level by level: edge e of a level leads to node e of the next."""

    def __init__(self, shape, items, device):
        nodes, num_nodes, self.first, self.tokens, self.fan_out = torch.zeros(len(items), dtype=torch.long), 1, [], [], []
        for level in range(shape["levels"]):
            edges, nodes = torch.unique(nodes * shape["codes"] + items[:, level], return_inverse=True)
            first = torch.searchsorted(edges // shape["codes"], torch.arange(num_nodes + 1))
            tokens = edges % shape["codes"] + shape["first_token"] + level * shape["codes"]
            self.first.append(first.to(device))
            self.tokens.append(tokens.to(device))
            self.fan_out.append(int(first.diff().max()))
            num_nodes = len(edges)


def python_trie(shape, items):
    """The trie that `generate` asks; building it takes seconds."""
    offsets = shape["first_token"] + shape["codes"] * torch.arange(shape["levels"])
    return baselines.Trie(sorted(set(map(tuple, (items + offsets).tolist()))))


def element_wise(num_heads, num_kv_heads, epsilon):
    """The operations between matrix products and attention, on rows, as functions that `torch.compile` can fuse."""

    def norm_and_rope(qkv, q_norm, k_norm, cos, sin):
        """`qkv` `[rows, (heads + 2 kv_heads) * head_dim]`, `cos` and `sin` `[rows, head_dim / 2]`"""
        heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, -1))

        def turn(x, weight):
            a, b = F.rms_norm(x, weight.shape, weight, epsilon).chunk(2, -1)
            c, s = cos[:, None], sin[:, None]
            return torch.cat([a * c - b * s, b * c + a * s], -1)
        return turn(heads[:, :num_heads], q_norm), turn(heads[:, num_heads:num_heads + num_kv_heads], k_norm)

    def add_and_norm(x, y, weight):
        x = x + y
        return x, F.rms_norm(x, weight.shape, weight, epsilon)

    def silu_and_mul(gate_up):
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    def merge_tail(q, context, log_sum, tail, ancestors):
        """Attention over the context, `[rows, heads, head_dim]` with its log-sum-exp, merged with a beam's own tokens.

        `tail`: keys and values of each earlier step, `[rows, kv_heads, head_dim]`; `ancestors`: rows of that step
        that these beams come from, for all but the last.
        """
        grouped = (len(q), num_kv_heads, num_heads // num_kv_heads, -1)
        keys, values = ([part[rows] for part, rows in zip(parts, ancestors)] + [parts[-1]] for parts in zip(*tail))
        query = q.reshape(grouped).float() * q.shape[-1] ** -0.5
        scores = [log_sum.reshape(grouped)] + [(query * key[:, :, None].float()).sum(-1, keepdim=True) for key in keys]
        shares = torch.cat(scores, -1).softmax(-1)
        mixed = shares[..., :1] * context.reshape(grouped).float()
        for number, value in enumerate(values):
            mixed = mixed + shares[..., number + 1:number + 2] * value[:, :, None].float()
        return mixed.to(q.dtype).reshape(len(q), -1)

    def log_probabilities(logits, tokens):
        """Of `tokens` `[rows, choices]`, normalised over the whole vocabulary."""
        return torch.log_softmax(logits, -1, dtype=torch.float32).gather(1, tokens)

    return [norm_and_rope, add_and_norm, silu_and_mul, merge_tail, log_probabilities]


def attend_context(q, k, v):
    """Attention without a mask and its log-sum-exp; `[batch, heads, tokens, head_dim]`, fewer heads in `k` and `v`."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[:2]
    if q.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))  # f32 on a GPU: in the check alone
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


class SharedContext:
    """Qwen3 and the beam search written out on tensors; nothing is read back before the answers."""

    def __init__(self, model, trie, width):
        config, layers = model.config, model.model.layers
        self.trie, self.width = trie, width
        self.num_heads, self.num_kv_heads, self.head_dim = (
            config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        self.embedding, self.head = model.model.embed_tokens.weight.data, model.lm_head.weight.data
        self.final_norm, self.epsilon = model.model.norm.weight.data, config.rms_norm_eps
        attention = [layer.self_attn for layer in layers]
        fuse = lambda *linears: torch.cat([linear.weight.data for linear in linears])
        self.qkv = [fuse(a.q_proj, a.k_proj, a.v_proj) for a in attention]
        self.head_norms = [(a.q_norm.weight.data, a.k_norm.weight.data) for a in attention]
        self.out = [a.o_proj.weight.data for a in attention]
        self.gate_up = [fuse(layer.mlp.gate_proj, layer.mlp.up_proj) for layer in layers]
        self.down = [layer.mlp.down_proj.weight.data for layer in layers]
        self.norms = [(layer.input_layernorm.weight.data, layer.post_attention_layernorm.weight.data) for layer in layers]
        frequencies = 1.0 / 1e6 ** (torch.arange(0, self.head_dim, 2, device=self.head.device).float() / self.head_dim)
        angles = torch.arange(config.max_position_embeddings // 4, device=self.head.device)[:, None] * frequencies
        self.cos, self.sin = angles.cos().to(self.head.dtype), angles.sin().to(self.head.dtype)
        self.prefill_kernel = None
        self.functions = element_wise(self.num_heads, self.num_kv_heads, self.epsilon)
        self.plain = self.fused = {function.__name__: function for function in self.functions}

    def compile(self, mode):
        options = {} if mode == "default" else {"mode": mode}
        self.fused = {function.__name__: torch.compile(function, fullgraph=True, **options) for function in self.functions}

    def call(self, name, rows, *operands):
        # A compiled function takes any number of rows but one; few rows are not worth it.
        if self.fused is self.plain or len(rows) < 16:
            return self.plain[name](rows, *operands)
        for operand in torch.utils._pytree.tree_leaves((rows, operands)):
            if operand.dim() > 1 or not operand.is_floating_point():  # all but the norms' weights
                torch._dynamo.maybe_mark_dynamic(operand, 0)
        if name == "log_probabilities":
            torch._dynamo.maybe_mark_dynamic(operands[0], 1)
        return self.fused[name](rows, *operands)

    def project(self, layer, x, cos, sin):
        qkv = F.linear(x, self.qkv[layer])
        q, k = self.call("norm_and_rope", qkv, *self.head_norms[layer], cos, sin)
        return q, k, qkv.unflatten(-1, (-1, self.head_dim))[:, self.num_heads + self.num_kv_heads:]

    def finish_layer(self, layer, residual, mixed):
        """Everything behind attention; returns the residual and the next layer's normalised input."""
        residual, x = self.call("add_and_norm", residual, F.linear(mixed, self.out[layer]), self.norms[layer][1])
        x = F.linear(self.call("silu_and_mul", F.linear(x, self.gate_up[layer])), self.down[layer])
        is_last = layer + 1 == len(self.norms)
        return self.call("add_and_norm", residual, x, self.final_norm if is_last else self.norms[layer + 1][0])

    def enter(self, tokens):
        residual = self.embedding[tokens]
        return residual, F.rms_norm(residual, residual.shape[-1:], self.norms[0][0], self.epsilon)

    def attend_prefill(self, q, k, v):
        with sdpa_kernel(self.prefill_kernel) if self.prefill_kernel else contextlib.nullcontext():
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def prefill(self, prompts):
        """Keys and values of each layer, `[batch, kv_heads, tokens, head_dim]`, and logits `[batch, vocabulary]`."""
        batch, length = prompts.shape
        by_prompt = lambda x: x.unflatten(0, (batch, length)).transpose(1, 2)
        cos, sin = (table[:length].repeat(batch, 1) for table in (self.cos, self.sin))
        residual, x = self.enter(prompts.flatten())
        contexts = []
        for layer in range(len(self.qkv)):
            q, k, v = map(by_prompt, self.project(layer, x, cos, sin))
            contexts.append((k, v))
            is_last = layer + 1 == len(self.qkv)
            if is_last:  # nothing behind it reads any token but the last one
                q, residual = q[:, :, -1:], residual.unflatten(0, (batch, length))[:, -1]
            mixed = attend_context(q, k, v)[0] if is_last else self.attend_prefill(q, k, v)
            residual, x = self.finish_layer(layer, residual, mixed.transpose(1, 2).reshape(len(residual), -1))
        return contexts, F.linear(x, self.head)

    def decode(self, tokens, position, contexts, tails, ancestors):
        """One position of all beams, `[batch, width]`; adds its keys and values to `tails`."""
        by_prompt = lambda x: x.unflatten(0, tokens.shape).transpose(1, 2)
        by_row = lambda x: x.transpose(1, 2).flatten(0, 1).contiguous()
        cos, sin = (table[position].repeat(tokens.numel(), 1) for table in (self.cos, self.sin))
        residual, x = self.enter(tokens.flatten())
        for layer, tail in enumerate(tails):
            q, k, v = self.project(layer, x, cos, sin)
            tail.append((k, v))
            mixed, log_sum = map(by_row, attend_context(by_prompt(q), *contexts[layer]))
            mixed = self.call("merge_tail", q, mixed, log_sum, tail, ancestors)
            residual, x = self.finish_layer(layer, residual, mixed)
        return F.linear(x, self.head)

    def advance(self, level, logits, scores, nodes):
        """The best continuations of all beams of a prompt; `scores` and `nodes` `[batch, width]`."""
        first, fan_out = self.trie.first[level], self.trie.fan_out[level]
        begin, end = first[nodes.flatten()][:, None], first[nodes.flatten() + 1][:, None]
        edges = begin + torch.arange(fan_out, device=logits.device)
        is_legal, edges = edges < end, edges.clamp(max=len(self.trie.tokens[level]) - 1)
        tokens = self.trie.tokens[level][edges]
        totals = scores.flatten()[:, None] + self.call("log_probabilities", logits, tokens)
        totals = totals.masked_fill(~is_legal, -torch.inf).view(len(scores), -1)
        scores, best = totals.topk(min(self.width, totals.shape[1]))
        pick = lambda x: x.view(len(scores), -1).gather(1, best)
        return scores, pick(edges), pick(tokens), best // fan_out

    def search(self, prompts):
        """Sequences `[batch, width, levels]`, best first, and their scores; impossible beams have minus infinity."""
        batch, length = prompts.shape
        contexts, logits = self.prefill(prompts)
        scores, nodes = prompts.new_zeros(batch, 1, dtype=torch.float32), prompts.new_zeros(batch, 1)
        sequences, tails, ancestors = prompts.new_zeros(batch, 1, 0), [[] for _ in self.qkv], []
        for level in range(len(self.trie.first)):
            scores, nodes, tokens, parents = self.advance(level, logits, scores, nodes)
            sequences = torch.cat([sequences.gather(1, parents[..., None].expand(-1, -1, level)), tokens[..., None]], -1)
            if level + 1 == len(self.trie.first):
                return sequences, scores
            if level > 0:
                offsets = torch.arange(batch, device=prompts.device)[:, None] * (len(logits) // batch)
                rows = (parents + offsets).flatten()
                ancestors = [earlier[rows] for earlier in ancestors] + [rows]
            logits = self.decode(tokens, length + level, contexts, tails, ancestors)

    def answers(self, prompts):
        sequences, scores = (x.tolist() for x in self.search(prompts.to(self.head.device)))
        return [[(tuple(tokens), score) for tokens, score in zip(*prompt) if score > -torch.inf]
                for prompt in zip(sequences, scores)]


def pick_prefill_kernel(shared, batch, length):
    """The fastest fused attention for these prompts, by trial."""
    random = lambda heads: torch.randn(batch, length, heads, shared.head_dim, device="cuda",
                                       dtype=shared.head.dtype).transpose(1, 2)
    operands, seconds = [random(heads) for heads in (shared.num_heads, shared.num_kv_heads, shared.num_kv_heads)], {}
    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        shared.prefill_kernel = kernel
        try:
            for turn in range(2):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(3):
                    shared.attend_prefill(*operands)
                torch.cuda.synchronize()
                seconds[kernel] = time.perf_counter() - start
        except RuntimeError as error:
            print(f"{kernel}: {error}", file=sys.stderr)
            seconds.pop(kernel, None)
    return min(seconds, key=seconds.get) if seconds else None


def record_graph(shared, prompts):
    """The whole search for prompts of this shape as one CUDA graph; returns a function of prompts on the host."""
    own, stream = prompts.cuda(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            shared.search(own)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        sequences, scores = shared.search(own)

    def run(new):
        own.copy_(new)
        graph.replay()
        return sequences.cpu(), scores.cpu()
    return run


def prepare(shared, prompts, others, notes):
    """The fastest way to run `shared` that works here: compiled and recorded, recorded, or neither."""
    def eager(new):
        return tuple(x.cpu() for x in shared.search(new.to(shared.head.device)))
    is_cuda = shared.head.device.type == "cuda"
    if is_cuda:
        shared.prefill_kernel = pick_prefill_kernel(shared, *prompts.shape)
    compiled, plain = shared.fused, shared.plain
    ways = [("compiled", compiled)] if compiled is not plain else []
    ways += [("not compiled", plain)] if is_cuda else []
    for name, functions in ways:
        shared.fused = functions
        try:
            run = record_graph(shared, prompts) if is_cuda else eager
            _, found = run(others)
            torch.testing.assert_close(found, eager(others)[1], atol=0.05, rtol=0)
            shared.fused = compiled
            return name + ", one graph" * is_cuda, run
        except OutOfTime:
            raise
        except Exception as error:  # whatever a compiler or a capture says, the plain way goes on
            notes.append(f"{name} failed: {str(error).strip().splitlines()[0][:120]}")
            print(f"{name}: {error}", file=sys.stderr)
            shared.prefill_kernel = None  # what torch itself would take
            torch.cuda.empty_cache()
    shared.fused = plain
    return "not compiled, no graph", eager


def nvidia_libraries():
    """Where pip puts CUDA's libraries beside the running Python."""
    try:
        import nvidia
    except ImportError:
        return []
    folders = [os.path.join(path, "cu13", "lib") for path in nvidia.__path__]
    return [folder for folder in folders if os.path.isdir(folder)]


def run_sidereal(options, shape, history, batch, seconds):
    """The report of `sidereal bench`, with `ms`, the time of a group."""
    if seconds < 0.5:
        raise OutOfTime("no time was left for sidereal")
    device = "cuda:0" if options.device == "cuda" else options.device
    # 16 histories are gone through; the first groups of a shape run before their steps are recorded.
    repeat = 1 if options.tiny else 3 if batch == 1 else 6
    command = [options.sidereal, "bench", "--shape", shape["name"], "--device", device, "--beams", str(options.beams),
               "--history", str(history), "--repeat", str(repeat), "--json"]
    command += ["--batch", str(batch)] if batch > 1 else []
    paths = nvidia_libraries() + [os.environ[name] for name in ("LD_LIBRARY_PATH",) if os.environ.get(name)]
    environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired:
        raise OutOfTime(f"sidereal took over {seconds:.0f} s") from None
    if done.returncode != 0:
        raise RuntimeError("sidereal: " + (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1])
    report = json.loads(done.stdout)
    report["ms"] = report["latency_ms"]["p50"] if batch == 1 else 1e3 * batch / report["requests_per_second"]
    report["command"] = " ".join(command[1:])
    return report


def check_close(found, expected, bound):
    """In bf16: nearly the same beams, with nearly the same scores."""
    found, expected = dict(found), dict(expected)
    common = found.keys() & expected.keys()
    worst = max((abs(found[tokens] - expected[tokens]) for tokens in common), default=0.0)
    assert len(common) >= 0.75 * len(expected), f"only {len(common)} of {len(expected)} beams are those of `generate`"
    assert worst < bound, f"a score is {worst} away from that of `generate`"
    return f"{len(common)} of {len(expected)} beams in common, scores within {worst:.4f}"


def check(shape, items, shared, model, seconds):
    """Raises unless `shared` gives the answers of `generate`, compiled and not; returns what was found."""
    def compare(shape, items, model, width, history):
        """A function that compares the answers of a network with those of `generate`."""
        prompts, trie = draw_prompts(shape, items, history, 2, seed=5), python_trie(shape, items)
        expected = [baselines.hugging_face(model, trie, shape["levels"], width, prompt.tolist()) for prompt in prompts]
        network = SharedContext(model, DeviceTrie(shape, items, model.device), width)

        def with_functions(functions):
            network.fused = functions
            for found, at_prompt in zip(network.answers(prompts), expected):
                if model.dtype == torch.float32:
                    baselines.check_equal("shared", found, at_prompt)
                yield "equal" if model.dtype == torch.float32 else check_close(found, at_prompt, 0.3)
        return network.plain, with_functions
    plain, in_f32 = compare(SMALL, draw_items(SMALL), build(SMALL, model.device, torch.float32), 24, 20)
    report = {"qwen3-small, f32": list(in_f32(plain))}
    # Of fewer items: the trie that `generate` wants is slow to build.
    plain, in_own_type = compare(shape, items[:20_000], model, 32, 40)
    name = f"{shape['name']}, {model.dtype}"
    report[name] = list(in_own_type(plain))
    if shared.fused is not shared.plain:
        try:
            with at_most(seconds, "torch.compile"):
                report[name + ", compiled"] = list(in_own_type(shared.fused))
        except AssertionError:
            raise
        except Exception as error:  # whatever a compiler says, the plain way goes on
            report[name + ", compiled"] = f"left out: {str(error).strip().splitlines()[0][:200]}"
            shared.fused = shared.plain
    return report


def hf_obstacle(shape, tokens, width, batch, device):
    """Why `generate` is not timed here, if it is not."""
    num_kv_heads, head_dim = shape["heads"][1:]
    beam_tokens = tokens * width * batch
    # Keys and values in bf16, a layer of them again while beams are reordered, and the widest activations of a prefill.
    need = 4.2 * beam_tokens * shape["layers"] * num_kv_heads * head_dim + 8 * beam_tokens * shape["inner"]
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else float("inf")
    if need > free:
        return f"hf: contexts of all beams need {need / 1e9:.0f} GB, {free / 1e9:.0f} are free"
    return "hf: timed for one prompt" if batch > 1 else None


def milliseconds(work):
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


@torch.no_grad()
def run(name, history, batch, shape, items, model, shared, hf_trie, options, left):
    prompts = draw_prompts(shape, items, history, batch * 8)
    groups, notes, contenders = prompts.split(batch), [], {}
    row = {"case": name, "tokens": prompts.shape[1], "batch": batch, "beams": options.beams, "notes": notes}
    empty_cache = torch.cuda.empty_cache if options.device == "cuda" else lambda: None
    try:
        with at_most(left("prepare"), "preparing shared"):
            row["shared way"], run_shared = prepare(shared, *groups[:2], notes)
            row["prefill attention"] = shared.prefill_kernel and shared.prefill_kernel.name
        contenders["shared"] = run_shared
    except (OutOfTime, RuntimeError) as error:
        notes.append(f"shared: {str(error).splitlines()[0]}")
    empty_cache()
    obstacle = hf_obstacle(shape, prompts.shape[1], options.beams, batch, options.device)
    if options.no_hf or obstacle:
        notes.append(obstacle or "hf: not asked for")
    else:
        contenders["hf"] = lambda group: baselines.hugging_face(
            model, hf_trie(), shape["levels"], options.beams, group[0].tolist())
    times = {contender: [] for contender in contenders}

    def half():
        for contender, work in list(contenders.items()):
            try:
                with at_most(left(contender), contender):
                    if contender != "hf" or not times["hf"]:  # seconds a round: once is enough
                        work(groups[0])  # warms up
                    for number in range(options.rounds or ROUNDS[contender]):
                        times[contender].append(milliseconds(lambda: work(groups[(number + 1) % len(groups)])))
            except (OutOfTime, RuntimeError) as error:  # out of memory is one
                notes.append(f"{contender}: {str(error).splitlines()[0][:120]}")
                contenders.pop(contender)
            empty_cache()
    half()
    if options.sidereal:
        try:
            row["report"] = run_sidereal(options, shape, history, batch, left("sidereal"))
            row["sidereal"] = row["report"]["ms"]
        except (OutOfTime, RuntimeError, OSError) as error:
            notes.append(str(error))
    half()
    contenders.clear()
    row["times"] = times
    row.update({contender: statistics.median(values) for contender, values in times.items() if values})
    if "sidereal" in row:
        row.update({f"{contender} / sidereal": row[contender] / row["sidereal"] for contender in times if contender in row})
    return row


def output_of(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def describe(options):
    is_cuda = options.device == "cuda"
    return {
        "what": "milliseconds for all prompts of a group, bf16" if is_cuda else "milliseconds, a check on a CPU",
        "commit": options.commit or output_of("git", "-C", ROOT, "rev-parse", "HEAD"),
        "command": " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if is_cuda else platform.processor() or platform.machine(),
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if is_cuda else None,
        "cores": os.cpu_count(), "sidereal": output_of(options.sidereal, "--version") if options.sidereal else None,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
                     "cudnn": torch.backends.cudnn.version() if is_cuda else None, "transformers": transformers.__version__}}


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sidereal", default=os.path.join(ROOT, "target/release/sidereal"),
                        help="binary built with --features cuda; empty to time the others alone")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the shape qwen3-small, short contexts, few beams")
    parser.add_argument("--case", action="append", help="a row, context x prompts, as 1000x8; repeatable; by default all")
    parser.add_argument("--beams", type=int, help="by default 256")
    parser.add_argument("--rounds", type=int, help="timed rounds of each half, by default "
                        + ", ".join(f"{rounds} of {name}" for name, rounds in ROUNDS.items()))
    parser.add_argument("--compile", default="default", choices=["none", "default", "max-autotune-no-cudagraphs"],
                        help="how torch.compile fuses element-wise operations")
    parser.add_argument("--no-hf", action="store_true", help="leave Hugging Face out, but for the check")
    parser.add_argument("--seconds", type=float, default=95, help="time for everything; rows without time are left out")
    parser.add_argument("--commit", help="commit for the record, where there is no git")
    parser.add_argument("--output", help="JSON file for the record, written anew after each row")
    options = parser.parse_args()
    options.beams = options.beams or (32 if options.tiny else 256)
    options.cases = TINY_CASES if options.tiny else CASES
    unknown = set(options.case or []) - options.cases.keys()
    if unknown:
        parser.error(f"no case is named {', '.join(sorted(unknown))}; there are {', '.join(options.cases)}")
    return options


@torch.no_grad()
def main():
    options = parse()
    left = lambda what: min(SECONDS[what], options.seconds - (time.monotonic() - START))
    progress = lambda text: print(f"{time.monotonic() - START:5.1f} s  {text}", file=sys.stderr, flush=True)
    shape = SMALL if options.tiny else LARGE
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    items, model = draw_items(shape), build(shape, options.device, dtype)
    progress("model drawn")
    record = {**describe(options), "rows": []}
    shared = SharedContext(model, DeviceTrie(shape, items, options.device), options.beams)
    if options.compile != "none":
        shared.compile(options.compile)
    record["check"] = check(shape, items, shared, model, left("compile"))
    progress(f"answers are those of generate: {json.dumps(record['check'])}")
    hf_trie = functools.cache(lambda: python_trie(shape, items))
    columns, ratios = ["hf", "shared", "sidereal"], ["hf / sidereal", "shared / sidereal"]
    print("| " + " | ".join(["context x prompts", *(f"{name} ms" for name in columns), *ratios, "notes"]) + " |")
    print("| --- |" + " --: |" * (len(columns) + len(ratios)) + " --- |", flush=True)
    for name in options.case or options.cases:
        row = run(name, *options.cases[name], shape, items, model, shared, hf_trie, options, left)
        record["rows"].append(row)
        cell = lambda key, form: format(row[key], form) if key in row else "-"
        notes = "; ".join(filter(None, [row.get("shared way"), row.get("prefill attention"), *row["notes"]]))
        print("| " + " | ".join([name, *(cell(key, ".2f") for key in columns), *(cell(key, ".2f") for key in ratios),
                                 notes]) + " |", flush=True)
        progress(f"{name} done")
        if options.output:
            with open(options.output, "w") as file:
                json.dump(record, file, indent=1)
                file.write("\n")


if __name__ == "__main__":
    main()
