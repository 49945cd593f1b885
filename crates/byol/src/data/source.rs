//! Images that a program provides on demand.

use std::{fmt, io};

use super::{CHANNELS, DecodeError, Image, Images};
use crate::catch_panic::catch_panic;

/// Images that a program provides on demand, for
/// [`Dataset::from_source`](super::Dataset::from_source).
///
/// Image `i` must be the same at every call: it is read to check it, in every epoch unless all
/// images fit into memory, and for evaluations.
///
/// ```
/// use std::{io, sync::Arc};
///
/// use byol::{
///     Dataset, Image,
///     data::{CHANNELS, ImageSource},
/// };
///
/// #[derive(Debug)]
/// struct Gray;
///
/// impl ImageSource for Gray {
///     fn get(&self, i: usize) -> io::Result<Image> {
///         Ok(Image { height: 8, width: 8, channels: CHANNELS, pixels: vec![i as u8; 8 * 8 * CHANNELS].into() })
///     }
/// }
///
/// let data = Dataset::from_source(Arc::new(Gray), 100, None);
/// assert_eq!(data.train.get(3)?.pixels.to_u8()[0], 3);
/// # Ok::<(), byol::data::Error>(())
/// ```
pub trait ImageSource: fmt::Debug + Send + Sync {
    /// Returns image `i`. Called by several threads at once.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`], [`io::ErrorKind::NotFound`] or
    /// [`io::ErrorKind::UnexpectedEof`] for an image that cannot be used, which is skipped. Any
    /// other error, and a panic, ends the run or the evaluation.
    fn get(&self, i: usize) -> io::Result<Image>;

    /// Name of image `i` in messages.
    fn name(&self, i: usize) -> String {
        format!("image {i}")
    }

    /// Channels of every image, 1 to [`MAX_CHANNELS`](super::MAX_CHANNELS).
    fn channels(&self) -> usize {
        CHANNELS
    }
}

/// Image `i`, checked to be usable.
pub(super) fn checked(source: &dyn ImageSource, i: usize) -> io::Result<Image> {
    let panicked = |reason| io::Error::other(format!("the image source panicked: {reason}"));
    let image = catch_panic(|| source.get(i)).map_err(panicked)??;
    let (found, expected) = (image.channels, source.channels());
    let other_channels = || (found != expected).then(|| DecodeError::WrongChannels { found, expected }.to_string());
    match image.problem().or_else(other_channels) {
        None => Ok(image),
        Some(problem) => Err(io::Error::new(io::ErrorKind::InvalidData, problem)),
    }
}

/// The images of one split followed by those of another.
#[derive(Debug)]
pub(super) struct Concatenated(pub [Images; 2]);

impl Concatenated {
    fn at(&self, i: usize) -> (&Images, usize) {
        let [first, second] = &self.0;
        if i < first.len() { (first, i) } else { (second, i - first.len()) }
    }
}

impl ImageSource for Concatenated {
    fn get(&self, i: usize) -> io::Result<Image> {
        let (images, i) = self.at(i);
        images.get_unshared(i)
    }

    fn name(&self, i: usize) -> String {
        let (images, i) = self.at(i);
        images.name(i)
    }

    fn channels(&self) -> usize {
        self.0[0].n_channels()
    }
}

#[cfg(test)]
mod tests {
    use std::{ops::ControlFlow::Continue, sync::Arc};

    use super::*;
    use crate::data::{Dataset, Error};

    /// The first images are usable; one has too few pixels, and one cannot be read.
    #[derive(Debug)]
    struct Images {
        short: usize,
        failing: usize,
    }

    impl ImageSource for Images {
        fn get(&self, i: usize) -> io::Result<Image> {
            assert_ne!(i, 90, "ninety");
            if i == self.failing {
                return Err(io::Error::other("no connection"));
            }
            let n = if i == self.short { 1 } else { 4 * CHANNELS };
            Ok(Image { height: 2, width: 2, channels: CHANNELS, pixels: vec![i as u8; n].into() })
        }
    }

    fn dataset(short: usize, failing: usize) -> Dataset {
        Dataset::from_source(Arc::new(Images { short, failing }), 10, Some((0..10).map(|i| i % 3).collect()))
    }

    #[test]
    fn unusable_images_are_skipped_and_failures_end_the_check() {
        let checked = dataset(4, 99).check(0, &|| Continue(())).unwrap();
        assert_eq!((checked.train.len(), checked.skipped.len(), checked.classes.len()), (9, 1, 3));
        assert!(checked.skipped[0].to_string().starts_with("image 4: "), "{}", checked.skipped[0]);
        assert_eq!(checked.train.get(4).unwrap().pixels.to_u8()[0], 5);
        let failed = dataset(4, 7).check(0, &|| Continue(())).unwrap_err();
        assert!(matches!(&failed, Error::Read { .. }), "{failed}");
        assert_eq!(failed.to_string(), "cannot read image 7: no connection");
        let panicked = Dataset::from_source(Arc::new(Images { short: 99, failing: 99 }), 91, None).train.get(90);
        assert!(panicked.unwrap_err().to_string().contains("the image source panicked: "));
    }

    #[test]
    fn splits_are_concatenated() {
        let [a, b] = [4, 99].map(|short| dataset(short, 7).train.subset(&[1, 4, 7]));
        let both = a.concat(&b).unwrap();
        assert_eq!((both.len(), both.name(5), both.labels()), (6, "image 7".into(), Some(&[1, 1, 1, 1, 1, 1][..])));
        assert_eq!(both.get(4).unwrap().pixels.to_u8()[0], 4);
        assert!(both.get(1).is_err());
        let (readable, skipped) = both.subset(&[0, 1, 3, 4]).readable(&|| Continue(())).unwrap();
        assert_eq!((readable.len(), skipped.len()), (3, 1));
    }

    #[test]
    fn same_source_has_the_same_fingerprint() {
        let source: Arc<dyn ImageSource> = Arc::new(Images { short: 99, failing: 99 });
        let [a, b] = [10, 10].map(|n| Dataset::from_source(source.clone(), n, None).train);
        assert!(a.is_same(&b) && a.fingerprint() == b.fingerprint());
        assert_ne!(a.fingerprint(), a.subset(&[0, 1]).fingerprint());
    }
}
