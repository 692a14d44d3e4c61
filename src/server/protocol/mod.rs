//! The Open Inference Protocol, version 2, over HTTP and gRPC, with the extensions that Triton's
//! clients use: tensors in binary, the configuration and the statistics of models, the repository.

use serde_json::{Value, json};

use super::models::{Served, Statistics};
use tensor::Datatype;

pub(super) mod grpc;
pub(super) mod http;
mod infer;
mod tensor;

/// Messages and services, made of `inference.proto`.
pub(super) mod inference {
    #![allow(missing_docs, clippy::all)]
    tonic::include_proto!("inference");

    /// What reflection shows of the protocol.
    pub const DESCRIPTORS: &[u8] = tonic::include_file_descriptor_set!("inference");
}

const EXTENSIONS: [&str; 4] =
    ["binary_tensor_data", "model_configuration", "statistics", "model_repository"];

/// A tensor that a model takes or gives; -1 for sizes that differ.
struct Described {
    name: &'static str,
    datatype: Datatype,
    shape: &'static [i64],
}

const fn described(name: &'static str, datatype: Datatype, shape: &'static [i64]) -> Described {
    Described { name, datatype, shape }
}

/// All inputs are optional; a request has one of `history`, `tokens`, `text` and `request`.
const INPUTS: [Described; 10] = [
    described("history", Datatype::Bytes, &[-1]),
    described("tokens", Datatype::Int64, &[-1]),
    described("text", Datatype::Bytes, &[-1]),
    described("request", Datatype::Bytes, &[-1]),
    described("exclude", Datatype::Bytes, &[-1]),
    described("only", Datatype::Bytes, &[-1]),
    described("candidates", Datatype::Bytes, &[-1]),
    described("history_lengths", Datatype::Int64, &[-1]),
    described("tokens_lengths", Datatype::Int64, &[-1]),
    described("user", Datatype::Bytes, &[-1]),
];

/// B requests, k results at most, L levels.
const OUTPUTS: [Described; 7] = [
    described("items", Datatype::Bytes, &[-1, -1]),
    described("sids", Datatype::Int32, &[-1, -1, -1]),
    described("scores", Datatype::Fp32, &[-1, -1]),
    described("counts", Datatype::Int32, &[-1]),
    described("snapshot", Datatype::Uint64, &[1]),
    described("titles", Datatype::Bytes, &[-1, -1]),
    described("log_probs", Datatype::Fp32, &[-1, -1, -1]),
];

const PLATFORM: &str = "sidereal";

fn metadata(served: &Served, versions: &[String]) -> Value {
    let list = |tensors: &[Described]| -> Vec<Value> {
        let entry = |tensor: &Described| json!({ "name": tensor.name, "datatype": tensor.datatype.name(), "shape": tensor.shape });
        tensors.iter().map(entry).collect()
    };
    json!({
        "name": served.name,
        "versions": versions,
        "platform": PLATFORM,
        "inputs": list(&INPUTS),
        "outputs": list(&OUTPUTS),
    })
}

fn config(served: &Served) -> Value {
    let list = |tensors: &[Described], are_inputs: bool| -> Vec<Value> {
        let entry = |tensor: &Described| {
            let data_type = tensor.datatype.config_name();
            let mut entry =
                json!({ "name": tensor.name, "data_type": data_type, "dims": tensor.shape });
            if are_inputs {
                entry["optional"] = true.into();
            }
            entry
        };
        tensors.iter().map(entry).collect()
    };
    json!({
        "name": served.name,
        "platform": PLATFORM,
        "backend": PLATFORM,
        "version_policy": { "all": {} },
        "max_batch_size": 0,
        "input": list(&INPUTS, true),
        "output": list(&OUTPUTS, false),
        "model_transaction_policy": { "decoupled": false },
    })
}

/// Counts and nanoseconds of a version, as both protocols have them.
struct Counts {
    success: (u64, u64),
    fail: (u64, u64),
    queue: (u64, u64),
    compute_infer: (u64, u64),
    last_ms: u64,
}

fn counts(statistics: &Statistics) -> Counts {
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
    let read = |counter: &AtomicU64| counter.load(Relaxed);
    let answered = read(&statistics.answered);
    Counts {
        success: (answered, read(&statistics.answered_ns)),
        fail: (read(&statistics.failed), read(&statistics.failed_ns)),
        queue: (answered, read(&statistics.queued_ns)),
        compute_infer: (answered, read(&statistics.engine_ns)),
        last_ms: read(&statistics.last_ms),
    }
}
