#!/usr/bin/env python3
"""Prompts and their tokens, by Hugging Face's tokenizers and transformers and by the projects' own procedures.

    python prompts.py small               make prompts/tokenizer.json, a small byte-level tokenizer of the demo's titles
                                          (the one that is there was made before HTML entities of titles were resolved)
    python prompts.py tokens PACKAGES     make prompts/tokens.json: hashes of the tokens of 10,000 texts
    python prompts.py chat PACKAGES       make prompts/chat.json: what chat templates make of messages
    python prompts.py golden PACKAGES     make prompts/golden.json: prompts of projects, and scores of items; names such as
                                          lc-rec/llama2 behind it make those cases anew

PACKAGES is the folder that .ci/get-tokenizers fills. Needs torch, transformers (5.x) and tokenizers. Networks have
random weights by a formula (`weight`), which tests/prompts.rs repeats: no checkpoint is kept. Scores are those of the
network in f64, item by item, over the whole vocabulary.
"""
import json
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
OUT = os.path.join(HERE, "prompts")
PACKAGES = ["deepseek_v3", "gemma3", "gptoss", "llama2", "llama3", "llama3_1", "qwen3"]
MASK = (1 << 64) - 1


def items():
    with open(os.path.join(HERE, "industrial", "items.jsonl")) as file:
        return [json.loads(line) for line in file]


def sid_texts(item):
    return [f"<{letter}_{code}>" for letter, code in zip("abcd", item["sid"])]


def fnv(data, value=0xCBF29CE484222325):
    for byte in data:
        value = ((value ^ byte) * 0x100000001B3) & MASK
    return value


def text(number, known):
    """The text of a number: a few titles in a sentence, some of them among semantic IDs and odd characters."""
    titles = [known[(number * 7919 + place * 104729) % len(known)]["title"] for place in range(number % 5 + 1)]
    frames = ["{}", "The user bought {} and", "\n\n### Input:\n{}\n", "  {}\t", "用户浏览了：{}。Ça va? ½ 😀 {}", "<|im_start|>user\n{}"]
    return frames[number % len(frames)].replace("{}", ", ".join(titles))


def tokenizer_file(packages, name):
    return os.path.join(OUT, "tokenizer.json") if name == "small" else os.path.join(packages, name, "tokenizer.json")


def make_small():
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([item["title"] for item in items()], trainer)
    tokenizer.save(os.path.join(OUT, "tokenizer.json"), pretty=False)


def make_tokens(packages):
    from tokenizers import Tokenizer
    known, hashes = items(), {}
    for name in ["small", *PACKAGES]:
        tokenizer = Tokenizer.from_file(tokenizer_file(packages, name))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        hashes[name] = []
        for start in range(0, 10_000, 100):
            value = 0xCBF29CE484222325
            for number in range(start, start + 100):
                for special in (False, True) if number % 10 == 0 else (False,):
                    ids = tokenizer.encode(text(number, known), add_special_tokens=special).ids
                    value = fnv(b"".join(id.to_bytes(4, "little") for id in [*ids, MASK >> 32]), value)
            hashes[name].append(f"{value:016x}")
    write("tokens.json", hashes)


CONVERSATIONS = [
    [{"role": "user", "content": "What next?"}],
    [{"role": "system", "content": "You recommend items."}, {"role": "user", "content": "<a_1><b_2><c_3>, <a_4>"}],
    [{"role": "user", "content": "Hi \n"}, {"role": "assistant", "content": "<think>\nA thought.\n</think>\n\nHello."},
     {"role": "user", "content": "And now? \"é\" <b>"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "assistant", "content": "c"},
     {"role": "user", "content": "d"}],
    [{"role": "user", "content": "Weather?"},
     {"role": "assistant", "content": "", "tool_calls": [
         {"type": "function", "function": {"name": "weather", "arguments": {"where": "Köln", "days": [1, 2.5], "now": True}}}]},
     {"role": "tool", "content": "{\"sun\": true}"}],
]
VARIABLES = [{}, {"enable_thinking": False}, {"add_generation_prompt": False},
             {"tools": [{"type": "function", "function": {"name": "weather", "description": "It's <sunny> & \"warm\"",
                                                          "parameters": {"where": "text", "days": None}}}]}]
