#!/usr/bin/env python3
"""Golden answers: small random checkpoints and what the published networks make of them.

    python golden.py exact FOLDER...      add `exact_scores` to the golden.json of existing folders
    python golden.py make CASE...         make the folders of the cases below
    python golden.py programs FOLDER...   make programs.json in existing folders: named tokens and forced tokens

Needs torch and transformers (5.x). The scores of the first five folders are those of Hugging Face's `generate` in
f32 with `prefix_allowed_tokens_fn`; `exact_scores` beside them are the same network's in f64, which tells how far
f32 itself is from the truth. The other folders hold a plain beam search without a cache over the network in f64.
"""
import argparse
import json
import os
import re

import torch
from safetensors.torch import load_file, save_file
from transformers import (AutoConfig, GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig,
                          MistralForCausalLM, MT5Config, MT5ForConditionalGeneration, Qwen2ForCausalLM, Qwen3Config,
                          Qwen3ForCausalLM, T5Config, T5ForConditionalGeneration)
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.mt5.modeling_mt5 import MT5LayerNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

HERE = os.path.dirname(os.path.abspath(__file__))
NETWORKS = {"t5": T5ForConditionalGeneration, "mt5": MT5ForConditionalGeneration, "qwen3": Qwen3ForCausalLM,
            "qwen2": Qwen2ForCausalLM, "llama": LlamaForCausalLM, "mistral": MistralForCausalLM,
            "gemma": GemmaForCausalLM}


