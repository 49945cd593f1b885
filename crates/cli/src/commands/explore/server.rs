//! HTTP server of `byol explore`: the page and its API.
//!
//! It listens on the loopback interface, rejects requests that address another host or come from
//! another site, serves only images that are listed in the embeddings and lie in the data folder,
//! and limits the size of requests.

use std::{
    io::Cursor,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use axum::{
    Json, Router,
    body::Body,
    extract::{DefaultBodyLimit, Path as UrlPath, Query, Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use byol::{
    apply::{
        duplicates::{self, Pair},
        hand_labels,
        map::Method,
        row_images::RowImages,
        search::Index,
        sheet,
    },
    image::Image,
    train::metrics::{self, Curves},
};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{commands::embeddings_args::evidence_json, terminal};

/// Embeddings to explore, one row per image.
pub struct Collection {
    pub index: Index,
    /// Images by row; those outside the data folder are not served.
    pub images: RowImages,
    pub labels: Option<Vec<Option<String>>>,
    /// Map coordinates in [-1, 1]².
    pub coordinates: Vec<[f32; 2]>,
    pub method: Method,
    /// Folder of the run whose training curves are shown.
    pub run: Option<PathBuf>,
    /// File of the labels given in the browser.
    pub hand_labels: PathBuf,
}

/// State shared by all requests.
pub struct AppState {
    collection: Collection,
    /// Sorted class names.
    classes: Vec<String>,
    /// Index of each row's class, or [`NO_CLASS`].
    class_indices: Vec<u16>,
    outlier_scores: OnceLock<Vec<f32>>,
    clusters: OnceLock<Vec<usize>>,
    duplicate_search: Mutex<DuplicateSearch>,
    /// Held while the labels are written.
    hand_labels: Mutex<()>,
    address: OnceLock<SocketAddr>,
}

/// Class index of images without a label.
const NO_CLASS: u16 = u16::MAX;

/// Maximum size of a request body in bytes.
const MAX_BODY_BYTES: usize = 1 << 20;

/// Maximum side of a thumbnail in pixels.
const MAX_THUMBNAIL_SIDE: u32 = 512;

/// Nearest neighbors per outlier score.
const OUTLIER_NEIGHBORS: usize = 10;

/// Number of k-means clusters.
const CLUSTERS: usize = 12;

/// Maximum number of images in a response.
const MAX_RESULTS: usize = 1000;

/// Maximum number of duplicate groups in a response, and of images per group.
const MAX_GROUPS: usize = 200;
const MAX_GROUP_IMAGES: usize = 20;

impl AppState {
    pub fn new(collection: Collection) -> AppState {
        let mut classes: Vec<String> = collection.labels.iter().flatten().flatten().cloned().collect();
        classes.sort();
        classes.dedup();
        classes.truncate(usize::from(NO_CLASS) - 1);
        let index_of = |label: &String| classes.binary_search(label).ok().map(|i| i as u16);
        let class_index = |label: &Option<String>| label.as_ref().and_then(index_of).unwrap_or(NO_CLASS);
        let class_indices = match &collection.labels {
            Some(labels) => labels.iter().map(class_index).collect(),
            None => vec![NO_CLASS; collection.images.paths().len()],
        };
        AppState {
            collection,
            classes,
            class_indices,
            outlier_scores: OnceLock::new(),
            clusters: OnceLock::new(),
            duplicate_search: Mutex::default(),
            hand_labels: Mutex::default(),
            address: OnceLock::new(),
        }
    }

    fn outlier_scores(&self) -> &[f32] {
        self.outlier_scores.get_or_init(|| {
            let scores = self.collection.index.outlier_scores(OUTLIER_NEIGHBORS, |_| ());
            scores.iter().map(|s| *s as f32).collect()
        })
    }

    /// Returns the JSON description of an image.
    fn describe(&self, row: usize) -> Value {
        let label = self.collection.labels.as_ref().and_then(|labels| labels[row].as_ref());
        json!({ "row": row, "path": self.paths()[row], "label": label })
    }

    /// Loads the image of a row, if it can be read.
    fn image(&self, row: usize) -> Option<Arc<Image>> {
        self.collection.images.get(row).ok()
    }

    /// Paths of the images.
    fn paths(&self) -> &[String] {
        self.collection.images.paths()
    }

    /// Returns the path of the first missing image among a few evenly spaced ones.
    pub fn first_missing_image(&self) -> Option<&str> {
        const CHECKED: usize = 16;
        let n = self.paths().len();
        let mut rows = (0..CHECKED.min(n)).map(|k| k * n / CHECKED.min(n));
        let missing = rows.find(|row| self.image(*row).is_none());
        missing.map(|row| self.paths()[row].as_str())
    }

    fn lock_search(&self) -> MutexGuard<'_, DuplicateSearch> {
        self.duplicate_search.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_row(&self, row: usize) -> Result<(), StatusCode> {
        if row < self.paths().len() { Ok(()) } else { Err(StatusCode::NOT_FOUND) }
    }
}

type SharedState = State<Arc<AppState>>;

/// Serves requests until the process exits.
pub fn serve(listener: TcpListener, state: Arc<AppState>) -> terminal::Result<()> {
    listener.set_nonblocking(true)?;
    state.address.set(listener.local_addr()?).expect("served once");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_io().enable_time().build()?;
    runtime.block_on(async move {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        Ok(axum::serve(listener, router(state)).await?)
    })
}

fn router(state: Arc<AppState>) -> Router {
    Router::new()
        .route("/", get(|| asset("text/html; charset=utf-8", include_str!("page.html"))))
        .route("/page.js", get(|| asset("text/javascript; charset=utf-8", include_str!("page.js"))))
        .route("/page.css", get(|| asset("text/css; charset=utf-8", include_str!("page.css"))))
        .route("/api/info", get(info))
        .route("/api/points", get(points))
        .route("/api/scores", get(scores))
        .route("/api/paths", get(paths))
        .route("/api/row/{row}", get(row))
        .route("/api/neighbors/{row}", get(neighbors))
        .route("/api/outliers", get(outliers))
        .route("/api/duplicates", get(duplicate_groups))
        .route("/api/clusters", get(clusters))
        .route("/api/probe", post(probe))
        .route("/api/labels", get(load_labels).post(save_labels))
        .route("/api/curves", get(curves))
        .route("/thumb/{row}", get(thumbnail))
        .route("/image/{row}", get(full_image))
        .route("/sound/{row}", get(sound))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(from_fn_with_state(state.clone(), only_from_own_page))
        .with_state(state)
}

/// Returns whether a request addresses this machine by a loopback name, and comes from this page if
/// the browser names its origin. The port may differ from ours: `ssh -L` forwards another one.
fn is_from_own_page(headers: &HeaderMap) -> bool {
    let is_loopback = |host: &str| {
        ["127.0.0.1", "localhost", "[::1]"].iter().any(|name| {
            // Browsers omit the default port.
            host.strip_prefix(name).is_some_and(|rest| match rest.strip_prefix(':') {
                Some(port) => port.parse::<u16>().is_ok(),
                None => rest.is_empty(),
            })
        })
    };
    let value = |name: &str| headers.get(name).map(|v| v.to_str().unwrap_or("?"));
    let host = value("host").filter(|host| headers.get_all("host").iter().count() == 1 && is_loopback(host));
    // Browsers send `Origin` with cross-site posts, and `Sec-Fetch-Site` with images and the like.
    let own_origin = value("origin").is_none_or(|origin| origin.strip_prefix("http://") == host);
    let own_site = value("sec-fetch-site").is_none_or(|site| ["same-origin", "none"].contains(&site));
    host.is_some() && own_origin && own_site
}

/// Rejects requests from elsewhere and adds the security headers to every response.
async fn only_from_own_page(State(state): SharedState, request: Request<Body>, next: Next) -> Response {
    let port = state.address.get().map_or(0, SocketAddr::port);
    // A request in proxy form carries a host of its own in the URI.
    if !is_from_own_page(request.headers()) || request.uri().host().is_some() {
        let message = format!(
            "forbidden: this page is only available at http://127.0.0.1:{port} on this machine\n\
             hint: from another machine, run `ssh -L {port}:localhost:{port} HOST` and open http://localhost:{port}"
        );
        return (StatusCode::FORBIDDEN, message).into_response();
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

async fn asset(content_type: &'static str, text: &'static str) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, content_type)], text)
}

fn binary(bytes: Vec<u8>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/octet-stream")], bytes)
}

async fn info(State(state): SharedState) -> Json<Value> {
    let collection = &state.collection;
    Json(json!({
        "images": state.paths().len(),
        "dim": collection.index.rows().dim,
        "map": collection.method.name(),
        "classes": state.classes,
        "sounds": collection.images.are_sounds(),
        "run": collection.run.as_deref().map(terminal::display_path),
        "data": collection.images.root().map(terminal::display_path),
    }))
}

/// Per row, little-endian: x and y as f32 and the class index as u32 ([`NO_CLASS`]: none).
async fn points(State(state): SharedState) -> impl IntoResponse {
    let record = |row: usize| {
        let [x, y] = state.collection.coordinates[row];
        [x.to_le_bytes(), y.to_le_bytes(), u32::from(state.class_indices[row]).to_le_bytes()].concat()
    };
    binary((0..state.paths().len()).flat_map(record).collect())
}

/// Outlier score per row, as little-endian f32.
async fn scores(State(state): SharedState) -> Result<impl IntoResponse, StatusCode> {
    let bytes = run_blocking(move || state.outlier_scores().iter().flat_map(|s| s.to_le_bytes()).collect::<Vec<u8>>());
    Ok(binary(bytes.await?))
}

async fn paths(State(state): SharedState) -> Json<Value> {
    Json(json!({ "paths": state.paths() }))
}

/// Runs a computation on a thread of its own, so that it does not hold up other requests.
async fn run_blocking<T: Send + 'static>(compute: impl FnOnce() -> T + Send + 'static) -> Result<T, StatusCode> {
    tokio::task::spawn_blocking(compute).await.map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)
}

