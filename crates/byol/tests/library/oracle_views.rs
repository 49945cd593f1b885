//! Views against the oracle: every augmentation, and complete chains with given parameters.

use std::sync::Arc;

use byol::{
    data::Image,
    views::{Draw, Spectrogram, View, Window, blur, crop, evaluation_view, flip, gray, jitter, resize, solarize},
};

use crate::common::{Case, case, cases, close};

fn image(case: &Case, key: &str) -> Image {
    let [height, width, channels] = *case.shape(key) else { panic!("three axes") };
    Image { height, width, channels, pixels: case.u8(key).into() }
}

fn view(case: &Case, key: &str) -> View {
    let [height, width, channels] = *case.shape(key) else { panic!("three axes") };
    View::from_interleaved(height, width, channels, &case.f32(key))
}

fn window(values: &[usize]) -> Window {
    let [top, left, height, width] = *values else { panic!("four numbers") };
    Window { top, left, height, width }
}

#[test]
fn resize_matches_the_oracle() {
    for case in cases("resize_") {
        let image = image(&case, "image");
        let [h, w, _] = *case.shape("raw") else { panic!("three axes") };
        let whole = Window { top: 0, left: 0, height: image.height, width: image.width };
        // `raw` is on the scale 0..255, so its rounding errors are larger.
        let mut raw = View::new(h, w, image.channels);
        resize::crop_resize_unclamped(&image, whole, &mut raw, &mut Vec::new());
        close(&case.name, &raw.interleaved(), case.f64("raw"), case.rtol, case.atol * 10.0);
        case.check("view", &resize::crop_resize(&image, whole, h, w).interleaved());
    }
}

#[test]
fn crop_and_resize_match_the_oracle() {
    for case in cases("crop_resize_") {
        let image = image(&case, "image");
        let window = window(&case.usize("box"));
        if case.has("view") {
            let [h, w, _] = *case.shape("view") else { panic!("three axes") };
            case.check("view", &resize::crop_resize(&image, window, h, w).interleaved());
        } else {
            let view = resize::crop_resize(&image, window, 224, 224);
            check_rows(&case, &view);
        }
    }
}

fn check_rows(case: &Case, view: &View) {
    let (row, values) = (view.width * view.channels, view.interleaved());
    let rows: Vec<f32> = case.usize("rows").iter().flat_map(|y| values[y * row..(y + 1) * row].to_vec()).collect();
    case.check("view_rows", &rows);
    let sum: f64 = values.iter().map(|v| f64::from(*v)).sum();
    // Sum of 150,000 values, each within the tolerance of a single value.
    close("view_sum", &[sum], case.f64("view_sum"), 1e-5, 0.0);
}

#[test]
fn crop_windows_match_the_oracle() {
    let boxes = case("crop_box");
    let (sizes, fraction, ratio) = (boxes.usize("image_hw"), boxes.f64("area_fraction"), boxes.f64("aspect"));
    for (i, want) in boxes.usize("box_hw").chunks(2).enumerate() {
        let got = crop::crop_size(sizes[2 * i], sizes[2 * i + 1], fraction[i], ratio[i]);
        assert_eq!(got, (want[0].max(1), want[1].max(1)), "row {i}; sides of 0 become 1");
    }
    let centers = case("center_box");
    for (size, want) in centers.usize("image_hw").chunks(2).zip(centers.usize("box").chunks(4)) {
        // For a single pixel, the reference's window is empty; ours is the pixel.
        let want = if want[2] == 0 { &[0, 0, 1, 1][..] } else { want };
        assert_eq!(Window::center(size[0], size[1], 0.875), window(want), "{size:?}");
    }
}

#[test]
fn evaluation_views_match_the_oracle() {
    for case in cases("eval_view_") {
        case.check("view", &evaluation_view(&image(&case, "image"), case.shape("view")[0], 0.875).interleaved());
    }
}

#[test]
fn pointwise_operations_match_the_oracle() {
    for case in cases("color_") {
        let mut keys: Vec<&String> = case.keys().collect();
        keys.sort();
        let mut checked = 0;
        for key in keys {
            let mut v = view(&case, "image");
            match key.rsplit_once('_').map(|(op, x)| (op, x.parse::<f32>())) {
                Some(("brightness", Ok(x))) => jitter::brightness(&mut v, x),
                Some(("contrast", Ok(x))) => jitter::contrast(&mut v, x),
                Some(("saturation", Ok(x))) => jitter::saturation(&mut v, x),
                Some(("hue", Ok(x))) => jitter::hue(&mut v, x),
                _ => match key.as_str() {
                    "flip" => flip::left_right(&mut v),
                    "grey" => gray::grayscale(&mut v),
                    "solarize" => solarize::solarize(&mut v),
                    _ => continue, // the input, and normalization, which is part of the network
                },
            }
            // The fixtures are not clamped to 0..1; the operations here are.
            let expected: Vec<f64> = case.f64(key).iter().map(|v| v.clamp(0.0, 1.0)).collect();
            close(&format!("{}/{key}", case.name), &v.interleaved(), &expected, case.rtol, case.atol);
            checked += 1;
        }
        assert!(checked >= 10, "{}: {checked} operations", case.name);
    }
}

