//! Pretrains on images of one's own making with views of one's own choosing: `cargo run --release --example own_data -- FOLDER`. Half a minute.

use std::{env::args, error::Error, path::PathBuf, sync::atomic::AtomicBool};

use byol::{
    data::{Dataset, Image, Images},
    device::{self, Choice},
    train::{Event, Place, Plan, Prepared, Recipe, Run, recipe::Draft},
};

/// Any source will do: a camera, a database, a simulation. Here stripes of every direction, width and colour.
fn picture(i: usize) -> Image {
    let (angle, width) = (i as f64 * 0.7, 2.0 + (i % 5) as f64);
    let stripe = |x: usize, y: usize| ((x as f64 * angle.cos() + y as f64 * angle.sin()) / width).sin() > 0.0;
    let colour = [60 + (i * 37 % 160) as u8, 60 + (i * 91 % 160) as u8, 60 + (i * 53 % 160) as u8];
    let pixel = |p: usize| if stripe(p % 40, p / 40) { colour } else { [230; 3] };
    Image { height: 40, width: 40, channels: 3, pixels: (0..1600).flat_map(pixel).collect() }
}

fn main() -> Result<(), Box<dyn Error>> {
    let folder = PathBuf::from(args().nth(1).ok_or("usage: own_data FOLDER (for the run)")?);
    let data = Dataset {
        root: "stripes".into(),
        kind: "stripes".into(),
        classes: Vec::new(),
        train: Images::memory((0..512).map(picture).collect(), None),
        held_out: None,
        test: None,
        skipped: Vec::new(),
    };
    let mut draft = Draft::from_recipe("cifar10")?;
    for setting in
        ["encoder.width=0.125", "heads.hidden=256", "train.batch=64", "train.epochs=10", "train.warmup_epochs=1"]
    {
        draft.set(setting)?;
    }
    let mut recipe = draft.over(&Recipe::default())?;
    // Stripes have no colour that matters: the views may change it at will, but must not turn them.
    for policy in [&mut recipe.views.first, &mut recipe.views.second] {
        (policy.flip, policy.jitter, policy.grey, policy.area) = (0.0, 1.0, 0.5, [0.3, 1.0]);
    }
    let data = Prepared::new(data, 0, &recipe.health, usize::MAX, &|_| ())?;
    let device = device::open(Choice::Auto)?;
    let plan = Plan::new("stripes", recipe, &data, device.found.choice)?;
    let mut run = Run::create(&folder, plan, &data, Place::alone(device.device, device::machine().cores), false)?;
    run.go(&AtomicBool::new(false), |event| {
        if let Event::Epoch { epoch, loss: Some(loss), .. } = event {
            println!("epoch {epoch}: loss {loss:.3}");
        }
    })?;
    println!("the encoder: {}", folder.join("encoder.safetensors").display());
    Ok(())
}
