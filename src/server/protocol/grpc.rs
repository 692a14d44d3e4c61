//! The protocol over gRPC.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use serde_json::{Map, Value};
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

use super::super::access::Scope;
use super::super::door::Door;
use super::super::error::{Failure, Outcome};
use super::super::models::Served;
use super::super::operations::blocking;
use super::super::state::State;
use super::http::versions_of;
use super::infer::{self, Infer};
use super::inference::grpc_inference_service_server::GrpcInferenceService;
use super::inference::{self as messages, infer_parameter, model_metadata_response};
use super::tensor::Input;
use super::{Counts, Datatype, Described, EXTENSIONS, INPUTS, OUTPUTS, PLATFORM, counts};

/// The service, for all connections.
#[derive(Clone)]
pub(crate) struct Service {
    pub state: Arc<State>,
}

type Reply<T> = Result<Response<T>, Status>;

impl Service {
    /// Refuses calls without the token that they need, and all while the server ends.
    fn check<T>(&self, request: &Request<T>, scope: Scope) -> Outcome<()> {
        let authorization = request.metadata().get("authorization").map(|value| value.as_bytes());
        self.state.access.check(authorization, scope).inspect_err(|_| {
            self.state.metrics.refused_tokens.fetch_add(1, Relaxed);
        })?;
        match self.state.is_draining() {
            true => Err(Failure::draining()),
            false => Ok(()),
        }
    }

    async fn infer(
        &self,
        request: messages::ModelInferRequest,
        timeout: Option<Duration>,
    ) -> Outcome<messages::ModelInferResponse> {
        let id = request.id.clone();
        let request = infer_of(request, timeout)?;
        let answering = infer::infer(&self.state, Door::Grpc, request);
        // The engine ends a request at its deadline between two steps; the caller needs to be told
        // in time all the same.
        let (served, outputs) = match timeout {
            Some(timeout) => match tokio::time::timeout(timeout, answering).await {
                Ok(answer) => answer?,
                Err(_) => return Err(late(timeout)),
            },
            None => answering.await?,
        };
        let raw_output_contents = outputs.iter().map(|output| output.raw().to_vec()).collect();
        let outputs = outputs
            .iter()
            .map(|output| messages::model_infer_response::InferOutputTensor {
                name: output.name.into(),
                datatype: output.datatype().name().into(),
                shape: output.shape.iter().map(|&size| size as i64).collect(),
                parameters: HashMap::new(),
                contents: None,
            })
            .collect();
        Ok(messages::ModelInferResponse {
            model_name: served.name.clone(),
            model_version: served.version.to_string(),
            id,
            parameters: HashMap::new(),
            outputs,
            raw_output_contents,
        })
    }
}

fn late(timeout: Duration) -> Failure {
    let deadline_ms = timeout.as_secs_f64() * 1e3;
    crate::error::Error::DeadlineExceeded { deadline_ms, retry_after_ms: None }.into()
}

/// The time that a call's `grpc-timeout` leaves it: at most eight digits and a unit.
fn timeout<T>(request: &Request<T>) -> Option<Duration> {
    let text = request.metadata().get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let number: u32 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(3600) * number,
        "M" => Duration::from_secs(60) * number,
        "S" => Duration::from_secs(1) * number,
        "m" => Duration::from_millis(1) * number,
        "u" => Duration::from_micros(1) * number,
        "n" => Duration::from_nanos(1) * number,
        _ => return None,
    })
}

fn infer_of(request: messages::ModelInferRequest, timeout: Option<Duration>) -> Outcome<Infer> {
    let has_raw = !request.raw_input_contents.is_empty();
    if has_raw && request.raw_input_contents.len() != request.inputs.len() {
        return Err(Failure::malformed(format!(
            "raw_input_contents has {} entries for {} inputs; give one for each, or none",
            request.raw_input_contents.len(),
            request.inputs.len()
        )));
    }
    let mut inputs = Vec::with_capacity(request.inputs.len());
    for (index, input) in request.inputs.into_iter().enumerate() {
        let (name, datatype, shape) = (&*input.name, &*input.datatype, &*input.shape);
        inputs.push(match (has_raw, input.contents) {
            (true, None) => {
                Input::from_raw(name, datatype, shape, &request.raw_input_contents[index])?
            }
            (false, contents) => {
                Input::new(name, datatype, shape, values(contents.unwrap_or_default())?)?
            }
            (true, Some(_)) => {
                return Err(Failure::malformed(format!(
                    "input {name:?} has its data twice, raw and in its contents"
                )));
            }
        });
    }
    Ok(Infer {
        model: request.model_name,
        version: request.model_version,
        parameters: parameters(request.parameters),
        inputs,
        outputs: request.outputs.into_iter().map(|output| output.name).collect(),
        timeout,
    })
}