#[test]
fn jitter_in_any_order_matches_the_oracle() {
    for case in cases("jitter_") {
        let image = view(&case, "image");
        let got: Vec<f32> = (0..case.shape("order")[0])
            .flat_map(|i| {
                let mut v = image.clone();
                jitter_params(&case, i).apply(&mut v, |_| ());
                v.interleaved()
            })
            .collect();
        case.check("out", &got);
    }
}

fn jitter_params(case: &Case, i: usize) -> jitter::Jitter {
    let four = |key: &str| case.f64(key)[4 * i..4 * i + 4].to_vec();
    jitter::Jitter {
        order: std::array::from_fn(|k| four("order")[k] as usize),
        values: std::array::from_fn(|k| four("values")[k] as f32),
    }
}

#[test]
fn blur_matches_the_oracle() {
    let radii = case("blur_radius");
    for (h, r) in radii.usize("height").iter().zip(radii.usize("radius")) {
        assert_eq!(blur::radius(*h), r, "height {h}");
    }
    for case in cases("blur_").iter().filter(|c| c.name != "blur_radius") {
        for key in case.keys() {
            let Some((kind, sigma)) = key.split_once('_') else { continue };
            let sigma: f64 = sigma.parse().expect("a number");
            if kind == "taps" {
                case.check(key, &blur::taps(case.number("radius") as usize, sigma));
            } else {
                let mut v = view(case, "image");
                blur::gaussian(&mut v, sigma);
                case.check(key, &v.interleaved());
            }
        }
    }
}

#[test]
fn complete_chains_match_the_oracle() {
    for case in cases("chain_") {
        let image = image(&case, "image");
        let n = case.shape("box")[0];
        let draw = |i: usize| {
            let flags: Vec<bool> = case.u8("flags")[5 * i..5 * i + 5].iter().map(|f| *f == 1).collect();
            Draw {
                window: window(&case.usize("box")[4 * i..4 * i + 4]),
                flip: flags[0],
                jitter: flags[1].then(|| jitter_params(&case, i)),
                gray: flags[2],
                blur: flags[3].then(|| case.f64("sigma")[i]),
                solarize: flags[4],
                flip_vertical: false,
                quarter_turns: 0,
                channel_drop: None,
                spectrogram: None,
            }
        };
        let size = case.number("size") as usize;
        if case.has("view") {
            let got: Vec<f32> = (0..n).flat_map(|i| draw(i).apply(&image, size).interleaved()).collect();
            case.check("view", &got);
        } else {
            check_rows(&case, &draw(0).apply(&image, size));
        }
    }
}

/// Images that are not RGB: values of `golden/channels.py`.
#[test]
fn color_operations_of_other_channels_match_the_oracle() {
    let text = include_str!("../../../../golden/channels.json");
    let cases: serde_json::Value = serde_json::from_str(text).unwrap();
    let floats = |v: &serde_json::Value| v.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect::<Vec<_>>();
    for case in cases.as_array().unwrap() {
        let [height, width, channels] = floats(&case["shape"])[..] else { panic!("three axes") };
        let pixels: Vec<f32> = floats(&case["image"]).into_iter().map(|v| v as f32).collect();
        let original = View::from_interleaved(height as usize, width as usize, channels as usize, &pixels);
        for (name, output) in case["outputs"].as_object().unwrap() {
            let (mut view, value) = (original.clone(), output["value"].as_f64().unwrap() as f32);
            match name.as_str() {
                "brightness" => jitter::brightness(&mut view, value),
                "contrast" => jitter::contrast(&mut view, value),
                "saturation" => jitter::saturation(&mut view, value),
                "hue" => jitter::hue(&mut view, value),
                "gray" => gray::grayscale(&mut view),
                _ => solarize::solarize(&mut view),
            }
            close(&format!("{name}, {channels} channels"), &view.interleaved(), &floats(&output["view"]), 1e-5, 1e-6);
        }
    }
}

/// Values of `golden/sound.py`, by PyTorch.
#[test]
fn spectrogram_views_match_the_oracle() {
    let golden: serde_json::Value = serde_json::from_str(include_str!("../../../../golden/sound.json")).unwrap();
    let floats = |v: &serde_json::Value| v.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect::<Vec<_>>();
    for case in golden["views"].as_array().unwrap() {
        let channels = case["channels"].as_u64().unwrap() as usize;
        let image = |key: &str, width: usize| {
            let pixels: Vec<u16> = floats(&case[key]).into_iter().map(|v| v as u16).collect();
            Image { height: 12, width, channels, pixels: pixels.into() }
        };
        let statistics = case["statistics"].as_array().unwrap().iter().map(floats);
        let draw = Spectrogram {
            rows: (2, 9),
            columns: (-3, 17),
            mixup: 0.3,
            background: Some(Arc::new(image("background", 9))),
            fade: [-0.5, 0.8],
            statistics: statistics.map(|s| [s[0] as f32, s[1] as f32]).collect(),
            ..Spectrogram::whole(12, 16)
        };
        let mut view = View::new(8, 8, channels);
        draw.apply(&image("image", 16), &mut view);
        close(&format!("{channels} channels"), &view.pixels, &floats(&case["view"]), 1e-5, 1e-5);
    }
}
