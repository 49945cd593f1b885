//! The server behind `byol explore`: the page and what it asks for. It listens on loopback, answers only requests that name this machine (a
//! page elsewhere cannot reach it under another name), gives out only images that the embeddings name and that lie in the data, and takes small
//! requests only.

use std::{
    collections::HashMap,
    io::Cursor,
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock, TryLockError},
};

use axum::{
    Json, Router,
    body::Body,
    extract::{DefaultBodyLimit, Path as Part, Query, Request, State as Shared},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use byol::{
    apply::{
        duplicates,
        embed::{Items, Split},
        map::Method,
        search::Index,
        sheet,
    },
    data::{Dataset, Image, decode},
    train::metrics::{self, Curves},
};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::report;

/// What is shown.
pub struct Shown {
    pub index: Index,
    pub paths: Vec<String>,
    pub labels: Option<Vec<String>>,
    pub places: Vec<[f32; 2]>,
    pub method: Method,
    /// Images outside are not given out.
    pub root: Option<PathBuf>,
    /// Whose curves are shown.
    pub run: Option<PathBuf>,
}

/// What all requests see.
pub struct State {
    shown: Shown,
    classes: Vec<String>,
    /// Number of each row's class.
    class_of: Vec<u16>,
    outliers: OnceLock<Vec<f32>>,
    clusters: OnceLock<Vec<usize>>,
    searching: Mutex<()>,
    /// The data, where its images are not files: opened when the first is asked for.
    packed: OnceLock<Option<Packed>>,
    address: OnceLock<SocketAddr>,
}

/// Bytes of a request at most.
const MOST_BYTES: usize = 1 << 20;

/// Side of a thumbnail at most.
const MOST_PIXELS: u32 = 512;

/// Neighbours that outlier scores look at.
const NEAR: usize = 10;

/// Clusters by k-means.
const CLUSTERS: usize = 12;

/// Rows or pairs in an answer at most.
const MOST_ROWS: usize = 1000;

impl State {
    pub fn new(shown: Shown) -> State {
        let mut classes: Vec<String> = shown.labels.iter().flatten().cloned().collect();
        classes.sort();
        classes.dedup();
        classes.truncate(usize::from(u16::MAX) - 1);
        let number = |label: &String| classes.binary_search(label).map_or(u16::MAX, |i| i as u16);
        let class_of = match &shown.labels {
            Some(labels) => labels.iter().map(number).collect(),
            None => vec![u16::MAX; shown.paths.len()],
        };
        State {
            shown,
            classes,
            class_of,
            outliers: OnceLock::new(),
            clusters: OnceLock::new(),
            searching: Mutex::new(()),
            packed: OnceLock::new(),
            address: OnceLock::new(),
        }
    }

    fn outliers(&self) -> &[f32] {
        self.outliers.get_or_init(|| self.shown.index.outlier_scores(NEAR, |_| ()).iter().map(|s| *s as f32).collect())
    }

    fn row(&self, i: usize) -> Value {
        json!({ "row": i, "path": self.shown.paths[i], "label": self.shown.labels.as_ref().map(|l| &l[i]) })
    }

    /// The image of a row, by its file or out of packed data.
    fn image(&self, i: usize) -> Option<Arc<Image>> {
        if let Some(file) = self.file(i) {
            return decode::file(&file).ok().map(Arc::new);
        }
        let packed = self.packed.get_or_init(|| Packed::open(self.shown.root.as_deref()?)).as_ref()?;
        let place = *packed.places.get(self.shown.paths.get(i)?)?;
        packed.items.get(place).ok()
    }

    /// The first of some evenly spread images that there is no picture of.
    pub fn first_without_image(&self) -> Option<&str> {
        const LOOKED_AT: usize = 16;
        let n = self.shown.paths.len();
        let some = (0..LOOKED_AT.min(n)).map(|k| k * n / LOOKED_AT.min(n));
        let missing = some.into_iter().find(|i| self.image(*i).is_none());
        missing.map(|i| self.shown.paths[i].as_str())
    }

    /// The file of a row, if it lies in the data.
    fn file(&self, i: usize) -> Option<PathBuf> {
        let path = std::fs::canonicalize(self.shown.paths.get(i)?).ok()?;
        let root = std::fs::canonicalize(self.shown.root.as_ref()?).ok()?;
        path.starts_with(root).then_some(path)
    }
}

/// Images that are no files of their own, by name.
struct Packed {
    items: Items,
    places: HashMap<String, usize>,
}

impl Packed {
    fn open(root: &std::path::Path) -> Option<Packed> {
        let dataset = Dataset::open(Some(root).filter(|r| !r.as_os_str().is_empty())?).ok()?;
        let items = Items::of(dataset, Split::All);
        let packed = (0..items.len()).filter(|i| items.path(*i).is_none());
        let places = packed.map(|i| (items.name(i), i)).collect();
        Some(Packed { items, places })
    }
}

type All = Shared<Arc<State>>;

/// Serves until the program ends.
pub fn serve(listener: TcpListener, state: Arc<State>) -> report::Result<()> {
    listener.set_nonblocking(true)?;
    state.address.set(listener.local_addr()?).expect("served once");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_io().enable_time().build()?;
    runtime.block_on(async move {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        Ok(axum::serve(listener, router(state)).await?)
    })
}

fn router(state: Arc<State>) -> Router {
    Router::new()
        .route("/", get(|| page("text/html; charset=utf-8", include_str!("page.html"))))
        .route("/page.js", get(|| page("text/javascript; charset=utf-8", include_str!("page.js"))))
        .route("/page.css", get(|| page("text/css; charset=utf-8", include_str!("page.css"))))
        .route("/api/info", get(info))
        .route("/api/points", get(points))
        .route("/api/scores", get(scores))
        .route("/api/paths", get(paths))
        .route("/api/row/{i}", get(row))
        .route("/api/near/{i}", get(near))
        .route("/api/outliers", get(outliers))
        .route("/api/duplicates", get(duplicate_groups))
        .route("/api/clusters", get(clusters))
        .route("/api/probe", post(probe))
        .route("/api/curves", get(curves))
        .route("/thumb/{i}", get(thumb))
        .layer(DefaultBodyLimit::max(MOST_BYTES))
        .layer(from_fn_with_state(state.clone(), guard))
        .with_state(state)
}

/// Whether a request names this machine and port, and is of this page where the browser says of which.
fn own(headers: &HeaderMap, port: u16) -> bool {
    // Browsers leave the usual port out.
    let own = |host: &str| {
        ["127.0.0.1", "localhost", "[::1]"]
            .iter()
            .any(|name| host == format!("{name}:{port}") || port == 80 && host == *name)
    };
    let said = |name: &str| headers.get(name).map(|v| v.to_str().unwrap_or("?"));
    // A page from elsewhere says so when it posts, and browsers say it of pictures and the like.
    let origin = said("origin").is_none_or(|o| o.strip_prefix("http://").is_some_and(own));
    let site = said("sec-fetch-site").is_none_or(|site| ["same-origin", "none"].contains(&site));
    let one = headers.get_all("host").iter().count() == 1;
    one && said("host").is_some_and(own) && origin && site
}

/// Lets requests through that name this machine as it is, and says to the browser what the page may do.
async fn guard(Shared(state): All, request: Request<Body>, next: Next) -> Response {
    let port = state.address.get().map_or(0, SocketAddr::port);
    // A proxy's form of a request names a host of its own.
    if !own(request.headers(), port) || request.uri().host().is_some() {
        return (StatusCode::FORBIDDEN, "this page is for this machine alone").into_response();
    }
    let mut response = next.run(request).await;
    let policy = "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'";
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, policy),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ] {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

async fn page(kind: &'static str, text: &'static str) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, kind)], text)
}

