//! The files of a checkpoint: containers of tensors, and adapters that change them.
//!
//! | file | container |
//! | --- | --- |
//! | `*.safetensors` | [`safetensors`](https://huggingface.co/docs/safetensors): mapped |
//! | `*.bin`, `*.pt`, `*.pth`, `*.ckpt` | what `torch.save` writes: a zip archive of raw numbers, which is mapped, and one pickle that says what they are |
//!
//! A pickle is a program in Python's hands. Here it is data: the reader knows tensors, numbers,
//! texts, lists and dicts, steps over everything else, and executes nothing.

pub(crate) mod adapter;
pub(crate) mod files;
pub(crate) mod keys;
pub(crate) mod npy;
mod pickle;
mod safetensors;
pub(crate) mod tensors;
mod torch;
mod zip;

pub(crate) use tensors::Tensors;
