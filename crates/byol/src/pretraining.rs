//! Pretraining in one call: [`Pretraining`].

use std::{
    ops::ControlFlow,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use burn::tensor::Device;

use crate::{
    data::Dataset,
    device::{self, DeviceChoice},
    nn::Encoder,
    train::{
        Error, Event, Plan, PrepareOptions, Recipe, RecipeOverrides, Run, RunContext, TrainingData, auto,
        data::cache_bytes,
        run::{extend_plan, read_plan},
    },
    views::{Augmentation, Policy},
};

/// Builder of a pretraining run.
///
/// # Examples
///
/// ```no_run
/// use byol::{Dataset, Pretraining, Recipe};
///
/// let encoder = Pretraining::new(Dataset::folder("photos")?)
///     .recipe(Recipe::named("cifar10")?.epochs(10))
///     .on_event(|event| println!("{event}"))
///     .run("byol-runs/photos")?;
/// let features = encoder.embed_image("cat.jpg")?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Images in memory, two short epochs. A finished run resumes at its end:
///
/// ```
/// use byol::{Dataset, Image, Pretraining, Recipe};
///
/// let noise = |i: usize| (0..32 * 32 * 3).map(|j| (i * 7919 + j * 104_729) as u8).collect();
/// let images = (0..64).map(|i| Image { height: 32, width: 32, channels: 3, pixels: noise(i) }).collect();
/// let recipe = Recipe::named("cifar10")?.epochs(2).with("encoder.width", 0.0625)?.with("train.batch", 16)?;
/// let recipe = recipe.with("heads.hidden", 16)?.with("heads.projection", 8)?.with("views.size", 8)?;
///
/// let folder = tempfile::tempdir()?;
/// let dataset = Dataset::from_images(images, None);
/// let encoder = Pretraining::new(dataset.clone()).recipe(recipe).run(folder.path())?;
/// let same = Pretraining::new(dataset).resume(folder.path())?;
/// # let image = Image { height: 8, width: 8, channels: 3, pixels: vec![9u8; 192].into() };
/// assert_eq!(encoder.embed_pixels(&image), same.embed_pixels(&image));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Pretraining<'a> {
    dataset: Dataset,
    recipe: RecipeOverrides,
    epochs: Option<u64>,
    policies: Option<[Policy; 2]>,
    augmentation: Option<Arc<dyn Augmentation>>,
    device: DeviceChoice,
    threads: usize,
    tensorboard: bool,
    stop: Option<&'a AtomicBool>,
    on_event: Box<dyn FnMut(Event) + 'a>,
}