def norm_in_f64(self, x):
    """T5's norm takes its variance in f32 whatever the network's type; the truth must not."""
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def gemma_norm_in_f64(self, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


class Network:
    """A checkpoint in f64, asked for the log-probabilities after prefixes. `adapter` is a folder of a LoRA adapter,
    which is applied beside its layers and not merged."""

    def __init__(self, folder, adapter=None):
        network = NETWORKS[AutoConfig.from_pretrained(folder).model_type]
        self.model = network.from_pretrained(folder, dtype=torch.float64).eval()
        for module in self.model.modules():
            if isinstance(module, (T5LayerNorm, MT5LayerNorm)):
                module.forward = norm_in_f64.__get__(module)
            if isinstance(module, GemmaRMSNorm):
                module.forward = gemma_norm_in_f64.__get__(module)
        if adapter:
            self.apply(adapter)

    def apply(self, folder):
        config = json.load(open(os.path.join(folder, "adapter_config.json")))
        path = os.path.join(folder, "adapter_model.")
        tensors = load_file(path + "safetensors") if os.path.exists(path + "safetensors") else torch.load(path + "bin")
        tensors = {name.removeprefix("base_model.model."): tensor.double() for name, tensor in tensors.items()}
        modules = dict(self.model.named_modules())
        for name in [name for name in tensors if "lora_" not in name]:
            module = modules[name.removesuffix(".weight")]
            module.weight = torch.nn.Parameter(tensors[name])
        for name in tensors:
            module, _, kind = name.removesuffix(".weight").rpartition(".")
            if kind not in ("lora_A", "lora_embedding_A"):
                continue
            a, b = tensors[name], tensors[name.replace("_A", "_B")]
            alpha = next((alpha for pattern, alpha in config["alpha_pattern"].items() if module.endswith(pattern)),
                         config["lora_alpha"])
            scale = alpha / (a.shape[0] ** 0.5 if config["use_rslora"] else a.shape[0])
            if kind == "lora_A":
                modules[module].register_forward_hook(
                    lambda _, inputs, out, a=a, b=b, scale=scale: out + scale * (inputs[0] @ a.T @ b.T))
            else:
                modules[module].register_forward_hook(
                    lambda _, inputs, out, a=a, b=b, scale=scale: out + scale * (a.T[inputs[0]] @ b.T))

    @torch.no_grad()
    def logits(self, prompt, prefixes):
        if self.model.config.is_encoder_decoder:
            start = self.model.generation_config.decoder_start_token_id
            start = self.model.config.decoder_start_token_id if start is None else start
            inputs = dict(input_ids=torch.tensor([prompt] * len(prefixes)),
                          decoder_input_ids=torch.tensor([[start, *prefix] for prefix in prefixes]))
        else:
            inputs = dict(input_ids=torch.tensor([[*prompt, *prefix] for prefix in prefixes]))
        return self.model(**inputs).logits


def log_p(logits, token, among):
    return logits[token] - torch.logsumexp(logits if among is None else logits[among], 0)


def read_codes(folder, index):
    with open(os.path.join(folder, index)) as file:
        index = json.load(file)
    return {item: [int(re.findall(r"\d+", text)[-1]) for text in texts] for item, texts in index.items()}


def children_of(sequences):
    children = {}
    for sequence in sequences:
        for end in range(len(sequence)):
            children.setdefault(tuple(sequence[:end]), set()).add(sequence[end])
    return children


def add_exact(folder):
    """The f64 scores of the sequences that golden.json lists."""
    path = os.path.join(folder, "golden.json")
    golden, layout = json.load(open(path)), json.load(open(os.path.join(folder, "sidereal.json")))
    first = [level["first_token"] for level in layout["levels"]]
    codes = read_codes(folder, golden["items_index"]).values()
    children = children_of([[f + code for f, code in zip(first, sid)] for sid in codes])
    network = Network(folder)
    for cases, is_children in ((golden["cases"], False), (golden["children"], True)):
        for case in cases:
            logits = network.logits(case["input_ids"], [sequence[:-1] for sequence in case["sequences"]])
            case["exact_scores"] = []
            for row, sequence in zip(logits[:, -len(first):], case["sequences"]):
                score = sum(log_p(row[step], token, sorted(children[tuple(sequence[:step])]) if is_children else None)
                            for step, token in enumerate(sequence))
                case["exact_scores"].append(score.item())
    json.dump(golden, open(path, "w"))


TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=512)
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
CASES = {
    # T5 whose encoder and decoder differ in depth.
    "t5/uneven-depth": dict(
        network=T5ForConditionalGeneration, config=T5Config(
            d_model=40, d_kv=16, d_ff=64, num_layers=3, num_decoder_layers=1, num_heads=3, vocab_size=800,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
            decoder_start_token_id=0)),
    # Tokens that are forced after the codes and count in the score; bfloat16 in two files.
    "decoder_only/qwen3-suffix": dict(
        network=Qwen3ForCausalLM, config=Qwen3Config(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, tie_word_embeddings=True, rope_parameters=ROPE, vocab_size=800, **TOKENS),
        dtype=torch.bfloat16, shards=2, layout=dict(suffix=[9, 2])),
    # The spelling of transformers 4, float16, a tied head.
    "decoder_only/llama-tied": dict(
        network=LlamaForCausalLM, config=LlamaConfig(
            hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3,
            tie_word_embeddings=True, rope_parameters=dict(ROPE, rope_theta=5000.0), vocab_size=800, **TOKENS),
        dtype=torch.float16, spelling=4),
    # A prompt around the items and another default normalisation.
    "decoder_only/qwen3-prompt": dict(
        network=Qwen3ForCausalLM, config=Qwen3Config(
            hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1,
            head_dim=24, tie_word_embeddings=False, rope_parameters=ROPE, vocab_size=800, **TOKENS),
        layout=dict(prompt=dict(prefix=[1, 5], suffix=[7, 8], separator=[6], max_items=4), normalize="children")),
}
# What trainers and older programs make of a checkpoint, and adapters beside one.
CASES |= {
    # As transformers 5 writes an mT5: "tied", with a head of its own, never scaled.
    "t5/mt5-own-head": dict(
        network=MT5ForConditionalGeneration, own=("lm_head",), config=MT5Config(
            d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=2, vocab_size=800, pad_token_id=0, eos_token_id=1,
            decoder_start_token_id=0)),
    # pytorch_model.bin: encoder and decoder have embeddings of their own, dense_act_fn overrides the other key, and the
    # decoder's first token stands in generation_config.json alone.
    "t5/two-embeddings": dict(
        network=T5ForConditionalGeneration, own=("decoder.embed_tokens",), container="bin", config=T5Config(
            d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=2, vocab_size=800, pad_token_id=0, eos_token_id=1,
            decoder_start_token_id=3), keys=dict(dense_act_fn="gelu_new", decoder_start_token_id=None),
        generation=dict(decoder_start_token_id=3)),
    # A Lightning checkpoint with a wrapper around the network, an object of a class of its own, and an optimiser.
    "decoder_only/mistral-ckpt": dict(
        network=MistralForCausalLM, container="ckpt", config=MistralConfig(
            hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
            head_dim=8, sliding_window=256, tie_word_embeddings=False, rope_parameters=ROPE, vocab_size=800, **TOKENS)),
    "decoder_only/qwen3-yarn": dict(
        network=Qwen3ForCausalLM, config=Qwen3Config(
            hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, tie_word_embeddings=True, vocab_size=800, rope_parameters=dict(
                rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=128), **TOKENS)),
    "decoder_only/gemma-tied": dict(
        network=GemmaForCausalLM, config=GemmaConfig(
            hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, tie_word_embeddings=True, rope_parameters=ROPE, vocab_size=800, **TOKENS)),
    # An adapter whose embeddings grew, over a base in bfloat16 inside its folder.
    "decoder_only/llama-lora": dict(
        network=LlamaForCausalLM, dtype=torch.bfloat16, config=LlamaConfig(
            hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3,
            tie_word_embeddings=False, rope_parameters=ROPE, vocab_size=700, **TOKENS),
        adapter=dict(rank=3, modules=r"q_proj|v_proj|1\.mlp\.down_proj", whole=("model.embed_tokens", "lm_head"),
                     use_rslora=True, lora_alpha=5, alpha_pattern={"down_proj": 2})),
    # An adapter of embedding and head, adapter_model.bin, over another folder.
    "decoder_only/qwen2-lora": dict(
        base="../qwen2-untied", adapter=dict(rank=2, modules=r"embed_tokens|lm_head|up_proj|k_proj", lora_alpha=1,
                                             container="bin")),
    "t5/lora": dict(base="../relu-tied", adapter=dict(rank=4, modules=r"SelfAttention\.[qv]|EncDec.*\.o|wo",
                                                      lora_alpha=6)),
}
LEVELS = [dict(size=256, first_token=20 + 256 * level) for level in range(3)]