async fn info(Shared(state): All) -> Json<Value> {
    let shown = &state.shown;
    Json(json!({
        "images": shown.paths.len(), "dim": shown.index.rows().dim, "map": shown.method.name(), "classes": state.classes,
        "run": shown.run.as_deref().map(report::shown), "data": shown.root.as_deref().map(report::shown),
    }))
}

/// Little-endian: for each row x and y as f32 and class as u32 (65535: none).
async fn points(Shared(state): All) -> impl IntoResponse {
    let of = |i: usize| {
        let [x, y] = state.shown.places[i];
        [x.to_le_bytes(), y.to_le_bytes(), u32::from(state.class_of[i]).to_le_bytes()].concat()
    };
    let bytes = (0..state.shown.paths.len()).flat_map(of).collect::<Vec<u8>>();
    ([(header::CONTENT_TYPE, "application/octet-stream")], bytes)
}

/// The outlier score of each row, little-endian f32.
async fn scores(Shared(state): All) -> Result<impl IntoResponse, StatusCode> {
    let bytes = work(move || state.outliers().iter().flat_map(|s| s.to_le_bytes()).collect::<Vec<u8>>()).await?;
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], bytes))
}

async fn paths(Shared(state): All) -> Json<Value> {
    Json(json!({ "paths": state.shown.paths }))
}