async fn row(State(state): SharedState, UrlPath(row): UrlPath<usize>) -> Result<Json<Value>, StatusCode> {
    state.check_row(row)?;
    Ok(Json(state.describe(row)))
}

/// Query of the endpoints that return a list.
#[derive(Deserialize)]
struct Limit {
    n: Option<usize>,
}

impl Limit {
    fn or(&self, default: usize) -> usize {
        self.n.unwrap_or(default).min(MAX_RESULTS)
    }
}

async fn neighbors(
    State(state): SharedState,
    UrlPath(row): UrlPath<usize>,
    Query(limit): Query<Limit>,
) -> Result<Json<Value>, StatusCode> {
    state.check_row(row)?;
    let found = run_blocking(move || {
        let (index, n) = (&state.collection.index, limit.or(24));
        let nearest = index.nearest(index.rows().row(row), n + 1);
        let others = nearest.into_iter().filter(|(i, _)| *i != row).take(n);
        others.map(|(i, cosine)| json!({ "cosine": cosine, "image": state.describe(i) })).collect::<Vec<_>>()
    });
    Ok(Json(found.await?.into()))
}

/// Images with the highest outlier scores, highest first.
async fn outliers(State(state): SharedState, Query(limit): Query<Limit>) -> Result<Json<Value>, StatusCode> {
    let found = run_blocking(move || {
        let scores = state.outlier_scores();
        let mut rows: Vec<usize> = (0..scores.len()).collect();
        rows.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
        rows.truncate(limit.or(60));
        rows.into_iter().map(|i| json!({ "score": scores[i], "image": state.describe(i) })).collect::<Vec<_>>()
    });
    Ok(Json(found.await?.into()))
}