# A template of ours, which needs no package.
OWN = ("{{ bos_token }}{%- for message in messages %}\n    {%- if message.role == 'user' and message.content is string %}\n"
       "        {{- '<|im_start|>user\\n' + message.content.strip() + '<|im_end|>\\n' }}\n    {%- else %}\n"
       "{{ message['role'] | upper }}: {{ message.content.split('</think>')[-1].lstrip('\\n') }}\n    {%- endif %}\n"
       "    {%- if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}\n{% endfor %}"
       "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def make_chat(packages):
    from transformers import PreTrainedTokenizerFast
    chats = {}
    for name in ["small", *PACKAGES]:
        if name == "small":
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=tokenizer_file(packages, name), bos_token="<|im_start|>")
            tokenizer.chat_template = OWN
        else:
            # The configuration alone: classes add what the files do not say.
            config = json.load(open(os.path.join(packages, name, "tokenizer_config.json")))
            if not config.get("chat_template"):
                continue
            special = {key: value["content"] if isinstance(value, dict) else value for key, value in config.items()
                       if key in ("bos_token", "eos_token", "unk_token", "pad_token") and value}
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=tokenizer_file(packages, name), **special)
            tokenizer.chat_template = config["chat_template"]
        chats[name] = []
        for messages in CONVERSATIONS:
            for variables in VARIABLES:
                arguments = {"add_generation_prompt": True, **variables}
                try:
                    rendered = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
                except Exception as error:  # the template refuses the messages
                    rendered = None
                case = {"messages": messages, "variables": variables}
                case["hash"] = rendered and f"{fnv(rendered.encode()):016x}"
                if name == "small":
                    case["text"] = rendered
                chats[name].append(case)
    write("chat.json", {"own_template": OWN, "cases": chats})


def mix(value):
    """The finaliser of splitmix64, on an array of uint64."""
    import numpy
    value = (value ^ (value >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return value ^ (value >> numpy.uint64(31))


def weight(name, shape):
    """The weights of a tensor: between -0.5 and 0.5 by name and index; norms around 1."""
    import numpy
    import torch
    count = 1
    for size in shape:
        count *= size
    with numpy.errstate(over="ignore"):
        numbers = numpy.uint64(fnv(name.encode())) + numpy.arange(count, dtype=numpy.uint64) * numpy.uint64(0x9E3779B97F4A7C15)
        values = (mix(numbers) >> numpy.uint64(40)).astype(numpy.float64) / (1 << 24) - 0.5
    if "norm" in name:
        values = 1 + values / 2
    return torch.from_numpy(values.astype(numpy.float32).astype(numpy.float64)).reshape(shape)


def network(kind, vocab_size, **special):
    import torch
    from transformers import (LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, T5Config,
                              T5ForConditionalGeneration)
    torch.set_default_dtype(torch.float64)
    decoder = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                   num_key_value_heads=1, vocab_size=vocab_size, max_position_embeddings=2048, **special)
    config, network = {
        "qwen2": lambda: (Qwen2Config(tie_word_embeddings=True, **decoder), Qwen2ForCausalLM),
        "llama": lambda: (LlamaConfig(tie_word_embeddings=False, **decoder), LlamaForCausalLM),
        "t5": lambda: (T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=vocab_size,
                                feed_forward_proj="relu", decoder_start_token_id=0, **special), T5ForConditionalGeneration),
    }[kind]()
    model = network(config).eval()
    tied = {"lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"} if config.tie_word_embeddings else set()
    tensors = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in tied:
                continue
            tensors[name] = list(parameter.shape)
            parameter.copy_(weight(name, list(parameter.shape)))
    keys = json.loads(config.to_json_string(use_diff=False))
    kept = {"architectures": [network.__name__]}
    for key in ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_parameters", "tie_word_embeddings",
                "max_position_embeddings", "hidden_act", "attention_bias", "mlp_bias", "d_model", "d_kv", "d_ff", "num_layers",
                "num_decoder_layers", "num_heads", "relative_attention_num_buckets", "relative_attention_max_distance",
                "layer_norm_epsilon", "feed_forward_proj", "is_encoder_decoder", "decoder_start_token_id", "eos_token_id",
                "bos_token_id", "pad_token_id"):
        if keys.get(key) is not None:
            kept[key] = keys[key]
    return model, kept, tensors


