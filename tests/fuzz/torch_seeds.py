#!/usr/bin/env python3
"""Writes the seeds of torch's files: python tests/fuzz/torch_seeds.py. Needs torch; the files are kept."""
import argparse
import collections
import os

import torch

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "seeds", "torch")
NUMBERS = torch.arange(12, dtype=torch.float32).reshape(3, 4)


class Config:
    """A class that no reader of checkpoints knows."""

    def __init__(self):
        self.levels = {"a", "b"}
        self.inner = [1.5, None, True, 1 << 70]


def main():
    # Tied tensors, a parameter, a transposed view, half precisions, doubles and whole numbers.
    plain = collections.OrderedDict(
        a=NUMBERS, tied=NUMBERS, parameter=torch.nn.Parameter(NUMBERS + 1), transposed=NUMBERS.t(), row=NUMBERS[1],
        half=NUMBERS.half(), bfloat=NUMBERS.bfloat16(), double=NUMBERS.double().t(), ids=torch.arange(3),
        empty=torch.zeros(0, 4), scalar=torch.tensor(7.0))
    torch.save(plain, f"{HERE}/plain.bin")
    trainer = {"epoch": 3, "config": Config(), "state_dict": dict(a=NUMBERS, b=NUMBERS[0]), "other_parameter": None,
               "optimizer": {"state": {0: {"exp_avg": NUMBERS}}, "param_groups": [argparse.Namespace(lr=0.1)]}}
    torch.save(trainer, f"{HERE}/protocol_4.pth", pickle_protocol=4)
    torch.save(trainer, f"{HERE}/protocol_2.ckpt")
    torch.save({"state_dict": dict(a=NUMBERS), "ema_state_dict": dict(a=NUMBERS + 1)}, f"{HERE}/two_dicts.pt")
    torch.save({"loss": 1.0, "steps": [1, 2]}, f"{HERE}/no_dict.pt")
    torch.save(torch.nn.Linear(2, 2), f"{HERE}/object.pt")
    torch.save(dict(a=NUMBERS), f"{HERE}/legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(dict(a=NUMBERS[:1].expand(40, 4)), f"{HERE}/expanded.pt")


if __name__ == "__main__":
    main()