/// Search for near-duplicates, which runs once on a thread of its own.
#[derive(Debug, Default)]
enum DuplicateSearch {
    #[default]
    NotStarted,
    /// Fraction done.
    Running(f64),
    /// Response, or the error.
    Done(Result<Value, String>),
}

/// Groups of near-duplicates. Until they are found, the fraction done: `{"done": 0.4}`.
async fn duplicate_groups(State(state): SharedState) -> Result<Json<Value>, StatusCode> {
    let mut search = state.lock_search();
    match &*search {
        DuplicateSearch::Done(Ok(found)) => Ok(Json(found.clone())),
        DuplicateSearch::Done(Err(error)) => Ok(Json(json!({ "error": error }))),
        DuplicateSearch::Running(done) => Ok(Json(json!({ "done": done }))),
        DuplicateSearch::NotStarted => {
            *search = DuplicateSearch::Running(0.0);
            let searching = state.clone();
            let work = move || {
                let found = find_duplicates(&searching);
                *searching.lock_search() = DuplicateSearch::Done(found);
            };
            let thread = std::thread::Builder::new().name("duplicates".into()).spawn(work);
            thread.map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
            Ok(Json(json!({ "done": 0.0 })))
        }
    }
}

/// Finds the groups of near-duplicates.
fn find_duplicates(state: &AppState) -> Result<Value, String> {
    let report = |done: f64| *state.lock_search() = DuplicateSearch::Running(done);
    let read = state.collection.images.signatures(|share| report(0.5 * share)).map_err(|e| e.to_string())?;
    let pairs = duplicates::within(&state.collection.index, &read.rows, None, |share| report(0.5 + 0.5 * share));
    let groups = duplicates::groups(state.paths().len(), &pairs);
    let describe = |group: &Vec<usize>| -> Vec<Value> {
        let shown = &group[..group.len().min(MAX_GROUP_IMAGES)];
        let first = pairs.partition_point(|pair| pair.a < shown[0]);
        let last = pairs.partition_point(|pair| pair.a <= shown[shown.len() - 1]);
        let is_shown = |pair: &&Pair| shown.contains(&pair.a) && shown.contains(&pair.b);
        let own: Vec<&Pair> = pairs[first..last].iter().filter(is_shown).collect();
        shown.iter().map(|row| describe_copy(state, *row, shown[0], &own)).collect()
    };
    let described: Vec<Vec<Value>> = groups.iter().take(MAX_GROUPS).map(describe).collect();
    let unverified = pairs.iter().filter(|pair| pair.evidence.is_none()).count();
    let unreadable = read.rows.iter().filter(|signature| signature.is_none()).count();
    Ok(json!({ "groups": described, "total": groups.len(), "unverified": unverified, "unreadable": unreadable }))
}

