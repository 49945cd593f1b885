//! Labeled images, split for training and testing.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use crate::data::{self, Dataset, Images};

/// Errors of data that cannot train and test a classifier.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Unlabeled or unreadable data.
    #[error(transparent)]
    Data(#[from] data::Error),
    /// There are fewer than two images.
    #[error("too few images in {} for training and testing (at least 2 are needed)", .0.display())]
    TooFew(PathBuf),
    /// No test image is readable.
    #[error("none of the test images of {} can be used", .0.display())]
    NoTestImages(PathBuf),
    /// Images belong to several classes.
    #[error("images of {} have several classes each\nhint: use `byol eval transfer`", .0.display())]
    SeveralClasses(PathBuf),
    /// A class cannot be learned.
    #[error("class `{class}` of {} has test images but no training images\nhint: add some, or increase `--limit`", root.display())]
    NotTrained {
        /// Data set.
        root: PathBuf,
        /// Class.
        class: String,
    },
    /// There is nothing to tell apart.
    #[error("all training images of {} have the same class (at least 2 are needed)", .0.display())]
    OneClass(PathBuf),
}

/// Labeled images, split for training and testing.
#[derive(Debug, Clone)]
pub struct LabeledSplit {
    /// Training images.
    pub train: Images,
    /// Test images.
    pub test: Images,
    /// Names of the classes.
    pub classes: Vec<String>,
}

impl LabeledSplit {
    /// Images of a data set of [`train_and_test`] after its images were checked.
    ///
    /// # Errors
    /// [`Error::NoTestImages`].
    pub fn checked(dataset: Dataset) -> Result<LabeledSplit, Error> {
        let test = dataset.test.ok_or(Error::NoTestImages(dataset.root))?;
        Ok(LabeledSplit { train: dataset.train, test, classes: dataset.classes })
    }

    /// Ensures that images have one label each, and that a classifier can learn them. `root` is the
    /// data set, for messages.
    ///
    /// # Errors
    /// [`Error::SeveralClasses`], [`Error::Data`] and those of [`ensure_learnable`].
    pub fn ensure_single_labels(&self, root: &Path) -> Result<(), Error> {
        if self.train.tags().is_some() {
            return Err(Error::SeveralClasses(root.to_owned()));
        }
        let (Some(train), Some(test)) = (self.train.labels(), self.test.labels()) else {
            return Err(data::Error::Unlabeled(root.to_owned()).into());
        };
        ensure_learnable(root, train.iter().copied(), test.iter().copied(), |class| self.classes[class].clone())
    }
}

/// Splits a data set into labeled training and test images, at most `limit` for training (0: all).
/// Validation images are for training, and without a test split, one image in five is for testing.
/// `on_note` receives sentences about what is not used as it is.
///
/// # Errors
/// [`Error::Data`], [`Error::TooFew`].
pub fn train_and_test(dataset: Dataset, limit: usize, on_note: &mut dyn FnMut(String)) -> Result<Dataset, Error> {
    let dataset = with_test_split(labeled_images(dataset, on_note)?, on_note)?;
    let train = with_validation_images(&dataset, on_note);
    Ok(Dataset { train, held_out: None, ..dataset }.limit(limit))
}

/// `1 test image`, `2 test images`.
fn images(n: usize, split: &str) -> String {
    format!("{n} {split}image{}", if n == 1 { "" } else { "s" })
}

/// Keeps labeled images. Test labels are often hidden: if the test split has none, the validation
/// split takes its role.
fn labeled_images(dataset: Dataset, on_note: &mut dyn FnMut(String)) -> Result<Dataset, Error> {
    let labeled = dataset.clone().labeled();
    if dataset.train.labeled().is_none() {
        return Err(dataset.unlabeled(&dataset.train).into());
    }
    let mut note = |split: &str, all: &Images, labeled: Option<&Images>| {
        let without = all.len() - labeled.map_or(0, Images::len);
        if without > 0 {
            let verbs = if without == 1 { "has no label and is" } else { "have no label and are" };
            on_note(format!("{without} of {} {verbs} not used", images(all.len(), split)));
        }
    };
    note("training ", &dataset.train, Some(&labeled.train));
    let Some(test) = &dataset.test else { return Ok(labeled) };
    let val = dataset.held_out.as_ref().filter(|val| !val.is_same(test));
    if let Some(val) = val {
        note("validation ", val, labeled.held_out.as_ref());
    }
    match (&labeled.test, &labeled.held_out) {
        (Some(labeled_test), _) => {
            note("test ", test, Some(labeled_test));
            Ok(labeled)
        }
        (None, Some(val)) => {
            let val_images = images(val.len(), "");
            on_note(format!("the test split has no labels: testing on the {val_images} of the `val` split"));
            Ok(Dataset { test: Some(val.clone()), ..labeled })
        }
        (None, None) => Err(dataset.unlabeled(test).into()),
    }
}

fn with_test_split(dataset: Dataset, on_note: &mut dyn FnMut(String)) -> Result<Dataset, Error> {
    if dataset.test.is_some() {
        return Ok(dataset);
    }
    if dataset.train.len() < 2 {
        return Err(Error::TooFew(dataset.root));
    }
    on_note("no test split: testing on one image in five".into());
    let (train, test) = dataset.train.split_off_test(5);
    Ok(Dataset { train, test: Some(test), ..dataset })
}

/// The training images, with those of a separate validation split: hyperparameters are selected on
/// held-out training images instead.
fn with_validation_images(dataset: &Dataset, on_note: &mut dyn FnMut(String)) -> Images {
    let (Some(val), Some(test)) = (&dataset.held_out, &dataset.test) else { return dataset.train.clone() };
    if val.is_same(test) {
        return dataset.train.clone();
    }
    let combined = match dataset.train.has_same_label_kind(val) {
        true => dataset.train.concat(val),
        false => None,
    };
    let usage = if combined.is_some() { "used for training" } else { "not used" };
    on_note(format!("`val` split: {} {usage}", images(val.len(), "")));
    combined.unwrap_or_else(|| dataset.train.clone())
}

/// Ensures that there are two classes, and training images of every class that is tested. `name`
/// names a class.
///
/// # Errors
/// [`Error::NotTrained`], [`Error::OneClass`].
pub fn ensure_learnable(
    root: &Path,
    train: impl Iterator<Item = usize>,
    mut test: impl Iterator<Item = usize>,
    name: impl Fn(usize) -> String,
) -> Result<(), Error> {
    let train: BTreeSet<usize> = train.collect();
    if let Some(class) = test.find(|class| !train.contains(class)) {
        return Err(Error::NotTrained { root: root.to_owned(), class: name(class) });
    }
    if train.len() < 2 { Err(Error::OneClass(root.to_owned())) } else { Ok(()) }
}