fn parameters(parameters: HashMap<String, messages::InferParameter>) -> Map<String, Value> {
    use infer_parameter::ParameterChoice as Choice;
    let value = |parameter: messages::InferParameter| match parameter.parameter_choice {
        None => Value::Null,
        Some(Choice::BoolParam(value)) => value.into(),
        Some(Choice::Int64Param(value)) => value.into(),
        Some(Choice::StringParam(value)) => value.into(),
        Some(Choice::DoubleParam(value)) => value.into(),
        Some(Choice::Uint64Param(value)) => value.into(),
    };
    parameters.into_iter().map(|(name, parameter)| (name, value(parameter))).collect()
}

/// Values in whatever field they are.
fn values(contents: messages::InferTensorContents) -> Outcome<Vec<Value>> {
    let mut values: Vec<Value> = Vec::new();
    values.extend(contents.bool_contents.into_iter().map(Value::from));
    values.extend(contents.int_contents.into_iter().map(Value::from));
    values.extend(contents.int64_contents.into_iter().map(Value::from));
    values.extend(contents.uint_contents.into_iter().map(Value::from));
    values.extend(contents.uint64_contents.into_iter().map(Value::from));
    values.extend(contents.fp32_contents.into_iter().map(Value::from));
    values.extend(contents.fp64_contents.into_iter().map(Value::from));
    for bytes in contents.bytes_contents {
        let text = String::from_utf8(bytes)
            .map_err(|error| Failure::malformed(format!("a text is not UTF-8: {error}")))?;
        values.push(text.into());
    }
    Ok(values)
}

fn tensors(described: &[Described]) -> Vec<model_metadata_response::TensorMetadata> {
    let entry = |tensor: &Described| model_metadata_response::TensorMetadata {
        name: tensor.name.into(),
        datatype: tensor.datatype.name().into(),
        shape: tensor.shape.to_vec(),
    };
    described.iter().map(entry).collect()
}

fn data_type(datatype: Datatype) -> i32 {
    let data_type = match datatype {
        Datatype::Bytes => messages::DataType::TypeString,
        Datatype::Int32 => messages::DataType::TypeInt32,
        Datatype::Int64 => messages::DataType::TypeInt64,
        Datatype::Uint64 => messages::DataType::TypeUint64,
        Datatype::Fp32 => messages::DataType::TypeFp32,
        _ => messages::DataType::TypeInvalid,
    };
    data_type.into()
}

fn config(served: &Served) -> messages::ModelConfig {
    let input = |tensor: &Described| messages::ModelInput {
        name: tensor.name.into(),
        data_type: data_type(tensor.datatype),
        dims: tensor.shape.to_vec(),
        optional: true,
    };
    let output = |tensor: &Described| messages::ModelOutput {
        name: tensor.name.into(),
        data_type: data_type(tensor.datatype),
        dims: tensor.shape.to_vec(),
    };
    messages::ModelConfig {
        name: served.name.clone(),
        platform: PLATFORM.into(),
        max_batch_size: 0,
        input: INPUTS.iter().map(input).collect(),
        output: OUTPUTS.iter().map(output).collect(),
        backend: PLATFORM.into(),
        model_transaction_policy: Some(messages::ModelTransactionPolicy { decoupled: false }),
    }
}

fn statistics(served: &Served) -> messages::ModelStatistics {
    let Counts { success, fail, queue, compute_infer, last_ms } = counts(&served.statistics);
    let duration = |(count, ns): (u64, u64)| Some(messages::StatisticDuration { count, ns });
    messages::ModelStatistics {
        name: served.name.clone(),
        version: served.version.to_string(),
        last_inference: last_ms,
        inference_count: success.0,
        execution_count: success.0,
        inference_stats: Some(messages::InferStatistics {
            success: duration(success),
            fail: duration(fail),
            queue: duration(queue),
            compute_input: duration((success.0, 0)),
            compute_infer: duration(compute_infer),
            compute_output: duration((success.0, 0)),
            cache_hit: duration((0, 0)),
            cache_miss: duration((0, 0)),
        }),
    }
}