/// Returns the JSON description of an image of a group, with the evidence that it is a copy of the
/// first image, or of another one if these two were not compared.
fn describe_copy(state: &AppState, row: usize, first: usize, pairs: &[&Pair]) -> Value {
    let mut described = state.describe(row);
    if row == first {
        return described;
    }
    let other = |pair: &Pair| if pair.a == row { pair.b } else { pair.a };
    let own = || pairs.iter().filter(|pair| pair.a == row || pair.b == row);
    if let Some(pair) = own().find(|pair| other(pair) == first).or_else(|| own().next()) {
        described["copy_of"] = state.paths()[other(pair)].clone().into();
        described["is_of_first"] = (other(pair) == first).into();
        described["verified"] = pair.evidence.is_some().into();
        described["evidence"] = pair.evidence.as_ref().map(evidence_json).into();
    }
    described
}

/// Cluster index per row.
async fn clusters(State(state): SharedState) -> Result<Json<Value>, StatusCode> {
    let found = run_blocking(move || {
        let compute = || state.collection.index.clusters(CLUSTERS);
        state.clusters.get_or_init(compute).clone()
    });
    Ok(Json(json!({ "clusters": found.await? })))
}

/// Rows labeled by hand, each with the index of its class.
#[derive(Deserialize)]
struct ManualLabels {
    rows: Vec<(usize, u16)>,
}

/// Predicts the class of every row: the one whose mean direction over the labeled rows is nearest.
/// The margin is the difference in cosine to the second nearest class.
async fn probe(State(state): SharedState, Json(labels): Json<ManualLabels>) -> Result<Json<Value>, StatusCode> {
    const MAX_CLASSES: usize = 256;
    let n = state.paths().len();
    let classes = labels.rows.iter().map(|(_, class)| usize::from(*class) + 1).max().unwrap_or(0);
    if classes == 0 || classes > MAX_CLASSES || labels.rows.iter().any(|(row, _)| *row >= n) {
        return Err(StatusCode::BAD_REQUEST);
    }
    let response = run_blocking(move || {
        let rows = state.collection.index.rows();
        let mut means = vec![vec![0.0f32; rows.dim]; classes];
        for (row, class) in &labels.rows {
            means[usize::from(*class)].iter_mut().zip(rows.row(*row)).for_each(|(m, v)| *m += v);
        }
        for mean in &mut means {
            let norm = mean.iter().map(|v| v * v).sum::<f32>().sqrt();
            mean.iter_mut().for_each(|v| *v /= norm.max(1e-12));
        }
        // Classes without labels, or whose labeled embeddings cancel, have no direction.
        let usable: Vec<usize> = (0..classes).filter(|c| means[*c].iter().any(|v| *v != 0.0)).collect();
        if usable.is_empty() {
            return None;
        }
        let (mut predictions, mut margins) = (Vec::with_capacity(n), Vec::with_capacity(n));
        for i in 0..n {
            let cosine = |class: usize| means[class].iter().zip(rows.row(i)).map(|(a, b)| a * b).sum::<f32>();
            let mut scores: Vec<(f32, usize)> = usable.iter().map(|class| (cosine(*class), *class)).collect();
            scores.sort_by(|a, b| b.0.total_cmp(&a.0));
            predictions.push(scores[0].1);
            margins.push((1e3 * (scores[0].0 - scores.get(1).map_or(-1.0, |s| s.0))).round() / 1e3);
        }
        Some(json!({ "predictions": predictions, "margins": margins }))
    });
    response.await?.map(Json).ok_or(StatusCode::BAD_REQUEST)
}