def scores_of(model, prompt, continuations):
    """log p of the tokens of each continuation of a prompt, over the whole vocabulary; all are of one length."""
    import torch
    (length,) = {len(continuation) for continuation in continuations}
    with torch.no_grad():
        before = [continuation[:-1] for continuation in continuations]
        if model.config.is_encoder_decoder:
            logits = model(input_ids=torch.tensor([prompt] * len(before)),
                           decoder_input_ids=torch.tensor([[0, *tokens] for tokens in before])).logits
        else:
            logits = model(input_ids=torch.tensor([[*prompt, *tokens] for tokens in before]), logits_to_keep=length).logits
        log_p = torch.log_softmax(logits, -1)
        return log_p.gather(2, torch.tensor(continuations).unsqueeze(2)).sum((1, 2)).tolist()


def make_golden(packages, only=()):
    from transformers import PreTrainedTokenizerFast
    known = items()[:60]
    codes = sorted({text for item in known for text in sid_texts(item)})
    histories = [[5], [3, 3, 17, 42], list(range(20, 45)), []]

    def load(name):
        config = {} if name == "small" else json.load(open(os.path.join(packages, name, "tokenizer_config.json")))
        end = "<|end|>" if name == "small" else config["eos_token"]
        begin = {} if name in ("small", "qwen3") else {"bos_token": config["bos_token"]}
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=tokenizer_file(packages, name), eos_token=end, **begin)
        tokenizer.chat_template = config.get("chat_template")
        return tokenizer

    def sid(number):
        return "".join(sid_texts(known[number]))

    def minionerec(tokenizer, history):
        # EvalSidDataset.pre and Tokenizer.encode of MiniOneRec's data.py.
        def encode(text):
            ids = tokenizer.encode(text)
            while ids and ids[0] == tokenizer.bos_token_id:
                ids = ids[1:]
            while ids and ids[-1] == tokenizer.eos_token_id:
                ids = ids[:-1]
            return ids
        instruction = ("Below is an instruction that describes a task, paired with an input that provides further context. "
                       "Write a response that appropriately completes the request. \n\n### Instruction:\n"
                       "Can you predict the next possible item that the user may expect?\n\n")
        joined = ", ".join(sid(number) for number in history)
        prompt = ("### User Input: \nCan you predict the next possible item the user may expect, given the following "
                  f"chronological interaction history: {joined}\n\n### Response:\n")
        return encode(instruction) + encode(prompt)

    def minionerec_answer(tokenizer, number):
        # The allowed sequences of evaluate.py: a prompt's end and the answer as one text, without the prompt's tokens,
        # which are three with Qwen's tokenizers.
        prefix_index = len(tokenizer("### Response:\n").input_ids)
        return tokenizer("### Response:\n" + sid(number) + "\n").input_ids[prefix_index:] + [tokenizer.eos_token_id]

    def lc_rec(tokenizer, history):
        joined = ", ".join(sid(number) for number in history[-20:])
        instruction = (f"The user has interacted with items {joined} in chronological order. Can you predict the next possible "
                       "item that the user may expect?")
        return tokenizer("Below is an instruction that describes a task. Write a response that appropriately completes the "
                         f"request.\n\n### Instruction:\n{instruction}\n\n### Response:").input_ids

    def codes_and_end(tokenizer, number):
        return tokenizer.convert_tokens_to_ids([*sid_texts(known[number]), tokenizer.eos_token])

    def letter(tokenizer, history):
        texts = [text for number in history[-20:] for text in sid_texts(known[number])]
        return tokenizer.convert_tokens_to_ids([*texts, tokenizer.eos_token])

    def forge(tokenizer, history):
        def encode(text):
            return tokenizer(text).input_ids
        start, end, line = encode("<|im_start|>"), encode("<|im_end|>"), encode("\n")
        system = ("你是一个推荐系统，根据用户的历史行为，预测用户在电商场景的下一步行为。我会给你一串连续行为的语义编码，按照用户点击的时间顺序"
                  "排列，每个行为用三个词表示。")
        user = encode("当前用户的历史行为如下：" + "".join(sid(number) for number in history))[:1480]
        return (start + encode("system") + line + encode(system) + end + line + start + encode("user") + line + user + end
                + line + start + encode("assistant") + line)

    def onerec(tokenizer, history):
        joined = "".join(f"<|sid_begin|>{sid(number)}<|sid_end|>" for number in history)
        messages = [{"role": "system", "content": "你是一个智能推荐助手，能够根据用户的浏览历史预测用户可能感兴趣的下一个内容。"},
                    {"role": "user", "content": f"根据以下用户浏览记录，请预测用户接下来可能观看的内容：\n{joined}"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        return tokenizer(text, add_special_tokens=False).input_ids

    cases = [
        ("minionerec", "small", "qwen2", minionerec, minionerec_answer),
        ("minionerec", "qwen3", "qwen2", minionerec, minionerec_answer),
        ("lc-rec", "llama2", "llama", lc_rec, codes_and_end),
        ("lc-rec", "small", "llama", lc_rec, codes_and_end),
        ("letter", "small", "t5", letter, codes_and_end),
        ("forge", "qwen3", None, forge, None),
        ("onerec", "qwen3", None, onerec, None),
    ]
    golden = json.load(open(os.path.join(OUT, "golden.json"))) if only else []
    for project, name, kind, prompt, answer in cases:
        if only and f"{project}/{name}" not in only:
            continue
        golden = [entry for entry in golden if (entry["project"], entry["tokenizer"]) != (project, name)]
        tokenizer = load(name)
        added = [*codes, "<|sid_begin|>", "<|sid_end|>"] if project == "onerec" else codes
        first = len(tokenizer)
        assert tokenizer.add_tokens(added) == len(added)
        entry = {"project": project, "tokenizer": name, "first_added": first, "added": added,
                 "eos_token": tokenizer.eos_token, "bos_token": tokenizer.bos_token, "cases": []}
        if kind:
            eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
            model, entry["config"], entry["tensors"] = network(kind, len(tokenizer), eos_token_id=eos, pad_token_id=0,
                                                               **({} if kind == "t5" else {"bos_token_id": bos}))
        for history in histories:
            ids = prompt(tokenizer, history)
            case = {"history": [known[number]["item"] for number in history], "input_ids": ids}
            if kind:
                answers = [answer(tokenizer, number) for number in range(len(known))]
                scores = zip(scores_of(model, ids, answers), [item["item"] for item in known])
                scores = sorted(scores, key=lambda scored: (-scored[0], scored[1]))  # items of one semantic ID by name
                case["items"] = [item for _, item in scores[:20]]
                case["scores"] = [round(score, 7) for score, _ in scores[:20]]
            entry["cases"].append(case)
        golden.append(entry)
    write("golden.json", golden)


def write(name, contents):
    with open(os.path.join(OUT, name), "w") as file:
        json.dump(contents, file, ensure_ascii=False, indent=None, separators=(",", ":"))
        file.write("\n")


if __name__ == "__main__":
    what, packages = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None
    {"small": lambda _: make_small(), "tokens": make_tokens, "chat": make_chat, "golden": lambda packages: make_golden(packages, sys.argv[3:])}[what](packages)