def randomise(parameter, is_table):
    """Numbers wide enough that scores differ."""
    spread = 0.6 if is_table else 1.0 / parameter.shape[-1] ** 0.5
    noise = torch.randn(parameter.shape)
    with torch.no_grad():
        parameter.copy_(noise * spread if parameter.dim() > 1 else 1 + 0.2 * noise)


class Hyperparameters:
    """An object of a class that no reader of checkpoints knows."""

    def __init__(self, config):
        self.config = config


def save(case, folder):
    torch.manual_seed(len(folder))
    model = case["network"](case["config"]).eval()
    for name in case.get("own", ()):
        module = model.get_submodule(name)
        module.weight = torch.nn.Parameter(module.weight.detach().clone())
    for name, parameter in model.named_parameters():
        randomise(parameter, "embed" in name or "shared" in name)
        if case["network"] is GemmaForCausalLM and parameter.dim() == 1:
            parameter.data -= 1
    model.to(case.get("dtype", torch.float32)).save_pretrained(folder)
    path = os.path.join(folder, "config.json")
    config = json.load(open(path))
    if case.get("spelling") == 4:
        config.update(rope_theta=config.pop("rope_parameters")["rope_theta"], rope_scaling=None)
    for key, value in case.get("keys", {}).items():
        config.pop(key, None)
        config |= {key: value} if value is not None else {}
    json.dump(config, open(path, "w"), indent=1)
    path = os.path.join(folder, "generation_config.json")
    os.path.exists(path) and os.remove(path)
    if "generation" in case:
        json.dump(case["generation"], open(path, "w"))
    if case.get("shards", 1) > 1:
        path = os.path.join(folder, "model.safetensors")
        tensors = load_file(path)
        parts = [f"model-{part + 1:05}-of-{case['shards']:05}.safetensors" for part in range(case["shards"])]
        home = {name: parts[at % len(parts)] for at, name in enumerate(sorted(tensors))}
        for part in parts:
            save_file({name: tensors[name] for name in tensors if home[name] == part}, os.path.join(folder, part))
        json.dump(dict(metadata={}, weight_map=home), open(os.path.join(folder, "model.safetensors.index.json"), "w"))
        os.remove(path)
    return model