#[tonic::async_trait]
impl GrpcInferenceService for Service {
    async fn server_live(
        &self,
        _: Request<messages::ServerLiveRequest>,
    ) -> Reply<messages::ServerLiveResponse> {
        Ok(Response::new(messages::ServerLiveResponse { live: true }))
    }

    async fn server_ready(
        &self,
        _: Request<messages::ServerReadyRequest>,
    ) -> Reply<messages::ServerReadyResponse> {
        Ok(Response::new(messages::ServerReadyResponse { ready: self.state.is_ready() }))
    }

    async fn model_ready(
        &self,
        request: Request<messages::ModelReadyRequest>,
    ) -> Reply<messages::ModelReadyResponse> {
        let messages::ModelReadyRequest { name, version } = request.into_inner();
        let served = self.state.models.find(&name, &version);
        let is_ready = |served: Arc<Served>| served.recommender.is_serving();
        let ready = !self.state.is_draining() && served.is_ok_and(is_ready);
        Ok(Response::new(messages::ModelReadyResponse { ready }))
    }

    async fn server_metadata(
        &self,
        _: Request<messages::ServerMetadataRequest>,
    ) -> Reply<messages::ServerMetadataResponse> {
        Ok(Response::new(messages::ServerMetadataResponse {
            name: "sidereal".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            extensions: EXTENSIONS.map(str::to_string).to_vec(),
        }))
    }

    async fn model_metadata(
        &self,
        request: Request<messages::ModelMetadataRequest>,
    ) -> Reply<messages::ModelMetadataResponse> {
        self.check(&request, Scope::Read)?;
        let messages::ModelMetadataRequest { name, version } = request.into_inner();
        let served = self.state.models.find(&name, &version)?;
        Ok(Response::new(messages::ModelMetadataResponse {
            name: served.name.clone(),
            versions: versions_of(&self.state, &served.name),
            platform: PLATFORM.into(),
            inputs: tensors(&INPUTS),
            outputs: tensors(&OUTPUTS),
        }))
    }

    async fn model_infer(
        &self,
        request: Request<messages::ModelInferRequest>,
    ) -> Reply<messages::ModelInferResponse> {
        self.check(&request, Scope::Read)?;
        let timeout = timeout(&request);
        Ok(Response::new(self.infer(request.into_inner(), timeout).await?))
    }

    type ModelStreamInferStream =
        Pin<Box<dyn Stream<Item = Result<messages::ModelStreamInferResponse, Status>> + Send>>;