impl<'a> Pretraining<'a> {
    /// A run on this data set with the recipe `auto`, on the best available device, with all cores.
    pub fn new(dataset: Dataset) -> Pretraining<'a> {
        Pretraining {
            dataset,
            recipe: RecipeOverrides::default(),
            epochs: None,
            policies: None,
            augmentation: None,
            device: DeviceChoice::Auto,
            threads: 0,
            tensorboard: false,
            stop: None,
            on_event: Box::new(|_| ()),
        }
    }

    /// Sets the recipe, from [`Recipe::named`](crate::Recipe::named). Default: `auto`.
    pub fn recipe(self, recipe: RecipeOverrides) -> Self {
        Pretraining { recipe, ..self }
    }

    /// Sets the number of epochs: of a new run, or of one that [`Pretraining::resume`] extends.
    pub fn epochs(self, epochs: u64) -> Self {
        Pretraining { epochs: Some(epochs), ..self }
    }

    /// Replaces the augmentations of the first and the second view.
    pub fn policies(self, first: Policy, second: Policy) -> Self {
        Pretraining { policies: Some([first, second]), ..self }
    }

    /// Adds a custom augmentation to both views, after the built-in ones. It runs on the CPU
    /// and is not part of the plan: resume such a run from a program that sets the same one.
    pub fn augmentation(self, augmentation: impl Augmentation + 'static) -> Self {
        Pretraining { augmentation: Some(Arc::new(augmentation)), ..self }
    }

    /// Sets the device. Default: the best available.
    pub fn device(self, device: DeviceChoice) -> Self {
        Pretraining { device, ..self }
    }

    /// Sets the number of threads that make views. Default, and for 0: the number of cores.
    pub fn threads(self, threads: usize) -> Self {
        Pretraining { threads, ..self }
    }

    /// Writes TensorBoard event files into the run folder.
    pub fn tensorboard(self) -> Self {
        Pretraining { tensorboard: true, ..self }
    }

    /// Stops the run at the next step once the flag is set, with a checkpoint to resume from. While
    /// images are checked there is none, and the run ends with an error.
    pub fn stop_flag(self, stop: &'a AtomicBool) -> Self {
        Pretraining { stop: Some(stop), ..self }
    }

    /// Sets a callback for progress.
    pub fn on_event(self, on_event: impl FnMut(Event) + 'a) -> Self {
        Pretraining { on_event: Box::new(on_event), ..self }
    }

    /// Trains in the folder `out`, which must be empty or absent, and returns the encoder. A
    /// stopped or killed run continues with [`Pretraining::resume`] or `byol resume`.
    ///
    /// # Errors
    /// [`Error`].
    pub fn run(mut self, out: impl AsRef<Path>) -> Result<Encoder, Error> {
        if let Some(epochs) = self.epochs {
            self.recipe = self.recipe.epochs(epochs);
        }
        self.recipe.adopt_pretrained_architecture()?;
        let opened = device::open(self.device)?;
        let data = self.prepare(&self.recipe.check()?)?;
        let (mut recipe, _) = auto::resolve(&self.recipe, &data.train, &opened)?;
        if let Some([first, second]) = self.policies.take() {
            (recipe.views.first, recipe.views.second) = (first, second);
        }
        let plan = Plan::new(&self.recipe.name, recipe, &data, opened.info.choice)?;
        let run = Run::create(out.as_ref(), plan, &data, self.context(opened.device), self.tensorboard)?;
        self.train(run)
    }

    /// Resumes the run in the folder `out` from its latest checkpoint. The result is bit-identical
    /// to that of an uninterrupted run. The data set must be the same. Recipe, views and, unless
    /// set here, device are those of the run.
    ///
    /// # Errors
    /// [`Error`].
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use byol::{Dataset, Pretraining};
    ///
    /// let encoder = Pretraining::new(Dataset::folder("photos")?).resume("byol-runs/photos")?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn resume(mut self, out: impl AsRef<Path>) -> Result<Encoder, Error> {
        let plan = match self.epochs {
            Some(epochs) => extend_plan(out.as_ref(), epochs)?,
            None => read_plan(out.as_ref())?,
        };
        let device = match self.device {
            DeviceChoice::Auto => {
                plan.device.parse().map_err(|reason| Error::BadPlan { path: out.as_ref().into(), reason })?
            }
            device => device,
        };
        let opened = device::open(device)?;
        let data = self.prepare(&plan.recipe)?;
        let run = Run::resume(out.as_ref(), plan, &data, self.context(opened.device))?;
        self.train(run)
    }

    fn context(&mut self, device: Device) -> RunContext {
        let threads = if self.threads == 0 { device::machine().cores } else { self.threads };
        RunContext { augmentation: self.augmentation.take(), ..RunContext::single_process(device, threads) }
    }

    fn prepare(&self, recipe: &Recipe) -> Result<TrainingData, Error> {
        let options = PrepareOptions { cache_bytes: cache_bytes(device::machine().free_mb), ..recipe.into() };
        let stop = self.stop;
        let is_stopped = || stop.is_some_and(|stop| stop.load(Ordering::Relaxed));
        TrainingData::prepare_unless_stopped(self.dataset.clone(), options, &|_| match is_stopped() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        })
    }

    fn train(self, mut run: Run) -> Result<Encoder, Error> {
        run.run(self.stop.unwrap_or(&AtomicBool::new(false)), self.on_event)?;
        Ok(Encoder::new(run.plan.encoder.clone(), run.byol.online.clone()))
    }
}
