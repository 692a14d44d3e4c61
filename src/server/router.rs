//! Which path leads where.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use axum::Router;
use axum::extract::{Request, State as Shared};
use axum::http::{HeaderName, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};

use super::error::Failure;
use super::protocol::{grpc, http, inference};
use super::state::State;
use super::{completions, exposition, generate, json, openapi, page};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// All HTTP doors.
pub(super) fn http(state: &Arc<State>) -> Router {
    Router::new()
        .route("/", get(page::page))
        .route("/openapi.json", get(openapi::document))
        .route("/metrics", get(exposition::metrics))
        .route("/health", get(http::ready))
        .route("/healthz", get(http::live))
        .merge(native())
        .merge(open_inference())
        .route("/generate", post(generate::generate))
        .route("/model_info", get(generate::model_info))
        .route("/get_model_info", get(generate::model_info))
        .route("/server_info", get(generate::server_info))
        .route("/get_server_info", get(generate::server_info))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/chat/completions", post(completions::chat))
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(Arc::clone(state), around))
        .with_state(Arc::clone(state))
}

fn native() -> Router<Arc<State>> {
    Router::new()
        .route("/v1/recommend", post(json::recommend))
        .route("/v1/rank", post(json::rank))
        .route("/v1/score", post(json::score))
        .route("/v1/catalog", get(json::catalog))
        .route("/v1/catalog/items/{item}", get(json::item))
        .route("/v1/catalog/changes", post(json::change))
        .route("/v1/catalog/base", post(json::replace_base))
        .route("/v1/models", get(json::models))
        .route("/v1/status", get(json::status))
}

fn open_inference() -> Router<Arc<State>> {
    let mut router = Router::new()
        .route("/v2", get(http::server))
        .route("/v2/", get(http::server))
        .route("/v2/health/live", get(http::live))
        .route("/v2/health/ready", get(http::ready))
        .route("/v2/models/stats", get(http::statistics))
        .route("/v2/repository/index", post(http::index))
        .route("/v2/repository/models/{model}/load", post(http::load))
        .route("/v2/repository/models/{model}/unload", post(http::unload));
    for model in ["/v2/models/{model}", "/v2/models/{model}/versions/{version}"] {
        router = router
            .route(model, get(http::model))
            .route(&format!("{model}/ready"), get(http::model_ready))
            .route(&format!("{model}/config"), get(http::model_config))
            .route(&format!("{model}/stats"), get(http::statistics))
            .route(&format!("{model}/infer"), post(http::infer));
    }
    router
}

/// The gRPC services: inference, health, reflection.
pub(super) fn grpc(state: &Arc<State>) -> crate::error::Result<Router> {
    use inference::grpc_inference_service_server::GrpcInferenceServiceServer;
    let failed = |error: tonic_reflection::server::Error| crate::error::Error::EngineFailed {
        reason: format!("the descriptors of the gRPC door: {error}"),
    };
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(inference::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let service = GrpcInferenceServiceServer::new(grpc::Service { state: Arc::clone(state) })
        .max_decoding_message_size(state.limits.body_bytes);
    let routes = tonic::service::Routes::new(service)
        .add_service(tonic_health::pb::health_server::HealthServer::new(grpc::Health {
            state: Arc::clone(state),
        }))
        .add_service(reflection().build_v1().map_err(failed)?)
        .add_service(reflection().build_v1alpha().map_err(failed)?);
    Ok(routes.into_axum_router())
}

/// Echoes the request's ID, and counts what is sent.
async fn around(Shared(state): Shared<Arc<State>>, request: Request, next: Next) -> Response {
    let id = request.headers().get(REQUEST_ID).cloned();
    let span = tracing::debug_span!(
        target: "sidereal",
        "http",
        method = %request.method(),
        path = request.uri().path(),
        traceparent = request.headers().get("traceparent").and_then(|value| value.to_str().ok()),
    );
    let mut response = {
        use tracing::Instrument as _;
        next.run(request).instrument(span).await
    };
    if let Some(id) = id {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    let length = response.headers().get(header::CONTENT_LENGTH);
    let length: Option<u64> = length.and_then(|value| value.to_str().ok()?.parse().ok());
    let length = length.or_else(|| {
        use axum::body::HttpBody as _;
        response.body().size_hint().exact()
    });
    state.metrics.sent_bytes.fetch_add(length.unwrap_or(0), Relaxed);
    if state.is_draining() {
        let close = header::HeaderValue::from_static("close");
        response.headers_mut().insert(header::CONNECTION, close);
    }
    response
}

async fn unknown_route(request: Request) -> Response {
    let path = super::error::quoted(request.uri().path());
    let message = format!("there is no route {path}; GET /openapi.json lists those that there are");
    Failure::not_found(message).into_response()
}

async fn wrong_method(request: Request) -> Response {
    let (method, path) = (request.method(), super::error::quoted(request.uri().path()));
    let message = format!("{path} takes no {method}; GET /openapi.json says what it takes");
    Failure::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message).into_response()
}