def contain(container, model, folder):
    """The weights as other programs save them, in the place of model.safetensors."""
    tensors = model.state_dict()
    if container == "bin":
        torch.save(tensors, os.path.join(folder, "pytorch_model.bin"))
    else:
        optimiser = {"state": {0: {"step": 7, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]}
        torch.save({"epoch": 3, "hyper_parameters": Hyperparameters({"beams": {20}}), "optimizer_states": [optimiser],
                    "state_dict": {f"model.{name}": tensor for name, tensor in tensors.items()}},
                   os.path.join(folder, "last.ckpt"), pickle_protocol=4)
    os.remove(os.path.join(folder, "model.safetensors"))


def save_adapter(adapter, base, folder, named):
    """A random LoRA adapter for a checkpoint: factors for modules that match, and whole tensors of 800 rows."""
    torch.manual_seed(len(folder))
    network, tensors = NETWORKS[AutoConfig.from_pretrained(base).model_type].from_pretrained(base), {}
    for name, module in network.named_modules():
        if name in adapter.get("whole", ()):
            tensor = torch.empty(800, module.weight.shape[1])
            randomise(tensor, "embed" in name)
            tensors[f"{name}.weight"] = tensor.bfloat16()
        elif re.search(rf"({adapter['modules']})$", name):
            out, into = module.weight.shape
            shapes = {"lora_A.weight": (adapter["rank"], into), "lora_B.weight": (out, adapter["rank"])}
            if isinstance(module, torch.nn.Embedding):
                shapes = {"lora_embedding_A": (adapter["rank"], out), "lora_embedding_B": (into, adapter["rank"])}
            for factor, shape in shapes.items():
                tensors[f"{name}.{factor}"] = torch.randn(shape) * 0.3
    tensors = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "adapter_model.")
    if adapter.get("container") == "bin":
        torch.save(tensors, path + "bin")
    else:
        save_file(tensors, path + "safetensors")
    config = dict(peft_type="LORA", base_model_name_or_path=named, r=adapter["rank"], lora_alpha=adapter["lora_alpha"],
                  alpha_pattern=adapter.get("alpha_pattern", {}), use_rslora=adapter.get("use_rslora", False),
                  target_modules=adapter["modules"], modules_to_save=list(adapter.get("whole", ())), bias="none",
                  fan_in_fan_out=False, init_lora_weights=True, inference_mode=True, lora_dropout=0.05, use_dora=False)
    json.dump(config, open(os.path.join(folder, "adapter_config.json"), "w"), indent=1)


def save_case(case, folder):
    """Writes the folder of a case, and returns its network in f64."""
    if "adapter" in case:
        os.makedirs(folder, exist_ok=True)
        base = os.path.normpath(os.path.join(folder, case.get("base", "base")))
        if "base" not in case:
            save(case, base)
        save_adapter(case["adapter"], base, folder, case.get("base", "hub/base"))
        return Network(base, folder)
    model = save(case, folder)
    network = Network(folder)
    if "container" in case:
        contain(case["container"], model, folder)
    return network


def search(network, ids, forced, children, num_steps, width, is_children):
    """The best prefixes after forced tokens, which are in no prefix and no score."""
    beams = [((), 0.0)]
    for _ in range(num_steps):
        logits = network.logits(ids, [(*forced, *prefix) for prefix, _ in beams])[:, -1]
        grown = [((*prefix, token), score + log_p(row, token, sorted(children[prefix]) if is_children else None).item())
                 for row, (prefix, score) in zip(logits, beams) for token in sorted(children[prefix])]
        beams = sorted(grown, key=lambda beam: (-beam[1], beam[0]))[:width]
    return beams


