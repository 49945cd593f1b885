//! The page of `byol explore` in headless Chromium, driven through ChromeDriver's WebDriver API.
//! Skipped where ChromeDriver is missing. `BYOL_SCREENSHOTS=FOLDER` saves screenshots.

use std::{
    net::TcpListener,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::common::{Server, ask, embed, ok, skip, text, trained};
use serde_json::{Value, json};

/// A browser session that is closed when dropped.
struct Browser {
    driver: Child,
    port: u16,
    session: String,
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = ask(self.port, &format!("DELETE /session/{}", self.session), &["Host: localhost"], b"");
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

impl Browser {
    /// Starts a browser; `None`, after reporting a skip, if ChromeDriver is missing.
    fn start() -> Option<Browser> {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let driver = Command::new("chromedriver")
            .arg(format!("--port={port}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let Ok(driver) = driver else {
            skip("chromedriver is not installed (Debian: chromium-driver)");
            return None;
        };
        let mut browser = Browser { driver, port, session: String::new() };
        let began = Instant::now();
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(began.elapsed() < Duration::from_secs(20), "ChromeDriver did not start within 20 s");
            thread::sleep(Duration::from_millis(50));
        }
        // WebGL is rendered in software, and nothing is fetched from a network.
        let arguments = [
            "--headless=new",
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-first-run",
            "--use-angle=swiftshader",
            "--enable-unsafe-swiftshader",
            "--ignore-gpu-blocklist",
            "--window-size=1280,860",
        ];
        let capabilities = json!({ "capabilities": { "alwaysMatch": {
            "goog:chromeOptions": { "args": arguments }, "goog:loggingPrefs": { "browser": "ALL" },
        } } });
        let answer = browser.call("POST", "/session", &capabilities);
        browser.session = answer["sessionId"].as_str().expect("a session ID").to_owned();
        Some(browser)
    }

    fn call(&self, method: &str, path: &str, body: &Value) -> Value {
        let body = body.to_string();
        let headers = ["Host: localhost", "Content-Type: application/json", &format!("Content-Length: {}", body.len())];
        let (status, _, answer) = ask(self.port, &format!("{method} {path}"), &headers, body.as_bytes());
        let answer: Value = serde_json::from_slice(&answer).unwrap_or_default();
        assert_eq!(status, 200, "{path}: {answer}");
        answer["value"].clone()
    }

    fn post(&self, path: &str, body: Value) -> Value {
        self.call("POST", &format!("/session/{}/{path}", self.session), &body)
    }

    /// Runs a script and returns its value.
    fn script(&self, code: &str) -> Value {
        self.post("execute/sync", json!({ "script": code, "args": [] }))
    }

    /// Runs a script and returns what it passes to its last argument, a callback.
    fn script_async(&self, code: &str) -> Value {
        self.post("execute/async", json!({ "script": code, "args": [] }))
    }

    /// Waits until a script returns true; `expectation` is the message of a failure.
    fn until(&self, expectation: &str, code: &str) {
        let began = Instant::now();
        while self.script(code) != json!(true) {
            assert!(
                began.elapsed() < Duration::from_secs(30),
                "{expectation}: {}",
                self.script("return document.body.innerText")
            );
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn element(&self, selector: &str) -> String {
        let found = self.post("element", json!({ "using": "css selector", "value": selector }));
        found
            .as_object()
            .and_then(|o| o.values().next())
            .and_then(Value::as_str)
            .unwrap_or_else(|| panic!("no element {selector}"))
            .to_owned()
    }

    fn click(&self, selector: &str) {
        self.post(&format!("element/{}/click", self.element(selector)), json!({}));
    }

    fn keys(&self, selector: &str, keys: &str) {
        self.post(&format!("element/{}/value", self.element(selector)), json!({ "text": keys }));
    }

    fn screenshot(&self, name: &str) {
        let Some(folder) = std::env::var_os("BYOL_SCREENSHOTS") else { return };
        let encoded = self.call("GET", &format!("/session/{}/screenshot", self.session), &json!({}));
        let png = decode_base64(encoded.as_str().unwrap_or_default());
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(std::path::Path::new(&folder).join(name), png).unwrap();
    }
}

fn decode_base64(text: &str) -> Vec<u8> {
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let values: Vec<u32> =
        text.bytes().filter_map(|b| ALPHABET.iter().position(|a| *a == b)).map(|v| v as u32).collect();
    values
        .chunks(4)
        .flat_map(|c| {
            let all = c.iter().enumerate().fold(0, |all, (i, v)| all | v << (18 - 6 * i));
            all.to_be_bytes()[1..c.len()].to_vec()
        })
        .collect()
}

/// Counts the pixels of the map in each color of the legend, without antialiased edges.
///
/// The pixels are read in the frame of a redraw: the browser clears the drawing buffer once the
/// frame is on the screen. A wheel event without a delta requests that redraw.
const PIXELS_PER_LEGEND_COLOR: &str = "
    const done = arguments[arguments.length - 1];
    const canvas = document.getElementById('points'), gl = canvas.getContext('webgl');
    if (!gl || gl.isContextLost()) return done('no WebGL');
    canvas.dispatchEvent(new WheelEvent('wheel', { deltaY: 0, cancelable: true }));
    requestAnimationFrame(() => {
        const width = gl.drawingBufferWidth, height = gl.drawingBufferHeight;
        const pixels = new Uint8Array(4 * width * height);
        gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, pixels);
        const dots = [...document.querySelectorAll('#legend .dot')];
        const colors = dots.map((dot) => dot.style.background.match(/[0-9]+/g).slice(0, 3).map(Number));
        const counts = colors.map(() => 0);
        for (let i = 0; i < pixels.length; i += 4) {
            const alpha = pixels[i + 3] / 255; // colors are premultiplied by it
            if (alpha < 0.7) continue;
            const matches = (color) => color.every((value, k) => Math.abs(pixels[i + k] / alpha - value) < 4);
            const index = colors.findIndex(matches);
            if (index >= 0) counts[index]++;
        }
        done(counts);
    });";

#[test]
fn explore_page_works_with_mouse_and_keyboard_and_at_phone_width() {
    let Some(browser) = Browser::start() else { return };
    let (_, _, encoder) = trained();
    let server = Server::start(&["explore", text(encoder), "--port", "0", "--device", "cpu"]);
    browser.post("url", json!({ "url": format!("http://127.0.0.1:{}/", server.port) }));
    browser.until(
        "the page loads",
        "return document.getElementById('about').textContent.includes('60 images, 2 classes')",
    );
    browser
        .until("the legend names the classes", "return document.getElementById('legend').innerText.includes('even')");
    let counts = browser.script_async(PIXELS_PER_LEGEND_COLOR);
    let drawn: Vec<u64> =
        counts.as_array().unwrap_or_else(|| panic!("{counts}")).iter().flat_map(Value::as_u64).collect();
    // 60 points of several pixels, some of which cover each other.
    assert!(
        drawn.len() == 2 && drawn.iter().all(|pixels| *pixels > 100),
        "points in the colors of both classes: {counts}"
    );
    browser.screenshot("map.png");

    // Keyboard navigation and nearest neighbors.
    browser.keys("#points", "n");
    browser.until("an image is shown", "return document.getElementById('image-path').textContent.includes('.png')");
    browser
        .until("its neighbors are shown", "return document.querySelectorAll('#neighbors .grid button').length === 24");
    browser.until(
        "the image loads",
        "const i = document.querySelector('#neighbors .large'); return i.complete && i.naturalWidth > 0;",
    );
    browser.until(
        "the cosines differ",
        "return [...document.querySelectorAll('#neighbors .grid button')].every(b => /^-?\\d\\.\\d{3}$/.test(b.innerText))",
    );
    let shown = "document.getElementById('image-path').textContent";
    let before = browser.script(&format!("return {shown}"));
    browser.click("#neighbors .grid button");
    browser.until("the clicked neighbor is shown", &format!("return {shown} !== {before}"));
    // Keys work wherever the focus is.
    let before = browser.script(&format!("document.activeElement.blur(); return {shown}"));
    browser.keys("body", "n");
    browser.until("the next image is shown", &format!("return {shown} !== {before}"));

    // Label by clicks.
    for (class, steps) in [("one", "n\u{e007}"), ("two", "nnnnnn\u{e007}")] {
        browser.keys("#class-name", &format!("{class}\u{e007}"));
        browser.keys("#points", steps);
        browser.until(
            "the label is counted",
            &format!("return document.getElementById('classes').innerText.includes('{class} (1)')"),
        );
    }
    browser.until(
        "classes are predicted",
        "return /one [0-9]+, two [0-9]+/.test(document.getElementById('probe-status').textContent)",
    );
    browser.screenshot("labels.png");

    // A lasso around the whole map.
    browser.click("#lasso");
    let square = [(-300, -250), (300, -250), (300, 250), (-300, 250), (-300, -240)];
    let step = |(x, y): &(i32, i32)| {
        json!({ "type": "pointerMove", "duration": 20, "x": x, "y": y,
                "origin": { "element-6066-11e4-a52e-4f735466cecf": browser.element("#points") } })
    };
    let mut actions = vec![step(&square[0]), json!({ "type": "pointerDown", "button": 0 })];
    actions.extend(square[1..].iter().map(step));
    actions.push(json!({ "type": "pointerUp", "button": 0 }));
    browser.post("actions", json!({ "actions": [{ "type": "pointer", "id": "mouse", "actions": actions }] }));
    browser.until(
        "images are selected",
        "return /[0-9]+ selected/.test(document.getElementById('selection').textContent)",
    );
    browser.until("the selection is a grid", "return document.querySelectorAll('#selection-images button').length > 9");
    browser.click("#label-selection");
    let labeled = |n: &str| format!("return /two \\({n}\\)/.test(document.getElementById('classes').innerText)");
    browser.until("all are labeled", &labeled("[0-9]{2}"));
    browser.screenshot("selection.png");
    browser.keys("#points", "u");
    browser.until("the labels are taken back", &labeled("1"));
    browser.click("#clear-selection");
    browser.until("the selection is cleared", "return document.getElementById('selection').textContent === ''");
    browser.script(
        "const color = document.getElementById('color'); color.value = 'cluster'; color.dispatchEvent(new Event('change'));",
    );
    browser.until(
        "the legend names the clusters",
        "return document.getElementById('legend').innerText.includes('cluster 1')",
    );

    // Legend, search by name, addresses.
    browser.script("document.getElementById('legend').querySelector('button').click()");
    browser.until(
        "a class is switched off",
        "return document.querySelector('#legend button').getAttribute('aria-pressed') === 'false'",
    );
    browser.keys("#search", "even/\u{e007}");
    browser.until(
        "images are found by name",
        "return document.getElementById('selection').textContent.startsWith('30 selected')",
    );
    browser.click("#tab-duplicates");
    browser.until("the page has an address", "return location.hash === '#duplicates'");
    browser.post("back", json!({}));
    browser.until("Back returns to the map", "return !document.getElementById('map').hidden");

    // Labels outlive the page; a label can be deleted with its class.
    browser.post("refresh", json!({}));
    let classes = |text: &str| format!("return document.getElementById('classes').innerText.includes('{text}')");
    browser.until("the labels are loaded", &classes("one (1)"));
    assert_eq!(std::fs::read_to_string(encoder.join("labels.csv")).unwrap().lines().count(), 3);
    browser.click("#classes .delete");
    browser.until("the class is gone", "return !document.getElementById('classes').innerText.includes('one')");
    browser.keys("#points", "u");
    browser.until("and back", &classes("one (1)"));

    // The other tabs.
    browser.click("#tab-duplicates");
    browser.until(
        "the duplicate search ends",
        "return /group|No duplicates/.test(document.getElementById('duplicates-status').textContent)",
    );
    browser.click("#tab-outliers");
    browser.until("outliers are shown", "return document.querySelectorAll('#outlier-grid button').length === 60");
    browser.screenshot("outliers.png");
    browser.click("#tab-training");
    browser.until("curves are drawn", "return document.querySelectorAll('#curves figure').length >= 3");
    browser.screenshot("training.png");

    // Phone width.
    browser.post("window/rect", json!({ "width": 500, "height": 900 }));
    browser.click("#tab-map");
    browser
        .until("there is no horizontal overflow", "return document.documentElement.scrollWidth <= window.innerWidth");
    let top = |id: &str| format!("document.getElementById('{id}').getBoundingClientRect().top");
    browser.until(
        "the legend is between the map and the neighbors",
        &format!("return {} < {} && {} < {}", top("points"), top("legend"), top("legend"), top("neighbors")),
    );
    browser.screenshot("phone.png");

    let log = browser.post("se/log", json!({ "type": "browser" }));
    let severe: Vec<&Value> = log.as_array().unwrap().iter().filter(|l| l["level"] == "SEVERE").collect();
    assert!(severe.is_empty(), "{severe:?}");
}

#[test]
fn explore_page_offers_no_colors_without_data() {
    let Some(browser) = Browser::start() else { return };
    let (_, data, encoder) = trained();
    let folder = tempfile::tempdir().unwrap();
    let (unlabeled, vectors) = (folder.path().join("images"), folder.path().join("images.parquet"));
    std::fs::create_dir(&unlabeled).unwrap();
    for file in std::fs::read_dir(data.join("even")).unwrap().map(|file| file.unwrap().path()) {
        std::fs::copy(&file, unlabeled.join(file.file_name().unwrap())).unwrap();
    }
    ok(&embed(encoder, &unlabeled, &vectors, &[]));
    let server = Server::start(&["explore", text(&vectors), "--port", "0", "--device", "cpu"]);
    browser.post("url", json!({ "url": format!("http://127.0.0.1:{}/", server.port) }));
    browser.until(
        "only clusters and outliers are offered",
        "return [...document.querySelectorAll('#color option:enabled')].map(o => o.value).join() === 'cluster,outlier'",
    );
    browser.until("a mode with data is selected", "return document.getElementById('color').value === 'outlier'");
}