/// Runs what computes where it does not hold up other requests.
async fn work<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> Result<T, StatusCode> {
    tokio::task::spawn_blocking(f).await.map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)
}

fn known(state: &State, i: usize) -> Result<(), StatusCode> {
    if i < state.shown.paths.len() { Ok(()) } else { Err(StatusCode::NOT_FOUND) }
}

async fn row(Shared(state): All, Part(i): Part<usize>) -> Result<Json<Value>, StatusCode> {
    known(&state, i)?;
    Ok(Json(state.row(i)))
}

#[derive(Deserialize)]
struct Many {
    n: Option<usize>,
}

impl Many {
    fn or(&self, n: usize) -> usize {
        self.n.unwrap_or(n).min(MOST_ROWS)
    }
}

async fn near(Shared(state): All, Part(i): Part<usize>, Query(many): Query<Many>) -> Result<Json<Value>, StatusCode> {
    known(&state, i)?;
    let found = work(move || {
        let index = &state.shown.index;
        let near = index.nearest(index.rows().row(i), many.or(24) + 1);
        let others = near.into_iter().filter(|(j, _)| *j != i).take(many.or(24));
        others.map(|(j, cosine)| json!({ "cosine": cosine, "of": state.row(j) })).collect::<Vec<_>>()
    });
    Ok(Json(found.await?.into()))
}

async fn outliers(Shared(state): All, Query(many): Query<Many>) -> Result<Json<Value>, StatusCode> {
    let found = work(move || {
        let scores = state.outliers();
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
        order.truncate(many.or(60));
        order.into_iter().map(|i| json!({ "score": scores[i], "of": state.row(i) })).collect::<Vec<_>>()
    });
    Ok(Json(found.await?.into()))
}

#[derive(Deserialize)]
struct Threshold {
    threshold: Option<f32>,
}

async fn duplicate_groups(Shared(state): All, Query(asked): Query<Threshold>) -> Result<Json<Value>, StatusCode> {
    let share = asked.threshold.unwrap_or(duplicates::SHARE);
    if !(0.0..1.0).contains(&share) {
        return Err(StatusCode::BAD_REQUEST);
    }
    let found = work(move || {
        // One search at a time: each takes all cores.
        let _alone = match state.searching.try_lock() {
            Err(TryLockError::WouldBlock) => return Err(StatusCode::TOO_MANY_REQUESTS),
            alone => alone,
        };
        let pairs = duplicates::within(&state.shown.index, share, |_| ());
        let mut groups = duplicates::groups(state.shown.paths.len(), &pairs);
        let all = groups.len();
        groups.truncate(MOST_ROWS / 5);
        let named: Vec<Vec<Value>> =
            groups.iter().map(|g| g.iter().take(20).map(|i| state.row(*i)).collect()).collect();
        Ok(json!({ "groups": named, "all": all }))
    });
    found.await?.map(Json)
}