    async fn model_stream_infer(
        &self,
        request: Request<Streaming<messages::ModelInferRequest>>,
    ) -> Reply<Self::ModelStreamInferStream> {
        self.check(&request, Scope::Read)?;
        let service = self.clone();
        let answers = request.into_inner().then(move |request| {
            let service = service.clone();
            async move {
                let id = request.as_ref().map(|request| request.id.clone()).unwrap_or_default();
                let answer = match request {
                    Ok(request) => service.infer(request, None).await,
                    Err(status) => return Err(status),
                };
                Ok(match answer {
                    Ok(answer) => messages::ModelStreamInferResponse {
                        error_message: String::new(),
                        infer_response: Some(answer),
                    },
                    Err(failure) => messages::ModelStreamInferResponse {
                        error_message: failure.body.message,
                        infer_response: Some(messages::ModelInferResponse {
                            id,
                            ..Default::default()
                        }),
                    },
                })
            }
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn model_config(
        &self,
        request: Request<messages::ModelConfigRequest>,
    ) -> Reply<messages::ModelConfigResponse> {
        self.check(&request, Scope::Read)?;
        let messages::ModelConfigRequest { name, version } = request.into_inner();
        let served = self.state.models.find(&name, &version)?;
        let config = Some(config(&served));
        Ok(Response::new(messages::ModelConfigResponse { config }))
    }

    async fn model_statistics(
        &self,
        request: Request<messages::ModelStatisticsRequest>,
    ) -> Reply<messages::ModelStatisticsResponse> {
        self.check(&request, Scope::Read)?;
        let messages::ModelStatisticsRequest { name, version } = request.into_inner();
        let served = match name.is_empty() {
            true => self.state.models.all(),
            false => vec![self.state.models.find(&name, &version)?],
        };
        let model_stats = served.iter().map(|served| statistics(served)).collect();
        Ok(Response::new(messages::ModelStatisticsResponse { model_stats }))
    }

    async fn repository_index(
        &self,
        request: Request<messages::RepositoryIndexRequest>,
    ) -> Reply<messages::RepositoryIndexResponse> {
        self.check(&request, Scope::Read)?;
        let only_ready = request.into_inner().ready;
        let listed = self.state.models.index().into_iter();
        let listed = listed.filter(|listed| listed.served.is_some() || !only_ready);
        let models = listed.map(|listed| {
            let (state, reason) = listed.state();
            messages::repository_index_response::ModelIndex {
                name: listed.name,
                version: listed.version.to_string(),
                state: state.into(),
                reason: reason.into(),
            }
        });
        let models = models.collect();
        Ok(Response::new(messages::RepositoryIndexResponse { models }))
    }

    async fn repository_model_load(
        &self,
        request: Request<messages::RepositoryModelLoadRequest>,
    ) -> Reply<messages::RepositoryModelLoadResponse> {
        self.check(&request, Scope::Write)?;
        let (state, name) = (Arc::clone(&self.state), request.into_inner().model_name);
        blocking(move || state.models.load(&name)).await?;
        Ok(Response::new(messages::RepositoryModelLoadResponse {}))
    }

    async fn repository_model_unload(
        &self,
        request: Request<messages::RepositoryModelUnloadRequest>,
    ) -> Reply<messages::RepositoryModelUnloadResponse> {
        self.check(&request, Scope::Write)?;
        let (state, name) = (Arc::clone(&self.state), request.into_inner().model_name);
        blocking(move || state.models.unload(&name)).await?;
        Ok(Response::new(messages::RepositoryModelUnloadResponse {}))
    }
}

/// `grpc.health.v1`: the server as a whole, and the inference service.
pub(crate) struct Health {
    pub state: Arc<State>,
}

impl Health {
    fn status(&self, service: &str) -> Result<tonic_health::pb::HealthCheckResponse, Status> {
        use tonic_health::pb::health_check_response::ServingStatus;
        if !["", "inference.GRPCInferenceService"].contains(&service) {
            return Err(Status::not_found(format!("no service is named {service:?}")));
        }
        let status = match self.state.is_ready() {
            true => ServingStatus::Serving,
            false => ServingStatus::NotServing,
        };
        Ok(tonic_health::pb::HealthCheckResponse { status: status.into() })
    }
}

/// How often a watched status is looked at.
const WATCH_EVERY: Duration = Duration::from_secs(1);

#[tonic::async_trait]
impl tonic_health::pb::health_server::Health for Health {
    async fn check(
        &self,
        request: Request<tonic_health::pb::HealthCheckRequest>,
    ) -> Reply<tonic_health::pb::HealthCheckResponse> {
        Ok(Response::new(self.status(&request.get_ref().service)?))
    }

    type WatchStream =
        Pin<Box<dyn Stream<Item = Result<tonic_health::pb::HealthCheckResponse, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<tonic_health::pb::HealthCheckRequest>,
    ) -> Reply<Self::WatchStream> {
        let service = request.into_inner().service;
        self.status(&service)?;
        let health = Health { state: Arc::clone(&self.state) };
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        tokio::spawn(async move {
            let mut last = None;
            loop {
                let Ok(now) = health.status(&service) else { return };
                if last != Some(now.status) {
                    last = Some(now.status);
                    if sender.send(Ok(now)).await.is_err() {
                        return;
                    }
                }
                if health.state.is_draining() {
                    return; // or the connection would hold up the end of the server
                }
                tokio::select! {
                    () = sender.closed() => return,
                    () = tokio::time::sleep(WATCH_EVERY) => {}
                }
            }
        });
        Ok(Response::new(Box::pin(tokio_stream::wrappers::ReceiverStream::new(receiver))))
    }
}
