#!/usr/bin/env python3
"""Sidereal beside PyTorch: the same weights, requests and threads, in turns within one run.

    cargo build --release
    python benches/compare/compare.py                              the small rows
    python benches/compare/compare.py --case qwen3-0.6b/10/20x4    a large one
    python benches/compare/compare.py --dtype bf16 --case ...      all in bf16
    python benches/compare/compare.py --list

Needs Python with torch, transformers and safetensors (`pip install torch transformers safetensors`). One thread
each. Times are CPU milliseconds per request, medians over rounds; ratios are what counts. Answers are compared
before anything is timed.
"""
import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, T5Config, T5ForConditionalGeneration

import baselines

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.join(HERE, "..", "..")
CATALOGS = {4: "models/catalogs/instruments.index.json", 3: "models/catalogs/industrial.index.json"}
# Model, beam width, items of the history, levels.
SMALL = [(model, width, items, levels) for model in ("tiger", "qwen3-small")
         for items, levels in ((20, 4), (100, 3)) for width in (10, 50, 128)]
LARGE = [("qwen3-0.6b", 10, 20, 4), ("qwen3-0.6b", 50, 20, 4), ("qwen3-0.6b", 10, 100, 3)]
FIRST_TOKEN = {"tiger": 2, "qwen3-small": 1000, "qwen3-0.6b": 151936}


def name_of(case):
    model, width, items, levels = case
    return f"{model}/{width}/{items}x{levels}"


def build(model):
    rope = {"rope_type": "default", "rope_theta": 1000000.0}
    torch.manual_seed(1)
    if model == "tiger":
        return T5ForConditionalGeneration(T5Config(
            vocab_size=3026, d_model=128, d_kv=64, d_ff=1024, num_layers=4, num_decoder_layers=4, num_heads=6,
            feed_forward_proj="relu", pad_token_id=0, eos_token_id=1, decoder_start_token_id=0))
    if model == "qwen3-small":
        return Qwen3ForCausalLM(Qwen3Config(
            vocab_size=1000 + 4 * 256, hidden_size=256, intermediate_size=768, num_hidden_layers=4,
            num_attention_heads=8, num_key_value_heads=2, head_dim=64, tie_word_embeddings=False,
            rope_parameters=rope, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=151936 + 3 * 8192, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
        rope_parameters=rope, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2))