/// The cluster of each row.
async fn clusters(Shared(state): All) -> Result<Json<Value>, StatusCode> {
    let found = work(move || state.clusters.get_or_init(|| state.shown.index.clusters(CLUSTERS)).clone());
    Ok(Json(json!({ "clusters": found.await? })))
}

/// Rows that were labelled by hand, each with the number of its class.
#[derive(Deserialize)]
struct Labelled {
    rows: Vec<(usize, u16)>,
}

/// For each row the class whose labelled rows' mean is nearest, and how much nearer than the next.
async fn probe(Shared(state): All, Json(labelled): Json<Labelled>) -> Result<Json<Value>, StatusCode> {
    let n = state.shown.paths.len();
    let classes = labelled.rows.iter().map(|(_, c)| usize::from(*c) + 1).max().unwrap_or(0);
    if classes == 0 || classes > 256 || labelled.rows.iter().any(|(i, _)| *i >= n) {
        return Err(StatusCode::BAD_REQUEST);
    }
    let answer = work(move || {
        let rows = state.shown.index.rows();
        let mut means = vec![vec![0.0f32; rows.dim]; classes];
        for (i, class) in &labelled.rows {
            means[usize::from(*class)].iter_mut().zip(rows.row(*i)).for_each(|(m, v)| *m += v);
        }
        for mean in &mut means {
            let length = mean.iter().map(|v| v * v).sum::<f32>().sqrt();
            mean.iter_mut().for_each(|v| *v /= length.max(1e-12));
        }
        let used: Vec<usize> = (0..classes).filter(|c| means[*c].iter().any(|v| *v != 0.0)).collect();
        // The labelled images of each class cancel.
        if used.is_empty() {
            return None;
        }
        let (mut answers, mut margins) = (Vec::with_capacity(n), Vec::with_capacity(n));
        for i in 0..n {
            let dot = |c: &usize| means[*c].iter().zip(rows.row(i)).map(|(a, b)| a * b).sum::<f32>();
            let mut scores: Vec<(f32, usize)> = used.iter().map(|c| (dot(c), *c)).collect();
            scores.sort_by(|a, b| b.0.total_cmp(&a.0));
            answers.push(scores[0].1);
            margins.push((1e3 * (scores[0].0 - scores.get(1).map_or(-1.0, |s| s.0))).round() / 1e3);
        }
        Some(json!({ "answers": answers, "margins": margins }))
    });
    answer.await?.map(Json).ok_or(StatusCode::BAD_REQUEST)
}

/// The curves of the run so far.
async fn curves(Shared(state): All) -> Result<Json<Value>, StatusCode> {
    let Some(run) = state.shown.run.clone() else { return Ok(Json(json!({ "epochs": [], "loss": [] }))) };
    let Curves { epochs, loss } = work(move || metrics::curves(&run.join("metrics.jsonl"))).await?;
    Ok(Json(json!({ "epochs": epochs, "loss": loss })))
}

#[derive(Deserialize)]
struct Size {
    px: Option<u32>,
}

/// The image of a row as PNG, fitted into a square.
async fn thumb(Shared(state): All, Part(i): Part<usize>, Query(size): Query<Size>) -> Result<Response, StatusCode> {
    known(&state, i)?;
    let px = size.px.unwrap_or(96).clamp(8, MOST_PIXELS);
    let png = work(move || state.image(i).and_then(|image| thumbnail(&image, px))).await?;
    let png = png.ok_or(StatusCode::NOT_FOUND)?;
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("image/png"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("max-age=3600"));
    Ok((headers, png).into_response())
}

fn thumbnail(image: &Image, px: u32) -> Option<Vec<u8>> {
    let mut png = Cursor::new(Vec::new());
    sheet::fitted(image, px).write_to(&mut png, image::ImageFormat::Png).ok()?;
    Some(png.into_inner())
}