/// Training curves of the run up to now.
async fn curves(State(state): SharedState) -> Result<Json<Value>, StatusCode> {
    let Some(run) = state.collection.run.clone() else { return Ok(Json(json!({ "epochs": [], "loss": [] }))) };
    let Curves { epochs, loss } = run_blocking(move || metrics::read_curves(&run.join("metrics.jsonl"))).await?;
    Ok(Json(json!({ "epochs": epochs, "loss": loss })))
}

#[derive(Deserialize)]
struct ThumbnailQuery {
    /// Length of the longer side in pixels.
    px: Option<u32>,
}

/// The image of a row as PNG, fitted into a square.
/// Labels given in the browser: class names, and (row, class) pairs.
#[derive(serde::Serialize, Deserialize)]
struct HandLabels {
    classes: Vec<String>,
    rows: Vec<(usize, usize)>,
}

fn unreadable_labels(state: &AppState, error: &std::io::Error) -> (StatusCode, String) {
    let file = state.collection.hand_labels.display();
    (StatusCode::INTERNAL_SERVER_ERROR, format!("{file}: {error}"))
}

async fn load_labels(State(state): SharedState) -> Result<Json<HandLabels>, (StatusCode, String)> {
    let labels = hand_labels::load(&state.collection.hand_labels, state.paths());
    let labels = labels.map_err(|error| unreadable_labels(&state, &error))?;
    let mut classes: Vec<String> = labels.iter().map(|(_, label)| label.clone()).collect();
    classes.sort();
    classes.dedup();
    let class = |label: &String| classes.binary_search(label).expect("all labels were collected");
    let rows = labels.iter().map(|(row, label)| (*row, class(label))).collect();
    Ok(Json(HandLabels { classes, rows }))
}

async fn save_labels(
    State(state): SharedState,
    Json(HandLabels { classes, rows }): Json<HandLabels>,
) -> Result<StatusCode, (StatusCode, String)> {
    let named: Option<Vec<(usize, &str)>> =
        rows.iter().map(|(row, class)| Some((*row, classes.get(*class)?.as_str()))).collect();
    let named = named.filter(|labels| labels.iter().all(|(row, _)| *row < state.paths().len()));
    let named = named.ok_or((StatusCode::BAD_REQUEST, "unknown row or class".into()))?;
    let _guard = state.hand_labels.lock().unwrap_or_else(PoisonError::into_inner);
    hand_labels::save(&state.collection.hand_labels, state.paths(), &named)
        .map_err(|error| unreadable_labels(&state, &error))?;
    Ok(StatusCode::NO_CONTENT)
}

/// The image in its full size.
async fn full_image(State(state): SharedState, UrlPath(row): UrlPath<usize>) -> Result<Response, StatusCode> {
    state.check_row(row)?;
    let encode = |image: Arc<Image>| thumbnail_png(&image, image.height.max(image.width) as u32);
    let png = run_blocking(move || state.image(row).and_then(encode)).await?.ok_or(StatusCode::NOT_FOUND)?;
    Ok(([(header::CONTENT_TYPE, HeaderValue::from_static("image/png"))], png).into_response())
}

/// The file of a sound, to play it.
async fn sound(State(state): SharedState, UrlPath(row): UrlPath<usize>) -> Result<Response, StatusCode> {
    state.check_row(row)?;
    let extension = Path::new(&state.paths()[row]).extension().unwrap_or_default().to_ascii_lowercase();
    let content_type = match extension.to_str() {
        Some("wav") => "audio/wav",
        Some("flac") => "audio/flac",
        Some("mp3") => "audio/mpeg",
        _ => "audio/ogg",
    };
    let bytes = run_blocking(move || state.collection.images.sound(row)).await?.ok_or(StatusCode::NOT_FOUND)?;
    Ok(([(header::CONTENT_TYPE, HeaderValue::from_static(content_type))], bytes).into_response())
}

async fn thumbnail(
    State(state): SharedState,
    UrlPath(row): UrlPath<usize>,
    Query(query): Query<ThumbnailQuery>,
) -> Result<Response, StatusCode> {
    state.check_row(row)?;
    let side = query.px.unwrap_or(96).clamp(8, MAX_THUMBNAIL_SIDE);
    let png = run_blocking(move || state.image(row).and_then(|image| thumbnail_png(&image, side))).await?;
    let png = png.ok_or(StatusCode::NOT_FOUND)?;
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("image/png"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("max-age=3600"));
    Ok((headers, png).into_response())
}

fn thumbnail_png(image: &Image, side: u32) -> Option<Vec<u8>> {
    let mut png = Cursor::new(Vec::new());
    sheet::resize_to_fit(image, side).write_to(&mut png, image::ImageFormat::Png).ok()?;
    Some(png.into_inner())
}