class Case:
    """A checkpoint, its catalogue and one request, as files and as the baselines want them."""

    def __init__(self, case, work, dtype):
        self.dtype = dtype
        self.model, self.width, self.items, self.levels = case
        self.folder = os.path.join(work, self.model)
        if not os.path.exists(os.path.join(self.folder, "config.json")):
            build(self.model).save_pretrained(self.folder)
        first = FIRST_TOKEN[self.model]
        with open(os.path.join(ROOT, CATALOGS[self.levels])) as file:
            index = json.load(file)
        sids = [tuple(int(re.findall(r"\d+", text)[-1]) for text in texts) for texts in index.values()]
        self.tokens_of = lambda sid: tuple(first + 256 * level + code for level, code in enumerate(sid))
        self.trie = baselines.Trie(sorted({self.tokens_of(sid) for sid in sids}))
        generator = torch.Generator().manual_seed(self.items)
        picks = torch.randint(len(sids), (self.items,), generator=generator).tolist()
        is_t5 = self.model == "tiger"
        self.prompt = [17] + [token for pick in picks for token in self.tokens_of(sids[pick])] + [1 if is_t5 else 3]
        layout = {"levels": [{"size": 256, "first_token": first + 256 * level} for level in range(self.levels)]}
        self.write("sidereal.json", layout)
        request = {"tokens": self.prompt, "beams": self.width, "top_k": 100000}
        self.requests = self.write("requests.jsonl", request)

    def write(self, name, value):
        path = os.path.join(self.folder, name)
        with open(path, "w") as file:
            file.write(json.dumps(value) + "\n")
        return path

    def sidereal(self, binary, *more):
        command = [binary, *more, "--dtype", self.dtype, "--model", self.folder, "--catalog", os.path.join(ROOT, CATALOGS[self.levels]),
                   "--requests", self.requests, "--beams", str(self.width), "--threads", "1"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def sidereal_answer(self, binary):
        answer = json.loads(self.sidereal(binary, "recommend"))
        return list({self.tokens_of(item["sid"]): item["score"] for item in answer["items"]}.items())

    def sidereal_ms(self, binary, repeat):
        return json.loads(self.sidereal(binary, "bench", "--json", "--repeat", str(repeat)))


def cpu_ms(work):
    start = time.process_time()
    work()
    return (time.process_time() - start) * 1e3


def matrix_gflops():
    a, b = torch.randn(512, 1024), torch.randn(1024, 3072)
    return max(2 * 512 * 1024 * 3072 / cpu_ms(lambda: a @ b) / 1e6 for _ in range(8))


@torch.no_grad()
def run(case, options):
    case_name, case = name_of(case), Case(case, options.work, options.dtype)
    model = baselines.load(case.folder)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    search = (case.trie, case.levels, case.width, case.prompt)
    written_out = baselines.WrittenOutT5 if case.model == "tiger" else baselines.WrittenOutQwen3
    network = written_out(model, dtype)
    model = model.to(dtype)
    contenders = {"hf": lambda: baselines.hugging_face(model, *search),
                  "torch": lambda: baselines.prefill_once(model, *search),
                  "shared": lambda: baselines.shared_context(network, *search)}
    is_large = case.model == "qwen3-0.6b"
    if is_large:  # minutes a request: one round, and Hugging Face on request
        options = argparse.Namespace(**{**vars(options), "rounds": options.rounds or 1})
        if not options.hf_on_large:
            contenders.pop("hf")
    options.rounds = options.rounds or 5
    ours = case.sidereal_answer(options.sidereal)
    times = {name: [] for name in (*contenders, "sidereal", "share")}
    for turn in range(options.rounds + (0 if is_large else 1)):
        for name, contender in contenders.items():
            answer = []
            elapsed = cpu_ms(lambda: answer.extend(contender()))
            if turn == 0 and options.dtype == "f32":
                baselines.check_equal(f"{case_name} {name}", ours, answer)
            elif turn == 0:
                baselines.check_near(f"{case_name} {name}", ours, answer, 0.3)
            if turn > 0 or is_large:  # otherwise the first turn warms up
                times[name].append(elapsed)
        report = case.sidereal_ms(options.sidereal, 2 if is_large else 20)
        times["sidereal"].append(report["cpu_ms_per_request"])
        times["share"].append(report["matrix_share"])
    row = {"case": case_name, "tokens": len(case.prompt)}
    row.update({name: statistics.median(values) for name, values in times.items()})
    row.update({f"{name} / sidereal": row[name] / row["sidereal"] for name in contenders})
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="a row as --list names it; repeatable; by default the small ones")
    parser.add_argument("--list", action="store_true", help="name all rows and end")
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="f32", help="of products, for all contenders")
    parser.add_argument("--rounds", type=int, help="by default 5, and 1 of the large rows")
    parser.add_argument("--hf-on-large", action="store_true", help="time Hugging Face on the large rows as well")
    parser.add_argument("--sidereal", default=os.path.join(ROOT, "target/release/sidereal"))
    parser.add_argument("--work", default=os.path.join(HERE, "work"), help="where checkpoints are kept")
    parser.add_argument("--output", help="JSON file for the record")
    options = parser.parse_args()
    cases = {name_of(case): case for case in SMALL + LARGE}
    if options.list:
        print("\n".join(cases))
        return
    torch.set_num_threads(1)
    rows = []
    columns = ["hf", "torch", "shared", "sidereal"]
    ratios = ["hf / sidereal", "torch / sidereal", "shared / sidereal"]
    print("| " + " | ".join(["case", "tokens", *(f"{name} ms" for name in columns), *ratios, "matrix share"]) + " |")
    print("| --- |" + " --: |" * (len(columns) + len(ratios) + 2), flush=True)
    for case in [cases[name] for name in options.case] if options.case else SMALL:
        row = run(case, options)
        rows.append(row)
        cell = lambda name, form: format(row[name], form) if name in row else "-"
        print("| " + " | ".join([row["case"], str(row["tokens"]), *(cell(name, ".1f") for name in columns),
                                 *(cell(name, ".1f") for name in ratios), cell("share", ".0%")]) + " |", flush=True)
    record = {"dtype": options.dtype, "rows": rows, "torch": torch.__version__, "torch_matrix_gflops": matrix_gflops(),
              "machine": platform.processor() or platform.machine(),
              "commit": subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()}
    print(f"\ntorch's f32 matrix rate: {record['torch_matrix_gflops']:.0f} GFLOP/s, one thread", file=sys.stderr)
    if options.output:
        with open(options.output, "w") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
