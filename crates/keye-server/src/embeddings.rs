//! `POST /v1/embeddings`: prompts, or messages with media, as vectors.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request as HttpRequest, State};
use axum::http::StatusCode;
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use keye_engine::{Canceller, Embedding, EmbeddingStream, EngineError, Pooling, Request};
use serde_json::{Value, json};
use tokio::sync::oneshot;

use crate::admission::Lease;
use crate::app::App;
use crate::chat::{blocking, conversation, template};
use crate::completions::prompts;
use crate::error::{ApiError, json_response};
use crate::fields::{self, Fields};
use crate::generation::warned;
use crate::guard::RequestId;
use crate::tools::Tools;

struct Asked {
    requests: Vec<Request>,
    /// The field that they came from.
    field: &'static str,
    pooling: Pooling,
    base64: bool,
}

pub(crate) async fn embeddings(
    State(app): State<Arc<App>>,
    Extension(id): Extension<RequestId>,
    request: HttpRequest,
) -> Result<Response, ApiError> {
    let mut lease = Lease::default();
    lease.take_streams(&app, 1)?;
    let body = lease.read_body(&app, request).await?;
    let asked = blocking({
        let app = Arc::clone(&app);
        move || read(&body, &app)
    })
    .await?;
    lease.take_streams(&app, asked.requests.len() - 1)?;
    let streams = asked.requests.into_iter().map(|request| app.engine.embed(request, asked.pooling));
    let streams = streams.collect::<Result<Vec<EmbeddingStream>, EngineError>>()?;
    let _cancel = Cancel(streams.iter().map(EmbeddingStream::canceller).collect());
    let (sender, receiver) = oneshot::channel();
    let thread = std::thread::Builder::new().name("keye-embedding".into());
    let waiting = thread.spawn(move || {
        let found: Result<Vec<Embedding>, EngineError> = streams.into_iter().map(EmbeddingStream::wait).collect();
        drop(lease);
        // Nobody is there when the client went away.
        let _ = sender.send(found);
    });
    waiting.map_err(|error| {
        tracing::error!(request_id = id.id, %error, "cannot start a thread");
        ApiError::internal()
    })?;
    let found = tokio::select! {
        found = receiver => found.map_err(|_| ApiError::internal())?,
        () = app.cut() => return Err(ApiError::stopping()),
    };
    let found = found.map_err(|error| {
        app.metrics.failed.add(1);
        let said = error.to_string();
        let error = ApiError::from(error);
        if error.status.is_server_error() {
            tracing::error!(request_id = id.id, error = said, "embedding");
        }
        let param = error.param.map(|param| if param == "messages" { asked.field.to_owned() } else { param });
        ApiError { param, ..error }
    })?;
    found.iter().for_each(|embedding| app.metrics.embedded(&embedding.usage));
    let tokens: usize = found.iter().map(|embedding| embedding.usage.prompt_tokens).sum();
    tracing::info!(request_id = id.id, prompts = found.len(), prompt_tokens = tokens, "embedding");
    let data = found.iter().enumerate().map(|(index, found)| {
        json!({"object": "embedding", "index": index, "embedding": values(&found.values, asked.base64)})
    });
    let warnings = found.iter().flat_map(|found| &found.warnings);
    let warnings: Vec<Value> = warnings.map(|(medium, warning)| warned(&id, *medium, warning)).collect();
    let mut answer = json!({
        "object": "list", "data": data.collect::<Vec<_>>(), "model": app.config.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    });
    if !warnings.is_empty() {
        answer["warnings"] = warnings.into();
    }
    Ok(json_response(StatusCode::OK, &answer))
}

/// Dropped when the client goes away.
struct Cancel(Vec<Canceller>);

impl Drop for Cancel {
    fn drop(&mut self) {
        self.0.iter().for_each(Canceller::cancel);
    }
}

fn read(body: &[u8], app: &App) -> Result<Asked, ApiError> {
    let body = fields::parse(body)?;
    let fields = Fields::of(&body)?;
    fields.string("model")?;
    if fields.get("dimensions").is_some() {
        let message = "dimensions: a shorter vector would need a model that was trained for it";
        return Err(ApiError { code: Some("unsupported_parameter"), ..ApiError::invalid("dimensions", message) });
    }
    let base64 = match fields.string("encoding_format")? {
        None | Some("float") => false,
        Some("base64") => true,
        Some(_) => return Err(ApiError::invalid("encoding_format", "encoding_format: expected float or base64")),
    };
    let pooling = match fields.string("pooling")? {
        None | Some("last") => Pooling::Last,
        Some("mean") => Pooling::Mean,
        Some(_) => return Err(ApiError::invalid("pooling", "pooling: expected last or mean")),
    };
    let (field, requests) = match fields.get("messages") {
        Some(_) if fields.get("input").is_some() => {
            return Err(ApiError::invalid("input", "input: messages are there too; send one of them"));
        }
        Some(messages) => {
            let conversation = conversation(messages, &Tools::default(), app)?;
            let (think, mut template) = template(&fields, &Tools::default())?;
            // The answer is not to be expected, unless asked for.
            template.add_generation_prompt = fields.bool("add_generation_prompt")?.unwrap_or(false);
            ("messages", vec![Request { conversation, think, template, ..Request::default() }])
        }
        None => {
            let request = |prompt| Request { raw_prompt: Some(prompt), ..Request::default() };
            ("input", prompts(&fields, "input", app)?.into_iter().map(request).collect())
        }
    };
    let most = app.config.max_streams;
    if !(1..=most).contains(&requests.len()) {
        return Err(ApiError::invalid("input", format!("input: expected 1 to {most} texts")));
    }
    Ok(Asked { requests, field, pooling, base64 })
}

/// Numbers, or the base64 of little-endian f32.
fn values(values: &[f32], base64: bool) -> Value {
    if base64 {
        STANDARD.encode(values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>()).into()
    } else {
        values.into()
    }
}
