//! The routes.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use serde_json::{Value, json};

use crate::app::App;
use crate::error::{ApiError, json_response};
use crate::{chat, completions, embeddings, guard, openapi, page, responses, tokens};

fn routes() -> [(&'static str, MethodRouter<Arc<App>>); 12] {
    [
        ("/health", get(health)),
        ("/ready", get(ready)),
        ("/metrics", get(metrics)),
        ("/openapi.json", get(openapi_json)),
        ("/v1/models", get(models)),
        // Names of models have slashes.
        ("/v1/models/{*model}", get(model)),
        ("/v1/chat/completions", post(chat::chat)),
        ("/v1/completions", post(completions::completions)),
        ("/v1/responses", post(responses::responses)),
        ("/v1/embeddings", post(embeddings::embeddings)),
        ("/tokenize", post(tokens::tokenize)),
        ("/detokenize", post(tokens::detokenize)),
    ]
}

pub(crate) fn router(app: Arc<App>) -> Router {
    let router = routes().into_iter().fold(Router::new(), |router, (path, route)| router.route(path, route));
    page::mount(router)
        .fallback(|| async { ApiError::new(StatusCode::NOT_FOUND, "there is no such route; /openapi.json lists them") })
        .method_not_allowed_fallback(|| async {
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "this route does not take that method")
        })
        .layer(from_fn_with_state(Arc::clone(&app), guard::guard))
        .with_state(app)
}

/// Alive: the process answers.
async fn health() -> Response {
    json_response(StatusCode::OK, &json!({"status": "ok"}))
}

/// Ready for requests: the model is loaded (it is before the server listens) and nobody asked to stop.
async fn ready(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    if app.stopping() {
        Err(ApiError::stopping())
    } else {
        Ok(json_response(StatusCode::OK, &json!({"status": "ready"})))
    }
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], app.metrics.text(&app)).into_response()
}

async fn openapi_json() -> Response {
    json_response(StatusCode::OK, &openapi::document())
}

fn model_object(app: &App) -> Value {
    json!({
        "id": app.config.model, "object": "model", "created": app.created, "owned_by": "keye",
        "max_model_len": app.engine.max_model_len(),
    })
}

async fn models(State(app): State<Arc<App>>) -> Response {
    json_response(StatusCode::OK, &json!({"object": "list", "data": [model_object(&app)]}))
}

async fn model(State(app): State<Arc<App>>, Path(name): Path<String>) -> Result<Response, ApiError> {
    if name != app.config.model {
        let error = ApiError::new(StatusCode::NOT_FOUND, "there is no such model; /v1/models lists them");
        return Err(ApiError { code: Some("model_not_found"), param: Some("model".into()), ..error });
    }
    Ok(json_response(StatusCode::OK, &model_object(&app)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn openapi_has_every_route_and_no_other() {
        let document = openapi::document();
        let mut documented: Vec<String> = document["paths"].as_object().unwrap().keys().cloned().collect();
        let mut routed: Vec<String> = routes().iter().map(|(path, _)| path.replace("{*", "{")).collect();
        documented.sort();
        routed.sort();
        assert_eq!(documented, routed);
    }
}
