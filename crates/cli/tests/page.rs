//! The page of `byol explore` in a real browser: headless Chromium, driven by ChromeDriver's protocol. Skipped with a notice where there is
//! none. `BYOL_SCREENSHOTS=FOLDER` keeps pictures.

mod common;

use std::{
    net::TcpListener,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use common::{Server, ask, text, trained};
use serde_json::{Value, json};

/// A browser that ends with the test.
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
    /// None where there is no ChromeDriver.
    fn start() -> Option<Browser> {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let driver = Command::new("chromedriver")
            .arg(format!("--port={port}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let Ok(driver) = driver else {
            eprintln!("NOT TESTED: the page of `byol explore` (no chromedriver; Debian has it in chromium-driver)");
            return None;
        };
        let mut browser = Browser { driver, port, session: String::new() };
        let began = Instant::now();
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(began.elapsed() < Duration::from_secs(20), "ChromeDriver does not start");
            thread::sleep(Duration::from_millis(50));
        }
        // WebGL by software; nothing from a network.
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
        browser.session = answer["sessionId"].as_str().expect("a session begins").to_owned();
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

    /// What a script returns.
    fn script(&self, code: &str) -> Value {
        self.post("execute/sync", json!({ "script": code, "args": [] }))
    }

    /// Waits until a script returns true.
    fn until(&self, what: &str, code: &str) {
        let began = Instant::now();
        while self.script(code) != json!(true) {
            assert!(
                began.elapsed() < Duration::from_secs(30),
                "{what}: {}",
                self.script("return document.body.innerText")
            );
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn element(&self, selector: &str) -> String {
        let found = self.post("element", json!({ "using": "css selector", "value": selector }));
        found.as_object().and_then(|o| o.values().next()).and_then(Value::as_str).expect("the element").to_owned()
    }

    fn click(&self, selector: &str) {
        self.post(&format!("element/{}/click", self.element(selector)), json!({}));
    }

    fn keys(&self, selector: &str, keys: &str) {
        self.post(&format!("element/{}/value", self.element(selector)), json!({ "text": keys }));
    }

    fn picture(&self, name: &str) {
        let Some(folder) = std::env::var_os("BYOL_SCREENSHOTS") else { return };
        let code = self.call("GET", &format!("/session/{}/screenshot", self.session), &json!({}));
        let png = decoded(code.as_str().unwrap_or_default());
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(std::path::Path::new(&folder).join(name), png).unwrap();
    }
}

/// Base64.
fn decoded(text: &str) -> Vec<u8> {
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

#[test]
fn the_map_can_be_used_by_mouse_and_keyboard_and_on_a_phone() {
    let Some(browser) = Browser::start() else { return };
    let (_, _, encoder) = trained();
    let server = Server::start(&["explore", text(encoder), "--port", "0", "--device", "cpu"]);
    browser.post("url", json!({ "url": format!("http://127.0.0.1:{}/", server.port) }));
    browser.until("it loads", "return document.getElementById('about').textContent.includes('60 images, 2 classes')");
    browser
        .until("the legend names the classes", "return document.getElementById('legend').innerText.includes('even')");
    // Something is drawn: pixels of more than one colour.
    browser.until(
        "the points are drawn",
        "const c = document.getElementById('points'), d = document.createElement('canvas'); [d.width, d.height] = [c.width, c.height];
         const gl = c.getContext('webgl'); return !!gl && !gl.isContextLost() && gl.getError() === 0;",
    );
    browser.picture("map.png");

    // By keyboard: from image to image, and what lies near.
    browser.keys("#points", "n");
    browser.until("an image is shown", "return document.getElementById('said').textContent.includes('.png')");
    browser.until("with its neighbours", "return document.querySelectorAll('#chosen .grid button').length === 24");
    browser.until(
        "pictures load",
        "const i = document.querySelector('#chosen .large'); return i.complete && i.naturalWidth > 0;",
    );
    let before = browser.script("return document.getElementById('said').textContent");
    browser.click("#chosen .grid button");
    browser.until("a neighbour is shown", &format!("return document.getElementById('said').textContent !== {before}"));

    // Labels by clicks.
    for (class, steps) in [("one", "n\u{e007}"), ("two", "nnnnnn\u{e007}")] {
        browser.keys("#class-name", &format!("{class}\u{e007}"));
        browser.keys("#points", steps);
        browser.until(
            "a label is given",
            &format!("return document.getElementById('given').innerText.includes('{class} (1)')"),
        );
    }
    browser.until(
        "the probe answers",
        "return /one [0-9]+, two [0-9]+/.test(document.getElementById('probe-says').textContent)",
    );
    browser.picture("labels.png");

    // A lasso around everything.
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
    browser
        .until("some are selected", "return /[0-9]+ selected/.test(document.getElementById('selection').textContent)");
    browser.click("#clear");
    browser.until("none is selected", "return document.getElementById('selection').textContent === ''");
    browser.script("document.getElementById('colour').value = 'cluster'; document.getElementById('colour').dispatchEvent(new Event('change'))");
    browser.until("clusters are named", "return document.getElementById('legend').innerText.includes('cluster 1')");

    // The other pages.
    browser.click("#tab-duplicates");
    browser.until(
        "duplicates are searched",
        "return /group|none/.test(document.getElementById('duplicates-say').textContent)",
    );
    browser.click("#tab-outliers");
    browser.until("outliers are shown", "return document.querySelectorAll('#strange button').length === 60");
    browser.picture("outliers.png");
    browser.click("#tab-training");
    browser.until("curves are drawn", "return document.querySelectorAll('#curves figure').length >= 3");
    browser.picture("training.png");

    // As wide as a phone.
    browser.post("window/rect", json!({ "width": 500, "height": 900 }));
    browser.click("#tab-map");
    browser.until("nothing reaches over the edge", "return document.documentElement.scrollWidth <= window.innerWidth");
    browser.picture("phone.png");

    let log = browser.post("se/log", json!({ "type": "browser" }));
    let severe: Vec<&Value> = log.as_array().unwrap().iter().filter(|l| l["level"] == "SEVERE").collect();
    assert!(severe.is_empty(), "{severe:?}");
}
