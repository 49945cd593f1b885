//! Conversion of panics to errors, for libraries that panic on invalid input: a damaged file must
//! not abort a run.

use std::{
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind},
};

thread_local! {
    static CATCHING: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f`, returning its panic message as an error. State that `f` mutates must not be used after
/// a panic.
///
/// # Errors
/// The panic message.
pub fn catch_panic<T>(f: impl FnOnce() -> T) -> Result<T, String> {
    let before = CATCHING.replace(true);
    let outcome = catch_unwind(AssertUnwindSafe(f));
    CATCHING.set(before);
    outcome.map_err(|panic| {
        let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
        text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "the decoder panicked".into())
    })
}

/// Returns `true` inside of [`catch_panic`] on this thread, where a panic hook need not report
/// panics.
pub fn is_catching() -> bool {
    CATCHING.get()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panic_becomes_an_error_and_catching_ends() {
        assert_eq!(catch_panic(is_catching), Ok(true));
        assert_eq!(catch_panic(|| -> u8 { panic!("at {}", 7) }), Err("at 7".into()));
        assert!(!is_catching());
    }
}
