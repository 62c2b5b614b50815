//! The web page at `/`: three files in the binary, nothing from elsewhere.

use std::sync::{Arc, OnceLock};

use axum::Router;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get};
use sha2::{Digest, Sha256};

use crate::app::App;

/// What the page may load and where it may send: its own files and its own server. Media that the user chose are blobs.
/// The favicon is a data URL.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                      img-src 'self' blob: data:; media-src 'self' blob:; base-uri 'none'; form-action 'none'; \
                      frame-ancestors 'none'";

/// A file of the page.
struct Asset {
    path: &'static str,
    kind: &'static str,
    body: &'static str,
}

const ASSETS: [Asset; 7] = [
    Asset { path: "/", kind: "text/html; charset=utf-8", body: include_str!("../page/index.html") },
    Asset { path: "/page/page.css", kind: "text/css; charset=utf-8", body: include_str!("../page/page.css") },
    Asset { path: "/page/page.js", kind: "text/javascript; charset=utf-8", body: include_str!("../page/page.js") },
    Asset { path: "/page/api.js", kind: "text/javascript; charset=utf-8", body: include_str!("../page/api.js") },
    Asset { path: "/page/media.js", kind: "text/javascript; charset=utf-8", body: include_str!("../page/media.js") },
    Asset { path: "/page/render.js", kind: "text/javascript; charset=utf-8", body: include_str!("../page/render.js") },
    Asset { path: "/page/turn.js", kind: "text/javascript; charset=utf-8", body: include_str!("../page/turn.js") },
];

/// Whether a route is the page's: it is given without a key, which it then asks for.
pub(crate) fn is_page(route: &str) -> bool {
    ASSETS.iter().any(|asset| asset.path == route)
}

/// Adds the page's routes.
pub(crate) fn mount(router: Router<Arc<App>>) -> Router<Arc<App>> {
    ASSETS.iter().fold(router, |router, asset| router.route(asset.path, route(asset)))
}

fn route(asset: &'static Asset) -> MethodRouter<Arc<App>> {
    get(move |headers: HeaderMap| async move { serve(asset, &headers) })
}

/// The file, or 304 to a browser that has this version.
fn serve(asset: &Asset, headers: &HeaderMap) -> Response {
    static TAG: OnceLock<String> = OnceLock::new();
    // One tag for all files, so that a page of one version never keeps a script of another.
    let tag = TAG.get_or_init(|| {
        let digest = ASSETS.iter().fold(Sha256::new(), |digest, asset| digest.chain_update(asset.body)).finalize();
        format!("\"{}\"", digest[..8].iter().map(|byte| format!("{byte:02x}")).collect::<String>())
    });
    let known = headers.get(header::IF_NONE_MATCH).and_then(|value| value.to_str().ok());
    let common = [
        (header::ETAG, tag.as_str()),
        (header::CACHE_CONTROL, "no-cache"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    if known.is_some_and(|known| known.split(',').any(|one| one.trim().trim_start_matches("W/") == tag)) {
        return (StatusCode::NOT_MODIFIED, common).into_response();
    }
    (common, [(header::CONTENT_TYPE, asset.kind)], asset.body).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_and_self_contained() {
        let bytes: usize = ASSETS.iter().map(|asset| asset.body.len()).sum();
        assert!(bytes < 64 * 1024, "{bytes} bytes");
        for asset in &ASSETS {
            // Names of elements in SVG are no addresses.
            let text = asset.body.replace("http://www.w3.org/2000/svg", "");
            assert!(!text.contains("//cdn") && !text.contains("src=\"http"), "{}", asset.path);
            for way in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "onclick="] {
                assert!(!text.contains(way), "{way} in {}", asset.path);
            }
        }
    }

    #[test]
    fn files_are_named_as_they_are_served() {
        let of = |path: &str| ASSETS.iter().find(|asset| asset.path == path).map(|asset| asset.body).unwrap();
        for asset in ASSETS.iter().skip(1) {
            let import = format!("from \"./{}\"", asset.path.trim_start_matches("/page/"));
            let named = of("/").contains(asset.path) || of("/page/page.js").contains(&import);
            assert!(named, "nothing loads {}", asset.path);
        }
    }
}
