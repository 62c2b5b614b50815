//! The server as its clients see it: a tiny checkpoint behind a real socket.

#[path = "api/answers.rs"]
mod answers;
#[path = "api/client.rs"]
mod client;
#[path = "api/embeddings.rs"]
mod embeddings;
#[path = "api/forms.rs"]
mod forms;
#[path = "api/limits.rs"]
mod limits;
#[path = "api/logs.rs"]
mod logs;
#[path = "api/media.rs"]
mod media;
#[path = "api/newer.rs"]
mod newer;
#[cfg(feature = "otel")]
#[path = "api/otel.rs"]
mod otel;
#[path = "api/page.rs"]
mod page;
#[path = "api/python.rs"]
mod python;
#[path = "api/routes.rs"]
mod routes;
#[path = "api/shutdown.rs"]
mod shutdown;
#[path = "api/support.rs"]
mod support;
#[path = "api/tls.rs"]
mod tls;
