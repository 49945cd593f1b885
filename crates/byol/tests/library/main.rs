//! Integration tests of the library. One program, so that it links once.

mod architecture;
mod common;
mod decoding;
mod docs;
mod health;
mod method;
mod on_device;
mod oracle_method;
mod oracle_metrics;
mod oracle_views;
mod ranks;