def add_programs(folder):
    """Log-probabilities of named tokens, and searches with forced tokens before the codes, by the network in f64."""
    golden, layout = (json.load(open(os.path.join(folder, name))) for name in ("golden.json", "sidereal.json"))
    first, suffix = [level["first_token"] for level in layout["levels"]], layout.get("suffix", [])
    children = {}
    for sid in read_codes(folder, golden["items_index"]).values():
        sequence = [f + code for f, code in zip(first, sid)] + suffix
        for end in range(len(sequence)):
            children.setdefault(tuple(sequence[:end]), set()).add(sequence[end])
    network, read, searches = Network(folder), [], []
    cases = [case["input_ids"] for case in golden.get("cases", []) + golden.get("children", [])][:3]
    for ids, forced in zip(cases, ([], [11], [4, 13, 3])):
        tokens = [7, 3, first[1] + 5, 2, 3, first[0]]
        row = torch.log_softmax(network.logits(ids, [tuple(forced)])[0, -1], 0)
        read.append(dict(input_ids=ids, forced=forced, tokens=tokens, log_probs=[row[token].item() for token in tokens]))
        forced = forced or [5]
        rows = network.logits(ids, [tuple(forced)])[0, -len(forced) - 1:]
        counted = sum(log_p(row, token, None).item() for row, token in zip(rows, forced))
        beams = search(network, ids, forced, children, len(first) + len(suffix), 20, False)
        for is_counted in (False, True):
            searches.append(dict(input_ids=ids, forced=forced, is_counted=is_counted, width=20,
                                 sequences=[prefix[:len(first)] for prefix, _ in beams],
                                 scores=[score + counted * is_counted for _, score in beams]))
    with open(os.path.join(folder, "programs.json"), "w") as file:
        json.dump(dict(read=read, searches=searches), file)


def make(name):
    case, folder = CASES[name], os.path.join(HERE, name)
    network = save_case(case, folder)
    layout = dict(levels=LEVELS, **case.get("layout", {}))
    json.dump(layout, open(os.path.join(folder, "sidereal.json"), "w"))
    index = "../../catalogs/industrial.index.json"
    codes = read_codes(folder, index)
    tokens = {item: [level["first_token"] + code for level, code in zip(LEVELS, sid)] for item, sid in codes.items()}
    children = children_of(list(tokens.values()))
    for suffix_at, token in enumerate(layout.get("suffix", [])):
        for sequence in set(map(tuple, tokens.values())):
            children[(*sequence, *layout["suffix"][:suffix_at])] = {token}
    prompt, is_children = layout.get("prompt", {}), layout.get("normalize") == "children"
    generator, golden = torch.Generator().manual_seed(5), []
    for length, width in ((6, 10), (1, 30), (3, 120)):
        history = [list(tokens)[i] for i in torch.randint(len(tokens), (length,), generator=generator).tolist()]
        kept = history[-prompt.get("max_items", length):]
        ids = list(prompt.get("prefix", []))
        for at, item in enumerate(kept):
            ids += (prompt.get("separator", []) if at else []) + tokens[item]
        ids += prompt.get("suffix", [])
        beams = search(network, ids, (), children, len(LEVELS) + len(layout.get("suffix", [])), width, is_children)
        golden.append(dict(input_ids=ids, history=history, width=width, scores=[score for _, score in beams],
                           sequences=[prefix[:len(LEVELS)] for prefix, _ in beams]))
    kind = "children" if is_children else "cases"
    json.dump({"items_index": index, "from_history": True, kind: golden}, open(os.path.join(folder, "golden.json"), "w"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("exact", "make", "programs"))
    parser.add_argument("names", nargs="+", help="folders, or cases: " + ", ".join(CASES))
    options = parser.parse_args()
    for name in options.names:
        dict(exact=add_exact, make=make, programs=add_programs)[options.action](name)


if __name__ == "__main__":
    main()
