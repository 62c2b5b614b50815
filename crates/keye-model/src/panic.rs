//! Panics that are caught, in words.

use std::any::Any;

/// What a panic said, if it did.
pub fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("(no message)")
}

/// The same as the reason of a failure.
pub(crate) fn panicked(panic: &(dyn Any + Send)) -> String {
    format!("panicked: {}", panic_text(panic))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_say_what_they_said() {
        let caught = |work: fn()| std::panic::catch_unwind(work).unwrap_err();
        assert_eq!(panic_text(&*caught(|| panic!("boom {}", 1))), "boom 1");
        assert_eq!(panicked(&*caught(|| std::panic::panic_any(1))), "panicked: (no message)");
    }
}
