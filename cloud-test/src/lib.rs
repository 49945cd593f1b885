//! Empty: this crate consists of tests.
