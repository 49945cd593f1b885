//! Libraries that panic at broken input, as errors: a damaged file is no bug of ours and ends no run without a word.

use std::{
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind},
};

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// What `f` gives, or what it panicked with. What `f` has begun to change must not be used after a panic.
///
/// # Errors
/// The panic's message.
pub fn guarded<T>(f: impl FnOnce() -> T) -> Result<T, String> {
    let before = GUARDED.replace(true);
    let outcome = catch_unwind(AssertUnwindSafe(f));
    GUARDED.set(before);
    outcome.map_err(|panic| {
        let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
        text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "it broke its reader".into())
    })
}

/// Whether this thread is inside of [`guarded`]: then a panic need not be reported, as it becomes an error.
pub fn is_guarded() -> bool {
    GUARDED.get()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_error_and_the_guard_ends() {
        assert_eq!(guarded(is_guarded), Ok(true));
        assert_eq!(guarded(|| -> u8 { panic!("at {}", 7) }), Err("at 7".into()));
        assert!(!is_guarded());
    }
}
