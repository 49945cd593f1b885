//! Use of a trained encoder: open a file, embed images.

use std::path::Path;

use crate::{
    data::{DecodeError, decode},
    device::{self, DeviceChoice},
    image::Image,
    nn::weights,
};

pub use crate::nn::Encoder;

/// Errors of [`Encoder::open`].
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No usable device.
    #[error(transparent)]
    Device(#[from] device::Error),
    /// Not a readable encoder.
    #[error(transparent)]
    Weights(#[from] weights::Error),
}

impl Encoder {
    /// Opens the encoder of a run folder, or an encoder file, on the best available device.
    ///
    /// # Errors
    /// [`OpenError`].
    ///
    /// # Examples
    ///
    /// ```no_run
    /// let encoder = byol::Encoder::open("byol-runs/my-photos")?;
    /// let features: Vec<f32> = encoder.embed_image("cat.jpg")?;
    /// assert_eq!(features.len(), encoder.features());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn open(path: impl AsRef<Path>) -> Result<Encoder, OpenError> {
        Encoder::open_on(path, DeviceChoice::Auto)
    }

    /// Opens an encoder on the chosen device.
    ///
    /// # Errors
    /// [`OpenError`].
    ///
    /// # Examples
    ///
    /// ```no_run
    /// let encoder = byol::Encoder::open_on("encoder.safetensors", byol::DeviceChoice::Cpu)?;
    /// # Ok::<(), byol::OpenError>(())
    /// ```
    pub fn open_on(path: impl AsRef<Path>, device: DeviceChoice) -> Result<Encoder, OpenError> {
        let device = device::open(device)?.device;
        Ok(weights::load(&weights::resolve(path.as_ref()), &device)?)
    }

    /// Reads an image file and returns its representation, `[F]`.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn embed_image(&self, path: impl AsRef<Path>) -> Result<Vec<f32>, DecodeError> {
        let image = decode::file(path.as_ref(), &self.spec.levels)?;
        match (image.channels, self.spec.channels) {
            (found, expected) if found != expected => Err(DecodeError::WrongChannels { found, expected }),
            _ => Ok(self.embed_pixels(&image)),
        }
    }

    /// The encoder as a safetensors file, with torchvision's parameter names.
    pub fn to_safetensors(&self) -> Vec<u8> {
        weights::to_file(&self.spec, &self.weights, None)
    }

    /// Representation of a decoded image of any size, `[F]`.
    ///
    /// # Panics
    /// If the image does not have the channels of the encoder's input.
    ///
    /// # Examples
    ///
    /// ```
    /// use byol::{Encoder, Image, nn::EncoderSpec};
    ///
    /// # let device = byol::device::open(byol::DeviceChoice::Cpu)?.device;
    /// # let recipe = byol::Recipe::named("cifar10")?.with("encoder.width", 0.0625)?.check()?;
    /// # let spec = EncoderSpec { architecture: recipe.encoder.architecture, width: 0.0625, stem: byol::nn::Stem::Cifar,
    /// #     size: 32, center: 1.0, antialias: false, channels: 3, normalization: recipe.normalize, eps: 1e-5,
    /// #     levels: Default::default() };
    /// let encoder = Encoder::random(spec, 0, &device);
    /// let image = Image { height: 40, width: 60, channels: 3, pixels: vec![128u8; 40 * 60 * 3].into() };
    /// assert_eq!(encoder.embed_pixels(&image).len(), encoder.features());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn embed_pixels(&self, image: &Image) -> Vec<f32> {
        let view = self.spec.evaluation_view(image);
        self.embed_view(&view.interleaved())
    }
}
